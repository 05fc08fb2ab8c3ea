"""Dynamic int8 against NumPy: the scales of rows and samples, every form of dot and convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import networks, reference


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


def fake_lopsided_rows(x, axes):
    """Rows on grids from their least to their largest value, 0 within, in float64."""
    x = np.asarray(x).astype(np.float32)
    low, high = (f(x, axis=axes, keepdims=True, initial=0) for f in (np.min, np.max))
    half = high / np.float32(2) - low / np.float32(2)
    scale = np.maximum(half * np.float32(2 / 255), np.float32(2.0**-126))
    inverse = np.float32(1) / scale
    zero_point = np.clip(-128 - np.rint(low * inverse), -128, 127)
    int8 = np.clip(np.rint(x * inverse) + zero_point, -128, 127)
    return (int8 - zero_point).astype(np.float64) * scale


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
    x = fake_lopsided_rows(inputs[name], contracted)
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


@pytest.fixture(scope="module")
def convs():
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


def chain(p, x):
    """Two dots behind each other, and a third that reads what the second reads."""
    h = jax.nn.gelu(x @ p["first"])
    return (h @ p["second"]) @ p["last"] + h @ p["aside"]


CHAIN = {
    "first": networks.images(0, (6, 8)) / 4,
    "second": networks.images(1, (8, 5)) / 4,
    "last": networks.images(2, (5, 3)) / 4,
    "aside": networks.images(3, (8, 3)) / 4,
}
ROWS = networks.images(4, (32, 6)) * np.geomspace(0.1, 10, 32, dtype=np.float32)[:, None]


def quantized_chain(patterns, **settings):
    rules = [jaxquant.Rule(pattern, dynamic=True) for pattern in patterns]
    return jaxquant.quant_post(CHAIN, chain, [ROWS], rules=rules, progress=False, **settings)


def test_a_rule_for_all_dots_is_the_dynamic_mode():
    qparams, qapply = quantized_chain(["*"], recover=())
    wanted, dynamic = jaxquant.quant_dynamic(CHAIN, chain, ROWS, progress=False)
    np.testing.assert_array_equal(qapply(qparams, ROWS), dynamic(wanted, ROWS))
    assert qparams["tensors"] == {}
    assert {row["mode"] for row in qapply.report().rows} == {"int8 (dynamic)"}
    assert qapply.report().tensors == dynamic.report().tensors


def test_all_but_some_dots_are_dynamic_by_the_configuration():
    qparams, qapply = quantized_chain([], activation_quantize_type="dynamic", recover=())
    by_rule, other = quantized_chain(["*"], recover=())
    np.testing.assert_array_equal(qapply(qparams, ROWS), other(by_rule, ROWS))
    _, qapply = jaxquant.quant_post(
        CHAIN, chain, [ROWS], activation_quantize_type="dynamic", progress=False,
        rules=[jaxquant.Rule("last", dynamic=False)],
    )  # fmt: skip
    modes = {row["name"]: row["mode"] for row in qapply.report().rows}
    assert modes.pop("last") == "int8"
    assert set(modes.values()) == {"int8 (dynamic)"}
    with pytest.raises(ValueError, match=r"of jaxquant\.quant_post"):
        jaxquant.quant_dynamic(CHAIN, chain, ROWS, activation_quantize_type="dynamic")


@pytest.mark.parametrize("recover", [(), ("equalization",)])
def test_a_rule_for_one_dot_leaves_the_others_on_grids_of_the_plan(recover):
    """`aside` reads the tensor that `second` reads, each in its own way."""
    qparams, qapply = quantized_chain(["second"], recover=recover, algo="abs_max")
    rows = {row["name"]: row for row in qapply.report().rows}
    modes = {name: row["mode"] for name, row in rows.items()}
    assert modes == {
        "first": "int8",
        "second": "int8 (dynamic)",
        "last": "int8",
        "aside": "int8",
    }
    assert rows["second"]["inputs"] == []
    stored = {
        name: np.asarray(leaf["int8"]) * np.asarray(leaf["scale"], np.float64)
        for name, leaf in qparams["params"].items()
    }
    grids = {name: grid["scale"] for name, grid in qparams["tensors"].items()}
    zero_points = {tensor.name: tensor.zero_point for tensor in qapply.plan.tensors}

    def on_grid(name, x):
        (entry,) = rows[name]["inputs"]
        scale = np.asarray(grids[entry], np.float64)
        steps = np.clip(np.rint(x / scale) + zero_points[entry], -128, 127) - zero_points[entry]
        return steps * scale  # what it is divided by is in the weight

    h = np.asarray(jax.nn.gelu(jnp.float32(on_grid("first", ROWS) @ stored["first"])))
    second = fake_lopsided_rows(h, (1,)) @ stored["second"]
    factors = np.asarray(grids[rows["aside"]["inputs"][0]], np.float64)
    tensor = next(t for t in qapply.plan.tensors if t.name == rows["aside"]["inputs"][0])
    aside = (on_grid("aside", h) / (factors / tensor.scale)) @ stored["aside"]
    expected = on_grid("last", second) @ stored["last"] + aside
    np.testing.assert_allclose(qapply(qparams, ROWS), expected, rtol=0, atol=2e-4)


def test_single_dynamic_dots_do_not_hang_on_the_batch():
    qparams, qapply = quantized_chain(["second", "last"])
    whole = qapply(qparams, ROWS)
    np.testing.assert_allclose(qapply(qparams, ROWS[3:8]), whole[3:8], rtol=0, atol=1e-5)
    each = jax.vmap(lambda row: qapply(qparams, row[None])[0])(ROWS)
    np.testing.assert_allclose(each, whole, rtol=0, atol=1e-5)
    assert qapply(qparams, ROWS[:0]).shape == (0, 3)


def test_not_a_number_goes_through_a_dynamic_dot_into_a_static_one():
    qparams, qapply = quantized_chain(["first", "second"])
    found = np.asarray(qapply(qparams, jnp.asarray(ROWS).at[2, 1].set(jnp.nan)))
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_a_weight_that_a_dynamic_dot_shares_is_not_equalized():
    def tied(p, x):
        return jax.nn.gelu(x @ p["w"]) @ p["w"] + x @ p["v"]

    params = {"w": networks.images(0, (6, 6)) / 4, "v": networks.images(1, (6, 6)) / 4}
    x = ROWS * np.geomspace(0.05, 5, 6, dtype=np.float32)
    qparams, qapply = jaxquant.quant_post(
        params, tied, [x], recover=("equalization",), progress=False,
        rules=[jaxquant.Rule("w", dynamic=True)],
    )  # fmt: skip
    reference = np.asarray(tied(params, x))
    noise = np.square(reference - qapply(qparams, x)).sum()
    assert 10 * np.log10(np.square(reference).sum() / noise) > 25


def test_dynamic_dots_inside_a_scan_are_those_of_a_python_loop():
    layers = [networks.images(seed, (6, 6)) / 3 for seed in range(3)]

    def layer(x, w):
        return x + jax.nn.gelu(x) @ w, None

    def scanned(p, x):
        return jax.lax.scan(layer, x, p["w"])[0]

    def unrolled(p, x):
        for w in p:
            x, _ = layer(x, w)
        return x

    settings = {"rules": [jaxquant.Rule("*", dynamic=True)], "recover": (), "progress": False}
    ours = jaxquant.quant_post({"w": np.stack(layers)}, scanned, [ROWS], **settings)
    theirs = jaxquant.quant_post(layers, unrolled, [ROWS], **settings)
    np.testing.assert_allclose(ours[1](ours[0], ROWS), theirs[1](theirs[0], ROWS), rtol=1e-6)
    assert [row["mode"] for row in ours[1].report().rows] == ["int8 (dynamic)"]


def test_a_model_with_single_dynamic_dots_is_saved(tmp_path):
    qparams, qapply = quantized_chain(["second"])
    jaxquant.save_quantized_model(tmp_path / "model.jaxquant", qparams, qapply, progress=False)
    loaded, reloaded = jaxquant.load_quantized_model(tmp_path / "model.jaxquant")
    np.testing.assert_array_equal(reloaded(loaded, ROWS), qapply(qparams, ROWS))
    assert "int8 (dynamic)" in {row["mode"] for row in reloaded.report().rows}


def test_what_neither_a_dot_nor_a_convolution_reads_is_not_scaled_in_the_call():
    def net(p, x):
        return jax.nn.softmax(x @ p["k"])

    rule = jaxquant.Rule("kind:softmax", dynamic=True)
    settings = {"rules": [rule], "is_full_quantize": True, "progress": False}
    params, x = {"k": networks.images(0, (2, 4))}, networks.images(1, (5, 2))
    with pytest.raises(ValueError, match=r"'kind:softmax' sets dynamic, which is of .* softmax"):
        jaxquant.quant_post(params, net, [x], **settings)
    with pytest.raises(ValueError, match="dynamic is True or False, got 'yes'"):
        jaxquant.Rule("k", dynamic="yes")


def test_adaround_leaves_what_is_scaled_in_the_call():
    qparams, qapply = quantized_chain(["*"], recover=("adaround",))
    plain, _ = quantized_chain(["*"], recover=())
    jax.tree.map(np.testing.assert_array_equal, qparams["params"], plain["params"])
    assert qapply.report().summary["recovery"]["adaround"].startswith("0 of 4 sites")


@pytest.mark.parametrize("patterns", [["a"], ["h"], ["a", "h"]])
def test_single_dynamic_dots_of_a_full_model_whose_input_is_added_too(patterns):
    def residual(p, x):
        return jax.nn.relu(x @ p["a"] + x) @ p["h"]

    params = {"a": networks.images(0, (6, 6)) / 4, "h": networks.images(1, (6, 3)) / 4}
    rules = [jaxquant.Rule(pattern, dynamic=True) for pattern in patterns]
    qparams, qapply = jaxquant.quant_post(
        params, residual, [ROWS], is_full_quantize=True, rules=rules, progress=False
    )
    modes = {row["name"]: row["mode"] for row in qapply.report().rows}
    assert {modes[pattern] for pattern in patterns} == {"int8 (dynamic)"}
    reference = np.asarray(residual(params, ROWS))
    noise = np.square(reference - np.asarray(qapply(qparams, ROWS))).sum()
    assert 10 * np.log10(np.square(reference).sum() / noise) > 25
