"""The grids of the tensors that are quantized from float: their thresholds, by family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxquant.calibration.observations import Observations, TensorStats, merge
from jaxquant.calibration.observers import Observer, check_thresholds
from jaxquant.graph import ir
from jaxquant.graph.sites import Site
from jaxquant.plan.config import QuantConfig, name_of
from jaxquant.plan.forms import Forms
from jaxquant.plan.grid import levels, make_grid
from jaxquant.plan.plan import TensorPlan
from jaxquant.plan.rules import matching, setting


def plan_tensors(
    forms: Forms,
    names: Mapping[ir.Var, str],
    constants: Mapping[ir.Var, Sequence[str]],
    observations: Observations,
    settings: Mapping[str, TensorSettings],
    config: QuantConfig,
) -> tuple[TensorPlan, ...]:
    """The grids of the tensors that are quantized from float.

    Args:
      settings: family -> how its grid is chosen.
      constants: the tensor that stands for a family -> the constants that its scale has to hold.
        They tell of its range alone: how often a constant is there says nothing of the activations.
    """
    missing = [names[var] for var in forms.entries if names[var] not in observations.tensors]
    if missing:
        raise ValueError(
            f"the observations hold nothing on {', '.join(map(repr, missing[:5]))}; calibrate with "
            "the same apply_fn and the same quantizable_op_type, is_full_quantize, target and skip"
        )

    # The members of each family share a grid, which holds the constants beside them as well.
    families: dict[str, list[str]] = {}
    beside: dict[str, list[TensorStats]] = {}
    heads = forms.heads
    for var in forms.entries:
        family = names[heads[var]]
        families.setdefault(family, []).append(names[var])
        # By the family: constants belong to a scale, not to a tensor.
        beside[family] = [
            observations.tensors[name]
            for name in constants.get(forms.family[var], ())
            if name in observations.tensors
        ]
    _check_alive([observations.tensors[names[var]] for var in forms.entries])

    # One search for the thresholds of all families, on what their members have seen together.
    stats = [merge([observations.tensors[t] for t in members]) for members in families.values()]
    steps = [
        levels(s.min, s.max, not settings[family].symmetric)
        for family, s in zip(families, stats, strict=True)
    ]
    algos = [settings[family].algo for family in families]
    thresholds = _thresholds(observations, config, families, stats, steps, algos)

    tensors = []
    for (family, members), seen, threshold in zip(families.items(), stats, thresholds, strict=True):
        held = beside[family]

        # Held whole, while activations may be clipped: a constant is there in every sample.
        threshold = max([threshold, *(constant.abs_max for constant in held)])
        low = min([seen.min, *(constant.min for constant in held)])
        high = max([seen.max, *(constant.max for constant in held)])
        symmetric = settings[family].symmetric
        grid = make_grid(threshold, low, high, not symmetric)
        tensors += [
            TensorPlan(name, family, threshold, *grid, symmetric=symmetric) for name in members
        ]
    return tuple(tensors)


class TensorSettings(NamedTuple):
    """How the grid of a family is chosen."""

    algo: str | Observer
    symmetric: bool


def tensor_settings(
    chosen: Sequence[Site],
    forms: Forms,
    names: Mapping[ir.Var, str],
    config: QuantConfig,
    layer: Sequence[int],
) -> dict[str, TensorSettings]:
    """Family -> its settings: of the rules that match the sites that read it, the last ones win.

    Args:
      chosen, forms, names: the int8 sites of a graph and its tensors.
      config: has the rules.
      layer: which one it is of the scans over stacked weights around the graph.
    """
    rules = config.all_rules
    # Settings are of sites, and scales of families: a family has those of all its readers.
    heads = forms.heads
    # Where one tensor is read by several sites, or by families of them, all of their rules count.
    places: dict[str, set[int]] = {names[head]: set() for head in heads.values()}
    for site in chosen:
        read = {names[heads[var]] for var in site.operands if var in heads}
        for family in read:
            places[family].update(matching(rules, site, layer))
    symmetric = config.activation_quantize_type == "symmetric"
    return {
        family: TensorSettings(
            setting(rules, found, "algo", config.algo),
            setting(rules, found, "symmetric", symmetric),
        )
        for family, found in places.items()
    }


def _check_alive(stats: Sequence[TensorStats]) -> None:
    """Raise ValueError where calibration saw zeros alone; a tensor or two may be zero."""
    if stats and not any(seen.abs_max for seen in stats):
        raise ValueError(
            "every tensor that was calibrated was all zero: ds holds no data, as a loader that "
            "fails silently gives it. Look at a batch, and calibrate on samples as the model will "
            "be served"
        )


def _thresholds(
    observations: Observations,
    config: QuantConfig,
    families: Mapping[str, Sequence[str]],
    stats: Sequence[TensorStats],
    steps: Sequence[int],
    algos: Sequence[str | Observer],
) -> list[float]:
    """The threshold of each family, by its own algo; those of one algo are searched together."""
    found: dict[str, float] = {}
    # A search is compiled once an algo, and runs for all of its tensors together.
    for algo in dict.fromkeys(algos):
        places = [place for place, other in enumerate(algos) if other == algo]
        # In the order in which families were found, for messages too.
        names = list(families)
        some = {names[place]: families[names[place]] for place in places}
        thresholds = _searched(
            observations, config, algo, some, [stats[k] for k in places], [steps[k] for k in places]
        )
        found |= zip(some, thresholds, strict=True)
    return [found[family] for family in families]


def _searched(
    observations: Observations,
    config: QuantConfig,
    algo: str | Observer,
    families: Mapping[str, Sequence[str]],
    stats: Sequence[TensorStats],
    steps: Sequence[int],
) -> list[float]:
    """The threshold of each family by one algo."""
    observer = config.observer_of(algo)
    if observer.keeps_histogram:
        return check_thresholds(observer.threshold(stats, steps), list(families))
    if observations.observer != observer:
        raise ValueError(
            f"algo={name_of(algo)!r} keeps statistics of its own, and these observations were "
            "made without it; pass it to jaxquant.calibrate as algo"
        )
    # Of a user's observer only tensors have states: a family has the largest threshold.
    members = [(name, step) for family, step in zip(families.values(), steps, strict=True)
               for name in family]  # fmt: skip
    names = [name for name, _ in members]
    states = [observations.states[name] for name in names]
    found = observer.threshold(states, [step for _, step in members])
    by_name = dict(zip(names, check_thresholds(found, names), strict=True))
    # The grid of a family has to hold every member.
    return [max(by_name[name] for name in family) for family in families.values()]
