"""Second-order rounding of stored weights: GPTQ, on what the sites of a float model read.

The equations are in `jaxquant.recover.feedback`, the covariances in `jaxquant.recover.covariance`.
Each weight is rounded on the covariance of what the float model gives its sites, so that one pass
over the data serves many; where several sites read one weight their covariances are added, and each
layer of a scan over stacked weights has its own.  Scales stay those of rounding to nearest.

A weight is rounded with the covariance of three quarters of the positions first; where that does
not lessen the error of the outputs at the rest, more damped if need be, it stays rounded to
nearest.  Where it does, the weight is rounded on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.code_tables import INT, VALUES, as_floats
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.groups import group_layout
from jaxquant.recover.covariance import APART, KEPT, Found, Reader, sum_products
from jaxquant.recover.feedback import gain_db, mixing, output_error, round_with_feedback
from jaxquant.recover.grouped_matrix import GroupedMatrix, grouped_matrix
from jaxquant.recover.product import SiteProduct
from jaxquant.recover.step import Draft, Step, Task
from jaxquant.run.layers import GraphLayer, Layer
from jaxquant.weights.fold import fold
from jaxquant.weights.groups import RANGES

DAMPINGS = (0.01, 0.1, 1.0)  # the least of them that lessens the error
MEMORY = 1 << 30  # bytes of covariances that are summed in one pass over the data
LARGEST_SUMS = 4 << 30  # bytes that the covariances of one weight may take, in all its layers
FEWEST = 32  # positions to round a weight on
Key: TypeAlias = tuple[tuple[str, ...], Layer]  # where a weight is stored, and in which layer


class Rounded(NamedTuple):
    """What became of one weight.

    Attributes:
      gain_db: by how much the error of the outputs fell, at positions that were held out.
      reason: why it stays rounded to nearest; "" where it does not.
    """

    gain_db: float = 0.0
    reason: str = ""


class Weight:
    """A stored weight, in one layer, and the sites that read it.

    Attributes:
      path: where its integers are.
      readers: the sites, each with a layer in which it reads the weight.
      reason: why it cannot be rounded so; "" where it can.
    """

    def __init__(self, here: GraphLayer, site: Site, weight: np.ndarray):
        self._slot = here.program.slots[site.name]
        self.path = self._slot.int8
        self.readers: list[tuple[Reader, Layer]] = []
        self.reason = ""
        self._weight = weight
        self._group_size = here.program.plan.group_size
        self._params = here.qparams["params"]  # views: what is written goes to the model's arrays

    def add(self, reader: Reader, layer: Layer) -> None:
        """One more site, or layer of it, that reads the weight."""
        self.readers.append((reader, layer))
        # Seen before it is summed: what does not fit is told, and not tried.
        size = _bytes(reader)
        too_large = f"its covariances would take {size / 1e9:.1f} GB" if size > LARGEST_SUMS else ""
        self.reason = self.reason or reader.product.reason or too_large

    def round(self, found: Found) -> Rounded:
        """Round the weight anew, in place, where that is better."""
        matrix, products, counts = self._summed(found)
        if matrix is None:
            return Rounded(reason="a stored number stands in several places of it")
        if counts.sum() < FEWEST or not counts.all():
            return Rounded(reason=f"{counts.sum()} output positions are too few to round on")

        # Scales stay what they are: only the integers change.
        integers, scale = (layout.get(self._params, x) for x in (self.path, self._slot.scale))
        step = matrix.step(np.asarray(as_floats(scale)))
        weight = matrix.matrix(self._weight).astype(np.float32)
        bits, dtype = self._slot.format

        def values(codes: np.ndarray) -> np.ndarray:
            return codes if dtype == INT else VALUES[dtype][codes & 15]

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

        apart = jnp.asarray(products[APART] / counts[APART], jnp.float32)
        before = values(matrix.integers(integers, bits))
        nearest = float(output_error(apart, weight - before * step))
        # Decided on rows that were held out, then rounded on all of them.
        for damping in DAMPINGS:
            tried = values(rounded(products[KEPT], damping))
            error = float(output_error(apart, weight - tried * step))
            if error < nearest:
                after = rounded(products.sum(axis=0), damping)
                # In place: the arrays are those that the model gets.
                integers[...] = matrix.stored(after, bits)
                return Rounded(gain_db(nearest, error))
        return Rounded(reason="rounding to nearest is no worse")

    def _summed(self, found: Found) -> tuple[GroupedMatrix | None, np.ndarray, np.ndarray]:
        """How the weight is stored, and the sums over all sites that read it."""
        matrix, products, counts = None, np.zeros(()), np.zeros(2, np.int64)
        for reader, layer in self.readers:
            product = reader.product
            view = layout.weight_view(product.graph, reader.site, integer=False)
            own = group_layout(view.shape, view.channels, self._group_size)
            # One reader that cannot say where its inputs meet the weight, and none of them counts.
            if (matrix := grouped_matrix(product, view, own)) is None:
                break
            # Each reader's vectors meet the same weight, so that their sums are one.
            sums = found[reader.site.name][layer]
            products = products + matrix.covariance(sums.products)
            counts = counts + sums.counts
        return matrix, products, counts


def round_weights(task: Task, draft: Draft) -> Draft:
    """Round the weights of the sites with this step anew.

    Reads all batches of the task, once for every `MEMORY` bytes of covariances: 16 K² bytes for a
    site that sums K products, in each layer.  A weight for which that is more than `LARGEST_SUMS`
    stays rounded to nearest.

    Raises:
      ValueError: what a site reads is NaN or infinite.
    """
    program, plan = draft.program, draft.program.whole_plan
    source = draft.source or task.source
    # On the host, since each layer's view is written to.
    qparams: Any = jax.tree.map(_on_host, dict(draft.qparams))
    whole = GraphLayer(program, program.binding, qparams, source.params)
    # The float weights are folded graph by graph.
    weights = _find_weights(whole, plan.recovered_by("gptq"))
    outcomes = {key: Rounded(reason=weight.reason) for key, weight in weights.items()}
    # As many passes over the data as the covariances need memory; each runs the float model.
    for keys in _in_passes(weights):
        readers = [reader for key in keys for reader, _ in weights[key].readers]
        names = list(dict.fromkeys(reader.site.name for reader in readers))
        with task.progress.stage("covariances", task.batches.total, "batch") as stage:
            batches = stage.each(task.batches.read())
            found = sum_products(source, plan, batches, names, task.padding)
        with task.progress.stage("gptq", len(keys), "weight") as stage:
            for key in stage.each(keys):
                outcomes[key] = weights[key].round(found)
    # Only what has changed goes back to the devices.
    after = jax.tree.map(lambda x: x, dict(draft.qparams))  # the others stay on their devices
    for path in {weights[key].path for key, outcome in outcomes.items() if not outcome.reason}:
        layout.put(after["params"], path, jax.device_put(layout.get(qparams["params"], path)))
    return draft.replaced(
        "gptq",
        _summary(outcomes),
        qparams=after,
        by_site=draft.told(_by_site(weights, outcomes)),
    )


STEP = Step(names=("gptq",), run=round_weights)


def _on_host(x: jax.Array) -> np.ndarray:
    """An array of the model for NumPy: a copy to write to of integers, else the same numbers."""
    return np.asarray(x) if jnp.issubdtype(x.dtype, jnp.floating) else np.array(x)


def _find_weights(whole: GraphLayer, asked: Collection[str]) -> dict[Key, Weight]:
    """The weights of the sites that have the step, those of each layer."""
    found: dict[Key, Weight] = {}
    for here in whole.walk():
        graph, model = here.program.graph, here.program.model
        sites = [each.site for each in here.binding.sites if each.site.name in asked]
        views = [layout.weight_view(graph, site, integer=False) for site in sites]
        values, _ = fold(graph, here.params, [view.var for view in views], [])
        for site, view in zip(sites, views, strict=True):
            assert site.weight is not None
            varies = model.varies_by_layer(site.weight)
            # Scans along which the weight varies, each layer by itself.
            own = tuple(n for n, is_own in zip(here.layer, varies, strict=True) if is_own)
            # A weight that layers share is rounded once, on what all of its readers see.
            key = here.program.slots[site.name].int8, own
            if key not in found:
                stored = tuple(slice(0, size) for size in view.shape)
                found[key] = Weight(here, site, values[view.var][stored])
            found[key].add(Reader(model, SiteProduct(graph, site)), here.layer)
    return found


def _in_passes(weights: Mapping[Key, Weight]) -> Iterator[list[Key]]:
    """The weights that can be rounded, as many together as one pass over the data sums for.

    All layers of a weight, whose sums one evaluation gives, are together.
    """
    by_path: dict[Any, list[Key]] = {}
    for key, weight in weights.items():
        if not weight.reason:
            by_path.setdefault(weight.path, []).append(key)
    some: list[Key] = []
    summed: dict[Any, int] = {}
    # Layers of one stacked weight are kept together: one look at the loop sums for all of them.
    for keys in by_path.values():
        readers = [reader for key in keys for reader, _ in weights[key].readers]
        own = {reader.shared: _bytes(reader) for reader in readers}
        # What is shared with a site of this pass is summed anyway.
        if some and sum({**summed, **own}.values()) > MEMORY:
            yield some
            some, summed = [], {}
        some += keys
        summed |= own
    if some:
        yield some


def _bytes(reader: Reader) -> int:
    """What the sums of one site take on the host, in float64."""
    return 8 * math.prod(reader.shape)


def _summary(outcomes: Mapping[Key, Rounded]) -> str:
    """How many weights were rounded anew, and by how much the errors of their outputs fell."""
    gains = [each.gain_db for each in outcomes.values() if not each.reason]
    text = f"{len(gains)} of {len(outcomes)} weights"
    if not gains:
        return text
    return f"{text}, the error of their outputs {np.mean(gains):.1f} dB lower in the mean"


def _by_site(weights: Mapping[Key, Weight], outcomes: Mapping[Key, Rounded]) -> dict[str, str]:
    """What became of the weight of each site, of all its layers together."""
    of_sites: dict[str, dict[Key, Rounded]] = {}
    for key, weight in weights.items():
        for reader, _ in weight.readers:
            of_sites.setdefault(reader.site.name, {})[key] = outcomes[key]
    return {name: _told(list(found.values())) for name, found in of_sites.items()}


def _told(found: Sequence[Rounded]) -> str:
    gains = [each.gain_db for each in found if not each.reason]
    reasons = dict.fromkeys(each.reason for each in found if each.reason)
    parts = []
    if gains:
        layers = f" in {len(gains)} of {len(found)} layers" if len(found) > 1 else ""
        parts.append(f"gptq{layers}: error {min(gains):.1f} dB lower")
    return "; ".join([*parts, *(f"to nearest: {reason}" for reason in reasons)])
