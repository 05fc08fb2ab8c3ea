"""`jaxquant.analyze`: which sites cost the int8 model its accuracy, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxquant.analysis.advice import cause, matters
from jaxquant.analysis.analysis import Analysis, TensorAnalysis
from jaxquant.analysis.measures import Clipping
from jaxquant.analysis.survey import Surveyed, survey
from jaxquant.analysis.weights import WeightRanges, weight_ranges
from jaxquant.calibration.data import iterate, num_batches
from jaxquant.calibration.examples import with_example
from jaxquant.calibration.padding import Mask, Padding
from jaxquant.calibration.selection import Select
from jaxquant.graph.checks import check_model
from jaxquant.graph.layer_names import of_layer
from jaxquant.graph.model import FloatModel
from jaxquant.keywords import named
from jaxquant.plan.bind import bind, layers_of
from jaxquant.plan.grid import levels
from jaxquant.plan.plan import Plan
from jaxquant.progress import Progress
from jaxquant.run.program import Program, program_by_site
from jaxquant.run.qapply import QuantizedApply
from jaxquant.tune import sensitivity
from jaxquant.tune.parts import Part, Parts, find_parts
from jaxquant.tune.scores import Metric, Scores, models_digest
from jaxquant.tune.sensitivity import Sensitivity
from jaxquant.tune.switch import Switch


@named
def analyze(
    params: Any,
    apply_fn: Callable[..., Any],
    qparams: Mapping[str, Any],
    qapply: Any,
    ds: Any,
    metric: Metric | None = None,
    *,
    batch_size: int | None = None,
    batch_nums: int | None = None,
    select: Select = None,
    mask: Mask = None,
    file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Analysis:
    """Find the sites that cost an int8 model its accuracy, and why.

    Both models run side by side over `ds`, all sites measured in one compiled step: the error of
    each site alone (its inputs those of the float model) and the error that has gathered up to it.
    With a metric every site is also run alone in int8, and alone in float, by one compiled program
    that takes the choice as an argument.  A site inside a scan over stacked weights is measured in
    each layer by itself, and alone in int8 or in float in all its layers at once.

    Of weights alone a site is seen in front of its bias: the mean error that the bias of a weight
    rounded on data takes away is in its own error here, and not in the report's.

    Args:
      params, apply_fn: the float model.
      qparams, qapply: the int8 model, as `jaxquant.quant_post` or another function returned it.
      ds, batch_size, batch_nums, select: the data, as for `jaxquant.quant_post`.
      mask: which positions of padded texts count, as for `jaxquant.quant_post`.
      metric: a function of a model that returns one number, higher for a better model.  The model
        is called as `model(*inputs)`, with what `apply_fn` takes after `params`; it is compiled
        already, so do not `jit` it again.  Called about twice for every site.
      file: where the metric's scores are kept (JSON), so that a call with the same models and the
        same metric goes on after an interruption; None for nowhere.
      progress: show what is being done, as `jaxquant.quant_post`.

    Returns:
      An `Analysis`: prints as a table, the worst sites first; `jaxquant.report_html` makes a page
      of it.

    Raises:
      ValueError: `ds` is empty or does not fit the model, holds NaN or infinity, or `qparams` and
        `qapply` do not belong to this model; the metric is not finite.
      TypeError: the metric does not return a number.
      jaxquant.FileError: `file` is damaged, or of other models or another metric.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant
      >>> params = {"a": jax.random.normal(jax.random.key(0), (8, 16)), "b": jnp.eye(16)[:, :4]}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> x = jax.random.normal(jax.random.key(1), (64, 8))
      >>> qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], progress=False)
      >>> labels = apply_fn(params, x).argmax(-1)
      >>> analysis = jaxquant.analyze(
      ...     params, apply_fn, qparams, qapply, [x], progress=False,
      ...     metric=lambda model: (model(x).argmax(-1) == labels).mean())
      >>> sorted(analysis.ranking), analysis.summary["float_score"]
      (['a', 'b'], 1.0)
      >>> analysis.rows[0]["own_db"] > 30
      True
    """
    check_model(params, apply_fn)
    if not isinstance(qapply, QuantizedApply):
        swapped = ": qparams and qapply are swapped" if isinstance(qparams, QuantizedApply) else ""
        raise TypeError(
            "analyze takes (params, apply_fn, qparams, qapply, ds), with qparams and qapply as "
            f"jaxquant.quant_post returned them; got a {type(qapply).__name__} as qapply{swapped}"
        )
    with Progress("analyze", progress) as shown:
        # Before the data are read, which may take minutes.
        qapply.check(qparams)
        batches = iterate(ds, batch_size=batch_size, batch_nums=batch_nums, select=select)
        total = num_batches(ds, batch_size, batch_nums, select=select)
        source = FloatModel(apply_fn, params, qapply.plan.cut_at)
        padding = Padding.of(mask)
        return _analyze(source, qparams, qapply.plan, batches, total, padding, metric, file, shown)


def _analyze(
    source: FloatModel,
    qparams: Mapping[str, Any],
    plan: Plan,
    batches: Iterator[tuple[Any, ...]],
    total: int | None,
    padding: Padding | None,
    metric: Metric | None,
    file: str | os.PathLike[str] | None,
    progress: Progress,
) -> Analysis:
    params = source.params
    examples: list[tuple[Any, ...]] = []
    with progress.stage("comparing", total, "batch") as stage:
        kept = _remember(stage.each(batches), examples)
        surveyed = survey(source, qparams, plan, kept, padding, progress)
    with progress.stage("measuring weights"):
        program = program_by_site(bind(source.trace(examples[0]), plan), params)
        weights = weight_ranges(program, params, qparams)
    tensors = {name: _tensor(plan, name, surveyed) for name in surveyed.tensors}
    # Own errors rank the sites where no metric does; with one, what each costs it goes first.
    rows = _rows(find_parts(program), surveyed, weights, tensors)
    quality = {row["name"]: row["own_db"] for row in rows}
    summary: dict[str, Any] = {
        "sites": len(rows),
        "batches": surveyed.batches,
        "output_sqnr_db": surveyed.outputs.sqnr_db if surveyed.outputs else None,
        "output_db": surveyed.outputs.sample_db if surveyed.outputs else None,
    }
    ranking = sorted(quality, key=lambda name: quality[name])
    if metric is not None:
        switch = Switch(source, qparams, plan, examples, padding=padding)
        # Hashing all parameters takes a moment that only a file is worth.
        digest = models_digest(params, qparams, plan) if file is not None else ""
        scores = Scores(switch, metric, file, digest)
        found = sensitivity.measure(scores, switch.names, progress=progress)
        ranking = found.ranking(quality)
        _add_scores(rows, found)
        summary |= _scored(found, sensitivity.curve(scores, switch.names, ranking, progress))
    drop = summary["float_score"] - summary["int8_score"] if metric is not None else None
    for row in rows:
        row["rank"] = ranking.index(row["name"]) + 1  # of the site, with all its layers
        row["cause"] = cause(row) if matters(row, drop) else ""
    return Analysis(rows, tensors, {n: w.outputs for n, w in weights.items()}, summary)


def _remember(
    batches: Iterable[tuple[Any, ...]], examples: list[tuple[Any, ...]]
) -> Iterator[tuple[Any, ...]]:
    """The batches, the first of them kept as a calibration keeps them."""
    kept: tuple[tuple[Any, ...], ...] = ()
    for inputs in batches:
        kept = with_example(kept, inputs)
        examples[:] = kept
        yield inputs


def _tensor(plan: Plan, name: str, surveyed: Surveyed) -> TensorAnalysis:
    tensor = next(t for t in plan.tensors if t.name == name)
    seen, stats = surveyed.tensors[name], surveyed.stats[name]
    return TensorAnalysis(
        stats=stats,
        threshold=tensor.threshold,
        levels=levels(stats.min, stats.max, not tensor.symmetric),
        low=seen.low,
        high=seen.high,
        clipped=float(seen.clipped) / max(float(seen.count), 1.0),
    )


def _rows(
    parts: Parts,
    surveyed: Surveyed,
    weights: Mapping[str, WeightRanges],
    tensors: Mapping[str, TensorAnalysis],
) -> list[dict[str, Any]]:
    """One row a site, in network order; of several layers that of the worst one."""
    layers: dict[str, list[dict[str, Any]]] = {}
    found: dict[str, None] = {}

    # A site that no step came to was not measured, and has no row.
    for place, (program, part, layer) in enumerate(_along(parts, ())):
        if of_layer(part.name, layer) not in surveyed.own:
            continue
        row = _row(program, part, layer, surveyed, weights, tensors)
        found[part.name] = None
        layers.setdefault(part.name, []).append({**row, "place": place})
    rows = []
    # A reader changes sites, not layers: the worst layer speaks for all, the others are kept.
    for name in found:
        worst = min(layers[name], key=lambda row: row["own_db"])
        several = len(layers[name]) > 1 or worst["name"] != name
        more = {"worst_layer": worst["name"], "by_layer": layers[name]}
        rows.append({**worst, "name": name, **(more if several else dict.fromkeys(more))})
    return rows


def _along(parts: Parts, layer: tuple[int, ...]) -> Iterator[tuple[Program, Part, tuple[int, ...]]]:
    """The sites in the order in which they run, those inside scans again for each layer."""
    ends: dict[int, Part | tuple[Parts, ...]] = {
        # By the last equation, so that a site and a loop stand in the order of a run.
        **{p.end.index: p for p in parts.own},
        **parts.bodies,
    }
    for index in sorted(ends):
        end = ends[index]
        if isinstance(end, Part):
            if end.name:
                yield parts.program, end, layer
            continue
        # A scan with reverse=True runs its last layer first.
        backwards = parts.program.graph.equations[index].params.get("reverse", False)
        for body in end:
            numbers = layers_of(body.program.model, layer)
            for inner in reversed(numbers) if backwards else numbers:
                yield from _along(body, inner)


def _row(
    program: Program,
    part: Part,
    layer: tuple[int, ...],
    surveyed: Surveyed,
    weights: Mapping[str, WeightRanges],
    tensors: Mapping[str, TensorAnalysis],
) -> dict[str, Any]:
    """What is known of a site in one layer."""
    name = of_layer(part.name, layer)
    own, accumulated = surveyed.own[name], surveyed.accumulated.get(name)
    ends, weight = surveyed.ends.get(name), weights.get(name)
    row: dict[str, Any] = {
        "name": name,
        "kind": part.kind,
        "own_sqnr_db": own.sqnr_db,
        "own_db": own.sample_db,
        "own_cosine": own.cosine,
        "accumulated_sqnr_db": accumulated.sqnr_db if accumulated else None,
        "accumulated_db": accumulated.sample_db if accumulated else None,
        "accumulated_cosine": accumulated.cosine if accumulated else None,
        "weight_db": min(weight.sqnr_db, weight.channel_db) if weight else None,
        "channels": len(ends.low) if ends else None,
        "dead_channels": ends.dead if ends else None,
        "lost_channels": ends.lost if ends else None,
    }
    # What a dynamic site reads has no grid to clip it.
    scales = program.binding.scales
    names = [of_layer(scales[v], layer) for v in part.operands if v in scales]
    return row | _input_row(dict.fromkeys(names), surveyed.tensors, tensors)


def _input_row(
    names: Mapping[str, None],
    seen: Mapping[str, Clipping],
    tensors: Mapping[str, TensorAnalysis],
) -> dict[str, Any]:
    """The input of a site that fits its grid least; None in a mode without grids."""

    # A mode without grids rounds weights alone, or finds its scales in the call.
    if not names:
        keys = ("input", "threshold", "clipped", "clipped_noise", "input_db", "low", "high")
        return dict.fromkeys((*keys, "low_spread", "high_spread"))
    # A product of two activations has two inputs: the one that costs more is shown.
    name = min(names, key=lambda n: seen[n].moments.sample_db)
    tensor, fit = tensors[name], seen[name]
    noise = float(fit.moments.noise)
    return {
        "input": name,
        "threshold": tensor.threshold,
        "clipped": tensor.clipped,
        "clipped_noise": float(fit.clipped_noise) / noise if noise > 0 else 0.0,
        "input_db": min(fit.moments.sample_db, fit.moments.sqnr_db),
        "low": float(np.min(tensor.low)),
        "high": float(np.max(tensor.high)),
        "low_spread": float(np.ptp(tensor.low)),
        "high_spread": float(np.ptp(tensor.high)),
    }


def _add_scores(rows: list[dict[str, Any]], found: Sensitivity) -> None:
    for row in rows:
        name = row["name"]
        row["alone_score"], row["float_score"] = found.alone[name], found.left_float[name]
        row["alone_drop"] = found.float_score - found.alone[name]
        row["float_gain"] = found.left_float[name] - found.int8_score
        row["effect"] = found.effect(name)


def _scored(found: Sensitivity, curve: list[tuple[int, float]]) -> dict[str, Any]:
    total = len(found.alone)
    return {
        "float_score": found.float_score,
        "int8_score": found.int8_score,
        "curve": [[n, 1 - n / max(total, 1), value] for n, value in curve],
    }
