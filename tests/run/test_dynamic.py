"""Dynamic int8 against NumPy: the scales of rows and samples, every form of dot and convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import networks, reference
from tests.native.cases import needs_kernels


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def rows_to_int8(x, axes):
    """int64 `x` with a scale for everything that is not along `axes`, and the float64 scales."""
    threshold = np.abs(np.asarray(x).astype(np.float32)).max(axis=axes, keepdims=True)
    threshold = np.maximum(threshold, np.float32(127 * 2.0**-126))
    int8 = reference.quantize(x, np.float32(127) / threshold)
    return int8, threshold.astype(np.float64) / 127


def fake_rows(x, axes):
    int8, scale = rows_to_int8(x, axes)
    return int8 * scale


# name: (equation, shape of x, shape of w, contracted axes of x, channel axes of w)
DOTS = {
    "dense": ("bk,ko->bo", (4, 6), (6, 5), (1,), (1,)),
    "tokens": ("btk,ko->bto", (2, 3, 6), (6, 5), (2,), (1,)),
    "heads": ("bthd,hdo->bto", (2, 3, 2, 4), (2, 4, 5), (2, 3), (2,)),
    "left": ("ok,bk->ob", (4, 6), (5, 6), (1,), (0,)),
    "experts": ("ebk,eko->ebo", (3, 2, 6), (3, 6, 5), (2,), (0, 2)),
    "first": ("kb,ko->bo", (6, 4), (6, 5), (0,), (1,)),
    "vector": ("bk,k->b", (4, 6), (6,), (1,), ()),
}


@pytest.fixture(scope="module")
def dots():
    params = {n: networks.images(i, c[2]) for i, (n, c) in enumerate(DOTS.items())}
    params["dense"] = params["dense"].at[:, 0].set(0)  # a channel that is all zero
    inputs = {n: networks.images(9 + i, c[1]) for i, (n, c) in enumerate(DOTS.items())}
    inputs["dense"] = inputs["dense"] * jnp.array([[1e-3], [1.0], [1e3], [0.0]])
    inputs["pair"] = networks.images(20, (2, 3, 4))

    def apply_fn(p, x):
        operands = {n: (p[n], x[n]) if n == "left" else (x[n], p[n]) for n in DOTS}
        out = {n: jnp.einsum(DOTS[n][0], *operands[n]) for n in DOTS}
        out["pair"] = jnp.einsum("btk,bsk->bts", x["pair"], 2 * x["pair"])
        out["computed"] = x["tokens"] @ jnp.cos(jnp.arange(12.0)).reshape(6, 2)
        return out

    qparams, qapply = jaxquant.quant_dynamic(
        params, apply_fn, shapes(inputs), quantizable_op_type=("mul", "matmul")
    )
    return params, inputs, qparams, qapply, qapply(qparams, inputs)


@pytest.mark.parametrize("name", DOTS)
def test_dots_equal_the_reference(dots, name):
    params, inputs, _, _, out = dots
    equation, _, _, contracted, channels = DOTS[name]
    x = reference.fake_lopsided_rows(inputs[name], contracted)
    w = reference.fake_weight(params[name], channels)
    expected = np.einsum(equation, *((w, x) if name == "left" else (x, w)))
    assert out[name].dtype == jnp.float32
    np.testing.assert_allclose(out[name], expected, rtol=2e-6, atol=1e-9)


def test_a_dot_of_two_tensors_and_one_with_a_computed_weight(dots):
    _, inputs, qparams, qapply, out = dots
    a, b = fake_rows(inputs["pair"], (2,)), fake_rows(2 * inputs["pair"], (2,))
    np.testing.assert_allclose(out["pair"], np.einsum("btk,bsk->bts", a, b), rtol=2e-6, atol=1e-5)
    weight = reference.fake_weight(np.cos(np.arange(12.0)).reshape(6, 2), (1,))
    expected = fake_rows(inputs["tokens"], (2,)) @ weight
    np.testing.assert_allclose(out["computed"], expected, rtol=1e-5, atol=1e-4)
    assert {row["mode"] for row in qapply.report().rows} == {"int8 (dynamic)"}
    assert qparams["tensors"] == {}
    assert qapply.plan.tensors == ()


def test_rows_of_zeros_and_tiny_rows(dots):
    _, inputs, qparams, qapply, out = dots
    assert not np.asarray(out["dense"])[3].any()
    assert not np.asarray(out["dense"])[:, 0].any()
    tiny = {**inputs, "dense": inputs["dense"] * 0 + 1e-40, "pair": 0 * inputs["pair"]}
    found = qapply(qparams, tiny)
    assert np.isfinite(found["dense"]).all()
    assert not np.asarray(found["pair"]).any()


def test_multipliers_are_rounded_to_float32_once():
    params, x = {"w": networks.images(0, (6, 64))}, networks.images(1, (4, 6))

    def net(p, x):
        return (x @ p["w"]) / jnp.sqrt(jnp.float32(7)) * jnp.float32(0.3)

    qparams, _ = jaxquant.quant_dynamic(params, net, x, progress=False)
    scale = np.abs(np.float64(params["w"])).max(axis=0) / 127
    expected = scale / np.float64(np.sqrt(np.float32(7))) * np.float64(np.float32(0.3))
    np.testing.assert_array_equal(qparams["params"]["w"]["scale"], np.float32(scale))
    np.testing.assert_array_equal(qparams["sites"]["w"]["multiplier"], np.float32(expected))


def test_a_row_does_not_depend_on_the_others(dots):
    _, inputs, qparams, qapply, out = dots
    changed = {n: x.at[1:].multiply(1e4) if x.ndim > 1 else x for n, x in inputs.items()}
    found = qapply(qparams, changed)
    for name in ("dense", "tokens", "heads", "pair"):
        np.testing.assert_array_equal(found[name][0], out[name][0])


def test_not_a_number_stays_in_its_row(dots):
    _, inputs, qparams, qapply, out = dots
    found = qapply(qparams, {**inputs, "dense": inputs["dense"].at[1, 2].set(jnp.nan)})["dense"]
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[0], out["dense"][0])


# name: (shape of x, shape of the kernel, layout, options)
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CONVS = {
    "plain": ((2, 5, 5, 3), (3, 3, 3, 4), NHWC, {}),
    "strided": ((2, 7, 6, 3), (3, 2, 3, 4), NHWC, {"window_strides": (2, 3)}),
    "pointwise": ((2, 3, 3, 4), (1, 1, 4, 6), NHWC, {}),
    "grouped": ((2, 5, 5, 6), (3, 3, 2, 9), NHWC, {"feature_group_count": 3}),
    "depthwise": ((2, 5, 5, 4), (3, 3, 1, 4), NHWC, {"feature_group_count": 4}),
    "multiplier": ((2, 4, 4, 3), (3, 3, 1, 6), NHWC, {"feature_group_count": 3}),
    "channels first": ((2, 6, 5, 4), (4, 3, 3, 3), NCHW, {"feature_group_count": 2}),
    "dilated": ((2, 6, 6, 2), (2, 2, 2, 3), NHWC, {"rhs_dilation": (2, 1)}),
    "transposed": ((2, 3, 3, 2), (3, 3, 2, 3), NHWC, {"lhs_dilation": (2, 2)}),
    "mixed layout": ((3, 4, 2, 5), (2, 3, 3, 2), ("CHNW", "OIHW", "HNWC"), {}),
    "one axis": ((2, 6, 3), (3, 3, 4), ("NWC", "WIO", "NWC"), {}),
}


def conv_options(case):
    x, kernel, layout, options = case
    rank = len(x) - 2
    numbers = lax.conv_dimension_numbers(x, kernel, layout)
    defaults = {
        "window_strides": (1,) * rank,
        "padding": ((1, 1),) * rank,
        "lhs_dilation": (1,) * rank,
        "rhs_dilation": (1,) * rank,
        "feature_group_count": 1,
        "dimension_numbers": numbers,
    }
    return {**defaults, **options}


@pytest.fixture(scope="module", params=["xla", pytest.param("native", marks=needs_kernels)])
def convs(request):
    cases = {n: c for n, c in CONVS.items() if n != "channels first"}
    cases["channels first"] = ((2, 6, 5, 4), (4, 3, 3, 3), NCHW, {"feature_group_count": 2})
    params = {n: networks.images(i, c[1]) for i, (n, c) in enumerate(cases.items())}
    inputs = {n: networks.images(20 + i, c[0]) for i, (n, c) in enumerate(cases.items())}

    def apply_fn(p, x):
        return {
            n: lax.conv_general_dilated(x[n], p[n], **conv_options(c)) + 1.0
            for n, c in cases.items()
        }

    kinds = ("conv2d", "depthwise_conv2d", "conv2d_transpose")
    qparams, qapply = jaxquant.quant_dynamic(
        params, apply_fn, shapes(inputs), quantizable_op_type=kinds
    )
    assert qapply.report().summary["sites_int8"] == len(cases)
    qapply = qapply.with_backend(request.param)
    if request.param == "native":
        qparams = qapply.prepare(qparams, inputs)
        text = jax.jit(qapply).lower(qparams, inputs).as_text()
        assert text.count("@jaxquant_conv(") == len(cases)
    return params, inputs, qapply(qparams, inputs)


@pytest.mark.parametrize("name", CONVS)
def test_convs_equal_the_reference(convs, name):
    params, inputs, out = convs
    options = conv_options(CONVS[name])
    numbers, groups = options["dimension_numbers"], options["feature_group_count"]
    rows = np.asarray(inputs[name]).transpose(numbers.lhs_spec)
    samples, channels = rows.shape[:2]
    grouped = rows.reshape(samples, groups, channels // groups, -1)
    int8, scale = rows_to_int8(grouped, (2, 3))
    x = int8.reshape(rows.shape).transpose(np.argsort(numbers.lhs_spec))
    kernel, kernel_scale = reference.quantize_weight(params[name], (numbers.rhs_spec[0],))
    total = reference.conv(x, kernel, **options).transpose(numbers.out_spec)
    worth = np.repeat(scale.reshape(samples, groups), total.shape[1] // groups, axis=1)
    worth = (worth * kernel_scale).reshape(*total.shape[:2], *[1] * (total.ndim - 2))
    expected = (total * worth + 1).transpose(np.argsort(numbers.out_spec))
    np.testing.assert_allclose(out[name], expected, rtol=2e-6, atol=2e-6)


@pytest.fixture(scope="module")
def net():
    params, x = networks.plain_params(), networks.images()
    x = x.at[1].set(0)
    qparams, qapply = jaxquant.quant_dynamic(params, networks.plain_net, shapes(x))
    return params, x, qparams, qapply, np.asarray(qapply(qparams, x))


def test_a_sample_does_not_depend_on_its_batch(net):
    _, x, qparams, qapply, out = net
    others = qapply(qparams, x.at[1:].set(networks.images(5)[1:] * 100))
    np.testing.assert_array_equal(others[0], out[0])
    np.testing.assert_allclose(qapply(qparams, x[:1]), out[:1], rtol=0, atol=1e-5)
    each = jax.jit(jax.vmap(lambda v: qapply(qparams, v[None])[0]))(x)
    np.testing.assert_allclose(each, out, rtol=0, atol=1e-5)


def test_a_sample_of_zeros_gives_what_the_float_model_gives(net):
    params, x, _, _, out = net
    expected = networks.plain_net(params, x)
    assert np.abs(out[1] - expected[1]).max() < 0.03
    assert 10 * np.log10(np.sum(expected**2) / np.sum((expected - out) ** 2)) > 35


def test_bfloat16_params_and_inputs(net):
    params, x, _, _, _ = net
    half, y = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    qparams, qapply = jaxquant.quant_dynamic(half, head, shapes(y))
    found = qapply(qparams, y)
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(head(params, x))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.05)


def head(p, x):
    return jax.nn.relu(x[:, 0].reshape(4, 24)[:, :12] @ p["head"]["kernel"] + p["head"]["bias"])


def test_no_samples_beside_a_result_without_them():
    """A batch of none runs as it is where a result has no batch axis to cut off."""
    weight = networks.images(0, (8, 4))

    def apply_fn(p, x):
        return x @ p["w"], jnp.ones((2, 8)) @ p["w"] + x.sum()

    shape = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    qparams, qapply = jaxquant.quant_dynamic({"w": weight}, apply_fn, shape, progress=False)
    found = jax.jit(qapply)(qparams, jnp.zeros((0, 8), jnp.float32))
    assert [each.shape for each in found] == [(0, 4), (2, 4)]
