"""One site as a model: its float form is the site, its int8 form is integer and comes close."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import native
from jaxquant.graph.model import trace_model
from jaxquant.plan.bind import bind
from jaxquant.tune.one_site import (
    Surroundings,
    both_forms,
    key,
    one_site,
    quantized,
    surroundings,
)
from tests import networks

X = jnp.ones((2, 8, 8, 6))
ALONE = Surroundings((False,), (False,), False)


def conv(kernel, x, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return jax.lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def resized(params, x):
    return jax.image.resize(x, (2, 16, 16, 6), "bilinear")


FORMS = {
    "convolution": (conv, jnp.ones((3, 3, 6, 8)), X),
    "depthwise": (lambda w, x: conv(w, x, feature_group_count=6), jnp.ones((3, 3, 1, 6)), X),
    "transposed": (
        lambda w, x: conv(w, x, lhs_dilation=(2, 2), padding=((1, 2), (1, 2))),
        jnp.ones((3, 3, 6, 4)), X),
    "dot": (lambda w, x: x @ w, jnp.ones((6, 5)), X),
    "weight first": (lambda w, x: w @ x, jnp.ones((5, 7)), jnp.ones((7, 3))),
    "bfloat16": (
        lambda w, x: x @ w, jnp.ones((6, 5), jnp.bfloat16), jnp.ones((4, 6), jnp.bfloat16)),
    "dot of activations": (
        lambda w, x: jnp.einsum("abcd,abed->abce", x * w, x), jnp.ones(6), X),
    "with itself": (lambda w, x: jnp.einsum("abcd,abed->abce", x, x) * w, jnp.ones(1), X),
    "interpolation": (resized, {}, X),
}  # fmt: skip


def dot_of(apply_fn, params, x):
    model = trace_model(apply_fn, params, (x,))
    graph = model.graph
    sites = (s for s in model.sites if s.contraction is not None)
    return graph, next(sites)


@pytest.fixture(params=["native", "xla"])
def backend(request, monkeypatch):
    if request.param == "xla":
        monkeypatch.setattr(native, "available", lambda: native.Availability(False, "a test"))
    elif not native.int8_is_faster().available:
        pytest.skip(native.int8_is_faster().reason)
    return request.param


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(("is_computed", "has_zero_point"), [(False, False), (True, True)])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_compute_the_site(form, is_computed, has_zero_point, is_quantized):
    graph, site = dot_of(*FORMS[form])
    flags = (has_zero_point,) * len(set(site.operands))
    around = Surroundings((is_computed,) * len(flags), flags, is_quantized)
    model = one_site(graph, site, around, "channel_wise_abs_max")
    if has_zero_point:
        model = model._replace(inputs=tuple(abs(x) for x in model.inputs))
    forms = both_forms(model)
    want, got = (
        program(*forms.arguments, jnp.zeros(forms.result.shape, forms.result.dtype))
        for program in (forms.in_float, forms.in_int8)
    )
    assert want.shape == got.shape == graph.shape(site.output)
    assert want.dtype == got.dtype == (jnp.int8 if is_quantized else graph.dtype(site.output))
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    assert (want**2).sum() > 1000 * ((want - got) ** 2).sum()
    _, qapply = quantized(model)
    assert [tensor.zero_point != 0 for tensor in qapply.plan.tensors] == list(flags)


@pytest.mark.parametrize("form", ["convolution", "depthwise", "dot"])
def test_the_int8_form_is_what_runs_on_the_backend(form, backend):
    graph, site = dot_of(*FORMS[form])
    forms = both_forms(one_site(graph, site, ALONE, "channel_wise_abs_max"))
    in_int8, in_float = (
        p.lower(*forms.arguments, forms.result).as_text() for p in (forms.in_int8, forms.in_float)
    )
    kernel = "jaxquant_dot" if form == "dot" else "jaxquant_conv"
    assert (kernel in in_int8) == ("packed" in forms.arguments[1]) == (backend == "native")
    assert "jaxquant_pack" not in in_int8  # that is done beforehand
    if backend == "xla" and form != "depthwise":  # that is a sum of shifted products
        assert re.search(r": \(tensor<\S+xi8>, tensor<\S+xi8>\) -> tensor<\S+xi32>", in_int8)
    assert not re.search(r"custom_call|stablehlo\.\w+ .*xi(8|32)>", in_float)


def test_equal_sites_have_equal_keys():
    def model(p, x):
        y = (x @ p["a"]) @ p["b"]
        z = jnp.matmul(y, p["c"], precision=jax.lax.Precision.HIGHEST) @ p["d"]
        return z.astype(jnp.bfloat16) @ p["e"]

    params = {name: jnp.ones((6, 6)) for name in "abc"}
    params |= {"d": jnp.ones((6, 5)), "e": jnp.ones((5, 6), jnp.bfloat16)}
    traced = trace_model(model, params, (X,))
    graph = traced.graph
    sites = {site.name: site for site in traced.sites if site.weight_path}
    keys = {name: key(graph, site, ALONE) for name, site in sites.items()}
    assert keys["a"] == keys["b"]
    assert len(set(keys.values())) == 4
    assert key(graph, sites["a"], ALONE._replace(has_zero_point=(True,))) != keys["a"]


def test_surroundings_tell_what_is_computed_before_and_quantized_behind():
    def model(p, x):
        y = conv(p["first"]["w"], jnp.transpose(x, (0, 2, 1, 3)))
        z = jax.nn.relu(conv(p["second"]["w"], jax.nn.relu(y))) + x
        return jax.nn.softmax(jax.nn.swish(z) @ p["third"]["w"])

    params = {
        "first": {"w": networks.images(1, (3, 3, 6, 6))},
        "second": {"w": networks.images(2, (1, 1, 6, 6))},
        "third": {"w": networks.images(3, (6, 5))},
    }
    x = networks.images(0, X.shape)
    x = jnp.concatenate([x, -x])  # a range that is the same on both sides
    _, qapply = networks.quantize(params, model, x, activation_quantize_type="asymmetric")
    binding = bind(trace_model(model, params, (x,)), qapply.plan)
    graph = binding.graph
    assert {s.site.name: surroundings(graph, binding, s) for s in binding.sites} == {
        "first": Surroundings((False,), (False,), True),
        "second": Surroundings((True,), (True,), True),
        "third": Surroundings((True,), (True,), False),
    }


def test_what_the_native_kernels_lack_for_its_surroundings_is_timed_by_xla():
    def model(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.lax.rev(y, (1,)) + p["b"]

    params = {"w": networks.images(1, (3, 3, 3, 8)), "b": networks.images(2, (8,))}
    x = networks.images(0, (2, 4, 4, 3))
    _, qapply = networks.quantize(params, model, x)
    binding = bind(trace_model(model, params, (x,)), qapply.plan)
    graph, (int8_site,) = binding.graph, binding.sites
    around = surroundings(graph, binding, int8_site)
    assert not around.is_native
    _, alone = quantized(one_site(graph, int8_site.site, around, "channel_wise_abs_max"))
    assert alone.backend.name == "xla"
