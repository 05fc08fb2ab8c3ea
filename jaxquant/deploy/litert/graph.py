"""A LiteRT graph as plain data: tensors, and the operators between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.lower.values import Size


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the integers of a tensor are worth: `scale * (integer - zero_point)`.

    Attributes:
      scale: float32 [1], or [C] along `axis`.
      zero_point: the integer that stands for zero.
      axis: the physical axis of the channels.
    """

    scale: np.ndarray
    zero_point: int = 0
    axis: int = 0

    @staticmethod
    def of(scale: float, zero_point: int) -> Grid:
        """The grid of an activation."""
        return Grid(np.asarray([scale], np.float32), zero_point)

    def same_as(self, other: Grid | None) -> bool:
        """True for equal numbers."""
        return (
            other is not None
            and self.zero_point == other.zero_point
            and np.array_equal(self.scale, other.scale)
        )

    def integer(self, value: float) -> int:
        """The int8 integer of an activation's value, as runtimes round and saturate it."""
        if np.isinf(value):
            return 127 if value > 0 else -128
        rounded = np.rint(np.float32(value) / self.scale[0]) + self.zero_point
        return int(np.clip(rounded, -128, 127))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor.

    Attributes:
      shape: its sizes as they lie in memory; a string names one that varies.
      dtype: by NumPy's name.
      grid: of its integers; None for floats and whole numbers.
      array: what it holds, of a constant.
    """

    shape: tuple[Size, ...]
    dtype: str
    grid: Grid | None = None
    array: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator, by its name in the schema, with its table of options and what that sets."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    options: str
    settings: Mapping[str, Any]
    version: int


class Graph:
    """Collects tensors and operators; every method gives the names of what it adds.

    Attributes:
      tensors: name -> tensor, in the order of the file.
      operators: in the order in which they run.
      scope: what names begin with.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.scope = ""
        self._constants: dict[Any, str] = {}

    def unique(self, name: str) -> str:
        """A name that no tensor has yet."""
        found, number = name, 0
        while found in self.tensors:
            number += 1
            found = f"{name}_{number}"
        return found

    def tensor(self, tensor: Tensor, hint: str) -> str:
        """Add a tensor."""
        name = self.unique("/".join(part for part in (self.scope, hint) if part))
        self.tensors[name] = tensor
        return name

    def op(
        self,
        op: str,
        inputs: Sequence[str],
        shape: Sequence[Size],
        dtype: str = "float32",
        grid: Grid | None = None,
        options: str = "",
        **settings: Any,
    ) -> str:
        """Add an operator with one output of this shape."""
        (name,) = self.split_op(op, inputs, [shape], dtype, grid, options, **settings)
        return name

    def split_op(
        self,
        op: str,
        inputs: Sequence[str],
        shapes: Sequence[Sequence[Size]],
        dtype: str = "float32",
        grid: Grid | None = None,
        options: str = "",
        **settings: Any,
    ) -> list[str]:
        """Add an operator with several outputs, which are alike but for their shapes."""
        names = [self.tensor(Tensor(tuple(shape), dtype, grid), op.lower()) for shape in shapes]

        # Kernels are chosen by an operator's version; one int8 operand or result asks for int8's.
        is_int8 = any(self.tensors[name].dtype == "int8" for name in (*inputs, *names))
        version = _INT8_VERSIONS.get(op, 2) if is_int8 else _VERSIONS.get(op, 1)
        self.operators.append(Operator(op, tuple(inputs), names, options, settings, version))
        return names

    def constant(self, array: Any, hint: str = "constant", grid: Grid | None = None) -> str:
        """A constant; equal ones are in the file once."""
        array = np.asarray(array)
        # Equal integers on another grid are another constant.
        worth = None if grid is None else (grid.scale.tobytes(), grid.zero_point, grid.axis)
        key = (array.dtype.str, array.shape, array.tobytes(), worth)
        if key not in self._constants:
            tensor = Tensor(array.shape, str(array.dtype), grid, array)
            self._constants[key] = self.tensor(tensor, hint)
        return self._constants[key]

    def ints(self, values: Any, hint: str = "sizes") -> str:
        """Whole numbers that tell an operator sizes, axes or places: int32."""
        return self.constant(np.asarray(values, np.int32), hint)

    def array(self, name: str) -> np.ndarray | None:
        """What a constant holds; None of a tensor that is computed."""
        return self.tensors[name].array


# The versions of operators in which they take int8, where that is not 2, and those in which they
# take what is written here of the others, where that is not 1.
_INT8_VERSIONS = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 6,  # with a scale for each channel
    "FULLY_CONNECTED": 12,  # likewise
    "GATHER": 2,
    "QUANTIZE": 1,
    "RESHAPE": 1,
    "SUB": 3,
    "TRANSPOSE_CONV": 3,
}
_VERSIONS = {"TRANSPOSE_CONV": 3, "FULLY_CONNECTED": 2, "SELECT_V2": 1}
