"""What is read at every second position alone is computed there alone.

A 1x1 convolution with a stride of 2 reads one position of four.  Where all that read a tensor are
such convolutions, as at the end of each stage of a ResNet whose stride is in its 1x1 convolutions,
the call that gives the tensor takes the stride, and so do the calls before it as far as that holds
for them: the same integers, and three of four never made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxquant.graph import ir
from jaxquant.graph.contraction import Contraction
from jaxquant.run.calls import SiteCall

# By the axes of a tensor, how far apart the positions are that are read.
Steps = Mapping[int, int]


def thinned(graph: ir.Graph, calls: Mapping[int, SiteCall]) -> dict[int, SiteCall]:
    """The calls, of which some give fewer positions, and those that read these slide by ones.

    Args:
      graph: the traced model.
      calls: by the index of their last equation.
    """
    found = dict(calls)
    # A call takes its readers' stride before it is itself a reader of an earlier one.
    for last in sorted(calls, reverse=True):
        output = found[last].chain.output
        readers = _readers(graph, found, output)
        steps = _steps(found, readers)
        if steps is None or not _can_step(graph, found[last], steps):
            continue
        found[last] = _stepping(found[last], steps)
        found |= {reader: _sliding_by_ones(found[reader]) for reader in readers}
    return found


def _readers(graph: ir.Graph, calls: Mapping[int, SiteCall], output: ir.Var) -> list[int]:
    """The calls that read a tensor's int8 form as what they sum; none where anything else does."""
    by_site = {each.chain.site.site.equation: last for last, each in calls.items()}
    consumers = graph.consumers.get(output, ())
    readers = [by_site.get(eqn.index) for eqn in consumers]
    # A reader that is no call, a pool say, may read every position.
    found = [last for last in readers if last is not None]
    only_sums = all(
        calls[last].chain.site.site.operands[0] == output and calls[last].chain.residual != output
        for last in found
    )
    is_result = output in graph.output_vars
    return found if only_sums and len(found) == len(readers) and not is_result else []


def _steps(calls: Mapping[int, SiteCall], readers: list[int]) -> Steps | None:
    """How far apart the positions are that the readers read; None where they read all of them."""
    steps = [_steps_of(calls[last]) for last in readers]
    alike = bool(steps) and all(each == steps[0] for each in steps)
    # Readers with unlike strides would need the positions of both.
    return steps[0] if alike and steps[0] and max(steps[0].values()) > 1 else None


def _steps_of(reader: SiteCall) -> Steps | None:
    """The strides of a call by the axes of what it reads; None where its window has a size."""
    call, window = reader.call, reader.call.contraction.window
    if window is None or call.weight_position != 1:
        return None
    own, kernel = call.contraction.operands
    # A larger window reads the positions in between.
    is_pointwise = all(call.weight_shape[axis] == 1 for axis in kernel.window)
    is_plain = {*window.input_dilation} <= {1} and not any(map(any, window.padding))
    if not is_pointwise or not is_plain or window.batch_groups > 1:
        return None
    return dict(zip(own.window, window.strides, strict=True))


def _can_step(graph: ir.Graph, each: SiteCall, steps: Steps) -> bool:
    """Whether a call can give every so many positions of its result, which is int8 alone."""
    call, chain, window = each.call, each.chain, each.call.contraction.window
    if window is None or call.movements or window.batch_groups > 1 or call.weight_position != 1:
        # Movements would have to be thinned too.
        return False
    is_int8_alone = not call.gives_float and not call.gives_sums and chain.grid == chain.output
    is_alike = chain.residual is None or graph.shape(chain.residual) == call.shape
    return (
        is_int8_alone
        and is_alike
        and not chain.is_rounded
        and {*window.input_dilation} <= {1}
        and {*call.contraction.result.window} == steps.keys()
        and all(isinstance(call.shape[axis], int) for axis in steps)
    )


def _stepping(each: SiteCall, steps: Steps) -> SiteCall:
    """The call that gives every so many positions; of what it adds it takes those."""
    call, window = each.call, each.call.contraction.window
    assert window is not None
    along = [steps[axis] for axis in call.contraction.result.window]
    slower = tuple(own * more for own, more in zip(window.strides, along, strict=True))
    # What is left behind the last whole stride has one more position: rounded up, as slices have
    # it.
    shape = tuple(-(-size // steps.get(axis, 1)) for axis, size in enumerate(call.shape))
    adds = each.chain.residual is not None
    return each.changed(
        dataclasses.replace(call, contraction=_strided(call.contraction, slower), shape=shape),
        residual_strides=tuple(steps.get(axis, 1) for axis in range(len(shape))) if adds else None,
    )


def _sliding_by_ones(each: SiteCall) -> SiteCall:
    """The call whose input has those positions alone that it reads."""
    contraction = each.call.contraction
    # The input has only positions that are read, so that a window of one slides by one.
    ones = (1,) * len(contraction.result.window)
    changed = dataclasses.replace(each.call, contraction=_strided(contraction, ones))
    return each.changed(changed, residual_strides=each.residual_strides)


def _strided(contraction: Contraction, strides: tuple[int, ...]) -> Contraction:
    """A convolution with other strides."""
    window = contraction.window
    assert window is not None
    return dataclasses.replace(contraction, window=dataclasses.replace(window, strides=strides))
