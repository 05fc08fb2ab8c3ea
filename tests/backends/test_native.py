"""Which calls the native kernels have, and that they give what XLA's forms and NumPy do."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.backends.backend import Backend, Call
from jaxquant.backends.native import Native, has
from jaxquant.backends.xla import Xla
from jaxquant.graph import contraction
from jaxquant.graph.primitives import Channels
from tests.backends import calls
from tests.native.cases import int8_values, needs_kernels, with_variants

DOTS = {
    "dense": ((40, 6), (6, 5), (((1,), (0,)), ((), ()))),
    "heads": ((8, 5, 6), (6, 3, 4), (((2,), (0,)), ((), ()))),
    "heads together": ((8, 5, 3, 4), (3, 4, 7), (((2, 3), (0, 1)), ((), ()))),
    "one row": ((3, 4), (3, 4, 2, 2), (((0, 1), (0, 1)), ((), ()))),
}
OTHERS = {
    "transposed": ((40, 6), (5, 6), (((1,), (1,)), ((), ()))),
    "first axis": ((6, 40), (6, 5), (((0,), (0,)), ((), ()))),
    "crossed": ((8, 3, 4), (4, 3, 7), (((1, 2), (1, 0)), ((), ()))),
    "experts": ((3, 40, 6), (3, 6, 5), (((2,), (1,)), ((0,), (0,)))),
    "vector": ((40, 6), (6,), (((1,), (0,)), ((), ()))),
    "outer": ((40,), (6,), (((), ()), ((), ()))),
}


def call_of(x: tuple[int, ...], weight: tuple[int, ...], numbers: contraction.DotNumbers) -> Call:
    made = contraction.dot(numbers, (len(x), len(weight)))
    kept = made.operands[1].kept
    places = tuple(place for axis in kept if (place := made.place(1, axis)) is not None)
    shape = jax.eval_shape(
        lambda a, b: jax.lax.dot_general(a, b, numbers), jnp.zeros(x), jnp.zeros(weight)
    ).shape
    channels = Channels(tuple(weight[axis] for axis in kept), places)
    return Call(made, 1, weight, (), channels, shape, zero_point=3, out_zero_point=-7)


@needs_kernels
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", DOTS)
def test_a_dot_of_any_rank_gives_what_xla_gives(name: str, is_packed: bool) -> None:
    x, weight, numbers = DOTS[name]
    call = call_of(x, weight, numbers)
    assert has(call)
    channels = int(np.prod(call.channels.sizes))
    rng = np.random.default_rng(0)
    operands = {
        "x": jnp.asarray(int8_values(0, x)),
        "weight": jnp.asarray(int8_values(1, weight)),
        # Of few bits, so that no step of the epilogue rounds, in one instruction or in two.
        "multiplier": jnp.asarray(2.0 ** rng.integers(-12, -8, channels), jnp.float32),
        "bias": jnp.asarray(rng.integers(-64, 64, channels) / 16, jnp.float32),
        "inv_scale": jnp.float32(9.0),
    }
    want = Xla().call(call, operands)
    if is_packed:
        operands["packed"] = Native().pack(call, operands["weight"])
    got = Native().call(call, operands)
    for ours, theirs, output in zip(got, want, call.outputs, strict=True):
        assert (ours.shape, ours.dtype) == (output.shape, output.dtype)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_of_matrices_is_left_to_xla(name: str) -> None:
    assert not has(call_of(*OTHERS[name]))


FORMS = [form for form in calls.FORMS if form != "three axes"]


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_zero_points_that_vary(form: str) -> None:
    given = calls.example(form, "both results")
    assert has(given.call)
    packed = Native().pack(given.call, jnp.asarray(given.operands["weight"]))
    calls.check_in_a_loop(Native(), given, packed=packed)


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_zero_points_that_are_known(form: str) -> None:
    calls.check_known(Native(), calls.example(form, "int8"))


@needs_kernels
@pytest.mark.parametrize(
    ("form", "epilogue"),
    [("dense", "both results"), ("depthwise", "int8 residual"),
     *(("many channels", epilogue) for epilogue in calls.EPILOGUES)],
)  # fmt: skip
def test_by_every_instruction_set(form: str, epilogue: str) -> None:
    with_variants(lambda: calls.check_in_a_loop(Native(), calls.example(form, epilogue)))


@needs_kernels
def test_a_call_whose_zero_points_vary_is_covered_as_one_whose_are_known() -> None:
    for form in calls.FORMS:
        call = calls.example(form, "int8").call
        varying = dataclasses.replace(call, varies=True)
        assert Native().covers(varying, False) == Native().covers(call, False)
        assert Native().joins(varying) == Native().joins(call)


@needs_kernels
def test_a_sequence_whose_zero_points_vary() -> None:
    """Three convolutions, each with points of its own; the last one adds what the first gives."""
    made = [calls.example("depthwise", name) for name in ("int8", "int8", "both results")]
    varying = [dataclasses.replace(each.call, varies=True) for each in made]
    links = [{}, {"x": (0, 0)}, {"x": (1, 0), "residual": (0, 0)}]
    results = [(2, 0), (2, 1), (0, 0)]
    points = calls.stacked_steps()
    stacked = [
        calls.as_operands(call, jax.tree.map(lambda of_steps, k=k: jnp.roll(of_steps, k), points))
        for k, call in enumerate(varying)
    ]

    def run(backend: Backend) -> Any:
        def step(carry: None, points: Any) -> Any:
            operands = [
                {key: jnp.asarray(value) for key, value in each.operands.items() if key not in read}
                for each, read in zip(made, links, strict=True)
            ]
            given = [{**own, **new} for own, new in zip(operands, points, strict=True)]
            return None, list(backend.sequence(varying, links, given, results))

        return jax.jit(lambda stacked: jax.lax.scan(step, None, stacked)[1])(stacked)

    want = run(Xla())
    for got in with_variants(lambda: run(Native())).values():
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@needs_kernels
def test_zero_points_under_vmap() -> None:
    """A mapped axis of zero points is one call for each of them."""
    given = calls.example("padded", "int8 residual")
    call = dataclasses.replace(given.call, varies=True)
    operands = {k: jnp.asarray(v) for k, v in given.operands.items()}
    mapped = jax.vmap(
        lambda points: Native().call(call, {**operands, **calls.as_operands(call, points)})
    )
    (got,) = jax.jit(mapped)(calls.stacked_steps())
    for at, points in enumerate(calls.STEPS):
        np.testing.assert_array_equal(got[at], given.want(points)[0])
