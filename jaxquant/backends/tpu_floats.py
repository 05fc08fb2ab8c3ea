"""Attention, GELU and softmax between int8 sites in the forms that a TPU computes fastest.

There a product with int8 is so fast that what lies between two of them decides.  By XLA's estimate
for TPU v5e (`experiments/benchmarks/ahead_of_time.py`), batch 32 of 128 tokens, of two layers of
BERT: the sums of a softmax take a quarter of the time of an attention, since they go along a
register; and a GELU by the error function, which XLA writes as two quotients of polynomials, takes
longer than the two int8 products around it.  Where softmax is a site, and the products around it
too, the compiler overflows its stack on its sums (libtpu 0.0.42.1), but not on products with ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxquant.backends import int8
from jaxquant.backends.backend import FloatOperation
from jaxquant.graph.attention import Addend, Layout
from jaxquant.jax_shim import choices

_Form: TypeAlias = Callable[..., jax.Array]

# Beyond this many numbers a value, a second product of the weights costs more than their sums.
_MOST_PLACES = 256
_MOST_KEYS = 1024  # likewise

# With |x| below 5, erf(x / sqrt 2) is tanh(x * p(x ** 2)) up to 3e-6 / x: a least-squares fit that
# was weighted anew until its largest errors were alike.  Beyond it both are one in float32.
_TANH_OF_ERF = (7.97828136e-1, 3.64687902e-2, -1.24861105e-4, -3.05811149e-5, 1.11908860e-6)
_FARTHEST = 5.0


def has(operation: FloatOperation) -> bool:
    """True where a TPU has a form of its own for an operation.

    A GELU has one where it is quantized: 8 bits do not tell the forms apart.
    """
    if operation.kind == "gelu":
        return operation.is_int8 and operation.params["approximate"] == "none"
    if operation.kind == "shares":
        keys = operation.shape[operation.params["axis"]]
        is_short = isinstance(keys, int) and keys <= _MOST_KEYS
        return is_short and operation.inputs[0].dtype == jnp.float32
    if operation.kind != "attention":
        return False
    layout: Layout = operation.params["layout"]
    places = operation.inputs[2].shape[layout.value[-1]]
    is_narrow = isinstance(places, int) and places <= _MOST_PLACES
    return is_narrow and all(each.dtype in (jnp.float32, jnp.bool_) for each in operation.inputs)


def run(operation: FloatOperation, *operands: jax.Array) -> jax.Array:
    """The result of an operation: in the form for a TPU where it is lowered for one."""

    def as_it_is(*operands: jax.Array) -> list[jax.Array]:
        return [_quantized(operation, operation.equations, *operands)]

    if not has(operation):
        return as_it_is(*operands)[0]

    def on_tpu(*operands: jax.Array) -> list[jax.Array]:
        return [_quantized(operation, _FORMS[operation.kind](operation), *operands)]

    def pick(place: choices.Place) -> int:
        return int(place.platform != "tpu")

    (result,) = choices.choose(pick, (on_tpu, as_it_is), [operation.output], operands)
    return jnp.asarray(result)


def _quantized(operation: FloatOperation, form: _Form, *operands: jax.Array) -> jax.Array:
    """What a form gives, on the grid behind the operands where there is one."""
    if not operation.is_int8:
        return form(*operands)
    *others, inv_scale, zero_point = operands
    return int8.quantize(form(*others), inv_scale, zero_point)


def _gelu(operation: FloatOperation) -> _Form:
    """GELU by the error function as one hyperbolic tangent, which a TPU has an instruction for."""

    def form(x: jax.Array, *numbers: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        square = jnp.minimum(x * x, jnp.float32(_FARTHEST**2))
        slope = jnp.float32(_TANH_OF_ERF[-1])
        for coefficient in _TANH_OF_ERF[-2::-1]:
            slope = slope * square + jnp.float32(coefficient)
        half = jnp.float32(0.5)
        return x * (half + half * jnp.tanh(x * slope))

    return form


def _attention(operation: FloatOperation) -> _Form:
    """Attention whose weights are summed by a product with ones, and divided behind the products.

    The sums are then spread over the places of a value as the result is; and what is summed is
    rounded as what is multiplied is.
    """
    params = operation.params
    axes = _Letters(params["layout"])
    first, second = params["precisions"]
    biases, masks = params["biases"], params["masks"]

    def form(q: jax.Array, k: jax.Array, v: jax.Array, *beside: jax.Array) -> jax.Array:
        scores = jnp.einsum(f"{axes.query},{axes.key}->{axes.scores}", q, k, precision=first)
        if params["scale"] != 1:
            scores = scores * jnp.float32(params["scale"])
        for addend, bias in zip(biases, beside[: len(biases)], strict=True):
            scores = scores + axes.like_scores(addend, bias)
        for addend, mask in zip(masks, beside[len(biases) : len(biases) + len(masks)], strict=True):
            kept = axes.like_scores(addend, mask) != addend.negated
            scores = jnp.where(kept, scores, jnp.float32(params["fill"]))

        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        mixing = f"{axes.scores},{axes.value}->{axes.result}"
        mixed = jnp.einsum(mixing, weights, v, precision=second)
        return mixed / jnp.einsum(mixing, weights, jnp.ones_like(v), precision=second)

    return form


def _shares(operation: FloatOperation) -> _Form:
    """Exponentials divided by their sums, which a product with ones gives each of them.

    In three passes, since what they are divided into is not rounded.
    """
    axis = operation.params["axis"]

    def form(x: jax.Array, *numbers: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, axis, -1)
        ones = jnp.ones((x.shape[-1], x.shape[-1]), x.dtype)
        sums = jnp.einsum("...k,kl->...l", x, ones, precision=jax.lax.Precision.HIGH)
        return jnp.moveaxis(x / sums, -1, axis)

    return form


class _Letters:
    """The axes of the tensors of an attention as `jnp.einsum` takes them.

    The scores have those of the batch, then the rows, then the keys.
    """

    def __init__(self, layout: Layout) -> None:
        batch = [chr(ord("A") + k) for k in range(len(layout.query) - 2)]
        self._batch = batch
        self.scores = "".join([*batch, "r", "k"])
        self.query = _subscript(layout.query, [*batch, "r", "d"])
        self.key = _subscript(layout.key, [*batch, "k", "d"])
        self.value = _subscript(layout.value, [*batch, "k", "v"])
        self.result = _subscript(layout.result, [*batch, "r", "v"])

    def like_scores(self, addend: Addend, value: jax.Array) -> jax.Array:
        """A tensor beside the scores with its axes in their order."""
        own = _subscript(addend.axes, [*self._batch, "k", "r"])
        return value.transpose([own.index(letter) for letter in self.scores])


def _subscript(positions: tuple[int | None, ...], letters: list[str]) -> str:
    """The letters in the order of a tensor's axes, of where each of them is; None: nowhere."""
    found = {at: letter for at, letter in zip(positions, letters, strict=True) if at is not None}
    return "".join(found[axis] for axis in sorted(found))


_FORMS: Mapping[str, Callable[[FloatOperation], _Form]] = {
    "attention": _attention,
    "gelu": _gelu,
    "shares": _shares,
}
