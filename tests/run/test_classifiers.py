"""A softmax behind a dense layer runs as the report says, whatever is added to the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant

HIDDEN = np.array([0, 0, 1, 0, 0], bool)
BESIDE = {
    "nothing": None,
    "a bias": "b",
    "-1e9": np.where(HIDDEN, -1e9, 0).astype(np.float32),
    "-inf": np.where(HIDDEN, -np.inf, 0).astype(np.float32),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 16)).astype(np.float32)
PARAMS = {
    "w": RNG.normal(size=(16, 16)).astype(np.float32) / 4,
    "v": RNG.normal(size=(16, 5)).astype(np.float32) / 4,
    "b": RNG.normal(size=5).astype(np.float32),
}


@pytest.mark.parametrize("first", [None, "b"])
@pytest.mark.parametrize("beside", BESIDE)
def test_a_softmax_that_is_reported_int8_is_int8(beside: str, first: str | None):
    added = [x for x in (first, BESIDE[beside]) if x is not None]

    def apply_fn(params, x):
        logits = jnp.tanh(x @ params["w"]) @ params["v"]
        for each in added:
            logits = logits + (params[each] if isinstance(each, str) else each)
        return jax.nn.softmax(logits)

    options = {"recover": (), "progress": False}
    default = jaxquant.quant_post(PARAMS, apply_fn, X, **options)
    qparams, qapply = jaxquant.quant_post(PARAMS, apply_fn, X, is_full_quantize=True, **options)
    (row,) = (each for each in qapply.report().rows if each["kind"] == "softmax")
    y, want = np.asarray(qapply(qparams, X)), np.asarray(apply_fn(PARAMS, X))
    in_float = np.asarray(default[1](default[0], X))
    assert (row["status"] == "int8") == (not np.array_equal(y, in_float))
    assert (row["status"] == "int8") == (beside != "-1e9")
    assert np.square(y - want).sum() < 1e-3 * np.square(want).sum()
