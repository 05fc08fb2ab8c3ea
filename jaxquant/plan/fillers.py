"""What models put in place of values that do not count: -inf, or -1e9, where a mask is False.

A maximum, a sort or an argmax behind it never chooses such a number, and float32 holds it beside
the others.  On an int8 grid that reaches so far all the others are one integer, and an infinity has
none.  Softmax takes no part in this: its source are the scores before their mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir, matching, primitives
from jaxquant.graph.once import once
from jaxquant.graph.regions import Region

# Of the fillers in use -1e4 is the least, for models in float16.
_LEAST = 1e4
_MOST = 1e9  # where a smallest value so far begins
# What replaces elements of one operand by those of another.
_REPLACING = frozenset({"select_n", "scatter", "dynamic_update_slice"})
# Largest or smallest values of segments (of a graph's nodes, those of their edges): where nothing
# is scattered, the number remains that they begin with.
_OF_SEGMENTS = frozenset({"scatter-max", "scatter-min"})
# A model reads the segments that hold something by these, and what is there instead of the others.
_PICKING = frozenset({"gather", "select_n"})
# A filler in an operand of these is one in the result.
_HANDING_ON = frozenset(
    {"add", "add_any", "concatenate", "convert_element_type", "cummax", "cummin", "div",
     "dynamic_slice", "gather", "mul", "neg", "pad", "reduce_precision", "slice", "sort", "split",
     "sub", "top_k", *_REPLACING, *_OF_SEGMENTS}
)  # fmt: skip


@once
def fillers(graph: ir.Graph) -> Mapping[ir.Var, float]:
    """The tensors of floats that hold a filler as far as the graph tells, each with its value."""
    return _followed(graph, {})


@once
def fillers_in(region: Region) -> Mapping[ir.Var, float]:
    """The same of a region, whose loop may begin with a filler: a maximum so far, of nothing."""
    given = _given(region)
    found = _followed(region.graph, given)
    # What a step leaves in the carry the next one reads.
    for _ in region.carries:
        left = {
            region.arguments[place]: found[out]
            for place, number in region.carries.items()
            if (out := region.graph.outputs[number]) in found
        }
        if left.keys() <= given.keys():
            break
        given = {**left, **given}
        found = _followed(region.graph, given)
    return found


def _given(region: Region) -> dict[ir.Var, float]:
    """The fillers among what a region is given."""
    holder, found = region.holder, dict[ir.Var, float]()
    if holder is None:
        return found
    outside = fillers_in(holder)
    for var, atom in zip(region.arguments, region.operands, strict=True):
        if atom is None or not _is_float(region.graph, var):
            continue
        number = primitives.constant_scalar(holder.graph, atom)
        if isinstance(atom, int) and atom in outside:
            found[var] = outside[atom]
        elif number is not None and (number <= -_LEAST or number >= _MOST):
            found[var] = number
    return found


def _followed(graph: ir.Graph, given: Mapping[ir.Var, float]) -> dict[ir.Var, float]:
    """The tensors that hold a filler, given those of the inputs that do."""
    found = dict(given)
    of_empty_segments: set[ir.Var] = set()
    for var, value in graph.constants.items():
        if (filler := _filler_in(graph, var, value)) is not None:
            found[var] = filler
    for eqn in graph.equations:
        if (filler := _made_of_mask(graph, eqn)) is not None:
            found[eqn.outputs[0]] = filler
            continue
        if eqn.name not in _HANDING_ON and not primitives.is_movement(graph, eqn):
            continue
        holding = {x for x in eqn.input_vars if x in found}
        if eqn.name in _PICKING:
            holding -= of_empty_segments
        held = [found[x] for x in holding]
        replaces = eqn.name in _REPLACING and not _finds_infinity(graph, eqn.inputs[0])
        if replaces or eqn.name in _OF_SEGMENTS:
            held += [x for x in _numbers(graph, eqn) if abs(x) >= _LEAST]
        if eqn.name in _OF_SEGMENTS or holding & of_empty_segments:
            of_empty_segments.update(eqn.outputs)
        if held:
            # An infinity has no integer at all, so that it is what is asked for.
            largest = max(held, key=abs)
            found.update((v, largest) for v in eqn.outputs if _is_float(graph, v))
    return found


def _filler_in(graph: ir.Graph, var: ir.Var, value: Any) -> float | None:
    """The filler of a constant, as a mask has it that is added to scores: far below all else."""
    if not _is_float(graph, var) or not np.size(value) or isinstance(value, jax.ShapeDtypeStruct):
        return None  # of a model that is saved without its weights only the shape is known
    array = np.asarray(value).astype(np.float32)
    least = float(array.min())
    return least if least <= -_LEAST and float(array.max()) > least / 2 else None


def _made_of_mask(graph: ir.Graph, eqn: ir.Equation) -> float | None:
    """The filler that arithmetic makes of a mask, as (1 - mask) * -1e9 or log(mask)."""
    if eqn.name == "log":
        return -np.inf if _is_mask(graph, eqn.inputs[0]) else None
    if eqn.name not in ("mul", "div") or not _is_float(graph, eqn.outputs[0]):
        return None
    for operand, factor in (eqn.inputs, eqn.inputs[::-1])[: 2 if eqn.name == "mul" else 1]:
        number = primitives.constant_scalar(graph, factor)
        if eqn.name == "div" and number:
            number = 1 / number
        if number is not None and abs(number) >= _LEAST and _is_mask(graph, operand):
            return -abs(number)
    return None


def _is_mask(graph: ir.Graph, atom: ir.Atom) -> bool:
    """Whether a float is made of truth values, or of one minus what an input holds as floats."""
    is_subtracted = False
    while (eqn := matching.producer(graph, atom)) is not None:
        numbers = [primitives.constant_scalar(graph, x) for x in eqn.inputs]
        if eqn.name == "sub" and 1.0 in numbers:
            is_subtracted, atom = True, eqn.inputs[1 - numbers.index(1.0)]
        elif eqn.name == "broadcast_in_dim" or primitives.is_movement(graph, eqn):
            atom = eqn.inputs[0]
        elif eqn.name == "convert_element_type":
            atom = eqn.inputs[0]
            if graph.dtype(atom) == jnp.bool_:
                return True
        else:
            return graph.dtype(atom) == jnp.bool_
    return is_subtracted and atom in graph.inputs


def _numbers(graph: ir.Graph, eqn: ir.Equation) -> list[float]:
    """The numbers that an equation may put in place of values."""
    numbers = [primitives.constant_scalar(graph, x) for x in eqn.inputs]
    both = [
        (x, number) for x, number in zip(eqn.inputs, numbers, strict=True) if number is not None
    ]
    return [number for x, number in both if _is_float(graph, x)]


def _finds_infinity(graph: ir.Graph, atom: ir.Atom) -> bool:
    """True for a comparison with an infinity, as `jnp.nan_to_num` replaces them.

    What it puts in their place is met only where there is one, and then clipped as that is.
    """
    eqn = matching.producer(graph, atom)
    if eqn is None or eqn.name != "eq":
        return False
    numbers = [matching.spread_number(graph, x) for x in eqn.inputs]
    return any(x is not None and np.isinf(x) for x in numbers)


def _is_float(graph: ir.Graph, atom: ir.Atom) -> bool:
    return bool(jnp.issubdtype(graph.dtype(atom), jnp.floating))
