"""Dots of one tensor with several stored weights: query, key and value, gate and up.

They run as one product, so that a backend reads the tensor once and shares all weights among its
threads.  The first of them that is evaluated computes all; the others find their sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxquant.backends import platforms
from jaxquant.backends.backend import Product
from jaxquant.graph import ir
from jaxquant.plan.binding import Int8Site
from jaxquant.run.stored_matrix import StoredMatrix, stored_matrix
from jaxquant.run.weights import StoredWeights


@dataclasses.dataclass(frozen=True)
class StoredDot:
    """A dot with a stored weight that is one matrix.

    Attributes:
      bound: its site.
      matrix: its weight.
      product: what it is of the matrix alone; the number of its rows is not known yet.
    """

    bound: Int8Site
    matrix: StoredMatrix
    product: Product

    @property
    def name(self) -> str:
        return self.bound.site.name

    def likeness(self, graph: ir.Graph) -> tuple[object, ...]:
        """What dots have in common that run as one product."""
        site = self.bound.site
        x = graph.equations[site.equation].inputs[1 - site.weight_position]
        reads = x if isinstance(x, ir.Var) else self.name  # a number is nobody else's
        rows = reads, site.input_axes.free, self.matrix.summed
        # One product has rows of one kind and matrices of one format: only their widths may differ.
        return *rows, self.bound.asymmetric, dataclasses.replace(self.product, columns=())


def find_dots(
    graph: ir.Graph, sites: Iterable[Int8Site], weights: StoredWeights, *, is_integer: bool
) -> Mapping[str, StoredDot]:
    """The dots with stored matrices that have no planned scales, by site.

    Args:
      graph: the traced model.
      sites: among which they are.
      weights: where the weights are.
      is_integer: whether they sum integers; else they dequantize their weight.
    """
    found = {}
    for bound in sites:
        site = bound.site
        if site.stored_weight is None or site.is_lookup or (is_integer and not bound.dynamic):
            # Dots with planned scales are calls, which hold their epilogue too.
            continue
        if site.contraction is None or site.as_contraction.choosing is not None:
            continue
        dot = _of_integers(graph, bound) if is_integer else _of_floats(graph, bound, weights)
        if dot is not None:
            found[site.name] = dot
    return found


def _of_integers(graph: ir.Graph, bound: Int8Site) -> StoredDot | None:
    assert bound.site.weight is not None
    matrix = stored_matrix(bound.site, graph.shape(bound.site.weight))
    return None if matrix is None else StoredDot(bound, matrix, _product(matrix, jnp.int8))


def _of_floats(graph: ir.Graph, bound: Int8Site, weights: StoredWeights) -> StoredDot | None:
    site = bound.site
    view, groups = weights.view(site), weights.groups(site)
    if (matrix := stored_matrix(site, groups.permuted, view.movements)) is None:
        return None
    eqn, (bits, dtype) = graph.equations[site.equation], weights.format(site)
    # By the dtype of the rows: they are read as they are, and one call takes one dtype.
    product = dataclasses.replace(
        _product(matrix, graph.dtype(eqn.inputs[1 - site.weight_position])),
        weight_bits=bits,
        group_size=groups.size,
        weight_dtype=dtype,
        precision=eqn.params.get("precision"),
    )
    return StoredDot(bound, matrix, product)


def _product(matrix: StoredMatrix, dtype: object) -> Product:
    return Product(None, matrix.length, (matrix.columns,), matrix.sums_last, dtype)


def find_siblings(
    graph: ir.Graph, dots: Iterable[StoredDot]
) -> Mapping[str, tuple[StoredDot, ...]]:
    """For each dot by its name those that run as one product, itself among them."""
    groups: dict[tuple[object, ...], list[StoredDot]] = {}
    # In the order of the graph: the first to be evaluated is the first of its group.
    for dot in dots:
        groups.setdefault(dot.likeness(graph), []).append(dot)
    return {dot.name: tuple(group) for group in groups.values() for dot in group}


def multiply(
    table: platforms.Table,
    dots: Sequence[StoredDot],
    x: jax.Array,
    arrays: Sequence[jax.Array],
    packed: Sequence[jax.Array] = (),
) -> dict[str, jax.Array]:
    """The sums of each dot by its name, in the shape that the dot has.

    Args:
      table: the backends that may run it.
      dots: siblings.
      x: their other operand.
      arrays: the operands of `Product` behind the rows.
      packed: the weights as a backend packed them, if all are.
    """
    rows = dots[0].matrix.rows(x)
    product = product_of(dots, rows)
    sums = platforms.run_product(table, product, rows, *arrays, packed=packed)
    pairs = zip(dots, sums, strict=True)
    return {dot.name: dot.matrix.back(each, x.shape) for dot, each in pairs}


def product_of(dots: Sequence[StoredDot], rows: jax.Array) -> Product:
    """The product of rows [M, K] with the weights of all dots."""
    columns = tuple(dot.matrix.columns for dot in dots)
    return dataclasses.replace(
        dots[0].product, rows=rows.shape[0], columns=columns, dtype=rows.dtype
    )
