"""Which form of calibration's and recovery's operations runs."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import jaxquant
from jaxquant import native
from jaxquant.backends import operations
from jaxquant.calibration import counting
from jaxquant.calibration import histogram as hg
from tests.native.cases import needs_kernels


@needs_kernels
def test_calibration_counts_with_the_kernel(monkeypatch: pytest.MonkeyPatch):
    seen, original = set(), native.histogram

    def histogram(x, least_exponent):
        seen.add(x.shape)
        return original(x, least_exponent)

    monkeypatch.setattr(native, "histogram", histogram)
    params, x = {"w": jnp.eye(4)}, jnp.ones((3, 4))
    jaxquant.calibrate(params, lambda p, x: x @ p["w"], [x], progress=False)
    assert seen == {(3, 4)}


def test_where_the_kernels_do_not_run_the_portable_form_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "runs_here", lambda: False)
    assert operations.counter(counting.portable_counts, hg.MIN_EXPONENT) is counting.portable_counts
