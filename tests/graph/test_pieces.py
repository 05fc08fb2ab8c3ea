"""A function in pieces gives what it gives whole, and compiles what repeats once."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

from jaxquant.graph.pieces import InPieces

X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
_COMPILATION = "/jax/core/compile/backend_compile_duration"


def layers(count):
    weights = np.random.default_rng(1).normal(size=(count, 2, 6, 6)).astype(np.float32)
    return [{"a": jnp.asarray(w[0]), "b": jnp.asarray(w[1])} for w in weights]


def deep(params, x, scale):
    seen = {}
    for number, layer in enumerate(params):
        y = jax.nn.relu(x @ layer["a"]) * scale
        x = x + jnp.tanh(y @ layer["b"])
        seen[f"layer {number}"] = y.sum()
    return seen, [x, jnp.float32(3)]


def compilations(function, *args):
    """How many programs a call compiles."""
    counted = []

    def listen(event, duration, **_):
        if event == _COMPILATION:
            counted.append(duration)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(function(*args))
    finally:
        monitoring.unregister_event_duration_listener(listen)
    return len(counted)


def test_the_results_are_those_of_the_whole_function():
    params = layers(5)
    found, want = InPieces(deep, {})(params, X, 2.0), jax.jit(deep)(params, X, 2.0)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_depth_compiles_no_more_programs():
    few, many = (compilations(InPieces(deep, {}), layers(n), X, 0.5) for n in (6, 12))
    assert few == many < 12


def test_a_function_without_repetition_is_one_program():
    def once(w, x):
        return jnp.tanh(x @ w["a"]) @ w["b"][:, :3]

    assert compilations(InPieces(once, {}), layers(1)[0], X) == 1


def between(params, x):
    x = jnp.tanh(jnp.tanh(x @ params[0]["a"]) @ params[0]["b"][:, :4])
    for layer in params:
        x = jnp.tanh(x @ layer["a"][:4, :4])
    return jnp.tanh(x @ params[0]["b"][:4]) @ params[0]["a"]


def test_what_does_not_repeat_is_joined():
    run, params = InPieces(between, {}), layers(25)
    assert compilations(run, params, X) == 3  # before, each layer, and behind
    want = jax.jit(between)(params, X)
    np.testing.assert_allclose(run(params, X), want, rtol=1e-5, atol=1e-6)


def test_what_repeats_too_little_for_a_program_of_its_own_is_joined():
    assert compilations(InPieces(between, {}), layers(2), X) == 1


def test_layers_of_two_dots_are_one_piece_each():
    def pairs(params, x):
        for layer in params:
            x = jnp.tanh(jnp.tanh(x @ layer["a"]) * 2.0 @ layer["b"])
        return x

    params = layers(5)
    assert compilations(InPieces(pairs, {}), params, X) == 1


def test_layers_that_hang_together_in_another_way_share_their_dots():
    def crossed(params, start):
        x = start
        for number, layer in enumerate(params):
            beside = (x, start, layer["a"])[(0, 0, 1, 2, 1, 1, 2, 0)[number]]
            x = jnp.tanh(x @ layer["a"]) @ layer["b"] * beside
        return x

    run, params, start = InPieces(crossed, {}), layers(8), layers(1)[0]["b"]
    assert compilations(run, params, start) == 2
    want = jax.jit(crossed)(params, start)
    np.testing.assert_allclose(run(params, start), want, rtol=1e-5, atol=1e-6)


def test_other_constants_and_window_sizes_are_other_pieces():
    def mixed(w, x):
        for number in range(3):
            x = jnp.tanh(x @ w) * (number + 1.5)
            x = x + jnp.roll(x @ w, number, 1)
        return x

    w = layers(1)[0]["a"]
    np.testing.assert_allclose(InPieces(mixed, {})(w, X), mixed(w, X), rtol=1e-5)


def test_a_second_call_compiles_nothing_and_another_shape_does():
    run, params = InPieces(deep, {}), layers(5)
    assert compilations(run, params, X, 1.0) > 0
    assert compilations(run, params, X + 1, 2.0) == 0
    assert compilations(run, params, X[:2], 1.0) > 0
