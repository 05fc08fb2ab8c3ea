"""Parameters that cannot be quantized are named, with their site."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import networks
from tests.bad_input import PARAMS, X, mlp, never, quant_post


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bad_weight_names_site_parameter_and_how_many(bad, dtype):
    params = PARAMS | {"head": {"w": jnp.ones((4, 2), dtype).at[1, 0].set(bad)}}
    apply_fn = lambda p, x: mlp(jax.tree.map(lambda w: w.astype(jnp.float32), p), x)  # noqa: E731
    match = r"weight of site 'head', params\['head/w'\], holds NaN or infinity in 1 of its 8"
    with pytest.raises(ValueError, match=match):
        quant_post(params, apply_fn)


def test_a_bad_weight_inside_control_flow():
    def apply_fn(p, x):
        return jax.lax.fori_loop(0, 2, lambda _, c: c @ p["loop"]["w"], x) @ p["fc"]["w"]

    params = PARAMS | {"loop": {"w": jnp.eye(4).at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"weight of site 'loop', params\['loop/w'\], holds NaN"):
        quant_post(params, apply_fn)


def test_a_bad_weight_in_a_constant():
    w = np.eye(4, dtype=np.float32)
    w[0, 0] = np.nan
    w = jnp.asarray(w)
    with pytest.raises(ValueError, match=r"params\['constant_0'\], holds NaN or infinity in 1"):
        quant_post(PARAMS, lambda p, x: mlp(p, x @ w))


def test_a_bad_bias_names_the_site():
    params = PARAMS | {"fc": {"w": jnp.eye(4), "b": jnp.array([0, 0, jnp.nan, 0])}}
    with pytest.raises(ValueError, match=r"params\['fc/b'\] holds NaN"):
        networks.quantize(params, lambda p, x: x @ p["fc"]["w"] + p["fc"]["b"], X)


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (1.0, r"params\['fc/b'\] is float, not an array"),
        ("text", r"params\['fc/b'\] is str, not an array"),
        (jax.ShapeDtypeStruct((4,), jnp.float32), "is ShapeDtypeStruct, not an array"),
        (np.array(["a"]), r"params\['fc/b'\] has dtype <U1, not numbers"),
        (np.ones(4, ">f4"), r"params\['fc/b'\] has its bytes in the order of another processor"),
        (np.array([None]), r"params\['fc/b'\] has dtype object, not numbers"),
    ],
)
def test_params_that_are_not_arrays_are_named(leaf, match):
    with pytest.raises(TypeError, match=match):
        quant_post({"fc": {"w": jnp.eye(4), "b": leaf}}, never)


@pytest.mark.parametrize("params", [{}, None, {"a": None}, ()])
def test_no_params(params):
    with pytest.raises(ValueError, match="params holds no array"):
        quant_post(params, never)


def test_an_nnx_module_that_is_no_pytree_says_what_to_pass():
    class Model(nnx.Module, pytree=False):
        def __init__(self):
            self.fc = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    with pytest.raises(TypeError, match=r"is Model, not an array; .* pass the state of nnx.split"):
        quant_post(Model(), never)


def test_params_that_are_traced():
    with pytest.raises(TypeError, match=r"params\['fc/w'\] is being traced: .* outside jit"):
        jax.jit(lambda p: quant_post(p, never)[0])(PARAMS)


def test_deleted_parameters_are_named():
    params = {"fc": {"w": jnp.eye(4) * 2}, "head": PARAMS["head"]}
    params["fc"]["w"].delete()
    with pytest.raises(ValueError, match=r"params\['fc/w'\] has been deleted: it was donated"):
        quant_post(params)


@pytest.mark.parametrize("shape", [(4, 0), (0, 4)])
def test_a_weight_without_elements_is_named(shape):
    params = {"fc": {"w": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=rf"weight of site 'fc' has no element.*\[{shape[0]}, "):
        quant_post(params, lambda p, x: x @ p["fc"]["w"], [jnp.ones((8, shape[0]))])
