"""Operations that JAX writes as several equations: softmax, functions of one tensor."""

from __future__ import annotations

import dataclasses

from jaxquant.graph import ir, primitives


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The equations of one softmax: from `source` to the output of the last."""

    source: ir.Var
    members: tuple[int, ...]


def find_softmax(graph: ir.Graph) -> dict[int, Softmax]:
    """The softmaxes of a graph by the index of their last equation, a division.

    What is found is exp(x - m) / sum(exp(x - m)), where m depends on x alone.
    """
    found = {}
    for eqn in graph.equations:
        if eqn.name == "div" and (softmax := _match_softmax(graph, eqn)) is not None:
            found[eqn.index] = softmax
    return found


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
    inner = {v for i in members - {division.index} for v in graph.equations[i].outputs}
    for var in inner:
        if var in graph.output_vars:
            return None
        if any(user.index not in members for user in graph.consumers.get(var, ())):
            return None
    return Softmax(source, tuple(sorted(members)))


def _producer(graph: ir.Graph, atom: ir.Atom) -> ir.Equation | None:
    return graph.producer.get(atom) if isinstance(atom, int) else None


def _through_movement(graph: ir.Graph, atom: ir.Atom, members: set[int]) -> ir.Equation | None:
    eqn = _producer(graph, atom)
    while eqn is not None and eqn.name in ("broadcast_in_dim", "reshape", "stop_gradient"):
        members.add(eqn.index)
        eqn = _producer(graph, eqn.inputs[0])
    return eqn


def elementwise_bases(graph: ir.Graph) -> dict[ir.Var, ir.Var]:
    """Tensor -> the tensor that it is a function of, for those that are a function of one.

    A function is elementwise, may use its tensor twice (`x * sigmoid(x)`), may pass through
    rearrangements, and may normalise: `(x - mean(x)) / std(x)`.  An elementwise operation of two
    different tensors starts a new one.
    """
    return _bases(graph, normalisations(graph))[0]


def normalisation_members(graph: ir.Graph) -> frozenset[int]:
    """The indices of all equations from a normalisation's reductions to its result."""
    reductions = normalisations(graph)
    reduced = _bases(graph, reductions)[1]
    return frozenset(graph.producer[var].index for var in reduced)


def normalisations(graph: ir.Graph) -> frozenset[int]:
    """The indices of reductions whose result is combined elementwise with what was reduced.

    They belong to LayerNorm, local response normalisation and the like, which have no int8 form;
    softmax, which has one, is not among them.
    """
    of_softmax = {i for softmax in find_softmax(graph).values() for i in softmax.members}
    origins, _ = _bases(graph, frozenset(e.index for e in graph.equations if _is_reduction(e)))
    found = set()
    for eqn in graph.equations:
        if not _is_reduction(eqn) or eqn.index in of_softmax or eqn.outputs[0] not in origins:
            continue
        if _is_recombined(graph, eqn, origins):
            found.add(eqn.index)
    return frozenset(found)


_SPREADS = frozenset({"broadcast_in_dim", "slice", "pad", "concatenate"})


def _is_reduction(eqn: ir.Equation) -> bool:
    return eqn.name.startswith(("reduce_window_", "reduce_sum", "reduce_max", "reduce_min"))


def _bases(graph: ir.Graph, reductions: frozenset[int]) -> tuple[dict[ir.Var, ir.Var], set[ir.Var]]:
    """Follow functions of one tensor through elementwise operations, movements and `reductions`.

    Returns:
      Tensor -> the tensor that it is a function of, and the tensors behind a reduction.
    """
    bases: dict[ir.Var, ir.Var] = {}
    reduced: set[ir.Var] = set()
    for eqn in graph.equations:
        dynamic = [v for v in eqn.input_vars if not graph.static[v]]
        if not dynamic or len(eqn.outputs) != 1:
            continue
        after_reduction = any(v in reduced for v in dynamic)
        if not (
            primitives.is_elementwise(eqn)
            or primitives.is_movement(graph, eqn)
            or eqn.index in reductions
            or (after_reduction and eqn.name in _SPREADS)
        ):
            continue
        found = {bases.get(v, v) for v in dynamic}
        if len(found) == 1:
            (bases[eqn.outputs[0]],) = found
            if after_reduction or eqn.index in reductions:
                reduced.add(eqn.outputs[0])
    return bases, reduced


def _is_recombined(graph: ir.Graph, eqn: ir.Equation, origins: dict[ir.Var, ir.Var]) -> bool:
    origin = origins[eqn.outputs[0]]
    statistic = {eqn.outputs[0]}
    for later in graph.equations[eqn.index + 1 :]:
        dynamic = [v for v in later.input_vars if not graph.static[v]]
        if not any(v in statistic for v in dynamic):
            continue
        if origins.get(later.outputs[0]) != origin:
            continue
        if any(v not in statistic for v in dynamic):
            return True
        statistic.update(later.outputs)
    return False
