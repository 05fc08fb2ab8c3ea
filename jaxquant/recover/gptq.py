"""Second-order rounding of stored weights: GPTQ, on what the sites of a float model read.

The equations are in `jaxquant.recover.feedback`, the covariances in `jaxquant.recover.covariance`.
Each weight is rounded on the covariance of what the float model gives its sites, so that one pass
over the data serves many; where several sites read one weight their covariances are added, and each
layer of a scan over stacked weights has its own.  Scales stay those of rounding to nearest.  Where
a parameter is added to a site's outputs (`jaxquant.recover.added`), it takes the mean of their
error away.

A weight is rounded with the covariance of three quarters of the positions first; where that does
not lessen the error of the outputs at the rest, more damped if need be, it stays rounded to
nearest.  Where it does, the weight is rounded on all of them.  Less damping than there is would
gain more on data like those of the calibration, and lose on others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.plan import layout
from jaxquant.recover.added import find_added, with_addition
from jaxquant.recover.covariance import Reader, sum_products
from jaxquant.recover.gptq_weight import Rounded, Weight
from jaxquant.recover.product import SiteProduct
from jaxquant.recover.step import Draft, Step, Task
from jaxquant.run.layers import GraphLayer, Layer
from jaxquant.run.program import Program
from jaxquant.weights.fold import fold

MEMORY = 1 << 30  # bytes of covariances that are summed in one pass over the data
Key: TypeAlias = tuple[tuple[str, ...], Layer]  # where a weight is stored, and in which layer


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
        readers = [reader for key in keys for reader in weights[key].readers]
        names = list(dict.fromkeys(reader.site.name for reader in readers))
        with task.progress.stage("covariances", task.batches.total, "batch") as stage:
            batches = stage.each(task.batches.read())
            found = sum_products(source, plan, batches, names, task.padding)
        with task.progress.stage("gptq", len(keys), "weight") as stage:
            for key in stage.each(keys):
                outcomes[key] = weights[key].round(found)
    # Only what has changed goes back to the devices.
    after = jax.tree.map(lambda x: x, dict(draft.qparams))  # the others stay on their devices
    done = {key: outcome for key, outcome in outcomes.items() if not outcome.reason}
    changed = {weights[key].path for key in done} | _add_to_outputs(
        program, source.params, qparams["params"], done.values()
    )
    for path in changed:
        before, now = (layout.get(tree["params"], path) for tree in (draft.qparams, qparams))
        # What is on a device by default may be moved to those of other parameters, as before.
        place = before.sharding if before.committed else None
        layout.put(after["params"], path, jax.device_put(now, place))
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
            reader = Reader(model, SiteProduct(graph, site))
            found[key].add(reader, here.layer, find_added(model, site))
    return found


def _add_to_outputs(
    program: Program, params: Any, arrays: dict[str, Any], outcomes: Iterable[Rounded]
) -> set[tuple[str, ...]]:
    """Change the parameters that take mean errors away; returns where they are.

    Args:
      program: of the whole model.
      params: the float model's parameters.
      arrays: those of the quantized model, whose entries are replaced.
      outcomes: what became of its weights.
    """
    paths = layout.leaf_paths(program.graph, params)
    changed = set()
    for addition in (addition for outcome in outcomes for addition in outcome.additions):
        path = paths[addition.added.leaf]
        layout.put(arrays, path, with_addition(layout.get(arrays, path), addition))
        changed.add(path)
    return changed


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
        # What is shared with a site of this pass is summed anyway.
        own = {reader.shared: reader.bytes for key in keys for reader in weights[key].readers}
        if some and sum({**summed, **own}.values()) > MEMORY:
            yield some
            some, summed = [], {}
        some += keys
        summed |= own
    if some:
        yield some


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
        for reader in weight.readers:
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
