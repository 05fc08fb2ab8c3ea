"""What a contraction says of its axes, against the shapes and the sums that JAX gives."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax import lax

from jaxquant.graph import contraction
from jaxquant.graph.contraction import Contraction
from jaxquant.graph.trace import trace

SIZES = {"b": 2, "c": 3, "i": 4, "j": 5, "k": 6, "l": 7}


def only_contraction(apply_fn: Any, x: tuple[int, ...], weight: tuple[int, ...]) -> Contraction:
    graph = trace(apply_fn, jnp.ones(weight), (jnp.ones(x),))
    (found,) = graph.contractions.values()
    return found


@st.composite
def dots(draw: Any) -> tuple[str, str]:
    """The axes of two operands of a dot, one letter each, in any order."""
    both = draw(st.sampled_from(["", "b", "bc"])) + draw(st.sampled_from(["", "k", "kl"]))
    free = draw(st.sampled_from([("i", "j"), ("", "j"), ("i", "")]))
    first, second = ("".join(draw(st.permutations(both + own))) for own in free)
    return first, second


@given(dots())
def test_the_axes_of_a_dot_are_those_of_its_equation(letters: tuple[str, str]) -> None:
    shapes = [tuple(SIZES[letter] for letter in side) for side in letters]
    pairs = [letter for letter in letters[0] if letter in letters[1]]
    batch, contracted = ([p for p in pairs if p in own] for own in ("bc", "kl"))
    numbers = tuple(
        tuple(tuple(side.index(letter) for letter in part) for side in letters)
        for part in (contracted, batch)
    )
    found = only_contraction(lambda w, x: lax.dot_general(x, w, numbers), *shapes)
    assert found.dot_numbers == numbers
    assert found.is_dot
    out = "".join(batch) + "".join(s for side in letters for s in side if s not in pairs)
    for side in (0, 1):
        for axis, letter in enumerate(letters[side]):
            expected = None if letter in contracted else out.index(letter)
            assert found.place(side, axis) == expected
    assert found.operands[1].kept == tuple(
        axis for axis, letter in enumerate(letters[1]) if letter not in contracted
    )
    assert found.terms(shapes[1]) == np.prod([SIZES[letter] for letter in contracted])


@pytest.mark.parametrize(
    ("layout", "x", "kernel"),
    [
        (("NHWC", "HWIO", "NHWC"), (2, 8, 9, 4), (3, 2, 2, 6)),
        (("NCHW", "OIHW", "NCHW"), (2, 4, 8, 9), (6, 2, 3, 2)),
        (("CNHW", "IOHW", "HWCN"), (4, 2, 8, 9), (2, 6, 3, 2)),
    ],
)
def test_a_convolution_has_the_same_parts_in_every_layout(layout: Any, x: Any, kernel: Any) -> None:
    def conv(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, w, (2, 1), ((1, 0), (0, 2)), rhs_dilation=(1, 3), dimension_numbers=layout,
            feature_group_count=2,
        )  # fmt: skip

    found = only_contraction(conv, x, kernel)
    given_x, given_kernel = found.operands
    assert [x[axis] for axis in (*given_x.free, *given_x.contracted, *given_x.window)] == [
        2,
        4,
        8,
        9,
    ]
    assert [kernel[a] for a in (*given_kernel.free, *given_kernel.contracted)] == [6, 2]
    assert [kernel[a] for a in given_kernel.window] == [3, 2]
    assert found.terms(kernel) == 2 * 3 * 2
    assert (found.feature_groups, found.has_batch) == (2, False)
    window = found.window
    assert window is not None
    assert (window.strides, window.padding, window.dilation) == ((2, 1), ((1, 0), (0, 2)), (1, 3))
    out = jax.eval_shape(conv, jnp.ones(kernel), jnp.ones(x)).shape
    assert [out[found.place(side, found.operands[side].free[0])] for side in (0, 1)] == [2, 6]
    assert [out[axis] for axis in found.result.window] == [4, 8]


def test_the_rows_of_a_ragged_dot_choose_an_index_of_the_weight() -> None:
    def mixture(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.ragged_dot(x, w, jnp.array([1, 0, 4]))

    found = only_contraction(mixture, (5, 6), (3, 6, 7))
    weight = found.operands[1]
    assert (weight.chosen, weight.contracted, weight.free) == ((0,), (1,), (2,))
    assert (weight.kept, weight.rank) == ((0, 2), 3)
    assert [found.place(1, axis) for axis in range(3)] == [None, None, 1]
    assert found.terms((3, 6, 7)) == 6
    assert not found.is_dot
    assert found.varying([frozenset(), frozenset({0})]) == {0}  # other experts, other rows
    assert found.varying([frozenset(), frozenset({1, 2})]) == {1}


def test_what_is_no_product_is_no_contraction() -> None:
    assert contraction.build("add", {}, (2, 2)) is None
