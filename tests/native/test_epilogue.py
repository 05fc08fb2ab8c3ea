"""The fused epilogue has the bits of the XLA lowering, and the reference's to within a step."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import native
from jaxquant.native import Requantize, Residual
from tests.native.cases import Conv, fma, int8_values, needs_kernels, requantized, with_variants

pytestmark = needs_kernels

CONVS = {
    "conv": Conv(2, (9, 11), (3, 3), 16, 40, padding=((1, 1), (1, 1))),
    "depthwise": Conv(2, (9, 11), (3, 3), 1, 1, 72, padding=((1, 1), (1, 1))),
    "few channels": Conv(2, (9, 11), (3, 3), 1, 1, 8, padding=((1, 1), (1, 1))),
    "pointwise": Conv(2, (9, 11), (1, 1), 40, 24),
}
OUTS = {
    "float32": None,
    "int8": Requantize(np.float32(21.7)),
    "int8 with a zero point": Requantize(np.float32(41.3), -128),
    "uint8": Requantize(np.float32(41.3), 0, jnp.uint8),
}
RESIDUALS = ("none", "int8", "uint8", "float32")
# More than 2 MiB of float32: what is that large is written past the caches, where it is aligned.
LARGE = {
    "pointwise": Conv(1, (96, 97), (1, 1), 20, 64),
    "strided": Conv(1, (97, 96), (1, 1), 16, 256, strides=(2, 2)),
    "odd channels": Conv(1, (97, 96), (1, 1), 16, 72),
    "odd groups": Conv(1, (97, 96), (1, 1), 8, 24, groups=4),
    "conv": Conv(3, (65, 65), (3, 3), 4, 48, padding=((1, 1), (1, 1))),
}


def arguments(conv: Conv, residual: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    channels = conv.kernel_shape[3]
    x, kernel = int8_values(0, conv.x_shape), int8_values(1, conv.kernel_shape, low=-127)
    multiplier = (rng.random(channels) * 4e-4 / math.sqrt(kernel.size / channels)).astype("f4")
    bias = rng.normal(size=channels).astype("f4")
    shape = conv.sums(x, kernel).shape
    added = {
        "none": np.zeros(shape, np.float32),
        "int8": int8_values(2, shape),
        "uint8": int8_values(2, shape).view(np.uint8),
        "float32": rng.normal(size=shape).astype("f4"),
    }[residual]
    return x, kernel, multiplier, bias, added


def run(conv: Conv, out: Requantize | None, residual: str, clamps: Any) -> Any:
    def native_conv(x: Any, kernel: Any, multiplier: Any, bias: Any, added: Any) -> Any:
        return native.conv(
            x, kernel, multiplier, bias, zero_point=-128, activation=clamps[0],
            residual=residual_of(residual, added), activation_after=clamps[1], out=out,
            **conv.options,
        )  # fmt: skip

    return jax.jit(native_conv)(*arguments(conv, residual))


def residual_of(kind: str, value: Any) -> Residual | None:
    if kind == "none":
        return None
    scales: dict[str, tuple[float, int]] = {"int8": (0.03, -7), "uint8": (0.03, 100)}
    return Residual(value, *scales.get(kind, ()))


def by_xla(conv: Conv, out: Requantize | None, residual: str, clamps: Any) -> Any:
    """The same in jnp: int32 sums, then the lines of the module's docstring."""

    @jax.jit
    def lowered(x: Any, kernel: Any, multiplier: Any, bias: Any, added: Any) -> Any:
        sums = lax.conv_general_dilated(
            x.astype(jnp.int32) + 128, kernel.astype(jnp.int32), conv.strides, conv.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=conv.groups,
        )  # fmt: skip
        y = jnp.clip(sums.astype(jnp.float32) * multiplier + bias, *clamps[0])
        found = residual_of(residual, added)
        if residual == "float32":
            y = y + added
        elif found is not None:
            centred = added.astype(jnp.int32) - found.zero_point
            y = y + centred.astype(jnp.float32) * jnp.float32(found.scale)
        y = jnp.clip(y, *clamps[1])
        if out is None:
            return y
        rounded = lax.round(y * out.inv_scale, lax.RoundingMethod.TO_NEAREST_EVEN)
        top = jnp.iinfo(out.dtype).max
        return jnp.clip(rounded + out.zero_point, top - 255, top).astype(out.dtype)

    return lowered(*arguments(conv, residual))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("conv", CONVS)
def test_bits_of_the_xla_lowering(conv: str, out: str, residual: str):
    clamps = ((0.0, 6.0), (0.0, math.inf)) if residual != "none" else ((-1.0, 2.0), (-9.0, 9.0))
    case = (CONVS[conv], OUTS[out], residual, clamps)
    got = run(*case)
    np.testing.assert_array_equal(got, by_xla(*case))
    assert len(np.unique(got)) > 20


@pytest.mark.parametrize("residual", ["none", "float32"])
@pytest.mark.parametrize("conv", LARGE)
def test_bits_of_large_outputs(conv: str, residual: str):
    case = (LARGE[conv], None, residual, ((0.0, 6.0), (0.0, math.inf)))
    expected = by_xla(*case)
    assert expected.nbytes > 1 << 21
    for variant, got in with_variants(lambda: run(*case)).items():
        np.testing.assert_array_equal(got, expected, err_msg=variant)


@pytest.mark.parametrize("channels", [80, 72, 16, 8])
def test_bits_of_large_depthwise_outputs(channels: int):
    x = int8_values(0, (2, 150, 250, channels))
    kernel = int8_values(1, (1, 1, 1, channels), low=-127)
    multiplier = np.linspace(1e-4, 3e-3, channels, dtype=np.float32)
    got = native.conv(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(multiplier), groups=channels)
    assert got.nbytes > 1 << 21
    sums = x.astype(np.float32) * kernel[0, 0, 0].astype(np.float32)
    np.testing.assert_array_equal(got, sums * multiplier)


@pytest.mark.parametrize("out", OUTS)
def test_within_a_step_of_the_reference(out: str):
    conv = CONVS["conv"]
    x, kernel, multiplier, bias, added = arguments(conv, "int8")
    y = np.clip(fma(conv.sums(x, kernel, -128), multiplier, bias), 0, 6)
    y = np.maximum(fma(added.astype(np.int64) + 7, np.float32(0.03), y), 0)
    got = np.asarray(run(conv, OUTS[out], "int8", ((0.0, 6.0), (0.0, math.inf))))
    if OUTS[out] is None:
        np.testing.assert_allclose(got, y, rtol=2e-7, atol=1e-7)
        return
    steps = np.abs(got.astype(int) - requantized(y, OUTS[out]).astype(int))
    assert steps.max() <= 1
    assert (steps > 0).mean() < 1e-3


def test_both_outputs():
    conv, out = CONVS["pointwise"], OUTS["int8"]
    x, kernel, multiplier, bias, _ = arguments(conv, "none")
    floats, bytes_ = native.conv(
        *map(jnp.asarray, (x, kernel, multiplier, bias)), out=out, float_out=True, **conv.options
    )
    alone = native.conv(*map(jnp.asarray, (x, kernel, multiplier, bias)), **conv.options)
    np.testing.assert_array_equal(floats, alone)
    np.testing.assert_array_equal(bytes_, requantized(np.asarray(floats), out))


def test_large_values_saturate():
    x = jnp.full((1, 1, 1, 4), 127, jnp.int8)
    kernel = jnp.asarray([[[[127, -127]] * 4]], jnp.int8)
    for scale in (1e6, 3e37):
        got = native.conv(x, kernel, jnp.float32(scale), out=Requantize(1.0))
        assert got.ravel().tolist() == [127, -128]


def test_rounds_half_to_even():
    x = jnp.arange(-8, 8, dtype=jnp.int8).reshape(-1, 1, 1, 1)
    kernel = jnp.ones((1, 1, 1, 1), jnp.int8)
    got = native.conv(x, kernel, jnp.float32(0.5), out=Requantize(1.0, 1))
    expected = np.rint(np.arange(-8, 8) / 2) + 1
    np.testing.assert_array_equal(got.ravel(), expected.astype(np.int8))


def test_residual_of_another_shape():
    with pytest.raises(ValueError, match=r"the residual is \(1, 3, 3, 4\), the output"):
        native.conv(
            jnp.ones((1, 3, 3, 4), jnp.int8), jnp.ones((1, 1, 4, 8), jnp.int8), jnp.float32(1),
            residual=Residual(jnp.ones((1, 3, 3, 4), jnp.float32)),
        )  # fmt: skip
