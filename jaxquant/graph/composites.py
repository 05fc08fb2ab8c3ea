"""Operations that JAX writes as several equations: softmax, functions of one tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Set

import jax.numpy as jnp

from jaxquant.graph import copies, ir, primitives


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The equations of one softmax: from `source` to the output of the last."""

    source: ir.Var
    members: tuple[int, ...]


class Composites:
    """What of one graph belongs together.  Each property is found once, when it is first read."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    @functools.cached_property
    def softmaxes(self) -> Mapping[int, Softmax]:
        """The softmaxes by the index of their last equation, a division.

        What is found is exp(x - m) / sum(exp(x - m)), where m depends on x alone.
        """
        found = {}
        for eqn in self._graph.equations:
            if eqn.name == "div" and (softmax := _match_softmax(self._graph, eqn)) is not None:
                found[eqn.index] = softmax
        return found

    @functools.cached_property
    def normalisations(self) -> frozenset[int]:
        """The indices of the operations that gather a normalisation's statistics.

        What they gather over an axis or a neighbourhood of a tensor comes back, elementwise, to
        the tensor itself: `x - mean(x)`, `x / (k + sum of neighbours' squares) ** b`.  So do
        LayerNorm and local response normalisation, which have no int8 form; softmax, which has
        one, is not among them.
        """
        graph = self._graph
        of_softmax = {i for softmax in self.softmaxes.values() for i in softmax.members}
        gathering = [e for e in graph.equations if _gathers(e) and e.index not in of_softmax]
        origins, _ = _bases(graph, frozenset(e.index for e in gathering))
        gathering = [e for e in gathering if e.outputs[0] in origins]
        found: set[int] = set()
        while True:  # the variance is of x - mean(x): each round finds what the one before allows
            bases, _ = _bases(graph, frozenset(found))
            new = {
                eqn.index
                for eqn in gathering
                if eqn.index not in found and _returns_to_base(graph, eqn, origins, bases)
            }
            if not new:
                return frozenset(found)
            found |= new

    @property
    def bases(self) -> Mapping[ir.Var, ir.Var]:
        """Tensor -> the tensor that it is a function of, for those that are a function of one.

        A function is elementwise, may use its tensor twice (`x * sigmoid(x)`), may pass through
        rearrangements, and may normalise: `(x - mean(x)) / std(x)`.  An elementwise operation of
        two different tensors starts a new one.
        """
        return self._followed[0]

    @functools.cached_property
    def normalising(self) -> frozenset[int]:
        """The indices of all equations from a normalisation's statistics to its result."""
        return frozenset(self._graph.producer[var].index for var in self._followed[1])

    @functools.cached_property
    def _followed(self) -> tuple[Mapping[ir.Var, ir.Var], Set[ir.Var]]:
        return _bases(self._graph, self.normalisations)


def _match_softmax(graph: ir.Graph, division: ir.Equation) -> Softmax | None:
    numerator, denominator = division.inputs
    exponential = _producer(graph, numerator)
    if exponential is None or exponential.name != "exp":
        return None
    members = {division.index, exponential.index}
    total = _through_movement(graph, denominator, members)
    if total is None or total.name != "reduce_sum" or total.inputs[0] != numerator:
        return None
    members.add(total.index)
    shifted = _producer(graph, exponential.inputs[0])
    if shifted is None or shifted.name != "sub" or not isinstance(shifted.inputs[0], int):
        return None
    source = shifted.inputs[0]
    members.add(shifted.index)
    stack = [shifted.inputs[1]]
    while stack:
        atom = stack.pop()
        if graph.is_static(atom) or atom == source:
            continue
        eqn = _producer(graph, atom)
        if eqn is None or eqn.name not in (
            "reduce_max", "max", "stop_gradient", "broadcast_in_dim", "reshape", "select_n",
            "is_finite",
        ):  # fmt: skip
            return None
        members.add(eqn.index)
        stack.extend(eqn.inputs)
    source = _before_mask(graph, source, members)
    inner = {v for i in members - {division.index} for v in graph.equations[i].outputs}
    for var in inner:
        if var in graph.output_vars:
            return None
        if any(user.index not in members for user in graph.consumers.get(var, ())):
            return None
    return Softmax(source, tuple(sorted(members)))


def _before_mask(graph: ir.Graph, source: ir.Var, members: set[int]) -> ir.Var:
    """The scores of a masked softmax; the equations that mask them join `members`.

    A mask's -1e9 must not take part in the range of the scores.
    """
    while (eqn := graph.producer.get(source)) is not None:
        if eqn.name not in ("select_n", "add", "sub"):
            return source
        operands = eqn.inputs[1:] if eqn.name == "select_n" else eqn.inputs
        scores = [x for x in operands if not _is_mask(graph, x)]
        chooses = eqn.name == "select_n"  # then one value, -1e9 or -inf, is a mask too
        if not chooses and not any(_masks(graph, x) for x in operands if x not in scores):
            return source
        only_here = all(user.index in members for user in graph.consumers.get(source, ()))
        if len(scores) != 1 or not isinstance(scores[0], int) or not only_here:
            return source
        if source in graph.output_vars or (eqn.name == "sub" and scores[0] != eqn.inputs[0]):
            return source
        members.add(eqn.index)
        source = scores[0]
    return source


def _masks(graph: ir.Graph, atom: ir.Atom) -> bool:
    """False for one value that is added everywhere: the epilogue of the product absorbs it."""
    return not graph.is_static(atom) or bool(copies.varying_axes(graph, atom))


def _is_mask(graph: ir.Graph, atom: ir.Atom) -> bool:
    """True for values that come from parameters, constants, and truth values or integers alone."""
    stack, steps = [atom], 0
    while stack:
        atom = stack.pop()
        if graph.is_static(atom) or not jnp.issubdtype(graph.dtype(atom), jnp.floating):
            continue
        eqn, steps = _producer(graph, atom), steps + 1
        if eqn is None or steps > _MASK_STEPS:
            return False
        if not primitives.is_elementwise(eqn) and eqn.name not in _MASK_SHAPING:
            return False
        stack.extend(eqn.inputs)
    return True


_MASK_SHAPING = frozenset({"broadcast_in_dim", "reshape", "slice", "squeeze", "tile", "transpose"})
_MASK_STEPS = 32  # equations from truth values to a mask, at most


def _producer(graph: ir.Graph, atom: ir.Atom) -> ir.Equation | None:
    return graph.producer.get(atom) if isinstance(atom, int) else None


def _through_movement(graph: ir.Graph, atom: ir.Atom, members: set[int]) -> ir.Equation | None:
    eqn = _producer(graph, atom)
    while eqn is not None and eqn.name in ("broadcast_in_dim", "reshape", "stop_gradient"):
        members.add(eqn.index)
        eqn = _producer(graph, eqn.inputs[0])
    return eqn


def _gathers(eqn: ir.Equation) -> bool:
    return eqn.name.startswith(("reduce_", "cum", "pad", "slice", "concatenate", "stack"))


def _bases(graph: ir.Graph, gathering: frozenset[int]) -> tuple[dict[ir.Var, ir.Var], set[ir.Var]]:
    """Follow functions of one tensor through elementwise operations, movements and `gathering`.

    Returns:
      Tensor -> the tensor that it is a function of, and the tensors behind `gathering`.
    """
    bases: dict[ir.Var, ir.Var] = {}
    behind: set[ir.Var] = set()
    for eqn in graph.equations:
        dynamic = [v for v in eqn.input_vars if not graph.static[v]]
        if not dynamic or len(eqn.outputs) != 1:
            continue
        is_behind = eqn.index in gathering or any(v in behind for v in dynamic)
        if not (
            primitives.is_elementwise(eqn)
            or primitives.is_movement(graph, eqn)
            or eqn.index in gathering
            or (is_behind and eqn.name == "broadcast_in_dim")
        ):
            continue
        found = {bases.get(v, v) for v in dynamic}
        if len(found) == 1:
            (bases[eqn.outputs[0]],) = found
            if is_behind:
                behind.add(eqn.outputs[0])
    return bases, behind


def _returns_to_base(
    graph: ir.Graph,
    eqn: ir.Equation,
    origins: dict[ir.Var, ir.Var],
    bases: dict[ir.Var, ir.Var],
) -> bool:
    """True where what `eqn` gives meets, elementwise, its tensor or a function of it in `bases`."""
    origin = origins[eqn.outputs[0]]
    base = bases.get(eqn.input_vars[0], eqn.input_vars[0])
    gathered, stack = {eqn.outputs[0]}, [eqn.outputs[0]]
    while stack:
        for user in graph.consumers.get(stack.pop(), ()):
            if origins.get(user.outputs[0]) != origin or user.outputs[0] in gathered:
                continue
            if primitives.is_elementwise(user) and any(
                v not in gathered and bases.get(v, v) == base
                for v in user.input_vars
                if not graph.static[v]
            ):
                return True
            gathered.add(user.outputs[0])
            stack.append(user.outputs[0])
    return False
