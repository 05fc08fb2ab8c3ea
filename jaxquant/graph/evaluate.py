"""Evaluate a graph by a table of lowerings: what runs in place of each of its equations.

A table maps the index of an equation to its lowering, in the order in which they run.  A lowering
is a function of the state of one evaluation (in float: the `Environment`) that gives the values of
tensors: as a rule those of its equation, but it may stand for the equations before it too, which
then have no entry, and leave out what nobody reads.  Who wants to see or change what an equation
gives wraps its lowering in one of its own.

Values may be *wider* than the model's dtype: an int8 site hands over float32 in a bfloat16 model,
elementwise equations keep computing in it, and any other reader gets the model's dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from jaxquant.graph import ir, primitives
from jaxquant.jax_shim import jaxprs, prng

State = TypeVar("State")
Values: TypeAlias = Mapping[ir.Var, Any]
Lowering: TypeAlias = Callable[[State], Values]
Table: TypeAlias = Mapping[int, Lowering[State]]
# Faster forms of a graph's equations, by their index: `jaxquant.run.float_forms` has those of CPUs.
Forms: TypeAlias = Callable[[ir.Graph], Mapping[int, Lowering["Environment"]]]


class Environment:
    """The values of a graph's tensors during one evaluation."""

    def __init__(self, graph: ir.Graph, leaves: Mapping[ir.Var, Any], inputs: Sequence[Any]):
        self.graph = graph
        # Of a loaded model those that nothing reads have no value, as parameters have none then.
        known = {
            var: value
            for var, value in graph.constants.items()
            if not isinstance(value, jax.ShapeDtypeStruct)
        }
        self._values: dict[ir.Var, Any] = {**known, **leaves}
        self._values.update(zip(graph.inputs, inputs, strict=True))

    def __contains__(self, var: ir.Var) -> bool:
        return var in self._values

    def write(self, var: ir.Var, value: Any) -> None:
        self._values[var] = value

    def fork(self) -> Environment:
        """A copy with the values so far; what is written to one is not in the other."""
        # No inputs are given twice: the values hold them already.
        other = Environment(self.graph, {}, [None] * len(self.graph.inputs))
        other._values = dict(self._values)
        return other

    def drop(self, var: ir.Var) -> None:
        """Forget a value that nothing reads any more."""
        self._values.pop(var, None)

    def wide(self, atom: ir.Atom) -> Any:
        """The value as it was computed; floats may be wider than the model's dtype."""
        return atom.value if isinstance(atom, ir.Literal) else self._values[atom]

    def read(self, atom: ir.Atom) -> Any:
        """The value in the model's dtype."""
        return narrow(self.wide(atom), self.graph.dtype(atom))


def evaluate(
    graph: ir.Graph,
    leaves: Mapping[ir.Var, Any],
    inputs: Sequence[Any],
    table: Table[Environment] | None = None,
) -> Environment:
    """Evaluate a table in float and return the values.

    Args:
      graph: the traced model.
      leaves: the parameter leaves that the equations need.
      inputs: the flattened model inputs.
      table: what runs; by default every equation as it is.
    """
    env = Environment(graph, leaves, inputs)
    return run(env, float_table(graph.equations) if table is None else table, env)


def evaluate_model(
    graph: ir.Graph,
    params: Any,
    inputs: Sequence[Any],
    *,
    equations: Sequence[ir.Equation] | None = None,
    known: Mapping[ir.Var, Any] | None = None,
    forms: Mapping[int, Lowering[Environment]] | None = None,
) -> Environment:
    """The values of a float model.

    Args:
      graph: the traced model.
      params: its parameters, in the pytree that it was traced with.
      inputs: the flattened model inputs.
      equations: those to evaluate, in order; by default all.
      known: values of `jaxquant.graph.static_values` that need not be evaluated.
      forms: what runs in place of equations, by their index.
    """
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    # One that was spread is spread by its own equation.
    whole = {var: x for var, x in (known or {}).items() if x.shape == graph.shape(var)}
    chosen = graph.equations if equations is None else equations
    left = [eqn for eqn in chosen if not whole.keys() & set(eqn.outputs)]
    return evaluate(graph, {**leaves, **whole}, inputs, float_table(left, forms))


def no_forms(graph: ir.Graph) -> Mapping[int, Lowering[Environment]]:
    """The `Forms` that leave every equation as it is."""
    return {}


def float_table(
    equations: Iterable[ir.Equation], forms: Mapping[int, Lowering[Environment]] | None = None
) -> dict[int, Lowering[Environment]]:
    """The table in which every equation runs as it is, or in the form that it has in `forms`."""
    found = forms or {}
    return {eqn.index: found.get(eqn.index) or as_it_is(eqn) for eqn in equations}


def as_it_is(eqn: ir.Equation) -> Lowering[Environment]:
    """The lowering of an equation that runs as it is."""

    def lowering(env: Environment) -> Values:
        return dict(zip(eqn.outputs, apply(env, eqn), strict=True))

    return lowering


def run(env: Environment, table: Table[State], state: State) -> Environment:
    """Write what the lowerings of a table give, in order.

    Args:
      env: where the values are written.
      table: what runs.
      state: what the lowerings read; it holds `env`, or is it.
    """
    for index, lowering in table.items():
        scope = env.graph.equations[index].scope
        # So profiles, and what XLA says of an operation, have the model's own names.
        with jax.named_scope(scope) if scope else contextlib.nullcontext():
            values = lowering(state)
        for var, value in values.items():
            env.write(var, value)
    return env


def outputs(env: Environment) -> Any:
    """The model's outputs, in their own pytree."""
    flat = [env.read(x) for x in env.graph.outputs]
    return jax.tree.unflatten(env.graph.out_tree, [jnp.asarray(x) for x in flat])


def narrow(value: Any, dtype: Any) -> Any:
    """A value in the model's dtype."""
    # Keys have no dtype to convert to.
    if prng.is_key_dtype(dtype) or value.dtype == dtype:
        return value
    return jax.lax.convert_element_type(value, dtype)


class Reader(Protocol):
    """How an equation reads its operands; an `Environment` is one."""

    graph: ir.Graph

    def wide(self, atom: ir.Atom) -> Any: ...

    def read(self, atom: ir.Atom) -> Any: ...


def apply(env: Reader, eqn: ir.Equation) -> Sequence[Any]:
    """The equation itself: elementwise ones keep a wider dtype, others get the model's."""
    if primitives.is_elementwise(eqn) and (wide := _wide_dtype(env, eqn)) is not None:
        # A model's own cast to its narrow floats: nobody is to lose digits that are there.
        if eqn.name == "convert_element_type" and _is_float(eqn.params["new_dtype"]):
            return [env.wide(eqn.inputs[0])]
        # All floats as wide as the widest, so that the primitive takes them.
        operands = [_widen(env.wide(x), wide) for x in eqn.inputs]
        return jaxprs.bind(eqn.primitive, operands, dict(eqn.params))
    operands = [env.read(x) for x in eqn.inputs]
    return jaxprs.bind(eqn.primitive, operands, dict(eqn.params))


def _wide_dtype(env: Reader, eqn: ir.Equation) -> Any:
    for atom in eqn.input_vars:
        value, dtype = env.wide(atom), env.graph.dtype(atom)
        if not prng.is_key_dtype(dtype) and _is_float(dtype) and value.dtype != dtype:
            return value.dtype
    return None


def _widen(value: Any, dtype: Any) -> Any:
    # Truth values and indices stay what they are.
    return jax.lax.convert_element_type(value, dtype) if _is_float(value.dtype) else value


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)
