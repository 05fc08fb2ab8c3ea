"""Nodes, initialisers and values of an ONNX graph under construction."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.onnx import whole_numbers
from jaxquant.deploy.onnx.errors import NotCovered
from jaxquant.extras import how_to_install

Size = int | str  # a string names a size that varies


def import_onnx() -> Any:
    """The `onnx` package; raises ImportError that names the extra."""
    try:
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnx.helper"), importlib.import_module("onnx.numpy_helper")
        importlib.import_module("onnx.checker")
    except ImportError as error:
        raise ImportError(f"export_onnx needs onnx: {how_to_install('onnx')}") from error
    return onnx


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the ONNX graph.

    Attributes:
      name: in the graph.
      shape: the sizes of its logical axes, those of the JAX tensor; 1 where that one holds copies
        (a broadcast is put off, since most operations do it themselves).
      order: the logical axis that each physical axis holds.  A transpose changes this alone.
      factor: the JAX tensor is this times the ONNX one; a window's sum is an average times a
        number, which the division behind it takes away again.
    """

    name: str
    shape: tuple[Size, ...]
    order: tuple[int, ...]
    factor: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def physical(self) -> tuple[Size, ...]:
        """The sizes of the physical axes."""
        return tuple(self.shape[axis] for axis in self.order)

    def axis(self, logical: int) -> int:
        """The physical axis of a logical one."""
        return self.order.index(logical)


_MULTIPLE = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")


def straight(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))


class Builder:
    """Collects the graph; every method returns the name of what it adds."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.onnx = import_onnx()
        self.nodes: list[Any] = []
        self.arrays: dict[str, np.ndarray] = {}  # the initialisers
        self._constants: dict[Any, str] = {}
        self.read: set[str] = set()  # the names that some node reads
        self._names: set[str] = set()
        self._sizes: dict[str, tuple[str, int, int]] = {}  # name -> input, axis, what divides it
        self.scope = ""

    def unique(self, name: str) -> str:
        found, number = name, 0
        while found in self._names:
            number += 1
            found = f"{name}_{number}"
        self._names.add(found)
        return found

    def node(self, op: str, inputs: Sequence[str], hint: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.split_node(op, inputs, 1, hint, **attributes)[0]

    def split_node(
        self, op: str, inputs: Sequence[str], outputs: int, hint: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs."""
        name = self.unique("/".join(part for part in (self.scope, hint or op) if part))
        ends = [f":{k}" if outputs > 1 else ":out" for k in range(outputs)]
        names = [self.unique(name + end) for end in ends]
        self.read.update(inputs)
        make = self.onnx.helper.make_node
        self.nodes.append(make(op, list(inputs), names, name=name, **attributes))
        return names

    @contextlib.contextmanager
    def subgraph(self) -> Iterator[list[Any]]:
        """What is added inside goes into the list of nodes that it gives: the body of a loop.

        A body may read whatever was added before, and initialisers.
        """
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    def constant(self, array: Any, hint: str = "constant", is_shared: bool = True) -> str:
        """An initialiser; equal arrays share one, unless this one is not to be shared."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if is_shared and key in self._constants:
            return self._constants[key]
        name = self.unique("/".join(part for part in (self.scope, hint) if part))
        self.arrays[name] = array
        if is_shared:
            self._constants[key] = name
        return name

    def ints(self, values: Sequence[int]) -> str:
        return self.constant(np.asarray(values, np.int64), "sizes")

    def name_sizes(self, name: str, sizes: Sequence[Size]) -> None:
        """Tell where the sizes that vary can be read from: the axes of this input.

        An axis of "2*h" tells h too.
        """
        for axis, size in enumerate(sizes):
            found = _MULTIPLE.fullmatch(size) if isinstance(size, str) else None
            if found is not None:
                self._sizes.setdefault(found[2], (name, axis, int(found[1] or 1)))

    def shape(self, sizes: Sequence[Size], may_infer: bool = True) -> str:
        """A shape as a tensor; with `may_infer`, one size that varies is left to Reshape as -1."""
        varying = [size for size in sizes if isinstance(size, str)]
        if len(varying) <= 1 and (may_infer or not varying) and 0 not in sizes:
            return self.ints([-1 if isinstance(size, str) else size for size in sizes])
        parts = [whole_numbers.name_of(self, whole_numbers.of_size(self, size)) for size in sizes]
        return self.node("Concat", parts, "shape", axis=0)

    def named_size(self, size: str) -> str:
        """A size that varies, of its name: int64 [1]."""
        if size not in self._sizes:
            raise NotCovered(f"the size {size!r}, which no input has")
        name, axis, divisor = self._sizes[size]
        shape = self.node("Shape", [name], "shape")
        number = self.node("Gather", [shape, self.ints([axis])], "size", axis=0)
        if divisor == 1:
            return number
        return self.node("Div", [number, self.ints([divisor])], "size")

    # Values

    def plain(self, value: Value) -> Value:
        """The value without a factor."""
        if value.factor == 1.0:
            return value
        name = self.node("Mul", [value.name, self.constant(np.float32(value.factor))])
        return dataclasses.replace(value, name=name, factor=1.0)

    def ordered(self, value: Value, order: Sequence[int]) -> Value:
        """The value in another physical order."""
        value, order = self.plain(value), tuple(order)
        if value.order == order:
            return value
        if value.name in self.arrays:
            array = self.arrays[value.name].transpose([value.order.index(a) for a in order])
            return dataclasses.replace(value, name=self.constant(array), order=order)
        moved = [axis for axis in value.order if value.shape[axis] != 1]
        if moved == [axis for axis in order if value.shape[axis] != 1]:  # sizes of 1 move freely
            name = self.node("Reshape", [value.name, self.shape([value.shape[a] for a in order])])
        else:
            name = self.node("Transpose", [value.name], perm=[value.order.index(a) for a in order])
        return dataclasses.replace(value, name=name, order=order)

    def expanded(self, value: Value, shape: Sequence[Size]) -> Value:
        """The value with its broadcast done: `shape` is what its logical axes have to be."""
        value = self.plain(value)
        if value.shape == tuple(shape):
            return value
        wanted = self.shape([shape[axis] for axis in value.order], may_infer=False)
        name = self.node("Expand", [value.name, wanted])
        return dataclasses.replace(value, name=name, shape=tuple(shape))

    def reshaped(self, value: Value, shape: Sequence[Size]) -> Value:
        """A reshape in row-major order, as JAX does it."""
        value = self.ordered(value, straight(value.rank))
        name = self.node("Reshape", [value.name, self.shape(shape)])
        return Value(name, tuple(shape), straight(len(shape)))
