"""Equalization: a step of its own for each input channel of a site, which the weight takes back.

x · W = (x / e) · (e W) for any e > 0 per input channel.  An int8 tensor that only convolutions and
dots with a stored weight read is divided by e as it is quantized (its scale becomes a vector), and
the weights are multiplied by e before they are quantized.  Nothing is said of the activation before
the tensor, since no parameter in front of it changes: ReLU, ReLU6 and all others are handled alike.
Depthwise and grouped convolutions are too; for a depthwise one e ends in the weight's scales, so
that it is a scale of the activations for each group.

"equalization" is the cross-layer equalization of M. Nagel et al., Data-Free Quantization through
Weight Equalization and Bias Correction, 2019, e = r^α / w^(1-α) with α = 1/2, r the channel's range
and w the largest magnitude of its weights.  Other than there, r is of the quantized tensor instead
of the weight before it, and of several α, none included, that of the least error is taken, tried at
the outputs of the sites behind the tensor on rows of the calibration samples.
"smoothquant" is the migration of G. Xiao et al., SmoothQuant, 2023: dots alone, α = 1/2.

No channel's step is larger than the tensor's was (e <= 1): what a channel of small weights loses to
a coarse grid is alike at all positions of an image, so that no later mean takes it away, and the
error at the site does not tell (EfficientNet-Lite0 lost 0.7 dB by one such tensor).

r is not what calibration showed of a channel but how far its tail may go
(`jaxquant.recover.channels.reach`), the tensor's own range at most: images that calibration did not
see exceed a channel's largest value often, the tensor's seldom.

Zero points are chosen after dividing.  Where one channel is far larger than the others, the plan's
grid knows no other: behind a GELU, whose least value is -0.17, a channel of 90 leaves no step below
zero, whatever the others are divided by.  The zero points of the divided channels are tried beside
the plan's (`jaxquant.recover.factors.candidate_grids`).

Inside a scan over stacked weights each layer has factors of its own; where the layers have a weight
behind the tensor in common, all have the same, each on the grid that it had.  In another loop they
are for all steps, and tried on rows of all.  Nothing of them goes round a loop: a tensor is divided
where it is quantized, and the carry is float.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxquant.graph.layer_names import layer_suffix
from jaxquant.plan.binding import Binding
from jaxquant.plan.joined import readers_of_joined
from jaxquant.plan.plan import TensorPlan
from jaxquant.recover.divisible import Divisible, Where, find_divisible
from jaxquant.recover.factors import Divided, choose
from jaxquant.recover.step import Draft, Step, Task
from jaxquant.recover.tensor_trials import tensor_trials
from jaxquant.run.program import program_by_site
from jaxquant.weights.quantize import quantize_params
from jaxquant.weights.sites import Divisors

ALPHAS: Mapping[str, tuple[float, ...]] = {
    "equalization": (0.25, 0.5, 0.75, 1.0),
    "smoothquant": (0.5,),
}


def equalize(task: Task, draft: Draft) -> Draft:
    """Divide every tensor that gains by it: the channels of what sites with these steps read.

    What a concatenation in float gives has parts that need scales of their own, so its readers are
    equalized whether that is asked for or not.
    """
    binding, params = draft.program.binding, task.source.params
    plan = binding.whole_plan
    where: dict[str, frozenset[str]] = {
        step: plan.recovered_by(step) for step in STEP.names if step in plan.recover
    }

    # Without being asked, equalization does what cannot be left: the readers of float joins.
    chosen, behind = list(where), ""
    joined = frozenset[str]().union(*map(readers_of_joined, binding.all_graphs()))
    joined = joined.difference(*where.values())
    if joined:
        behind = "" if chosen else " behind concatenations in float"
        chosen = chosen or ["equalization"]
        where["equalization"] = where.get("equalization", frozenset()) | joined
    if not chosen:
        return draft

    name, everywhere = " and ".join(chosen), frozenset(s.name for s in plan.sites if not s.reason)
    # Counted among all that could have been divided, whoever asked for it.
    anywhere = find_divisible(draft.program, dict.fromkeys(where, everywhere))
    total = sum(math.prod(tensor.model.scans) for tensor in anywhere)
    with task.progress.stage(name):
        found = find_divided(task, draft, where)
        note = f"{len(found)} of {total} tensors{behind}"
        # Automatic, and of no use: the report says nothing of it.
        if not found:
            return draft if behind else draft.replaced(name, note)

        # Other zero points, and scales along channels, are another program.
        binding, divisors = _on_other_grids(binding, found), _divisors(anywhere, found)
        return draft.replaced(
            name,
            note,
            program=program_by_site(binding, params),
            qparams=quantize_params(binding, params, divisors),
            divisors=divisors,
        )


def _on_other_grids(binding: Binding, found: Mapping[str, Divided]) -> Binding:
    """A binding, and those of its bodies, with the grids of the tensors that are divided."""
    suffix = layer_suffix(binding.layer)
    tensors = [
        _divided(tensor, found[tensor.name + suffix]) if tensor.name + suffix in found else tensor
        for tensor in binding.plan.tensors
    ]
    changed = functools.partial(_on_other_grids, found=found)
    return binding.with_tensors(tensors).in_bodies(changed)


STEP = Step(names=("equalization", "smoothquant"), run=equalize, is_automatic=True)


def find_divided(task: Task, draft: Draft, where: Where) -> dict[str, Divided]:
    """Tensor name -> how it is divided, for the tensors that gain by it; that of each layer.

    Args:
      task: the float model and the samples.
      draft: the int8 model, nothing of it divided; the gains of its sites are read.
      where: the sites of each step; where a dot has both, it has the former.
    """
    divisible = find_divisible(draft.program, where)
    if not divisible:
        return {}
    equalized = where.get("equalization", frozenset())
    found: dict[str, Divided] = {}
    for trial in tensor_trials(task, draft, divisible):
        tensor = trial.tensor
        # A tensor that another site without the step reads keeps the milder search.
        both = all(product.site.name in equalized for product in tensor.readers)
        alphas = ALPHAS["equalization" if both else "smoothquant"]
        # Layers that share a weight have one result, given once for each.
        for part, best in zip(trial.parts, choose(trial.tried, alphas), strict=False):
            factors = best.factors.reshape(tensor.sizes)
            found[part.named(tensor.name)] = best._replace(factors=factors)
    return found


def _divisors(divisible: Sequence[Divisible], found: Mapping[str, Divided]) -> Divisors:
    """What channels are divided by: of a tensor that is divided in some layers, ones in the others.

    The scales of the layers are stacked, so that all have one for each channel.
    """
    divisors: dict[str, np.ndarray] = {}
    for tensor in divisible:
        names = [tensor.name + layer_suffix(layer) for layer in np.ndindex(tensor.model.scans)]
        if found.keys().isdisjoint(names):
            continue
        for name in names:
            # All layers run one program, which divides: by one where nothing was found.
            divisors[name] = found[name].factors if name in found else np.ones(tensor.sizes)
    return divisors


def _divided(tensor: TensorPlan, divided: Divided) -> TensorPlan:
    """The plan of a tensor that is divided; one whose grid stays keeps its threshold."""
    grid, shape = divided.grid, divided.factors.shape
    threshold = tensor.threshold
    # On a grid of its own the threshold is as far as that reaches.
    if grid != (tensor.scale, tensor.zero_point):
        threshold = grid.scale * max(128 + grid.zero_point, 127 - grid.zero_point)
    channels = tuple(axis for axis, size in enumerate(shape) if size > 1)
    return dataclasses.replace(tensor, threshold=threshold, channels=channels, **grid._asdict())
