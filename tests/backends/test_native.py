"""Which calls the native kernels have, and that they give what XLA's forms and NumPy do."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.backends.backend import Backend, Call, Residual
from jaxquant.backends.native import Native, has
from jaxquant.backends.xla import Xla
from jaxquant.graph import contraction
from jaxquant.graph.model import trace_model
from jaxquant.graph.primitives import Channels
from jaxquant.jax_shim import jaxprs
from tests.backends import calls
from tests.native.cases import int8_values, needs_kernels, with_variants

# The shapes of x and of the weight, and the dimension numbers, the weight's part behind x's.
DOTS = {
    "dense": ((40, 6), (6, 5), (((1,), (0,)), ((), ()))),
    "heads": ((8, 5, 6), (6, 3, 4), (((2,), (0,)), ((), ()))),
    "heads together": ((8, 5, 3, 4), (3, 4, 7), (((2, 3), (0, 1)), ((), ()))),
    "heads first": ((8, 5, 6), (3, 6, 4), (((2,), (1,)), ((), ()))),
    "one row": ((3, 4), (3, 4, 2, 2), (((0, 1), (0, 1)), ((), ()))),
    "transposed": ((40, 6), (5, 6), (((1,), (1,)), ((), ()))),
    "first axis": ((6, 40), (6, 5), (((0,), (0,)), ((), ()))),
    "crossed": ((8, 3, 4), (4, 3, 7), (((1, 2), (1, 0)), ((), ()))),
    "experts": ((3, 40, 6), (3, 6, 5), (((2,), (1,)), ((0,), (0,)))),
    "experts behind": ((4, 3, 9, 6), (6, 5, 3), (((3,), (0,)), ((1,), (2,)))),
    "experts of pairs": ((2, 9, 3, 6), (3, 5, 2, 6), (((3,), (3,)), ((0, 2), (2, 0)))),
}
OTHERS = {
    "vector": ((40, 6), (6,), (((1,), (0,)), ((), ()))),
    "outer": ((40,), (6,), (((), ()), ((), ()))),
}
RAGGED = {
    "ragged": ((40, 6), (3, 6, 5), (((1,), (1,)), ((), ())), 0),
    "ragged, behind others": ((2, 20, 6), (6, 3, 5), (((2,), (0,)), ((), ())), 1),
    "ragged, before others": ((20, 2, 6), (3, 6, 5), (((2,), (1,)), ((), ())), 0),
    "ragged, experts of experts": ((2, 20, 6), (3, 2, 6, 5), (((2,), (2,)), ((0,), (1,))), 1),
}


def call_of(
    x: tuple[int, ...], weight: tuple[int, ...], numbers: contraction.DotNumbers,
    rows: int | None = None, *, position: int = 1, movements: Any = (), residual: Any = None,
) -> Call:  # fmt: skip
    """A call with one channel for each index of the weight that is not summed over.

    Args:
      x, weight, numbers: the dot.
      rows: of a ragged dot, the axis of x whose rows choose; the groups are the weight's axis 3.
      position: the weight's place.
      movements, residual: as of the call.
    """
    if position == 0:
        numbers = tuple((second, first) for first, second in numbers)
    shapes = (x, weight) if position else (weight, x)
    made = contraction.dot(numbers, [len(shape) for shape in shapes])
    if rows is not None:
        of_groups = next(a for a in made.operands[1].free if weight[a] == 3)
        ragged = jax.lax.RaggedDotDimensionNumbers(numbers, [rows], [of_groups])
        params = {"ragged_dot_dimension_numbers": ragged}
        made = contraction.build("ragged_dot_general", params, [len(x), len(weight)])
    places = {axis: made.place(position, axis) for axis in made.operands[position].kept}
    kept = {axis: place for axis, place in places.items() if place is not None}
    channels = Channels(tuple(weight[axis] for axis in kept), tuple(kept.values()))
    own, other = made.operands[1 - position], made.operands[position]
    free = {1 - position: [x[a] for a in own.free], position: [weight[a] for a in other.free]}
    shape = (*(x[a] for a in own.batch), *free[0], *free[1])
    for eqn in movements:
        shape = jax.eval_shape(lambda v, e=eqn: bind(e, v), jnp.zeros(shape)).shape
        channels = Channels(
            channels.sizes, tuple(list(eqn.params["permutation"]).index(a) for a in channels.axes)
        )
    return Call(
        made, position, weight, tuple(movements), channels, shape, zero_point=3, out_zero_point=-7,
        residual=residual,
    )  # fmt: skip


def bind(eqn: Any, value: jax.Array) -> jax.Array:
    return jaxprs.bind(eqn.primitive, [value], dict(eqn.params))[0]


def turned(*permutation: int) -> Any:
    """The equation of a transpose."""
    function = functools.partial(jnp.transpose, axes=permutation)
    return trace_model(
        lambda _, x: function(x), (), (jnp.zeros(range(1, len(permutation) + 1)),)
    ).graph.equations[0]


def operands_of(call: Call, x: tuple[int, ...]) -> dict[str, jax.Array]:
    """Numbers of few bits, so that no step of the epilogue rounds, in one instruction or in two."""
    rng = np.random.default_rng(0)
    weight = call.contraction.operands[call.weight_position]
    channels = int(np.prod(call.channels.sizes))
    found: dict[str, Any] = {
        "x": int8_values(0, x),
        "weight": int8_values(1, call.weight_shape, -127),
        "multiplier": 2.0 ** rng.integers(-12, -8, channels),
        "bias": rng.integers(-64, 64, channels) / 16,
        "inv_scale": np.float32(9.0),
    }
    if call.contraction.choosing is not None:
        groups = call.weight_shape[weight.chosen[0]]
        found["relative_scale"] = 2.0 ** -rng.integers(0, 3, channels * groups)
        found["sizes"] = np.array([7, 0, 9])
    if call.residual is not None:
        found["residual"] = rng.integers(-64, 64, call.shape) / 16
    floats = ("multiplier", "bias", "relative_scale", "residual")
    return {k: jnp.asarray(v, jnp.float32 if k in floats else None) for k, v in found.items()}


def check(call: Call, x: tuple[int, ...], is_packed: bool) -> None:
    """Assert that the kernels have a call and give what XLA gives."""
    assert has(call)
    operands = operands_of(call, x)
    want = jax.jit(functools.partial(Xla().call, call))(operands)
    if is_packed:
        operands["packed"] = Native().pack(call, operands["weight"])
    got = jax.jit(functools.partial(Native().call, call))(operands)
    for ours, theirs, output in zip(got, want, call.outputs, strict=True):
        assert (ours.shape, ours.dtype) == (output.shape, output.dtype)
        np.testing.assert_array_equal(ours, theirs)


@needs_kernels
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", [*DOTS, *RAGGED])
def test_a_dot_of_any_rank_gives_what_xla_gives(name: str, is_packed: bool) -> None:
    given = {**DOTS, **RAGGED}[name]
    check(call_of(*given), given[0], is_packed)


@needs_kernels
@pytest.mark.parametrize("name", ["dense", "heads first", "crossed", "experts behind"])
def test_a_weight_that_comes_first(name: str) -> None:
    check(call_of(*DOTS[name], position=0), DOTS[name][0], is_packed=True)


@needs_kernels
@pytest.mark.parametrize("name", ["heads", "experts", "ragged, behind others"])
def test_sums_that_are_turned_before_something_is_added(name: str) -> None:
    given = {**DOTS, **RAGGED}[name]
    rank = len(call_of(*given).shape)
    movements = [turned(*np.roll(range(rank), 1)), turned(1, 0, *range(2, rank))]
    call = call_of(*given, movements=movements, residual=Residual(False, 0))
    check(call, given[0], is_packed=True)


@needs_kernels
def test_experts_by_every_instruction_set_and_under_vmap() -> None:
    for name in ("experts", "ragged, behind others"):
        given = {**DOTS, **RAGGED}[name]
        call = call_of(*given)
        operands = operands_of(call, given[0])
        *_, want = jax.jit(functools.partial(Xla().call, call))(operands)
        for *_, got in with_variants(lambda c=call, o=operands: Native().call(c, o)).values():
            np.testing.assert_array_equal(got, want)
        several = jnp.stack([operands["x"], -operands["x"]])
        *_, got = jax.vmap(lambda x, c=call, o=operands: Native().call(c, {**o, "x": x}))(several)
        np.testing.assert_array_equal(got[0], want)


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
