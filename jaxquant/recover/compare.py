"""The float model and the int8 model side by side, on calibration samples, in one compiled step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration.padding import Padding, real_in
from jaxquant.graph import trace
from jaxquant.graph.pieces import InPieces
from jaxquant.graph.static_values import static_values
from jaxquant.jax_shim import compilation
from jaxquant.plan.plan import Plan
from jaxquant.recover.columns import Columns, measure_columns
from jaxquant.recover.pair import Asked, Pair, Seen, is_float
from jaxquant.recover.shift import Powers, Shift, powers, without_padding
from jaxquant.run.float_forms import evaluate_float
from jaxquant.run.layers import Layer
from jaxquant.run.program import Program


class Measured(NamedTuple):
    """What one step tells, in NumPy.

    Attributes:
      sites: site name -> the powers of its output, behind the affine part of its epilogue and
        before its own shift is taken away or the float model's value put in its place; inside a
        loop over all its steps, in a branch of those that took it, and missing without one.
      layers: of the sites inside scans over stacked weights, instead: the same for each layer.
      outputs: the powers of each float output of the model.
      columns: of the same, what `jaxquant.recover.columns.measure_columns` gives.
      shifts: name of each int8 site whose bias is corrected -> its shift.
    """

    sites: dict[str, Powers]
    layers: dict[str, Mapping[Layer, Powers]]
    outputs: list[Powers]
    columns: list[Columns]
    shifts: dict[str, Shift]


class Comparison:
    """Runs both models on the same inputs; compiled once per input shape.

    Args:
      program: the int8 model.
      params: the float model's parameters.
      padding: which positions of the inputs are not compared; None for none.
    """

    def __init__(self, program: Program, params: Any, padding: Padding | None = None):
        self._program = program
        self._params = params
        self._padding = padding
        # Quickly compiled: it runs a few times, and most of its time would be XLA's.
        self._step = InPieces(self._compare, compilation.quick_compilation())
        self._known = static_values(program.graph, params)
        self._pair = Pair(program)

    @property
    def plan(self) -> Plan:
        """The plan of the int8 model, its parts in loops too."""
        return self._program.whole_plan

    @property
    def with_error(self) -> Collection[str]:
        """The int8 sites that have an error of their own: not those that only move integers."""
        # Bodies too, whose sites are in the report like others.
        return set().union(*(pair.with_error for pair in self._pair.walk()))

    @property
    def output_names(self) -> list[str]:
        """The float outputs by their paths in what the model returns; "output" for a bare array."""
        graph = self._program.graph
        indexed = jax.tree.unflatten(graph.out_tree, range(len(graph.outputs)))
        paths = jax.tree_util.tree_flatten_with_path(indexed)[0]
        return [
            trace.path_name(path) if path else "output"
            for (path, _), x in zip(paths, graph.outputs, strict=True)
            if is_float(graph.dtype(x))
        ]

    @property
    def corrected(self) -> Collection[str]:
        """The sites whose bias takes their shift away: those that have the step."""
        return set().union(*(pair.corrected for pair in self._pair.walk()))

    def __call__(
        self, qparams: Any, inputs: tuple[Any, ...], *, correct: bool = False, alone: bool = False
    ) -> Measured:
        """Compare on one batch.

        Args:
          qparams: the int8 model's arrays.
          inputs: the inputs of both models.
          correct: take every site's shift away before going on, so that the shifts of later sites
            are those that remain.
          alone: go on behind every site with the float model's value, so that what is measured of a
            site is its own error.
        """
        # Truth values and not options: one compiled program serves all four.
        found = self._step(self._params, self._known, qparams, inputs, correct, alone)
        seen, by_output, by_column = jax.device_get(found)
        by_site, shifts = seen
        return Measured(
            {n: Powers.of(x) for n, x in by_site.items() if x.ndim == 1 and _was_seen(x)},
            {n: _by_layer(x) for n, x in by_site.items() if x.ndim > 1},
            [Powers.of(powers) for powers in by_output],
            [Columns.of(each) for each in by_column],
            {name: Shift.of(sums, by_site[name][..., 2]) for name, sums in shifts.items()},
        )

    def _compare(
        self,
        params: Any,
        known: Any,
        qparams: Any,
        inputs: tuple[Any, ...],
        correct: jax.Array,
        alone: jax.Array,
    ) -> tuple[Seen, list[jax.Array], list[jax.Array]]:
        """The fields of `Measured`, each an array: that is fewer small kernels to compile."""
        # Inputs are flat, as graphs have them.
        graph, model, flat = self._program.graph, self._program.model, jax.tree.leaves(inputs)
        real = real_in(self._padding, model, inputs)
        reference = evaluate_float(graph, params, flat, known=known)
        quantized, seen = self._pair.run(reference, qparams, flat, Asked(correct, alone, real))
        # Outputs of integers (classes, tokens) have no noise in dB.
        both = [
            (without_padding(reference.read(x), real(model, x)), jnp.asarray(quantized.read(x)))
            for x in graph.outputs
            if is_float(graph.dtype(x))
        ]
        by_output = [powers(*pair) for pair in both]
        return seen, by_output, [measure_columns(*pair) for pair in both]


def _was_seen(array: np.ndarray) -> bool:
    """Whether there was a step that showed the site, whose powers these are."""
    return bool(array[2] > 0)


def _by_layer(arrays: np.ndarray) -> dict[Layer, Powers]:
    """The powers of each layer that was seen, of [L, 3] or with an axis for each scan."""
    layers = np.ndindex(arrays.shape[:-1])
    return {layer: Powers.of(arrays[layer]) for layer in layers if _was_seen(arrays[layer])}
