"""An ONNX graph under construction, with what moves values in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.onnx import whole_numbers
from jaxquant.deploy.onnx.nodes import Nodes


class Builder(Nodes):
    """The graph with what moves values in it."""

    def shape(self, sizes: Sequence[Size], may_infer: bool = True) -> str:
        """A shape as a tensor; with `may_infer`, one size that varies is left to Reshape as -1."""
        return whole_numbers.shape(self, sizes, may_infer)

    def reshape(self, name: str, before: Sequence[Size], after: Sequence[Size]) -> str:
        """A tensor of some physical sizes with others.

        Reshape keeps a size that it is told as 0, and infers one that is -1, so that sizes which
        vary are rarely computed.
        """
        pairs = zip(before, after, strict=False)
        sizes = [0 if isinstance(new, str) and new == old else new for old, new in pairs]
        sizes += after[len(sizes) :]

        # Reshape's 0 keeps a size; a size that is 0 would be taken for that.
        if 0 in (*before, *after) or sum(isinstance(size, str) for size in sizes) > 1:
            return self.node("Reshape", [name, self.shape(after)])
        numbers = [-1 if isinstance(size, str) else size for size in sizes]
        return self.node("Reshape", [name, self.ints(numbers)])

    def transposed_constant(self, matrix: np.ndarray, hint: str) -> str:
        """A constant matrix that is in the file transposed, where something else reads that.

        Runtimes transpose it once, when they load the file, and keep the form of their kernels.
        """
        name = self.constant(np.ascontiguousarray(matrix.T), hint)
        with self.outermost():
            return self.node("Transpose", [name], perm=[1, 0])

    def reshaped_constant(self, name: str, shape: Sequence[int]) -> str:
        """A constant that something else reads with other sizes."""
        with self.outermost():
            return self.node("Reshape", [name, self.ints(shape)])

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
            name = self.reshape(value.name, value.physical, [value.shape[a] for a in order])
        else:
            name = self.node("Transpose", [value.name], perm=[value.order.index(a) for a in order])
        return dataclasses.replace(value, name=name, order=order)

    def expanded(self, value: Value, shape: Sequence[Size]) -> Value:
        """The value with its broadcast done: `shape` is what its logical axes have to be."""
        value = self.plain(value)
        if value.shape == tuple(shape):
            return value
        # Not left to be inferred: Expand takes sizes alone.
        wanted = self.shape([shape[axis] for axis in value.order], may_infer=False)
        name = self.node("Expand", [value.name, wanted])
        return dataclasses.replace(value, name=name, shape=tuple(shape))

    def reshaped(self, value: Value, shape: Sequence[Size]) -> Value:
        """A reshape in row-major order, as JAX does it."""
        value = self.ordered(value, straight(value.rank))
        name = self.reshape(value.name, value.physical, shape)
        return Value(name, tuple(shape), straight(len(shape)))
