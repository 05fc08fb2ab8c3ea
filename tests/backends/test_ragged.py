"""Ragged dots of int8 values against NumPy and against JAX's own form, in integers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxquant.backends import ragged
from jaxquant.graph import contraction
from tests import reference


def numbers_of(
    contracted: Any, batch: Any = ((), ()), rows: int = 0, chosen: int = 0
) -> lax.RaggedDotDimensionNumbers:
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, batch),
        lhs_ragged_dimensions=[rows],
        rhs_group_dimensions=[chosen],
    )


PLAIN = numbers_of(((1,), (1,)))
# The shapes of x, the weight and the sizes of the groups, and the dimension numbers.
FORMS = {
    "plain": ((7, 5), (3, 5, 4), (3,), PLAIN),
    "one group": ((7, 5), (1, 5, 4), (1,), PLAIN),
    "no rows": ((0, 5), (3, 5, 4), (3,), PLAIN),
    "groups last": ((7, 5), (5, 4, 3), (3,), numbers_of(((1,), (0,)), chosen=2)),
    "rows last": ((5, 7), (3, 4, 5), (3,), numbers_of(((0,), (2,)), rows=1)),
    "outer rows": ((2, 7, 5), (3, 5, 4), (2, 3), numbers_of(((2,), (1,)), rows=1)),
    "shared sizes": ((2, 7, 5), (3, 5, 4), (3,), numbers_of(((2,), (1,)), rows=1)),
    "inner rows": ((7, 2, 5), (3, 5, 4), (3,), numbers_of(((2,), (1,)))),
    "several sums": ((7, 2, 5), (3, 5, 4, 2), (3,), numbers_of(((1, 2), (3, 1)))),
    "batch": (
        (2, 3, 7, 5), (4, 6, 2, 5), (2, 3, 4), numbers_of(((3,), (3,)), ((0,), (2,)), rows=2)
    ),
}  # fmt: skip


def built(numbers: Any, *shapes: tuple[int, ...]) -> contraction.Contraction:
    found = contraction.build(
        "ragged_dot_general", {"ragged_dot_dimension_numbers": numbers}, [len(s) for s in shapes]
    )
    assert found is not None
    return found


def int8(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


@pytest.mark.parametrize("zero_point", [0, -128, 31])
@pytest.mark.parametrize("name", FORMS)
def test_sums_of_every_arrangement(name: str, zero_point: int) -> None:
    x_shape, weight_shape, sizes_shape, numbers = FORMS[name]
    x, weight = int8(0, x_shape), int8(1, weight_shape)
    sizes = np.random.default_rng(2).integers(0, 4, sizes_shape)
    made = built(numbers, x_shape, weight_shape)
    found = jax.jit(lambda *given: ragged.sums(made, *given, zero_point))(x, weight, sizes)
    wide = x.astype(np.int32) - zero_point
    expected = lax.ragged_dot_general(
        wide, weight.astype(np.int32), sizes, numbers, preferred_element_type=jnp.int32
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["plain", "groups last", "outer rows", "inner rows", "batch"])
def test_what_rows_choose_comes_to_each_element(name: str) -> None:
    x_shape, weight_shape, sizes_shape, numbers = FORMS[name]
    made = built(numbers, x_shape, weight_shape)
    first, second = made.operands
    channels = int8(0, tuple(weight_shape[axis] for axis in second.kept)).astype(np.float32)
    weight = np.empty(weight_shape, np.float32)
    weight[:] = np.expand_dims(channels, second.contracted)
    x = np.zeros(x_shape, np.float32)  # takes one of the alike rows of the weight
    x[tuple(0 if axis in first.contracted else slice(None) for axis in range(x.ndim))] = 1
    sizes = np.random.default_rng(2).integers(1, 4, sizes_shape)
    of_rows = jax.jit(functools.partial(ragged.of_rows, made))
    found = of_rows(channels.reshape(-1), x, weight, sizes)
    expected = lax.ragged_dot_general(x, weight, sizes, numbers)
    is_inside = lax.ragged_dot_general(x, np.ones_like(weight), sizes, numbers) == 1
    np.testing.assert_array_equal(jnp.where(is_inside, found, 0), expected)


@functools.cache
def of_sizes(zero_point: int) -> Any:
    return jax.jit(
        lambda x, weight, sizes: ragged.sums(
            built(PLAIN, x.shape, weight.shape), x, weight, sizes, zero_point
        )
    )


@settings(max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=4, max_size=4), st.sampled_from([0, 9]))
def test_groups_of_any_sizes(sizes: list[int], zero_point: int) -> None:
    """Empty ones, more rows than are in groups, and fewer."""
    x, weight = int8(0, (40, 3)), int8(1, (4, 3, 2))
    found = of_sizes(zero_point)(x, weight, np.array(sizes))
    np.testing.assert_array_equal(found, reference.ragged_dot(x, weight, sizes, zero_point))
