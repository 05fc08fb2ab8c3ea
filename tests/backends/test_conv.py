"""The int8 convolution equals the reference exactly, whatever its shape, strides and layout."""

from __future__ import annotations

import functools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.backends import conv
from tests import reference
from tests.contractions import int8_conv, of_conv

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=30)

# Every example compiles; the integers are the same at any optimization level.
compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def int8_values(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 127, shape, np.int8, endpoint=True)


@st.composite
def layouts(draw: st.DrawFn, rank: int) -> lax.ConvDimensionNumbers:
    axes = st.permutations(range(rank + 2))
    return lax.ConvDimensionNumbers(*(tuple(draw(axes)) for _ in range(3)))


@st.composite
def convolutions(
    draw: st.DrawFn, depthwise: bool = False, ranks: tuple[int, ...] = (1, 2, 3)
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """The two shapes of a convolution and its parameters, empty outputs included."""
    rank = draw(st.sampled_from(ranks))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    groups = draw(st.integers(2, 5) if depthwise else st.sampled_from((1, 1, 2, 3)))
    per_group = 1 if depthwise else draw(st.integers(1, 3))
    outputs = groups * (1 if depthwise else draw(st.integers(1, 3)))
    spatial, window = each(1, 5 if rank < 3 else 4), each(1, 3)
    dilated = not depthwise and draw(st.booleans())
    lhs_dilation = each(1, 3) if dilated else (1,) * rank
    padding = []
    for size, dilation in zip(spatial, lhs_dilation):
        low = draw(st.integers(-2, 3))
        extent = (size - 1) * dilation + 1
        low = max(low, -extent)
        padding.append((low, max(draw(st.integers(-2, 3)), -extent - min(low, 0), -extent - low)))
    numbers = draw(layouts(rank))
    lhs = _arranged((draw(st.integers(1, 3)), groups * per_group, *spatial), numbers.lhs_spec)
    rhs = _arranged((outputs, per_group, *window), numbers.rhs_spec)
    params = {
        "window_strides": each(1, 3),
        "padding": tuple(padding),
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": each(1, 2),
        "dimension_numbers": numbers,
        "feature_group_count": groups,
    }
    return lhs, rhs, params


def _arranged(shape: tuple[int, ...], spec: tuple[int, ...]) -> tuple[int, ...]:
    """The shape whose axis `spec[k]` has size `shape[k]`."""
    return tuple(shape[spec.index(axis)] for axis in range(len(shape)))


def assert_exact(lhs: tuple[int, ...], rhs: tuple[int, ...], params: dict[str, Any]) -> None:
    x, kernel = int8_values(0, lhs), int8_values(1, rhs)
    got = compile_fast(lambda x, kernel: int8_conv(x, kernel, params))(x, kernel)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got), reference.conv(x, kernel, **params))


@settings
@hypothesis.given(convolutions())
def test_equals_the_reference(case):
    assert_exact(*case)


@settings
@hypothesis.given(convolutions(depthwise=True))
def test_depthwise_equals_the_reference(case):
    assert_exact(*case)


# Compiled for CPU, where convolutions of int8 that are dilated with zeros give wrong sums.
EMULATED = {"cuda": (conv.on_gpu, np.int8), "tpu": (conv.on_any_tpu, np.int32)}


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_many_channels_of_a_group_each_on_a_tpu(strides):
    """More channels than its matrix unit has rows are a sum over taps, or stay groups."""
    params = {
        "window_strides": strides, "padding": ((1, 1), (1, 0)), "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1), "dimension_numbers": NHWC, "feature_group_count": 129,
    }  # fmt: skip
    x, kernel = int8_values(0, (1, 4, 5, 129)), int8_values(1, (3, 3, 1, 129))
    got = conv.on_any_tpu(x.astype(np.int32), kernel.astype(np.int32), of_conv(params), 0)
    np.testing.assert_array_equal(got, reference.conv(x, kernel, **params))


@pytest.mark.parametrize("platform", EMULATED)
@hypothesis.settings(settings, max_examples=20)
@hypothesis.given(st.booleans().flatmap(convolutions), st.sampled_from((0, -128, 5)))
def test_forms_of_other_platforms_equal_the_reference(platform, case, zero_point):
    lhs, rhs, params = case
    form, dtype = EMULATED[platform]
    x, kernel = int8_values(0, lhs), int8_values(1, rhs)
    contraction = of_conv(params)
    got = compile_fast(lambda x, kernel: form(x, kernel, contraction, zero_point))(
        x.astype(dtype), kernel.astype(dtype)
    )
    assert got.dtype == jnp.int32
    want = reference.conv(x.astype(int) - zero_point, kernel, **params)
    kept = zero_point * kernel.astype(int).sum(
        tuple(np.delete(range(kernel.ndim), params["dimension_numbers"].rhs_spec[0]))
    )
    along = [-1 if a == params["dimension_numbers"].out_spec[1] else 1 for a in range(got.ndim)]
    np.testing.assert_array_equal(got, want + kept.reshape(along))


@pytest.mark.parametrize("platform", conv.FORMS)
def test_an_export_holds_the_form_of_its_platform(platform: str):
    params = {
        "window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1), "dimension_numbers": NHWC, "feature_group_count": 2,
    }  # fmt: skip
    shapes = [jax.ShapeDtypeStruct(s, jnp.int8) for s in ((8, 8, 8, 8), (3, 3, 4, 6))]
    convolve = jax.jit(lambda x, kernel: int8_conv(x, kernel, params))
    text = jax.export.export(convolve, platforms=[platform])(*shapes).mlir_module()
    results = [line.rpartition("->")[2] for line in text.splitlines() if "convolution" in line]
    assert ["f32" in result for result in results] == [platform in ("cuda", "rocm")]


@settings
@hypothesis.given(convolutions(), st.integers(2, 3), st.integers(2, 3))
def test_depthwise_with_several_outputs_per_channel(case, groups, multiplier):
    lhs, rhs, params = case
    spec = params["dimension_numbers"]
    lhs, rhs = list(lhs), list(rhs)
    lhs[spec.lhs_spec[1]] = groups
    rhs[spec.rhs_spec[0]], rhs[spec.rhs_spec[1]] = groups * multiplier, 1
    assert_exact(tuple(lhs), tuple(rhs), {**params, "feature_group_count": groups})


PLAIN = {
    "window_strides": (1,),
    "lhs_dilation": (1,),
    "rhs_dilation": (1,),
    "dimension_numbers": lax.ConvDimensionNumbers((0, 1, 2), (0, 1, 2), (0, 1, 2)),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("size", "window", "padding", "stride", "dilation"),
    [
        (3, 4, (0, 0), 1, 1),
        (3, 5, (0, 0), 1, 1),  # the window is wider than the input by more than one
        (3, 5, (0, 0), 2, 1),
        (2, 3, (0, 0), 1, 3),
        (3, 1, (-1, -2), 1, 1),  # nothing is left of the input
        (3, 3, (-3, 0), 1, 1),
        (0, 2, (0, 0), 1, 1),
    ],
)
def test_empty_output(groups, size, window, padding, stride, dilation):
    params = {
        **PLAIN,
        "window_strides": (stride,),
        "rhs_dilation": (dilation,),
        "padding": (padding,),
        "feature_group_count": groups,
    }
    lhs, rhs = (2, 2, size), (2, 2 // groups, window)
    x, kernel = jnp.zeros(lhs, jnp.int8), jnp.zeros(rhs, jnp.int8)
    assert int8_conv(x, kernel, params).size == 0
    assert_exact(lhs, rhs, params)


NHWC = lax.conv_dimension_numbers((0,) * 4, (0,) * 4, ("NHWC", "HWIO", "NHWC"))
NCHW = lax.conv_dimension_numbers((0,) * 4, (0,) * 4, ("NCHW", "OIHW", "NCHW"))
NHC = lax.conv_dimension_numbers((0,) * 3, (0,) * 3, ("NHC", "HIO", "NHC"))
NDHWC = lax.conv_dimension_numbers((0,) * 5, (0,) * 5, ("NDHWC", "DHWIO", "NDHWC"))
# As many channels as XLA's own kernels take: fewer run in other code.
WIDE: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "channels last": ((2, 6, 6, 64), (3, 3, 64, 32), {"dimension_numbers": NHWC}),
    "channels first": ((2, 64, 6, 6), (32, 64, 3, 3), {"dimension_numbers": NCHW}),
    "transposed": ((2, 4, 4, 64), (4, 4, 64, 32),
                   {"dimension_numbers": NHWC, "lhs_dilation": (2, 2),
                    "padding": ((2, 1), (2, 1))}),
    "transposed, channels first": ((2, 64, 4, 4), (32, 64, 4, 4),
                                   {"dimension_numbers": NCHW, "lhs_dilation": (2, 2),
                                    "padding": ((2, 1), (2, 1))}),
    "cropped": ((2, 6, 6, 64), (3, 3, 64, 32),
                {"dimension_numbers": NHWC, "padding": ((-1, 2), (1, -1))}),
    "dilated": ((2, 8, 8, 64), (3, 3, 64, 32),
                {"dimension_numbers": NHWC, "rhs_dilation": (2, 2)}),
    "strided": ((2, 7, 7, 64), (3, 3, 64, 32),
                {"dimension_numbers": NHWC, "window_strides": (2, 2)}),
    "grouped": ((2, 6, 6, 64), (3, 3, 32, 64),
                {"dimension_numbers": NHWC, "feature_group_count": 2}),
    "one axis": ((2, 12, 64), (5, 64, 32), {"dimension_numbers": NHC}),
    "three axes": ((1, 4, 4, 4, 32), (3, 3, 3, 32, 32),
                   {"dimension_numbers": NDHWC, "window_strides": (2, 1, 1),
                    "rhs_dilation": (1, 2, 1)}),
    "two outputs a channel": ((2, 6, 6, 64), (3, 3, 1, 128),
                              {"dimension_numbers": NHWC, "feature_group_count": 64}),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDE)
def test_as_xla_optimizes_it(case):
    """Compiled as a user would, with many channels; a rewritten form could be folded back."""
    lhs, rhs, given = WIDE[case]
    rank = len(lhs) - 2
    params = {
        "window_strides": (1,) * rank, "padding": ((1, 1),) * rank, "lhs_dilation": (1,) * rank,
        "rhs_dilation": (1,) * rank, "feature_group_count": 1, **given,
    }  # fmt: skip
    x, kernel = int8_values(0, lhs), int8_values(1, rhs)
    expected = reference.conv(x, kernel, **params)
    got = jax.jit(lambda x, kernel: int8_conv(x, kernel, params))(x, kernel)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("window", [64, 65])
def test_depthwise_at_and_above_the_tap_limit(window):
    params = {**PLAIN, "padding": ((3, 2),), "feature_group_count": 3}
    assert_exact((2, 3, 66), (3, 1, window), params)


def test_largest_values_do_not_wrap():
    """Every product is 127², far beyond int8 and int16."""
    params = {**PLAIN, "padding": ((0, 0),), "feature_group_count": 1}
    x, kernel = jnp.full((1, 300, 3), 127, jnp.int8), jnp.full((1, 300, 3), -127, jnp.int8)
    assert int8_conv(x, kernel, params).item() == -900 * 127**2
    params["feature_group_count"] = 300
    kernel = jnp.full((300, 1, 3), -127, jnp.int8)
    assert set(np.unique(int8_conv(x, kernel, params))) == {-3 * 127**2}


@hypothesis.settings(derandomize=True, deadline=None, max_examples=3)
@hypothesis.given(st.lists(convolutions(), min_size=6, max_size=6), st.integers(0, 9))
def test_quantized_model_equals_the_reference(cases, seed):
    """`quant_post` of six convolutions at once; each output is that of its own qparams."""
    rng = np.random.default_rng(seed)
    cases = {f"conv{i}": case for i, case in enumerate(cases)}
    x = {name: rng.normal(size=lhs).astype(np.float32) for name, (lhs, _, _) in cases.items()}
    params = {
        name: {
            "kernel": rng.normal(size=rhs).astype(np.float32),
            "bias": rng.normal(size=rhs[p["dimension_numbers"].rhs_spec[0]]).astype(np.float32),
        }
        for name, (_, rhs, p) in cases.items()
    }

    def apply_fn(params, x):
        outputs = {}
        for name, (_, _, p) in cases.items():
            y = lax.conv_general_dilated(x[name], params[name]["kernel"], **p)
            along = [-1 if a == p["dimension_numbers"].out_spec[1] else 1 for a in range(y.ndim)]
            outputs[name] = y + params[name]["bias"].reshape(along)
        return outputs

    kinds = ("conv2d", "depthwise_conv2d", "conv2d_transpose")
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [x], quantizable_op_type=kinds, **reference.QUANTIZER
    )
    assert {row["status"] for row in qapply.report().rows} == {"int8"}
    got = qapply(qparams, x)
    for name, (_, _, p) in cases.items():
        quantized = reference.quantize(x[name], reference.inv_scale(x[name]))
        accumulator = reference.conv(quantized, qparams["params"][name]["kernel"]["int8"], **p)
        axes = [p["dimension_numbers"].out_spec[1]]
        want = reference.epilogue(accumulator, qparams["sites"][name], axes)
        np.testing.assert_allclose(got[name], want, rtol=2e-6, atol=2e-5, err_msg=name)


KINDS = {
    "conv2d": ((1, 1), 1),
    "depthwise_conv2d": ((1, 1), 4),
    "conv2d_transpose": ((2, 2), 1),
}


def test_kinds(rng):
    """A transposed convolution stays float unless it is asked for."""
    x = rng.normal(size=(2, 5, 5, 4)).astype(np.float32)
    params = {
        name: {"kernel": rng.normal(size=(3, 3, 4 // groups, 4)).astype(np.float32)}
        for name, (_, groups) in KINDS.items()
    }

    def apply_fn(params, x):
        return [
            lax.conv_general_dilated(
                x,
                params[name]["kernel"],
                (1, 1),
                ((0, 0), (0, 0)),
                lhs_dilation=dilation,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            for name, (dilation, groups) in KINDS.items()
        ]

    _, qapply = jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER)
    rows = qapply.report().rows
    assert [row["kind"] for row in rows] == [row["name"] for row in rows] == list(KINDS)
    assert [row["status"] for row in rows] == ["int8", "int8", "float"]
    assert "quantizable_op_type" in rows[2]["reason"]


def operations(text: str) -> list[str]:
    """The lines of a StableHLO module that are a convolution or a dot."""
    return [
        line
        for line in text.splitlines()
        if re.search(r"stablehlo\.(convolution|dot_general|dot)\b", line)
    ]


def test_lowered_operations_are_integer(rng):
    """Convolutions and dots take i8 and give i32, and no other is left."""
    params = {
        "a": {"kernel": rng.normal(size=(3, 3, 3, 8)), "bias": rng.normal(size=(8,))},
        "b": {"kernel": rng.normal(size=(9, 9, 1, 8))},  # depthwise, more taps than 64
        "c": {"kernel": rng.normal(size=(3, 3, 4, 6))},
        "d": {"kernel": rng.normal(size=(6, 10)), "bias": rng.normal(size=(10,))},
        "e": {"kernel": rng.normal(size=(10, 7))},
    }
    params = jax.tree.map(lambda x: x.astype(np.float32), params)

    def conv(x, kernel, groups):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def apply_fn(p, x):
        x = jax.nn.relu6(conv(x, p["a"]["kernel"], 1) + p["a"]["bias"])
        x = jax.nn.silu(conv(x, p["b"]["kernel"], 8))
        x = conv(x, p["c"]["kernel"], 2).mean((1, 2))
        x = jax.nn.gelu(x @ p["d"]["kernel"] + p["d"]["bias"])
        return jnp.einsum("nk,kc->cn", x, p["e"]["kernel"])

    x = rng.normal(size=(2, 12, 12, 3)).astype(np.float32)
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER)
    found = operations(jax.jit(qapply.with_backend("xla")).lower(qparams, x).as_text())
    assert len(found) == len(params)
    signature = re.compile(r": \(tensor<[\dx]*xi8>, tensor<[\dx]*xi8>\) -> tensor<[\dx]*xi32>")
    for line in found:
        assert signature.search(line), line
    before = operations(jax.jit(apply_fn).lower(params, x).as_text())
    assert len(before) == len(params)
    assert not any(signature.search(line) for line in before)
