"""Weights that are read in float too: their computation from what is stored."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jaxquant.graph import ir, trace
from jaxquant.plan import layout
from jaxquant.run.program import Program


def restoring(program: Program, var: ir.Var) -> tuple[ir.Graph, list[tuple[str, ...]]]:
    """How a static tensor is computed from the integers of a weight and their scales.

    Returns:
      A graph with one result, and where its inputs are in `qparams["params"]`.
    """
    restored = program.restored[var]
    site, layers = restored.site, restored.stacked
    view = layout.weight_view(restored.stored_in, site, program.mode.integer)
    is_per_channel = program.plan.weight_quantize_type == "channel_wise_abs_max"
    channels = math.prod(view.shape[d] for d in view.channels)
    slot = program.slots[site.name]
    per_channel = (channels,) if is_per_channel else ()
    stored = {
        slot.int8: jax.ShapeDtypeStruct((*layers, *view.shape), np.int8),
        slot.scale: jax.ShapeDtypeStruct((*layers, *per_channel), np.float32),
    }

    def restore(_: Any, *arrays: jax.Array) -> jax.Array:
        params: dict[str, Any] = {}
        for path, array in zip(stored, arrays, strict=True):
            layout.put(params, path, array)
        return program.weights.restore(restored, {"params": params})

    return trace.trace(restore, (), tuple(stored.values())), list(stored)
