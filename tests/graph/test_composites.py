"""A softmax with its mask: what stands for nothing takes no part in the range of the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks

PARAMS = {"a": networks.images(0, (8, 16)), "b": networks.images(1, (16, 4))}
X = networks.images(2, (4, 6, 8)) / 2
CAUSAL = np.tri(6, dtype=bool)
LEAST = float(jnp.finfo(jnp.float32).min)

MASKS = {
    "chosen, -1e9": lambda scores: jnp.where(CAUSAL, scores, -1e9),
    "chosen, the least float": lambda scores: jnp.where(CAUSAL, scores, LEAST),
    "chosen, -inf": lambda scores: jnp.where(CAUSAL, scores, -jnp.inf),
    "chosen where it does not hold": lambda scores: jnp.where(~CAUSAL, -1e9, scores),
    "added": lambda scores: scores + jnp.where(CAUSAL, 0, -1e9),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_masked_softmax_keeps_its_accuracy_in_int8(name):
    def apply_fn(p, x):
        y = x @ p["a"]
        return jax.nn.softmax(MASKS[name](y @ y.mT / 4)) @ y @ p["b"]

    qparams, qapply = jaxquant.quant_post(
        PARAMS, apply_fn, [X], algo="abs_max", is_full_quantize=True, progress=False
    )
    expected, found = apply_fn(PARAMS, X), qapply(qparams, X)
    noise = np.square(expected - found).sum()
    assert 10 * np.log10(np.square(expected).sum() / noise) > 30
    (row,) = [row for row in qapply.report().rows if row["kind"] == "softmax"]
    assert row["status"] == "int8"
