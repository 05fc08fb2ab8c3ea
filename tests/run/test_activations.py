"""Activations behind a site, and the int8 tensor that the next site reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import jaxquant
from tests import reference
from tests.run.chains import C, K, Params, close, make_params

pytestmark = pytest.mark.usefixtures("numbers_as_they_are")

NUMPY_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "gelu": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(x, 0),
}
EXACT_GELU = "exact gelu"
NUMPY_ACTIVATIONS[EXACT_GELU] = lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def jax_activation(name: str) -> Callable[[jax.Array], jax.Array]:
    if name == EXACT_GELU:
        return functools.partial(jax.nn.gelu, approximate=False)
    return getattr(jax.nn, name)


@functools.cache
def quantized_activations() -> Any:
    """Every activation behind a site, and a second site that multiplies it by the identity."""
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(32, K)) * 2)
    params = {
        name: {"first": make_params(rng, (K, C)), "next": {"w": np.eye(C, dtype=np.float32)}}
        for name in NUMPY_ACTIVATIONS
    }

    def apply_fn(params, x):
        outputs = {}
        for name in NUMPY_ACTIVATIONS:
            p = params[name]["first"]
            y = jax_activation(name)(x @ p["w"] * p["s"] + p["b"])
            outputs[name] = y, y @ params[name]["next"]["w"]
        return outputs

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER)
    return params, x, qparams, qapply(qparams, x)


def activated(name: str, params: Params, x: np.ndarray) -> np.ndarray:
    p = params[name]["first"]
    dot = reference.fake(x) @ reference.fake_weight(p["w"], (1,))
    return NUMPY_ACTIVATIONS[name](dot * p["s"] + p["b"])


@pytest.mark.parametrize("name", NUMPY_ACTIVATIONS)
def test_activation_equals_the_reference(name):
    params, x, _, got = quantized_activations()
    close(got[name][0], activated(name, params, x))


@pytest.mark.parametrize("name", NUMPY_ACTIVATIONS)
def test_int8_handed_to_the_next_site(name):
    """The identity's int8 weight is 127 on its diagonal, so its output tells its int8 input."""
    params, x, qparams, got = quantized_activations()
    site = f"{name}/next"
    arrays, tensor = qparams["sites"][site], qparams["tensors"][f"{site}/input"]
    assert sorted(arrays) == ["multiplier"]
    handed = np.asarray(got[name][1]) / (127 * np.float64(arrays["multiplier"]))
    np.testing.assert_allclose(handed, np.rint(handed), atol=1e-4)
    want = reference.quantize(activated(name, params, x), tensor["inv_scale"])
    assert np.abs(want).max() >= 125  # the grid is used
    difference = np.abs(np.rint(handed) - want)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02
