"""The whole range of float32: what is computed is right, and the report tells what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant

POST = partial(jaxquant.quant_post, progress=False)
MODES: dict[str, Callable[..., Any]] = {
    "static": lambda p, f, x: POST(p, f, [x]),
    "abs_max": lambda p, f, x: POST(p, f, [x], algo="avg", weight_quantize_type="abs_max"),
    "full": lambda p, f, x: POST(p, f, [x], is_full_quantize=True),
    "equalization": lambda p, f, x: POST(p, f, [x], recover=("equalization", "bias_correction")),
    "dynamic": jaxquant.quant_dynamic,
    "weights": jaxquant.quant_weights,
    "4 bits": lambda p, f, x: jaxquant.quant_weights(p, f, x, weight_bits=4, group_size=4),
}
LEAST = {"4 bits": 18, "abs_max": 20}  # dB; "avg" clips
FEW = [("static", 1e30, 1e-30), ("static", 1e-25, 1.0), ("static", 1.0, 1e-37),
       ("dynamic", 1e36, 1e-36), ("dynamic", 1e-20, 1e20), ("weights", 1.0, 1e30)]  # fmt: skip
SIZES = (1e-37, 1e-20, 1.0, 1e20, 1e36)
MANY = [
    case
    for case in itertools.product(MODES, SIZES, SIZES)
    if case not in FEW and 1e-39 < case[1] * case[2] < 1e37
]


def sqnr(want: Any, got: Any) -> float:
    want, got = np.float64(want), np.float64(got)
    return 10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2))


def apply_fn(p: Any, x: Any) -> Any:
    return jax.nn.relu(x @ p["w"] + p["b"])


def model(size: float, weight: float) -> tuple[dict[str, jax.Array], np.ndarray]:
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(16, 8)) / 4 * weight, "b": rng.normal(size=8) * size * weight}
    x = (rng.normal(size=(64, 16)) * size).astype(np.float32)
    return {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}, x


@pytest.mark.filterwarnings("ignore:the quantized model's outputs")
@pytest.mark.parametrize(
    ("mode", "size", "weight"), [*FEW, *(pytest.param(*c, marks=pytest.mark.slow) for c in MANY)]
)
def test_inputs_and_weights_of_any_size(mode: str, size: float, weight: float):
    """Where steps and outputs are ordinary floats it is as good as at 1; else the report says."""
    params, x = model(size, weight)
    qparams, qapply = MODES[mode](params, apply_fn, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(qparams))
    want, got = np.asarray(apply_fn(params, x)), np.asarray(qapply(qparams, x))
    reported = qapply.report().summary["output_sqnr_db"]
    if not want.any():
        assert not got.any()  # below what programs compute with
        return
    measured = sqnr(want, got)
    assert reported == pytest.approx(measured, abs=0.5)
    smallest = min(size, weight, size * weight)
    if smallest >= 1e-30:
        assert measured > LEAST.get(mode, 35)


@pytest.mark.parametrize("size", [1e-20, 1e15, pytest.param(1e30, marks=pytest.mark.slow)])
def test_a_mean_error_of_any_size_is_taken_away(size: float):
    """Inputs far from zero: rounded weights leave a mean error that is most of what there is."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(64, 32)) ** 3, jnp.float32)}
    x = ((5 + 0.1 * rng.normal(size=(128, 64))) * size).astype(np.float32)
    found = []
    for recover in ((), ("bias_correction",)):
        qparams, qapply = POST(params, lambda p, x: x @ p["w"], [x], recover=recover)
        found.append(sqnr(x @ np.asarray(params["w"]), qapply(qparams, x)))
        assert qapply.report().summary["output_sqnr_db"] == pytest.approx(found[-1], abs=0.5)
    assert found[1] > found[0] + 6


def test_rows_of_a_dynamic_product_may_be_of_any_size():
    params, x = model(1.0, 1e-5)
    sizes = 10.0 ** np.linspace(-25, 37, 64)[:, None]
    x = (x * sizes).astype(np.float32)
    qparams, qapply = jaxquant.quant_dynamic(params, lambda p, x: (x @ p["w"]).T, x)
    want, got = (
        np.float64(y) / sizes.T for y in (np.asarray(x @ params["w"]).T, qapply(qparams, x))
    )
    assert sqnr(want, got) > 35


def test_a_step_beyond_float32_names_the_site():
    """Large inputs meet small weights and small ones large: the sums are floats, a step is not."""
    w = np.full((2, 3), 1e-30, np.float32)
    w[1] = 1e30
    x = np.array([[1e30, 1.0], [2e30, 2.0]], np.float32)
    with pytest.raises(ValueError, match=r"site 'w': one step of its sums.*beyond float32"):
        POST({"w": jnp.asarray(w)}, lambda p, x: x @ p["w"], [x])
