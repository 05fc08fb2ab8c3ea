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
from jaxquant.recover.added import Added, Addition
from jaxquant.recover.covariance import APART, KEPT, Found, Reader
from jaxquant.recover.feedback import gain_db, mixing, output_error, round_with_feedback
from jaxquant.recover.grouped_matrix import GroupedMatrix, grouped_matrix
from jaxquant.recover.input_sums import FEWEST, InputSums
from jaxquant.run.layers import GraphLayer, Layer
from jaxquant.weights.groups import RANGES

DAMPINGS = (0.1, 1.0)  # the least of them that lessens the error
LARGEST_SUMS = 4 << 30  # bytes that the covariances of one weight may take, in all its layers


class Rounded(NamedTuple):
    """What became of one weight.

    Attributes:
      gain_db: by how much the error of the outputs fell, at positions that were held out.
      reason: why it stays rounded to nearest; "" where it does not.
      additions: what is added to the outputs of its sites.
    """

    gain_db: float = 0.0
    reason: str = ""
    additions: tuple[Addition, ...] = ()


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
        # InputSums before it is summed: what does not fit is told, and not tried.
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
        rounding = _Rounding(weight, step, *self._slot.format)
        nearest = matrix.integers(integers, self._slot.weight_bits)
        before = rounding.error(
            nearest, _total(each.products[APART] for each in seen) / counts[APART]
        )
        held_out = _total(each.held_out() for each in seen) / counts[APART]
        # Decided on rows that were held out, then rounded on all of them.
        for damping in DAMPINGS:
            tried = rounding.codes(_total(each.varying(KEPT) for each in seen), damping)
            if tried is None or (after := rounding.error(tried, held_out)) >= before:
                continue
            codes = rounding.codes(_total(each.varying(KEPT, APART) for each in seen), damping)
            if codes is not None:
                # In place: the arrays are those that the model gets.
                integers[...] = matrix.stored(codes, self._slot.weight_bits)
                additions = self._additions(seen, rounding.off(codes))
                return Rounded(gain_db(before, after), additions=additions)
        # The nearest integers may have a mean error all the same.
        if (after := rounding.error(nearest, held_out)) < before:
            additions = self._additions(seen, rounding.off(nearest))
            return Rounded(gain_db(before, after), additions=additions)
        return Rounded(reason="rounding to nearest is no worse")

    def _seen(self, found: Found) -> tuple[GroupedMatrix | None, list[InputSums]]:
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
            seen.append(InputSums(products, totals, sums.weights, sums.counts, added is not None))
        return matrix, seen

    def _additions(self, seen: list[InputSums], off: np.ndarray) -> tuple[Addition, ...]:
        """What takes away the means of the outputs' errors, where a parameter does."""
        return tuple(
            Addition(read.added, read.layer, np.einsum("gk,gkn->gn", each.mean, off).reshape(-1))
            for read, each in zip(self.reads, seen, strict=True)
            if read.added is not None and each.takes_mean
        )


class _Rounding(NamedTuple):
    """A weight as a matrix [G, K, N] with the step of each number, in some format."""

    weight: np.ndarray
    step: np.ndarray
    bits: int
    dtype: str

    def off(self, codes: np.ndarray) -> Any:
        """What codes int8 [G, K, N] leave of the weight."""
        values = codes if self.dtype == INT else VALUES[self.dtype][codes & 15]
        return self.weight - values * self.step

    def codes(self, covariance: np.ndarray, damping: float) -> np.ndarray | None:
        """int8 [G, K, N], rounded for inputs with a covariance [G, K, K]; None: it is all noise."""
        # From the input that matters most on, as with act-order: its error has most rows to go to.
        try:
            order, mix = mixing(covariance, damping)
        except np.linalg.LinAlgError:
            # Inputs that are (nearly) the same everywhere leave the rounding of their sums alone.
            return None
        rows = order[..., None]
        ordered = (np.take_along_axis(x, rows, axis=1) for x in (self.weight, self.step))
        found = round_with_feedback(*ordered, mix, RANGES[self.bits], self.dtype)
        result = np.empty(self.weight.shape, np.int8)
        np.put_along_axis(result, rows, np.asarray(found), axis=1)
        return result

    def error(self, codes: np.ndarray, covariance: np.ndarray) -> float:
        """The squared error that codes leave in the outputs."""
        return float(output_error(jnp.asarray(covariance, jnp.float32), self.off(codes)))


def _total(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, arrays)
