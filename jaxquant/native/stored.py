"""Products of rows with matrices of stored integers, which are read as they lie."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.native import library
from jaxquant.native.call import Static, call

GROUP_STEP = 32  # of which a group is a multiple where there are several
SCALES = ("float32", "bfloat16")  # what scales may be


def dot_stored(
    x: jax.Array,
    matrices: Sequence[tuple[jax.Array, jax.Array | None]],
    *,
    sums_last: bool,
    group_size: int,
    codes: Sequence[float] = (),
) -> tuple[jax.Array, ...]:
    """Rows times matrices of stored integers, all in one call.

        y = sum over groups (sum(x * q) * s)      float32, of float rows
        y = sum(x * q)                            int32, of int8 rows

    Few rows take as long as the integers take to be read once.  Integers are multiplied before they
    meet their scale (with a matrix [K, N] that many rows of floats meet, behind it), and neither is
    rounded to the dtype of the rows: a float beyond 2e36 overflows.

    Args:
      x: float32, bfloat16 or int8 [M, K].
      matrices: the integers and the scales of each.  Integers: int8 [K, N], or packed uint8
        [ceil(K / 2), N], two of 4 bits a byte, neighbours along K, the first in the low half; with
        `sums_last` [N, K] and [N, ceil(K / 2)]; of one dtype.  Scales: float32 or bfloat16, all
        alike, [groups, N], with `sums_last` [N, groups]; None of int8 rows, whose integers are of 8
        bits.
      sums_last: whether K is the last axis of the matrices.
      group_size: how many neighbours along K share a scale: a multiple of `GROUP_STEP`, or K.
      codes: what the 16 packed integers 0 to 15 stand for; empty for integers with a sign.

    Returns:
      float32 or int32 [M, N] of each matrix.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: shapes or dtypes are not as said above.
    """
    library.require()
    of_integers = {integers.dtype.name for integers, _ in matrices}
    of_scales = {scale.dtype.name for _, scale in matrices if scale is not None}
    for what, dtypes in (("matrices", of_integers), ("scales", of_scales)):
        if len(dtypes) > 1 or not of_integers:
            found = " and ".join(sorted(dtypes)) or "no dtype"
            raise ValueError(f"{what} of {found}; expected one")
    for integers, scale in matrices:
        _check(x, integers, scale, sums_last, group_size)
    columns = [integers.shape[0 if sums_last else 1] for integers, _ in matrices]
    dtype = "int32" if x.dtype == jnp.int8 else "float32"
    static = Static(
        library.STORED,
        tuple(((each,), dtype) for each in columns),
        (0,),
        (("sums_last", int(sums_last)), ("size", group_size), ("codes", tuple(codes))),
    )
    operands = [x]
    for integers, scale in matrices:
        operands += [integers, jnp.zeros((0,), jnp.float32) if scale is None else scale]
    return call(static, operands)


def _check(
    x: jax.Array, integers: jax.Array, scale: jax.Array | None, sums_last: bool, group_size: int
) -> None:
    """Refuse what `dot_stored` does not take."""
    rows = ("int8",) if scale is None else ("float32", "bfloat16")
    weights = ("int8",) if scale is None else ("int8", "uint8")
    if x.dtype.name not in rows or integers.dtype.name not in weights:
        raise ValueError(
            f"{x.dtype} rows and {integers.dtype} weights {'without' if scale is None else 'with'} "
            f"scales; expected {' or '.join(rows)} and {' or '.join(weights)}"
        )
    if scale is not None and scale.dtype.name not in SCALES:
        raise ValueError(f"scales of {scale.dtype}; expected {' or '.join(SCALES)}")
    length = x.shape[-1]
    if not length:
        raise ValueError("a dot over an axis of size 0 has nothing to sum")
    groups = -(-length // group_size)
    if groups > 1 and group_size % GROUP_STEP:
        raise ValueError(f"groups of {group_size} are no multiple of {GROUP_STEP}")
    stored = length if integers.dtype == jnp.int8 else -(-length // 2)
    columns = integers.shape[0 if sums_last else -1]
    expected = [(size, columns)[:: -1 if sums_last else 1] for size in (stored, groups)]
    fits = integers.shape == expected[0] and (scale is None or scale.shape == expected[1])
    if x.ndim != 2 or not fits:
        raise ValueError(
            f"x {x.shape} does not fit a stored matrix {integers.shape} with scales "
            f"{None if scale is None else scale.shape}; expected {expected[0]} and {expected[1]}"
        )
