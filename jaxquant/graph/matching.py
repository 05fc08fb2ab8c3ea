"""What recognizes an operation among the equations that JAX writes for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import evaluate, ir


class Match(NamedTuple):
    """One operation of several equations.

    Attributes:
      inputs: the tensors that it reads, those that depend on the model's inputs first.
      members: the indices of its equations.
      params: the rest of what it is.
    """

    inputs: tuple[ir.Var, ...]
    members: frozenset[int]
    params: Mapping[str, Any]


def producer(graph: ir.Graph, atom: ir.Atom) -> ir.Equation | None:
    """The equation that gives an operand; None of what no equation gives."""
    return graph.producer.get(atom) if isinstance(atom, int) else None


def is_private(graph: ir.Graph, members: Collection[int], result: ir.Var) -> bool:
    """Whether others read nothing of what some equations give but the result of all of them."""
    # The result alone may be read by others.
    inner = {v for index in members for v in graph.equations[index].outputs} - {result}
    return not any(
        var in graph.output_vars
        or any(user.index not in members for user in graph.consumers.get(var, ()))
        for var in inner
    )


def number(graph: ir.Graph, atom: ir.Atom) -> float | None:
    """The one value of a tensor that depends on nothing, such as `n - 1`; None of others."""
    if isinstance(atom, ir.Literal):
        return float(atom.value) if atom.value.ndim == 0 else None
    # Values of parameters are not known here, and those of inputs never.
    if not graph.static[atom] or graph.shape(atom) != () or not _depends_on_nothing(graph, atom):
        return None
    table = evaluate.float_table(ir.upstream(graph, [atom]))
    with jax.ensure_compile_time_eval():  # whoever asks may be tracing
        env = evaluate.evaluate(graph, {}, [None] * len(graph.inputs), table)
        return float(np.asarray(env.read(atom)))


def _depends_on_nothing(graph: ir.Graph, var: ir.Var) -> bool:
    behind = ir.upstream(graph, [var])
    known = all(
        eqn.name != "dim_as_value"  # a size that varies
        and all(isinstance(n, int) for v in eqn.outputs for n in graph.shape(v))
        for eqn in behind
    )
    return known and not set(graph.sources(var)) & set(graph.leaves)


def spread_number(graph: ir.Graph, atom: ir.Atom) -> float | None:
    """The one value of a tensor that depends on nothing, perhaps with copies; None of others."""
    while (eqn := producer(graph, atom)) is not None and eqn.name == "broadcast_in_dim":
        atom = eqn.inputs[0]
    return number(graph, atom)


def is_float_cast(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True for a cast of floats to floats, which leaves the values what they are but for rounding.

    Operators are the same for all floats: what JAX computes of bfloat16 in float32 is one too.
    """
    return eqn.name == "convert_element_type" and all(
        jnp.issubdtype(graph.dtype(x), jnp.floating) for x in (eqn.inputs[0], eqn.outputs[0])
    )


def behind_casts(graph: ir.Graph, atom: ir.Atom) -> Iterator[ir.Equation]:
    """The casts of floats that give an operand, the last one first."""
    while (eqn := producer(graph, atom)) is not None and is_float_cast(graph, eqn):
        yield eqn
        atom = eqn.inputs[0]
