"""The warning of a poor model names where it is lost, not what comes after."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant


def matrices(names: str, size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(size, size)).astype(np.float32) / 4 for name in names}


def chain(p: Any, x: Any) -> Any:
    for name in sorted(p):
        x = jnp.tanh(x @ p[name])
    return x


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)


def spoilt(params: dict[str, np.ndarray], name: str) -> dict[str, jax.Array]:
    """One weight of an output channel is so large that the scale of all loses the others."""
    params[name][0] *= 1e5
    return {key: jnp.asarray(value) for key, value in params.items()}


def spoilt_chain(p: Any, x: Any) -> Any:
    """The site `c` reads a channel that is all zero for what its weight spoils."""
    x = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]).at[:, 0].set(0.0)
    return jnp.tanh(jnp.tanh(x @ p["c"]) @ p["d"]) @ p["e"]


MODES: dict[str, Callable[..., Any]] = {
    "static": partial(jaxquant.quant_post, progress=False),
    "full": partial(jaxquant.quant_post, progress=False, is_full_quantize=True),
    "dynamic": jaxquant.quant_dynamic,
    "weights": jaxquant.quant_weights,
}


@pytest.mark.parametrize(
    "mode", ["static", "dynamic", *(pytest.param(m, marks=pytest.mark.slow)
                                    for m in ("full", "weights"))]
)  # fmt: skip
def test_the_site_that_is_bad_by_itself_is_named_first(mode: str):
    params, x = spoilt(matrices("abcde"), "c"), inputs()
    with pytest.warns(UserWarning, match="only") as caught:
        MODES[mode](params, spoilt_chain, [x] if mode in ("static", "full") else x)
    (warning,) = caught
    text = str(warning.message)
    first, _, rest = text.partition("falls most at ")[2].partition(")")
    assert first.startswith("c (from ")
    assert "by its own error alone" in first
    own = float(first.partition(" dB, ")[2].split()[0])
    assert own < 5
    assert "skip=('c',)" in rest
    assert warning.filename == __file__


def test_an_error_that_grows_is_told_from_one_that_is_made():
    """The difference of two nearly equal outputs: no site is bad by itself."""
    params = matrices("ab")
    params["b"] = params["a"] + 1e-4 * params["b"]
    arrays = {key: jnp.asarray(value) for key, value in params.items()}
    with pytest.warns(UserWarning, match=r"falls most at the outputs \(from 4\d") as caught:
        jaxquant.quant_post(
            arrays, lambda p, x: jnp.tanh(x @ p["a"]) - jnp.tanh(x @ p["b"]), [inputs()],
            progress=False,
        )  # fmt: skip
    text = str(caught[0].message)
    assert "the error of what it reads is small and grows there" in text
    assert "skip=('a', 'b')" in text or "skip=('b', 'a')" in text


def test_sums_too_small_for_float32_are_named():
    params, x = matrices("a"), inputs() * np.float32(1e-36)
    with pytest.warns(UserWarning, match=r"one step of the sums of a is worth less than 1\.2e-38"):
        jaxquant.quant_post(
            {"a": jnp.asarray(params["a"])}, lambda p, x: x @ p["a"], [x], progress=False
        )


def test_a_good_model_does_not_warn():
    arrays = {key: jnp.asarray(value) for key, value in matrices("abc").items()}
    jaxquant.quant_post(arrays, chain, [inputs()], progress=False)
