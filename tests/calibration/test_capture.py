import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks

PARAMS = {"a": {"w": networks.plain_params()["head"]["kernel"]}, "b": {"w": jnp.ones((5, 2))}}
X = networks.images(shape=(4, 12))


def mlp(p, x):
    return jnp.tanh(x @ p["a"]["w"]) @ p["b"]["w"]


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def by_hand(x):
    a = np.asarray(x) @ np.asarray(PARAMS["a"]["w"])
    return {"a": a, "b": np.tanh(a) @ np.ones((5, 2), np.float32)}


def test_outputs_match_those_computed_by_hand():
    seen = jaxquant.capture(PARAMS, mlp, X)
    assert list(seen) == ["a", "b"]
    jax.tree.map(assert_close, seen, by_hand(X))


def test_inputs_match_those_computed_by_hand():
    seen = jaxquant.capture(PARAMS, mlp, X, of="input")
    assert list(seen) == ["a", "b"]
    assert_close(seen["a"], X)
    assert_close(seen["b"], np.tanh(by_hand(X)["a"]))


def test_the_input_is_the_activation_whichever_side_the_weight_is_on():
    seen = jaxquant.capture({"w": jnp.ones((2, 12))}, lambda p, x: p["w"] @ x.T, X, of="input")
    assert_close(seen["w"], X.T)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a", "b"]),
        ("a", ["a"]),
        ("[b]", ["b"]),
        (["b", "a"], ["a", "b"]),
        (("a", "*"), ["a", "b"]),
    ],
)
def test_patterns_select_sites_in_the_order_of_evaluation(pattern, expected):
    assert list(jaxquant.capture(PARAMS, mlp, X, sites=pattern)) == expected


def test_a_pattern_that_matches_nothing_names_it_and_what_there_is():
    with pytest.raises(ValueError, match=r"'c/\*' matches no site; valid: a, b"):
        jaxquant.capture(PARAMS, mlp, X, sites=["a", "c/*"])


def test_of_is_checked():
    with pytest.raises(ValueError, match="of is 'output' or 'input', got 'gradient'"):
        jaxquant.capture(PARAMS, mlp, X, of="gradient")


def test_under_jit_vmap_and_nested():
    plain = jaxquant.capture(PARAMS, mlp, X)
    jitted = jax.jit(lambda p, x: jaxquant.capture(p, mlp, x))(PARAMS, X)
    jax.tree.map(assert_close, jitted, plain)
    each = jax.vmap(lambda x: jaxquant.capture(PARAMS, mlp, x))(X)
    jax.tree.map(assert_close, each, plain)
    both = jax.jit(jax.vmap(lambda x: jaxquant.capture(PARAMS, jax.jit(mlp), x)))(X)
    jax.tree.map(assert_close, both, plain)


def test_under_grad():
    def loss(p):
        return jaxquant.capture(p, mlp, X)["b"].sum()

    expected = jax.grad(lambda p: mlp(p, X).sum())(PARAMS)
    jax.tree.map(assert_close, jax.grad(loss)(PARAMS), expected)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@pytest.mark.parametrize(
    ("activation", "derivative"),
    [(jax.nn.relu, 0.0), (straight_through, 1.0)],
    ids=["relu", "custom_vjp"],
)
@pytest.mark.parametrize("scanned", [False, True], ids=["", "scan"])
def test_custom_derivatives_are_kept_under_grad(activation, derivative, scanned):
    """At 0 ReLU's custom rule gives 0, where JAX's `max` gives 1/2; `round` alone gives 0."""

    def apply_fn(p, x):
        if not scanned:
            return activation(x) @ p
        return jax.lax.scan(lambda c, w: (c, activation(x) @ w), 0, p[None])[1]

    x, w = jnp.zeros((4, 3)), jnp.ones((3, 2))
    gradient = jax.grad(lambda x: jaxquant.capture(w, apply_fn, x)["param"].sum())(x)
    np.testing.assert_array_equal(gradient, np.full((4, 3), 2 * derivative))


def test_works_on_abstract_values():
    shapes = jax.eval_shape(lambda x: jaxquant.capture(PARAMS, mlp, x), X)
    assert {name: s.shape for name, s in shapes.items()} == {"a": (4, 5), "b": (4, 2)}


def test_through_remat_and_linen_modules():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.Dense(12, name="fc")(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(Block)(name="b1")(x)
            return nn.Dense(3, name="head")(nn.jit(Block)(name="b2")(x))

    net = Net()
    variables = net.init(jax.random.key(0), X)
    seen = jaxquant.capture(variables, net.apply, X, sites="b*/*")
    p = variables["params"]
    first = X @ p["b1"]["fc"]["kernel"]
    second = jax.nn.relu(first + p["b1"]["fc"]["bias"]) @ p["b2"]["fc"]["kernel"]
    assert list(seen) == ["b1/fc", "b2/fc"]
    assert_close(seen["b1/fc"], first)
    assert_close(seen["b2/fc"], second)


LAYERS = {
    "layers": jnp.asarray(np.random.default_rng(1).normal(size=(3, 12, 12)) * 0.3, jnp.float32)
}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_stacks_its_steps_on_a_leading_axis(reverse):
    def apply_fn(p, x):
        step = lambda c, w: (jnp.tanh(c @ w), c.sum())  # noqa: E731
        return jax.lax.scan(step, x, p["layers"], reverse=reverse)

    seen = jaxquant.capture(LAYERS, apply_fn, X)
    inputs = jaxquant.capture(LAYERS, apply_fn, X, of="input")
    expected, before, carry = [None] * 3, [None] * 3, np.asarray(X)
    for k in (2, 1, 0) if reverse else (0, 1, 2):
        before[k] = carry
        expected[k] = carry @ np.asarray(LAYERS["layers"][k])
        carry = np.tanh(expected[k])
    assert {name: v.shape for name, v in seen.items()} == {"layers": (3, 4, 12)}
    assert_close(seen["layers"], np.stack(expected))
    assert_close(inputs["layers"], np.stack(before))


def test_a_nested_scan_has_two_leading_axes():
    def apply_fn(p, x):
        inner = lambda c, w: (jnp.tanh(c @ w), None)  # noqa: E731
        outer = lambda c, _: (jax.lax.scan(inner, c, p["layers"])[0] @ p["head"], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=2)[0]

    params = LAYERS | {"head": jnp.eye(12) * 0.5}
    seen = jax.jit(lambda x: jaxquant.capture(params, apply_fn, x))(X)
    expected, heads, carry = np.zeros((2, 3, 4, 12)), np.zeros((2, 4, 12)), np.asarray(X)
    for i in range(2):
        for k in range(3):
            expected[i, k] = carry @ np.asarray(LAYERS["layers"][k])
            carry = np.tanh(expected[i, k])
        heads[i] = carry = carry * 0.5
    assert_close(seen["layers"], expected)
    assert_close(seen["head"], heads)


def test_a_scan_whose_results_are_read_later():
    """What a rewritten scan returns must be what the scan itself returns."""

    def apply_fn(p, x):
        carry, ys = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, p["layers"])
        return (carry + ys.sum(0)) @ p["head"]

    params = LAYERS | {"head": jnp.eye(12)}
    seen = jaxquant.capture(params, apply_fn, X)
    assert_close(seen["head"], apply_fn(params, X))


def test_a_vmapped_function_and_a_captured_constant():
    table = np.asarray(LAYERS["layers"][0])
    apply_fn = jax.vmap(lambda p, x: (x * p) @ table, (None, 0))
    (value,) = jaxquant.capture(jnp.float32(2), apply_fn, X).values()
    assert_close(value, np.asarray(X) * 2 @ table)


def _while(p, x):
    return jax.lax.while_loop(lambda c: jnp.abs(c).sum() > 1, lambda c: c @ p["loop"] / 9, x)


def test_only_sites_inside_while_is_an_error():
    with pytest.raises(ValueError, match=r"cannot be captured: loop \(inside while\)"):
        jaxquant.capture({"loop": jnp.eye(12)}, _while, X)


def test_some_sites_inside_cond_is_a_warning_that_points_here():
    def apply_fn(p, x):
        x = jax.lax.cond(x.sum() > 0, lambda c: c @ p["branch"], lambda c: c, x)
        return x @ p["head"]

    params = {"branch": jnp.eye(12), "head": jnp.ones((12, 2))}
    with pytest.warns(UserWarning, match=r"branch \(inside cond\)") as record:
        seen = jaxquant.capture(params, apply_fn, X)
    assert record[0].filename == __file__
    assert list(seen) == ["head"]
    assert_close(seen["head"], apply_fn(params, X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxquant.capture(params, apply_fn, X, sites="head")


def test_several_inputs_and_a_pytree_of_inputs():
    def apply_fn(p, batch, scale):
        return (batch["x"] * scale) @ p["a"]["w"]

    seen = jaxquant.capture(PARAMS, apply_fn, {"x": X}, jnp.float32(2))
    assert_close(seen["a"], 2 * by_hand(X)["a"])


def test_a_model_without_sites():
    with pytest.raises(ValueError, match="no convolution and no dot"):
        jaxquant.capture(jnp.ones(12), lambda p, x: x * p, X, sites=["a", "b"])
