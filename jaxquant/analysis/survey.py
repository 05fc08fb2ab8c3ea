"""One pass over the data: both models in one compiled step, every site measured in two views."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.analysis import measures
from jaxquant.analysis.measures import Clipping, Ends, Moments
from jaxquant.backends import int8, operations
from jaxquant.calibration import counting, histogram, inside
from jaxquant.calibration.observations import TensorStats
from jaxquant.calibration.observed import Observed
from jaxquant.calibration.padding import Padding, real_in
from jaxquant.calibration.sweep import stacked, stats_of
from jaxquant.graph import evaluate, ir
from jaxquant.graph.layer_names import of_layer
from jaxquant.graph.model import FloatModel
from jaxquant.graph.positions import RealIn
from jaxquant.jax_shim.extremes import largest, least
from jaxquant.plan.bind import bind
from jaxquant.plan.binding import Binding
from jaxquant.plan.epilogue import Epilogue
from jaxquant.plan.plan import Plan
from jaxquant.progress import Progress
from jaxquant.recover.activation import find_activation
from jaxquant.recover.shift import Shift, without_padding
from jaxquant.run.float_forms import evaluate_float, fast_convolutions
from jaxquant.run.program import program_by_site
from jaxquant.run.quantized import QuantizedTensors
from jaxquant.tune.biases import has_bias, is_corrected, shift_at, without_correction
from jaxquant.tune.parts import Here, Outcome, Part, Parts, Value, evaluate_parts, find_parts


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


class _Batch(NamedTuple):
    own: dict[str, Moments]
    accumulated: dict[str, Moments]
    ends: dict[str, Ends]
    outputs: list[Moments]
    tensors: dict[str, Clipping]


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

    @jax.jit
    def step(
        params: Any, qparams: Any, plain: Any, *inputs: Any
    ) -> tuple[_Batch, counting.Counts | None]:
        program = program_by_site(bind(source.trace(inputs), plan), params)
        flat = jax.tree.leaves(inputs)
        real = real_in(padding, program.model, inputs)
        found = _measure(find_parts(program), params, qparams, plain, flat, real)
        return found, _count(program.binding, params, flat, real)

    params = source.params
    names: Sequence[str] = ()
    stats = stacked([histogram.init()])
    total: _Batch | None = None
    ranges: list[dict[str, Any]] = []
    plain: Any = None
    scans: dict[str, tuple[int, ...]] = {}
    # Ranges are kept batch by batch (they show drift), all else is summed as it comes.
    for index, inputs in enumerate(batches):
        if padding is not None:
            padding.check(inputs, index)
        if plain is None:
            with progress.stage("tracing"):
                program = program_by_site(bind(source.trace(inputs), plan), params)
                plain = without_correction(program, params, qparams)
                scans = _scans_around(find_parts(program))
                names = _observed(program.binding).names
                stats = stacked([histogram.init()] * max(len(names), 1))
        with progress.stage("compiling") if index == 0 else contextlib.nullcontext():
            found, seen = step(params, qparams, plain, *inputs)
            found = _by_layer(jax.device_get(found), scans)
            if seen is not None:
                stats, first_bad = counting.fold(stats, seen, np.int32(index))
                _check_finite(names, first_bad)
        ranges.append({name: (t.low, t.high) for name, t in found.tensors.items()})
        total = found if total is None else _joined(total, found)
    assert total is not None  # an empty data set is refused where it is read
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


class _Alone(NamedTuple):
    """A site whose inputs are those of the float model; see `Surveyed`."""

    own: Moments
    ends: Ends | None

    def plus(self, other: _Alone) -> _Alone:
        """What was seen in two steps together."""
        ends = self.ends if self.ends is None or other.ends is None else self.ends.plus(other.ends)
        return _Alone(self.own.plus(other.own), ends)

    def nothing(self) -> _Alone:
        """What is seen in no step."""
        return _Alone(self.own.nothing(), None if self.ends is None else self.ends.nothing())


_MOST = float(jnp.finfo(jnp.float32).max)  # infinity would be reported as bad
_TENSOR = "tensor:"  # before the names of tensors among what was seen of sites


def _measure(
    parts: Parts, params: Any, qparams: Any, plain: Any, flat: list[Any], real: RealIn
) -> _Batch:
    graph, model = parts.program.graph, parts.program.model
    reference = evaluate_float(graph, params, flat)

    def counted(here: Here, var: ir.Var, value: Any) -> jax.Array:
        return without_padding(value, real(here.program.model, var))

    def shift(here: Here, part: Part, as_float: Value, as_int8: Value) -> Outcome:
        if not has_bias(here.program, part):
            return Outcome(as_float())
        own = functools.partial(real, here.program.model)
        return Outcome(as_float(), shift_at(part, here.in_float, as_int8()[0], own)[0])

    def alone(here: Here, part: Part, as_float: Value, as_int8: Value) -> Outcome:
        wanted = as_float()
        if not part.name or not _is_float(wanted[0]):
            return Outcome(wanted)
        got, ends = as_int8()[0], None
        if part.site is not None:
            epilogue = part.site.epilogue
            if has_bias(here.program, part):
                # With the mean taken away that its corrected bias would take.
                off = here.qparams["sites"][part.name]["shift"]
                got = got + epilogue.channels.spread(off, got.ndim)
            if epilogue.channels.axes:
                is_real = real(here.program.model, epilogue.output)
                ends = _ends(epilogue, got, here.in_float, is_real)
        seen = measures.moments(counted(here, part.end.outputs[0], wanted[0]), got)
        return Outcome(wanted, _Alone(seen, ends))

    def whole(here: Here, part: Part, as_float: Value, as_int8: Value) -> Outcome:
        got = as_int8()
        wanted = here.in_float.wide(part.end.outputs[0])
        if not (part.name and _is_float(wanted)):
            return Outcome(got)
        return Outcome(got, measures.moments(counted(here, part.end.outputs[0], wanted), got[0]))

    # Own errors are those with a bias that fits float inputs, as the report has them too.
    if is_corrected(parts.program.whole_plan):
        shifts = evaluate_parts(parts, params, plain, flat, shift, reference)[1].of
        plain = _with_means(plain, shifts)
    fits = functools.partial(_fits, real)
    own = evaluate_parts(parts, params, plain, flat, alone, reference, fits)[1].of
    quantized, accumulated = evaluate_parts(parts, params, qparams, flat, whole, reference)
    outputs = [
        measures.moments(
            without_padding(reference.read(x), real(model, x)), jnp.asarray(quantized.read(x))
        )
        for x in graph.outputs
        if jnp.issubdtype(graph.dtype(x), jnp.floating)
    ]
    return _Batch(
        own={name: each.own for name, each in own.items() if isinstance(each, _Alone)},
        accumulated=accumulated.of,
        ends={n: each.ends for n, each in own.items() if isinstance(each, _Alone) and each.ends},
        outputs=outputs,
        tensors={n.removeprefix(_TENSOR): x for n, x in own.items() if isinstance(x, Clipping)},
    )


def _with_means(plain: Any, shifts: Mapping[str, Shift]) -> dict[str, Any]:
    """The arrays of an int8 model, its sites with the mean "shift" that is to be taken away."""
    sites = dict(plain["sites"])
    for name, shift in shifts.items():
        sites[name] = {**sites[name], "shift": shift.mean()}
    return {**plain, "sites": sites}


def _ends(
    epilogue: Epilogue,
    value: jax.Array,
    reference: evaluate.Environment,
    real: jax.Array | None,
) -> Ends:
    activation = find_activation(reference.graph, epilogue.output)
    pair = (reference.wide(activation.end), activation.of(value, reference))
    reduce = epilogue.channels.reduce
    return Ends(
        *(
            reduce(f, _filled(x.astype(jnp.float32), real, most))
            for x in pair
            for f, most in ((least, _MOST), (largest, -_MOST))
        )
    )


def _filled(x: jax.Array, real: jax.Array | None, value: Any) -> jax.Array:
    """A tensor with a value where padding is."""
    return x if real is None else jnp.where(real, x, value)


def _fits(real: RealIn, here: Here) -> dict[str, Clipping]:
    """How the tensors of a graph fit their grids."""
    reference, program = here.in_float, here.program
    readers = QuantizedTensors(
        reference, program.binding, here.qparams["tensors"], {}, varies=program.body.varies
    )
    return {
        f"{_TENSOR}{name}": _clipping(readers, var, reference, real(program.model, var))
        for var, name in program.binding.names.items()
    }


def _clipping(
    readers: QuantizedTensors,
    var: ir.Var,
    reference: evaluate.Environment,
    real: jax.Array | None,
) -> Clipping:
    x = reference.wide(var).astype(jnp.float32)
    zero_point = readers.zero_point(var)
    rounded = int8.dequantize(readers.int8(var), readers.scale(var), zero_point)
    # In steps of the grid: half a step beyond its ends is clipped, not rounded.
    place = x * readers.inv_scale(var) + jnp.asarray(zero_point, jnp.float32)
    outside = _filled((place > 127.5) | (place < -128.5), real, False)
    count = x.size if real is None else jnp.sum(jnp.broadcast_to(real, x.shape))
    moments = measures.moments(without_padding(x, real), rounded)
    off = (x - rounded) * (1 / moments.unit)
    return Clipping(
        moments=moments,
        clipped=jnp.sum(outside.astype(jnp.float32)),
        count=jnp.asarray(count, jnp.float32),
        clipped_noise=jnp.sum(jnp.where(outside, off**2, 0)),
        low=least(_filled(x, real, _MOST), initial=jnp.inf),
        high=largest(_filled(x, real, -_MOST), initial=-jnp.inf),
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


def _by_layer(batch: _Batch, scans: Mapping[str, tuple[int, ...]]) -> _Batch:
    """What one batch tells, in float64, of each layer by itself; without what no step showed."""

    def layers(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, each in found.items():
            for layer in np.ndindex(scans[name]):
                one = jax.tree.map(lambda x, layer=layer: np.asarray(x)[layer], each)
                yield of_layer(name, layer), one

    # A branch that no sample took has nothing to tell.
    own = {name: each for name, each in layers(batch.own) if each.was_seen}
    found = _Batch(
        own,
        {name: each for name, each in layers(batch.accumulated) if name in own},
        {name: each for name, each in layers(batch.ends) if name in own},
        batch.outputs,
        {name: each for name, each in layers(batch.tensors) if each.moments.was_seen},
    )
    return measures.widened(found)


def _joined(a: _Batch, b: _Batch) -> _Batch:
    def joined(x: dict[str, Any], y: dict[str, Any], join: Any) -> dict[str, Any]:
        return {**x, **y, **{name: join(x[name], y[name]) for name in x.keys() & y.keys()}}

    return _Batch(
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


def _is_float(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))
