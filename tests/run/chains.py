"""What the tests of epilogues share: sizes, parameters, and how close is equal."""

from __future__ import annotations

from typing import Any

import numpy as np

N, T, K, C = 4, 3, 8, 6
Params = dict[str, Any]


def make_params(rng: np.random.Generator, weight: tuple[int, ...]) -> Params:
    magnitude = rng.uniform(0.5, 2.0, (4, C))
    return {
        "w": np.float32(rng.normal(size=weight)),
        "b": np.float32(rng.normal(size=C)),
        "s": np.float32(magnitude[0] * rng.choice([-1, 1], C)),
        "z": np.float32(magnitude[1] * (np.arange(C) % 2)),
        "mean": np.float32(rng.normal(size=C)),
        "var": np.float32(magnitude[2]),
        "table": np.float32(rng.normal(size=(N, C))),
        "scalar": np.float32(rng.normal()),
    }


def close(got: Any, want: np.ndarray) -> None:
    """Equal up to the rounding of a few float32 operations; an int8 step is far larger."""
    got = np.asarray(got)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=4e-6, atol=4e-6 * (1 + np.abs(want).max()))
