"""The native convolution has the reference's integers, in all of its kernels."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import native
from tests.contractions import int8_conv
from tests.native.cases import (
    Conv,
    convolutions,
    int8_values,
    needs_kernels,
    settings,
    with_variants,
)

pytestmark = needs_kernels

# Every example compiles; the integers are the same at any optimization level.
compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def assert_sums(conv: Conv, zero_point: int, unsigned: bool, varies: bool = False) -> None:
    """`varies`: the zero point is an argument of the program, not a number in it."""
    x, kernel = int8_values(0, conv.x_shape), int8_values(1, conv.kernel_shape, low=-127)
    expected = conv.sums(x, kernel, zero_point)
    if unsigned:
        x, zero_point = (x.astype(np.int16) + 128).astype(np.uint8), zero_point + 128

    @compile_fast
    def run(x: jax.Array, kernel: jax.Array, point: jax.Array) -> dict[str, jax.Array]:
        packed = native.pack_conv(kernel, conv.groups, conv.dilation)
        return with_variants(
            lambda: native.conv(
                x, packed, jnp.float32(1), zero_point=point if varies else zero_point,
                kernel_shape=conv.kernel_shape, **conv.options,
            )
        )  # fmt: skip

    assert np.abs(expected).max(initial=0) < 2**24  # float32 holds them
    for variant, got in run(x, kernel, np.int32(zero_point)).items():
        np.testing.assert_array_equal(got, expected, err_msg=variant)


zero_points = st.sampled_from((0, 0, -128, 127, 3))


class TestSums:
    @settings
    @hypothesis.given(convolutions(), zero_points, st.booleans(), st.booleans())
    def test_conv(self, conv: Conv, zero_point: int, unsigned: bool, varies: bool):
        assert_sums(conv, zero_point, unsigned, varies)

    @settings
    @hypothesis.given(convolutions(depthwise=True), zero_points, st.booleans(), st.booleans())
    def test_depthwise(self, conv: Conv, zero_point: int, unsigned: bool, varies: bool):
        assert_sums(conv, zero_point, unsigned, varies)

    @settings
    @hypothesis.given(convolutions(grouped=True), zero_points, st.booleans(), st.booleans())
    def test_grouped(self, conv: Conv, zero_point: int, unsigned: bool, varies: bool):
        assert_sums(conv, zero_point, unsigned, varies)

    @pytest.mark.parametrize(
        "conv",
        [
            Conv(2, (30, 30), (3, 3), 64, 64, padding=((1, 1), (1, 1))),
            Conv(2, (14, 14), (1, 1), 192, 80),
            Conv(1, (56, 56), (1, 1), 64, 32, strides=(2, 2)),
            Conv(1, (65, 65), (7, 7), 3, 64, strides=(2, 2), padding=((2, 3), (3, 2))),
            Conv(1, (28, 28), (5, 5), 1, 1, 144, strides=(2, 2), padding=((1, 2), (2, 1))),
            Conv(3, (1, 1), (1, 1), 260, 70),
            # Rows that fill no segment, which then runs on over their ends.
            Conv(3, (7, 7), (3, 3), 64, 48, padding=((1, 1), (1, 1))),
            Conv(2, (20, 20), (5, 3), 16, 16, padding=((2, 2), (1, 1))),
            Conv(1, (9, 5), (3, 3), 30, 33, groups=2, dilation=(2, 2), padding=((2, 2), (2, 2))),
        ],
        ids=str,
    )
    def test_shapes_of_networks(self, conv: Conv):
        assert_sums(conv, zero_point=-128, unsigned=False)

    def test_equals_the_xla_lowering(self):
        conv = Conv(2, (15, 17), (3, 3), 24, 40, strides=(2, 1), padding=((1, 1), (0, 2)))
        x, kernel = int8_values(2, conv.x_shape), int8_values(3, conv.kernel_shape)
        floats = jax.make_jaxpr(
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, conv.strides, conv.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )(x.astype(np.float32), kernel.astype(np.float32))
        expected = int8_conv(jnp.asarray(x), jnp.asarray(kernel), floats.eqns[0].params)
        got = native.conv(jnp.asarray(x), jnp.asarray(kernel), jnp.float32(1), **conv.options)
        np.testing.assert_array_equal(got, expected.astype(jnp.float32))

    def test_sums_wrap_like_int32(self):
        x = np.full((1, 1, 1, 2**18), 127, np.int8)
        kernel = np.full((1, 1, 2**18, 1), 127, np.int8)
        got = native.conv(jnp.asarray(x), jnp.asarray(kernel), jnp.float32(1), zero_point=-128)
        total = np.int64(2**18) * 255 * 127
        assert np.asarray(got).item() == np.float32(np.int32(total - 2**33))


def test_empty_batch_and_empty_output():
    kernel = jnp.ones((3, 3, 4, 8), jnp.int8)
    for shape in ((0, 5, 5, 4), (1, 2, 5, 4)):
        got = native.conv(jnp.ones(shape, jnp.int8), kernel, jnp.float32(1))
        assert got.size == 0


class TestErrors:
    x, kernel = np.zeros((1, 5, 5, 4), np.int8), np.zeros((3, 3, 4, 8), np.int8)

    def call(self, **changes: object) -> None:
        arguments = {"x": self.x, "kernel": self.kernel, "multiplier": np.float32(1)} | changes
        native.conv(**{k: jnp.asarray(v) if isinstance(v, np.ndarray) else v
                       for k, v in arguments.items()})  # fmt: skip

    def test_channels(self):
        with pytest.raises(ValueError, match="does not fit x"):
            self.call(groups=3)

    def test_no_channels(self):
        with pytest.raises(ValueError, match="nothing to sum"):
            self.call(x=self.x[..., :0], kernel=self.kernel[:, :, :0])

    def test_dtype(self):
        with pytest.raises(ValueError, match="x is float32; expected int8 or uint8"):
            self.call(x=self.x.astype(np.float32))

    def test_padding(self):
        with pytest.raises(ValueError, match="negative; slice x first"):
            self.call(padding=((-1, 0), (0, 0)))

    def test_multiplier(self):
        with pytest.raises(ValueError, match=r"multiplier is \(7,\); expected \(8,\) or \(\)"):
            self.call(multiplier=np.ones(7, np.float32))

    def test_weights_packed_for_another_kernel(self):
        packed = native.pack_conv(jnp.asarray(self.kernel))
        with pytest.raises(Exception, match="packed for another kernel shape"):
            jax.block_until_ready(
                native.conv(jnp.asarray(self.x), packed, jnp.float32(1), kernel_shape=(1, 1, 4, 8))
            )
