"""One stored weight that GPTQ rounds, with the sites that read it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxquant.code_tables import INT, VALUES, as_floats
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.groups import group_layout
from jaxquant.recover.added import Added, Shift
from jaxquant.recover.covariance import APART, KEPT, Found, Reader
from jaxquant.recover.feedback import gain_db, mixing, output_error, round_with_feedback
from jaxquant.recover.grouped_matrix import GroupedMatrix, grouped_matrix
from jaxquant.recover.seen import FEWEST, Seen
from jaxquant.run.layers import GraphLayer, Layer
from jaxquant.weights.groups import RANGES

DAMPINGS = (0.1, 1.0)  # the least of them that lessens the error
LARGEST_SUMS = 4 << 30  # bytes that the covariances of one weight may take, in all its layers


class Rounded(NamedTuple):
    """What became of one weight.

    Attributes:
      gain_db: by how much the error of the outputs fell, at positions that were held out.
      reason: why it stays rounded to nearest; "" where it does not.
      shifts: what is added to the outputs of its sites.
    """

    gain_db: float = 0.0
    reason: str = ""
    shifts: tuple[Shift, ...] = ()


class _Read(NamedTuple):
    """A site that reads the weight, in one layer, and what is added to its outputs there."""

    reader: Reader
    layer: Layer
    added: Added | None


class Weight:
    """A stored weight, in one layer, and the sites that read it.

    Attributes:
      path: where its integers are.
      reads: the sites that read it.
      reason: why it cannot be rounded so; "" where it can.
    """

    def __init__(self, here: GraphLayer, site: Site, weight: np.ndarray):
        self._slot = here.program.slots[site.name]
        self.path = self._slot.int8
        self.reads: list[_Read] = []
        self.reason = ""
        self._weight = weight
        self._group_size = here.program.plan.group_size
        self._params = here.qparams["params"]  # views: what is written goes to the model's arrays

    def add(self, reader: Reader, layer: Layer, added: Added | None) -> None:
        """One more site, or layer of it, that reads the weight, and what is added behind it."""
        self.reads.append(_Read(reader, layer, added))
        # Seen before it is summed: what does not fit is told, and not tried.
        size = reader.bytes
        too_large = f"its covariances would take {size / 1e9:.1f} GB" if size > LARGEST_SUMS else ""
        self.reason = self.reason or reader.product.reason or too_large

    @property
    def readers(self) -> Iterator[Reader]:
        """The sites, one that reads it in several layers several times."""
        return (read.reader for read in self.reads)

    def round(self, found: Found) -> Rounded:
        """Round the weight anew, in place, where that is better."""
        matrix, seen = self._seen(found)
        if matrix is None:
            return Rounded(reason="a stored number stands in several places of it")
        counts = _total(each.counts for each in seen)
        if counts.sum() < FEWEST or not counts.all():
            return Rounded(reason=f"{counts.sum()} output positions are too few to round on")

        # Scales stay what they are: only the integers change.
        integers, scale = (layout.get(self._params, x) for x in (self.path, self._slot.scale))
        step = matrix.step(np.asarray(as_floats(scale)))
        weight = matrix.matrix(self._weight).astype(np.float32)
        bits, dtype = self._slot.format

        def off(codes: np.ndarray) -> Any:
            return weight - (codes if dtype == INT else VALUES[dtype][codes & 15]) * step

        def rounded(covariance: np.ndarray, damping: float) -> np.ndarray:
            # From the input that matters most on, as with act-order: its error has most rows to go
            # to.
            order, mix = mixing(covariance, damping)
            rows = order[..., None]
            ordered = (np.take_along_axis(x, rows, axis=1) for x in (weight, step))
            found = round_with_feedback(*ordered, mix, RANGES[bits], dtype)
            result = np.empty(weight.shape, np.int8)
            np.put_along_axis(result, rows, np.asarray(found), axis=1)
            return result

        def error(codes: np.ndarray, held_out: np.ndarray) -> float:
            return float(
                output_error(jnp.asarray(held_out / counts[APART], jnp.float32), off(codes))
            )

        nearest = matrix.integers(integers, bits)
        before = error(nearest, _total(each.products[APART] for each in seen))
        held_out = _total(each.held_out() for each in seen)
        # Decided on rows that were held out, then rounded on all of them.
        for damping in DAMPINGS:
            tried = rounded(_total(each.varying(KEPT) for each in seen), damping)
            if (after := error(tried, held_out)) < before:
                codes = rounded(_total(each.varying(KEPT, APART) for each in seen), damping)
                # In place: the arrays are those that the model gets.
                integers[...] = matrix.stored(codes, bits)
                return Rounded(gain_db(before, after), shifts=self._shifts(seen, off(codes)))
        # The nearest integers may have a mean error all the same.
        if (after := error(nearest, held_out)) < before:
            return Rounded(gain_db(before, after), shifts=self._shifts(seen, off(nearest)))
        return Rounded(reason="rounding to nearest is no worse")

    def _seen(self, found: Found) -> tuple[GroupedMatrix | None, list[Seen]]:
        """How the weight is stored, and what each site that reads it sees."""
        matrix, seen = None, []
        for reader, layer, added in self.reads:
            product = reader.product
            view = layout.weight_view(product.graph, reader.site, integer=False)
            own = group_layout(view.shape, view.channels, self._group_size)
            # One reader that cannot say where its inputs meet the weight, and none of them counts.
            if (matrix := grouped_matrix(product, view, own)) is None:
                break
            sums = found[reader.site.name][layer]
            products, totals = matrix.covariance(sums.products), matrix.vector(sums.totals)
            seen.append(Seen(products, totals, sums.weights, sums.counts, added is not None))
        return matrix, seen

    def _shifts(self, seen: list[Seen], off: np.ndarray) -> tuple[Shift, ...]:
        """What takes away the means of the outputs' errors, where a parameter does."""
        return tuple(
            Shift(read.added, read.layer, np.einsum("gk,gkn->gn", each.mean, off).reshape(-1))
            for read, each in zip(self.reads, seen, strict=True)
            if read.added is not None and each.takes_mean
        )


def _total(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, arrays)
