"""Dots whose input one scale does not fit: which of them get a scale a channel, or a scale a row.

In transformers a few channels behind a normalization, and a few tokens behind an activation, are
far larger than all others, so that a step that covers them leaves the others a handful of integers
(Y. Bondarenko et al., Understanding and Overcoming the Challenges of Efficient Transformer
Quantization, 2021).  Two things help: a step for each channel, which the weight takes back
(`jaxquant.recover.equalization`) and which costs nothing in the call, and a scale for each row,
found in the call (`Rule(dynamic=True)`), which costs a pass over the tensor.

Which tensors may need either is known from calibration; a model without such a tensor pays nothing.
What they gain is tried at the outputs of the dots behind them, on rows of the calibration samples.
Layers that are alike are decided together, so that a model comes out the same whether its layers
are in a scan or in a Python loop.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxquant.calibration.observations import Observations, TensorStats
from jaxquant.graph import kinds
from jaxquant.graph.layer_names import alike_layers
from jaxquant.graph.model import FloatModel
from jaxquant.graph.sites import Site
from jaxquant.plan.binding import Binding
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.plan import TensorPlan
from jaxquant.plan.rules import OUTLIERS, Rule, first_layer, matching, setting
from jaxquant.progress import Progress
from jaxquant.recover.divisible import find_divisible
from jaxquant.recover.equalization import ALPHAS
from jaxquant.recover.factors import choose
from jaxquant.recover.step import Draft, Task
from jaxquant.recover.tensor_trials import TensorTrial, tensor_trials
from jaxquant.run.program import program_by_site
from jaxquant.weights.quantize import quantize_params

Rules: TypeAlias = tuple[Rule, ...]

# A tensor is looked at where the root mean square of its ordinary values, of this part of all, is
# less than so many of its steps: there are 15 to 20 in a normal tensor's, also behind a ReLU, GELU
# or SiLU.  The largest values are left out: outliers that are frequent would hide themselves.
_ORDINARY, _STEPS = 0.85, 10
_GAIN = 0.5  # to what part the noise has to fall for another form
_FINE = 1e-3  # the part of a dot's output that may be noise before its rows are scaled in the call


def rules_for_outliers(
    source: FloatModel,
    observations: Observations,
    binding: Binding,
    config: QuantConfig,
    progress: Progress,
) -> Rules:
    """A rule for each dot that gains by a scale a channel or a scale a row.

    It is asked of dots with the step "outliers" and a stored weight whose input nothing else reads
    in int8.

    Args:
      source: the float model.
      observations: what calibration saw.
      binding: what becomes int8 without these rules.
      config: has the user's rules; one that says whether a dot is dynamic is kept.
      progress: shows that something is tried.
    """
    groups = alike_layers(site.name for site in binding.whole_plan.sites)
    names = _with_coarse_input(binding, observations, groups)
    # Without a coarse input no sample is run: most models end here.
    if not names:
        return ()
    task = Task(source, observations.examples, None, progress, padding=observations.padding)
    with progress.stage("looking at outliers"):
        program = program_by_site(binding, source.params)
        divisible = find_divisible(program, {"smoothquant": names})
        if not divisible:
            return ()
        draft = Draft(program, quantize_params(binding, source.params))

        # Layers that are alike decide together, so their noise is summed.
        found: dict[Hashable, _AlikeDots] = {}
        for trial in tensor_trials(task, draft, divisible):
            products = trial.tensor.readers
            sites = [product.site for product in products]
            # Layers are alike where their readers are: the same names but for the layer, one shape.
            key = tuple((groups[p.site.name], p.matrix_shape) for p in products)
            tried = found.setdefault(key, _AlikeDots({}, []))
            tried.sites.update((site.name, site) for site in sites)
            tried.noise.extend(_noise_of(trial))
    steps = {site.name: site.recover for site in binding.whole_plan.sites}
    return tuple(rule for tried in found.values() for rule in tried.rules(steps, config))


def _with_coarse_input(
    binding: Binding, observations: Observations, groups: Mapping[str, Hashable]
) -> frozenset[str]:
    """The int8 dots with the step that read a tensor whose steps are coarse, in any layer."""
    plan = binding.whole_plan
    coarse = {
        tensor.base_family
        for tensor in plan.tensors
        if _is_coarse(tensor, observations.tensors.get(tensor.name))
    }
    sites = [
        site
        for site in plan.sites
        if site.kind == "mul" and not site.reason and OUTLIERS in site.recover
    ]
    # Layers that are alike are decided together: a coarse input of one has all of them looked at.
    found = {groups[site.name] for site in sites if coarse.intersection(site.inputs)}
    return frozenset(site.name for site in sites if groups[site.name] in found)


def _is_coarse(tensor: TensorPlan, seen: TensorStats | None) -> bool:
    if seen is None or not seen.count:
        return False
    counts = seen.counts.astype(np.float64)
    limit = _ORDINARY * counts.sum()
    # Of each bin as much as belongs to the smallest values, until these make up their part of all.
    ordinary = np.clip(limit - (np.cumsum(counts) - counts), 0, counts)
    values = (np.arange(len(counts)) + 0.5) * seen.bin_width

    # Against the steps of the plan's grid, by mean squares.
    return bool(ordinary @ values**2 < (_STEPS * tensor.scale) ** 2 * limit)


class _Noise(NamedTuple):
    """How much of the outputs of the dots behind a tensor is noise, by the scales that it has."""

    planned: float
    by_channel: float
    by_row: float


def _noise_of(trial: TensorTrial) -> Iterator[_Noise]:
    """The noise behind a tensor in each of its layers."""
    divided = choose(trial.tried, ALPHAS["equalization"])
    for number, tried in enumerate(trial.tried):
        # Not divided at all, where no factors were found to gain.
        planned = by_channel = tried.noise(tried.own, None)
        if divided:
            by_channel = tried.noise(divided[number].grid, divided[number].factors)
        yield _Noise(planned, by_channel, tried.noise_by_row())


class _AlikeDots(NamedTuple):
    """The dots behind tensors that are alike, by their names, and the noise in each layer."""

    sites: dict[str, Site]
    noise: list[_Noise]

    def rules(self, steps: Mapping[str, tuple[str, ...]], config: QuantConfig) -> Iterator[Rule]:
        """What is set for the dots: nothing where no form is better by far.

        Args:
          steps: the recovery steps that they have.
          config: see `rules_for_outliers`.
        """
        planned, by_channel, by_row = (sum(each) for each in zip(*self.noise, strict=True))
        # Halved at least: less is not worth another form.
        is_divided = by_channel <= _GAIN * planned
        best = by_channel if is_divided else planned
        is_coarse = best > _FINE * len(self.noise)
        # Where more than dots and convolutions is int8, a dot that leaves them would have other
        # tensors quantized from float than calibration saw.
        others_stay = config.kinds <= {*kinds.DOT_KINDS, kinds.LOOKUP_KIND}
        free = others_stay and not any(_says_dynamic(s, config) for s in self.sites.values())
        for name in self.sites:
            if free and is_coarse and by_row <= _GAIN * best:
                yield Rule(f"site:{name}", dynamic=True, reason=_reason("rows", planned, by_row))
            elif is_divided:
                # What the user asked for stays, in its order.
                others = [step for step in steps[name] if step not in (OUTLIERS, "equalization")]
                reason = _reason("channels", planned, by_channel)
                yield Rule(f"site:{name}", recover=("equalization", *others), reason=reason)


def _says_dynamic(site: Site, config: QuantConfig) -> bool:
    """Whether a rule of the user's says of a site that it is dynamic, or that it is not."""
    rules = config.all_rules
    return setting(rules, matching(rules, site, first_layer(site)), "dynamic", None) is not None


def _reason(what: str, planned: float, found: float) -> str:
    # No noise at all has no number of decibels.
    gained = 10 * np.log10(planned / found) if found else np.inf
    return f"some {what} of its input are far larger than others: {gained:.1f} dB less noise"
