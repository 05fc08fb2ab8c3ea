"""Constants beside activations in one int8 tensor: class tokens, masks, the zeros of a shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks
from tests.plan import full
from tests.reference import quantize

C = 4
X = networks.whole_numbers((3, 5, C)) + 0.375
W = {"w": 127 * jnp.eye(C), "token": networks.whole_numbers((1, 1, C), 1)}


def token(p, x):
    return jnp.broadcast_to(p["token"], (x.shape[0], 1, C))


def zeros(p, x):
    return jnp.zeros((x.shape[0], 1, C))


def parameter_alone(p, x):
    return jnp.tile(p["token"], (x.shape[0], 1, 1))


@pytest.mark.parametrize("constant", [token, zeros, parameter_alone])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_constant_lies_on_the_scale_of_what_it_joins_which_holds_it(constant, factor):
    def apply_fn(p, x):
        return jnp.concatenate([constant(p, x) * factor, x], 1) @ p["w"]

    model = full.quantize(apply_fn, W, X)
    assert {site.status for site in model.plan.sites} == {"int8"}
    assert {tensor.name for tensor in model.plan.tensors} == {"concat/input"}
    scale = 2.0 if constant is zeros else max(2.0, factor)  # 127.375 does not fit on a scale of 1
    for batch in (3, 1, 0, 2):
        x = np.asarray(X[:batch])
        joined = np.concatenate([np.asarray(constant(W, x)) * factor, x], 1)
        expected = 127 * scale * quantize(joined, 1 / scale)
        np.testing.assert_array_equal(model(x), expected)


@pytest.mark.parametrize("stacks", [jnp.stack, lambda parts, axis: jnp.stack(parts[::-1], axis)])
def test_a_constant_is_stacked_with_activations(stacks):
    def apply_fn(p, x):
        first = jnp.broadcast_to(p["token"][0], x.shape)
        return stacks([x, first], 2).reshape(x.shape[0], 10, C) @ p["w"]

    model = full.quantize(apply_fn, W, X)
    expected = np.asarray(apply_fn({**W, "w": jnp.eye(C)}, X))
    np.testing.assert_array_equal(model(X), 127 * 2.0 * quantize(expected, 0.5))
    assert {site.status for site in model.plan.sites} == {"int8"}


def test_backends_vmap_and_jit_agree_on_a_joined_constant():
    params = {"a": networks.images(0, (8, 8)), "b": networks.images(1, (8, 5))}
    params["cls"] = networks.images(2, (1, 1, 8))

    def apply_fn(p, x):
        y = x @ p["a"]
        return jnp.concatenate([jnp.broadcast_to(p["cls"], (*y.shape[:1], 1, 8)), y], 1) @ p["b"]

    x = networks.images(3, (4, 6, 8))
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [x], is_full_quantize=True, progress=False
    )
    found = qapply(qparams, x)
    others = (
        qapply.with_backend("xla")(qparams, x),
        jax.jit(qapply)(qparams, x),
        jax.vmap(qapply, in_axes=(None, 0))(qparams, x[:, None])[:, 0],
    )
    for other in others:
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-5)
    expected = np.asarray(apply_fn(params, x))
    assert 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()) > 35


MASKS = {
    "zeros": lambda scores: scores + jnp.zeros((1, 1, 4)),
    "a number": lambda scores: scores * jnp.full((1, 4, 4), 0.25),
    "of one element": lambda scores: scores - jnp.ones((1, 1, 1)),
    "varying": lambda scores: scores + jnp.where(jnp.arange(4) < 2, 0.0, -1e9),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("full_quantize", [True, False])
def test_a_constant_behind_a_product_of_two_activations(name, full_quantize):
    params = {"q": networks.images(0, (8, 8)), "k": networks.images(1, (8, 8))}

    def apply_fn(p, x):
        scores = jnp.einsum("bld,bmd->blm", x @ p["q"], x @ p["k"])
        return jax.nn.softmax(MASKS[name](scores * 0.1)) @ x

    x = networks.images(2, (3, 4, 8))
    qparams, qapply = jaxquant.quant_post(
        params,
        apply_fn,
        [x],
        quantizable_op_type=("mul", "matmul"),
        is_full_quantize=full_quantize,
        progress=False,
    )
    for batch in (3, 0, 1):
        expected = np.asarray(apply_fn(params, x[:batch]))
        found = qapply(qparams, x[:batch])
        assert found.shape == expected.shape
        assert ((expected - found) ** 2).sum() <= 10**-2.5 * (expected**2).sum()


def test_an_infinity_is_padded_for_a_maximum_alone():
    def apply_fn(p, x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=-jnp.inf)
        return padded.max(1) @ p["w"], jnp.exp(padded)

    model = full.quantize(apply_fn, W, X)
    pooled, exponential = model(X)
    np.testing.assert_array_equal(pooled, 127 * 2.0 * quantize(np.asarray(X).max(1), 0.5))
    np.testing.assert_array_equal(exponential[:, 0], 0)
