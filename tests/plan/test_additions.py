"""The scales of additions that LiteRT computes in integers."""

import jax
import numpy as np
import pytest

import jaxquant
from jaxquant.plan import additions
from jaxquant.plan.config import QuantConfig
from tests.networks import images


def test_a_sum_on_such_scales_is_away_from_every_tie():
    """By the kernel's own arithmetic, against exact sums, at all pairs of integers."""
    rng = np.random.default_rng(0)
    integers = np.arange(-128, 128)
    a, b = np.meshgrid(integers, integers)
    for _ in range(20):
        unit = 2.0**-14
        scales = (2 * rng.integers(2**6, 2**10, 3) + 1) * unit
        left, right, result = scales * (additions.unit_of(scales.max()) / unit)
        exact = np.rint((a * left + b * right) / result)
        larger = max(left, right) / result
        shift = 20 - int(np.floor(np.log2(larger)))
        by = [int(np.rint(scale / result * 2.0**shift)) for scale in (left, right)]
        kernel = (a * by[0] + b * by[1] + (1 << (shift - 1))) >> shift
        inside = np.abs(exact) < 256  # beyond it both saturate
        np.testing.assert_array_equal(kernel[inside], exact[inside])


def test_the_scales_of_a_residual_stream_have_one_unit():
    p = {name: images(n, (8, 8)) for n, name in enumerate("abc")}

    def apply_fn(p, x):
        y = jax.nn.relu(x @ p["a"])
        y = y + y @ p["b"]
        return (y + y @ p["c"]) @ p["a"]

    qapply = jaxquant.quant_post(
        p, apply_fn, [images(3, (16, 8))], is_full_quantize=True, target="litert", progress=False
    )[1]
    binding = qapply.program(images(3, (16, 8))).binding
    (group,) = additions.added_scales(binding)
    scales = np.array([t.scale for t in qapply.plan.tensors if t.name in group])
    multiples = scales / additions.unit_of(scales.max())
    assert len(group) == 5
    np.testing.assert_array_equal(multiples % 2, 1)


def test_a_target_is_of_static_quantization():
    with pytest.raises(ValueError, match="target: 'phone' is not known"):
        QuantConfig(target="phone")
    with pytest.raises(ValueError, match=r"target='litert' is of jaxquant.quant_post"):
        QuantConfig(mode="dynamic", quantizable_op_type=("mul",), recover=(), target="litert")
