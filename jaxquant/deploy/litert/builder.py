"""A LiteRT graph under construction, with what moves values in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.litert.graph import Graph, Grid
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, straight


class Builder(Graph):
    """The graph with what moves values in it: floats, whole numbers and int8 alike."""

    def grid(self, value: Value) -> Grid | None:
        """What the integers of a value are worth; None of floats."""
        return self.tensors[value.name].grid

    def dtype(self, value: Value) -> str:
        return self.tensors[value.name].dtype

    def named(self, array: Any, hint: str = "constant") -> Value:
        """A constant as a value whose axes are in order."""
        array = np.asarray(array)
        return Value(self.constant(array, hint), array.shape, straight(array.ndim))

    def alike(
        self,
        op: str,
        value: Value,
        others: Sequence[str],
        physical: Sequence[Size],
        options: str = "",
        **settings: Any,
    ) -> str:
        """Add an operator that hands values on: its result is on the grid of its operand."""
        of = self.tensors[value.name]
        names = [value.name, *others]
        return self.op(op, names, physical, of.dtype, of.grid, options, **settings)

    def plain(self, value: Value) -> Value:
        """The value without a factor."""
        if value.factor == 1.0:
            return value
        factor = self.constant(np.float32(value.factor))
        name = self.op("MUL", [value.name, factor], value.physical, options="MulOptions")
        return dataclasses.replace(value, name=name, factor=1.0)

    def reshape(self, value: Value, physical: Sequence[Size]) -> str:
        """A tensor with other sizes, its elements where they lie.

        Raises:
          NotCovered: two of the sizes vary: a runtime infers one.
        """
        if value.physical == tuple(physical):
            return value.name
        # A constant is reshaped here, so that the file holds no operation for it.
        if (array := self.array(value.name)) is not None:
            sizes = [int(size) for size in physical]
            return self.constant(array.reshape(sizes), "constant", self.grid(value))
        if sum(isinstance(size, str) for size in physical) > 1:
            raise NotCovered(
                f"a reshape to {list(physical)}, in which two sizes vary (give `shapes` with fewer "
                "of them)"
            )
        numbers = [-1 if isinstance(size, str) else size for size in physical]
        sizes_name = self.ints(numbers)
        return self.alike("RESHAPE", value, [sizes_name], physical)

    def ordered(self, value: Value, order: Sequence[int]) -> Value:
        """The value in another physical order."""
        value, order = self.plain(value), tuple(order)
        if value.order == order:
            return value
        permutation = [value.order.index(axis) for axis in order]
        physical = [value.shape[axis] for axis in order]
        array, grid = self.array(value.name), self.grid(value)
        moved = [axis for axis in value.order if value.shape[axis] != 1]
        # With a scale for each channel the grid's axis would move as well.
        if array is not None and (grid is None or grid.scale.size == 1):
            name = self.constant(array.transpose(permutation), "constant", grid)
        elif moved == [axis for axis in order if value.shape[axis] != 1]:
            name = self.reshape(value, physical)  # sizes of 1 move freely
        else:
            places = self.ints(permutation, "permutation")
            name = self.alike("TRANSPOSE", value, [places], physical)
        return dataclasses.replace(value, name=name, order=order)

    def expanded(self, value: Value, shape: Sequence[Size]) -> Value:
        """The value with its broadcast done: `shape` is what its logical axes have to be.

        Raises:
          NotCovered: the copies are of a number that varies.
        """
        value = self.plain(value)
        if value.shape == tuple(shape):
            return value
        repeats = []
        for axis in value.order:
            old, new = value.shape[axis], shape[axis]
            if old != new and isinstance(new, str):
                raise NotCovered("copies along an axis whose size varies")
            repeats.append(1 if old == new else int(new))
        physical = [shape[axis] for axis in value.order]
        # A constant is repeated now, in the file; anything else when the model is run.
        array = self.array(value.name)
        if array is not None:
            name = self.constant(np.tile(array, repeats), "constant", self.grid(value))
        else:
            name = self.alike("TILE", value, [self.ints(repeats, "repeats")], physical)
        return dataclasses.replace(value, name=name, shape=tuple(shape))

    def reshaped(self, value: Value, shape: Sequence[Size]) -> Value:
        """A reshape in row-major order, as JAX does it."""
        value = self.ordered(value, straight(value.rank))
        return Value(self.reshape(value, shape), tuple(shape), straight(len(shape)))

    def quantize(self, value: Value, grid: Grid) -> Value:
        """A float on an int8 grid, or int8 on another grid."""
        value = self.plain(value)
        if grid.same_as(self.grid(value)):
            return value
        name = self.op("QUANTIZE", [value.name], value.physical, "int8", grid)
        return dataclasses.replace(value, name=name)

    def dequantize(self, value: Value) -> Value:
        """The float of an int8 value."""
        name = self.op("DEQUANTIZE", [value.name], value.physical)
        return dataclasses.replace(value, name=name)

    def apart(self, value: Value, others: Collection[str]) -> str:
        """The value as a tensor that an operator makes and that is none of `others`."""
        # Inputs and constants are no results: a runtime wants outputs that an operator writes.
        made = {name for operator in self.operators for name in operator.outputs}
        if value.name in made and value.name not in others:
            return value.name
        # A reshape to the same sizes is a copy that every runtime has.
        sizes = self.ints([-1 if isinstance(size, str) else size for size in value.physical])
        return self.alike("RESHAPE", value, [sizes], value.physical)
