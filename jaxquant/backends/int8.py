"""The int8 operations: quantize, and dots with int32 accumulation; `conv` has convolution.

Round half to even, saturate to [-128, 127].  A tensor with zero point z stands for its integers
less z.  Each operation is exact in integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends import in_floats, ragged
from jaxquant.backends.conv import conv
from jaxquant.backends.zero_points import ZeroPoint, is_zero
from jaxquant.graph import ir
from jaxquant.graph.contraction import Contraction
from jaxquant.graph.contraction import dot as make_dot
from jaxquant.jax_shim import choices, jaxprs, layouts

_LANES = 128  # values in a row of a TPU's register


def quantize(x: jax.Array, inv_scale: jax.Array, zero_point: ZeroPoint = 0) -> jax.Array:
    """Round `x * inv_scale` half to even, add the zero point and saturate; any shape, to int8."""
    return rounded(x, inv_scale, zero_point).astype(jnp.int8)


def rounded(x: jax.Array, inv_scale: jax.Array, zero_point: ZeroPoint = 0) -> jax.Array:
    """The integers of `quantize`, in float32."""
    scaled = lax.round(x.astype(jnp.float32) * inv_scale, lax.RoundingMethod.TO_NEAREST_EVEN)
    if not is_zero(zero_point):
        # Behind the rounding: added before it, an odd zero point would turn ties the other way.
        scaled = scaled + jnp.float32(zero_point)
    return lax.clamp(jnp.float32(-128), scaled, jnp.float32(127))


def dequantize(x: jax.Array, scale: jax.Array, zero_point: ZeroPoint = 0) -> jax.Array:
    """What int8 values stand for, as float32; any shape."""
    value = x.astype(jnp.float32)
    return (value if is_zero(zero_point) else value - jnp.float32(zero_point)) * scale


def accumulate(
    contraction: Contraction,
    operands: Sequence[jax.Array],
    zero_points: Sequence[ZeroPoint],
    holds: bool = True,
) -> jax.Array:
    """A convolution or dot of a tensor with a weight, to int32; of a ragged dot with the sizes too.

    A weight that the batch axes of a dot share has size 1 there.
    The sum keeps `zero_point * sum(weight)`, which the site's bias takes away; what pads the input
    adds to it too.  That of a ragged dot keeps none: it is another one for each group.

    Args:
      contraction: what is summed.
      operands: the tensor and the weight.
      zero_points: that of the tensor.
      holds: whether sums of heads are laid out on a TPU as their matrix gives them.
    """
    if contraction.window is not None:
        return conv(operands[0], operands[1], contraction, zero_points[0])
    if contraction.choosing is not None:
        x, weight, sizes = operands
        return ragged.sums(contraction, x, weight, sizes, zero_points[0])
    return dot_with_shared((operands[0], operands[1]), contraction, holds)


def combine(
    eqn: ir.Equation,
    contraction: Contraction | None,
    operands: Sequence[jax.Array],
    zero_points: Sequence[ZeroPoint],
) -> jax.Array:
    """A dot of two tensors, or a sum over one, of the values less their zero points; to int32."""
    if contraction is not None:
        return dot_of_tensors((operands[0], operands[1]), contraction, zero_points)
    values = [x.astype(jnp.int32) - z for x, z in zip(operands, zero_points, strict=True)]
    (total,) = jaxprs.bind(eqn.primitive, values, dict(eqn.params))
    return total


def gather(eqn: ir.Equation, operands: Sequence[jax.Array], zero_point: ZeroPoint) -> jax.Array:
    """A gather of an int8 array; of an index out of range, where floats give NaN, the zero point.

    Args:
      eqn: the gather.
      operands: the int8 array and the indices.
      zero_point: of the array.
    """
    x, *indices = operands
    params = {**eqn.params, "fill_value": 0}
    if not isinstance(zero_point, jax.Array):
        params["fill_value"] = zero_point
        (result,) = jaxprs.bind(eqn.primitive, operands, params)
        return result
    # The value to fill with has to be known: 0, of integers less their zero point.  That may
    # overflow; int8 wraps, so adding the zero point again gives the integer that was there.
    shift = zero_point.astype(jnp.int8)
    (shifted,) = jaxprs.bind(eqn.primitive, [x - shift, *indices], params)
    return shifted + shift


def dot(
    operands: tuple[jax.Array, jax.Array], contraction: Contraction, holds: bool = True
) -> jax.Array:
    """A dot of two int8 arrays to int32.

    Two forms are rewritten since XLA's int8 product on CPU is slower than its float32 one there
    (`experiments/benchmarks/kinds.py`, `experiments/benchmarks/experts.py`).  A single row gets a
    second one of zeros.  With batch axes the operand whose last axes are summed over comes first:
    five times as fast.  Without batch axes what is summed over is one axis, and the second operand
    a matrix: of more axes ([D, heads, features] in attention) the compiler for TPU overflows its
    stack (libtpu 0.0.42.1).
    """
    x, w = operands
    if not contraction.has_batch and _has_more_axes(contraction):
        return _by_matrix(x, w, contraction, holds)
    # XLA is fast where the first operand is summed over its last axis: the sides change places.
    if contraction.has_batch and _sums_last(contraction, 1) and not _sums_last(contraction, 0):
        other_way = contraction.swapped
        result = dot((w, x), other_way)
        places = [(side, axis) for side in (0, 1) for axis in contraction.operands[side].free]
        order = [*other_way.result.batch, *(other_way.place(1 - side, a) for side, a in places)]
        return result.transpose(order)

    numbers, (own, other) = contraction.dot_numbers, contraction.operands
    is_vector = bool(own.free) and all(x.shape[axis] == 1 for axis in own.free)
    if contraction.has_batch or not is_vector or not other.free:
        return lax.dot_general(x, w, numbers, preferred_element_type=jnp.int32)

    # A product of one row goes a slow way through XLA on CPU; of two rows it does not.
    pads = [(0, int(axis == own.free[0]), 0) for axis in range(x.ndim)]
    result = lax.dot_general(
        lax.pad(x, jnp.int8(0), pads), w, numbers, preferred_element_type=jnp.int32
    )
    return lax.slice_in_dim(result, 0, 1, axis=0)


def _has_more_axes(contraction: Contraction) -> bool:
    """True where more than one axis is summed over, or the second operand is no matrix."""
    own, other = contraction.operands
    return len(own.contracted) > 1 or len(other.free) > 1


def _by_matrix(x: jax.Array, w: jax.Array, contraction: Contraction, holds: bool) -> jax.Array:
    """A dot without batch axes as one of x [..., K] with a matrix [K, N]."""
    own, other = contraction.operands
    rows, columns = ([v.shape[a] for a in p.free] for v, p in ((x, own), (w, other)))
    summed = math.prod(w.shape[axis] for axis in other.contracted)
    x = x.transpose((*own.free, *own.contracted)).reshape(*rows, summed)
    w = w.transpose((*other.contracted, *other.free)).reshape(summed, math.prod(columns))
    product = make_dot((((x.ndim - 1,), (0,)), ((), ())), (x.ndim, 2))
    # With one axis of columns there are no heads whose order matters.
    sums = dot((x, w), product) if len(columns) == 1 else _of_heads(x, w, product, holds)
    return sums.reshape(*rows, *columns)


def _of_heads(x: jax.Array, matrix: jax.Array, product: Contraction, holds: bool) -> jax.Array:
    """The sums of rows with a matrix whose columns are those of several heads.

    For a TPU they are held as they are, or in an exported program the matrix is: from what comes
    of the sums XLA would make a convolution over the heads, which takes twice the time of the
    product by its own estimate, and would write the matrix in another order first.
    """

    def as_it_is(x: jax.Array, matrix: jax.Array) -> list[jax.Array]:
        return [dot((x, matrix), product)]

    # A TPU would otherwise turn the sums around for each head.
    def held(x: jax.Array, matrix: jax.Array) -> list[jax.Array]:
        sums = dot((x, matrix), product)
        return [layouts.held_in(sums, range(sums.ndim))]

    def exported(x: jax.Array, matrix: jax.Array) -> list[jax.Array]:
        return [dot((x, lax.optimization_barrier(matrix)), product)]

    def pick(place: choices.Place) -> int:
        if place.platform != "tpu" or not (holds or place.is_export):
            return 2
        return int(place.is_export)

    output = jax.ShapeDtypeStruct((*x.shape[:-1], matrix.shape[1]), jnp.int32)
    (sums,) = choices.choose(pick, (held, exported, as_it_is), [output], [x, matrix])
    return jnp.asarray(sums)


def turned(q: jax.Array, contraction: Contraction) -> jax.Array:
    """What a product of heads gives in int8, on a TPU with the last axis of the rows innermost.

    As the products of attention read it: turned behind its rounding, it is written twice, the
    second time as integers, which costs more than the product.

    Args:
      q: [*rows, *heads, features].
      contraction: the product; see `is_turned`.
    """
    rows = q.shape[: len(contraction.operands[0].free)]
    *others, last = range(len(rows))

    def held(q: jax.Array) -> list[jax.Array]:
        # Heads and their width as one axis: the layout is one of a matrix.
        flat = q.reshape(*rows, math.prod(q.shape[len(rows) :]))
        return [layouts.held_in(flat, (*others, len(rows), last)).reshape(q.shape)]

    def pick(place: choices.Place) -> int:
        # An exported program cannot hold a layout.
        return int(place.platform != "tpu" or place.is_export)

    output = jax.ShapeDtypeStruct(q.shape, q.dtype)
    (result,) = choices.choose(pick, (held, lambda q: [q]), [output], [q])
    return jnp.asarray(result)


def is_turned(contraction: Contraction, shape: Sequence[int]) -> bool:
    """Whether a product of rows with the matrix of several heads fills a TPU's registers turned.

    Args:
      contraction: its axes; the weight's are second.
      shape: of its result.
    """
    own, other = contraction.operands
    if contraction.window is not None or contraction.choosing is not None or contraction.has_batch:
        return False
    rows = len(own.free)
    # The last axis of rows becomes the lanes, so it has to fill whole registers.
    return (
        rows > 1
        and len(other.free) > 1
        and isinstance(shape[rows - 1], int)
        and (shape[rows - 1] % _LANES == 0)
    )


def _sums_last(contraction: Contraction, side: int) -> bool:
    """True where the axes of an operand that are summed over are its last ones."""
    own = contraction.operands[side]
    return own.contracted == tuple(range(own.rank - len(own.contracted), own.rank))


def dot_with_shared(
    operands: tuple[jax.Array, jax.Array], contraction: Contraction, holds: bool = True
) -> jax.Array:
    """`dot`, where an operand may have size 1 along batch axes that the other has longer.

    It stands for copies.  Such an axis is one more free axis of the other operand, so that there
    are fewer and larger products, and no copies.
    """
    contracted, batch = contraction.dot_numbers
    pairs = list(zip(*batch, strict=True))
    shapes = operands[0].shape, operands[1].shape
    shared = [n for n, (left, right) in enumerate(pairs) if shapes[0][left] != shapes[1][right]]
    if not shared:
        return dot(operands, contraction, holds)
    side = int(shapes[1][pairs[shared[0]][1]] == 1)  # of the operand that stands for copies
    gone = [pairs[n][side] for n in shared]

    def left_of(operand: int, axes: Sequence[int]) -> tuple[int, ...]:
        """Where axes of an operand are once those that are shared are out of it."""
        if operand != side:
            return tuple(axes)
        return tuple(axis - sum(before < axis for before in gone) for axis in axes)

    # The batch axes that both have stay batch axes of a smaller dot.
    apart = [[pair[k] for n, pair in enumerate(pairs) if n not in shared] for k in (0, 1)]
    once = lax.squeeze(operands[side], gone)
    both = (operands[0], once) if side else (once, operands[1])
    smaller = make_dot(
        (
            (left_of(0, contracted[0]), left_of(1, contracted[1])),
            (left_of(0, apart[0]), left_of(1, apart[1])),
        ),
        (both[0].ndim, both[1].ndim),
    )

    # The other operand has every batch axis still, the shared ones among its free axes.
    kept = [(1 - side, axis) for axis in batch[1 - side]]
    kept += [(k, axis) for k in (0, 1) for axis in left_of(k, contraction.operands[k].free)]
    return dot(both, smaller).transpose([smaller.place(k, axis) for k, axis in kept])


def dot_of_tensors(
    operands: tuple[jax.Array, jax.Array],
    contraction: Contraction,
    zero_points: Sequence[ZeroPoint],
) -> jax.Array:
    """`dot` of two tensors less their zero points, by the sums along the contracted axes.

    sum (a - z)(b - w) = sum a b - w sum a - z sum b + z w K

    Of integers that are held in float32 the sums are too; see `jaxquant.backends.in_floats`.
    """
    if any(x.dtype == jnp.float32 for x in operands):
        return in_floats.dot(operands, contraction, zero_points)
    total = dot(operands, contraction)
    z, w = zero_points
    # Terms that are known to be zero are left out of the program.
    if not is_zero(w):
        total = total - w * _sums(operands[0], contraction, 0)
    if not is_zero(z):
        total = total - z * _sums(operands[1], contraction, 1)
    if not (is_zero(z) or is_zero(w)):
        total = total + z * w * contraction.terms(operands[1].shape)
    return total


def _sums(x: jax.Array, contraction: Contraction, side: int) -> jax.Array:
    """int32 sums of an operand over its contracted axes, which broadcast to the dot."""
    own = contraction.operands[side]
    ordered = x.astype(jnp.int32).transpose([*own.batch, *own.free, *own.contracted])
    summed = tuple(range(len(own.batch) + len(own.free), x.ndim))
    sums = jnp.sum(ordered, axis=summed, dtype=jnp.int32)
    return sums.reshape(contraction.spread_shape(side, sums.shape))
