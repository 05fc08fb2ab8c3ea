"""Operations of floats that JAX writes as many equations, in one pass: attention, GELU, norms.

XLA runs them beside the int8 dots of a transformer, and takes longer for them than those take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.jax_shim import jaxprs
from jaxquant.native import library
from jaxquant.native.fused import Requantize

Order: TypeAlias = tuple[int | None, ...]


FEW_ROWS = 8  # of queries: so many are worth vectors along the rows


def is_few(rows: int) -> bool:
    """Whether rows of queries, whose number may be symbolic, are surely less than `FEW_ROWS`."""
    return isinstance(rows, int) and rows < FEW_ROWS


class AttentionAxes(NamedTuple):
    """Where the axes of the operands of `attention` and of its result are.

    Each order has an entry for every batch axis and two behind them.  An operand lacks an axis,
    None, along which it is the same; a bias and a mask may have size 1 there instead.

    Attributes:
      query: rows, depth.
      key: keys, depth.
      value: keys, places of a value.
      result: rows, places of a value; it has all axes.
      bias, mask: keys, rows, which come last if at all; () where there is none.
    """

    query: Order
    key: Order
    value: Order
    result: Order
    bias: Order = ()
    mask: Order = ()


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    axes: AttentionAxes,
    scale: float = 1.0,
    fill: float = -jnp.inf,
) -> jax.Array:
    """softmax(scale * q kᵀ + bias) v, the scores being `fill` where `mask` is False.

    Scores are never in memory as a whole.  Sums are float32: of `FEW_ROWS` or more each in the
    order of its axis, of fewer along whichever axis of a key or a value lies in memory.  The
    exponential is exact to two units in the last place.

    Args:
      q, bias: float32.
      k, v: float32; or both bfloat16, if there are less than `FEW_ROWS` rows.
      mask: bool.
      axes: where their axes are.
      scale: of the products.
      fill: a masked score.

    Returns:
      float32, with its axes where `axes.result` has them.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: a bias or a mask is given without its axes, or a dtype is another one.
    """
    library.require()
    beside = [x for x in (bias, mask) if x is not None]
    if (bias is None) == bool(axes.bias) or (mask is None) == bool(axes.mask):
        raise ValueError("a bias and a mask have axes, and what is not given has none")
    names = [x.dtype.name for x in (q, k, v, *beside)]
    expected = ["float32"] * (3 + (bias is not None)) + ["bool"] * (mask is not None)
    if names[1:3] == ["bfloat16"] * 2 and is_few(_size(q, axes.query[-2])):
        expected[1:3] = names[1:3]
    if names != expected:
        raise ValueError(f"operands of {', '.join(names)}; expected {', '.join(expected)}")
    # One compiled call for each order of axes, kept for the process.
    run = _attention(axes, float(scale), float(fill))
    result: jax.Array = run(*jaxprs.match_varying([q, k, v, *beside]))
    return result


@functools.lru_cache(maxsize=4096)
def _attention(axes: AttentionAxes, scale: float, fill: float) -> Callable[..., Any]:
    """The call with its batching rule: a mapped axis is one batch axis more."""
    # An axis that an operand does not have (None) is one along which it is the same.
    given = [order for order in axes[:3] + axes[4:] if order]

    @jax.custom_batching.custom_vmap
    def run(*operands: jax.Array) -> Any:
        # An operand may lack the axis, or have size 1 there: the longest is what all have.
        sizes = [
            max(_size(x, order[at]) for x, order in zip(operands, given, strict=True))
            for at in range(len(axes.result) - 2)
        ]
        sizes += [_size(operands[0], axes.query[-2]), _size(operands[2], axes.value[-1])]
        shape = [0] * len(sizes)
        for axis, size in zip(axes.result, sizes, strict=True):
            assert axis is not None, "a result has all axes"
            shape[axis] = size
        orders = {
            # C++ has no None: -1 is an axis that is not there.
            name: np.asarray([-1 if axis is None else axis for axis in order], np.int64)
            for name, order in axes._asdict().items()
        }
        calling = jax.ffi.ffi_call(
            library.ATTENTION, jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        )
        return calling(*operands, **orders, scale=np.float32(scale), fill=np.float32(fill))

    @run.def_vmap
    def over_axis(size: int, mapped: Sequence[bool], *operands: jax.Array) -> Any:
        # A mapped axis is a batch axis in front, for those that have it.
        names = [name for name, order in axes._asdict().items() if order and name != "result"]
        orders = {
            name: _with_batch(getattr(axes, name), is_mapped)
            for name, is_mapped in zip(names, mapped, strict=True)
        }
        orders["result"] = _with_batch(axes.result, True)
        return _attention(AttentionAxes(**orders), scale, fill)(*operands), True

    return run


def _size(x: jax.Array, axis: int | None) -> int:
    return 1 if axis is None else x.shape[axis]


def _with_batch(order: Order, is_mapped: bool) -> Order:
    """The axes of an operand that has a further one in front, if it is mapped."""
    if not is_mapped:
        return (None, *order)
    return (0, *(None if axis is None else axis + 1 for axis in order))


def gelu(x: jax.Array, *, approximate: bool, out: Requantize | None = None) -> jax.Array:
    """GELU: x times the normal distribution's P(X <= x), or its approximation by a tanh.

    Args:
      x: float32, of any shape.
      approximate: by tanh.
      out: how to make the result int8; None gives float32.

    Returns:
      float32 or int8, of the shape of x.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: x is of another dtype.
    """
    library.require()
    if x.dtype != jnp.float32:
        raise ValueError(f"x is {x.dtype}; expected float32")
    grid = []
    if out is not None:
        # A grid makes the result int8 in the same pass, so floats never leave the registers.
        grid = [jnp.asarray(out.inv_scale, jnp.float32), jnp.asarray(out.zero_point, jnp.int32)]
    result: jax.Array = _gelu(bool(approximate))(x, *grid)
    return result


@functools.lru_cache(maxsize=2)
def _gelu(approximate: bool) -> Callable[..., Any]:
    """The call with its batching rule: a tensor of any shape has one grid."""

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, *grid: jax.Array) -> Any:
        like = jax.ShapeDtypeStruct(x.shape, jnp.int8 if grid else jnp.float32)
        return jax.ffi.ffi_call(library.GELU, like)(x, *grid, by_tanh=np.int64(approximate))

    @run.def_vmap
    def over_axis(size: int, mapped: Sequence[bool], *operands: jax.Array) -> Any:
        return _of_rows(run, size, mapped, operands)

    return run


def layer_norm(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, *, epsilon: float
) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, along the last axis.

    Args:
      x: float32 [..., C].
      scale, bias: float32 [C], or None.
      epsilon: beside the variance.

    Returns:
      float32 [..., C].

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: shapes or dtypes are not as said above.
    """
    library.require()
    # XLA has no operand that is not there: an empty one stands for it.
    vectors = [jnp.zeros((0,), jnp.float32) if s is None else s for s in (scale, bias)]
    if any(each.shape not in ((0,), x.shape[-1:]) for each in vectors) or {
        each.dtype.name for each in (x, *vectors)
    } != {"float32"}:
        given = ", ".join(f"{each.dtype}{list(each.shape)}" for each in (x, *vectors))
        raise ValueError(f"expected float32 x [..., C] with a scale and a bias [C], got {given}")
    result: jax.Array = _layer_norm(float(epsilon))(x, *vectors)
    return result


def quantize(
    x: jax.Array, inv_scale: jax.Array, zero_point: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Numbers in int8 on one grid, and which rows have some that it cannot hold.

    Args:
      x: float32 [..., K].
      inv_scale: float32 [], what a number is multiplied by before it is rounded; or [C] for
        channels that follow each other, each K / C times in a row.
      zero_point: int32 [].

    Returns:
      int8 [..., K]; float32 [...], NaN for a row with NaN or infinity, else 0.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: x is of another dtype, or has no axis, or its rows are not of whole channels.
    """
    _check_rows(x)
    # Channels of [..., C, K / C] lie one after the other in a row.
    if x.shape[-1] % max(channels := jnp.size(inv_scale), 1):
        raise ValueError(f"rows of {x.shape[-1]} numbers are not of {channels} channels")
    grid = jnp.asarray(inv_scale, jnp.float32), jnp.asarray(zero_point, jnp.int32)
    q, marks = _quantize()(*jaxprs.match_varying([x, *grid]))
    return q, marks


@functools.cache
def _quantize() -> Callable[..., Any]:
    """The call with its batching rule: rows may have any number of axes."""

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, inv_scale: jax.Array, zero_point: jax.Array) -> Any:
        q = jax.ShapeDtypeStruct(x.shape, jnp.int8)
        marks = jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32)
        return tuple(jax.ffi.ffi_call(library.QUANTIZE, (q, marks))(x, inv_scale, zero_point))

    @run.def_vmap
    # Mapped, it has one axis of rows more, and no loop around the kernel.
    def over_axis(size: int, mapped: Sequence[bool], *operands: jax.Array) -> Any:
        results, _ = _of_rows(run, size, mapped, operands)
        return results, (True, True)

    return run


def quantize_rows(
    x: jax.Array, *, is_asymmetric: bool, smallest_scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows in int8, each on a grid of its own that its least and its largest value give.

    Args:
      x: float32 [..., K].
      is_asymmetric: with all 256 steps from the least to the largest value, 0 within; else the
        scale is the largest |x| / 127.
      smallest_scale: no scale is less.

    Returns:
      int8 [..., K]; the scales, float32 [...]; the zero points, int32 [...].  The scale of a row
      with NaN is NaN.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: x is of another dtype, or has no axis.
    """
    _check_rows(x)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            (x.shape, jnp.int8), (x.shape[:-1], jnp.float32), (x.shape[:-1], jnp.int32),
        )
    ]  # fmt: skip
    calling = jax.ffi.ffi_call(library.QUANTIZE_ROWS, shapes, vmap_method="broadcast_all")
    q, scale, zero_point = calling(
        x, asymmetric=np.int64(is_asymmetric), smallest=np.float32(smallest_scale)
    )
    return q, scale, zero_point


@functools.lru_cache(maxsize=4096)
def _layer_norm(epsilon: float) -> Callable[..., Any]:
    """The call with its batching rule: rows may have any number of axes."""

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        calling = jax.ffi.ffi_call(library.LAYER_NORM, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return calling(x, scale, bias, epsilon=np.float32(epsilon))

    @run.def_vmap
    def over_axis(size: int, mapped: Sequence[bool], *operands: jax.Array) -> Any:
        return _of_rows(run, size, mapped, operands)

    return run


def _check_rows(x: jax.Array) -> None:
    library.require()
    if x.dtype != jnp.float32 or not x.ndim:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected float32 [..., K]")


def _of_rows(
    run: Callable[..., Any], size: int, mapped: Sequence[bool], operands: Sequence[jax.Array]
) -> Any:
    """The batching rule of a call whose first operand may have any number of leading axes."""
    # Rows are rows, mapped or not; a scale or a grid of their own needs a call of its own.
    # Rows of a mapped tensor are rows like any others.
    if not any(mapped[1:]):
        return run(*operands), True

    def one(index: jax.Array) -> Any:
        each = zip(operands, mapped, strict=True)
        return run(*(jnp.asarray(x)[index] if is_mapped else x for x, is_mapped in each))

    return jax.lax.map(one, jnp.arange(size)), True
