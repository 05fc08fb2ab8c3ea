"""Which dots that are scaled in the call have zero points for their rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks

PARAMS = {"w": networks.images(0, (6, 5)), "c": networks.images(1, (3, 3, 2, 4))}
X = {"rows": networks.images(2, (7, 6)), "image": networks.images(3, (2, 5, 5, 2))}


def net(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    image = jax.lax.conv_general_dilated(
        x["image"], p["c"], (1, 1), "SAME", dimension_numbers=numbers
    )
    return x["rows"] @ p["w"], image, x["rows"] @ x["rows"].T


def asymmetric(qapply):
    return {site.name for site in qapply.plan.sites if site.asymmetric}


def test_those_that_meet_a_stored_weight():
    kinds = ("conv2d", "mul", "matmul")
    qparams, qapply = jaxquant.quant_dynamic(
        PARAMS, net, [X], quantizable_op_type=kinds, progress=False
    )
    assert asymmetric(qapply) == {"w"}
    sums = np.asarray(qparams["params"]["w"]["int8"], np.int32).sum(axis=0)
    np.testing.assert_array_equal(qparams["sites"]["w"]["weight_sum"], sums)
    others = [name for name in qparams["sites"] if name != "w"]
    assert len(others) == 2
    assert not any("weight_sum" in qparams["sites"][name] for name in others)


def test_none_where_symmetric_ones_are_asked_for():
    qparams, qapply = jaxquant.quant_dynamic(
        PARAMS, net, [X], activation_quantize_type="symmetric", progress=False
    )
    assert asymmetric(qapply) == set()
    assert "weight_sum" not in qparams["sites"]["w"]


@pytest.mark.parametrize("rule", [False, True])
def test_static_models_ask_the_rules_and_the_configuration(rule):
    settings = {} if rule else {"activation_quantize_type": "symmetric"}
    symmetric = [jaxquant.Rule("w", symmetric=True)] if rule else []
    _, qapply = jaxquant.quant_post(
        PARAMS, net, [X], progress=False,
        rules=[jaxquant.Rule("w", dynamic=True), *symmetric], **settings,
    )  # fmt: skip
    assert asymmetric(qapply) == set()
    _, qapply = jaxquant.quant_post(
        PARAMS, net, [X], progress=False, rules=[jaxquant.Rule("w", dynamic=True)]
    )
    assert asymmetric(qapply) == {"w"}


def test_sums_that_int32_may_not_hold_have_none():
    shapes = {"w": jax.ShapeDtypeStruct((70_000, 1), jnp.float32)}
    x = jax.ShapeDtypeStruct((1, 70_000), jnp.float32)
    params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
    _, qapply = jaxquant.quant_dynamic(params, lambda p, x: x @ p["w"], x, progress=False)
    assert [site.status for site in qapply.plan.sites] == ["int8"]
    assert asymmetric(qapply) == set()


def test_lopsided_rows_lose_half_as_much():
    """Behind a GELU next to nothing is negative."""
    params = {"w": networks.images(0, (64, 16))}

    def behind_gelu(p, x):
        return jax.nn.gelu(x) @ p["w"]

    x = 3 * networks.images(1, (50, 64))
    wanted = np.asarray(behind_gelu(params, x))
    noise = []
    for kind in ("symmetric", "asymmetric"):
        qparams, qapply = jaxquant.quant_dynamic(
            params, behind_gelu, x, activation_quantize_type=kind, progress=False
        )
        noise.append(np.square(wanted - qapply(qparams, x)).sum())
    assert noise[1] < 0.6 * noise[0]
