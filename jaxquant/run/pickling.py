"""What `pickle` and `copy` make of a quantized model."""

from __future__ import annotations

from typing import Any, NoReturn, Self


class NotPickled:
    """A function of compiled programs: its copy is itself, and a file is made otherwise."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a quantized model is not pickled: it holds the code of the float model and compiled "
            "programs. jaxquant.save_quantized_model(path, qparams, qapply) writes it to a file, "
            "and jaxquant.load_quantized_model(path) reads it anywhere; qparams alone, a dict of "
            "arrays, can be pickled"
        )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self
