"""Rows times stored integers against NumPy, by every build of the kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import native
from jaxquant.code_tables import VALUES
from jaxquant.weights.groups import unpack
from tests.native.cases import int8_values, needs_kernels, stored, with_variants

pytestmark = needs_kernels

# What a float32 sum of so many products may be off by, of the sum of their sizes.
ROUNDING = 2.0**-24


@pytest.mark.parametrize("sums_last", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("rows", "length", "columns", "group_size", "dtype", "scales"),
    [
        (1, 70, 273, 70, jnp.float32, jnp.float32),
        (2, 33, 1, 33, jnp.float32, jnp.bfloat16),
        (3, 131, 20, 32, jnp.bfloat16, jnp.bfloat16),
        (8, 131, 79, 32, jnp.float32, jnp.bfloat16),
        (17, 129, 79, 64, jnp.float32, jnp.bfloat16),
        (40, 33, 130, 33, jnp.bfloat16, jnp.float32),
        (150, 2115, 70, 96, jnp.float32, jnp.float32),
    ],
)
def test_floats(rows, length, columns, group_size, dtype, scales, bits, sums_last):
    integers, scale, weight = stored(bits, length, columns, group_size, sums_last, scales)
    assert scale.dtype == scales
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, length)), dtype)

    @jax.jit
    def run(x, integers, scale):
        return with_variants(
            lambda: native.dot_stored(
                x, [(integers, scale)], sums_last=sums_last, group_size=group_size
            )[0]
        )

    exact = np.asarray(x, np.float64)
    bound = ROUNDING * (length + 2) * (np.abs(exact) @ np.abs(weight))
    for variant, found in run(x, integers, scale).items():
        assert found.dtype == jnp.float32
        assert (np.abs(found - exact @ weight) <= bound).all(), variant


@pytest.mark.parametrize("sums_last", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 17])
def test_scales_of_half_a_float_give_the_same_bits(rows, bits, sums_last):
    integers, halves, _ = stored(bits, 97, 70, 32, sums_last, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, 97)), jnp.float32)
    run = functools.partial(native.dot_stored, x, sums_last=sums_last, group_size=32)
    (wanted,), (found,) = (
        run([(integers, scale)]) for scale in (halves.astype(jnp.float32), halves)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("sums_last", [False, True])
@pytest.mark.parametrize(("rows", "length", "columns"), [(1, 5000, 70), (3, 31, 7), (16, 1025, 33)])
def test_integers(rows, length, columns, sums_last):
    """Sums that are beyond what a float32 holds are the same integers all the same."""
    x, weight = np.full((rows, length), -128, np.int8), np.full((length, columns), -127, np.int8)
    x[1:] = int8_values(0, (rows - 1, length))
    weight[:, 1:] = int8_values(1, (length, columns - 1), low=-127)
    matrix = jnp.asarray(weight.T if sums_last else weight)

    @jax.jit
    def run(x, matrix):
        return with_variants(
            lambda: native.dot_stored(x, [(matrix, None)], sums_last=sums_last, group_size=length)[
                0
            ]
        )

    for variant, found in run(jnp.asarray(x), matrix).items():
        np.testing.assert_array_equal(
            found, x.astype(np.int64) @ weight.astype(np.int64), err_msg=variant
        )


@pytest.mark.parametrize("sums_last", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_its_row_s_alone(bits, sums_last):
    integers, scale, weight = stored(bits, 40, 33, 40, sums_last)
    x = np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32)
    x[1, 39], x[2, 0] = np.nan, np.inf
    matrices = [(integers, scale)]
    (found,) = native.dot_stored(jnp.asarray(x), matrices, sums_last=sums_last, group_size=40)
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ weight
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    assert np.isfinite(found[::3]).all()


@pytest.mark.parametrize("sums_last", [False, True])
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("weight_dtype", VALUES)
def test_codes_of_a_table(weight_dtype, rows, sums_last):
    packed, scale, _ = stored(4, 97, 70, 32, sums_last)
    axis = int(sums_last)
    codes = VALUES[weight_dtype][unpack(np.asarray(packed), axis, 97) & 15].astype(np.float64)
    weight = codes * np.repeat(np.asarray(scale, np.float64), 32, axis).take(range(97), axis)
    weight = weight.T if sums_last else weight
    x = np.random.default_rng(0).standard_normal((rows, 97)).astype(np.float32)

    @jax.jit
    def run(x, packed, scale):
        options = {"sums_last": sums_last, "group_size": 32, "codes": VALUES[weight_dtype].tolist()}
        return with_variants(lambda: native.dot_stored(x, [(packed, scale)], **options)[0])

    bound = ROUNDING * 99 * (np.abs(x) @ np.abs(weight))
    for variant, found in run(x, packed, scale).items():
        assert (np.abs(found - x @ weight) <= bound).all(), variant


@pytest.mark.parametrize("sums_last", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_side_by_side_they_are_as_alone(bits, sums_last):
    """Of few columns and of many, some of them by two threads, and of none."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 96)), jnp.float32)
    sizes = (70, 1, 0, 1500, 64)
    matrices = [stored(bits, 96, columns, 32, sums_last)[:2] for columns in sizes]
    run = functools.partial(native.dot_stored, x, sums_last=sums_last, group_size=32)
    for found, matrix, columns in zip(run(matrices), matrices, sizes, strict=True):
        assert found.shape == (3, columns)
        np.testing.assert_array_equal(found, run([matrix])[0])


def test_matrices_of_several_kinds_are_refused():
    eight, four = (stored(bits, 64, 5, 64, sums_last=False)[:2] for bits in (8, 4))
    x = jnp.zeros((1, 64), jnp.float32)
    half = stored(8, 64, 5, 64, sums_last=False, scales=jnp.bfloat16)[:2]
    cases = (
        ([eight, four], "matrices of int8 and uint8"),
        ([eight, half], "scales of bfloat16 and float32"),
        ([], "no dtype"),
    )
    for matrices, message in cases:
        with pytest.raises(ValueError, match=message):
            native.dot_stored(x, matrices, sums_last=False, group_size=64)


def test_no_rows_and_mapped_ones():
    integers, scale, weight = stored(8, 12, 5, 12, sums_last=False)

    def run(x):
        return native.dot_stored(x, [(integers, scale)], sums_last=False, group_size=12)[0]

    assert run(jnp.zeros((0, 12), jnp.float32)).shape == (0, 5)
    x = np.random.default_rng(0).standard_normal((3, 2, 12)).astype(np.float32)
    np.testing.assert_allclose(jax.vmap(run)(jnp.asarray(x)), x @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 8), jnp.float32)}, "does not fit"),
        ({"x": jnp.zeros((2, 64), jnp.float16)}, "float16 rows"),
        ({"x": jnp.zeros((2, 64), jnp.int8)}, "int8 rows and int8 weights with"),
        ({"scale": jnp.ones((1, 5), jnp.float16)}, "scales of float16"),
        ({"group_size": 16}, "no multiple of 32"),
        ({"x": jnp.zeros((2, 0), jnp.float32)}, "nothing to sum"),
        ({"sums_last": True}, "does not fit"),
    ],
)  # fmt: skip
def test_what_does_not_fit(change, message):
    given = {
        "x": jnp.zeros((2, 64), jnp.float32),
        "integers": jnp.zeros((64, 5), jnp.int8),
        "scale": jnp.ones((1, 5), jnp.float32),
        "sums_last": False,
        "group_size": 64,
    } | change
    with pytest.raises(ValueError, match=message):
        native.dot_stored(
            given["x"], [(given["integers"], given["scale"])],
            sums_last=given["sums_last"], group_size=given["group_size"],
        )  # fmt: skip
