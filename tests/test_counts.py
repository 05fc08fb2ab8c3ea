"""What is searched for in a model is searched for once, by whoever asks: counted in one call."""

import collections
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant

PACKAGE = str(pathlib.Path(jaxquant.__file__).parent) + "/"

# What runs once for an input shape: the name of a module and a function in it.
OF_A_MODEL = (
    "graph/model:trace_model",
    "graph/finding:find_sites",
    "graph/naming:tensor_names",
    "graph/composites:Composites.whole",
    "graph/composites:Composites.normalisations",
    "graph/copies:_search",
    "plan/bind:bind",
    "plan/form_search:_found",
    "plan/layout:weight_slots",
    "plan/liveness:live_equations",
    "plan/observed:observed_tensors",
    "plan/restore:restorable",
)
OF_A_SITE = (
    "plan/epilogue:_ends",
    "plan/epilogue:_ended",
    "plan/epilogue:activation_equations",
    "plan/epilogue:output_channels",
    "plan/layout:weight_view",
)


def counted(function, *args, **options):
    """How often each function of the package's first rooms ran in a call: "room/module:name"."""
    counts = collections.Counter()

    def see(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            counts[f"{code.co_filename.removeprefix(PACKAGE)[:-3]}:{code.co_qualname}"] += 1

    sys.setprofile(see)
    try:
        function(*args, **options)
    finally:
        sys.setprofile(None)
    return counts


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def apply_fn(p, x):
    x = jax.nn.relu(conv(x, p["a"]))
    x = jax.nn.relu(conv(x, p["b"]))
    return x.mean((1, 2)) @ p["c"]


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 3, 8), "b": (3, 3, 8, 8), "c": (8, 5)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    x = rng.normal(size=(4, 6, 6, 3)).astype(np.float32)
    return counted(jaxquant.quant_post, params, apply_fn, [x, x], progress=False)


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_a_model_is_searched_once(counts, name):
    assert counts[name] == 1


@pytest.mark.parametrize("name", OF_A_SITE)
def test_a_site_is_searched_once(counts, name):
    assert counts[name] == 3
