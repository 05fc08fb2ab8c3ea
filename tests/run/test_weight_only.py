"""Weights stored as integers: dots, convolutions and embeddings in float on what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.plan.groups import group_layout
from jaxquant.weights.groups import quantize_groups, unpack
from tests import networks
from tests.weights.test_groups import fake_groups

# name: (shape of x, shape of w, channel axes of w, function)
SITES = {
    "dense": ((3, 11), (11, 5), (1,), lambda x, w: x @ w),
    "heads": ((2, 3, 2, 3), (2, 3, 5), (2,), lambda x, w: jnp.einsum("bthd,hdo->bto", x, w)),
    "apart": ((3, 2, 3), (2, 4, 3), (1,), lambda x, w: jnp.einsum("bij,ioj->bo", x, w)),
    "experts": ((3, 2, 7), (3, 7, 5), (0, 2), lambda x, w: jnp.einsum("ebk,eko->ebo", x, w)),
    "ragged": ((6, 7), (3, 7, 5), (0, 2),
               lambda x, w: lax.ragged_dot(x, w, jnp.array([2, 0, 4], jnp.int32))),
    "left": ((7, 3), (5, 7), (0,), lambda x, w: w @ x),
    "transposed": ((3, 7), (5, 7), (0,), lambda x, w: x @ w.T),
    "conv": ((2, 5, 5, 3), (3, 3, 3, 4), (3,),
             lambda x, w: lax.conv_general_dilated(
                 x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))),
    "grouped": ((2, 4, 5, 5), (6, 2, 3, 3), (0,),
                lambda x, w: lax.conv_general_dilated(
                    x, w, (1, 1), "VALID", feature_group_count=2)),
    "depthwise": ((2, 5, 5, 3), (3, 3, 1, 3), (3,),
                  lambda x, w: lax.conv_general_dilated(
                      x, w, (1, 1), "SAME", feature_group_count=3,
                      dimension_numbers=("NHWC", "HWIO", "NHWC"))),
}  # fmt: skip
IDS = jnp.array([[0, 3, 3], [6, 5, -1]])


def apply_fn(p, x):
    out = {n: case[3](x[n], p[n]["w"]) for n, case in SITES.items()}
    out["embed"] = jnp.take(p["embed"]["table"], x["ids"], axis=0)
    out["logits"] = out["embed"] @ p["embed"]["table"].T
    return out


PARAMS = {n: {"w": networks.images(i, c[1])} for i, (n, c) in enumerate(SITES.items())}
PARAMS["dense"]["w"] = PARAMS["dense"]["w"].at[:, 2].set(0)
PARAMS["embed"] = {"table": networks.images(30, (7, 5))}
INPUTS = {n: networks.images(10 + i, c[0]) for i, (n, c) in enumerate(SITES.items())}
INPUTS["ids"] = IDS


@pytest.fixture(scope="module", params=[(8, None), (4, None), (8, 4), (4, 4)], ids=str)
def quantized(request):
    bits, group_size = request.param
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), INPUTS)
    every = [jaxquant.Rule("*", weight_bits=bits)]  # the smallest weights too
    qparams, qapply = jaxquant.quant_weights(
        PARAMS, apply_fn, shapes, weight_bits=bits, group_size=group_size, rules=every
    )
    return bits, group_size, qparams, qapply


def fakes(bits, group_size):
    fake = {n: {"w": fake_groups(PARAMS[n]["w"], c[2], group_size, bits)} for n, c in SITES.items()}
    fake["embed"] = {"table": fake_groups(PARAMS["embed"]["table"], (0,), group_size, bits)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), fake)


def test_equals_the_float_model_on_rounded_weights(quantized):
    bits, group_size, qparams, qapply = quantized
    found = qapply(qparams, INPUTS)
    expected = jax.jit(apply_fn)(fakes(bits, group_size), INPUTS)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert not np.asarray(found["dense"])[:, 2].any()


def test_bytes_and_report(quantized):
    bits, _, qparams, qapply = quantized
    report = qapply.report()
    assert [row["name"] for row in report.rows] == [*SITES, "embed:1", "embed"]
    assert {row["status"] for row in report.rows} == {"int8"}
    assert {row["mode"] for row in report.rows} == {f"int{bits} weights"}
    entry = f"int{bits}"
    weights = [qparams["params"][n][k] for n, k in [*((n, "w") for n in SITES), ("embed", "table")]]
    assert all(set(weight) == {entry, "scale"} for weight in weights)  # a tied one is stored once
    assert all(w[entry].dtype == (jnp.int8 if bits == 8 else jnp.uint8) for w in weights)
    assert report.summary["bytes_after"] == sum(x.nbytes for w in weights for x in w.values())
    assert qparams["sites"] == qparams["tensors"] == {}


def test_four_bits_take_half_the_bytes():
    params, x = {"w": networks.images(0, (256, 64))}, jax.ShapeDtypeStruct((1, 256), jnp.float32)
    _, qapply = jaxquant.quant_weights(
        params, lambda p, x: x @ p["w"], x, weight_bits=4, group_size=128
    )
    summary = qapply.report().summary
    assert summary["bytes_before"] == 256 * 64 * 4
    assert summary["bytes_after"] == 256 * 64 // 2 + 2 * 64 * 2  # and scales of bfloat16


def test_an_index_out_of_range_gives_nan_as_in_float():
    params, ids = {"table": networks.images(0, (4, 3))}, jnp.array([1, 9])
    qparams, qapply = jaxquant.quant_weights(
        params, lambda p, i: jnp.take(p["table"], i, axis=0), ids[:1], weight_bits=4
    )
    found = qapply(qparams, ids)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


def test_bfloat16_jit_and_vmap():
    params = {"w": networks.images(0, (9, 4)).astype(jnp.bfloat16)}
    x = networks.images(1, (3, 9)).astype(jnp.bfloat16)
    qparams, qapply = jaxquant.quant_weights(params, lambda p, x: x @ p["w"], x)
    found = jax.jit(jax.vmap(lambda v: qapply(qparams, v)))(x)
    assert found.dtype == jnp.bfloat16
    expected = x.astype(jnp.float32) @ params["w"].astype(jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.1)


def test_what_runs_on_the_weight_is_float():
    """No integer reaches a dot: the weight is what is stored, the operation is the model's."""
    params, x = {"w": networks.images(0, (9, 4))}, networks.images(1, (3, 9))
    qparams, qapply = jaxquant.quant_weights(params, lambda p, x: x @ p["w"], x, weight_bits=4)
    qapply = qapply.with_backend("xla")
    lines = jax.jit(qapply).lower(qparams, x).as_text().splitlines()
    dots = [line for line in lines if "dot_general" in line]
    assert dots
    assert all("f32" in dot and "i8" not in dot and "i32>" not in dot for dot in dots)


def stood_for(weight, channel, group_size, bits):
    """What the integers of a matrix and their float32 scales stand for, in float64."""
    layout = group_layout(weight.shape, (channel,), group_size)
    integers, scale = quantize_groups(weight, layout, bits)
    axis, length = layout.axis, layout.shape[layout.axis]
    if bits == 4:
        integers = unpack(integers, axis, length)
    spread = np.repeat(scale.astype(np.float32), layout.size, axis=axis)
    return integers * np.take(spread, range(length), axis=axis).astype(np.float64)


@pytest.mark.parametrize("samples", [1, 3, 70])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(8, None), (4, None), (8, 8), (4, 7), (4, 32), (8, 113), (4, 300)]
)
def test_blocks_of_a_weight_give_what_all_of_it_gives(bits, group_size, samples):
    """Both orders of a matrix, with a rest behind the last whole block, against the definition."""
    params = {"w": networks.images(0, (533, 37)), "t": networks.images(3, (301, 533))}
    x = networks.images(2, (samples, 533))
    models = {"w": lambda p, x: x @ p["w"], "t": lambda p, x: x @ p["t"].T}
    for name, (model, channel) in {"w": (models["w"], 1), "t": (models["t"], 0)}.items():
        qparams, qapply = jaxquant.quant_weights(
            {name: params[name]}, model, jax.ShapeDtypeStruct(x.shape, x.dtype),
            weight_bits=bits, group_size=group_size,
        )  # fmt: skip
        fake = stood_for(params[name], channel, group_size, bits)
        expected = np.asarray(x, np.float64) @ (fake if name == "w" else fake.T)
        np.testing.assert_allclose(qapply(qparams, x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.optimized  # what is read is the compiled program
@pytest.mark.parametrize("model", [lambda p, x: x @ p, lambda p, x: x @ p.T], ids=["w", "w.T"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_not_dequantized_whole(model, bits):
    params, x = networks.images(0, (1024, 1024)), networks.images(1, (1, 1024))
    qparams, qapply = jaxquant.quant_weights(params, model, x, weight_bits=bits)
    memory = jax.jit(qapply).lower(qparams, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < params.nbytes / 8


def test_the_rows_of_a_transposed_table_are_looked_up():
    params, ids = networks.images(0, (3, 5)), jnp.array([4, 0])
    qparams, qapply = jaxquant.quant_weights(
        params, lambda p, i: jnp.take(p.T, i, axis=0) @ p, ids, group_size=2
    )
    expected = fake_groups(params.T, (0,), 2, 8)[np.asarray(ids)]
    expected = expected @ fake_groups(params, (1,), 2, 8)
    np.testing.assert_allclose(qapply(qparams, ids), expected, rtol=1e-5)
