"""What analysis and accuracy control say of the sites inside loops, which they do not reach."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jaxquant
from tests import networks


@pytest.fixture(scope="module")
def model():
    params = {"loop": networks.images(0, (2, 8, 8)) / 4, "head": networks.images(1, (8, 4))}

    def apply_fn(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["loop"])[0] @ p["head"]

    return jax.tree.map(jnp.asarray, params), apply_fn, jnp.asarray(networks.images(2, (16, 8)))


def test_analyze_names_what_it_does_not_measure(model):
    params, apply_fn, x = model
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], progress=False)
    analysis = jaxquant.analyze(params, apply_fn, qparams, qapply, [x], progress=False)
    assert analysis.summary["inside_loops"] == ["loop"]
    assert "Not measured, since they are inside loops: loop." in str(analysis)


def test_accuracy_control_names_what_it_leaves(model):
    params, apply_fn, x = model

    def metric(function):
        return -float(jnp.abs(function(x) - apply_fn(params, x)).mean())

    with pytest.warns(UserWarning, match="no step brings it there"):
        _, qapply = jaxquant.quant_post(
            params, apply_fn, [x], metric=metric, max_drop=1e-9, progress=False
        )
    assert qapply.report().summary["control"]["inside_loops"] == ["loop"]
    assert "sites inside loops are left as they are: loop" in str(qapply.report())
