"""Convolutions as one operation of XLA, against sums in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.backends import direct
from jaxquant.graph.contraction import Window

# x, kernel, strides, dilation, groups
CASES = {
    "plain": ((2, 7, 6, 5), (3, 3, 5, 4), (1, 1), (1, 1), 1),
    "strided, dilated": ((2, 9, 8, 8), (3, 2, 8, 6), (2, 1), (1, 2), 1),
    "more terms than are exact": ((1, 4, 4, 300), (3, 3, 300, 2), (1, 1), (1, 1), 1),
    "groups of odd sizes": ((2, 5, 5, 8), (3, 3, 4, 6), (1, 1), (1, 1), 2),
    "groups of three": ((2, 5, 5, 12), (3, 3, 4, 6), (1, 1), (1, 1), 3),
    "groups with many terms": ((1, 4, 4, 500), (3, 3, 250, 4), (1, 1), (1, 1), 2),
}
FORMS = [direct.with_enough_channels, direct.by_way_of_float32]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("case", CASES)
def test_the_same_sums(case: str, form: object):
    shape, kernel_shape, strides, dilation, groups = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.choice([-128, -127, 127, 3], shape), jnp.int8)
    kernel = jnp.asarray(rng.choice([-127, 127, 2], kernel_shape), jnp.int8)
    padding = ((1, 1), (0, 2))
    window = Window(strides, padding, dilation, (1, 1), groups)
    want = jax.lax.conv_general_dilated(
        x.astype(jnp.int32), kernel.astype(jnp.int32), strides, padding, (1, 1), dilation,
        ("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip
    got = jax.jit(form, static_argnums=2)(x, kernel, window)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("groups", [2, 3, 5])
@pytest.mark.parametrize("sizes", [(1, 2), (3, 1), (4, 3), (5, 6)])
def test_groups_are_filled_up_each_by_itself(groups: int, sizes: tuple[int, int]):
    """XLA for CUDA fills channels up to fours at their end, which is right for one group alone."""
    inputs, outputs = sizes
    shapes = (2, 4, 4, groups * inputs), (3, 3, inputs, groups * outputs)
    window = Window((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), groups)
    traced = jax.make_jaxpr(lambda x, k: direct.by_way_of_float32(x, k, window))(
        *(jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes)
    )
    (eqn,) = (e for e in traced.eqns if e.primitive.name == "conv_general_dilated")
    kernel = eqn.invars[1].aval.shape
    assert kernel[-2] % 4 == 0
    assert kernel[-1] // groups % 4 == 0
