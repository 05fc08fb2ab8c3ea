"""A model in training mode is refused, by name; models that only look like one are not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxquant
from jaxquant.calibration.dependence import check_independence
from jaxquant.graph.model import FloatModel
from tests import networks

KEY = jax.random.key(0)
W = {"w": networks.images(0, (6, 6)), "v": networks.images(1, (6, 6))}
X = networks.images(2, (8, 6))
IMAGE = networks.images(3, (4, 8, 8, 3))
KERNEL = {"k": networks.images(4, (3, 3, 3, 4))}


def check(apply_fn, params, *inputs):
    check_independence(FloatModel(apply_fn, params), inputs)


def normalised(x, axis):
    centered = x - x.mean(axis, keepdims=True)
    return centered / jnp.sqrt(jnp.square(centered).mean(axis, keepdims=True) + 1e-5)


def batch_norm(p, x):
    return normalised(x @ p["w"], tuple(range(x.ndim - 1))) @ p["v"]


def layer_norm(p, x):
    return normalised(x @ p["w"], -1) @ p["v"]


def conv(p, x):
    return lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def attention(p, x):
    return jax.nn.softmax(x @ p["w"] @ x.T) @ (x @ p["v"])


def recurrent(p, x):
    def step(state, now):
        state = jnp.tanh(normalised(now @ p["w"], -1) + state @ p["v"])
        return state, state

    states = lax.scan(step, jnp.zeros(6), x)[1]
    return states - states.mean(0)


def compared(p, x):
    a, b = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (x @ p["w"], x @ p["v"]))
    return jax.nn.softmax(a @ b.T)


def averaged_over_devices(p, x):
    def one(sample):
        y = sample @ p["w"]
        return (y - lax.pmean(y, "batch")) @ p["v"]

    return jax.vmap(one, axis_name="batch")(x)


MIXING = {
    "batch norm": (batch_norm, W, X),
    "a batch of one": (batch_norm, W, X[:1]),
    "over batch and positions": (batch_norm, W, X.reshape(2, 4, 6)),
    "channels first": (lambda p, x: normalised((x @ p["w"]).T, 1), W, X),
    "flattened": (lambda p, x: batch_norm(p, x.reshape(-1, 6)).reshape(x.shape), W, X[:, None]),
    "images": (lambda p, x: normalised(conv(p, x), (0, 1, 2)), KERNEL, IMAGE),
    "vmap": (averaged_over_devices, W, X),
    "scan": (lambda p, x: lax.scan(lambda h, _: (batch_norm(p, h), 0), x, None, 2)[0], W, X),
    "loop": (lambda p, x: lax.fori_loop(0, 2, lambda _, h: batch_norm(p, h), x), W, X),
    "branch": (
        lambda p, x: lax.cond(x[0, 0] > 9, lambda h: h, functools.partial(batch_norm, p), x), W, X,
    ),
    "largest of the batch": (lambda p, x: (x / jnp.abs(x).max()) @ p["w"], W, X),
    "one of two outputs": (lambda p, x: (layer_norm(p, x), batch_norm(p, x)), W, X),
    "a constant batch": (batch_norm, W, jnp.zeros((4, 6))),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXING)
def test_statistics_over_the_batch(case):
    apply_fn, params, x = MIXING[case]
    with pytest.raises(ValueError, match=r"depends on the other samples .*statistics over the bat"):
        check(apply_fn, params, x)


INDEPENDENT = {
    "layer norm": (layer_norm, W, X),
    "one sample": (layer_norm, W, X[:1]),
    "instance norm": (lambda p, x: normalised(conv(p, x), (1, 2)), KERNEL, IMAGE),
    "the mean of the batch": (lambda p, x: (x @ p["w"]).mean(0), W, X),
    "a mean beside": (lambda p, x: (x @ p["w"], (x @ p["w"]).mean()), W, X),
    "a text without a batch axis": (attention, W, X),
    "an image without a batch axis": (
        lambda p, x: normalised(conv(p, x[None])[0], (0, 1)), KERNEL, IMAGE[0],
    ),
    "a series without a batch axis": (recurrent, W, X),
    "neighbours in a graph": (
        lambda p, x, edges: normalised(edges @ x @ p["w"], 0), W, X, jnp.ones((8, 8)),
    ),
    "samples one by one": (lambda p, x: lax.map(lambda s: layer_norm(p, s), x), W, X[:, None]),
    "samples against samples": (compared, W, X),
    "the longest of the batch": (
        lambda p, x, n: jnp.where(jnp.arange(6) < n.max(), x, 0.0) @ p["w"], W, X, jnp.full(8, 6),
    ),
    "a batch size that is fixed": (lambda p, x: batch_norm(p, x.reshape(8, 6)), W, X),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEPENDENT)
def test_what_is_no_training_mode(case):
    check(*INDEPENDENT[case])


def dropout(p, x):
    kept = jax.random.bernoulli(KEY, 0.5, x.shape)
    return jnp.where(kept, x @ p["w"] / 0.5, 0.0) @ p["v"]


def multiplied_dropout(p, x):
    kept = jax.random.bernoulli(KEY, 0.5, x.shape).astype(jnp.float32) / 0.5
    return (kept * (x @ p["w"])) @ p["v"]


def scanned_dropout(p, x):
    keys = jax.random.split(KEY, 2)

    def step(h, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h @ p["w"], 0.0), None

    return lax.scan(step, x, keys)[0]


@pytest.mark.parametrize("apply_fn", [dropout, multiplied_dropout, scanned_dropout])
def test_dropout_by_a_fixed_key(apply_fn):
    with pytest.raises(ValueError, match=r"a key that is fixed in apply_fn: dropout is active"):
        check(apply_fn, W, X)


def test_random_features_and_noise_are_no_dropout():
    check(lambda p, x: jnp.cos(x @ jax.random.normal(KEY, (6, 6))) @ p["w"], W, X)
    check(lambda p, x: (x + jax.random.normal(KEY, x.shape)) @ p["w"], W, X)


class Linen(nn.Module):
    dropout: bool = True

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2)(
            nn.Dropout(0.5, deterministic=not (train and self.dropout))(x.mean((1, 2)))
        )


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.fc(jax.nn.relu(self.bn(self.conv(x))).mean((1, 2)))


def test_linen_in_training_mode():
    variables = Linen().init(KEY, IMAGE, False)

    def train(p, x):
        rngs = {"dropout": KEY}
        return Linen().apply(p, x, True, mutable=["batch_stats"], rngs=rngs)[0]

    with pytest.raises(ValueError, match=r"Dropout '.*Dropout_0' drops .* deterministic=True"):
        jaxquant.calibrate(variables, train, [IMAGE], progress=False)

    def normed(p, x):
        return Linen(dropout=False).apply(p, x, True, mutable=["batch_stats"])[0]

    match = r"BatchNorm '.*norm' takes .* use_running_average=True.* allow_batch_dependence=True"
    with pytest.raises(ValueError, match=match):
        jaxquant.calibrate(variables, normed, [IMAGE], progress=False)


def test_nnx_in_training_mode():
    model = Nnx(nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def apply_fn(s, x):
        return nnx.merge(graphdef, s)(x)

    for quantize in (
        lambda: jaxquant.quant_post(state, apply_fn, [IMAGE], progress=False),
        lambda: jaxquant.quant_dynamic(state, apply_fn, IMAGE),
        lambda: jaxquant.quant_weights(
            state, apply_fn, jax.ShapeDtypeStruct(IMAGE.shape, IMAGE.dtype)
        ),
    ):
        with pytest.raises(ValueError, match=r"BatchNorm 'bn' takes statistics .*model\.eval\(\)"):
            quantize()


def test_a_model_that_means_it():
    seen = jaxquant.calibrate(W, batch_norm, [X], allow_batch_dependence=True, progress=False)
    qparams, qapply = jaxquant.quantize(W, batch_norm, seen, progress=False)
    assert networks.rows(qapply)["v"]["mode"] == "int8"
    np.testing.assert_allclose(qapply(qparams, X), batch_norm(W, X), atol=0.2)
    jaxquant.quant_dynamic(W, batch_norm, X, allow_batch_dependence=True)
    jaxquant.quant_weights(W, dropout, X, allow_batch_dependence=True)
