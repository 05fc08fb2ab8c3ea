"""What a backend gives, and the calls, products and operations that it runs.

A backend is one implementation of the calls of an int8 program: kernels for one kind of device, or
the operations that XLA has everywhere.  To add one, write a class like `Backend` in a file of its
own and put it into the table of platforms (`jaxquant.backends.platforms`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from jaxquant.backends.zero_points import ZeroPoints
from jaxquant.code_tables import INT
from jaxquant.graph import ir
from jaxquant.graph.contraction import Contraction
from jaxquant.graph.primitives import Channels

Clamp: TypeAlias = tuple[float, float]
NO_CLAMP: Clamp = (-math.inf, math.inf)
Operands: TypeAlias = Mapping[str, jax.Array]
# An operand that is a result of an earlier call: which call of the sequence, and which result.
Links: TypeAlias = Mapping[str, tuple[int, int]]


class Residual(NamedTuple):
    """What a call adds: an int8 tensor with a zero point, or a float32 one."""

    is_int8: bool
    zero_point: int


@dataclasses.dataclass(frozen=True)
class Call:
    """A contraction of an int8 tensor with a stored int8 weight, and what follows it in one pass.

    With q an int8 tensor, zp its zero point and s its scale, so that a value is (q - zp) * s:

        y = sum(q_x * q_w) * multiplier + bias     int32 sums; from here float32
        y = clip(y, *clamps[0])
        y = clip(y + (q_r - zp_r) * s_r, *clamps[1])    or + r, of a float32 residual
        q = clip(round_half_even(y * inv_scale) + zp, -128, 127)

    The sum keeps zp_x * sum(q_w), which the bias takes away; what pads x is zp_x.  Of a ragged dot
    it keeps none; the multiplier is times `relative_scale`, which has a number for each channel of
    each group's weight, and `sizes` are those of its groups.  The operands are
    a dict: x, weight, multiplier; and, where there are such, bias, inv_scale, residual,
    residual_scale, and packed, the weight as `Backend.pack` made it.  Where the zero points vary,
    they are operands too, int32 []: zero_point, and, where the residual is int8 and where q is a
    result, residual_zero_point and out_zero_point.  The results are y, q, or both in this order.

    Attributes:
      contraction: what is summed.
      weight_position: 0 or 1, the weight's place among what is contracted.
      weight_shape: of the weight as it is stored.
      movements: the equations that rearrange the sums before they are multiplied.
      channels: where the output channels are in the result.
      shape: of the result.
      zero_point: of x.
      clamps: before and behind the addition.
      residual: what is added; None without an addition.
      gives_float: whether y is a result.
      out_zero_point: of q; None where q is no result.
      varies: whether the zero points are operands, since they vary from step to step of a loop; the
        numbers here are not read then, and `out_zero_point` only tells whether q is a result.
      gives_sums: the int32 sums of a convolution are its only result.
      in_floats: q is in float32.
    """

    contraction: Contraction
    weight_position: int
    weight_shape: tuple[int, ...]
    movements: tuple[ir.Equation, ...]
    channels: Channels
    shape: tuple[int, ...]
    zero_point: int
    clamps: tuple[Clamp, Clamp] = (NO_CLAMP, NO_CLAMP)
    residual: Residual | None = None
    gives_float: bool = True
    out_zero_point: int | None = None
    varies: bool = False
    gives_sums: bool = False
    in_floats: bool = False

    def zero_points(self, operands: Mapping[str, Any]) -> ZeroPoints:
        """The zero points of a call with these operands: its own numbers, or arrays among them."""
        adds_int8 = self.residual is not None and self.residual.is_int8
        if self.varies:
            # As arrays even where all layers agree: one program serves every step.
            return ZeroPoints(
                operands["zero_point"],
                operands["residual_zero_point"] if adds_int8 else 0,
                0 if self.out_zero_point is None else operands["out_zero_point"],
            )
        residual = self.residual.zero_point if self.residual is not None and adds_int8 else 0
        return ZeroPoints(self.zero_point, residual, self.out_zero_point or 0)

    @property
    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of each result."""
        if self.gives_sums:
            return [jax.ShapeDtypeStruct(self.shape, jnp.int32)]
        # float32 comes first, int8 last: readers count on that order.
        of_q = jnp.float32 if self.in_floats else jnp.int8
        dtypes = [jnp.float32] * self.gives_float + [of_q] * (self.out_zero_point is not None)
        return [jax.ShapeDtypeStruct(self.shape, dtype) for dtype in dtypes]

    @property
    def rows(self) -> float:
        """How many outputs a channel has in the mean; infinite where a size varies."""
        if not all(isinstance(size, int) for size in self.shape):
            return math.inf
        kept = self.contraction.operands[self.weight_position].kept
        return math.prod(self.shape) / max(math.prod(self.weight_shape[a] for a in kept), 1)


@dataclasses.dataclass(frozen=True)
class Product:
    """Rows x [M, K] times weights that are stored as integers, matrices [K, N] or [N, K].

        y = sum(x * (q * s))      float32, of float rows: weights whose groups have a scale each
        y = sum(x * q)            int32, of int8 rows

    The operands are x, and for each matrix in turn the integers, int8, or uint8 of two that are
    neighbours along K, the first in the low half, and of float rows the scales [groups, N] or
    [N, groups], float32 or bfloat16.  The results are those of each matrix.

    Attributes:
      rows: M; of an exported program it may vary, and be no number.
      length: K.
      columns: N of each matrix.
      sums_last: whether the matrices are [N, K].
      dtype: of the rows.
      weight_bits: 8, or 4.
      group_size: how many neighbours along K share a scale.
      weight_dtype: what four bits are; see `jaxquant.code_tables`.
      precision: of float rows, as `lax.dot_general` takes it.
    """

    rows: Any
    length: int
    columns: tuple[int, ...]
    sums_last: bool
    dtype: Any
    weight_bits: int = 8
    group_size: int = 0
    weight_dtype: str = INT
    precision: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether rows and sums are integers."""
        return bool(self.dtype == jnp.int8)

    @property
    def groups(self) -> int:
        """How many scales a column has."""
        return -(-self.length // self.group_size) if self.group_size else 1

    @property
    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of each result, [M, N]."""
        dtype = jnp.int32 if self.is_whole else jnp.float32
        return [jax.ShapeDtypeStruct((self.rows, columns), dtype) for columns in self.columns]

    def apart(self, arrays: Sequence[Any]) -> list[tuple[Product, list[Any]]]:
        """The product with each matrix, and its operands of those behind x."""
        # Of float rows each matrix has its scales behind it.
        count = 1 if self.is_whole else 2
        return [
            (dataclasses.replace(self, columns=(columns,)), [*arrays[k * count : (k + 1) * count]])
            for k, columns in enumerate(self.columns)
        ]


@dataclasses.dataclass(frozen=True)
class FloatOperation:
    """An operation of floats that JAX writes as several equations.

    Its forms may compute in float32 throughout, as XLA may where it fuses operations of less.

    Its operands are its inputs, what its equations read beside them, and the grid of the result.

    Attributes:
      kind: as of `jaxquant.graph.operators.Operator`.
      params: likewise.
      inputs: shape and dtype of what it reads.
      shape, dtype: of its result.
      equations: computes it as the model does, of the inputs and of what these equations read
        beside them, such as numbers that `params` have.
      is_int8: whether the result is quantized, on a grid that is given behind all of these: the
        inverse scale, float32 [], and the zero point, int32 [].
    """

    kind: str
    params: Mapping[str, Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    shape: tuple[int, ...]
    dtype: Any
    equations: Callable[..., jax.Array]
    is_int8: bool = False

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the result."""
        return jax.ShapeDtypeStruct(self.shape, jnp.int8 if self.is_int8 else self.dtype)


class Backend(Protocol):
    """One implementation of calls.  All of them agree bit for bit where results are int8.

    What is float before it is int8 agrees up to rounding, as it does between two of XLA's programs.

    Attributes:
      name: as users choose it.
      is_exported: whether an exported program may hold its calls.
    """

    name: str
    is_exported: bool

    def covers(self, call: Call, is_packed: bool = True) -> bool:
        """Whether it has a form of a call, the fastest one where the weight is packed or not."""
        ...

    def joins(self, call: Call) -> bool:
        """Whether a call may run as a part of a sequence."""
        ...

    def pack(self, call: Call, weight: jax.Array) -> jax.Array:
        """The weight in the layout in which the backend reads it; for any batch and image size."""
        ...

    def call(self, call: Call, operands: Operands) -> Sequence[jax.Array]:
        """The results of one call."""
        ...

    def sequence(
        self,
        calls: Sequence[Call],
        links: Sequence[Links],
        operands: Sequence[Operands],
        results: Sequence[tuple[int, int]],
    ) -> Sequence[jax.Array]:
        """Several calls, each of which may read what those before it gave.

        Args:
          calls: in order; all of them `joins`.
          links: for each call the operands that are results of earlier ones.
          operands: for each call the others.
          results: those that are wanted: which call, and which of its results.
        """
        ...

    def covers_product(self, product: Product, is_packed: bool = False) -> bool:
        """Whether it has a form of a product with stored matrices, packed or not."""
        ...

    def pack_product(self, product: Product, integers: jax.Array) -> jax.Array | None:
        """The matrix in a further layout, for any number of rows; None where it reads no other."""
        ...

    def product(
        self, product: Product, *operands: jax.Array, packed: Sequence[jax.Array] = ()
    ) -> Sequence[jax.Array]:
        """The results of a product with stored matrices, which may be packed as well."""
        ...

    def covers_operation(self, operation: FloatOperation) -> bool:
        """Whether it has a form of an operation of floats."""
        ...

    def operation(self, operation: FloatOperation, *operands: jax.Array) -> jax.Array:
        """The result of an operation of floats, up to rounding; see there for the operands."""
        ...
