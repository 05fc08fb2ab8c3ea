"""LiteRT files on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.accuracy.parallel import usable_cores


def interpreter(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """What runs a file of one input and one output, resized where the batch is another one."""
    from ai_edge_litert.interpreter import Interpreter

    active = Interpreter(str(path), num_threads=usable_cores())
    (given,), (result,) = active.get_input_details(), active.get_output_details()
    shape: tuple[int, ...] = ()

    def run(x: np.ndarray) -> np.ndarray:
        nonlocal shape
        if x.shape != shape:
            active.resize_tensor_input(given["index"], x.shape)
            active.allocate_tensors()
            shape = x.shape
        active.set_tensor(given["index"], x)
        active.invoke()
        return np.asarray(active.get_tensor(result["index"]))

    return run


def input_shape(path: Path) -> tuple[int, ...]:
    """The shape of a file's one input, of a size that varies 1."""
    from ai_edge_litert.interpreter import Interpreter

    (given,) = Interpreter(str(path)).get_input_details()
    return tuple(map(int, given["shape"]))


def operators(path: Path) -> list[tuple[str, type]]:
    """The operators of a file, each with the dtype of its first result."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    active = Interpreter(str(path), experimental_op_resolver_type=plain)
    dtypes = {entry["index"]: entry["dtype"] for entry in active.get_tensor_details()}
    return [(op["op_name"], dtypes[op["outputs"][0]]) for op in active._get_ops_details()]
