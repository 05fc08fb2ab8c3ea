"""What differs between two saved models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.deploy import tree
from jaxquant.run.qapply import QuantizedApply


def differences(
    a: tuple[Mapping[str, Any], QuantizedApply], b: tuple[Mapping[str, Any], QuantizedApply]
) -> dict[str, dict[str, str]]:
    """What differs between two models, by name: sites, tensors (their grids), arrays."""
    plans = a[1].plan, b[1].plan
    sites = [
        {site.name: f"{site.kind} {site.status} {site.reason}".strip() for site in plan.sites}
        for plan in plans
    ]
    grids = [
        {
            each.name: f"scale {each.scale:.6g}, zero point {each.zero_point}"
            for each in plan.tensors
        }
        for plan in plans
    ]
    apart = ("sites", "tensors")  # these have entries of their own
    settings = [
        {name: str(x) for name, x in dataclasses.asdict(plan).items() if name not in apart}
        for plan in plans
    ]
    arrays = tree.flatten(a[0]), tree.flatten(b[0])
    return {
        "settings": _differing(*settings),
        "sites": _differing(*sites),
        "tensors": _differing(*grids),
        "arrays": {
            name: text
            for name in {**arrays[0], **arrays[1]}
            if (text := _array_difference(arrays[0].get(name), arrays[1].get(name)))
        },
    }


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    return {
        name: f"{a.get(name, 'absent')} | {b.get(name, 'absent')}"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    }


def _array_difference(a: np.ndarray | None, b: np.ndarray | None) -> str:
    """How two arrays differ, "" where they are the same to the bit."""
    if a is None or b is None:
        return f"{'absent' if a is None else 'there'} | {'absent' if b is None else 'there'}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype}{list(a.shape)} | {b.dtype}{list(b.shape)}"

    # By bytes, so that NaN equals NaN, and -0 is not 0.
    if a.tobytes() == b.tobytes():
        return ""
    differing = np.count_nonzero(a != b)
    # In float64: the difference of two int8 numbers does not fit in int8.
    largest = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
    return f"{differing} of {a.size} elements, by {largest:.4g} at most"
