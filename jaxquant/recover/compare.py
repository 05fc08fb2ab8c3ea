"""The float model and the int8 model side by side, on calibration samples, in one compiled step."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import evaluate, ir, sites
from jaxquant.graph.float_forms import evaluate_float
from jaxquant.graph.primitives import Channels, varying_axes
from jaxquant.plan.bind import Int8Site
from jaxquant.plan.epilogue import Epilogue, activation_equations
from jaxquant.run.program import Program


class Powers(NamedTuple):
    """Σ y² and Σ (y - ŷ)², float32 []; infinite noise where the int8 model alone is not finite."""

    signal: jax.Array
    noise: jax.Array


class Shift(NamedTuple):
    """How far a site's channels are off, float32 [C] each.

    With f the activation behind the site and w = (f(y) - f(ŷ)) / (y - ŷ) its slope between the two
    values (1 for no activation; 0 where a ReLU has them both): Σ w (y - ŷ), Σ w (y - ŷ)² and Σ w.
    """

    difference: jax.Array
    square: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """The weighted mean of y - ŷ, shrunk by what it may owe to chance; 0 where nothing counts.

        m² / (m² + s²) of the mean m, with s its standard error for Σ w independent values: a single
        sample tells nothing of the others.
        """
        count = jnp.where(self.weight > 0, self.weight, 1)
        mean = jnp.where(self.weight > 0, self.difference, 0) / count
        variance = jnp.maximum(jnp.where(self.weight > 0, self.square, 0) / count - mean**2, 0)
        chance = variance / jnp.maximum(count - 1, 0)
        power = mean**2
        return jnp.where((power > 0) & (count > 1), mean * power / (power + chance), 0)


class Measured(NamedTuple):
    """What one step tells.

    Attributes:
      sites: site name -> the powers of its output, behind the affine part of its epilogue.
      outputs: the powers of each float output of the model.
      shifts: name of each int8 site with a weight of its own -> its shift.
    """

    sites: dict[str, Powers]
    outputs: list[Powers]
    shifts: dict[str, Shift]


class Comparison:
    """Runs both models on the same inputs; compiled once per input shape."""

    def __init__(self, program: Program, params: Any):
        self._program = program
        self._params = params
        self._step = jax.jit(self._compare)
        graph = program.graph
        ends = {s.site.name: s.epilogue.output for s in program.binding.sites}
        self._tensors = {
            site.name: ends.get(site.name, site.output)
            for site in sites.find_sites(graph, lookups=program.mode.lookups)
            if site.output is not None and _is_float(graph.dtype(site.output))
        }
        self._activations = {
            s.site.name: find_activation(graph, s.epilogue.output)
            for s in program.binding.sites
            if s.site.name in program.slots and program.mode.integer
        }

    @property
    def corrected(self) -> Collection[str]:
        """The sites whose bias can take their shift away."""
        return self._activations.keys()

    def __call__(self, qparams: Any, inputs: tuple[Any, ...], *, correct: bool) -> Measured:
        """Compare on one batch.

        Args:
          qparams: the int8 model's arrays.
          inputs: the inputs of both models.
          correct: take every site's shift away before going on, so that the shifts of later sites
            are those that remain.
        """
        return self._step(self._params, qparams, jax.tree.leaves(inputs), correct)

    def _compare(self, params: Any, qparams: Any, flat: list[Any], correct: jax.Array) -> Measured:
        graph = self._program.graph
        reference = evaluate_float(graph, params, flat)
        shifts: dict[str, Shift] = {}

        def corrected(site: Int8Site, value: jax.Array) -> jax.Array:
            if site.site.name not in self._activations:
                return value
            activation = self._activations[site.site.name]
            shift = output_shift(site.epilogue, activation, reference, value)
            shifts[site.site.name] = shift
            step = jnp.where(correct, shift.mean(), 0)
            return value + site.epilogue.channels.spread(step, value.ndim)

        quantized = self._program.run(qparams, flat, corrected)
        by_site = {
            name: _powers(reference.read(var), quantized.wide(var))
            for name, var in self._tensors.items()
            if var is not None and var in quantized
        }
        by_output = [
            _powers(jnp.asarray(reference.read(x)), jnp.asarray(quantized.read(x)))
            for x in graph.outputs
            if _is_float(graph.dtype(x))
        ]
        return Measured(by_site, by_output, shifts)


class Activation(NamedTuple):
    """The elementwise function of a site's output that others read."""

    start: ir.Var
    equations: tuple[ir.Equation, ...]
    end: ir.Var

    def of(self, value: jax.Array, env: evaluate.Environment) -> jax.Array:
        """The function of a value, whose parameters `env` holds."""
        inner = evaluate.Environment(env.graph, {}, [None] * len(env.graph.inputs))
        for var in {v for eqn in self.equations for v in eqn.input_vars if env.graph.static[v]}:
            inner.write(var, env.wide(var))
        inner.write(self.start, value)
        return evaluate.run(inner, self.equations, functools.partial(evaluate.apply, inner)).wide(
            self.end
        )

    def scalars(self, env: evaluate.Environment) -> dict[ir.Var, jax.Array] | None:
        """Its parameters, each as one number; None where one varies along the tensor."""
        graph, found = env.graph, {}
        for var in {v for eqn in self.equations for v in eqn.input_vars if graph.static[v]}:
            if varying_axes(graph, var):
                return None
            found[var] = jnp.ravel(env.wide(var))[0]
        return found


class RowFunction:
    """An activation of values in any shape, its parameters being scalars.

    Two that compute the same are equal, so that what is compiled for one serves the other.
    """

    def __init__(
        self, graph: ir.Graph, activation: Activation, scalars: Mapping[ir.Var, np.ndarray]
    ):
        self._graph = graph
        self._activation = activation
        self._scalars = scalars
        self._key = self._signature()

    def __call__(self, value: jax.Array) -> jax.Array:
        graph, activation = self._graph, self._activation
        inner = evaluate.Environment(graph, {}, [None] * len(graph.inputs))
        for var, scalar in self._scalars.items():
            shape = value.shape if graph.shape(var) else ()
            inner.write(var, jnp.broadcast_to(jnp.asarray(scalar), shape))
        inner.write(activation.start, value)
        rule = functools.partial(evaluate.apply, inner)
        return evaluate.run(inner, activation.equations, rule).wide(activation.end)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowFunction) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def _signature(self) -> tuple[Any, ...]:
        local = {self._activation.start: 0}
        lines: list[tuple[Any, ...]] = []
        for eqn in self._activation.equations:
            operands: list[Any] = []
            for atom in eqn.inputs:
                if isinstance(atom, int) and atom in local:
                    operands.append(local[atom])
                    continue
                value = atom.value if isinstance(atom, ir.Literal) else self._scalars[atom]
                rank = len(self._graph.shape(atom))
                operands.append((np.asarray(value).dtype.name, np.asarray(value).tobytes(), rank))
            params = tuple(sorted((k, str(v)) for k, v in eqn.params.items()))
            lines.append((eqn.name, params, tuple(operands)))
            local.update((var, len(local)) for var in eqn.outputs)
        return (*lines, local[self._activation.end])


def find_activation(graph: ir.Graph, start: ir.Var) -> Activation:
    """The identity where others read several functions of the output."""
    equations = activation_equations(graph, start)
    region = {start, *(eqn.outputs[0] for eqn in equations)}
    ends = [v for v in region if _is_read_outside(graph, v, region)]
    if len(ends) != 1 or ends == [start]:
        return Activation(start, (), start)
    return Activation(start, equations, ends[0])


def _is_read_outside(graph: ir.Graph, var: ir.Var, region: set[ir.Var]) -> bool:
    users = graph.consumers.get(var, ())
    return var in graph.output_vars or any(not set(user.outputs) <= region for user in users)


def output_shift(
    epilogue: Epilogue, activation: Activation, reference: evaluate.Environment, value: jax.Array
) -> Shift:
    """Of a site whose int8 output, behind the affine part of its epilogue, is `value`.

    Args:
      epilogue: of the site.
      activation: the one behind the site.
      reference: the float model's values.
      value: ŷ, of the shape of the site's output.
    """
    wanted = reference.read(epilogue.output).astype(jnp.float32)
    gain = activation.of(wanted, reference) - activation.of(value, reference)
    return shift_of(wanted - value, gain, epilogue.channels)


def shift_of(off: jax.Array, gain: jax.Array, channels: Channels) -> Shift:
    """From y - ŷ and f(y) - f(ŷ); values that are not finite are left out."""
    slope = jnp.where(off == 0, 0, gain / jnp.where(off == 0, 1, off))
    usable = jnp.isfinite(off) & jnp.isfinite(slope)
    weight = jnp.where(usable, jnp.clip(slope, 0, 1), 0)
    off = jnp.where(usable, off, 0)
    return Shift(*(channels.sums(weight * power) for power in (off, off**2, jnp.ones_like(off))))


def _powers(reference: Any, quantized: Any) -> Powers:
    """Over the elements where y is finite."""
    reference, quantized = reference.astype(jnp.float32), quantized.astype(jnp.float32)
    compared = jnp.isfinite(reference)
    noise = jnp.sum(jnp.where(compared, reference - quantized, 0) ** 2)
    signal = jnp.sum(jnp.where(compared, reference, 0) ** 2)
    return Powers(signal, jnp.where(jnp.isnan(noise), jnp.inf, noise))


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))
