"""The epilogue of a site: the per-channel affine chain that its multiplier and bias absorb.

Behind a convolution or dot, additions and multiplications by static per-channel values (bias,
BatchNorm in inference mode, scalars) compose to one `accumulator * multiplier + bias`.  The chain
may pass through transposes and reshapes that keep the channels apart.  The elementwise operations
behind it (ReLU, swish, gelu, ...) read its float32 result and fuse with it.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxquant.graph import copies, ir, primitives
from jaxquant.graph.batch_sizes import shared_axes
from jaxquant.graph.once import once
from jaxquant.graph.primitives import Channels
from jaxquant.graph.sites import Site
from jaxquant.plan.fillers import fillers


@dataclasses.dataclass(frozen=True)
class AffineStep:
    """One absorbed equation: `op` is mul, div, add, sub (x - c), rsub (c - x) or neg.

    `channels` places the site's channels in the operand's broadcast shape, which has `rank` axes.
    """

    op: str
    operand: ir.Atom | None
    channels: Channels
    rank: int


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What follows the accumulator of a site.

    Attributes:
      steps: the affine steps, in order.
      movements: the equations that rearrange the tensor on the way.
      output: the tensor at the end of the chain; the equations before it are absorbed.
      channels: where the site's channels are in `output`.
      activation: the names of the elementwise equations behind the chain.
    """

    steps: tuple[AffineStep, ...]
    movements: tuple[ir.Equation, ...]
    output: ir.Var
    channels: Channels
    activation: tuple[str, ...]

    @property
    def affine(self) -> tuple[str, ...]:
        """The names of the affine steps."""
        return tuple(step.op for step in self.steps)


def find_epilogue(graph: ir.Graph, site: Site, steps_at_most: int | None = None) -> Epilogue:
    """Follow the tensor behind a site as far as its channels stay apart.

    Args:
      graph: the traced model.
      site: an accumulating site.
      steps_at_most: how many affine steps to absorb; a plan fixes them, since another batch size
        may let a chain go on (what varies along a batch of one varies along nothing).
    """
    ends = _ends(graph, site)
    # Where a plan counts its steps, the end with as many is the one; else the last.
    first = (number for number, end in enumerate(ends) if len(end.steps) == steps_at_most)
    return _ended(graph, site, next(first, len(ends) - 1))


class _End(NamedTuple):
    """Where a chain may end: the first four attributes of an `Epilogue`."""

    steps: tuple[AffineStep, ...]
    movements: tuple[ir.Equation, ...]
    output: ir.Var
    channels: Channels


@once
def _ended(graph: ir.Graph, site: Site, number: int) -> Epilogue:
    """The epilogue with one of its possible ends."""
    end = _ends(graph, site)[number]
    return Epilogue(*end, activation=_activation(graph, end.output))


@once
def _ends(graph: ir.Graph, site: Site) -> tuple[_End, ...]:
    """The ends that the chain of a site may have, each an absorbed equation behind the last."""
    assert site.output is not None
    # A product of two tensors has no channels: only numbers are absorbed.
    stored = site.contraction is not None and site.stored_weight is not None
    channels = output_channels(graph, site) if stored else Channels((), ())
    ends = [_End((), (), site.output, channels)]
    if site.contraction is None:  # what a sum is divided by depends on the input shape
        return tuple(ends)
    # Each step is taken only where nobody else reads what lies before it: then the value need not
    # exist. A movement by itself is no end, since it gains nothing; one that an affine step follows
    # is taken with it.
    pending: list[ir.Equation] = []  # movements not yet followed by an affine step
    position = site.output
    while (follower := _only_consumer(graph, position)) is not None:
        if primitives.is_movement(graph, follower):
            moved = channels.through(graph, follower)
            if moved is None:
                break
            pending.append(follower)
            position, channels = follower.outputs[0], moved
            continue
        found = _affine_step(graph, follower, position, channels)
        if found is None:
            break
        absorbed = () if found.op == "cast" else (found,)
        position = follower.outputs[0]
        steps, movements = (*ends[-1].steps, *absorbed), (*ends[-1].movements, *pending)
        ends.append(_End(steps, movements, position, channels))
        pending = []
    return tuple(ends)


def fused_end(graph: ir.Graph, site: Site) -> ir.Var:
    """The tensor behind the clips that a kernel fuses with a site, and the division of a mean."""
    var = find_epilogue(graph, site).output
    while (eqn := _only_consumer(graph, var)) is not None:
        numbers = [primitives.constant_scalar(graph, x) for x in eqn.inputs if x != var]
        with_numbers = len(eqn.inputs) == len(numbers) + 1 and None not in numbers
        # A sum that is no dot may be divided behind (a mean), which is a multiplier like any other.
        is_scaling = site.contraction is None and eqn.name in ("mul", "div")
        if not with_numbers or not (eqn.name in ("max", "min", "clamp") or is_scaling):
            break
        # A quotient is a multiplier only where the sum is above the line, a clip one in the middle
        # alone.
        if eqn.name in ("clamp", "div") and eqn.inputs[eqn.name == "clamp"] != var:
            break
        var = eqn.outputs[0]
    return var


def fingerprint(graph: ir.Graph, site: Site, epilogue: Epilogue) -> str:
    """How the site's weight and the operands of its epilogue are computed from the parameters.

    The shape of the stored weight is a part of it: a weight that follows the input in another way
    than by the batch is of another graph.
    """
    # By the shape too: a weight that grows with the image is computed alike, but is another one.
    shape = "none" if site.stored_weight is None else str(stored_shape(graph, site))
    atoms: list[ir.Atom | None] = [site.stored_weight]
    atoms += [step.operand for step in epilogue.steps]
    return "-".join([shape, *(graph.fingerprint(a) if a is not None else "none" for a in atoms)])


def stored_shape(graph: ir.Graph, site: Site) -> tuple[int, ...]:
    """The shape of a site's stored weight: that of the operand, size 1 where it is shared."""
    assert site.weight is not None
    shared = shared_axes(graph, site)
    return tuple(1 if d in shared else n for d, n in enumerate(graph.shape(site.weight)))


@once
def output_channels(graph: ir.Graph, site: Site) -> Channels:
    """Where the weight's output channels are in the site's own output.

    Axes that share a stored weight are no channels.
    """
    side = site.weight_position
    weight_shape = graph.shape(graph.equations[site.equation].inputs[side])
    shared = shared_axes(graph, site) if site.stored_weight is not None else ()
    places = {axis: site.as_contraction.place(side, axis) for axis in site.channel_axes}
    found = {axis: at for axis, at in places.items() if axis not in shared and at is not None}
    return Channels(tuple(weight_shape[axis] for axis in found), tuple(found.values()))


def _only_consumer(graph: ir.Graph, var: ir.Var) -> ir.Equation | None:
    # A result beside others (of a sort) is none to go on from.
    consumers = graph.consumers.get(var, ())
    if len(consumers) != 1 or var in graph.output_vars or len(consumers[0].outputs) != 1:
        return None
    return consumers[0]


def _affine_step(
    graph: ir.Graph, eqn: ir.Equation, current: ir.Var, channels: Channels
) -> AffineStep | None:
    shape, rank = graph.shape(current), len(graph.shape(current))
    # Broadcasting would make one channel's sum several.
    if graph.shape(eqn.outputs[0]) != shape:
        return None
    # The epilogue computes in float32 whatever the model's floats are: a cast is no step of it.
    if eqn.name == "convert_element_type":
        both_float = all(
            jnp.issubdtype(graph.dtype(v), jnp.floating) for v in (current, eqn.outputs[0])
        )
        return AffineStep("cast", None, channels, rank) if both_float else None
    if eqn.name == "neg":
        return AffineStep("neg", None, channels, rank)
    if eqn.name not in ("add", "add_any", "sub", "mul", "div"):
        return None
    left, right = eqn.inputs
    # x + x and x * x are no affine steps.
    if left == right:
        return None
    # One side is the sum, the other has to be a constant of the channels, known before the call.
    operand = right if left == current else left
    if not graph.is_static(operand):
        return None
    # c / x is no multiplier.
    if eqn.name == "div" and operand is left:
        return None
    # What varies along other axes than the channels' is no number of a channel: a residual, say.
    if not copies.varying_axes(graph, operand) <= frozenset(channels.axes):
        return None
    if isinstance(operand, int) and np.isinf(fillers(graph).get(operand, 0.0)):
        return None  # no multiplier or bias of the sums is infinite
    op = {"add_any": "add", "sub": "sub" if operand is right else "rsub"}.get(eqn.name, eqn.name)
    return AffineStep(op, operand, channels, rank)


@once
def activation_equations(graph: ir.Graph, start: ir.Var) -> tuple[ir.Equation, ...]:
    """The elementwise equations that depend on `start` and on nothing else that varies."""
    region, found = {start}, []
    shape = graph.shape(start)
    # Readers in evaluation order, so that all that one of them reads has been decided on.
    waiting = [eqn.index for eqn in graph.consumers.get(start, ())]
    heapq.heapify(waiting)
    seen = set(waiting)
    while waiting:
        eqn = graph.equations[heapq.heappop(waiting)]
        # Not of this shape: a sum or a softmax, which ends the activation here.
        if not primitives.is_elementwise(eqn) or graph.shape(eqn.outputs[0]) != shape:
            continue
        # All that it reads has to be of the activation, or static.
        if all(v in region for v in eqn.input_vars if not graph.static[v]):
            region.add(eqn.outputs[0])
            found.append(eqn)
            for reader in graph.consumers.get(eqn.outputs[0], ()):
                if reader.index not in seen:
                    seen.add(reader.index)
                    heapq.heappush(waiting, reader.index)
    return tuple(found)


def _activation(graph: ir.Graph, start: ir.Var) -> tuple[str, ...]:
    return tuple(eqn.name for eqn in activation_equations(graph, start))
