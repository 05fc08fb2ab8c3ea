"""Which dots the native kernels have, and that they give what XLA's forms do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.backends.backend import Call
from jaxquant.backends.native import Native, has
from jaxquant.backends.xla import Xla
from jaxquant.graph import contraction
from jaxquant.graph.primitives import Channels
from tests.native.cases import int8_values, needs_kernels

DOTS = {
    "dense": ((40, 6), (6, 5), (((1,), (0,)), ((), ()))),
    "heads": ((8, 5, 6), (6, 3, 4), (((2,), (0,)), ((), ()))),
    "heads together": ((8, 5, 3, 4), (3, 4, 7), (((2, 3), (0, 1)), ((), ()))),
    "one row": ((3, 4), (3, 4, 2, 2), (((0, 1), (0, 1)), ((), ()))),
}
OTHERS = {
    "transposed": ((40, 6), (5, 6), (((1,), (1,)), ((), ()))),
    "first axis": ((6, 40), (6, 5), (((0,), (0,)), ((), ()))),
    "crossed": ((8, 3, 4), (4, 3, 7), (((1, 2), (1, 0)), ((), ()))),
    "experts": ((3, 40, 6), (3, 6, 5), (((2,), (1,)), ((0,), (0,)))),
    "vector": ((40, 6), (6,), (((1,), (0,)), ((), ()))),
    "outer": ((40,), (6,), (((), ()), ((), ()))),
}


def call_of(x: tuple[int, ...], weight: tuple[int, ...], numbers: contraction.DotNumbers) -> Call:
    made = contraction.dot(numbers, (len(x), len(weight)))
    kept = made.operands[1].kept
    places = tuple(place for axis in kept if (place := made.place(1, axis)) is not None)
    shape = jax.eval_shape(
        lambda a, b: jax.lax.dot_general(a, b, numbers), jnp.zeros(x), jnp.zeros(weight)
    ).shape
    channels = Channels(tuple(weight[axis] for axis in kept), places)
    return Call(made, 1, weight, (), channels, shape, zero_point=3, out_zero_point=-7)


@needs_kernels
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", DOTS)
def test_a_dot_of_any_rank_gives_what_xla_gives(name: str, is_packed: bool) -> None:
    x, weight, numbers = DOTS[name]
    call = call_of(x, weight, numbers)
    assert has(call)
    channels = int(np.prod(call.channels.sizes))
    rng = np.random.default_rng(0)
    operands = {
        "x": jnp.asarray(int8_values(0, x)),
        "weight": jnp.asarray(int8_values(1, weight)),
        # Of few bits, so that no step of the epilogue rounds, in one instruction or in two.
        "multiplier": jnp.asarray(2.0 ** rng.integers(-12, -8, channels), jnp.float32),
        "bias": jnp.asarray(rng.integers(-64, 64, channels) / 16, jnp.float32),
        "inv_scale": jnp.float32(9.0),
    }
    want = Xla().call(call, operands)
    if is_packed:
        operands["packed"] = Native().pack(call, operands["weight"])
    got = Native().call(call, operands)
    for ours, theirs, output in zip(got, want, call.outputs, strict=True):
        assert (ours.shape, ours.dtype) == (output.shape, output.dtype)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_of_matrices_is_left_to_xla(name: str) -> None:
    assert not has(call_of(*OTHERS[name]))
