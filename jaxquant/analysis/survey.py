"""One pass over the data: both models in one compiled step, every site measured in two views."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.analysis import measures
from jaxquant.analysis.batch import Batch, measure
from jaxquant.analysis.measures import Clipping, Ends, Moments
from jaxquant.backends import operations
from jaxquant.calibration import counting, histogram, inside
from jaxquant.calibration.observations import TensorStats
from jaxquant.calibration.observed import Observed
from jaxquant.calibration.padding import Padding, real_in
from jaxquant.calibration.sweep import State, stacked, stats_of
from jaxquant.graph.layer_names import of_layer
from jaxquant.graph.model import FloatModel
from jaxquant.graph.positions import RealIn
from jaxquant.plan.bind import bind
from jaxquant.plan.binding import Binding
from jaxquant.plan.plan import Plan
from jaxquant.progress import Progress
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.program import program_by_site
from jaxquant.tune.biases import without_correction
from jaxquant.tune.parts import Parts, find_parts


class Surveyed(NamedTuple):
    """What a pass over the data tells; host data.

    What is inside a scan over stacked weights is there once for each layer, "NAME[3]"; in another
    loop it is of all steps, and missing where there was no step, or the branch was not chosen.

    Attributes:
      own: site -> moments of its output, its inputs those of the float model.
      accumulated: site -> likewise, both models run whole; in loops the float model says how many
        steps there are, which branch is taken and what integers are.
      ends: site with output channels -> extremes of each channel, behind the activation, where the
        site's inputs are those of the float model.
      tensors: quantized tensor -> how the float model's values fit its grid; the extremes are
        [batches].
      stats: quantized tensor -> the histogram of its |x|, as in a calibration.
      outputs: moments of the model's float outputs together; None where it has none.
      batches: how many there were.
    """

    own: dict[str, Moments]
    accumulated: dict[str, Moments]
    ends: dict[str, Ends]
    tensors: dict[str, Clipping]
    stats: dict[str, TensorStats]
    outputs: Moments | None
    batches: int


def survey(
    source: FloatModel,
    qparams: Mapping[str, Any],
    plan: Plan,
    batches: Iterable[tuple[Any, ...]],
    padding: Padding | None,
    progress: Progress,
) -> Surveyed:
    """Measure all sites on all batches, but for what is padding.

    A site's own error is that with the bias correction which it would have behind the float model.

    Raises:
      ValueError: a batch gives another graph than the one that was quantized, or a tensor holds
        NaN or infinity.
    """

    # Arrays are arguments and not constants: they would be compiled into the program.
    @jax.jit
    def step(
        params: Any, qparams: Any, plain: Any, *inputs: Any
    ) -> tuple[Batch, counting.Counts | None]:
        program = program_by_site(bind(source.trace(inputs), plan), params)
        flat = jax.tree.leaves(inputs)
        real = real_in(padding, program.model, inputs)
        found = measure(find_parts(program), params, qparams, plain, flat, real)
        return found, _count(program.binding, params, flat, real)

    params = source.params
    total: Batch | None = None
    ranges: list[dict[str, Any]] = []
    known: _Known | None = None
    # Ranges are kept batch by batch (they show drift), all else is summed as it comes.
    for index, inputs in enumerate(batches):
        if padding is not None:
            padding.check(inputs, index)
        # The first batch alone says what there is; shapes may change, the model does not.
        if known is None:
            with progress.stage("tracing"):
                known = _known_of(source, plan, qparams, inputs)
                # One state at least: nothing cannot be stacked.
                stats = stacked([histogram.init()] * max(len(known.names), 1))
        with progress.stage("compiling") if index == 0 else contextlib.nullcontext():
            found, seen = step(params, qparams, known.plain, *inputs)

            # Summed on the host in float64: of many batches float32 would lose the last ones.
            found = _by_layer(jax.device_get(found), known.scans)
            if seen is not None:
                stats, first_bad = counting.fold(stats, seen, np.int32(index))
                _check_finite(known.names, first_bad)
        ranges.append({name: (t.low, t.high) for name, t in found.tensors.items()})
        total = found if total is None else _joined(total, found)
    # An empty data set is refused where it is read.
    assert total is not None
    assert known is not None
    return _surveyed(total, ranges, known.names, stats)


def _surveyed(
    total: Batch, ranges: Sequence[Mapping[str, Any]], names: Sequence[str], stats: State
) -> Surveyed:
    """What all batches together tell.

    Args:
      total: their sums.
      ranges: of each batch, the extremes of the tensors in it.
      names: of the quantized tensors.
      stats: their histograms, stacked.
    """
    return Surveyed(
        own=total.own,
        accumulated=total.accumulated,
        ends=total.ends,
        tensors={
            name: tensor._replace(
                low=np.array([b[name][0] for b in ranges if name in b]),
                high=np.array([b[name][1] for b in ranges if name in b]),
            )
            for name, tensor in total.tensors.items()
        },
        stats={
            name: stats_of(jax.tree.map(lambda x, k=k: x[k], stats)) for k, name in enumerate(names)
        },
        outputs=functools.reduce(measures.add, total.outputs) if total.outputs else None,
        batches=len(ranges),
    )


class _Known(NamedTuple):
    """What the first batch tells of the model.

    Attributes:
      plain: the int8 model's arrays without corrected biases.
      scans: see `_scans_around`.
      names: of the quantized tensors.
    """

    plain: Any
    scans: dict[str, tuple[int, ...]]
    names: Sequence[str]


def _known_of(
    source: FloatModel, plan: Plan, qparams: Mapping[str, Any], inputs: tuple[Any, ...]
) -> _Known:
    program = program_by_site(bind(source.trace(inputs), plan), source.params)
    return _Known(
        without_correction(program, source.params, qparams),
        _scans_around(find_parts(program)),
        _observed(program.binding).names,
    )


def _observed(binding: Binding) -> Observed:
    """The quantized tensors, those of loops and choices too."""
    bodies = {
        index: tuple(_observed(body.layers[0]) for body in bodies)
        for index, bodies in binding.bodies.items()
    }
    return Observed(binding.model, {name: var for var, name in binding.names.items()}, bodies)


def _count(
    binding: Binding, params: Any, flat: Sequence[Any], real: RealIn
) -> counting.Counts | None:
    """The values of the quantized tensors, counted; None where there are none."""
    observed = _observed(binding)
    if not observed.names:
        return None
    counter = operations.counter(counting.portable_counts, histogram.MIN_EXPONENT)
    watch = inside.Watch(counter, None, fast_convolutions, real)
    return inside.observe(observed, params, flat, (), watch, {}).counts


def _scans_around(parts: Parts) -> dict[str, tuple[int, ...]]:
    """Site or tensor -> the numbers of layers of the scans over stacked weights around it."""
    found: dict[str, tuple[int, ...]] = {}
    for each in parts.walk():
        names = [*each.program.binding.names.values(), *(part.name for part in each.own)]
        found |= dict.fromkeys(names, each.program.model.scans)
    return found


def _by_layer(batch: Batch, scans: Mapping[str, tuple[int, ...]]) -> Batch:
    """What one batch tells, in float64, of each layer by itself; without what no step showed."""

    def layers(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, each in found.items():
            for layer in np.ndindex(scans[name]):
                one = jax.tree.map(lambda x, layer=layer: np.asarray(x)[layer], each)
                yield of_layer(name, layer), one

    # A branch that no sample took has nothing to tell.
    own = {name: each for name, each in layers(batch.own) if each.was_seen}
    found = Batch(
        own,
        {name: each for name, each in layers(batch.accumulated) if name in own},
        {name: each for name, each in layers(batch.ends) if name in own},
        batch.outputs,
        {name: each for name, each in layers(batch.tensors) if each.moments.was_seen},
    )
    return measures.widened(found)


def _joined(a: Batch, b: Batch) -> Batch:
    def joined(x: dict[str, Any], y: dict[str, Any], join: Any) -> dict[str, Any]:
        return {**x, **y, **{name: join(x[name], y[name]) for name in x.keys() & y.keys()}}

    return Batch(
        joined(a.own, b.own, measures.add),
        joined(a.accumulated, b.accumulated, measures.add),
        joined(a.ends, b.ends, measures.join),
        [measures.add(x, y) for x, y in zip(a.outputs, b.outputs, strict=True)],
        joined(a.tensors, b.tensors, _joined_fits),
    )


def _joined_fits(a: Clipping, b: Clipping) -> Clipping:
    return Clipping(
        measures.add(a.moments, b.moments),
        a.clipped + b.clipped,
        a.count + b.count,
        a.clipped_noise + b.clipped_noise,
        np.minimum(a.low, b.low),
        np.maximum(a.high, b.high),
    )


def _check_finite(names: Sequence[str], first_bad: jax.Array) -> None:
    for name, batch in zip(names, np.asarray(first_bad), strict=True):
        if batch >= 0:
            raise ValueError(
                f"the tensor {name!r} holds NaN or infinity in batch {batch}; check that batch and "
                "the float model on it"
            )
