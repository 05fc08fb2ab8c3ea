"""A function that is compiled in pieces, each different piece once.

A deep model repeats its layers, and XLA compiles each of them anew: of a comparison of 24 equal
layers that is nearly all of the time.  So a function is cut where XLA cannot fuse over, at its
convolutions, dots and native calls, and pieces that compute the same of tensors of the same shapes
share what is compiled.  A function with few repetitions is compiled whole, and so is one that runs
elsewhere than on one CPU device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.trace import trace
from jaxquant.jax_shim import choices, jaxprs

_MOST_DIFFERENT = 0.5  # of all pieces; of more the compiler's fixed cost for each takes longer


class _Piece(NamedTuple):
    """Some equations in order, with the tensors that they read and those that others read."""

    key: Hashable
    equations: tuple[ir.Equation, ...]
    reads: tuple[ir.Var, ...]
    gives: tuple[ir.Var, ...]
    done: tuple[ir.Var, ...]  # what nothing reads behind this piece


class InPieces:
    """A function, compiled for each structure and shapes of its arguments.

    Args:
      function: a pure function of arrays.
      options: of the compiler.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]):
        self._function = function
        self._options = dict(options)
        self._whole = jax.jit(function, compiler_options=self._options)
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._known: dict[Hashable, tuple[ir.Graph, list[_Piece]]] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        if not _is_on_one_cpu(leaves):
            return self._whole(*args)
        structs = tuple(map(ir.struct, leaves))
        key = tree, tuple((s.shape, s.dtype) for s in structs)
        if key not in self._known:
            with choices.at(choices.ONE_CPU):
                graph = trace(lambda _, *given: self._function(*given), (), args)
            self._known[key] = graph, _cut(graph)
        graph, pieces = self._known[key]
        if len({piece.key for piece in pieces}) > _MOST_DIFFERENT * len(pieces):
            return self._whole(*args)
        values: dict[ir.Var, Any] = {**graph.constants}
        values.update(zip(graph.inputs, leaves, strict=True))
        for piece in pieces:
            results = self._compile(piece)(*(values[var] for var in piece.reads))
            for var in piece.done:
                values.pop(var, None)
            values.update(zip(piece.gives, results, strict=True))
        flat = [x.value if isinstance(x, ir.Literal) else values[x] for x in graph.outputs]
        return jax.tree.unflatten(graph.out_tree, flat)

    def _compile(self, piece: _Piece) -> Callable[..., Any]:
        if piece.key not in self._compiled:

            def run(*operands: Any) -> list[Any]:
                values = dict(zip(piece.reads, operands, strict=True))
                for eqn in piece.equations:
                    given = [
                        x.value if isinstance(x, ir.Literal) else values[x] for x in eqn.inputs
                    ]
                    results = jaxprs.bind(eqn.primitive, given, dict(eqn.params))
                    values.update(zip(eqn.outputs, results, strict=True))
                return [values[var] for var in piece.gives]

            self._compiled[piece.key] = jax.jit(run, compiler_options=self._options)
        return self._compiled[piece.key]


def _cut(graph: ir.Graph) -> list[_Piece]:
    """The live equations, a new piece wherever XLA cannot fuse over."""
    groups: list[list[ir.Equation]] = []
    for eqn in _in_order_of_need(graph):
        if not groups or _starts_piece(graph, eqn):
            groups.append([])
        groups[-1].append(eqn)
    last: dict[ir.Var, int] = {}
    for number, group in enumerate(groups):
        last.update((var, number) for eqn in group for var in eqn.input_vars)
    last.update((var, len(groups)) for var in graph.output_vars)
    return [_piece(graph, number, group, last) for number, group in enumerate(groups)]


def _in_order_of_need(graph: ir.Graph) -> list[ir.Equation]:
    """The live equations, each just before it is first needed; what lies deepest comes last.

    So what two parts of a function compute of one layer (the float and the int8 model, say) comes
    together, and does not have to be kept until the other part is there.
    """
    depth: dict[ir.Var, int] = {}
    for eqn in graph.equations:
        below = max((depth.get(var, 0) for var in eqn.input_vars), default=0)
        depth.update((var, below + 1) for var in eqn.outputs)
    outputs = sorted(graph.output_vars, key=lambda var: (depth.get(var, 0), var))
    ordered: dict[int, ir.Equation] = {}
    stack = [(var, False) for var in reversed(outputs)]
    while stack:
        var, is_ready = stack.pop()
        made_by = graph.producer.get(var)
        if made_by is None or made_by.index in ordered:
            continue
        if is_ready:
            ordered[made_by.index] = made_by
            continue
        stack.append((var, True))
        stack += [(each, False) for each in reversed(made_by.input_vars)]
    return list(ordered.values())


def _starts_piece(graph: ir.Graph, eqn: ir.Equation) -> bool:
    is_call = eqn.name == "ffi_call" or bool(jaxprs.sub_bodies(dict(eqn.params)))
    return is_call or eqn.index in graph.contractions


def _is_on_one_cpu(leaves: Sequence[Any]) -> bool:
    devices = [x.devices() for x in leaves if isinstance(x, jax.Array)]
    return jax.default_backend() == "cpu" and all(len(each) == 1 for each in devices)


def _piece(
    graph: ir.Graph, number: int, group: Sequence[ir.Equation], last: Mapping[ir.Var, int]
) -> _Piece:
    made = [var for eqn in group for var in eqn.outputs]
    inside = set(made)
    read = dict.fromkeys(var for eqn in group for var in eqn.input_vars if var not in inside)
    gives = [var for var in made if last.get(var, -1) > number]
    local = {var: place for place, var in enumerate((*read, *made))}
    lines = tuple(
        (
            eqn.name,
            _params_key(eqn.params),
            tuple(_literal_key(x) if isinstance(x, ir.Literal) else local[x] for x in eqn.inputs),
            tuple(local[var] for var in eqn.outputs),
        )
        for eqn in group
    )
    shapes = tuple((graph.shape(var), graph.dtype(var)) for var in read)
    return _Piece(
        (lines, shapes, tuple(local[var] for var in gives)),
        tuple(group),
        tuple(read),
        tuple(gives),
        tuple(var for var in read if last[var] == number),
    )


def _literal_key(literal: ir.Literal) -> Hashable:
    return ("literal", literal.value.dtype.name, literal.value.tobytes())


def _params_key(params: Mapping[str, Any]) -> Hashable:
    """Equal for equations of one primitive that compute the same."""
    return _key({name: value for name, value in params.items() if name not in _UNREAD})


# Rules for derivatives and batching, which nobody asks for in a compiled piece.
_UNREAD = frozenset({"rule", "jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd"})


def _key(value: Any) -> Hashable:
    """Equal for values that mean the same; of functions, for one alone."""
    if isinstance(value, jaxprs.ClosedJaxpr):
        return (_jaxpr_key(value.jaxpr), tuple(map(_key, value.consts)))
    if isinstance(value, jaxprs.Jaxpr):
        return _jaxpr_key(value)
    if isinstance(value, Mapping):
        return tuple(sorted((str(name), _key(each)) for name, each in value.items()))
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return tuple(map(_key, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return (value.shape, value.dtype.name, value.tobytes())
    return value if isinstance(value, Hashable) else id(value)


def _jaxpr_key(jaxpr: Any) -> Hashable:
    local: dict[Any, int] = {}

    def place(atom: Any) -> Hashable:
        if isinstance(atom, jaxprs.Literal):
            return ("literal", str(atom.aval), _key(np.asarray(atom.val)))
        return local.setdefault(atom, len(local))

    for var in (*jaxpr.constvars, *jaxpr.invars):
        place(var)
    lines = []
    for eqn in jaxpr.eqns:
        operands = tuple(place(x) for x in eqn.invars)
        params = _params_key(eqn.params)
        results = tuple(place(x) for x in eqn.outvars)
        lines.append((eqn.primitive.name, params, operands, results))
    avals = tuple(str(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars))
    return (tuple(lines), avals, tuple(place(x) for x in jaxpr.outvars))
