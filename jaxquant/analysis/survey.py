"""One pass over the data: both models in one compiled step, every site measured in two views."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.analysis import measures
from jaxquant.analysis.measures import Clipping, Ends, Moments
from jaxquant.backends import int8, operations
from jaxquant.calibration import histogram
from jaxquant.calibration.observations import TensorStats
from jaxquant.calibration.sweep import stacked, stats_of
from jaxquant.graph import evaluate, ir
from jaxquant.graph.model import FloatModel
from jaxquant.plan.bind import bind
from jaxquant.plan.epilogue import Epilogue
from jaxquant.plan.plan import Plan
from jaxquant.progress import Progress
from jaxquant.recover.activation import find_activation
from jaxquant.run.float_forms import evaluate_float
from jaxquant.run.program import Program, program_by_site
from jaxquant.run.quantized import QuantizedTensors
from jaxquant.tune.biases import has_bias, shift_at, without_correction
from jaxquant.tune.parts import Part, Value, evaluate_parts, find_parts


class Surveyed(NamedTuple):
    """What a pass over the data tells; host data.

    Attributes:
      own: site -> moments of its output, its inputs those of the float model.
      accumulated: site -> likewise, both models run whole.
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
    progress: Progress,
) -> Surveyed:
    """Measure all sites on all batches.

    A site's own error is that with the bias correction which it would have behind the float model.

    Raises:
      ValueError: a batch gives another graph than the one that was quantized, or a tensor holds
        NaN or infinity.
    """

    @jax.jit
    def step(
        params: Any, qparams: Any, plain: Any, *inputs: Any
    ) -> tuple[_Batch, histogram.Counts | None]:
        program = program_by_site(bind(source.trace(inputs), plan), params)
        flat = jax.tree.leaves(inputs)
        found, reference = _measure(program, params, qparams, plain, flat)
        tensors, seen = _observe(program, qparams, reference)
        own, accumulated, ends, outputs = found
        return _Batch(own, accumulated, ends, outputs, tensors), seen

    params = source.params
    names: list[str] = []
    stats = stacked([histogram.init()])
    total: _Batch | None = None
    ranges: list[dict[str, Any]] = []
    plain: Any = None
    for index, inputs in enumerate(batches):
        if plain is None:
            with progress.stage("tracing"):
                program = program_by_site(bind(source.trace(inputs), plan), params)
                plain = without_correction(program, params, qparams)
                names = [tensor.name for tensor in program.plan.tensors]
                stats = stacked([histogram.init()] * max(len(names), 1))
        with progress.stage("compiling") if index == 0 else contextlib.nullcontext():
            found, seen = step(params, qparams, plain, *inputs)
            found = measures.widened(found)
            if seen is not None:
                stats, first_bad = histogram.fold(stats, seen, np.int32(index))
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
                low=np.array([b[name][0] for b in ranges]),
                high=np.array([b[name][1] for b in ranges]),
            )
            for name, tensor in total.tensors.items()
        },
        stats={
            name: stats_of(jax.tree.map(lambda x, k=k: x[k], stats)) for k, name in enumerate(names)
        },
        outputs=functools.reduce(measures.add, total.outputs) if total.outputs else None,
        batches=len(ranges),
    )


def _measure(
    program: Program, params: Any, qparams: Any, plain: Any, flat: list[Any]
) -> tuple[tuple[Any, ...], evaluate.Environment]:
    """The first fields of a `_Batch`, and the float model's values."""
    graph = program.graph
    parts = find_parts(program)
    reference = evaluate_float(graph, params, flat)
    own: dict[str, Moments] = {}
    ends: dict[str, Ends] = {}

    def observe(part: Part, as_float: Value, as_int8: Value) -> Any:
        wanted = as_float()
        if part.name and _is_float(wanted[0]):
            got = as_int8()[0]
            if has_bias(program, part):
                got = shift_at(part, reference, got)[1]
            own[part.name] = measures.moments(wanted[0], got)
            if part.site is not None and part.site.epilogue.channels.axes:
                ends[part.name] = _ends(part.site.epilogue, got, reference)
        return wanted

    evaluate_parts(program, parts, params, plain, flat, observe)
    quantized = program.run(qparams, flat)
    accumulated = {
        part.name: measures.moments(reference.read(var), quantized.wide(var))
        for part in parts
        if part.name in own and (var := part.end.outputs[0]) in quantized
    }
    outputs = [
        measures.moments(jnp.asarray(reference.read(x)), jnp.asarray(quantized.read(x)))
        for x in graph.outputs
        if jnp.issubdtype(graph.dtype(x), jnp.floating)
    ]
    return (own, accumulated, ends, outputs), reference


def _ends(epilogue: Epilogue, value: jax.Array, reference: evaluate.Environment) -> Ends:
    activation = find_activation(reference.graph, epilogue.output)
    pair = (reference.wide(activation.end), activation.of(value, reference))
    reduce = epilogue.channels.reduce
    return Ends(*(reduce(f, x.astype(jnp.float32)) for x in pair for f in (jnp.min, jnp.max)))


def _observe(
    program: Program, qparams: Any, reference: evaluate.Environment
) -> tuple[dict[str, Clipping], histogram.Counts | None]:
    """How the tensors fit their grids, and their values counted; None where there are none."""
    readers = QuantizedTensors(reference, program.binding, qparams["tensors"], {})
    entries = {name: var for var, name in program.binding.names.items()}
    order = [tensor.name for tensor in program.plan.tensors]
    tensors = {name: _clipping(readers, entries[name], reference) for name in order}
    if not order:
        return tensors, None
    count = operations.counter(histogram.portable_counts, histogram.MIN_EXPONENT)
    values = [reference.read(entries[name]) for name in order]
    return tensors, histogram.count_all(values, count)


def _clipping(readers: QuantizedTensors, var: ir.Var, reference: evaluate.Environment) -> Clipping:
    x = reference.wide(var).astype(jnp.float32)
    zero_point = readers.zero_point(var)
    rounded = int8.dequantize(readers.int8(var), readers.scale(var), zero_point)
    place = x * readers.inv_scale(var) + jnp.float32(zero_point)
    outside = (place > 127.5) | (place < -128.5)
    moments = measures.moments(x, rounded)
    off = (x - rounded) * (1 / moments.unit)
    return Clipping(
        moments=moments,
        clipped=jnp.sum(outside.astype(jnp.float32)),
        count=jnp.float32(x.size),
        clipped_noise=jnp.sum(jnp.where(outside, off**2, 0)),
        low=jnp.min(x, initial=jnp.inf),
        high=jnp.max(x, initial=-jnp.inf),
    )


def _joined(a: _Batch, b: _Batch) -> _Batch:
    def moments(x: dict[str, Moments], y: dict[str, Moments]) -> dict[str, Moments]:
        return {name: measures.add(x[name], y[name]) for name in x}

    tensors = {
        name: Clipping(
            measures.add(x.moments, b.tensors[name].moments),
            x.clipped + b.tensors[name].clipped,
            x.count + b.tensors[name].count,
            x.clipped_noise + b.tensors[name].clipped_noise,
            np.minimum(x.low, b.tensors[name].low),
            np.maximum(x.high, b.tensors[name].high),
        )
        for name, x in a.tensors.items()
    }
    outputs = [measures.add(x, y) for x, y in zip(a.outputs, b.outputs, strict=True)]
    return _Batch(
        moments(a.own, b.own),
        moments(a.accumulated, b.accumulated),
        {name: measures.join(x, b.ends[name]) for name, x in a.ends.items()},
        outputs,
        tensors,
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
