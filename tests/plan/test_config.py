"""What the user asked for: names that mean the same are one."""

import pytest

from jaxquant.graph import kinds
from jaxquant.plan import behaviours
from jaxquant.plan.config import QuantConfig


def test_paddles_newer_names_are_kinds_of_ours():
    asked = [
        "conv2d",
        "matmul_v2",
        "transpose2",
        "bilinear_interp_v2",
        "arg_max",
        "split",
        "matmul",
    ]
    config = QuantConfig(quantizable_op_type=asked)
    assert config.quantizable_op_type == (
        "conv2d", "matmul", "transpose", "bilinear_interp", "argmax", "slice"
    )  # fmt: skip


def test_every_name_of_paddle_stands_for_a_kind_with_an_int8_form():
    assert set(kinds.PADDLE_NAMES.values()) <= set(behaviours.BY_KIND)
    assert not set(kinds.PADDLE_NAMES) & set(behaviours.BY_KIND)


@pytest.mark.parametrize("kind", ["matmul_v3", 3, ["conv2d"]])
def test_other_names_are_refused(kind):
    with pytest.raises(ValueError, match=r"quantizable_op_type: .* is not known"):
        QuantConfig(quantizable_op_type=[kind])
