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


def _printed(x):
    jax.debug.print("{}", x.sum())
    return x


def _handed_on(x):
    return jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: x, x)


@pytest.mark.parametrize("through", [_printed, _handed_on])
def test_an_operation_that_gives_nothing_may_read_what_is_normalized(through):
    """A message, or a choice of which JAX leaves only what no branch computes."""

    def apply_fn(p, x):
        centred = through(x - x.mean(-1, keepdims=True))
        return centred / jnp.sqrt(1 + (centred**2).mean(-1, keepdims=True)) @ p["a"]

    params = {"a": PARAMS["a"]}
    qparams, qapply = jaxquant.quant_dynamic(
        params, apply_fn, [X], allow_batch_dependence=True, progress=False
    )
    np.testing.assert_allclose(qapply(qparams, X), apply_fn(params, X), atol=0.1)
    assert [row["status"] for row in qapply.report().rows] == ["int8"]


def test_a_message_does_not_keep_the_batch_from_being_followed():
    def apply_fn(p, x):
        y = x @ p["a"]
        return _printed(y) / y.std(axis=0)

    with pytest.raises(ValueError, match="batch"):
        jaxquant.quant_dynamic({"a": PARAMS["a"]}, apply_fn, [X], progress=False)
