"""The multiplier and the bias of a site: what its sums are worth, and what is added to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxquant.graph import ir
from jaxquant.plan.binding import Int8Site
from jaxquant.weights.fold import channel_vector

LARGEST_BIAS = 2.0**30  # of a bias in int32, in units of the accumulator: sums need room beside it


def accumulator_terms(
    int8: np.ndarray, axes: Sequence[int], unit: np.ndarray, zero_point: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """What one unit of a site's accumulator is worth, and what its input's zero point adds to it.

    Args:
      int8: the weight.
      axes: of it, along the output channels.
      unit: the product of the scales, [C] or [].
      zero_point: of the input.

    Returns:
      [C]; and [C] or None.
    """
    sums = sums_by_channel(int8, axes)
    return np.broadcast_to(unit, sums.shape), zero_point * sums if zero_point else None


def sums_by_channel(int8: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The sums of a weight over all but its channels' `axes`: int64 [C]."""
    summed = tuple(a for a in range(int8.ndim) if a not in axes)
    return int8.sum(axis=summed, dtype=np.int64).reshape(-1)


@np.errstate(over="ignore")  # refused at the end
def epilogue_arrays(
    int8_site: Int8Site,
    operands: dict[ir.Var, np.ndarray],
    scale: np.ndarray,
    offset: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Compose the affine chain into one multiplier and bias, in float32.

    Args:
      int8_site: the site.
      operands: the values of the chain's operands.
      scale: [C] or [], what one unit of the accumulator is worth.
      offset: [C], what the accumulator holds too much; None for nothing.

    Raises:
      ValueError: the chain's parameters are not finite.
    """
    multiplier, bias = compose(int8_site, operands, scale, offset)
    with np.errstate(over="ignore"):
        arrays = {"multiplier": multiplier.astype(np.float32)}
        if bias is not None:
            arrays["bias"] = bias.astype(np.float32)
    # Finite in float64 and not in float32: no parameter is at fault, but a range.
    if np.isfinite(multiplier).all() and not np.isfinite(arrays["multiplier"]).all():
        raise ValueError(
            f"site {int8_site.site.name!r}: one step of its sums, the product of the steps of what "
            f"it multiplies, is {np.abs(multiplier).max():.3g}, which is beyond float32 "
            f"({np.finfo(np.float32).max:.3g}); scale its input or its weight, or leave it in "
            "float (skip)"
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(
            f"site {int8_site.site.name!r}: the bias or normalisation behind it gives NaN or "
            "infinity; check those parameters"
        )
    return arrays


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def compose(
    int8_site: Int8Site,
    operands: dict[ir.Var, np.ndarray],
    scale: np.ndarray,
    offset: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """`epilogue_arrays` in float64: the multiplier, and the bias or None."""
    multiplier, has_bias = np.asarray(scale, np.float64), offset is not None
    bias = np.zeros_like(multiplier) if offset is None else -offset * multiplier
    # Each step maps m * sum + b to another such line, so that one line is left of them all.
    for step in int8_site.epilogue.steps:
        if step.op == "neg":
            multiplier, bias = -multiplier, -bias
            continue
        operand = channel_vector(step, operands)
        if step.op == "mul":
            multiplier, bias = multiplier * operand, bias * operand
        elif step.op == "div":
            multiplier, bias = multiplier / operand, bias / operand
        else:
            has_bias = True
            if step.op == "rsub":
                multiplier, bias = -multiplier, -bias
            bias = bias - operand if step.op == "sub" else bias + operand
    return (
        np.broadcast_to(multiplier, scale.shape),
        np.broadcast_to(bias, scale.shape) if has_bias else None,
    )


def whole_steps(bias: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """A bias rounded to whole units of the accumulator, so that int32 holds it as it is.

    Half a unit is next to nothing, but runtimes that add the bias in int32 (ONNX Runtime, TFLite)
    round every output alike only if what they add is the same.  A bias that int32 does not hold
    beside the sums, or that nothing is added to, stays as it is.

    Args:
      bias: float [C] or [].
      multiplier: likewise, what one unit of the accumulator is worth.

    Example:
      >>> whole_steps(np.float32([0.3, 7.0]), np.float32([0.25, 0.0])).tolist()
      [0.25, 7.0]
    """
    unit = np.asarray(multiplier, np.float64)
    steps = np.rint(np.divide(bias, unit, out=np.full(np.shape(bias), np.inf), where=unit != 0))
    fits = np.abs(steps) <= LARGEST_BIAS
    return np.where(fits, np.where(fits, steps, 0) * unit, bias).astype(np.float32)
