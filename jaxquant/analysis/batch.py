"""What one batch shows of every site: its own error, and what has gathered up to it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.analysis import measures
from jaxquant.analysis.measures import Clipping, Ends, Moments
from jaxquant.backends import int8
from jaxquant.graph import evaluate, ir
from jaxquant.graph.positions import RealIn
from jaxquant.jax_shim.extremes import largest, least
from jaxquant.plan import layout
from jaxquant.plan.epilogue import Epilogue
from jaxquant.recover.activation import find_activation
from jaxquant.recover.shift import Shift, without_padding
from jaxquant.run.float_forms import evaluate_float
from jaxquant.run.program import Program
from jaxquant.run.quantized import QuantizedTensors
from jaxquant.tune.biases import has_bias, is_corrected, shift_at
from jaxquant.tune.evaluation import Here, Outcome, Value, evaluate_parts
from jaxquant.tune.parts import Part, Parts


class Batch(NamedTuple):
    own: dict[str, Moments]
    accumulated: dict[str, Moments]
    ends: dict[str, Ends]
    outputs: list[Moments]
    tensors: dict[str, Clipping]


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


def measure(
    parts: Parts, params: Any, qparams: Any, plain: Any, flat: list[Any], real: RealIn
) -> Batch:
    """Measure a batch in two views: each site by itself, and both models run whole.

    Args:
      parts: of the int8 model.
      params: of the float model.
      qparams: of the int8 model.
      plain: the same without corrected biases.
      flat: the flattened inputs.
      real: gives which entries of a tensor belong to no padding.
    """
    graph, model = parts.program.graph, parts.program.model
    reference = evaluate_float(graph, params, flat)

    # Own errors are those with a bias that fits float inputs, as the report has them too.
    if is_corrected(parts.program.whole_plan):
        shift = functools.partial(_shift, real)
        shifts = evaluate_parts(parts, params, plain, flat, shift, reference)[1].of
        plain = _with_means(plain, shifts)
    alone, fits = functools.partial(_measure_alone, real), functools.partial(_fits, real)
    own = evaluate_parts(parts, params, plain, flat, alone, reference, fits)[1].of

    accumulating = functools.partial(_measure_accumulated, real)
    # Between the sites too what runs is the quantized model: its biases are not the float one's.
    changed = _changed(parts.program, params, qparams["params"])
    quantized, accumulated = evaluate_parts(parts, changed, qparams, flat, accumulating, reference)
    outputs = [
        # Only floats have an error; integers of the int8 model are those of the float model.
        measures.moments(
            without_padding(reference.read(x), real(model, x)), jnp.asarray(quantized.read(x))
        )
        for x in graph.outputs
        if jnp.issubdtype(graph.dtype(x), jnp.floating)
    ]
    return Batch(
        own={name: each.own for name, each in own.items() if isinstance(each, _Alone)},
        accumulated=accumulated.of,
        ends={n: each.ends for n, each in own.items() if isinstance(each, _Alone) and each.ends},
        outputs=outputs,
        tensors={n.removeprefix(_TENSOR): x for n, x in own.items() if isinstance(x, Clipping)},
    )


def _changed(program: Program, params: Any, arrays: Any) -> list[Any]:
    """The float model's leaves, those that the quantized model keeps as they are there."""
    leaves = dict(zip(program.graph.leaves, jax.tree.leaves(params), strict=True))
    kept = {var: layout.get(arrays, path) for var, path in program.float_paths.items()}
    return list({**leaves, **kept}.values())


def _shift(real: RealIn, here: Here, part: Part, as_float: Value, as_int8: Value) -> Outcome:
    """How far a part is off behind float inputs; the float values go on."""
    if not has_bias(here.program, part):
        return Outcome(as_float())
    own = functools.partial(real, here.program.model)
    return Outcome(as_float(), shift_at(part, here.in_float, as_int8()[0], own)[0])


def _measure_alone(
    real: RealIn, here: Here, part: Part, as_float: Value, as_int8: Value
) -> Outcome:
    """The own error of a part, its inputs those of the float model; the float values go on."""
    wanted = as_float()
    # Its float values go on, so that the next site's inputs are those of the float model.
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
    return Outcome(wanted, _Alone(_moments(real, here, part, wanted[0], got), ends))


def _measure_accumulated(
    real: RealIn, here: Here, part: Part, as_float: Value, as_int8: Value
) -> Outcome:
    """What has gathered up to a part; the int8 values go on."""
    got = as_int8()
    wanted = here.in_float.wide(part.end.outputs[0])
    if not (part.name and _is_float(wanted)):
        return Outcome(got)
    return Outcome(got, _moments(real, here, part, wanted, got[0]))


def _moments(real: RealIn, here: Here, part: Part, wanted: Any, got: jax.Array) -> Moments:
    """The moments of a part's result but for what belongs to padding."""
    counted = without_padding(wanted, real(here.program.model, part.end.outputs[0]))
    return measures.moments(counted, got)


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
    # Behind the activation: a channel that a ReLU makes zero everywhere is dead to all readers.
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
    # Squared in the moments' unit, as the noise that it is a part of.
    off = (x - rounded) * (1 / moments.unit)
    return Clipping(
        moments=moments,
        clipped=jnp.sum(outside.astype(jnp.float32)),
        count=jnp.asarray(count, jnp.float32),
        clipped_noise=jnp.sum(jnp.where(outside, off**2, 0)),
        low=least(_filled(x, real, _MOST), initial=jnp.inf),
        high=largest(_filled(x, real, -_MOST), initial=-jnp.inf),
    )


def _is_float(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))
