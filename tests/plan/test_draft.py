"""What becomes int8 where what was seen tells that some sites had better stay float."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from tests.networks import rows

RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=(8, 8)).astype(np.float32) for name in "ab"}
X = RNG.normal(size=(64, 8)).astype(np.float32)


def uneven(p: Any, x: jax.Array) -> jax.Array:
    """Two parts of very different ranges in one tensor, from which both are taken again."""
    both = jnp.concatenate([1e4 * (x @ p["a"]), jnp.tanh(x @ p["b"])], axis=1)
    return (both[:, :8] + both[:, 8:]) @ p["b"]


def test_a_tensor_that_was_not_seen_alone_is_read_in_float():
    # Which tensors are quantized from float depends on which sites are int8: with the parts apart
    # there are others, and calibration may have seen some of those within an int8 tensor only.
    full = {"is_full_quantize": True, "progress": False}
    seen = jaxquant.calibrate(PARAMS, uneven, [X], **full)
    without = {name: stats for name, stats in seen.tensors.items() if name != "slice/input"}
    assert len(without) < len(seen.tensors)
    partly = dataclasses.replace(seen, tensors=without)
    qparams, qapply = jaxquant.quantize(PARAMS, uneven, partly, **full)
    reason = rows(qapply)["slice"]["reason"]
    assert rows(qapply)["slice"]["status"] == "float"
    assert "left in int8" in reason
    expected = np.asarray(uneven(PARAMS, X))
    off = np.asarray(qapply(qparams, X)) - expected
    assert np.square(off).sum() < 1e-3 * np.square(expected).sum()
