"""quantize and the int8 dot equal the reference exactly; dots of every form through quant_post."""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.backends import int8
from jaxquant.graph import contraction
from jaxquant.jax_shim import choices
from tests import reference
from tests.contractions import int8_dot

pytestmark = pytest.mark.usefixtures("numbers_as_they_are")

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=40)

# Every example compiles; the integers are the same at any optimization level.
compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@st.composite
def dots(draw: st.DrawFn, min_size: int = 0) -> tuple[tuple[int, ...], tuple[int, ...], Any]:
    """The two shapes of a dot_general and its dimension numbers, axes in any order."""
    sizes = st.integers(min_size, 4)
    contract = draw(st.lists(sizes, max_size=2))
    batch = draw(st.lists(sizes, max_size=2))

    def operand() -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        free = draw(st.lists(sizes, max_size=2))
        shape = [*batch, *contract, *free]
        order = draw(st.permutations(range(len(shape))))
        place = [order.index(axis) for axis in range(len(shape))]
        n = len(batch)
        return tuple(shape[a] for a in order), tuple(place[n : n + len(contract)]), tuple(place[:n])

    lhs, lhs_contract, lhs_batch = operand()
    rhs, rhs_contract, rhs_batch = operand()
    return lhs, rhs, ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))


@settings
@hypothesis.given(dots(min_size=1), st.data())
def test_a_dot_with_a_weight_that_batch_axes_share_equals_the_reference(case, data):
    lhs_shape, rhs_shape, numbers = case
    shapes = [list(lhs_shape), list(rhs_shape)]
    side = data.draw(st.integers(0, 1))
    for axis in numbers[1][side]:
        if data.draw(st.booleans()):
            shapes[side][axis] = 1
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-127, 127, shape, np.int8, endpoint=True) for shape in shapes)
    given = contraction.dot(numbers, (x.ndim, w.ndim))
    got = compile_fast(lambda x, w: int8.dot_with_shared((x, w), given))(x, w)
    whole = np.broadcast_to(x, lhs_shape), np.broadcast_to(w, rhs_shape)
    np.testing.assert_array_equal(np.asarray(got), reference.dot_general(*whole, numbers))


@settings
@hypothesis.given(dots(), st.integers(0, 9))
def test_dot_equals_the_reference(case, seed):
    lhs_shape, rhs_shape, numbers = case
    rng = np.random.default_rng(seed)
    lhs = rng.integers(-127, 127, lhs_shape, np.int8, endpoint=True)
    rhs = rng.integers(-127, 127, rhs_shape, np.int8, endpoint=True)
    got = compile_fast(lambda x, w: int8_dot((x, w), numbers))(lhs, rhs)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got), reference.dot_general(lhs, rhs, numbers))


def test_largest_values_do_not_wrap():
    x = jnp.full((1, 5000), 127, jnp.int8)
    assert int8_dot((x, -x), (((1,), (1,)), ((), ()))).item() == -5000 * 127**2


quantize = jax.jit(int8.quantize)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def test_rounds_half_to_even():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -125.5, -126.5], np.float32)
    want = [0, 2, 2, 0, -2, -2, 126, 126, -126, -126]
    assert quantize(x, np.float32(1)).tolist() == want
    assert quantize(x * 4, np.float32(0.25)).tolist() == want


def test_saturates():
    x = np.array([127.4, 127.6, 128, 200, 1e9, 3e38], np.float32)
    assert (
        quantize(np.concatenate([x, -x]), np.float32(1)).tolist() == [127] * 6 + [-127] + [-128] * 5
    )


def test_zero_threshold():
    """The scale of a tensor that is all zero is 1, so that zeros stay zeros."""
    params = {"w": np.ones((4, 3), np.float32), "v": np.ones((4, 3), np.float32)}
    x, other = np.zeros((2, 4), np.float32), np.float32([[1, 2, 3, 4], [5, 6, 7, 8]])
    qparams, qapply = jaxquant.quant_post(
        params, lambda p, x, y: (x @ p["w"], y @ p["v"]), [(x, other)], **reference.QUANTIZER
    )
    assert qparams["tensors"]["w/input"]["inv_scale"].item() == 1.0
    assert not np.asarray(qapply(qparams, x, other)[0]).any()
    assert np.isfinite(jax.jit(qapply)(qparams, x + 1e30, other)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings
@hypothesis.given(st.integers(0, 10**6), st.integers(-12, 6))
def test_quantize_equals_the_reference(dtype, seed, exponent):
    rng = np.random.default_rng(seed)
    steps = rng.integers(-300, 300, 64) / 2  # the halves are ties
    x = np.concatenate([rng.normal(size=64) * 100, steps])
    x = (x * 2.0**exponent).astype(DTYPES[dtype])
    for inv_scale in (np.float32(2.0**-exponent), reference.inv_scale(x)):
        got = quantize(x, inv_scale)
        assert got.dtype == jnp.int8
        np.testing.assert_array_equal(np.asarray(got), reference.quantize(x, inv_scale))


@hypothesis.settings(derandomize=True, deadline=None, max_examples=3)
@hypothesis.given(
    st.lists(st.tuples(dots(min_size=1), st.booleans()), min_size=8, max_size=8), st.integers(0, 9)
)
def test_quantized_model_equals_the_reference(cases, seed):
    """`quant_post` of eight dots at once, the weight on either side."""
    rng = np.random.default_rng(seed)
    params, x, numbers, sides = {}, {}, {}, {}
    for i, ((lhs, rhs, dims), on_the_left) in enumerate(cases):
        name = f"dot{i}"
        operands = [np.float32(rng.normal(size=shape)) for shape in (lhs, rhs)]
        numbers[name], sides[name] = dims, 0 if on_the_left else 1
        params[name] = {"w": operands[sides[name]]}
        x[name] = operands[1 - sides[name]]

    def operands_of(name: str, activation: Any, weight: Any) -> tuple[Any, Any]:
        return (activation, weight) if sides[name] else (weight, activation)

    def apply_fn(params, x):
        return {
            name: lax.dot_general(*operands_of(name, x[name], params[name]["w"]), dims)
            for name, dims in numbers.items()
        }

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER)
    assert {row["status"] for row in qapply.report().rows} == {"int8"}
    got = qapply(qparams, x)
    for name, dims in numbers.items():
        weight = np.asarray(qparams["params"][name]["w"]["int8"])
        quantized = reference.quantize(x[name], reference.inv_scale(x[name]))
        accumulator = reference.dot_general(*operands_of(name, quantized, weight), dims)
        axes = weight_axes_in_output(x[name].shape, weight.shape, dims, sides[name])
        want = reference.epilogue(accumulator, qparams["sites"][name], axes)
        np.testing.assert_allclose(got[name], want, rtol=2e-6, atol=1e-6, err_msg=name)


def weight_axes_in_output(
    x: tuple[int, ...], weight: tuple[int, ...], numbers: Any, side: int
) -> list[int]:
    """For every axis of the weight that is not summed over, its place in the dot's output."""
    contract, batch = numbers[0][side], numbers[1][side]
    free = [a for a in range(len(weight)) if a not in (*contract, *batch)]
    if side:
        before = len(x) - len(numbers[0][0])  # batch and free axes of the activation
    else:
        before = len(batch)
    return [
        batch.index(a) if a in batch else before + free.index(a)
        for a in range(len(weight))
        if a not in contract
    ]


class Layers(nn.Module):
    """Every Flax layer that is a dot with a weight."""

    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
        embed = nn.Embed(12, 8, name="embed")
        return {
            "dense": nn.Dense(5, name="dense", bias_init=nn.initializers.normal())(x),
            "general": nn.DenseGeneral(
                (2, 3), axis=(-2, -1), name="general", bias_init=nn.initializers.normal()
            )(x),
            "batched": nn.DenseGeneral(
                4, axis=-1, batch_dims=(0,), name="batched", bias_init=nn.initializers.normal()
            )(x),
            "einsum": nn.Einsum(
                (2, 8, 4),
                "ntk,hkd->nhtd",
                name="einsum",
                bias_init=nn.initializers.normal(),
            )(x),
            "embed": embed(tokens),
            "attend": embed.attend(x),
        }


@functools.cache
def quantized_layers() -> Any:
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, 3, 8)))
    tokens = rng.integers(0, 12, (2, 3)).astype(np.int32)
    model = Layers()
    params = model.init(jax.random.key(0), x, tokens)
    quantized = jaxquant.quant_post(params, model.apply, [(x, tokens)], **reference.QUANTIZER)
    return jax.tree.map(np.asarray, params["params"]), x, tokens, *quantized


def layer_references(p: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    x, weight = reference.fake(x), reference.fake_weight
    return {
        "dense": x @ weight(p["dense"]["kernel"], (1,)) + p["dense"]["bias"],
        "general": np.einsum("ntk,tkab->nab", x, weight(p["general"]["kernel"], (2, 3)))
        + p["general"]["bias"],
        "batched": np.einsum("ntk,nkc->ntc", x, weight(p["batched"]["kernel"], (0, 2)))
        + p["batched"]["bias"][:, None],
        "einsum": np.einsum("ntk,hkd->nhtd", x, weight(p["einsum"]["kernel"], (0, 2)))
        + p["einsum"]["bias"][None, :, None],
        "attend": x @ weight(p["embed"]["embedding"].T, (1,)),
    }


@pytest.mark.parametrize("layer", ["dense", "general", "batched", "einsum", "attend"])
def test_flax_layers(layer):
    params, x, tokens, qparams, qapply = quantized_layers()
    got, want = qapply(qparams, x, tokens)[layer], layer_references(params, x)[layer]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)


def test_every_flax_layer_is_int8_and_takes_its_bias():
    _, _, _, qparams, qapply = quantized_layers()
    assert {row["status"] for row in qapply.report().rows} == {"int8"}
    biased = {name for name, arrays in qparams["sites"].items() if "bias" in arrays}
    assert biased == {"dense", "general", "batched", "einsum"}


def test_tied_embedding_is_stored_once():
    """The lookup reads rows of the dot's int8 table, times their scales."""
    params, x, tokens, qparams, qapply = quantized_layers()
    table = qparams["params"]["params"]["embed"]["embedding"]
    assert sorted(table) == ["int8", "scale"]
    looked_up = qapply(qparams, x, tokens)["embed"]
    expected = reference.fake_weight(params["embed"]["embedding"], (0,))[tokens]
    np.testing.assert_allclose(looked_up, expected, rtol=1e-6)


@pytest.mark.parametrize("length", [128, 12])
def test_heads_in_int8_are_the_same_turned(length: int):
    class Scores(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k = (nn.DenseGeneral((2, 8))(x) for _ in range(2))
            return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    x = jax.random.normal(jax.random.key(0), (2, length, 16))
    params = Scores().init(jax.random.key(1), x)
    options = {"is_full_quantize": True, "recover": ()}
    qparams, qapply = jaxquant.quant_post(params, Scores().apply, [x], **options)
    with choices.at(choices.Place("tpu", is_export=False, is_one_device=True)):
        lowered = jax.jit(qapply).lower(qparams, x)
    want = jax.jit(qapply.with_backend("xla"))(qparams, x)
    held = re.findall(r"LayoutConstraint.*-> tensor<(\w+)>", lowered.as_text())
    assert held == 2 * ["2x128x16xi8" if length == 128 else "2x12x16xi32"]
    got, error = lowered.compile()(qparams, x), np.abs(want - Scores().apply(params, x)).mean()
    assert np.abs(got - want).mean() < 0.05 * error
