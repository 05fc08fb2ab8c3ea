"""What follows a site: affine chains in every form.

Each case is one function that runs on jax.numpy as the model and on NumPy in float64 as the
reference, where the activation and the weight are rounded to their int8 grids beforehand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import reference
from tests.run.chains import C, K, N, Params, T, close, make_params

pytestmark = pytest.mark.usefixtures("numbers_as_they_are")


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


def make_inputs(rng: np.random.Generator) -> Params:
    shapes = {"nk": (N, K), "ntk": (N, T, K), "k": (K,)}
    return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


def expected(case: Case, x: np.ndarray, params: Params) -> np.ndarray:
    """The model in float64 on what the int8 activation and weight stand for."""
    p = {name: np.float64(value) for name, value in params.items()}
    return case.run(np, reference.fake(x), reference.fake_weight(params["w"], case.axes), p)


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
