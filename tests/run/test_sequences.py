"""Which fused calls run as one, and that nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.backends.platforms import PLATFORMS, XLA_ALONE
from jaxquant.graph.model import trace_model
from jaxquant.plan.bind import bind
from jaxquant.run.program import Program
from tests.native.cases import needs_kernels

pytestmark = [pytest.mark.optimized, needs_kernels]

NHWC = ("NHWC", "HWIO", "NHWC")
X = np.random.default_rng(0).normal(size=(5, 12, 12, 8)).astype(np.float32)
PARAMS = {
    name: np.random.default_rng(k).normal(size=shape).astype(np.float32) / 9
    for k, (name, shape) in enumerate(
        {"a": (3, 3, 8, 16), "b": (1, 1, 16, 16), "c": (3, 3, 1, 16), "d": (3, 3, 16, 16),
         "wide": (1, 1, 16, 32)}.items()
    )
}  # fmt: skip


def conv(p: Any, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    kernel = p[name]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=NHWC,
        feature_group_count=16 // kernel.shape[2] if kernel.shape[2] == 1 else 1,
    )  # fmt: skip


def residual(p: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(p, "a", x))
    for name in ("b", "d"):
        x = jax.nn.relu(x + conv(p, name, jax.nn.relu6(conv(p, "c", x))))
    return x.mean((1, 2))


def ends_at_another_operation(p: Any, x: jax.Array) -> jax.Array:
    x = conv(p, "b", jax.nn.relu(conv(p, "a", x)))
    x = jax.nn.gelu(x)
    return conv(p, "d", jax.nn.relu(conv(p, "b", x)))


def reads_inside_results(p: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    first = jax.nn.relu(conv(p, "a", x))
    second = jax.nn.relu(conv(p, "b", first))
    third = conv(p, "d", second, stride=2)
    return third, jnp.tanh(second), first.sum((1, 2))


def has_work_between(p: Any, x: jax.Array) -> jax.Array:
    """What lies between two of them in the program and depends on one, or on none."""
    first = jax.nn.relu(conv(p, "a", x))
    before = jnp.tanh(x).mean((1, 2, 3))
    behind = jnp.tanh(first).mean((1, 2, 3))
    second = conv(p, "d", jax.nn.relu(conv(p, "b", first)))
    return second.mean((1, 2, 3)) + before + behind


def joins_again(p: Any, x: jax.Array) -> jax.Array:
    """The last one reads the first by another operation: it cannot run with them."""
    first = jax.nn.relu(conv(p, "a", x))
    gate = jax.nn.softmax(first)
    second = conv(p, "d", jax.nn.relu(conv(p, "b", first)))
    return jax.nn.relu(conv(p, "b", gate * second)) @ p["wide"][0, 0]


def shares_weights(p: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(p, "a", x))
    for _ in range(3):
        x = jax.nn.relu(conv(p, "d", x))
    return x


def splits_the_batch(p: Any, x: jax.Array) -> jax.Array:
    """Samples that become more samples between two convolutions."""
    x = jax.nn.relu(conv(p, "a", x))
    x = x.reshape(-1, 6, 12, 16)
    return conv(p, "d", jax.nn.relu(conv(p, "b", x)))


def max_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def pools_between(p: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(p, "b", jax.nn.relu(conv(p, "a", x))))
    return conv(p, "d", jax.nn.relu(conv(p, "b", max_pool(x)))).mean((1, 2))


def pools_beside(p: Any, x: jax.Array) -> jax.Array:
    """A tensor that one convolution reads, and another behind a pool, as a reduction has it."""
    x = jax.nn.relu(conv(p, "a", x))
    return conv(p, "d", x, stride=2) + conv(p, "b", max_pool(x))


def pools_twice(p: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    x = jax.nn.relu(conv(p, "a", x))
    wide = lax.reduce_window(x, -jnp.inf, lax.max, (1, 4, 4, 1), (1, 4, 4, 1), "VALID")
    return conv(p, "d", max_pool(x)), conv(p, "b", wide)


# The lengths of their sequences.
MODELS: dict[Callable[..., Any], list[int]] = {
    residual: [5],
    ends_at_another_operation: [2, 2],
    reads_inside_results: [3],
    has_work_between: [3],
    joins_again: [3],
    shares_weights: [4],
    splits_the_batch: [2],
    pools_between: [2, 2],
    pools_beside: [2],
    pools_twice: [2],
}


@functools.cache
def quantized(model: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    return jaxquant.quant_post(
        PARAMS, model, [X], algo="abs_max", recover=(), progress=False, **options
    )


def lengths(qapply: Any, x: Any = X) -> list[int]:
    program = qapply.with_backend("native").program(x)
    return [len(each.calls) for each in program.sequences]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
class TestModels:
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_same_result(self, model: Any, full: bool, batch: int):
        qparams, qapply = quantized(model, is_full_quantize=full)
        got = jax.jit(qapply.with_backend("native"))(qparams, X[:batch])
        expected = jax.jit(qapply.with_backend("xla"))(qparams, X[:batch])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def test_what_runs_as_one(self, model: Any):
        _, qapply = quantized(model)
        assert lengths(qapply) == MODELS[model]

    def test_exports_run_the_portable_form(self, model: Any):
        qparams, qapply = quantized(model)
        exported = jax.export.export(jax.jit(qapply.with_backend("native")))(qparams, X)
        assert "custom_call" not in exported.mlir_module()
        got, expected = exported.call(qparams, X), qapply.with_backend("xla")(qparams, X)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def test_vmap(self, model: Any):
        qparams, qapply = quantized(model)
        run = functools.partial(qapply.with_backend("native"), qparams)
        got = jax.jit(jax.vmap(run))(X[:, None])
        each = [jax.jit(run)(x[None]) for x in X]
        expected = jax.tree.map(lambda *ys: np.stack(ys), *each)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_one_call_with_prepared_weights():
    qparams, qapply = quantized(residual)
    prepared = qapply.prepare(qparams)
    text = jax.jit(qapply).lower(prepared, X).compile().as_text()
    assert text.count('custom_call_target="jaxquant_sequence"') == 1
    assert "jaxquant_conv" not in text
    assert "jaxquant_pack" not in text
    np.testing.assert_array_equal(jax.jit(qapply)(prepared, X), jax.jit(qapply)(qparams, X))


def test_only_where_whole_chains_run():
    """A comparison of models looks at every site, so that nothing may stay inside of a call."""
    _, qapply = quantized(residual)
    binding = bind(trace_model(residual, jax.tree.map(jnp.asarray, PARAMS), (X,)), qapply.plan)
    assert Program(binding, PARAMS, PLATFORMS).sequences
    assert not Program(binding, PARAMS, PLATFORMS, by_site=True).sequences
    assert not Program(binding, PARAMS, XLA_ALONE).sequences


def test_bfloat16():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    x = X.astype(jnp.bfloat16)
    qparams, qapply = jaxquant.quant_post(
        params, residual, [x], algo="abs_max", recover=(), progress=False
    )
    assert lengths(qapply, x)
    got = jax.jit(qapply.with_backend("native"))(qparams, x)
    expected = jax.jit(qapply.with_backend("xla"))(qparams, x)
    assert got.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(np.float32), expected.astype(np.float32), rtol=1e-2, atol=1e-2
    )


def test_channels_first_runs_one_by_one():
    def model(p: Any, x: jax.Array) -> jax.Array:
        for name in ("a", "d"):
            x = jax.nn.relu(
                lax.conv_general_dilated(x, p[name], (1, 1), "SAME",
                                         dimension_numbers=("NCHW", "HWIO", "NCHW"))
            )  # fmt: skip
        return x

    x = X.transpose(0, 3, 1, 2)
    qparams, qapply = jaxquant.quant_post(
        PARAMS, model, [x], algo="abs_max", recover=(), progress=False
    )
    assert not lengths(qapply, x)
    got, expected = (qapply.with_backend(b)(qparams, x) for b in ("native", "xla"))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
