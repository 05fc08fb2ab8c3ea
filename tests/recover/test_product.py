"""A convolution or dot as a product of matrices equals the operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph.model import trace_model
from jaxquant.recover.product import SiteProduct

CONVS = {
    "same": ((2, 5, 6, 4), (3, 2, 4, 6), {"padding": "SAME"}),
    "strided": ((2, 7, 6, 4), (3, 3, 4, 6), {"strides": (2, 3), "padding": ((1, 0), (0, 2))}),
    "dilated": ((2, 7, 7, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 1), "padding": "SAME"}),
    "transposed": ((2, 4, 3, 4), (3, 3, 4, 6), {"lhs_dilation": (2, 3),
                                                  "padding": ((1, 2), (2, 1))}),
    "cropped": ((1, 8, 8, 2), (3, 3, 2, 3), {"padding": ((-1, -2), (0, -1))}),
    "depthwise": ((2, 5, 5, 4), (3, 3, 1, 4), {"feature_group_count": 4, "padding": "SAME"}),
    "multiplier": ((2, 5, 5, 4), (3, 3, 1, 8), {"feature_group_count": 4, "padding": "SAME"}),
    "grouped": ((2, 5, 5, 6), (3, 3, 3, 4), {"feature_group_count": 2, "padding": "VALID"}),
    "channels first": ((2, 4, 5, 6), (6, 4, 3, 2), {"layout": ("NCHW", "OIHW", "NCHW"),
                                                    "padding": "SAME"}),
    "mixed layout": ((5, 2, 6, 4), (3, 6, 2, 2), {"layout": ("HNWC", "HOIW", "CWNH"),
                                                  "feature_group_count": 2, "padding": "SAME"}),
    "one axis": ((2, 9, 4), (3, 4, 6), {"layout": ("NWC", "WIO", "NWC"), "padding": "SAME",
                                        "strides": (2,)}),
}  # fmt: skip
DOTS = {
    "dense": ("nk,ko->no", (5, 4), (4, 3)),
    "weight first": ("ok,nk->on", (5, 4), (3, 4)),
    "two contracted": ("nbhd,hdo->nbo", (2, 5, 3, 4), (3, 4, 6)),
    "crossed": ("ndbh,hod->nbo", (2, 4, 5, 3), (3, 6, 4)),
    "two outputs": ("nk,hkd->nhd", (5, 4), (2, 4, 3)),
    "one output": ("nk,k->n", (5, 4), (4,)),
}


def check(apply_fn, x: np.ndarray, w: np.ndarray, zero: int) -> None:
    """The rows of the inputs times the matrix are the rows of the output; the weight comes back."""
    model = trace_model(apply_fn, {"w": w}, (x,))
    (site,) = model.sites
    graph, product = model.graph, SiteProduct(model.graph, site)
    assert product.reason == ""
    index = np.sort(np.random.default_rng(0).permutation(product.positions)[:20])
    inner = np.asarray(jax.tree.leaves(apply_fn({"w": jnp.asarray(w)}, jnp.asarray(x)))[0])
    raw = (
        inner.transpose(_back(apply_fn, graph, site)) if graph.outputs[0] != site.output else inner
    )
    want = product.outputs(jnp.asarray(raw), index)
    shape = graph.shape(site.weight)
    matrix = product.matrix(w)
    rows = product.inputs((x + zero).astype(np.int8), zero, index)
    got = np.einsum("rgk,gko->rgo", rows, matrix).reshape(len(index), -1)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(product.weight(matrix, shape), w)


def _back(apply_fn, graph, site) -> tuple[int, ...]:
    """The axes of the model's output in the order of the site's own output."""
    (eqn,) = graph.consumers[site.output]
    assert eqn.name == "transpose"
    return tuple(np.argsort(eqn.params["permutation"]))


def integers(shape, seed) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float32)


@pytest.mark.parametrize("zero", [0, -100])
@pytest.mark.parametrize("name", CONVS)
def test_convolution(name, zero):
    shape, kernel, options = CONVS[name]
    options = {"layout": ("NHWC", "HWIO", "NHWC"), "strides": (1,) * (len(shape) - 2), **options}
    layout, strides = options.pop("layout"), options.pop("strides")
    padding = options.pop("padding")

    def apply_fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], strides, padding, dimension_numbers=layout, **options
        )

    check(apply_fn, integers(shape, 1), integers(kernel, 2), zero)


@pytest.mark.parametrize("name", DOTS)
def test_dot(name):
    spec, shape, weight = DOTS[name]

    def apply_fn(p, x):
        return jnp.einsum(spec, *((p["w"], x) if spec.startswith("ok") else (x, p["w"])))

    check(apply_fn, integers(shape, 1), integers(weight, 2), -100)


def test_a_weight_with_batch_axes_has_no_such_form():
    model = trace_model(
        lambda p, x: jnp.einsum("bnk,bko->bno", x, p["w"]),
        {"w": np.ones((2, 4, 3), np.float32)},
        (np.ones((2, 5, 4), np.float32),),
    )
    (site,) = model.sites
    assert SiteProduct(model.graph, site).reason == "its weight has batch axes"
