"""What the user asked for, checked once."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxquant.calibration.observers import OBSERVERS, Observer, find_observer
from jaxquant.errors import nearest
from jaxquant.graph.kinds import MEANINGS, PADDLE_NAMES
from jaxquant.plan.modes import MODES, STATIC

DEFAULT_OP_TYPES = ("conv2d", "depthwise_conv2d", "mul")
WEIGHT_QUANTIZE_TYPES = ("channel_wise_abs_max", "abs_max")
ACTIVATION_QUANTIZE_TYPES = ("asymmetric", "symmetric")
OPTIMIZE_FOR = ("size", "speed")
RECOVERY_STEPS = ("equalization", "smoothquant", "adaround", "bias_correction")  # in their order
DEFAULT_RECOVERY = ("bias_correction",)
WEIGHT_BITS = (8, 4)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """The choices of a quantization; see `jaxquant.quant_post` for their meaning.

    `left_float` are (site, reason) of the sites that stay float for what was measured on them.
    """

    algo: str | Observer = "KL"
    hist_percent: float = 0.99999
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES
    is_full_quantize: bool = False
    weight_quantize_type: str = "channel_wise_abs_max"
    activation_quantize_type: str = "asymmetric"
    recover: Sequence[str] = DEFAULT_RECOVERY
    skip: Sequence[str] = ()
    skip_first_last: bool = False
    mode: str = STATIC
    weight_bits: int = 8
    group_size: int | None = None
    optimize_for: str = "size"
    left_float: tuple[tuple[str, str], ...] = ()

    @property
    def observer(self) -> Observer:
        """What chooses the thresholds."""
        return find_observer(self.algo, self.hist_percent)

    @property
    def algo_name(self) -> str:
        return self.algo if isinstance(self.algo, str) else "custom"

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that become int8."""
        return frozenset(
            MODES[self.mode].kinds if self.is_full_quantize else self.quantizable_op_type
        )

    def __post_init__(self) -> None:
        if not isinstance(self.algo, Observer):
            _check("algo", self.algo, OBSERVERS)
        _check_percent(self.hist_percent)
        for name in ("quantizable_op_type", "skip", "recover"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(
                    f"{name} is a sequence of names, got {value!r}; write ({value!r},) for one"
                )
            object.__setattr__(self, name, tuple(value))
        valid = MODES[self.mode].kinds
        asked = [
            PADDLE_NAMES.get(kind, kind) if isinstance(kind, str) else kind
            for kind in self.quantizable_op_type
        ]
        for kind in asked:
            _check_kind(kind, valid)
        object.__setattr__(self, "quantizable_op_type", tuple(dict.fromkeys(asked)))
        if not self.quantizable_op_type:
            raise ValueError(f"quantizable_op_type is empty; choose from {', '.join(valid)}")
        if type(self.weight_bits) is not int or self.weight_bits not in WEIGHT_BITS:
            raise ValueError(f"bits is 8 or 4, got {self.weight_bits!r}")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(
                f"group_size is how many weights share a scale, a positive integer, or None for "
                f"one scale a channel; got {size!r}"
            )
        _check("weight_quantize_type", self.weight_quantize_type, WEIGHT_QUANTIZE_TYPES)
        _check("activation_quantize_type", self.activation_quantize_type, ACTIVATION_QUANTIZE_TYPES)
        _check("optimize_for", self.optimize_for, OPTIMIZE_FOR)
        for step in self.recover:
            _check("recover", step, RECOVERY_STEPS)
        for name in ("is_full_quantize", "skip_first_last"):
            check_flag(name, getattr(self, name))
        for pattern in self.skip:
            if not isinstance(pattern, str) or pattern in ("", "kind:", "module:"):
                raise ValueError(
                    f"skip holds glob patterns on site names, and 'kind:' or 'module:' with one "
                    f"behind it; got {pattern!r}"
                )


def check_flag(name: str, value: object) -> None:
    """Raise ValueError where an argument is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is True or False, got {value!r}")


def check_path(name: str, path: object) -> None:
    """Raise where the path of a file is no path; None is for no file."""
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} is the path of a file or None, got {path!r}")
    if path is not None and not os.fspath(path):
        raise ValueError(f"{name} is empty: give the path of a file, or None for no file")


def _check_percent(value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= 1:
        return
    hint = f"; {value!r} % is {value / 100:.6g}" if is_number and 1 < value <= 100 else ""
    raise ValueError(f"hist_percent is a fraction in (0, 1], such as 0.99999; got {value!r}{hint}")


def _check_kind(kind: object, valid: Sequence[str]) -> None:
    """As `_check`; a word of JAX's, such as Dense, is answered with the kind that means it."""
    for name, meaning in MEANINGS.items():
        words = re.findall(r"\w+", meaning.lower())
        if kind not in valid and name in valid and str(kind).lower() in words:
            raise ValueError(f"quantizable_op_type: {kind!r} is not known; {name!r} is {meaning}")
    _check("quantizable_op_type", kind, valid)


def _check(argument: str, value: object, valid: Iterable[str]) -> None:
    names = list(valid)
    if value in names:
        return
    raise ValueError(f"{argument}: {value!r} is not known{nearest(str(value), names)}")
