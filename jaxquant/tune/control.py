"""Accuracy control: an int8 model that keeps a metric within reach of the float model's.

Full int8 first.  Where that falls short, the sites are ranked by what each costs the metric
(`jaxquant.tune.sensitivity`), and the sites whose float type would do are the suspects.  Then,
each step on top of what the steps before gained: other thresholds for the suspects' inputs;
equalization, then learned rounding, at the suspects; the float type for the most sensitive sites,
fewest first.  Every candidate is a whole int8 model, scored as it would be used.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxquant.calibration.observations import Observations
from jaxquant.graph.model import FloatModel
from jaxquant.plan.binding import Binding
from jaxquant.plan.rules import Rule
from jaxquant.progress import Progress
from jaxquant.recover.steps import check_steps
from jaxquant.run.qapply import QuantizedApply
from jaxquant.tune.changes import changed_sites
from jaxquant.tune.goal import Goal
from jaxquant.tune.scores import Scores, score
from jaxquant.tune.sensitivity import measure
from jaxquant.tune.switch import Switch
from jaxquant.tune.switchable import Switchable, by_layer

FOR_THE_METRIC = "left in float for the sake of the metric (max_drop)"
_RANKING_SHARE = 0.5  # of the time budget, that ranking the sites may take
_ONE_BY_ONE = 4  # sites left in float one more at a time, before the number grows faster


Rules: TypeAlias = tuple[Rule, ...]


class Built(NamedTuple):
    """An int8 model.

    Attributes:
      qparams, qapply: it.
      binding: its plan, in the traced model.
      source: the float model, its scans cut as the plan says.
    """

    qparams: dict[str, Any]
    qapply: QuantizedApply
    binding: Binding
    source: FloatModel


class Attempt(NamedTuple):
    """One candidate.

    Attributes:
      step: "thresholds", "recovery" or "float".
      detail: what was tried, and where.
      score: of the metric.
      gain: over the best model so far.
      kept: whether later steps, or the result, build on it.
      sites: the sites whose type, or the grid of whose input, differs from full int8; where that
        is in some layers of a scan alone, these ("layers/mlp[3]").
    """

    step: str
    detail: str
    score: float
    gain: float
    kept: bool
    sites: tuple[str, ...]


def control(
    source: FloatModel,
    observations: Observations,
    plan_of: Callable[[Rules], Binding],
    build: Callable[[Rules], Built],
    goal: Goal,
    progress: Progress,
) -> tuple[Built, Rules]:
    """The int8 model that holds the goal, or the best that was found, with a warning.

    Args:
      source: the float model.
      observations: what calibration saw.
      plan_of, build: the plan, and the int8 model, with more rules than those of the user.
      goal: what is to be held.
      progress: shows the steps.

    Returns:
      The model, and the rules that make it.

    Its report's summary has "control": float_score, int8_score (of full int8), score, target, held,
    out_of_time, ranking (the sites, most sensitive first; [] where full int8 holds) and steps (each
    an `Attempt` as a dict).  Of a site inside a scan over stacked weights each layer is tried by
    itself, where the scan can be cut there; else the site is, with all its layers.
    """
    # Jitted once: a metric calls it batch by batch.
    model = functools.partial(jax.jit(source.apply_fn), source.given)
    with progress.stage("accuracy control"):
        with progress.stage("scoring the float model"):
            float_score = score(goal.metric, model)
        search = _Search(plan_of, build, goal, float_score, progress)

        # Each step goes on from the best so far, so that their order is that of what they cost to
        # run.
        if not search.holds:
            ranking, suspects = _rank(source, observations, search, progress)
            _try_thresholds(search, suspects)
            _try_recovery(search, suspects)
            _try_float(search, ranking, suspects)
    return search.result(), search.rules


class _Search:
    """The best model so far, and what was tried."""

    def __init__(
        self,
        plan_of: Callable[[Rules], Binding],
        build: Callable[[Rules], Built],
        goal: Goal,
        float_score: float,
        progress: Progress,
    ):
        self.plan_of = plan_of
        self._build = build
        self._progress = progress
        self.goal = goal
        self.started = time.monotonic()
        self.limit = math.inf if goal.time_budget is None else goal.time_budget
        self.float_score = float_score
        self.target = float_score - goal.max_drop
        self.steps: list[Attempt] = []
        self.ranking: list[str] = []
        self.switchable: Mapping[str, Switchable] = {}
        self.out_of_time = False
        self.rules: Rules = ()

        # Full int8 first: mostly it holds, and then nothing else is tried.
        with progress.stage("full int8"):
            self.best = self.full = build(self.rules)
            self.score = self.full_score = self._score(self.best)

    @property
    def holds(self) -> bool:
        return self.reaches(self.score)

    def may_go_on(self) -> bool:
        """False where the goal is held or time is up."""
        if self.holds:
            return False
        # Once it was said, it stays said: a later look may come in time.
        self.out_of_time |= self.spent() >= self.limit
        return not self.out_of_time

    def spent(self) -> float:
        return time.monotonic() - self.started

    def consider(
        self, step: str, detail: str, rules: Rules, keep: Callable[[float], bool] | None = None
    ) -> Attempt:
        """Score what rules make, and go on from it where `keep` says so; None: if it is better."""
        with self._progress.stage(f"trying {step}"):
            built = self._build(rules)
            found = self._score(built)
        kept = found > self.score if keep is None else keep(found)
        # Against full int8, so that each step's sites can be read by themselves.
        sites = changed_sites(self.full.binding, built.binding)
        self.steps.append(Attempt(step, detail, found, found - self.score, kept, sites))
        if kept:
            self.best, self.score, self.rules = built, found, rules
        return self.steps[-1]

    def thresholds(self, binding: Binding, sites: Sequence[str]) -> tuple[float, ...]:
        """The thresholds of what some sites and layers read."""
        layers = by_layer(binding)
        names = [name for site in sites for name in self.switchable[site].layer_names]
        return tuple(tensor.threshold for name in names for tensor in layers[name].tensors)

    def reaches(self, found: float) -> bool:
        """True for a score that holds the goal."""
        return found >= self.target

    def result(self) -> Built:
        if not self.holds:
            # A warning, and the model: the best that was found may yet be good enough.
            warnings.warn(
                f"the metric is {self.score:.6g}, below the target of {self.target:.6g} (float "
                f"{self.float_score:.6g} less max_drop={self.goal.max_drop:g}), and "
                + ("the time budget is spent" if self.out_of_time else "no step brings it there")
                + "; this is the best model found. See qapply.report()",
                stacklevel=6,  # the caller of the public function, behind its check of keywords
            )
        # The whole search is in the report: what was tried, and what it gained.
        summary = {
            "float_score": self.float_score,
            "int8_score": self.full_score,
            "score": self.score,
            "target": self.target,
            "held": self.holds,
            "out_of_time": self.out_of_time,
            "ranking": list(self.ranking),
            "steps": [{**step._asdict(), "sites": list(step.sites)} for step in self.steps],
        }
        return self.best._replace(qapply=self.best.qapply.with_summary({"control": summary}))

    def _score(self, built: Built) -> float:
        with self._progress.stage("scoring"):
            # Prepared, so that packing does not count in each call of the metric.
            qparams = built.qapply.prepare(built.qparams)
            return score(self.goal.metric, functools.partial(built.qapply, qparams))


def _rank(
    source: FloatModel,
    observations: Observations,
    search: _Search,
    progress: Progress,
) -> tuple[list[str], list[str]]:
    """The sites, most sensitive first, and the suspects: the first ones, whose float type does."""
    built = search.full
    plan, examples = built.binding.whole_plan, observations.examples
    switch = Switch(
        source, built.qparams, plan, examples, single_layers=True, padding=observations.padding
    )
    # The search names sites, the switch knows their layers.
    search.switchable = switch.switchable
    scores = Scores(switch, search.goal.metric)
    budget = search.goal.time_budget
    # A ranking is only the start: it may take a part of the budget.
    deadline = None if budget is None else search.started + _RANKING_SHARE * budget
    found = measure(scores, switch.names, search.float_score, progress=progress, deadline=deadline)
    rows = built.qapply.report().rows
    known = {each["name"]: each["sqnr_db"] for row in rows for each in (row["by_layer"] or ())}
    known |= {row["name"]: row["sqnr_db"] for row in rows}
    quality = {name: known[name] for name in switch.names if known.get(name) is not None}
    ranking = found.ranking(quality)
    search.ranking = ranking
    if not found.complete:
        # Time ran out, so that the order is by what was measured and by SQNR: one suspect is a
        # guess, more would be many.
        return ranking, ranking[:1]
    # How many of the first sites have to be float for the metric to hold, by trying.
    for count in _counts(len(ranking)):
        suspects = ranking[:count]
        # All others int8: the suspects are those that suffice, not those that each cost something.
        if scores([name for name in switch.names if name not in suspects]) >= search.target:
            return ranking, suspects
    # None suffices: whatever costs anything is tried.
    return ranking, [name for name in ranking if found.effect(name) > 0] or ranking[:1]


def _try_thresholds(search: _Search, suspects: Sequence[str]) -> None:
    tried = {search.thresholds(search.full.binding, suspects)}
    for algo in search.goal.algos:
        # One algo in place of another, not on top of it: only what else is set stays.
        before = tuple(rule for rule in search.rules if rule.algo is None)
        rules = (*before, *(Rule(f"site:{name}", algo=algo) for name in suspects))
        thresholds = search.thresholds(search.plan_of(rules), suspects)
        # Another algo may choose the same thresholds: nothing to score then.
        if thresholds in tried:
            continue
        if not search.may_go_on():
            return
        tried.add(thresholds)
        search.consider("thresholds", f"algo={algo!r} at {_names(suspects)}", rules)


def _try_recovery(search: _Search, suspects: Sequence[str]) -> None:
    for step in search.goal.recovery:
        there = by_layer(search.best.binding)
        # Steps are of a site, so that its first layer tells of all.
        plans = {name: there[search.switchable[name].layer_names[0]].site for name in suspects}
        known = {
            name: site.recover
            for name, site in plans.items()
            if site.weight_path and not site.computes_weight
        }
        # A step that is there has done what it can.
        lacking = [name for name, steps in known.items() if step not in steps]
        if not lacking or not search.may_go_on() or not _is_installed(step):
            continue
        more = [Rule(f"site:{name}", recover=(*known[name], step)) for name in lacking]
        search.consider("recovery", f"{step} at {_names(lacking)}", (*search.rules, *more))


def _try_float(search: _Search, ranking: Sequence[str], suspects: Sequence[str]) -> None:
    repaired, failed = search.rules, 0

    def rules(count: int) -> Rules:
        floats = ranking[:count]
        before = () if set(suspects) <= set(floats) else repaired  # no repair of what is float
        left = (Rule(f"site:{n}", dtype="float", reason=FOR_THE_METRIC) for n in floats)
        return (*before, *left)

    for count in _counts(len(ranking) - 1):  # a model without an int8 site is none
        if not search.may_go_on():
            return
        step = search.consider("float", _names(ranking[:count]), rules(count))
        if search.reaches(step.score):
            break
        failed = count
    # The counts that were tried grow apart: between the last that failed and the one that holds the
    # fewest are searched by halves.
    holding = sum(rule.dtype == "float" for rule in search.rules)
    while search.holds and holding - failed > 1 and search.spent() < search.limit:
        count = (failed + holding) // 2
        # Fewer float sites are worth a lower score, as long as it holds the goal too.
        step = search.consider("float", _names(ranking[:count]), rules(count), search.reaches)
        if step.kept:
            holding = count
        else:
            failed = count


def _counts(total: int) -> list[int]:
    """How many sites are left in float, one trial after the other: one by one, and then faster.

    Example:
      >>> _counts(0), _counts(1), _counts(10)
      ([], [1], [1, 2, 3, 4, 6, 9, 10])
    """
    counts: list[int] = []
    count = 1
    while count < total:
        counts.append(count)
        count = count + 1 if count < _ONE_BY_ONE else count + count // 2
    return [*counts, total] if total > 0 else []


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _is_installed(step: str) -> bool:
    try:
        check_steps([step])
    except ImportError:
        return False
    return True
