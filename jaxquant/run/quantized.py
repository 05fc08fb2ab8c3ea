"""The int8 forms of tensors during one evaluation: made once, handed through, read back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.backends import int8, operations
from jaxquant.graph import evaluate, ir
from jaxquant.graph.rows import axis_of
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.binding import Binding
from jaxquant.run import nonfinite, pooling
from jaxquant.run.hidden import Hidden


class QuantizedTensors:
    """Reads tensors of an evaluation in int8, and int8 tensors as floats.

    It is a `Reader` too: of a tensor with an int8 form it gives the dequantized value, so that an
    equation that reads through it does not need the float tensor.

    Attributes:
      marks: which rows hold NaN or infinity, bool [N], of the tensors with origins that were
        quantized; of one that is marked as a whole, bool [].
      stored: the floats that are in memory, as the model's inputs are, and not computed on the way
        to where they are read: what a kernel gives is one.
      in_floats: whether what is quantized is held in float32.
    """

    def __init__(
        self,
        env: evaluate.Environment,
        binding: Binding,
        tensors: Mapping[str, Any],
        early: Mapping[ir.Var, ir.Equation],
        hidden: Hidden | None = None,
        varies: bool = False,
        natively: bool = False,
    ) -> None:
        self.graph = env.graph
        self._env = env
        self._binding = binding
        self._tensors = tensors
        self._early = early
        self._hidden = hidden
        self._varies = varies
        self._natively = natively
        self._marked: set[ir.Var] = set()
        self.marks: dict[ir.Var, jax.Array] = {}
        self.stored = set(self.graph.inputs)
        self.in_floats = False
        self._values: dict[ir.Var, jax.Array] = {}
        self._to_pool: dict[ir.Var, jax.Array] = {}

    def apart(
        self, env: evaluate.Environment, tensors: Mapping[str, Any], in_floats: bool
    ) -> QuantizedTensors:
        """Those of another evaluation of some of the same equations, none of them there yet.

        Args:
          env: of that evaluation.
          tensors: the arrays of the grids.
          in_floats: whether the integers are held in float32.
        """
        other = copy.copy(self)
        other._env, other._tensors, other.in_floats = env, tensors, in_floats
        other._marked, other.marks, other.stored = {*self._marked}, {}, set()
        other._values, other._to_pool = {}, {}
        return other

    def int8(self, var: ir.Var) -> jax.Array:
        """The int8 form of a tensor; float32 where the integers are held in floats."""
        if var not in self._values:
            if var in self._early:
                self._values[var] = pooling.max_pool(self._pooled(var), self._early[var])
            elif var in self._binding.names:
                self._values[var] = self._quantize_float(var, var)
            else:
                # Without a scale of its own it is moved or selected from tensors that have one.
                eqn = self.graph.producer[var]
                self._values.update(zip(eqn.outputs, self._move(eqn), strict=True))
        return self._values[var]

    def holds(self, var: ir.Var) -> bool:
        """Whether the int8 form of a tensor is there already."""
        return var in self._values

    def put(self, var: ir.Var, value: jax.Array, grid: ir.Var) -> None:
        """Set what was quantized where it was computed: `var` on the scale of `grid`."""
        if var == grid:
            self._values[var] = value
        else:
            # Rounded for the pool behind it, whose result is all that reads it.
            self._to_pool[grid] = value

    def float32(self, var: ir.Var) -> jax.Array:
        """The float value of a tensor that may have an int8 form too."""
        return self._env.wide(var).astype(jnp.float32)

    def scale(self, var: ir.Var) -> jax.Array:
        """What one step of the int8 form is worth."""
        return self._scale_entry(var)["scale"]

    def inv_scale(self, var: ir.Var) -> jax.Array:
        """What a float is multiplied by before rounding."""
        return self._scale_entry(var)["inv_scale"]

    def shares_scale(self, a: ir.Var, b: ir.Var) -> bool:
        return self._binding.scales[a] == self._binding.scales[b]

    def wide(self, atom: ir.Atom) -> Any:
        # Those who read a float read what the int8 form stands for, so that both sides agree.
        if isinstance(atom, int) and atom in self._binding.forms.int8:
            return int8.dequantize(self.int8(atom), self.scale(atom), self.zero_point(atom))
        return self._env.wide(atom)

    def read(self, atom: ir.Atom) -> Any:
        return evaluate.narrow(self.wide(atom), self.graph.dtype(atom))

    def zero_point(self, var: ir.Var) -> int | jax.Array:
        """The int8 that stands for zero; an int32 where it differs from layer to layer."""
        if self._varies:
            return self._scale_entry(var)["zero_point"]
        return self._binding.zero_points[var]

    def _pooled(self, var: ir.Var) -> jax.Array:
        """What an early max pool reads to give `var`, on the scale of `var`."""
        if var not in self._to_pool:
            return self._quantize_float(self._early[var].input_vars[0], var)
        return self._to_pool[var]

    def _quantize_float(self, var: ir.Var, grid: ir.Var) -> jax.Array:
        """A float on the grid of a tensor; its NaN and infinities are marked."""
        value: jax.Array = self._env.wide(var)
        origins = self._hidden.origins.get(var) if self._hidden is not None else None
        # A tensor whose sources are marked already has its NaN in the outputs.
        is_marked = origins is None or origins <= self._marked
        if origins is not None:
            self._marked.add(var)
        if is_marked or self._hidden is None:
            return self._quantize(value, grid)
        rows = self._hidden.rows[var]
        are_first = rows is None or (axis_of(rows) == 0 and value.ndim > 1)
        if are_first and self._is_read_by_a_kernel(value, var, grid):
            q, mark = self._quantize_and_mark(value, grid, 1 if rows is None else value.shape[0])
        else:
            q = self._quantize(value, grid)
            # A mark is a number for each entry along the first axis: the rows come first.
            entries = nonfinite.entries_first(value, rows)
            mark = nonfinite.mark(entries, var in self.stored)
        self.marks[var] = nonfinite.marked_rows(mark, rows)
        return q

    def _is_read_by_a_kernel(self, value: jax.Array, var: ir.Var, grid: ir.Var) -> bool:
        """Whether a kernel quantizes a float: XLA does where it is computed on the way."""
        scales = self.inv_scale(grid).shape
        by_last_axis = scales in ((), value.shape[-1:])
        is_plain = value.dtype == jnp.float32 and by_last_axis
        return self._natively and var in self.stored and is_plain

    def _quantize_and_mark(
        self, value: jax.Array, grid: ir.Var, entries: int
    ) -> tuple[jax.Array, jax.Array]:
        """A float on the grid of a tensor, and its mark, in one pass over so many entries."""

        def portable(x: jax.Array, *grid: jax.Array) -> Sequence[jax.Array]:
            q = int8.quantize(x.reshape(value.shape), *grid).reshape(x.shape)
            return q, nonfinite.mark(x, is_stored=True)

        rows = value.reshape(entries, math.prod(value.shape) // max(entries, 1))
        zero_point = jnp.asarray(self.zero_point(grid), jnp.int32)
        q, mark = operations.quantize(portable, rows, self.inv_scale(grid), zero_point)
        return q.reshape(value.shape), mark

    def _quantize(self, value: jax.Array, var: ir.Var) -> jax.Array:
        """A float on the grid of a tensor."""
        to_grid = int8.rounded if self.in_floats else int8.quantize
        return to_grid(value, self.inv_scale(var), self.zero_point(var))

    def _scale_entry(self, var: ir.Var) -> Mapping[str, jax.Array]:
        return self._tensors[self._binding.scales[var]]

    def _moved(self, atom: ir.Atom, result: ir.Var) -> jax.Array:
        """An operand of an equation that gives `result` in int8.

        A float that has no int8 form of its own is a constant beside what is moved (a class token,
        a padding value, the zero of a ReLU), and goes on the grid of the result.  Indices and
        truth values stay as they are.
        """
        if isinstance(atom, int) and atom in self._binding.forms.int8:
            return self.int8(atom)
        value = jnp.asarray(self._env.read(atom))
        is_float = jnp.issubdtype(value.dtype, jnp.floating)
        return self._quantize(value, result) if is_float else value

    def _move(self, eqn: ir.Equation) -> Sequence[jax.Array]:
        """Apply an equation that selects or moves values to int8 values."""
        params = dict(eqn.params)
        operands = [self._moved(x, eqn.outputs[0]) for x in eqn.inputs]
        if eqn.name == "convert_element_type":
            return operands  # between float types: the integers stay
        # These two fill in values of their own, which are other ones among integers.
        if eqn.name == "reduce_window_max":
            return [pooling.max_pool(operands[0], eqn)]
        if eqn.name == "gather":
            return [int8.gather(eqn, operands, self.zero_point(eqn.outputs[0]))]
        return jaxprs.bind(eqn.primitive, operands, params)
