"""A function that is compiled in pieces, each different piece once.

A deep model repeats its layers, and XLA compiles each of them anew: of a comparison of 24 equal
layers that is nearly all of the time.  So a function is cut where XLA cannot fuse over, at its
convolutions, dots and native calls, and pieces that compute the same of tensors of the same shapes
share what is compiled.  Each piece costs the compiler some milliseconds however small it is, so
what is too small to be apart, or need not be to be shared, is joined again: a function without
repetition is one piece.
One that runs elsewhere than on one CPU device is compiled whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxquant.graph import ir
from jaxquant.graph.alike import number_alike
from jaxquant.graph.trace import trace
from jaxquant.jax_shim import choices, jaxprs

_Equations = Sequence[ir.Equation]

# How many equations cost the compiler as much time as a program does by itself.
_PROGRAM = 16


class _Piece(NamedTuple):
    """Some equations in order, with the tensors that they read and those that others read."""

    key: Hashable
    equations: _Equations
    reads: tuple[ir.Var, ...]
    gives: tuple[ir.Var, ...]
    done: tuple[ir.Var, ...]  # what nothing reads behind this piece


class _Known(NamedTuple):
    """A function for arguments of one structure and shapes: its pieces with their programs."""

    graph: ir.Graph
    compiled: tuple[tuple[_Piece, Callable[..., Any]], ...]


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
        self._known: dict[Hashable, _Known] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        # Elsewhere than on one CPU XLA places and splits what it compiles as a whole.
        if not _is_on_one_cpu(leaves):
            return self._whole(*args)
        structs = tuple(map(ir.struct, leaves))
        key = tree, tuple((s.shape, s.dtype) for s in structs)
        if key not in self._known:
            self._known[key] = self._compile(args)
        graph, compiled = self._known[key]
        values: dict[ir.Var, Any] = {**graph.constants}
        values.update(zip(graph.inputs, leaves, strict=True))
        # Values are dropped behind their last reader, as XLA would within one program.
        for piece, function in compiled:
            results = function(*(values[var] for var in piece.reads))
            for var in piece.done:
                values.pop(var, None)
            values.update(zip(piece.gives, results, strict=True))
        flat = [x.value if isinstance(x, ir.Literal) else values[x] for x in graph.outputs]
        return jax.tree.unflatten(graph.out_tree, flat)

    def _compile(self, args: tuple[Any, ...]) -> _Known:
        """One program for all pieces that have one key; XLA compiles it when it is first run."""
        # Forms are chosen in the trace, so that equal native calls look equal.
        with choices.at(choices.ONE_CPU):
            graph = trace(lambda _, *given: self._function(*given), (), args)
        pieces = _cut(graph)
        # One program for each key, whatever number of pieces have it.
        different = {piece.key: piece for piece in pieces}
        compiled = {
            key: jax.jit(_evaluation(piece), compiler_options=self._options)
            for key, piece in different.items()
        }
        return _Known(graph, tuple((piece, compiled[piece.key]) for piece in pieces))


def _evaluation(piece: _Piece) -> Callable[..., list[Any]]:
    """What a piece computes, as a function of the tensors that it reads."""

    def evaluate(*operands: Any) -> list[Any]:
        values = dict(zip(piece.reads, operands, strict=True))
        for eqn in piece.equations:
            given = [x.value if isinstance(x, ir.Literal) else values[x] for x in eqn.inputs]
            # By the primitive itself: nothing is traced again.
            results = jaxprs.bind(eqn.primitive, given, dict(eqn.params))
            values.update(zip(eqn.outputs, results, strict=True))
        return [values[var] for var in piece.gives]

    return evaluate


def _cut(graph: ir.Graph) -> list[_Piece]:
    """The live equations in as few pieces as share what can be shared."""
    groups: list[list[ir.Equation]] = []
    for eqn in _in_order_of_need(graph):
        if not groups or _starts_piece(graph, eqn):
            groups.append([])
        groups[-1].append(eqn)
    # Alike across groups: a block of a network is met once for each layer.
    numbers = number_alike(eqn for group in groups for eqn in group)
    return _join(graph, _pieces(graph, groups, numbers), numbers)


def _in_order_of_need(graph: ir.Graph) -> list[ir.Equation]:
    """The live equations, each just before it is first needed; what lies deepest comes last.

    So what two parts of a function compute of one layer (the float and the int8 model, say) comes
    together, and does not have to be kept until the other part is there.
    """
    depth: dict[ir.Var, int] = {}
    for eqn in graph.equations:
        below = max((depth.get(var, 0) for var in eqn.input_vars), default=0)
        depth.update((var, below + 1) for var in eqn.outputs)
    # What is shallow is needed first and ends soon; what is deep can wait.
    outputs = sorted(graph.output_vars, key=lambda var: (depth.get(var, 0), var))
    ordered: dict[int, ir.Equation] = {}
    # Depth first, without recursion; a second visit to a tensor says that all it needs is there.
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
    # XLA fuses nothing over these.
    return is_call or eqn.index in graph.contractions


def _is_on_one_cpu(leaves: Sequence[Any]) -> bool:
    devices = [x.devices() for x in leaves if isinstance(x, jax.Array)]
    return jax.default_backend() == "cpu" and all(len(each) == 1 for each in devices)


def _join(graph: ir.Graph, pieces: Sequence[_Piece], numbers: Mapping[int, int]) -> list[_Piece]:
    """Neighbours as one piece where that is less to compile.

    Where the links of a chain are alike each time but not how they hang together, nothing of the
    whole would be shared, and it stays in its links.
    """
    # Chains that occur often are what is worth joining: they compile once.
    chains = [pieces[part] for part in _chains([(p.key, len(p.equations)) for p in pieces])]
    joined = [[eqn for piece in chain for eqn in piece.equations] for chain in chains]
    links = [tuple(piece.key for piece in chain) for chain in chains]
    wholes: dict[Hashable, set[Hashable]] = {}
    for keys, whole in zip(links, _pieces(graph, joined, numbers), strict=True):
        wholes.setdefault(keys, set()).add(whole.key)
    groups: list[_Equations] = []
    for keys, chain, equations in zip(links, chains, joined, strict=True):
        # Only where the joined ones are one program, as their parts were: else more is compiled.
        is_alike = len(wholes[keys]) == 1
        groups += [equations] if is_alike else [piece.equations for piece in chain]
    return _pieces(graph, groups, numbers)


def _chains(links: Sequence[tuple[Hashable, int]]) -> list[slice]:
    """Which links of a chain (each a key and its size) are compiled together.

    From small ones to large ones, each link goes wherever it is to the one before it, if different
    chains then cost less: what does not repeat becomes one chain between two that do, and so does
    what is too small to be worth a program of its own.

    Example:
      >>> def parts(keys, small=""):
      ...     return [keys[part] for part in _chains([(x, 1 if x in small else 99) for x in keys])]
      >>> parts("abxyzxyzc"), parts("axbxcx", small="x")
      (['ab', 'xyz', 'xyz', 'c'], ['axbxcx'])
    """
    numbers: dict[Hashable, int] = {}
    names = [numbers.setdefault(key, len(numbers)) for key, _ in links]
    sizes = dict(zip(names, (size for _, size in links), strict=True))

    def parts(starts: Sequence[int]) -> list[slice]:
        return [slice(*ends) for ends in itertools.pairwise((*starts, len(names)))]

    def cost(starts: Sequence[int]) -> int:
        different = {tuple(names[part]) for part in parts(starts)}
        # A program costs by itself, and by the equations in it; equal chains are compiled once.
        return sum(_PROGRAM + sum(sizes[name] for name in chain) for chain in different)

    starts = list(range(len(names)))
    least = cost(starts)
    # Small ones first: each that is kept apart later costs a program.
    for name in sorted(sizes, key=lambda name: sizes[name]):
        fewer = [start for start in starts if start == 0 or names[start] != name]
        if (found := cost(fewer)) <= least:
            starts, least = fewer, found
    return parts(starts)


def _pieces(
    graph: ir.Graph, groups: Sequence[_Equations], numbers: Mapping[int, int]
) -> list[_Piece]:
    """A piece of each group of equations."""
    last: dict[ir.Var, int] = {}
    for number, group in enumerate(groups):
        last.update((var, number) for eqn in group for var in eqn.input_vars)
    # Outputs are read behind the last piece.
    last.update((var, len(groups)) for var in graph.output_vars)
    return [_piece(graph, number, group, last, numbers) for number, group in enumerate(groups)]


def _piece(
    graph: ir.Graph,
    number: int,
    group: _Equations,
    last: Mapping[ir.Var, int],
    numbers: Mapping[int, int],
) -> _Piece:
    made = [var for eqn in group for var in eqn.outputs]
    inside = set(made)
    read = dict.fromkeys(var for eqn in group for var in eqn.input_vars if var not in inside)
    # What a later piece reads has to leave this one.
    gives = [var for var in made if last.get(var, -1) > number]
    # What the piece computes, in names of its own: places among what it reads and makes.
    local = {var: place for place, var in enumerate((*read, *made))}
    lines = tuple(
        (numbers[eqn.index], *(local[var] for var in (*eqn.input_vars, *eqn.outputs)))
        for eqn in group
    )
    shapes = tuple((graph.shape(var), graph.dtype(var)) for var in read)
    return _Piece(
        (lines, shapes, tuple(local[var] for var in gives)),
        group,
        tuple(read),
        tuple(gives),
        tuple(var for var in read if last[var] == number),
    )
