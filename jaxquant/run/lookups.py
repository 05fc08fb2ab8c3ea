"""Embeddings: rows of a table of integers, dequantized behind the lookup, in every mode alike."""

from __future__ import annotations

import jax

from jaxquant.backends.dequantize import dequantize_groups
from jaxquant.graph import evaluate, ir
from jaxquant.plan.binding import Int8Site
from jaxquant.run.dequantize import StoredWeight
from jaxquant.run.lowerings import Evaluation, Lowering
from jaxquant.run.weights import StoredWeights


def looked_up(graph: ir.Graph, int8_site: Int8Site, weights: StoredWeights) -> Lowering:
    """The rows of a stored table, in the dtype that the model has them in."""
    eqn, output = graph.equations[int8_site.site.equation], int8_site.epilogue.output

    def lowering(state: Evaluation) -> evaluate.Values:
        table = weights.in_groups(int8_site.site, state.qparams)
        rows = look_up(eqn, state.env.read(eqn.inputs[1]), table)
        return {output: rows.astype(graph.dtype(output))}

    return lowering


def look_up(eqn: ir.Equation, indices: jax.Array, table: StoredWeight) -> jax.Array:
    """Rows of a table [V, K], dequantized after they are gathered: float32 [..., K].

    Args:
      eqn: the gather; what it gives for an index out of range comes by way of the scales, where
        that is NaN: integers have none.
      indices: those that it reads.
      table: the stored table.
    """

    # As the model gathers: what it says of its indices holds for the stored rows too.
    def rows(array: jax.Array) -> jax.Array:
        return jax.lax.gather(
            array,
            indices,
            eqn.params["dimension_numbers"],
            slice_sizes=(1, array.shape[1]),
            unique_indices=eqn.params["unique_indices"],
            indices_are_sorted=eqn.params["indices_are_sorted"],
            mode=eqn.params["mode"],
        )

    # Rows of integers are gathered, not of floats: a table is never dequantized whole.
    integers, scale = rows(table.integers), rows(table.scale)
    axis, layout = scale.ndim - 1, table.layout
    length = layout.shape[layout.axis]
    return dequantize_groups(
        integers, scale, axis, length, layout.size, table.weight_bits, table.weight_dtype
    )
