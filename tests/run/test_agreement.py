"""`qapply.check` compares a device with the CPU, site by site; here another CPU device."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.backends import int8
from jaxquant.run import agreement
from tests import networks

pytestmark = pytest.mark.optimized

X = networks.images(0, (2, 8, 8, 3))
PARAMS = {
    "conv": {"kernel": networks.images(1, (3, 3, 3, 8)), "bias": networks.images(2, (8,))},
    "dense": networks.images(3, (8, 5)),
}


def apply_fn(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["conv"]["kernel"], (2, 2), "SAME", dimension_numbers=numbers)
    x = jax.nn.softmax(jax.nn.relu(x + p["conv"]["bias"]), axis=-1)
    return x.mean((1, 2)) @ p["dense"]


def other_device() -> jax.Device:
    return jax.devices("cpu")[1]


def static(full: bool):
    return jaxquant.quant_post(PARAMS, apply_fn, [X], is_full_quantize=full, progress=False)


@pytest.mark.parametrize(("quantize", "sites"), [
    (lambda: static(full=False), 2),
    (lambda: static(full=True), 3),  # the mean too
    (lambda: jaxquant.quant_dynamic(PARAMS, apply_fn, X, progress=False), 2),
    (lambda: jaxquant.quant_weights(PARAMS, apply_fn, X, recover=(), progress=False), 2),
], ids=["static", "full", "dynamic", "weights"])  # fmt: skip
def test_a_device_that_computes_the_same(quantize, sites):
    qparams, qapply = quantize()
    agreed = qapply.check(qparams, X, device=other_device())
    assert str(agreed) == f"{sites} sites and the outputs agree on cpu and CPU"


def test_the_default_device_is_the_cpu():
    qparams, qapply = static(full=False)
    assert "nothing to compare" in str(qapply.check(qparams, X))


@pytest.fixture
def faulty(monkeypatch):
    """A device on which one convolution of int8 is wrong in one sum."""
    accumulate, on = int8.accumulate, agreement.run_on

    def wrong(contraction, operands, zero_points, **options):
        sums = accumulate(contraction, operands, zero_points)
        return sums.at[0, 0, 0, 3].add(1) if contraction.window is not None else sums

    def somewhere(device, *rest):
        with monkeypatch.context() as patch:
            if device == other_device():
                patch.setattr(int8, "accumulate", wrong)
            return on(device, *rest)

    monkeypatch.setattr(agreement, "run_on", somewhere)


def test_one_wrong_sum_is_told(faulty):
    qparams, qapply = static(full=False)
    with pytest.raises(jaxquant.DisagreementError, match=r"conv: \(conv2d\) 1 of 256 sums differ"):
        qapply.check(qparams, X, device=other_device())


def test_rounding_of_large_sums_is_no_difference():
    qparams, qapply = static(full=False)
    (site, _) = qapply.program(X).binding.sites
    arrays = qparams["sites"][site.site.name]
    channels = np.asarray(arrays["multiplier"], np.float64)
    sums = np.full((2, 4, 4, 8), 3_000_000.0)
    y = (sums * channels).astype(np.float32)
    near = np.nextafter(y, np.float32(np.inf))
    bare = {"multiplier": arrays["multiplier"]}
    assert agreement.sums_apart(site, bare, y, near) is None
    off = ((sums + 8) * channels).astype(np.float32)
    assert "256 of 256" in agreement.sums_apart(site, bare, y, off)
