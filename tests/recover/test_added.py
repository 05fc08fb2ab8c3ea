"""Which parameter takes the mean error of a site's sums away."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.graph.model import FloatModel
from jaxquant.recover.added import Addition, find_added, with_addition

K, N, LAYERS = 16, 6, 3
OPTIONS = {"weight_bits": 4, "group_size": 8, "progress": False}
FOUR = [jaxquant.Rule("*", weight_bits=4)]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def convolved(p: Any, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, 4, 2, 2)
    y = lax.conv_general_dilated(
        x, p["w"].reshape(2, 2, 2, 2 * N), (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return y + jnp.concatenate([p["b"], p["b"]])


def scanned(p: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ own["w"] + own["b"]), None

    return lax.scan(layer, x, {"w": p["w"].reshape(1, K, N)[:, :, :N], "b": p["b"][None]})[0]


# How the parameter meets the sums, and whether it is taken from them; None where none takes a mean.
FORMS = {
    "bias": (lambda p, x: x @ p["w"] + p["b"], False),
    "subtracted": (lambda p, x: (x @ p["w"] - p["b"]) * 2, True),
    "in front": (lambda p, x: p["b"] + x @ p["w"], False),
    "heads": (lambda p, x: jnp.einsum("bk,khn->bhn", x, p["w"].reshape(K, 2, N // 2))
              + p["b"].reshape(2, N // 2), False),
    "output turned": (lambda p, x: (x @ p["w"]).T + p["b"][:, None], False),
    "multiplied first": (lambda p, x: (x @ p["w"]) * 3 + p["b"], None),
    "read twice": (lambda p, x: x @ p["w"] + p["b"] + p["b"].sum(), None),
    "given out": (lambda p, x: (x @ p["w"] + p["b"], p["b"]), None),
    "of samples": (lambda p, x: x @ p["w"] + x[:, :N], None),
    "computed": (lambda p, x: x @ p["w"] + p["b"] * p["b"], None),
    "one for all": (lambda p, x: x @ p["w"] + p["b"][:1], None),
    "twice": (convolved, None),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_only_what_belongs_to_the_sums_alone_is_found(form):
    apply_fn, is_subtracted = form
    params, x = {"w": draw(0, K, N), "b": draw(1, N)}, draw(2, 64, K)
    model = FloatModel(apply_fn, params).trace((x,))
    found = find_added(model, model.sites[0])
    if is_subtracted is None:
        assert found is None
        return
    assert found.is_subtracted == is_subtracted
    # Behind the change the sums of channel 4 are by one larger.
    by = np.zeros(N)
    by[4] = 1
    after = {**params, "b": with_addition(params["b"], Addition(found, (), by))}
    moved = np.asarray(apply_fn(after, x) - apply_fn(params, x)).reshape(-1)
    assert set(np.round(moved, 4).tolist()) == {0, 2 if is_subtracted else 1}
    assert np.count_nonzero(np.round(moved)) == len(x)


@pytest.mark.parametrize("width", [1, N])
def test_a_scalar_is_of_one_channel_alone(width):
    params, x = {"w": draw(0, K, width), "b": draw(1)}, draw(2, 256, 4) @ draw(3, 4, K) + 2
    qparams, _ = jaxquant.quant_weights(
        params, lambda p, x: x @ p["w"] + p["b"], x, rules=FOUR, **OPTIONS
    )
    assert (qparams["params"]["b"] != params["b"]) == (width == 1)


def layered(p: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ own["w"] + own["b"]), None

    return lax.scan(layer, x, p)[0]


def one_bias(p: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w + p["b"][0]), None

    return lax.scan(layer, x, p["w"])[0]


def looped(p: Any, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["w"] + p["b"]), x)


def chosen(p: Any, x: jax.Array) -> jax.Array:
    def plain(x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"] + p["b"])

    return lax.cond(x.sum() > 0, plain, lambda x: plain(x) * 2, x)


@pytest.mark.parametrize(
    ("apply_fn", "shape", "moves"),
    [
        (layered, (LAYERS,), True),
        (one_bias, (LAYERS,), False),
        (looped, (), True),
        (chosen, (), False),
    ],
    ids=["layers", "a bias of all layers", "steps", "branches"],
)
def test_in_loops_a_bias_moves_where_it_is_its_layers_own(apply_fn, shape, moves):
    params = {"w": draw(0, *shape, K, K) / 3, "b": draw(1, *shape, K)}
    x = draw(2, 256, K) + 2  # a mean, so that the sums have a mean error
    qparams, _ = jaxquant.quant_weights(params, apply_fn, x, rules=FOUR, **OPTIONS)
    off = np.abs(np.asarray(qparams["params"]["b"]) - params["b"]).max(axis=-1)
    assert (off > 0).all() if moves else (off == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_error_goes(dtype):
    params = {"w": jnp.asarray(draw(0, K, N), dtype), "b": jnp.asarray(draw(1, N), dtype)}
    x = jnp.asarray(draw(2, 256, K) + 4, dtype)

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + p["b"]

    def mean_off(**options: Any) -> float:
        qparams, qapply = jaxquant.quant_weights(
            params, apply_fn, x, rules=FOUR, **OPTIONS, **options
        )
        assert qparams["params"]["b"].dtype == dtype
        outputs = (qapply(qparams, x), apply_fn(params, x))
        ours, reference = (np.asarray(y, np.float32) for y in outputs)
        return float(np.abs((ours - reference).mean(axis=0)).max())

    assert mean_off() < 0.1 * mean_off(recover=())
