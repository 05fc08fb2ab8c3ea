"""The forms of convolutions that runtimes have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxquant.deploy.lower.convolution import ConvForm, conv_form
from jaxquant.deploy.lower.errors import NotCovered
from tests.contractions import of_conv


def form(kernel: tuple[int, ...], **changes: Any) -> ConvForm:
    """The form of a convolution of NHWC by HWIO, with parameters changed."""
    numbers = {"lhs_spec": (0, 3, 1, 2), "rhs_spec": (3, 2, 0, 1), "out_spec": (0, 3, 1, 2)}
    params = {
        "dimension_numbers": type("Numbers", (), numbers)(),
        "window_strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "feature_group_count": 1,
    }
    return conv_form(of_conv(params | changes), kernel)


def test_what_a_convolution_is():
    assert form((1, 1, 8, 4)).is_pointwise
    assert not form((1, 1, 8, 4), padding=((0, 1), (0, 0))).is_pointwise
    assert not form((3, 1, 8, 4)).is_pointwise
    assert form((3, 3, 1, 8), feature_group_count=8).is_depthwise
    assert not form((3, 3, 1, 16), feature_group_count=8).is_depthwise  # two filters each
    assert not form((3, 3, 1, 8)).is_depthwise  # of one channel


def test_a_dilated_input_is_the_gradient_of_strides():
    """With size 3 and stride 2, padding of 1 is one position less than the kernel's reach."""
    found = form((3, 3, 8, 4), lhs_dilation=(2, 2), padding=((1, 1), (2, 3)))
    assert found.is_transposed
    assert found.strides == (2, 2)
    assert found.padding == ((1, 1), (0, 0))
    assert found.beyond == (0, 1)


def test_the_kernel_of_a_transposed_one_runs_backwards():
    kernel = np.arange(2 * 3).reshape(2, 3, 1, 1)
    straight, transposed = form(kernel.shape), form(kernel.shape, lhs_dilation=(2, 2))
    assert straight.kernel(kernel, (3, 2, 0, 1)).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    assert transposed.kernel(kernel, (2, 3, 0, 1)).tolist() == [[[[5, 4, 3], [2, 1, 0]]]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"padding": ((-1, 0), (0, 0))}, "negative padding"),
        ({"batch_group_count": 2}, "batch groups"),
        ({"lhs_dilation": (2, 2), "window_strides": (2, 1)}, "strides or groups"),
        ({"lhs_dilation": (2, 2), "padding": ((3, 0), (0, 0))}, "so much padding"),
    ],
)
def test_what_runtimes_do_not_have(changes: dict[str, Any], reason: str):
    with pytest.raises(NotCovered, match=reason):
        form((3, 3, 8, 4), **changes)
