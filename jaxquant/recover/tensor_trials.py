"""Tensors whose channels may be divided, with what is needed to try it at the dots behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.plan import TensorPlan
from jaxquant.recover.channels import watch
from jaxquant.recover.divisible import Divisible, Seen
from jaxquant.recover.factors import ReadingSite, Tried
from jaxquant.recover.step import Draft, Task
from jaxquant.recover.trial import Trial
from jaxquant.run.layers import GraphLayer
from jaxquant.weights.fold import fold


class TensorTrial(NamedTuple):
    """A tensor in layers that are divided alike: one, or those that have a weight in common.

    Attributes:
      tensor: it.
      parts: its graph in each of these layers.
      tried: the tensor in each of them.
    """

    tensor: Divisible
    parts: Sequence[GraphLayer]
    tried: Sequence[Tried]


def tensor_trials(
    task: Task, draft: Draft, divisible: Sequence[Divisible]
) -> Iterator[TensorTrial]:
    """Run the float model on the samples, and give each tensor that they came to.

    Args:
      task: the float model and the samples.
      draft: the int8 model, nothing of it divided; the gains of its sites are read.
      divisible: tensors of it.
    """
    program, params = draft.program, task.source.params
    corrected = program.whole_plan.recovered_by("bias_correction")
    seen = watch(program.model, params, task.alike, divisible, task.padding)
    parts = {
        (part.program.model, part.layer): part
        for part in GraphLayer(program, program.binding, draft.qparams, params).walk()
    }
    # Folded once a part, not once a tensor.
    weights = {place: _weights(part, divisible) for place, part in parts.items()}
    for tensor in divisible:
        for layers in tensor.layers_alike():
            if not all(layer in seen[tensor.name] for layer in layers):
                continue  # a branch that these samples do not take
            places = [(tensor.model, layer) for layer in layers]
            tried = [
                _tried(parts[at], tensor, seen[tensor.name][at[1]], weights[at], corrected)
                for at in places
            ]
            yield TensorTrial(tensor, [parts[at] for at in places], tried)


def _weights(part: GraphLayer, divisible: Sequence[Divisible]) -> dict[ir.Var, np.ndarray]:
    """The float weights behind those of some tensors that are in a part."""
    sites = [p.site for t in divisible if t.model is part.program.model for p in t.readers]
    stored = [site.weight for site in sites if site.weight is not None]
    return fold(part.program.graph, part.params, stored, [])[0]


def _tried(
    part: GraphLayer,
    tensor: Divisible,
    seen: Seen,
    weights: Mapping[ir.Var, np.ndarray],
    corrected: frozenset[str],
) -> Tried:
    """A tensor in a part.

    Args:
      part: it.
      tensor, seen: the tensor, and what the float model showed of it there.
      weights: the float weights of the sites behind it.
      corrected: the sites whose bias takes their mean error away.
    """
    plan = part.binding.plan
    planned = next(each for each in plan.tensors if each.name == tensor.name)
    readers = []
    for product, rows in zip(tensor.readers, seen.rows, strict=True):
        assert product.site.weight is not None
        # In float64, as the weights that are stored are made.
        weight = product.matrix(np.asarray(weights[product.site.weight]).astype(np.float64))
        trial = Trial(
            inputs=rows,
            weight=weight,
            gains=_gains(part, product.site, planned, len(weight)),
            per_channel=plan.weight_quantize_type == "channel_wise_abs_max",
            # A corrected bias takes the mean of the error away, so that the spread alone counts.
            centred=product.site.name in corrected,
        )
        readers.append(ReadingSite(tensor, product, trial))
    return Tried(planned, seen, readers)


def _gains(part: GraphLayer, site: Site, tensor: TensorPlan, groups: int) -> np.ndarray:
    """[G, O], what the epilogue multiplies a site's output by."""
    qparams, slot = part.qparams, part.program.slots[site.name]
    scale = np.asarray(layout.get(qparams["params"], slot.scale), np.float64)
    gains = np.asarray(qparams["sites"][site.name]["multiplier"]) / (scale * tensor.scale)
    return gains.reshape(groups, -1)
