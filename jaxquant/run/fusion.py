"""Which equations become one call: an accumulating site with what follows it.

A convolution or dot with its multiplier and bias, then clamps (ReLU, ReLU6, clip), then perhaps the
addition of another tensor and clamps again; the result leaves as int8 where an int8 site reads it,
as float where anything else does, or as both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping

from jaxquant.backends.backend import NO_CLAMP, Clamp
from jaxquant.graph import ir, primitives
from jaxquant.plan.binding import Binding, Int8Site
from jaxquant.plan.liveness import read_in_float


@dataclasses.dataclass(frozen=True)
class Chain:
    """What one call stands for.

    Attributes:
      site: the accumulating site.
      output: the tensor that the call gives.
      members: the indices of the equations that it stands for, the last one's included.
      clamps: before and after the addition.
      residual: the tensor that is added; None without an addition.
      residual_int8: True where its int8 form is what is added.
      float_out: True where the output is read in float.
      movements: the equations that rearrange the sums before they are multiplied: those of the
        epilogue, and those between it and what follows.
      channels: where the output channels are behind them.
      is_rounded: True where those who read it in float read what its int8 form stands for.
      grid: the tensor on whose scale the output is quantized: itself, or what an early max pool
        makes of it; None where it is not quantized.  An output with a scale for each channel
        leaves as float and is quantized behind the call, which knows one scale for a tensor.
    """

    site: Int8Site
    output: ir.Var
    members: tuple[int, ...]
    clamps: tuple[Clamp, Clamp]
    residual: ir.Var | None
    residual_int8: bool
    float_out: bool
    is_rounded: bool
    grid: ir.Var | None
    movements: tuple[ir.Equation, ...]
    channels: primitives.Channels


def find_chains(
    graph: ir.Graph,
    binding: Binding,
    live: Iterable[ir.Equation],
    early: Mapping[ir.Var, ir.Equation],
    goes_on: Callable[[Int8Site], bool],
) -> dict[int, Chain]:
    """The chains of the sites with a stored weight, by the index of their last equation.

    Args:
      graph: the traced model.
      binding: the plan in it.
      live: the equations that run in float or make a site's result.
      early: the max pools that run on integers instead, by the tensor that they give.
      goes_on: whether the chain of a site holds what may follow it; else it holds the site alone.
    """
    live = list(live)
    # Of these the float is read by the pool alone: the call may round on the pool's grid at once.
    pooled: dict[ir.Var, ir.Var] = {
        eqn.input_vars[0]: var for var, eqn in early.items() if _is_only_pooled(graph, binding, eqn)
    }
    # What others read as well is quantized for the pool behind the call.
    read = read_in_float(binding, live)
    floats = (read - binding.forms.rounded).union(
        eqn.input_vars[0] for eqn in early.values() if eqn.input_vars[0] not in pooled
    )
    # A call rounds by one scale; what has one for each channel leaves as a float.
    grids = {**pooled, **{var: var for var in binding.names if var not in binding.per_channel}}
    indices = {eqn.index for eqn in live}
    chains: dict[int, Chain] = {}
    claimed: set[int] = set()
    # Of two sites before one addition the later takes it: the other's result is there by then.
    for site in reversed(binding.sites):
        is_live = graph.producer[site.epilogue.output].index in indices
        is_sum = site.site.stored_weight is not None and not site.site.is_lookup
        # What nothing reads has no equation that runs; lookups and dynamic sites have no planned
        # sums.
        if not is_live or not is_sum or site.dynamic:
            continue
        if goes_on(site):
            chain = _follow(graph, binding, site, indices - claimed, floats, grids)
            # The call gives int8 alone, and who reads a float gets what the integers stand for.
            is_rounded = chain.output in read and not chain.float_out
            chain = dataclasses.replace(chain, is_rounded=is_rounded)
        else:
            chain = alone(graph, site)
        claimed.update(chain.members)
        chains[chain.members[-1]] = chain
    return chains


def alone(graph: ir.Graph, site: Int8Site) -> Chain:
    """The chain of a site by itself, with its multiplier and bias: its result can be changed."""
    output = site.epilogue.output
    last = graph.producer[output].index
    epilogue = site.epilogue
    return Chain(
        site, output, (last,), (NO_CLAMP, NO_CLAMP), None, False, True, False, None,
        epilogue.movements, epilogue.channels,
    )  # fmt: skip


def _follow(
    graph: ir.Graph,
    binding: Binding,
    site: Int8Site,
    free: set[int],
    floats: Collection[ir.Var],
    grids: Mapping[ir.Var, ir.Var],
) -> Chain:
    current, channels = site.epilogue.output, site.epilogue.channels
    members = [graph.producer[current].index]
    clamps, residual, residual_int8 = [NO_CLAMP], None, False

    # First what rearranges the sums: the channels are then on other axes.
    movements = _movements(graph, binding, site, free)
    for movement in movements:
        moved = channels.through(graph, movement)
        assert moved is not None, "movements that mix channels are not followed"
        channels, current = moved, movement.outputs[0]
        members.append(movement.index)

    # Then clips and one addition, as long as nothing else reads what lies between.
    while (eqn := _only_reader(graph, binding, current)) is not None and eqn.index in free:
        if (bounds := clamp_of(graph, eqn, current)) is not None:
            clamps[-1] = clamp_after(clamps[-1], bounds)
        elif residual is None and (added := _added(graph, eqn, current)) is not None:
            reads_int8 = eqn.index in binding.forms.reads_int8 and added in binding.forms.int8
            if reads_int8 and added in binding.per_channel:
                break  # a kernel dequantizes what it adds by one scale
            residual, residual_int8 = added, reads_int8
            clamps.append(NO_CLAMP)
        else:
            break
        members.append(eqn.index)
        current = eqn.outputs[0]

    grid = grids.get(current)
    return Chain(
        site,
        current,
        tuple(members),
        (clamps[0], clamps[1] if len(clamps) > 1 else NO_CLAMP),
        residual,
        residual_int8,
        # Without a grid the float is the only result that there is.
        current in floats or grid is None,
        False,
        grid,
        (*site.epilogue.movements, *movements),
        channels,
    )


# Movements without copies or reversals, which a backend may do behind the sums as well as before.
_TURNS = frozenset({"transpose", "reshape", "squeeze", "broadcast_in_dim"})


def _movements(
    graph: ir.Graph, binding: Binding, site: Int8Site, free: set[int]
) -> tuple[ir.Equation, ...]:
    """What rearranges the result of a dot before something that the chain goes on with."""
    if site.site.as_contraction.window is not None:
        return ()
    current, channels = site.epilogue.output, site.epilogue.channels
    found: list[ir.Equation] = []
    # Whether they help shows at their end: all of them up to a clip or an addition, or none.
    while (eqn := _sole_reader(graph, binding, current)) is not None and eqn.index in free:
        if eqn.name not in _TURNS or not primitives.is_movement(graph, eqn):
            # A movement at the end would only have to be taken back.
            goes_on = clamp_of(graph, eqn, current) or _added(graph, eqn, current)
            return tuple(found) if goes_on is not None else ()
        moved = channels.through(graph, eqn)
        if moved is None:
            return ()
        channels, current = moved, eqn.outputs[0]
        found.append(eqn)
    return ()


def _is_only_pooled(graph: ir.Graph, binding: Binding, pool: ir.Equation) -> bool:
    """True where nothing else reads what is pooled."""
    var = pool.input_vars[0]
    # One reader, which is the pool: the float need not exist.
    readers = graph.consumers.get(var, ())
    return len(readers) == 1 and var not in graph.output_vars and var not in binding.forms.int8


def _only_reader(graph: ir.Graph, binding: Binding, var: ir.Var) -> ir.Equation | None:
    """The one equation that needs a tensor and gives one of its shape; None without such a one."""
    eqn = _sole_reader(graph, binding, var)
    same = eqn is not None and graph.shape(eqn.outputs[0]) == graph.shape(var)
    return eqn if same else None


def _sole_reader(graph: ir.Graph, binding: Binding, var: ir.Var) -> ir.Equation | None:
    """The one equation that needs a tensor, of one result; None where its value is needed else."""
    readers = graph.consumers.get(var, ())
    if var in graph.output_vars or var in binding.forms.int8 or len(readers) != 1:
        return None
    return readers[0] if len(readers[0].outputs) == 1 else None


def clamp_of(graph: ir.Graph, eqn: ir.Equation, var: ir.Var) -> Clamp | None:
    """The bounds of `max`, `min` or `clamp` of a tensor with constants; None of anything else."""
    if var not in eqn.input_vars:
        return None
    # The tensor may be either operand of max and min, but clamp has it in the middle.
    values = [None if x == var else primitives.constant_scalar(graph, x) for x in eqn.inputs]
    if eqn.name == "max" and len(found := [v for v in values if v is not None]) == 1:
        return found[0], math.inf
    if eqn.name == "min" and len(found := [v for v in values if v is not None]) == 1:
        return -math.inf, found[0]
    if eqn.name == "clamp" and eqn.inputs[1] == var:
        low, _, high = values
        if low is not None and high is not None:
            return low, high
    return None


def clamp_after(first: Clamp, then: Clamp) -> Clamp:
    """Two clamps in turn as one: low, then high, as `max` and `min` are applied."""
    # The second clamp moves the bounds of the first: what is clipped twice lies between those.
    low, high = (min(max(bound, then[0]), then[1]) for bound in first)
    return low, high


def _added(graph: ir.Graph, eqn: ir.Equation, var: ir.Var) -> ir.Var | None:
    """The other operand of an addition of two tensors of one shape."""
    if eqn.name not in ("add", "add_any") or len(eqn.input_vars) != 2:
        return None
    left, right = eqn.input_vars
    # x + x has no other operand, a constant is a bias, and what is broadcast is no residual.
    other = right if left == var else left
    if other == var or graph.is_static(other) or graph.shape(other) != graph.shape(var):
        return None
    return other
