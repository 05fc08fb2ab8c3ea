"""Attention, GELU, softmax and lookups between int8 sites in the forms that suit a TPU.

There a product with int8 is so fast that what lies between two of them decides.  By XLA's estimate
for TPU v5e (`experiments/benchmarks/ahead_of_time.py`), batch 32 of 128 tokens, of two layers of
BERT: the sums of a softmax take a quarter of the time of an attention, since they go along a
register; a GELU by the error function, which XLA writes as two quotients of polynomials, takes
longer than the two int8 products around it; and the two types of tokens, read from a table for each
token, take as long as its largest layer normalization.  Where softmax is a site, and the products
around it too, the compiler overflows its stack on its sums (libtpu 0.0.42.1), but not on products
with ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxquant.backends import int8
from jaxquant.backends.backend import FloatOperation
from jaxquant.graph.attention import Layout
from jaxquant.graph.attention_scores import Addend
from jaxquant.jax_shim import choices, layouts

_Form: TypeAlias = Callable[..., jax.Array]

# Beyond this many numbers a value, a second product of the weights costs more than their sums.
_MOST_PLACES = 256
_MOST_KEYS = 1024  # likewise
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.bool_)  # of the inputs of an attention
_LANES = 128  # values in a row of a register

# erf(x / sqrt 2) is tanh(x * p(x ** 2)) up to 6e-6 / x: a least-squares fit for |x| below 5 that
# was weighted anew until its largest errors were alike.  Beyond it both are one in float32.
_TANH_OF_ERF = (7.97828136e-1, 3.64687902e-2, -1.24861105e-4, -3.05811149e-5, 1.11908860e-6)


def has(operation: FloatOperation) -> bool:
    """True where a TPU has a form of its own for an operation.

    A GELU has one where it is quantized: 8 bits do not tell the forms apart.
    """
    if operation.kind == "gelu":
        return operation.is_int8 and operation.params["approximate"] == "none"
    if operation.kind == "few_rows":
        return True
    if operation.kind == "shares":
        keys = operation.shape[operation.params["axis"]]
        is_short = isinstance(keys, int) and keys <= _MOST_KEYS
        return is_short and operation.inputs[0].dtype == jnp.float32
    if operation.kind != "attention":
        return False
    layout: Layout = operation.params["layout"]
    places = operation.inputs[2].shape[layout.value[-1]]
    is_narrow = isinstance(places, int) and places <= _MOST_PLACES
    ranks = [len(each.shape) for each in operation.inputs]
    beside = (*operation.params["biases"], *operation.params["masks"])
    # `jnp.einsum` needs a letter for every axis, those of size 1 too.
    has_all = (len(layout.query), *(len(each.axes) for each in beside)) == (ranks[0], *ranks[3:])
    return is_narrow and has_all and all(each.dtype in _DTYPES for each in operation.inputs)


def run(operation: FloatOperation, *operands: jax.Array) -> jax.Array:
    """The result of an operation: in the form for a TPU where it is lowered for one."""

    def as_it_is(*operands: jax.Array) -> list[jax.Array]:
        return [_quantized(operation, operation.equations, *operands)]

    if not has(operation):
        return as_it_is(*operands)[0]

    def on_any_tpu(*operands: jax.Array) -> list[jax.Array]:
        given = _MULTIPLES.get(operation.kind, 1.0)
        return [_quantized(operation, _FORMS[operation.kind](operation), *operands, given=given)]

    def on_tpu(*operands: jax.Array) -> list[jax.Array]:
        return [_held(operation, *on_any_tpu(*operands))]

    def pick(place: choices.Place) -> int:
        if place.platform != "tpu":
            return 2
        # A v6e takes longer with values innermost: of a causal transformer 54 thousand cycles.
        return int(place.is_export or "v6" in place.kind)

    forms = (on_tpu, on_any_tpu, as_it_is)
    (result,) = choices.choose(pick, forms, [operation.output], operands)
    return jnp.asarray(result)


def _quantized(
    operation: FloatOperation, form: _Form, *operands: jax.Array, given: float = 1.0
) -> jax.Array:
    """What a form gives, on the grid behind the operands where there is one.

    Args:
      operation: whose form.
      form: of the other operands.
      operands: those, and the grid.
      given: how often the form gives the result; a power of two.
    """
    if not operation.is_int8:
        return form(*operands)
    *others, inv_scale, zero_point = operands
    # A power of two goes into the scale without rounding, and saves a product for each value.
    return int8.quantize(form(*others), inv_scale / jnp.float32(given), zero_point)


def _held(operation: FloatOperation, result: jax.Array) -> jax.Array:
    """The result of an attention, whose places of a value fill registers, with these innermost.

    XLA would have the rows there, as in its sums, and the dot that mixes the heads takes twice the
    time then.
    """
    if operation.kind != "attention":
        return result
    *others, rows, places = operation.params["layout"].result
    if operation.shape[places] % _LANES:
        return result
    return layouts.held_in(result, (*others, rows, places))


def _gelu(operation: FloatOperation) -> _Form:
    """Twice the GELU by the error function, as one hyperbolic tangent: a TPU's own instruction."""

    def form(x: jax.Array, *numbers: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        square = x * x
        # Horner's scheme in x squared: the function is odd, so that one factor of x comes last.
        slope = jnp.float32(_TANH_OF_ERF[-1])
        for coefficient in _TANH_OF_ERF[-2::-1]:
            slope = slope * square + jnp.float32(coefficient)
        return x + x * jnp.tanh(x * slope)

    return form


def _attention(operation: FloatOperation) -> _Form:
    """Attention whose weights are summed by a product with ones, and divided behind the products.

    The sums are then spread over the places of a value as the result is; and what is summed is
    rounded as what is multiplied is.
    """
    # The parameters say what the model does to its scores, in the order in which it does.
    params = operation.params
    axes = _Letters(params["layout"])
    first, second = params["precisions"]
    biases, masks = params["biases"], params["masks"]

    def form(*inputs: jax.Array) -> jax.Array:
        q, k, v, *beside = (x if x.dtype == jnp.bool_ else x.astype(jnp.float32) for x in inputs)
        scores = jnp.einsum(f"{axes.query},{axes.key}->{axes.scores}", q, k, precision=first)
        if params["scale"] != 1:
            scores = scores * jnp.float32(params["scale"])
        for addend, bias in zip(biases, beside[: len(biases)], strict=True):
            scores = scores + axes.like_scores(addend, bias)
        for addend, mask in zip(masks, beside[len(biases) : len(biases) + len(masks)], strict=True):
            kept = axes.like_scores(addend, mask) != addend.negated
            scores = jnp.where(kept, scores, jnp.float32(params["fill"]))

        # Less the largest, so that no exponential overflows.
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        mixing = f"{axes.scores},{axes.value}->{axes.result}"
        # The ones sum the weights in the product's own order: the same rounding above and below.
        mixed = jnp.einsum(mixing, weights, v, precision=second)
        result = mixed / jnp.einsum(mixing, weights, jnp.ones_like(v), precision=second)
        return result.astype(operation.dtype)

    return form


def _few_rows(operation: FloatOperation) -> _Form:
    """Rows of a table chosen one after the other, so that none is read from memory for each."""

    def form(numbers: jax.Array, table: jax.Array) -> jax.Array:
        # From its number on each row replaces those before it, so what is out of range is clipped
        # too.
        rows = jnp.broadcast_to(table[0], operation.shape)
        for number in range(1, table.shape[0]):
            rows = jnp.where(numbers >= number, table[number], rows)
        if operation.params["fills"]:
            is_there = (numbers >= 0) & (numbers < table.shape[0])
            rows = jnp.where(is_there, rows, jnp.asarray(jnp.nan, table.dtype))
        return rows

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
        # Capitals, so that no axis of the batch takes the letter of another one.
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


# How often a form gives the result, where the grid is scaled in place of every value.
_MULTIPLES: Mapping[str, float] = {"gelu": 2.0}
_FORMS: Mapping[str, Callable[[FloatOperation], _Form]] = {
    "attention": _attention,
    "few_rows": _few_rows,
    "gelu": _gelu,
    "shares": _shares,
}
