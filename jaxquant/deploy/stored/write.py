"""Makes the stored form of a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.deploy.plain_trees import plain_structure
from jaxquant.deploy.stored import primitives, values
from jaxquant.deploy.stored.form import Atom, Body, Constant, Equation, Leaf, StoredForm, Tensor
from jaxquant.deploy.stored.trees import encode_tree
from jaxquant.graph import flax_tags, ir
from jaxquant.graph.primitives import PLACEMENTS
from jaxquant.jax_shim import jaxprs, prng, symbols

CONSTANTS = "constants"  # what the names of constants begin with
# Where arrays are on devices; a stored graph runs wherever it is loaded.
_PLACEMENT = frozenset({"sharding", "out_sharding"})


def store(
    graph: ir.Graph,
    inputs: tuple[Any, ...],
    example: tuple[Any, ...],
    paths: Mapping[ir.Var, tuple[str, ...]],
    needed: Collection[ir.Var],
) -> tuple[StoredForm, dict[str, np.ndarray]]:
    """The stored form of a graph, and the arrays that it closed over, by name.

    Args:
      graph: traced for `inputs`.
      inputs: shapes and dtypes, with sizes that vary.
      example: the inputs that the model was quantized with, in the same structure.
      paths: the keys on the way to every leaf.
      needed: the constants whose values are kept.

    Raises:
      ValueError: the graph holds what has no stored form; the message names it.
    """
    return _Writer(graph).written(inputs, example, paths, needed)


class _Writer:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._bodies: list[Body] = []
        self._arrays: dict[str, np.ndarray] = {}

    def written(
        self,
        inputs: tuple[Any, ...],
        example: tuple[Any, ...],
        paths: Mapping[ir.Var, tuple[str, ...]],
        needed: Collection[ir.Var],
    ) -> tuple[StoredForm, dict[str, np.ndarray]]:
        graph = self._graph
        number: dict[ir.Var, int] = {}
        for var in (*graph.leaves, *graph.constants, *graph.inputs):
            number[var] = len(number)

        equations = self._equations(number)

        # Behind the equations, which leave their bodies in `self._bodies` as they are encoded.
        form = StoredForm(
            leaves=tuple(Leaf(paths[v], _tensor(graph.avals[v])) for v in graph.leaves),
            constants=tuple(
                self._constant(graph.paths[var], value, var in needed)
                for var, value in graph.constants.items()
            ),
            inputs=tuple(_tensor(graph.avals[v]) for v in graph.inputs),
            input_tree=encode_tree(plain_structure(jax.tree.structure(inputs))),
            output_tree=encode_tree(plain_structure(graph.out_tree)),
            example=tuple(
                _example(spec.shape, ir.struct(leaf).shape)
                for spec, leaf in zip(
                    jax.tree.leaves(inputs), jax.tree.leaves(example), strict=True
                )
            ),
            constraints=symbols.constraints(inputs),
            equations=equations,
            bodies=tuple(self._bodies),
            outputs=tuple(_atom(x, number) for x in graph.outputs),
        )
        return form, self._arrays

    def _equations(self, number: dict[ir.Var, int]) -> tuple[Equation, ...]:
        """The equations of the graph, whose results get the next numbers."""
        equations = []
        for eqn in self._graph.equations:
            op, params = self._operation(eqn.name, eqn.params, eqn.scope)
            equations.append(
                Equation(
                    op=op,
                    inputs=tuple(_atom(x, number) for x in eqn.inputs),
                    outputs=len(eqn.outputs),
                    params=params,
                    scope=eqn.scope,
                    calls=eqn.calls,
                )
            )
            # Results are numbered in order, so that the file need not name them.
            for var in eqn.outputs:
                number[var] = len(number)
        return tuple(equations)

    def _constant(self, path: str, value: Any, is_needed: bool) -> Constant:
        tensor = _tensor(jax.typeof(value))
        if not is_needed:
            return Constant(path, tensor, "")
        name = f"{CONSTANTS}/{len(self._arrays)}"
        # Keys have a dtype that files do not know; the numbers behind them do.
        data = jax.random.key_data(value) if prng.is_key_dtype(value.dtype) else value
        self._arrays[name] = np.asarray(jax.device_get(data))
        return Constant(path, tensor, name)

    def _operation(
        self, op: str, params: Mapping[str, Any], scope: str
    ) -> tuple[str, dict[str, Any]]:
        """The name and the parameters of an operation as they are stored."""
        # A placement is the machine's; what remains of it hands its operand on.
        if op in PLACEMENTS:
            return "copy", {}
        if not primitives.is_known(op):
            raise ValueError(_refusal(op, scope))
        found: dict[str, Any] = {}
        for key, value in jaxprs.portable_params(op, params).items():
            try:
                found[key] = None if key in _PLACEMENT else values.encode(value, self._body)
            except ValueError as error:
                raise ValueError(f"{_refusal(op, scope)} Its {key!r}: {error}") from error
        return op, found

    def _body(self, jaxpr: Any) -> int:
        """Store a jaxpr; returns its number."""
        # Bodies inside come first, so that each one's number is known when it is referred to.
        ((_, inner, consts),) = jaxprs.sub_bodies({"": jaxpr})
        number: dict[Any, int] = {}
        for var in (*inner.constvars, *inner.invars):
            number[var] = len(number)

        def atom(x: Any) -> Atom:
            if isinstance(x, jaxprs.Literal):
                return _scalar(np.asarray(x.val, dtype=jaxprs.dtype_of(x)))
            # Numbers are the body's own, so that it reads the same wherever it is run.
            return number[x]

        equations = []
        for eqn in inner.eqns:
            equations.append(self._body_equation(eqn, atom))
            for var in eqn.outvars:
                number[var] = len(number)
        self._bodies.append(
            Body(
                constants=tuple(self._constant("", value, True) for value in consts),
                inputs=len(inner.invars),
                equations=tuple(equations),
                outputs=tuple(atom(x) for x in inner.outvars),
            )
        )
        return len(self._bodies) - 1

    def _body_equation(self, eqn: Any, atom: Callable[[Any], Atom]) -> Equation:
        scope, _ = flax_tags.split_scope(jaxprs.scope_of(eqn))
        op, called = eqn.primitive.name, jaxprs.inlined_body(eqn)
        if called is None:
            op, params = self._operation(op, eqn.params, scope)
        else:
            # A call is stored as a call: replayed, its equations keep the scope that they had.
            jaxpr, consts = called
            name = str(eqn.params.get("name", op))
            body = self._body(jaxprs.ClosedJaxpr(jaxpr, list(consts)))
            op, params = primitives.CALL, {"name": name, "body": {"body": body}}
        inputs = tuple(atom(x) for x in eqn.invars)
        return Equation(op, inputs, len(eqn.outvars), params, scope)


def _atom(atom: ir.Atom, number: Mapping[ir.Var, int]) -> Atom:
    return _scalar(atom.value) if isinstance(atom, ir.Literal) else number[atom]


def _example(spec: tuple[Any, ...], given: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that the model takes: sizes that vary as they were, others as they have to be."""
    return tuple(d if isinstance(d, int) else size for d, size in zip(spec, given, strict=True))


def _tensor(aval: Any) -> Tensor:
    shape = tuple(d if isinstance(d, int) else str(d) for d in aval.shape)
    return Tensor(shape, values.encode_dtype(aval.dtype))


def _scalar(value: np.ndarray) -> Atom:
    if value.ndim:
        raise ValueError(f"a number written into the model has the shape {value.shape}")
    return tuple(values.encode_scalar(value))


def _refusal(op: str, scope: str) -> str:
    where = f" at {scope!r}" if scope else ""
    return (
        f"the model cannot be saved: it calls {op!r}{where}, which a file cannot hold (it may run "
        "other code, or talk to other devices). Keep it out of apply_fn, or export the model with "
        "jaxquant.export_stablehlo."
    )
