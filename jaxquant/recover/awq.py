"""Scales of input channels for stored weights: AWQ, as far as they cost nothing in the call.

J. Lin et al., AWQ: Activation-aware Weight Quantization, 2023.  x W = (x / s) (s W): a channel of
large inputs gets a large s, so that its weights are stored with a smaller error than others.
s = r^a with r the root of the mean square of the channel's inputs (the paper's has their mean
size) and a from a grid, by the error of the outputs of all sites that read the tensor,
tr(Eᵀ H E) with H from calibration data.  x is divided in parameters before it
(`jaxquant.recover.folding`): the model computes the same with them, and what is stored are other
weights.  Where there are none, in loops, and where held-out samples do not gain, s is 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.model import FloatModel
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.groups import group_layout
from jaxquant.recover.covariance import APART, KEPT, Found, sum_products
from jaxquant.recover.feedback import gain_db, output_error
from jaxquant.recover.folding import Place, dividing, place_of
from jaxquant.recover.grouped_matrix import GroupedMatrix, grouped_matrix
from jaxquant.recover.product import SiteProduct
from jaxquant.recover.step import Draft, Step, Task
from jaxquant.run.program import Program
from jaxquant.weights.fold import fold
from jaxquant.weights.groups import quantize_groups
from jaxquant.weights.quantize import quantize_params

EXPONENTS = tuple(n / 10 for n in range(1, 11))
_SMALLEST = 1e-3  # of the largest channel's size: what a smaller one counts as


class Scalable(NamedTuple):
    """A tensor whose channels may be divided.

    Attributes:
      readers: the sites that read it.
      divided: the parameters before it.
      multiplied: those of the sites.
    """

    readers: tuple[Site, ...]
    divided: tuple[Place, ...]
    multiplied: tuple[Place, ...]


def scale_channels(task: Task, draft: Draft) -> Draft:
    """Scale the input channels of sites with this step, outside of loops, in other parameters."""
    program, source = draft.program, task.source
    found = _find(program)
    sites = sum(len(each.readers) for each in found)
    asked = program.whole_plan.recovered_by("awq")
    leaves = dict(zip(program.graph.leaves, jax.tree.leaves(source.params), strict=True))
    told: dict[str, str] = {}
    if found:
        names = [site.name for each in found for site in each.readers]
        with task.progress.stage("covariances", task.batches.total, "batch") as stage:
            batches = stage.each(task.batches.read())
            sums = sum_products(source, program.whole_plan, batches, names, task.padding)
        with task.progress.stage("awq", len(found), "tensor") as stage:
            # One tensor after the other on what the earlier ones left: a weight may be behind two.
            for each in stage.each(found):
                params = _rebuilt(source, program, leaves)
                best = _best_scale(program, params, each, sums)
                if best is None:
                    continue
                scale, gain = best
                told |= {site.name: f"awq: error {gain:.1f} dB lower" for site in each.readers}
                # What makes the tensor is divided and what reads it multiplied: the float model is
                # the same.
                for place in each.divided:
                    leaves[place.leaf] = _scaled(leaves[place.leaf], place, 1 / scale)
                for place in each.multiplied:
                    leaves[place.leaf] = _scaled(leaves[place.leaf], place, scale)
    note = f"{len(told)} of {len(asked)} sites, {sites} of which read what parameters scale"
    if not told:
        return draft.replaced("awq", note)
    scaled = copy.copy(source)
    scaled.params = _rebuilt(source, program, leaves)
    qparams = quantize_params(program.binding, scaled.params)
    return draft.replaced("awq", note, qparams=qparams, source=scaled, by_site=draft.told(told))


STEP = Step(names=("awq",), run=scale_channels)


def _find(program: Program) -> list[Scalable]:
    """The tensors that all their readers can be scaled for."""
    model, graph = program.model, program.graph
    asked = program.whole_plan.recovered_by("awq")
    # All readers of a channel take the same factor, so a tensor is scaled for all or for none.
    by_tensor: dict[tuple[ir.Var, int], list[Site]] = {}
    for site in (each.site for each in program.binding.sites if each.site.name in asked):
        contraction = site.as_contraction
        contracted = site.input_axes.contracted
        if (
            SiteProduct(graph, site).reason
            or contraction.feature_groups != 1
            or len(contracted) != 1
        ):
            continue
        # By the tensor and its axis: one of two axes may be that of channels for one reader only.
        by_tensor.setdefault((site.operands[0], contracted[0]), []).append(site)
    found = []
    for (var, axis), readers in by_tensor.items():
        divided = dividing(model, var, axis, [site.equation for site in readers])
        own = [
            place_of(graph, site.weight, site.weight_axes.contracted[0])
            for site in readers
            if site.weight is not None
        ]
        multiplied = [place for place in own if place is not None]
        # A reader that cannot take the scale back would read other numbers.
        if divided and len(multiplied) == len(readers):
            found.append(Scalable(tuple(readers), tuple(divided), tuple(multiplied)))
    return found


def _best_scale(
    program: Program, params: object, tensor: Scalable, sums: Found
) -> tuple[np.ndarray, float] | None:
    """float64 [I], the s of the least error, and by how many dB that falls on held-out samples.

    None where it does not.
    """
    graph, plan = program.graph, program.plan
    readers = [_Reading(program, params, site, plan.group_size) for site in tensor.readers]
    seen = sums[tensor.readers[0].name][()]
    if not seen.counts.all():
        # A site that no kept, or no held-out, position came to says nothing.
        return None
    kept, apart = (seen.products[part] / seen.weights[part] for part in (KEPT, APART))
    channels = graph.shape(tensor.readers[0].operands[0])[
        tensor.readers[0].input_axes.contracted[0]
    ]
    square = np.einsum("gkk->k", kept).reshape(channels, -1).mean(axis=1)
    # A channel that is hardly ever other than zero would get an endless factor.
    size = np.sqrt(np.maximum(square, _SMALLEST**2 * square.max()))
    if not square.any():
        return None

    def error(covariance: np.ndarray, scale: np.ndarray) -> float:
        return sum(reading.error(covariance, scale) for reading in readers)

    # The search of the paper, over exponents of the channels' sizes; 1 is among them.
    one = np.ones(channels)
    scales = [one, *(_centred(size**exponent) for exponent in EXPONENTS)]
    best = min(scales, key=lambda scale: error(kept, scale))
    # Chosen on what was kept, accepted on what was held out.
    before, after = error(apart, one), error(apart, best)
    return (best, gain_db(before, after)) if after < before else None


def _centred(scale: np.ndarray) -> np.ndarray:
    """As far above 1 as below, so that the dividing parameters stay of their size."""
    # The product of both ends is one: scales are free but for a common factor.
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()))


class _Reading:
    """A site that reads a tensor, tried with scales of its channels."""

    def __init__(self, program: Program, params: object, site: Site, group_size: int | None):
        graph = program.graph
        self._bits = program.slots[site.name].weight_bits
        self._view = layout.weight_view(graph, site, integer=False)
        self._layout = group_layout(self._view.shape, self._view.channels, group_size)
        matrix = grouped_matrix(SiteProduct(graph, site), self._view, self._layout)
        assert matrix is not None, "what is a parameter, rearranged, is stored as it is"
        self._matrix: GroupedMatrix = matrix
        # Folded: what is scaled is the parameter, before the model's own rearrangements.
        values, _ = fold(graph, params, [self._view.var], [])
        self._weight = matrix.matrix(values[self._view.var]).astype(np.float64)

    def error(self, covariance: np.ndarray, scale: np.ndarray) -> float:
        """The error of the outputs, with the weight scaled, rounded to nearest and scaled back."""
        matrix = self._matrix
        rows = np.repeat(scale, len(matrix.order) // len(scale))
        rows = rows[np.argsort(matrix.order)][None, :, None]
        flat = np.empty(self._weight.size)
        # As it will be stored: rounded in units of its own groups, then scaled back.
        flat[matrix.elements] = self._weight * rows
        integers, steps = quantize_groups(flat.reshape(self._view.shape), self._layout, self._bits)
        rounded = matrix.integers(integers, self._bits) * matrix.step(steps) / rows
        off = jnp.asarray(self._weight - rounded, jnp.float32)
        return float(output_error(jnp.asarray(matrix.covariance(covariance), jnp.float32), off))


def _scaled(leaf: object, place: Place, scale: np.ndarray) -> np.ndarray:
    """A parameter times a factor for each index along an axis."""
    value = np.asarray(leaf, np.float64)
    shape: Sequence[int] = [len(scale) if a == place.axis else 1 for a in range(value.ndim)]
    return (value * scale.reshape(shape)).astype(np.float32)


def _rebuilt(source: FloatModel, program: Program, leaves: dict[ir.Var, object]) -> object:
    """The parameters with some leaves replaced."""
    structure = jax.tree.structure(source.params)
    return jax.tree.unflatten(structure, [leaves[var] for var in program.graph.leaves])
