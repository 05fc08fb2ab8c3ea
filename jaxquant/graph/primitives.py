"""What the engine knows of JAX's primitives: which are elementwise, which only move values."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir

# One output element depends on one element of each operand (scalars and size-1 axes broadcast).
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type
    copy copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le
    log log1p log2 logistic lt max min mul ne neg nextafter not one_minus_square or polynomial pow
    reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
    xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())

# Results in the accumulator's float32 whatever the model's dtype, so a rounding step is left out.
_ROUNDING = frozenset({"reduce_precision"})

# The output holds the input's elements, each once, in another arrangement.
_REARRANGE = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "rev"})
# Where an array lies on devices changes none of its values.
PLACEMENTS = frozenset({"sharding_constraint", "reshard"})
_IDENTITY = frozenset({"copy", "copy_p", "stop_gradient"}) | PLACEMENTS
MOVEMENTS = _REARRANGE | _IDENTITY


def is_elementwise(eqn: ir.Equation) -> bool:
    return eqn.name in ELEMENTWISE and eqn.name not in _ROUNDING


def is_movement(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True where the output is a rearrangement of the only operand: no arithmetic, no new value."""
    if len(eqn.inputs) != 1 or not isinstance(eqn.inputs[0], int):
        return False
    if eqn.name in MOVEMENTS:
        return True
    return eqn.name == "broadcast_in_dim" and not _adds_copies(graph, eqn)


def _adds_copies(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True where a broadcast makes an axis longer or adds one of more than one element.

    Asked axis by axis and not of the numbers of elements: those are equal for an empty batch,
    whatever happens to the other axes, and sizes may be symbols.
    """
    before, after = graph.shape(eqn.inputs[0]), graph.shape(eqn.outputs[0])
    kept = dict(zip(eqn.params["broadcast_dimensions"], before, strict=True))
    return any(size != kept.get(axis, 1) for axis, size in enumerate(after))


def is_relu(eqn: ir.Equation) -> bool:
    """True for `max(x, 0)`."""
    # A literal zero; a parameter of zeros may be trained.
    literals = [x for x in eqn.inputs if isinstance(x, ir.Literal)]
    return eqn.name == "max" and len(literals) == 1 and not literals[0].value.any()


def constant_scalar(graph: ir.Graph, atom: ir.Atom) -> float | None:
    """The one value of a literal or of a constant, which may be cast and broadcast; None of others.

    NaN is none: it is the same as no value.
    """

    # As the model has it: a constant of float64 may be rounded on its way.
    dtype = graph.dtype(atom)
    while isinstance(atom, int) and (eqn := graph.producer.get(atom)) is not None:
        if eqn.name not in ("convert_element_type", "broadcast_in_dim", "copy"):
            return None
        atom = eqn.inputs[0]
    value: Any = atom.value if isinstance(atom, ir.Literal) else graph.constants.get(atom)
    if value is None or np.ndim(value):
        return None
    number = float(np.asarray(value).astype(dtype))
    # NaN is equal to nothing, so that a comparison with it would be wrong both ways.
    return None if math.isnan(number) else number


def movement_root(graph: ir.Graph, var: ir.Var) -> ir.Var:
    """The tensor that `var` is a rearrangement of: the place to observe and to quantize."""
    while (eqn := graph.producer.get(var)) is not None and is_movement(graph, eqn):
        var = eqn.input_vars[0]
    return var


def follow_axes(graph: ir.Graph, eqn: ir.Equation, axes: frozenset[int]) -> frozenset[int]:
    """Where axes of an operand are in the result of an equation that moves or selects values.

    An axis that a maximum is taken over is gone; of one that a reshape joins with others, all that
    it becomes counts.
    """
    if eqn.name == "transpose":
        permutation = list(eqn.params["permutation"])
        return frozenset(permutation.index(axis) for axis in axes)
    if eqn.name == "broadcast_in_dim":
        return frozenset(eqn.params["broadcast_dimensions"][axis] for axis in axes)
    if eqn.name == "reshape":
        groups = reshaped_axes(graph.shape(eqn.inputs[0]), graph.shape(eqn.outputs[0]))
        return frozenset(new for old, all_new in groups if axes & set(old) for new in all_new)
    if eqn.name in ("squeeze", "reduce_max", "reduce_min"):
        removed = eqn.params["dimensions" if eqn.name == "squeeze" else "axes"]
        return frozenset(a - sum(r < a for r in removed) for a in axes if a not in removed)
    if eqn.name == "stack":
        return frozenset(axis + (axis >= eqn.params["axis"]) for axis in axes)
    # Anything else that is asked about keeps the axes where they are.
    return axes


@dataclasses.dataclass(frozen=True)
class Channels:
    """Where the output channels of a site are.

    The channels are those of the weight, flattened in the weight's axis order; `sizes[k]` is the
    k-th factor of that number and `axes[k]` the axis of the tensor that runs along it.
    """

    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    def through(self, graph: ir.Graph, eqn: ir.Equation) -> Channels | None:
        """Follow the channels through a movement; None where they are mixed with other axes."""
        before, after = graph.shape(eqn.inputs[0]), graph.shape(eqn.outputs[0])
        if eqn.name in _IDENTITY:
            return self
        if eqn.name == "transpose":
            permutation = list(eqn.params["permutation"])
            return Channels(self.sizes, tuple(permutation.index(a) for a in self.axes))
        # Turned around, a channel would have the scale of another one.
        if eqn.name == "rev":
            if any(a in eqn.params["dimensions"] for a in self.axes):
                return None
            return self
        if eqn.name == "broadcast_in_dim":
            mapping = eqn.params["broadcast_dimensions"]
            return Channels(self.sizes, tuple(mapping[a] for a in self.axes))
        return self._through_reshape(before, after)

    def spread(self, vector: jax.Array, rank: int) -> jax.Array:
        """Place [C] along the channel axes of a tensor with `rank` axes; size 1 elsewhere."""
        # The vector is in the weight's order; the tensor may have the channels' axes in another.
        order = sorted(range(len(self.axes)), key=lambda k: self.axes[k])
        value = vector.reshape(self.sizes).transpose(order)
        shape = [1] * rank
        for k in order:
            shape[self.axes[k]] = self.sizes[k]
        return value.reshape(shape)

    def sums(self, value: jax.Array) -> jax.Array:
        """[C], the sums of a tensor over all axes but those of the channels."""
        return self.reduce(jnp.sum, value)

    def reduce(self, reduction: Callable[..., jax.Array], value: jax.Array) -> jax.Array:
        """[C], `reduction` (of `jnp`) of a tensor over all axes but those of the channels."""
        found = reduction(value, axis=tuple(a for a in range(value.ndim) if a not in self.axes))
        ascending = sorted(self.axes)
        return found.transpose([ascending.index(a) for a in self.axes]).reshape(-1)

    def _through_reshape(self, before: tuple[int, ...], after: tuple[int, ...]) -> Channels | None:
        axes: dict[int, tuple[int, ...]] = {}
        for old, new in reshaped_axes(before, after):
            inside = [axis for axis in old if axis in self.axes]
            if not inside:
                continue

            # Channels that are mixed with other axes, or are not side by side, are lost.
            others = [axis for axis in old if axis not in inside]
            order = [self.axes.index(axis) for axis in inside]
            contiguous = order == list(range(order[0], order[0] + len(order)))
            if others or not contiguous:
                return None
            axes[order[0]] = tuple(new)
            for place in order[1:]:
                axes[place] = ()

        sizes, found = [], []
        for place, size in enumerate(self.sizes):
            # A factor of 1 has no axis to be on.
            if size == 1:
                continue
            for axis in axes.get(place, ()):
                sizes.append(after[axis])
                found.append(axis)
        if not sizes and self.sizes:  # one channel: any axis of size 1 will do
            return Channels((), ())
        return Channels(tuple(sizes), tuple(found))


def reshaped_axes(
    before: tuple[int, ...], after: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest runs of axes with equal products; axes of 1 are in none.

    The sizes may be symbols, of which nothing but equality is known, and 0: behind an axis of 0
    the products are counted from the other end.
    """
    old = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(after) if size != 1]
    # From the left and from the right: in between there may be one size that is a symbol.
    cuts = [
        (left, right)
        for left in range(len(old) + 1)
        for right in range(len(new) + 1)
        if _same_size([before[a] for a in old[:left]], [after[a] for a in new[:right]])
        or _same_size([before[a] for a in old[left:]], [after[a] for a in new[right:]])
    ]
    return [
        (old[start[0] : end[0]], new[start[1] : end[1]]) for start, end in itertools.pairwise(cuts)
    ]


def _same_size(left: Sequence[int], right: Sequence[int]) -> bool:
    """True where both products are equal, and not 0, which would tell nothing."""
    size = math.prod(left)
    return bool(size == math.prod(right)) and size != 0
