"""A small model, and calls of it, for the tests of bad input."""

import jax
import jax.numpy as jnp

import jaxquant

PARAMS = {"fc": {"w": jnp.eye(4)}, "head": {"w": jnp.ones((4, 2))}}
X = jnp.ones((3, 4))


def mlp(p, x):
    return jax.nn.relu(x @ p["fc"]["w"]) @ p["head"]["w"]


def never(*_):
    raise AssertionError("the model must not run")


def quant_post(params=PARAMS, apply_fn=mlp, ds=(X,), **kwargs):
    return jaxquant.quant_post(params, apply_fn, list(ds), progress=False, **kwargs)


def notes(error):
    return "\n".join(getattr(error, "__notes__", ()))
