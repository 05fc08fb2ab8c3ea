"""What the public functions are made of: read, calibrate or load, quantize."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxquant.analysis.larger import warn_if_larger
from jaxquant.analysis.poor import warn_if_poor
from jaxquant.backends import operations
from jaxquant.calibration import counting, histogram
from jaxquant.calibration.data import iterate, num_batches
from jaxquant.calibration.fingerprint import params_digests
from jaxquant.calibration.observations import Observations
from jaxquant.calibration.padding import Padding
from jaxquant.calibration.processes import check_alike
from jaxquant.calibration.resume import check_observed, is_complete, load_checked, sweep_with_file
from jaxquant.calibration.sweep import Sweep, run_sweep
from jaxquant.graph.batch_sizes import trace_with_batch_sizes
from jaxquant.graph.checks import check_model, check_weights
from jaxquant.graph.model import FloatModel, Model
from jaxquant.plan.binding import Binding
from jaxquant.plan.checks import check_path
from jaxquant.plan.config import QuantConfig, rule_data
from jaxquant.plan.float_tables import float_tables
from jaxquant.plan.make import make_plan
from jaxquant.plan.observed import observed_tensors
from jaxquant.plan.segments import cut_scans
from jaxquant.progress import Progress
from jaxquant.recover.steps import quantize_and_recover, with_files
from jaxquant.report.make import make_report
from jaxquant.report.sqnr import measure_quality
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.inputs import ranges_of
from jaxquant.run.qapply import QuantizedApply
from jaxquant.run.source import Code
from jaxquant.tune.control import Built, Rules, control
from jaxquant.tune.goal import Goal
from jaxquant.tune.outliers import rules_for_outliers
from jaxquant.tune.speed import slower_in_int8


def float_model(params: Any, apply_fn: Any) -> FloatModel:
    """The model that a user gave, checked; it is traced once for each input shape."""
    check_model(params, apply_fn)
    return FloatModel(apply_fn, params)


class Batches(NamedTuple):
    """The batches of a data set, and how many there are, as far as it tells."""

    items: Iterator[tuple[Any, ...]]
    total: int | None


def read(ds: Any, batch_size: int | None, batch_nums: int | None, select: Any) -> Batches:
    """The batches of a data set, of which none is read yet."""
    return Batches(
        iterate(ds, batch_size=batch_size, batch_nums=batch_nums, select=select),
        num_batches(ds, batch_size, batch_nums, select=select),
    )


def check_files(config: QuantConfig, calibration_file: Any, recovery_file: Any) -> None:
    """Raise where the path of a file is no path, or nothing would be kept in it."""
    check_path("calibration_file", calibration_file)
    check_path("recovery_file", recovery_file)
    if recovery_file is not None and not set(with_files()).intersection(config.all_steps):
        steps = " or ".join(map(repr, with_files()))
        raise ValueError(
            f"recovery_file keeps what the step {steps} learned, and recover="
            f"{config.all_steps!r} has no such step; leave recovery_file out, or add the step"
        )


def options_of(
    config: QuantConfig,
    batch_size: int | None = None,
    batch_nums: int | None = None,
    select: Any = None,
    padding: Padding | None = None,
) -> dict[str, Any]:
    """What a calibration file tells of the arguments; values as JSON gives them back."""
    return {
        "algo": config.algo_name,
        "quantizable_op_type": list(config.quantizable_op_type),
        "is_full_quantize": config.is_full_quantize,
        "skip": list(config.skip),
        "skip_first_last": config.skip_first_last,
        "batch_size": None if batch_size is None else int(batch_size),
        "batch_nums": None if batch_nums is None else int(batch_nums),
        # A function has no text that would be the same tomorrow.
        "select": "a function" if callable(select) else repr(select),
        "mask": None if padding is None else padding.option,
    }


def calibrate(
    source: FloatModel,
    batches: Batches,
    config: QuantConfig,
    options: dict[str, Any],
    calibration_file: str | os.PathLike[str] | None,
    progress: Progress,
    allow_batch_dependence: bool = False,
    padding: Padding | None = None,
) -> Observations:
    """Observe the float model on the batches, or go on from a calibration file."""
    # The first call builds or loads them, which takes seconds once in a process.
    if not operations.are_loaded():
        with progress.stage("loading the kernels"):
            operations.load()
    sweep = _sweep(source, config, options, allow_batch_dependence, progress, padding)
    # Each process would go on with other numbers than the rest, and wait for them for ever.
    if jax.process_count() > 1:
        check_alike(params_digests(source.params), is_complete(calibration_file))
    with progress.stage("calibrating", batches.total, "batch") as stage:
        counted = stage.each(batches.items)
        if calibration_file is None:
            return run_sweep(sweep, counted)
        found = sweep_with_file(calibration_file, sweep, counted, config.own_observer)
        return dataclasses.replace(found, padding=padding)  # a file holds no function


def load(
    path: str | os.PathLike[str],
    source: FloatModel,
    config: QuantConfig,
    progress: Progress,
) -> Observations:
    """What a complete calibration file holds, which must be of this model."""

    # Batch dependence was looked at when they were observed.
    sweep = _sweep(source, config, options_of(config), True, progress)
    with progress.stage("reading the observations"):
        return load_checked(path, sweep, config.own_observer)


def check_given(
    observations: Observations,
    source: FloatModel,
    config: QuantConfig,
    progress: Progress,
) -> None:
    """Raise ValueError where observations in memory are of another model or other parameters."""
    sweep = _sweep(source, config, options_of(config), True, progress)
    with progress.stage("checking the observations"):
        check_observed(observations, sweep)


def quantize(
    source: FloatModel,
    observations: Observations,
    config: QuantConfig,
    file: str | os.PathLike[str] | None,
    progress: Progress,
    goal: Goal | None = None,
) -> tuple[dict[str, Any], QuantizedApply]:
    """Plan, quantize and report; with a goal, until it holds or nothing is left to try."""
    traced, start, found = _start(source, observations, config, progress)
    if goal is None:
        built = _build(start, file, progress)
    else:
        built, rules = _controlled(traced, start, file, progress, goal)
        found = (*found, *rules)
    qparams, qapply = built.qparams, built.qapply
    if found:
        qapply = qapply.with_summary({"rules": [rule_data(rule) for rule in found]})

    # Of the model that is returned, when nothing changes it any more.
    warn_if_poor(built.source, qapply.plan, qapply.report(), observations.examples[0])
    warn_if_larger(built.source.params, qparams)
    return qparams, qapply


def _start(
    source: FloatModel, observations: Observations, config: QuantConfig, progress: Progress
) -> tuple[_Traced, _Cut, Rules]:
    """The model, its plan by the user's rules and by those that it asks for itself; the latter."""
    with progress.stage("tracing"):
        first, *others = observations.examples
        model = trace_with_batch_sizes(source, first, others)
        check_weights(model.graph, model.sites, source.params)
        # What a table of floats asks for follows from the model alone, and is not told as found.
        config = config.with_rules(float_tables(model, source.params))
        traced = _Traced(source, model, observations, config)
        start = traced.cut(())
    found: Rules = ()
    if config.optimize_for == "speed":
        found = slower_in_int8(start.model, start.observations, start.config, progress)
        start = traced.cut(found)
    with progress.stage("searching thresholds"):
        start = start.planned()
    # Their rules change scans and thresholds, so both are found anew; most models have none.
    if outliers := rules_for_outliers(
        start.source, start.observations, start.binding, start.config, progress
    ):
        found = (*found, *outliers)
        with progress.stage("searching thresholds"):
            start = traced.cut(found).planned()
    return traced.with_rules(found), start, found


def _controlled(
    traced: _Traced,
    start: _Cut,
    file: str | os.PathLike[str] | None,
    progress: Progress,
    goal: Goal,
) -> tuple[Built, Rules]:
    """The model by the rules with which the goal holds, as far as any do; and these rules."""

    # What accuracy control asks: a plan by some rules, which is cheap, and a whole model by them.
    def plan_of(rules: Rules) -> Binding:
        return traced.cut(rules).binding if rules else start.binding

    def build(rules: Rules) -> Built:
        own = start
        if rules:
            with progress.stage("searching thresholds"):
                own = traced.cut(rules).planned()
        return _build(own, file, progress)

    return control(start.source, traced.observations, plan_of, build, goal, progress)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A model as the user has it, with what was observed of it and what is asked for."""

    source: FloatModel
    model: Model
    observations: Observations
    config: QuantConfig

    def with_rules(self, rules: Rules) -> _Traced:
        """The same with more rules."""
        return dataclasses.replace(self, config=self.config.with_rules(rules))

    def cut(self, more: Rules) -> _Cut:
        """The model with its scans cut as its rules, and some more, ask for."""
        asked = self.config.with_rules(more)
        first, *others = self.observations.examples
        found = cut_scans(self.source, self.model, asked, first, others)

        # Observations are by names of sites, and a cut scan has new ones.
        if found is None:
            return _Cut(self.source, self.model, asked, self.observations)
        observations = found.renamed(self.observations)
        return _Cut(found.source, found.model, found.resolved(asked), observations)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A model with its scans cut as rules ask for, and what was observed by the names there."""

    source: FloatModel
    model: Model
    config: QuantConfig
    observations: Observations

    # Planned when it is asked for: what is cut again for more rules is never planned.
    @functools.cached_property
    def binding(self) -> Binding:
        """What becomes int8."""
        return make_plan(self.model, self.observations, self.config)

    def planned(self) -> _Cut:
        """Itself, once it is known what becomes int8."""
        _ = self.binding
        return self


def _build(cut: _Cut, file: str | os.PathLike[str] | None, progress: Progress) -> Built:
    source, binding, examples = cut.source, cut.binding, cut.observations.examples
    padding = cut.observations.padding
    recovered = quantize_and_recover(
        source, binding, examples, file=file, padding=padding, progress=progress
    )
    program, qparams = recovered.program, recovered.qparams

    # On the first batch: the report is to be a matter of seconds.
    with progress.stage("comparing"):
        quality = measure_quality(recovered.comparison, qparams, examples[0], recovered.uncorrected)
        report = make_report(program, source.params, qparams, quality, recovered.notes)
        ranges = ranges_of(examples)
        code = Code(source.apply_fn, source.given, source.cuts)
        qapply = QuantizedApply(code, program.whole_plan, report, examples[0], ranges=ranges)
    return Built(qparams, qapply, binding, source)


def _sweep(
    source: FloatModel,
    config: QuantConfig,
    options: dict[str, Any],
    allow_batch_dependence: bool,
    progress: Progress,
    padding: Padding | None = None,
) -> Sweep:
    tensors_of = functools.partial(observed_tensors, config=config)
    count = operations.counter(counting.portable_counts, histogram.MIN_EXPONENT)
    return Sweep(
        source,
        tensors_of,
        config.own_observer,
        options,
        count,
        fast_convolutions,
        allow_batch_dependence=allow_batch_dependence,
        padding=padding,
        progress=progress,
    )
