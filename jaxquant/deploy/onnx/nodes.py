"""Nodes and initialisers of an ONNX graph under construction."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size
from jaxquant.extras import how_to_install

_MULTIPLE = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")


def import_onnx() -> Any:
    """The `onnx` package; raises ImportError that names the extra."""
    try:
        onnx = importlib.import_module("onnx")
        # Each by itself: `import onnx` alone brings none of them.
        importlib.import_module("onnx.helper"), importlib.import_module("onnx.numpy_helper")
        importlib.import_module("onnx.checker")
    except ImportError as error:
        raise ImportError(f"export_onnx needs onnx: {how_to_install('onnx')}") from error
    return onnx


class Nodes:
    """Collects the graph; every method returns the name of what it adds."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.onnx = import_onnx()
        self.nodes: list[Any] = []
        self._outermost = self.nodes
        self.arrays: dict[str, np.ndarray] = {}  # the initialisers
        self._constants: dict[Any, str] = {}
        self.read: set[str] = set()  # the names that some node reads
        self.domains: set[str] = set()  # of operators that are not ONNX's own
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
        # A model names the sets of operators that it uses.
        self.domains |= {attributes["domain"]} if "domain" in attributes else set()
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

    @contextlib.contextmanager
    def outermost(self) -> Iterator[None]:
        """What is added inside goes into the graph around all loops, before the one at hand."""
        inner, self.nodes = self.nodes, self._outermost
        try:
            yield
        finally:
            self.nodes = inner

    def constant(self, array: Any, hint: str = "constant", is_shared: bool = True) -> str:
        """An initialiser; equal arrays share one, unless this one is not to be shared."""
        array = np.asarray(array)
        # By content, so that the same number in many places is in the file once.
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
            # The first input that has a size tells it.
            if found is not None:
                self._sizes.setdefault(found[2], (name, axis, int(found[1] or 1)))

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
