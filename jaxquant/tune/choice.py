"""What accuracy control may change of a quantization, and the plan that follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxquant.calibration.observations import Observations
from jaxquant.graph.model import Model
from jaxquant.plan import ties
from jaxquant.plan.bind import Binding
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.make import make_plan
from jaxquant.plan.plan import Plan, TensorPlan

FOR_THE_METRIC = "left in float for the sake of the metric (max_drop)"


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a quantization differs from what its configuration says.

    Attributes:
      thresholds: (tensor group, algo) of the groups that take their threshold from another algo.
      recover: steps beside those of the configuration.
      recover_at: the sites where equalization and learned rounding act; None for all.
      left_float: the sites that stay float.
    """

    thresholds: tuple[tuple[str, str], ...] = ()
    recover: tuple[str, ...] = ()
    recover_at: tuple[str, ...] | None = None
    left_float: tuple[str, ...] = ()


def make_chosen_plan(
    model: Model, observations: Observations, config: QuantConfig, choice: Choice
) -> Binding:
    """The plan of a configuration with a choice, bound to the model.

    Raises:
      ValueError: see `jaxquant.plan.make.make_plan`.
    """
    config = dataclasses.replace(
        config,
        left_float=(*config.left_float, *((name, FOR_THE_METRIC) for name in choice.left_float)),
        recover=tuple(dict.fromkeys((*config.recover, *choice.recover))),
    )
    binding = make_plan(model, observations, config)
    for algo in dict.fromkeys(algo for _, algo in choice.thresholds):
        groups = {group for group, other in choice.thresholds if other == algo}
        other = make_plan(model, observations, dataclasses.replace(config, algo=algo))
        binding = binding.with_tensors(tensors_of(binding.plan, other.plan, groups))
    return ties.without_ties(binding)


def tensors_of(plan: Plan, other: Plan, groups: set[str]) -> tuple[TensorPlan, ...]:
    """The tensors of a plan with the grids that `other` has for these groups."""
    grids = {tensor.name: tensor for tensor in other.tensors if tensor.group in groups}
    return tuple(grids.get(tensor.name, tensor) for tensor in plan.tensors)


def groups_of(plan: Plan, sites: Sequence[str]) -> tuple[str, ...]:
    """The tensor groups that these sites read."""
    inputs: Mapping[str, tuple[str, ...]] = {site.name: site.inputs for site in plan.sites}
    return tuple(dict.fromkeys(group for name in sites for group in inputs[name]))


def changed_sites(before: Plan, after: Plan) -> tuple[str, ...]:
    """The sites whose type, or the grid of whose input, differs."""
    old = {site.name: site for site in before.sites}
    grids = [{tensor.group: tensor for tensor in plan.tensors} for plan in (before, after)]
    found = []
    for site in after.sites:
        same = old[site.name].status == site.status and all(
            group in grids[0] and _is_same(grids[0][group], grids[1][group])
            for group in site.inputs
        )
        if not same:
            found.append(site.name)
    return tuple(found)


def _is_same(a: TensorPlan, b: TensorPlan) -> bool:
    """True for one grid, but for what keeps sums away from ties."""
    near = math.isclose(a.scale, b.scale, rel_tol=ties.LARGEST_STEP)
    return near and (a.zero_point, a.channels) == (b.zero_point, b.channels)
