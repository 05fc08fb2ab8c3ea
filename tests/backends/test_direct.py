"""The forms of a convolution by platform give the same sums, and which one is compiled."""

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
    "groups with many terms": ((1, 4, 4, 500), (3, 3, 250, 4), (1, 1), (1, 1), 2),
}


@pytest.mark.parametrize("form", dict.fromkeys(direct.FORMS.values()), ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES)
def test_the_same_sums(case: str, form: direct.Form):
    shape, kernel_shape, strides, dilation, groups = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.choice([-128, -127, 127, 3], shape), jnp.int8)
    kernel = jnp.asarray(rng.choice([-127, 127, 2], kernel_shape), jnp.int8)
    padding = ((1, 1), (0, 2))
    window = Window(strides, padding, dilation, (1, 1), groups)
    wide = [v.astype(jnp.float64 if jax.config.jax_enable_x64 else jnp.int32) for v in (x, kernel)]
    want = jax.lax.conv_general_dilated(
        *wide, strides, padding, (1, 1), dilation, ("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip
    got = jax.jit(form, static_argnums=2)(x, kernel, window)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("platform", direct.FORMS)
def test_an_export_holds_the_form_of_its_platform(platform: str):
    window = Window((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 2)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return direct.convolve(x, kernel, window)

    shapes = [jax.ShapeDtypeStruct(s, jnp.int8) for s in ((2, 8, 8, 8), (3, 3, 4, 6))]
    text = jax.export.export(jax.jit(convolve), platforms=[platform])(*shapes).mlir_module()
    results = [line.rpartition("->")[2] for line in text.splitlines() if "convolution" in line]
    assert ["f32" in result for result in results] == [platform in ("cuda", "rocm")]
