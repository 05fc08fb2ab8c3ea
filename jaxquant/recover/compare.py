"""The float model and the int8 model side by side, on calibration samples, in one compiled step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, trace
from jaxquant.graph.pieces import InPieces
from jaxquant.graph.static_values import static_values
from jaxquant.jax_shim import compilation
from jaxquant.plan.bind import Int8Site
from jaxquant.recover.activation import find_activation
from jaxquant.recover.columns import Columns, measure_columns
from jaxquant.recover.shift import Powers, Shift, compare_outputs, powers
from jaxquant.run.float_forms import evaluate_float
from jaxquant.run.lowerings import Evaluation, Lowering
from jaxquant.run.program import Program


class Measured(NamedTuple):
    """What one step tells, in NumPy.

    Attributes:
      sites: site name -> the powers of its output, behind the affine part of its epilogue and
        before its own shift is taken away or the float model's value put in its place.
      outputs: the powers of each float output of the model.
      columns: of the same, what `jaxquant.recover.columns.measure_columns` gives.
      shifts: name of each int8 site whose bias is corrected -> its shift.
    """

    sites: dict[str, Powers]
    outputs: list[Powers]
    columns: list[Columns]
    shifts: dict[str, Shift]


class Comparison:
    """Runs both models on the same inputs; compiled once per input shape."""

    def __init__(self, program: Program, params: Any):
        self._program = program
        self._params = params
        self._step = InPieces(self._compare, compilation.quick_compilation())
        graph = program.graph
        self._known = static_values(graph, params)
        ends = {s.site.name: s.epilogue.output for s in program.binding.sites}
        self._tensors = {
            site.name: ends.get(site.name, site.output)
            for site in program.model.sites_of(program.mode.lookups)
            if site.output is not None and _is_float(graph.dtype(site.output))
        }
        self._activations = {
            s.site.name: find_activation(graph, s.epilogue.output)
            for s in program.binding.sites
            if s.site.name in program.slots and program.mode.integer
        }

        self._ends = _ends(program)
        self._named = {var: name for name, var in self._tensors.items() if var is not None}

    @property
    def with_error(self) -> Collection[str]:
        """The int8 sites that have an error of their own: not those that only move integers."""
        produced = {v for i in self._ends for v in self._program.graph.equations[i].outputs}
        return {name for var, name in self._named.items() if var in produced}

    @property
    def output_names(self) -> list[str]:
        """The float outputs by their paths in what the model returns; "output" for a bare array."""
        graph = self._program.graph
        indexed = jax.tree.unflatten(graph.out_tree, range(len(graph.outputs)))
        paths = jax.tree_util.tree_flatten_with_path(indexed)[0]
        return [
            trace.path_name(path) if path else "output"
            for (path, _), x in zip(paths, graph.outputs, strict=True)
            if _is_float(graph.dtype(x))
        ]

    @property
    def corrected(self) -> Collection[str]:
        """The sites whose bias takes their shift away: those that have the step."""
        return self._activations.keys() & self._program.plan.recovered_by("bias_correction")

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
        flat = jax.tree.leaves(inputs)
        found = self._step(self._params, self._known, qparams, flat, correct, alone)
        by_site, by_output, by_column, shifts = jax.device_get(found)
        return Measured(
            {name: Powers.of(powers) for name, powers in by_site.items()},
            [Powers.of(powers) for powers in by_output],
            [Columns.of(each) for each in by_column],
            {name: Shift.of(sums, by_site[name][2]) for name, sums in shifts.items()},
        )

    def _compare(
        self,
        params: Any,
        known: Any,
        qparams: Any,
        flat: list[Any],
        correct: jax.Array,
        alone: jax.Array,
    ) -> tuple[dict[str, jax.Array], list[jax.Array], list[jax.Array], dict[str, jax.Array]]:
        """The fields of `Measured`, each an array: that is fewer small kernels to compile."""
        graph = self._program.graph
        reference = evaluate_float(graph, params, flat, known=known)
        shifts: dict[str, jax.Array] = {}
        by_site: dict[str, jax.Array] = {}

        correctable = self.corrected

        def corrected(site: Int8Site, lowering: Lowering) -> Lowering:
            """The site's lowering, compared with the float model, its shift taken away."""
            name, epilogue = site.site.name, site.epilogue
            if name not in self._activations:
                return lowering

            def correcting(state: Evaluation) -> evaluate.Values:
                value = lowering(state)[epilogue.output]
                activation = self._activations[name]
                compared = compare_outputs(epilogue, activation, reference, value)
                by_site[name] = compared.powers
                if name not in correctable:
                    return {epilogue.output: value}
                shifts[name] = compared.shift
                step = jnp.where(correct, compared.mean, 0)
                return {epilogue.output: value + epilogue.channels.spread(step, value.ndim)}

            return correcting

        def followed(lowering: Lowering) -> Lowering:
            """A lowering whose values are measured, and those of the float model taken for them."""

            def following(state: Evaluation) -> evaluate.Values:
                values = {}
                for var, value in lowering(state).items():
                    values[var] = value
                    if not _is_float(graph.dtype(var)):
                        continue
                    name = self._named.get(var, "")
                    if name and name not in by_site:
                        by_site[name] = powers(reference.read(var), value)
                    wanted = reference.wide(var).astype(value.dtype)
                    values[var] = jnp.where(alone, wanted, value)
                return values

            return following

        program = self._program.hooked(corrected)
        ends = {index: followed(program.lowerings[index]) for index in self._ends}
        quantized = program.replacing(ends).run(qparams, flat)
        for name, var in self._tensors.items():
            if var is not None and var in quantized and name not in by_site:
                by_site[name] = powers(reference.read(var), quantized.wide(var))
        both = [
            (jnp.asarray(reference.read(x)), jnp.asarray(quantized.read(x)))
            for x in graph.outputs
            if _is_float(graph.dtype(x))
        ]
        by_output = [powers(*pair) for pair in both]
        return by_site, by_output, [measure_columns(*pair) for pair in both], shifts


def _ends(program: Program) -> list[int]:
    """The last equations of what a program computes of int8 tensors, beside what moves integers."""
    graph, binding = program.graph, program.binding
    wholes = {last: set(c.members) for last, c in program.model.composites.whole.items()}
    reading = binding.forms.reads_int8 | binding.selects
    last_ones = {last for last, members in wholes.items() if members & reading}
    inner = {index for last, members in wholes.items() for index in members - {last}}
    sites_end = {graph.producer[s.epilogue.output].index for s in binding.sites}
    found = (sites_end | (reading - inner) | last_ones) & program.lowerings.keys()
    return sorted(found)


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))
