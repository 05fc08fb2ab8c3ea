"""What is read at every second position alone is computed there alone, with the same results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.backends.platforms import KERNELS_ALWAYS, XLA_ALONE
from jaxquant.graph.model import trace_model
from jaxquant.plan.bind import bind
from jaxquant.plan.binding import Binding
from jaxquant.run import program
from jaxquant.run.program import Program
from tests.native.cases import needs_kernels

pytestmark = [pytest.mark.optimized, needs_kernels]

X = np.random.default_rng(0).normal(size=(3, 13, 12, 8)).astype(np.float32)
SHAPES = {
    "narrow": (1, 1, 8, 8), "middle": (3, 3, 8, 8),
    "wide": (1, 1, 8, 16), "shortcut": (1, 1, 8, 16),
    "next": (1, 1, 16, 8), "other": (1, 1, 16, 16), "large": (3, 3, 16, 8),
}  # fmt: skip
PARAMS = {
    name: np.random.default_rng(k).normal(size=shape).astype(np.float32) / 4
    for k, (name, shape) in enumerate(SHAPES.items())
}


def conv(p: Any, name: str, x: jax.Array, stride: int = 1, layout: str = "NHWC") -> jax.Array:
    return lax.conv_general_dilated(
        x, p[name], (stride, stride), "SAME", dimension_numbers=(layout, "HWIO", layout)
    )


def block(p: Any, x: jax.Array, layout: str = "NHWC") -> jax.Array:
    """What a stage ends with: three convolutions and an addition."""
    inner = jax.nn.relu(conv(p, "narrow", x, layout=layout))
    inner = jax.nn.relu(conv(p, "middle", inner, layout=layout))
    shortcut = conv(p, "shortcut", x, layout=layout)
    return jax.nn.relu(conv(p, "wide", inner, layout=layout) + shortcut)


def stage(p: Any, x: jax.Array) -> jax.Array:
    x = block(p, x)
    return conv(p, "next", x, 2).sum(3, keepdims=True) + conv(p, "other", x, 2)


def channels_first(p: Any, x: jax.Array) -> jax.Array:
    x = block(p, x.transpose(0, 3, 1, 2), "NCHW")
    return conv(p, "other", x, 2, "NCHW")


def two_after_each_other(p: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(p, "wide", jax.nn.relu(conv(p, "middle", x)), 3))
    return conv(p, "other", x, 2)


def read_as_a_whole(p: Any, x: jax.Array) -> jax.Array:
    x = block(p, x)
    return conv(p, "next", x, 2) + x.mean((1, 2), keepdims=True)[..., :8]


def with_another_stride(p: Any, x: jax.Array) -> jax.Array:
    x = block(p, x)
    return conv(p, "next", x, 2).sum() + conv(p, "other", x, 3).sum()


def with_a_window(p: Any, x: jax.Array) -> jax.Array:
    return conv(p, "large", block(p, x), 2)


def added_again(p: Any, x: jax.Array) -> jax.Array:
    x = block(p, x)
    return jax.nn.relu(conv(p, "other", x) + x)


WHOLE = (read_as_a_whole, with_another_stride, with_a_window, added_again)
THINNED = ((stage, False), (stage, True), (channels_first, False), (two_after_each_other, False))


@functools.cache
def quantized(apply_fn: Callable[..., Any], is_full: bool) -> tuple[Any, Binding]:
    qparams, qapply = jaxquant.quant_post(
        PARAMS, apply_fn, [X], is_full_quantize=is_full, recover=(), progress=False
    )
    return qparams, bind(trace_model(apply_fn, PARAMS, (X,)), qapply.plan)


def strides(found: Program) -> dict[str, tuple[int, ...]]:
    windows = {name: each.call.contraction.window for name, each in found.calls.items()}
    return {name: window.strides for name, window in windows.items() if window is not None}


def whole(binding: Binding, table: Any) -> Program:
    """The program that computes every position."""
    with mock.patch.object(program, "thinned", lambda graph, calls: calls):
        return Program(binding, PARAMS, table)


@pytest.mark.parametrize("table", [XLA_ALONE, KERNELS_ALWAYS], ids=["xla", "kernels"])
@pytest.mark.parametrize(("apply_fn", "is_full"), THINNED)
def test_same_results(apply_fn: Callable[..., Any], table: Any, is_full: bool):
    qparams, binding = quantized(apply_fn, is_full)
    # As where there is a device: there calls of XLA's hold what follows a site too.
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        both = Program(binding, PARAMS, table), whole(binding, table)
    assert strides(both[0]) != strides(both[1])
    results = [jax.jit(each.outputs)(qparams, [jnp.asarray(X)]) for each in both]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("is_full", [False, True])
def test_the_end_of_a_stage_has_its_strides(is_full: bool):
    _, binding = quantized(stage, is_full)
    wanted = dict.fromkeys(("narrow", "shortcut", "wide", "next", "other"), (1, 1))
    assert strides(Program(binding, PARAMS, KERNELS_ALWAYS)) == {**wanted, "middle": (2, 2)}


def test_strides_of_calls_in_a_row_multiply():
    _, binding = quantized(two_after_each_other, False)
    found = strides(Program(binding, PARAMS, KERNELS_ALWAYS))
    assert found == {"middle": (6, 6), "wide": (1, 1), "other": (1, 1)}


@pytest.mark.parametrize("apply_fn", WHOLE)
def test_what_others_read_is_whole(apply_fn: Callable[..., Any]):
    _, binding = quantized(apply_fn, False)
    table = KERNELS_ALWAYS
    assert strides(Program(binding, PARAMS, table)) == strides(whole(binding, table))
