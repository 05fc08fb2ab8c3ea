"""The networks of the zoo, quantized, compile for every device, and multiply int8 there.

    .ci/accelerators -k "networks and v5e and resnet50"

Each in a process of its own: half a minute to two where nothing else runs, the networks of images
several, so that all of them take some two hours on two cores.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from experiments.benchmarks import ahead_of_time, described

pytestmark = [pytest.mark.accelerators, pytest.mark.optimized]

BATCH = 32
TRANSFORMERS = ("causal", "encoder")
# Thousand cycles of a TPU v5e over bfloat16's, by XLA's estimate: what was reached, and a little.
BOUNDS = {
    ("mobilenet_v1", "static"): 0.72,
    ("resnet50", "static"): 0.65,
    ("resnet50", "full"): 0.6,
    ("causal", "static"): 0.65,
    ("causal", "full"): 0.64,
    ("encoder", "static"): 0.65,
    ("encoder", "full"): 0.74,
}
# Of the two layers: in each a product of queries, one of values, and one that sums the weights.
FLOAT_PRODUCTS = {("v5e", "static"): 6, ("v6e", "static"): 6, ("h200", "static"): 4}


@functools.cache
def found(device: str, name: str, mode: str) -> dict[str, Any]:
    """What became of a network; those with loops in the batch that they are quantized with."""
    if reason := described.missing(device):
        pytest.skip(reason)
    batch = 0 if name in ahead_of_time.LOOPS else BATCH
    return ahead_of_time.apart(device, name, mode, batch)


def floats(products: dict[str, int]) -> int:
    """How many products have an operand of floats."""
    return sum(n for kinds, n in products.items() if not kinds.startswith("int8"))


@pytest.mark.parametrize("mode", ["static", "full"])
@pytest.mark.parametrize("name", ahead_of_time.NETWORKS)
@pytest.mark.parametrize("device", described.DEVICES)
def test_it_compiles_with_products_of_int8(device: str, name: str, mode: str):
    each = found(device, name, mode)
    assert "error" not in each, each["error"]
    assert any(kinds.startswith("int8") for kinds in each["products"])
    if name in ahead_of_time.IMAGES:
        assert floats(each["products"]) == 0
    if name in TRANSFORMERS and mode == "static":
        assert floats(each["products"]) == FLOAT_PRODUCTS[device, mode]


@pytest.mark.parametrize(("name", "mode"), BOUNDS)
def test_cycles_of_v5e(name: str, mode: str):
    ours, bfloat16 = (found("v5e", name, each)["cycles"] for each in (mode, "bfloat16"))
    assert ours <= BOUNDS[name, mode] * bfloat16
