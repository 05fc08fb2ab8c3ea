"""Every int8 form compiles for every device, and multiplies int8 there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from experiments.benchmarks import described
from tests.accelerators import forms

pytestmark = [pytest.mark.accelerators, pytest.mark.optimized]

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Found:
    """What became of each form on a device."""
    if reason := described.missing(request.param):
        pytest.skip(reason)
    return compiled(request.param, forms.names())


def compiled(device: str, names: list[str]) -> Found:
    """The forms compiled in few processes: one more behind each form that aborts the compiler."""
    results: Found = {}
    while waiting := [name for name in names if name not in results]:
        command = [sys.executable, "-m", "tests.accelerators.compile_forms", device, *waiting]
        done = subprocess.run(command, capture_output=True, text=True, env=described.environment())
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        results |= {line.pop("name"): line for line in lines}
        missed = [name for name in waiting if name not in results]
        if missed:
            results[missed[0]] = {"error": f"status {done.returncode}: {done.stderr[-500:]}"}
    return results


@pytest.mark.parametrize("found", described.DEVICES, indirect=True)
def test_every_form_compiles(found: Found):
    assert {name: each["error"] for name, each in found.items() if "error" in each} == {}


@pytest.mark.parametrize("found", described.DEVICES, indirect=True)
def test_no_product_is_of_floats(found: Found):
    kinds = {name: each.get("products", {}) for name, each in found.items()}
    floats = {name: k for name, k in kinds.items() if any("f32" in t or "bf16" in t for t in k)}
    assert floats == {}


@pytest.mark.parametrize("found", described.DEVICES, indirect=True)
def test_convolutions_are_one_product(found: Found):
    """All but those that are sums of shifted products."""
    counts = {
        name: sum(each.get("products", {}).values())
        for name, each in found.items()
        if "depthwise" not in name and name.startswith("N")
    }
    assert {name: count for name, count in counts.items() if count != 1} == {}
