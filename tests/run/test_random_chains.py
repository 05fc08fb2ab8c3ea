"""Random chains of affine steps and movements behind a dot."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import reference
from tests.run.chains import C, K, N, Params, T, close

pytestmark = pytest.mark.usefixtures("numbers_as_they_are")

STEPS = ("add", "radd", "sub", "rsub", "mul", "rmul", "div", "neg", "double", "shift")
MOVES = ("transpose", "split", "merge", "rows", "newaxis")


@dataclasses.dataclass(frozen=True)
class Chain:
    steps: tuple[str, ...]

    def run(self, xp: Any, x: Any, w: Any, p: Params) -> Any:
        y = x @ w
        channels = [2]  # the axes that the channels are on, in order
        for k, step in enumerate(self.steps):
            if step in MOVES:
                y, channels = self._move(step, y, channels)
                continue
            c = spread(p[f"c{k}"], [y.shape[a] for a in channels], channels, y.ndim)
            y = {
                "add": lambda y, c: y + c,
                "radd": lambda y, c: c + y,
                "sub": lambda y, c: y - c,
                "rsub": lambda y, c: c - y,
                "mul": lambda y, c: y * c,
                "rmul": lambda y, c: c * y,
                "div": lambda y, c: y / c,
                "neg": lambda y, c: -y,
                "double": lambda y, c: 2.0 * y,
                "shift": lambda y, c: 0.5 - y,
            }[step](y, c)
        return y

    @staticmethod
    def _move(step: str, y: Any, channels: list[int]) -> tuple[Any, list[int]]:
        if step == "transpose":
            order = [*range(1, y.ndim), 0]
            return y.transpose(order), [order.index(a) for a in channels]
        if step == "newaxis":
            return y[None], [a + 1 for a in channels]
        if step == "split" and len(channels) == 1:
            (a,) = channels
            return y.reshape(*y.shape[:a], 2, C // 2, *y.shape[a + 1 :]), [a, a + 1]
        if step == "merge" and len(channels) == 2 and channels[1] == channels[0] + 1:
            (a, _) = channels
            return y.reshape(*y.shape[:a], C, *y.shape[a + 2 :]), [a]
        if step == "rows" and channels[0] >= 2:
            return y.reshape(-1, *y.shape[2:]), [a - 1 for a in channels]
        return y, channels


def spread(vector: Any, sizes: list[int], axes: list[int], rank: int) -> Any:
    """Place [C] along `axes` (of these sizes) of a tensor of `rank` axes; jax.numpy or NumPy."""
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    shape = [1] * rank
    for k in order:
        shape[axes[k]] = sizes[k]
    return vector.reshape(sizes).transpose(order).reshape(shape)


chains = st.lists(st.sampled_from(STEPS + MOVES), min_size=1, max_size=7).map(
    lambda steps: Chain(tuple(steps))
)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=4)
@hypothesis.given(st.lists(chains, min_size=10, max_size=10), st.integers(0, 9))
def test_random_chains_equal_the_reference(drawn, seed):
    rng = np.random.default_rng(seed)
    x = np.float32(rng.normal(size=(N, T, K)))
    named = {f"chain{i}": chain for i, chain in enumerate(drawn)}
    params = {
        name: {"w": np.float32(rng.normal(size=(K, C)))}
        | {
            f"c{k}": np.float32(rng.uniform(0.5, 1.5, C) * rng.choice([-1, 1], C))
            for k in range(len(chain.steps))
        }
        for name, chain in named.items()
    }

    def apply_fn(params, x):
        return {n: chain.run(jnp, x, params[n]["w"], params[n]) for n, chain in named.items()}

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER)
    got = qapply(qparams, x)
    for name, chain in named.items():
        p = {key: np.float64(value) for key, value in params[name].items()}
        want = chain.run(np, reference.fake(x), reference.fake_weight(p["w"], (1,)), p)
        close(got[name], want)
        has_bias = bool({"add", "radd", "sub", "rsub", "shift"} & set(chain.steps))
        assert ("bias" in qparams["sites"][name]) == has_bias, chain
