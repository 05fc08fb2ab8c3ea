"""The elementwise function behind a site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.backends.backend import NO_CLAMP, Clamp
from jaxquant.graph import evaluate, ir
from jaxquant.graph.copies import varying_axes
from jaxquant.plan.epilogue import activation_equations
from jaxquant.run.fusion import clamp_after, clamp_of


class Activation(NamedTuple):
    """The elementwise function of a site's output that others read."""

    start: ir.Var
    equations: tuple[ir.Equation, ...]
    end: ir.Var

    def of(self, value: jax.Array, env: evaluate.Environment) -> jax.Array:
        """The function of a value, whose parameters `env` holds."""
        # An environment of its own: only what the equations read is there, whatever else was
        # computed.
        inner = evaluate.Environment(env.graph, {}, [None] * len(env.graph.inputs))
        for var in {v for eqn in self.equations for v in eqn.input_vars if env.graph.static[v]}:
            inner.write(var, env.wide(var))
        inner.write(self.start, value)
        return evaluate.run(inner, evaluate.float_table(self.equations), inner).wide(self.end)

    def clamp(self, graph: ir.Graph) -> Clamp | None:
        """Its bounds, where it does nothing but clip to constants."""
        value, clamp = self.start, NO_CLAMP
        for eqn in self.equations:
            if (bounds := clamp_of(graph, eqn, value)) is None:
                return None
            value, clamp = eqn.outputs[0], clamp_after(clamp, bounds)
        return clamp if value == self.end else None

    def parameters(self, graph: ir.Graph) -> list[ir.Var] | None:
        """What it reads that does not depend on inputs; None where that varies along the tensor."""
        found = {v for eqn in self.equations for v in eqn.input_vars if graph.static[v]}
        # Rows are drawn from all positions, so that a parameter has to be the same at each of them.
        return None if any(varying_axes(graph, var) for var in found) else sorted(found)

    def scalars(self, env: evaluate.Environment) -> dict[ir.Var, jax.Array] | None:
        """Its parameters, each as one number; None where one varies along the tensor."""
        found = self.parameters(env.graph)
        return None if found is None else {var: jnp.ravel(env.wide(var))[0] for var in found}


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
            # A parameter with axes has the value's rank, so that shapes stay as the equations
            # expect.
            shape = value.shape if graph.shape(var) else ()
            inner.write(var, jnp.broadcast_to(jnp.asarray(scalar), shape))
        inner.write(activation.start, value)
        table = evaluate.float_table(activation.equations)
        return evaluate.run(inner, table, inner).wide(activation.end)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowFunction) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def _signature(self) -> tuple[Any, ...]:
        # Tensors by their places in the chain, scalars by their values: two layers with one
        # activation have one signature, and share what is compiled.
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
    # Of several ends none is the activation: their slopes differ.
    ends = [v for v in region if _is_read_outside(graph, v, region)]
    if len(ends) != 1 or ends == [start]:
        return Activation(start, (), start)
    return Activation(start, equations, ends[0])


def _is_read_outside(graph: ir.Graph, var: ir.Var, region: set[ir.Var]) -> bool:
    users = graph.consumers.get(var, ())
    return var in graph.output_vars or any(not set(user.outputs) <= region for user in users)
