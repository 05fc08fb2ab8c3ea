"""Weights that are read in float: their computation from what is stored."""

from __future__ import annotations

import jax
import numpy as np

from jaxquant.graph import ir, trace
from jaxquant.plan.groups import GroupLayout, group_layout
from jaxquant.plan.restore import Restored
from jaxquant.run.program import Program


def restored_groups(program: Program, restored: Restored) -> GroupLayout:
    """How the stored integers of a restored tensor fall into groups, those of all layers as one."""
    view = program.weights.stored_view(restored)
    leading = len(restored.stacked)
    channels = (*range(leading), *(leading + axis for axis in view.channels))
    return group_layout((*restored.stacked, *view.shape), channels, program.plan.group_size)


def undoing(program: Program, restored: Restored) -> ir.Graph:
    """How a static tensor follows from the float of what is stored: a graph with one input."""
    view = program.weights.stored_view(restored)
    shape = (*restored.stacked, *view.shape)

    # Traced for its equations alone, which the network takes one by one.
    def undone(_: tuple[()], value: jax.Array) -> jax.Array:
        return restored.apply(value.astype(restored.stored_in.dtype(view.var)))

    return trace.trace(undone, (), (jax.ShapeDtypeStruct(shape, np.float32),))
