"""What accuracy control switches: sites, and single layers of scans that can be cut."""

import jax
import jax.numpy as jnp
import pytest

from jaxquant.graph.model import trace_model
from jaxquant.tune.switchable import find_switchable

PARAMS = {
    "deep": {name: jnp.ones((2, 3, 4, 4)) for name in "ab"},
    "made": jnp.ones((2, 4, 4)),
    "head": jnp.ones((4, 2)),
}


def apply_fn(p, x):
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, layer):
        x = jax.lax.scan(inner, x, layer["b"])[0] @ layer["a"][0]
        return x, None

    x = jax.lax.scan(outer, x, p["deep"], reverse=True)[0]
    return jax.lax.scan(inner, x, p["made"] @ p["made"])[0] @ p["head"]


@pytest.fixture(scope="module")
def model():
    return trace_model(apply_fn, PARAMS, (jnp.ones((5, 4)),))


def test_layers_come_as_in_a_loop_in_python(model):
    names = [site.name for site in model.sites]
    assert names == ["deep/b", "deep/a", "made", "head"]
    switchable = find_switchable(model, names, single_layers=True)
    # The layers of the inner scan, and those of weights that are computed, have one program.
    assert list(switchable) == ["deep/b[1]", "deep/a[1]", "deep/b[0]", "deep/a[0]", "made", "head"]
    assert switchable["deep/b[1]"].layer_names == ("deep/b[1][0]", "deep/b[1][1]", "deep/b[1][2]")
    assert switchable["deep/b[1]"].choices(True).tolist() == [[False] * 3, [True] * 3]
    assert switchable["made"].choices(True).tolist() == [True, True]
    assert switchable["head"].choices(True).tolist() is True


def test_sites_alone(model):
    names = [site.name for site in model.sites]
    switchable = find_switchable(model, names, single_layers=False)
    assert list(switchable) == names
    assert switchable["deep/a"].layer_names == ("deep/a[0]", "deep/a[1]")
