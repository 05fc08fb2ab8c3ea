"""What follows a site: affine chains in every form, activations, and int8 to the next site.

Each case is one function that runs on jax.numpy as the model and on NumPy in float64 as the
reference, where the activation and the weight are rounded to their int8 grids beforehand.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import reference

pytestmark = pytest.mark.usefixtures("numbers_as_they_are")

N, T, K, C = 4, 3, 8, 6
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """`run(xp, x, w, p)`: the dot and what follows it.

    `x` is the name of the input, `weight` the shape of the weight, `axes` those of its axes that
    are not summed over.  `absorbed`: whether a bias of the chain belongs to the site's arrays.
    """

    run: Callable[[Any, Any, Any, Params], Any]
    x: str = "nk"
    weight: tuple[int, ...] = (K, C)
    axes: tuple[int, ...] = (1,)
    absorbed: bool = True


def affine(f: Callable[[Any, Any, Params], Any], absorbed: bool = True, x: str = "nk") -> Case:
    return Case(lambda xp, x, w, p: f(xp, x @ w, p), x=x, absorbed=absorbed)


def einsum(
    spec: str,
    x: str,
    weight: tuple[int, ...],
    axes: tuple[int, ...],
    then: Callable[[Any, Any, Params], Any],
) -> Case:
    return Case(lambda xp, x, w, p: then(xp, xp.einsum(spec, x, w), p), x, weight, axes)


# Affine in the dot's own layout.
PLAIN_CASES = {
    # One step, in every spelling.
    "bias": affine(lambda xp, y, p: y + p["b"]),
    "bias on the left": affine(lambda xp, y, p: p["b"] + y),
    "minus c": affine(lambda xp, y, p: y - p["b"]),
    "c minus": affine(lambda xp, y, p: p["b"] - y),
    "scale": affine(lambda xp, y, p: p["s"] * y + p["b"]),
    "over c": affine(lambda xp, y, p: y / p["s"] + p["b"]),
    "negative scale": affine(lambda xp, y, p: y * -p["s"] + p["b"]),
    "negated": affine(lambda xp, y, p: -(y + p["b"])),
    "minus negated": affine(lambda xp, y, p: -(p["b"] - y)),
    "some scales are zero": affine(lambda xp, y, p: y * p["z"] + p["b"]),
    "scalar literals": affine(lambda xp, y, p: (3.0 - y / 4.0) * 2.0),
    "scalar parameter": affine(lambda xp, y, p: y * p["scalar"] - p["scalar"]),
    # BatchNorm.
    "batch norm, textbook": affine(
        lambda xp, y, p: (y - p["mean"]) / xp.sqrt(p["var"] + 1e-3) * p["s"] + p["b"]
    ),
    "batch norm, scale first": affine(
        lambda xp, y, p: (y - p["mean"]) * (p["s"] / xp.sqrt(p["var"] + 1e-3)) + p["b"]
    ),
    "batch norm, as one affine": affine(
        lambda xp, y, p: (
            y * (p["s"] / xp.sqrt(p["var"])) + (p["b"] - p["mean"] * p["s"] / xp.sqrt(p["var"]))
        )
    ),
    "bias, then batch norm": affine(
        lambda xp, y, p: (y + p["b"] - p["mean"]) / xp.sqrt(p["var"]) * -p["s"] + p["b"]
    ),
    # How the operand is spread.
    "broadcast bias": affine(lambda xp, y, p: y + xp.broadcast_to(p["b"][None], y.shape)),
    "reshaped bias": affine(lambda xp, y, p: y + p["b"].reshape(1, -1)),
    "bias of three axes": affine(lambda xp, y, p: y + p["b"], x="ntk"),
    "computed bias": affine(lambda xp, y, p: y + xp.broadcast_to(p["b"] * 2.0 + p["s"], y.shape)),
    "repeated scalar": affine(lambda xp, y, p: y + xp.broadcast_to(p["scalar"], y.shape)),
}

CASES = PLAIN_CASES | {
    # Movements between the dot and the bias.
    "transposed": affine(lambda xp, y, p: y.T + p["b"][:, None]),
    "transposed twice": affine(
        lambda xp, y, p: (y.transpose(2, 0, 1) * p["s"][:, None, None]).transpose(1, 2, 0) + p["b"],
        x="ntk",
    ),
    "heads": affine(lambda xp, y, p: y.reshape(N, T, 2, C // 2) + p["b"].reshape(2, -1), x="ntk"),
    "heads and back": affine(
        lambda xp, y, p: (y.reshape(N, 2, C // 2) * p["s"].reshape(2, -1)).reshape(N, C) + p["b"]
    ),
    "heads in front": affine(
        lambda xp, y, p: (
            y.reshape(N, T, 2, C // 2).transpose(2, 0, 3, 1)
            + p["b"].reshape(2, 1, -1, 1) * xp.ones((2, 1, C // 2, 1), xp.float32)
        ),
        x="ntk",
    ),
    "rows merged": affine(lambda xp, y, p: y.reshape(N * T, C) + p["b"], x="ntk"),
    "new axis": affine(lambda xp, y, p: xp.expand_dims(y, 1) * p["s"] + p["b"]),
    "batch reversed": affine(lambda xp, y, p: y[::-1] + p["b"]),
    # What has to stay outside of the site.
    "bias that varies along the batch": affine(lambda xp, y, p: y + p["table"], absorbed=False),
    "channels reversed": affine(lambda xp, y, p: y[:, ::-1] + p["b"], absorbed=False),
    "channels and rows merged": affine(
        lambda xp, y, p: y.reshape(2, -1) + p["table"].reshape(2, -1), absorbed=False
    ),
    "channels split across the heads": affine(
        lambda xp, y, p: y.reshape(N, 2, C // 2).transpose(0, 2, 1).reshape(N, C) + p["b"],
        absorbed=False,
    ),
    "doubled": affine(lambda xp, y, p: (y + y) + p["b"], absorbed=False),
    "squared": affine(lambda xp, y, p: y * y + p["b"], absorbed=False),
    "c over": affine(lambda xp, y, p: p["b"] / (xp.abs(y) + 1.0), absorbed=False),
    "used twice": affine(lambda xp, y, p: y * p["s"] + (y + p["b"]), absorbed=False),
    "both results": affine(lambda xp, y, p: xp.stack([y, y + p["b"]]), absorbed=False),
    "spread over a new axis": affine(
        lambda xp, y, p: y[:, None] + xp.broadcast_to(p["table"], (1, N, C)), absorbed=False
    ),
    "largest of": affine(lambda xp, y, p: xp.maximum(y, p["b"]), absorbed=False),
    # Other dots.
    "einsum, transposed output": einsum(
        "nk,kc->cn", "nk", (K, C), (1,), lambda xp, y, p: y * p["s"][:, None] + p["b"][:, None]
    ),
    "einsum, weight first": Case(
        lambda xp, x, w, p: xp.einsum("ck,nk->nc", w, x) * p["s"] + p["b"], "nk", (C, K), (0,)
    ),
    "einsum, heads": einsum(
        "ntk,khd->nhtd",
        "ntk",
        (K, 2, 3),
        (1, 2),
        lambda xp, y, p: y + p["b"].reshape(2, 1, 3),
    ),
    "einsum, heads swapped": einsum(
        "ntk,khd->ndth",
        "ntk",
        (K, 2, 3),
        (1, 2),
        lambda xp, y, p: y + p["b"].reshape(3, 1, 2),
    ),
    "einsum, two axes summed": einsum(
        "ntk,tkc->nc", "ntk", (T, K, C), (2,), lambda xp, y, p: p["b"] - y / p["s"]
    ),
    "einsum, batched": einsum(
        "ntk,tkc->ntc", "ntk", (T, K, 2), (0, 2), lambda xp, y, p: y + p["b"].reshape(T, 2)
    ),
    "einsum, batched and transposed": einsum(
        "ntk,tkc->tcn", "ntk", (T, K, 2), (0, 2), lambda xp, y, p: y + p["b"].reshape(T, 2, 1)
    ),
    "outputs split, then merged": einsum(
        "nk,khd->nhd", "nk", (K, 2, 3), (1, 2), lambda xp, y, p: y.reshape(N, C) * p["s"] + p["b"]
    ),
    "vector": Case(lambda xp, x, w, p: x @ w + 1.5, "nk", (K,), ()),
    "vector in": Case(lambda xp, x, w, p: (x @ w + p["b"]) * p["s"], "k", (K, C), (1,)),
}

NUMPY_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "gelu": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(x, 0),
}
EXACT_GELU = "exact gelu"
NUMPY_ACTIVATIONS[EXACT_GELU] = lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def jax_activation(name: str) -> Callable[[jax.Array], jax.Array]:
    if name == EXACT_GELU:
        return functools.partial(jax.nn.gelu, approximate=False)
    return getattr(jax.nn, name)


def make_inputs(rng: np.random.Generator) -> Params:
    shapes = {"nk": (N, K), "ntk": (N, T, K), "k": (K,)}
    return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


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


def expected(case: Case, x: np.ndarray, params: Params) -> np.ndarray:
    """The model in float64 on what the int8 activation and weight stand for."""
    p = {name: np.float64(value) for name, value in params.items()}
    return case.run(np, reference.fake(x), reference.fake_weight(params["w"], case.axes), p)


def close(got: Any, want: np.ndarray) -> None:
    """Equal up to the rounding of a few float32 operations; an int8 step is far larger."""
    got = np.asarray(got)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=4e-6, atol=4e-6 * (1 + np.abs(want).max()))


@functools.cache
def quantized_cases() -> Any:
    rng = np.random.default_rng(0)
    inputs = make_inputs(rng)
    params = {name: make_params(rng, case.weight) for name, case in CASES.items()}

    def apply_fn(params, inputs):
        return {
            name: case.run(jnp, inputs[case.x], params[name]["w"], params[name])
            for name, case in CASES.items()
        }

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [inputs], **reference.QUANTIZER)
    return params, inputs, qparams, qapply, qapply(qparams, inputs)


@pytest.mark.parametrize("name", CASES)
def test_chain_equals_the_reference(name):
    params, inputs, qparams, qapply, got = quantized_cases()
    case = CASES[name]
    status = {row["name"]: row["status"] for row in qapply.report().rows}
    assert status[name] == "int8"
    close(got[name], expected(case, inputs[case.x], params[name]))
    assert ("bias" in qparams["sites"][name]) == case.absorbed


@pytest.mark.parametrize("name", PLAIN_CASES)
def test_site_arrays_are_the_chain(name):
    """Probing the chain in float64 gives the site's multiplier and bias."""
    params, inputs, qparams, _, _ = quantized_cases()
    case = CASES[name]
    p = {key: np.float64(value) for key, value in params[name].items()}
    x, w = np.zeros(inputs[case.x].shape), np.zeros((K, C))
    offset = case.run(np, x, w, p).reshape(-1, C)[0]
    x[..., 0], w[0] = 1, 1
    factor = case.run(np, x, w, p).reshape(-1, C)[0] - offset
    _, scale = reference.quantize_weight(params[name]["w"], case.axes)
    scale = scale / np.float64(reference.inv_scale(inputs[case.x]))
    arrays = qparams["sites"][name]
    np.testing.assert_allclose(arrays["bias"], offset, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(arrays["multiplier"], factor * scale, rtol=2e-6, atol=1e-9)


# Random chains of affine steps and movements on [N, T, C] and its rearrangements.

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


# Activations, and the int8 tensor that the next site reads.


@functools.cache
def quantized_activations() -> Any:
    """Every activation behind a site, and a second site that multiplies it by the identity."""
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(32, K)) * 2)
    params = {
        name: {"first": make_params(rng, (K, C)), "next": {"w": np.eye(C, dtype=np.float32)}}
        for name in NUMPY_ACTIVATIONS
    }

    def apply_fn(params, x):
        outputs = {}
        for name in NUMPY_ACTIVATIONS:
            p = params[name]["first"]
            y = jax_activation(name)(x @ p["w"] * p["s"] + p["b"])
            outputs[name] = y, y @ params[name]["next"]["w"]
        return outputs

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER)
    return params, x, qparams, qapply(qparams, x)


def activated(name: str, params: Params, x: np.ndarray) -> np.ndarray:
    p = params[name]["first"]
    dot = reference.fake(x) @ reference.fake_weight(p["w"], (1,))
    return NUMPY_ACTIVATIONS[name](dot * p["s"] + p["b"])


@pytest.mark.parametrize("name", NUMPY_ACTIVATIONS)
def test_activation_equals_the_reference(name):
    params, x, _, got = quantized_activations()
    close(got[name][0], activated(name, params, x))


@pytest.mark.parametrize("name", NUMPY_ACTIVATIONS)
def test_int8_handed_to_the_next_site(name):
    """The identity's int8 weight is 127 on its diagonal, so its output tells its int8 input."""
    params, x, qparams, got = quantized_activations()
    site = f"{name}/next"
    arrays, tensor = qparams["sites"][site], qparams["tensors"][f"{site}/input"]
    assert sorted(arrays) == ["multiplier"]
    handed = np.asarray(got[name][1]) / (127 * np.float64(arrays["multiplier"]))
    np.testing.assert_allclose(handed, np.rint(handed), atol=1e-4)
    want = reference.quantize(activated(name, params, x), tensor["inv_scale"])
    assert np.abs(want).max() >= 125  # the grid is used
    difference = np.abs(np.rint(handed) - want)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


# Lower precision, other batch sizes.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_chain_runs_in_float32_whatever_the_dtype(dtype):
    """One rounding to the model's dtype, at the end."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(16, K)), dtype)
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), make_params(rng, (K, C)))

    def run(xp, y, p):
        y = (y - p["mean"]) * p["s"] + p["b"]
        return y * (1 / (1 + xp.exp(-y)))

    def apply_fn(p, x):
        return run(jnp, x @ p["w"], p)

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER)
    assert {a.dtype for a in qparams["sites"]["w"].values()} == {jnp.dtype(jnp.float32)}
    got = qapply(qparams, x)
    assert got.dtype == dtype
    p = {name: np.asarray(value).astype(np.float64) for name, value in params.items()}
    want = run(np, reference.fake(x) @ reference.fake_weight(p["w"], (1,)), p)
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.float64(got), want, rtol=1.01 * half_ulp, atol=1e-6)


def test_constant_activation(rng):
    """A tensor of one value becomes 127 everywhere and is exact."""
    params, x = make_params(rng, (K, C)), np.full((N, K), -0.3, np.float32)
    case = CASES["bias"]

    def apply_fn(p, images):
        return case.run(jnp, jnp.where(images == images, jnp.float32(-0.3), images), p["w"], p)

    images = np.float32(rng.normal(size=(N, K)))
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [images], **reference.QUANTIZER)
    close(qapply(qparams, images), expected(case, x, params))
    np.testing.assert_allclose(reference.fake(x), x, rtol=1e-7)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda y, p: y + p["b"], id="bias"),
        pytest.param(lambda y, p: y.reshape(-1, 2, 3) + p["b"].reshape(2, 3), id="heads"),
        pytest.param(lambda y, p: y.reshape(-1) + 1.0, id="flat"),
        pytest.param(lambda y, p: y + p["table"][: len(y)], id="positions"),
    ],
)
def test_other_batch_sizes(run, rng):
    params = make_params(rng, (K, C))
    x = np.float32(rng.normal(size=(N, K)))

    def apply_fn(p, x):
        return run(x @ p["w"], p)

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER)
    p = jax.tree.map(np.float64, params)
    scale = np.float64(reference.inv_scale(x))
    for size in (N, 2, 1):
        quantized = reference.quantize(x[:size], scale) / scale
        close(
            qapply(qparams, x[:size]),
            run(quantized @ reference.fake_weight(params["w"], (1,)), p),
        )
