"""Weights that are read in float: their computation from what is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.graph import ir, trace
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.run.lookups import look_up
from jaxquant.run.program import Program

Stored = dict[tuple[str, ...], jax.ShapeDtypeStruct]


def restoring(program: Program, var: ir.Var) -> tuple[ir.Graph, list[tuple[str, ...]]]:
    """How a static tensor is computed from the integers of a weight and their scales.

    Returns:
      A graph with one result, and where its inputs are in `qparams["params"]`.
    """
    restored = program.restored[var]
    stored = _stored(program, restored.stored_in, restored.site, restored.stacked)

    def restore(_: Any, *arrays: jax.Array) -> jax.Array:
        return program.weights.restore(restored, _qparams(stored, arrays))

    return trace.trace(restore, (), tuple(stored.values())), list(stored)


def looking_up(program: Program, site: Site) -> tuple[ir.Graph, list[tuple[str, ...]]]:
    """How the rows of an embedding are computed from the integers of its table and their scales.

    Returns:
      A graph with one result, and where its inputs are in `qparams["params"]` but for the last one,
      the indices.
    """
    graph, eqn = program.graph, program.graph.equations[site.equation]
    stored = _stored(program, graph, site, ())

    def rows(_: Any, *arrays: jax.Array) -> jax.Array:
        table = program.weights.in_groups(site, _qparams(stored, arrays[:-1]))
        return look_up(eqn, arrays[-1], table).astype(graph.dtype(eqn.outputs[0]))

    indices = eqn.input_vars[-1]
    given = jax.ShapeDtypeStruct(graph.shape(indices), graph.dtype(indices))
    return trace.trace(rows, (), (*stored.values(), given)), list(stored)


def _stored(program: Program, graph: ir.Graph, site: Site, stacked: Sequence[int]) -> Stored:
    """What is stored for a site of a graph: where in `qparams["params"]`, and as what."""
    view = layout.weight_view(graph, site, program.mode.integer)
    is_per_channel = program.plan.weight_quantize_type == "channel_wise_abs_max"
    channels = math.prod(view.shape[d] for d in view.channels)
    slot = program.slots[site.name]
    per_channel = (channels,) if is_per_channel else ()
    return {
        slot.int8: jax.ShapeDtypeStruct((*stacked, *view.shape), np.int8),
        slot.scale: jax.ShapeDtypeStruct((*stacked, *per_channel), np.float32),
    }


def _qparams(stored: Stored, arrays: Sequence[jax.Array]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for path, array in zip(stored, arrays, strict=True):
        layout.put(params, path, array)
    return {"params": params}
