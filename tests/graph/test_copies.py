import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.graph import copies
from jaxquant.graph.evaluate import evaluate
from jaxquant.graph.trace import trace

CASES = [
    (lambda w: w, {0, 1}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3)), {1, 2}),
    (lambda w: jnp.broadcast_to(w[:, None, :], (2, 5, 3)).transpose(2, 1, 0), {0, 2}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3)) * 2 + 1, {1, 2}),
    (lambda w: jnp.full((5, 3), 2.0), set()),
    (lambda w: jnp.broadcast_to(w[:1], (2, 3)), {1}),
    (lambda w: w[:, :1] + jnp.zeros((2, 3)), {0}),
    (lambda w: jnp.tile(w[None], (5, 1, 1)), {1, 2}),
    (lambda w: jnp.repeat(w[None], 5, axis=0), {1, 2}),
    (lambda w: jnp.stack([w, w], axis=1), {0, 1, 2}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3)) @ jnp.ones((3, 4)), {1}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3)) @ w.T, {1, 2}),
    (lambda w: jnp.einsum("bqd,bkd->bqk", *[jnp.broadcast_to(w[None], (5, 2, 3))] * 2), {1, 2}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3)).reshape(5, 1, 6), {2}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3)).reshape(10, 3), {0, 1}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3)).mean(-1, keepdims=True), {1}),
    (lambda w: jax.nn.softmax(jnp.broadcast_to(w[None], (5, 2, 3)), axis=-1), {1, 2}),
    (lambda w: jnp.cumsum(jnp.broadcast_to(w[:1], (2, 3)), axis=0), {0, 1}),
    (lambda w: jnp.concatenate([jnp.broadcast_to(w[None], (5, 2, 3))] * 2, axis=1), {1, 2}),
    (lambda w: jnp.pad(jnp.broadcast_to(w[:1], (5, 3)), ((0, 1), (0, 0))), {0, 1}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3))[:, 1:, :2], {2}),
    (lambda w: jnp.take(jnp.broadcast_to(w[None], (5, 2, 3)), jnp.array([1, 0]), axis=1), {1, 2}),
    (lambda w: jnp.broadcast_to(w[None], (5, 2, 3)).sum(axis=(0, 2)), {0}),
    (
        lambda w: jax.lax.dynamic_update_slice(
            jnp.broadcast_to(w[None], (5, 2, 3)), jnp.ones((5, 1, 3)), (0, 1, 0)
        ),
        {1, 2},
    ),
    (lambda w: jnp.arange(3.0) + jnp.zeros((2, 3)), {1}),
    (lambda w: jnp.sort(jnp.broadcast_to(w[None], (5, 2, 3)), axis=1), {1, 2}),
    (
        lambda w: jax.lax.conv(
            jnp.broadcast_to(w[None, None], (5, 1, 2, 3)), w[None, None], (1, 1), "SAME"
        ),
        {2, 3},
    ),
]


@pytest.mark.parametrize(("fn", "axes"), CASES)
def test_the_axes_along_which_a_parameter_varies(fn, axes):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32)
    graph = trace(lambda p, x: fn(p), w, [jnp.ones(())])
    (out,) = graph.outputs
    found = copies.varying_axes(graph, out)
    assert found == axes
    # what holds copies does
    value = evaluate(graph, dict(zip(graph.leaves, [w], strict=True)), [jnp.ones(())]).read(out)
    once = copies.without_copies(graph, out, value)
    np.testing.assert_allclose(np.broadcast_to(once, value.shape), value, rtol=1e-6)
    assert once.shape == copies.shape_without_copies(graph, out)


def test_copies_of_a_batch_of_symbolic_size():
    (x,) = jax.export.symbolic_args_specs([jnp.ones((4, 2))], "batch, 2")

    def spread(p, x):
        return jnp.repeat(p[None], x.shape[0], axis=0) @ jnp.ones((3, 4))

    graph = trace(spread, jnp.ones((2, 3)), [x])
    assert copies.varying_axes(graph, graph.outputs[0]) == {1}


def test_what_is_computed_in_a_loop_may_vary_along_every_axis():
    def fn(p, x):
        return jax.lax.fori_loop(0, 2, lambda i, y: y + i, jnp.broadcast_to(p, (4, 3)))

    graph = trace(fn, jnp.ones((1, 3)), [jnp.ones(())])
    assert copies.varying_axes(graph, graph.outputs[0]) == {0, 1}
