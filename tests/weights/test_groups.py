"""Groups of weights and packed 4-bit integers, against loops written from the definitions."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.plan.groups import group_layout
from jaxquant.weights.groups import pack, quantize_groups, unpack

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=50)


def fake_groups(weight, channels, group_size, bits):
    """`weight` rounded to the grids of its groups, one channel at a time; float64.

    In 4 bits the scale of a group is 100, 95, ..., 50 % of the one that clips nothing, as it likes
    best.
    Scales of groups are rounded to bfloat16.
    """
    dtype = np.float64 if group_size is None else jnp.bfloat16
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    rows = np.moveaxis(np.asarray(weight).astype(np.float64), channels, range(len(channels)))
    shape = rows.shape
    rows = rows.reshape(int(np.prod(shape[: len(channels)])), -1)
    found = np.zeros_like(rows)
    size = group_size or max(rows.shape[1], 1)
    for i, row in enumerate(rows):
        for start in range(0, len(row), size):
            group = row[start : start + size]
            tried = []
            for part in range(20, 9, -1) if bits == 4 else [20]:
                scale = float(dtype(max(group.max() / most, group.min() / least) * (part / 20)))
                if scale:
                    integers = np.clip(np.rint(group / scale), least, most)
                    error = ((integers * scale - group) ** 2).sum()
                    tried.append((error, integers * np.float32(scale)))
            if tried:
                found[i, start : start + size] = min(tried, key=lambda pair: pair[0])[1]
    return np.moveaxis(found.reshape(shape), range(len(channels)), channels)


@settings
@hypothesis.given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.data(),
    st.sampled_from([None, 1, 2, 3, 8]),
    st.sampled_from([8, 4]),
)
def test_integers_and_scales_equal_the_loops(shape, data, group_size, bits):
    channels = tuple(a for a in range(len(shape)) if data.draw(st.booleans()))
    weight = np.random.default_rng(data.draw(st.integers(0, 9))).normal(size=shape)
    layout = group_layout(shape, channels, group_size)
    integers, scale = quantize_groups(weight, layout, bits)
    length = layout.shape[layout.axis]
    if bits == 4:
        assert integers.dtype == np.uint8
        assert integers.shape[layout.axis] == -(-length // 2)
        integers = unpack(integers, layout.axis, length)
    else:
        assert integers.shape == tuple(shape)
        integers = integers.transpose(layout.order).reshape(layout.shape)
    assert integers.dtype == np.int8
    assert scale.dtype == (np.float32 if group_size is None else jnp.bfloat16)
    assert scale.shape[layout.axis] == layout.groups == -(-length // (group_size or length))
    repeated = np.repeat(scale.astype(np.float32), layout.size, axis=layout.axis)
    value = integers * np.take(repeated, range(length), axis=layout.axis)
    value = value.reshape(layout.permuted).transpose(layout.inverse)
    expected = fake_groups(weight, channels, group_size, bits)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-12)


@settings
@hypothesis.given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 2), st.integers(0, 9)
)
def test_packing_round_trip(shape, axis, seed):
    axis %= len(shape)
    integers = np.random.default_rng(seed).integers(-8, 8, shape).astype(np.int8)
    packed = pack(integers, axis)
    assert packed.nbytes == -(-shape[axis] // 2) * int(np.prod(np.delete(shape, axis)))
    np.testing.assert_array_equal(unpack(packed, axis, shape[axis]), integers)


def test_a_group_of_zeros_and_ties():
    weight = np.array([[0.0, 0.0, 127.0, 0.5, 1.5, -2.5]])
    integers, scale = quantize_groups(weight, group_layout((1, 6), (0,), 2), 8)
    assert scale.tolist() == [[1.0, 1.0, jnp.bfloat16(2.5 / 127)]]
    assert integers[0, :4].tolist() == [0, 0, 127, 0]


def test_four_bits_clip_a_weight_that_costs_all_others_their_steps():
    weight = np.array([[10.0, *[1.0, -1.0] * 40]])  # steps of 10 / 7 lose the others
    layout = group_layout((1, 81), (0,), None)
    _, scale = quantize_groups(weight, layout, 4)
    assert scale.tolist() == [
        [np.float32(8 / 7)]
    ]  # 2² + 80 (8 / 7 - 1)² is the least of those tried
    assert quantize_groups(weight, layout, 8)[1].tolist() == [[np.float32(10 / 127)]]


@pytest.mark.parametrize(
    ("shape", "channels", "flat", "axis"),
    [
        ((3, 3, 4, 8), (3,), (36, 8), 0),
        ((8, 4, 3, 3), (0,), (8, 36), 1),
        ((2, 3, 4), (0, 2), (2, 3, 4), 1),
        ((2, 3, 4), (1,), (3, 8), 1),
        ((5,), (0,), (5, 1), 1),
    ],
)
def test_layouts(shape, channels, flat, axis):
    layout = group_layout(shape, channels, None)
    assert (layout.shape, layout.axis, layout.groups) == (flat, axis, 1)
