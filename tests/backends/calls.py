"""Calls of every form, with zero points that are known or vary, and what NumPy makes of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.backends.backend import NO_CLAMP, Backend, Call, Residual
from jaxquant.backends.zero_points import ZeroPoints
from jaxquant.graph import contraction
from jaxquant.graph.primitives import Channels
from tests import reference
from tests.contractions import of_conv

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
NHC, NDHWC = ("NHC", "HIO", "NHC"), ("NDHWC", "DHWIO", "NDHWC")
DENSE = (((1,), (0,)), ((), ()))
HEADS = (((2, 3), (0, 1)), ((), ()))

# The shapes of x and of the weight, and the dimension numbers of a dot or the layout of a
# convolution, whose window pads by one where nothing else is said.
FORMS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], Any, dict[str, Any]]] = {
    "dense": ((40, 6), (6, 5), DENSE, {}),
    "heads": ((8, 5, 3, 4), (3, 4, 7), HEADS, {}),
    "padded": ((2, 5, 6, 3), (3, 3, 3, 4), NHWC, {}),
    "many channels": ((1, 4, 4, 64), (3, 3, 64, 32), NHWC, {}),
    "pointwise": ((2, 5, 6, 3), (1, 1, 3, 4), NHWC, {"padding": ((0, 0), (0, 0))}),
    "strided": ((2, 5, 6, 3), (3, 2, 3, 4), NHWC, {"window_strides": (2, 3)}),
    "dilated": ((2, 6, 7, 3), (3, 3, 3, 4), NHWC, {"rhs_dilation": (2, 2)}),
    "transposed": ((2, 4, 3, 3), (3, 3, 3, 4), NHWC, {"lhs_dilation": (2, 2)}),
    "grouped": ((2, 5, 6, 6), (3, 3, 3, 4), NHWC, {"feature_group_count": 2}),
    "depthwise": ((2, 5, 6, 8), (3, 3, 1, 8), NHWC, {"feature_group_count": 8}),
    "depthwise, strided": ((2, 5, 6, 70), (3, 3, 1, 70), NHWC,
                           {"feature_group_count": 70, "window_strides": (2, 2)}),
    "channels first": ((2, 3, 5, 6), (4, 3, 3, 3), NCHW, {}),
    "one axis": ((2, 9, 3), (4, 3, 4), NHC, {}),
    "three axes": ((1, 3, 4, 3, 2), (2, 2, 2, 2, 3), NDHWC, {}),
}  # fmt: skip

# What follows the sums: clamps, what is added, and which results there are.
EPILOGUES: Mapping[str, dict[str, Any]] = {
    "int8": {},
    "clamped": {"clamps": ((0.0, 6.0), NO_CLAMP)},
    "from zero": {"clamps": ((0.0, np.inf), NO_CLAMP)},  # at zero point -128 it cuts nothing
    "int8 residual": {"residual": Residual(True, 0), "clamps": ((-9.0, 9.0), (0.0, np.inf))},
    "float residual": {"residual": Residual(False, 0), "gives_float": True},
    "both results": {"residual": Residual(True, 0), "gives_float": True},
    "float alone": {"out_zero_point": None, "gives_float": True},
}
# Several steps' zero points: of x, of the residual, of the result.
STEPS = (ZeroPoints(0, 0, 0), ZeroPoints(-128, 5, -128), ZeroPoints(31, -77, 127))


@dataclasses.dataclass(frozen=True)
class Example:
    """A call whose zero points are all 0, and its operands: numbers of which no step is rounded."""

    call: Call
    operands: dict[str, np.ndarray]
    numbers: Any  # of the dot, or the parameters of the convolution

    def with_known(self, points: ZeroPoints) -> Call:
        """The call with zero points that are known."""
        residual, out = self.call.residual, self.call.out_zero_point
        return dataclasses.replace(
            self.call,
            zero_point=points.x,
            residual=residual and residual._replace(zero_point=points.residual),
            out_zero_point=None if out is None else points.out,
        )

    def want(self, points: ZeroPoints) -> list[np.ndarray]:
        """The results, by NumPy in int64 and float64."""
        given, call = self.operands, self.call
        x, weight = given["x"].astype(np.int64), given["weight"].astype(np.int64)
        if call.contraction.window is None:
            sums = reference.dot_general(x, weight, self.numbers)
        else:
            # What is outside counts as the zero point, which the sums keep.
            inside = reference.conv(x - int(points.x), weight, **self.numbers)
            axes = call.contraction.operands[1]
            of_weight = weight.sum((*axes.contracted, *axes.window))
            sums = inside + self._spread(int(points.x) * of_weight)
        y = sums * self._spread(given["multiplier"]) + self._spread(given["bias"])
        y = np.clip(y, *call.clamps[0])
        if call.residual is not None:
            added = given["residual"].astype(np.float64)
            if call.residual.is_int8:
                added = (added - int(points.residual)) * given["residual_scale"]
            y = np.clip(y + added, *call.clamps[1])
        results = [y.astype(np.float32)] if call.gives_float else []
        if call.out_zero_point is not None:
            whole = np.rint(y * given["inv_scale"]) + int(points.out)
            results.append(np.clip(whole, -128, 127).astype(np.int8))
        return results

    def _spread(self, channels: np.ndarray) -> np.ndarray:
        where = self.call.channels
        rank = len(self.call.shape)
        return reference.along(channels.astype(np.float64), where.sizes, where.axes, rank)


def example(form: str, epilogue: str) -> Example:
    """The call of a form with an epilogue, by their names."""
    x, weight, numbers, options = FORMS[form]
    if form in ("dense", "heads"):
        made = contraction.dot(numbers, (len(x), len(weight)))
        function = functools.partial(lax.dot_general, dimension_numbers=numbers)
    else:
        rank = len(x) - 2
        numbers = {
            "window_strides": (1,) * rank, "padding": ((1, 1),) * rank,
            "lhs_dilation": (1,) * rank, "rhs_dilation": (1,) * rank, "feature_group_count": 1,
            "dimension_numbers": lax.conv_dimension_numbers(x, weight, numbers), **options,
        }  # fmt: skip
        made = of_conv(numbers)
        function = functools.partial(lax.conv_general_dilated, **numbers)
    shape = jax.eval_shape(function, jnp.zeros(x), jnp.zeros(weight)).shape
    kept = made.operands[1].kept
    channels = Channels(tuple(weight[a] for a in kept), made.result.free[1])
    given = {"out_zero_point": 0, "gives_float": False, **EPILOGUES[epilogue]}
    call = Call(made, 1, weight, (), channels, shape, zero_point=0, **given)
    rng = np.random.default_rng(0)
    count = int(np.prod(channels.sizes))
    operands = {
        "x": rng.integers(-128, 128, x).astype(np.int8),
        "weight": rng.integers(-127, 128, weight).astype(np.int8),
        "multiplier": 2.0 ** rng.integers(-12, -8, count).astype(np.float32),
        "bias": rng.integers(-64, 64, count).astype(np.float32) / 16,
    }
    if call.out_zero_point is not None:
        operands["inv_scale"] = np.float32(8)
    if call.residual is not None and call.residual.is_int8:
        operands["residual"] = rng.integers(-128, 128, shape).astype(np.int8)
        operands["residual_scale"] = np.float32(2.0**-4)
    elif call.residual is not None:
        operands["residual"] = rng.integers(-64, 64, shape).astype(np.float32) / 16
    return Example(call, operands, numbers)


def as_operands(call: Call, points: Any) -> dict[str, Any]:
    """Zero points that vary, by the names of the operands that a call has."""
    found = {"zero_point": points.x}
    if call.residual is not None and call.residual.is_int8:
        found["residual_zero_point"] = points.residual
    if call.out_zero_point is not None:
        found["out_zero_point"] = points.out
    return found


def stacked_steps() -> ZeroPoints:
    """The zero points of all `STEPS`: int32 [steps] each."""
    return ZeroPoints(*(jnp.asarray(of_steps, jnp.int32) for of_steps in zip(*STEPS, strict=True)))


def check_in_a_loop(backend: Backend, given: Example, **packed: Any) -> None:
    """Assert that a call in a loop whose zero points vary gives in each step what NumPy does.

    Args:
      backend: what runs it.
      given: the call.
      packed: further operands.
    """
    call = dataclasses.replace(given.call, varies=True)
    operands = {**{k: jnp.asarray(v) for k, v in given.operands.items()}, **packed}

    def step(carry: None, points: ZeroPoints) -> tuple[None, Any]:
        return None, list(backend.call(call, {**operands, **as_operands(call, points)}))

    _, got = jax.jit(lambda points: lax.scan(step, None, points))(stacked_steps())
    for at, points in enumerate(STEPS):
        for ours, theirs in zip(got, given.want(points), strict=True):
            np.testing.assert_array_equal(ours[at], theirs, err_msg=f"step {at}: {points}")


def check_known(backend: Backend, given: Example, **packed: Any) -> None:
    """Assert that a call whose zero points are known gives what NumPy does, for each of `STEPS`.

    Args:
      backend, given, packed: as of `check_in_a_loop`.
    """
    operands = {**{k: jnp.asarray(v) for k, v in given.operands.items()}, **packed}
    for points in STEPS:
        got = backend.call(given.with_known(points), operands)
        for ours, theirs in zip(got, given.want(points), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{points}")
