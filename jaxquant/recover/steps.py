"""The recovery steps that were asked for, in their order, and what the report says of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxquant.graph.model import FloatModel
from jaxquant.plan.bind import Binding
from jaxquant.plan.evenness import readers_of_joined
from jaxquant.progress import Progress
from jaxquant.recover.adaround import check_optax
from jaxquant.recover.bias_correction import correct_biases
from jaxquant.recover.compare import Comparison
from jaxquant.recover.equalization import equalize, find_targets
from jaxquant.recover.rounding import learn_roundings
from jaxquant.run.program import Program, program_by_site
from jaxquant.weights.quantize import Equalization, quantize_params


class Recovered(NamedTuple):
    """The int8 model after all steps; `notes` has a line of what each did."""

    qparams: Any
    program: Program
    comparison: Comparison
    notes: dict[str, str]


def check_steps(steps: Sequence[str]) -> None:
    """Raise ImportError where a step needs a package that is not installed."""
    if "adaround" in steps:
        check_optax()


def quantize_and_recover(
    source: FloatModel,
    binding: Binding,
    examples: Sequence[tuple[Any, ...]],
    *,
    file: str | os.PathLike[str] | None = None,
    progress: Progress,
) -> Recovered:
    """Quantize the parameters and repair the int8 model by the steps that its sites have.

    The order is equalization, learned rounding, bias correction, whatever the order in the plan.

    Args:
      source: the float model.
      binding: what becomes int8 of it.
      examples: batches of calibration samples.
      file: where learned rounding keeps the sites that are done; None for nowhere.
      progress: shows the steps.
    """
    plan, params = binding.plan, source.params
    notes: dict[str, str] = {}
    equalization: Equalization = {}
    program = program_by_site(binding, params)
    with progress.stage("quantizing weights"):
        qparams = quantize_params(binding, params)
    where: dict[str, frozenset[str]] = {
        step: plan.recovered_by(step)
        for step in ("equalization", "smoothquant")
        if step in plan.recover
    }
    chosen, behind = list(where), ""
    # What a concatenation in float gives has parts that need scales of their own.
    joined = frozenset(readers_of_joined(binding)).difference(*where.values())
    if joined:
        behind = "" if chosen else " behind concatenations in float"
        chosen = chosen or ["equalization"]
        where["equalization"] = where.get("equalization", frozenset()) | joined
    if chosen:
        everywhere = frozenset(site.site.name for site in program.binding.sites)
        targets = len(find_targets(program, dict.fromkeys(where, everywhere)))
        with progress.stage(" and ".join(chosen)):
            plan, equalization = equalize(program, plan, params, qparams, examples, where)
            if equalization:  # other zero points and scales along channels
                binding = binding.with_tensors(plan.tensors)
                program = program_by_site(binding, params)
                qparams = quantize_params(binding, params, equalization)
        if equalization or not behind:
            notes[" and ".join(chosen)] = f"{len(equalization)} of {targets} tensors{behind}"
    if "adaround" in plan.recover:
        qparams, outcomes = learn_roundings(
            source,
            plan,
            qparams,
            examples,
            equalization=equalization,
            file=file,
            progress=progress,
        )
        notes["adaround"] = _summary(outcomes)
    comparison = Comparison(program, params)
    if "bias_correction" in plan.recover:
        with progress.stage("bias correction", len(examples), "batch") as stage:
            qparams = correct_biases(comparison, qparams, stage.each(examples))
        notes["bias_correction"] = f"{len(comparison.corrected)} sites"
    return Recovered(qparams, program, comparison, notes)


def _summary(outcomes: dict[str, str]) -> str:
    """How many sites were learned, and of the others why not."""
    learned = sum(outcome == "learned" for outcome in outcomes.values())
    text = f"{learned} of {len(outcomes)} sites"
    others: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        if outcome != "learned":
            others.setdefault(outcome, []).append(name)
    reasons = [f"{_names(names)}: {reason}" for reason, names in others.items()]
    return f"{text} ({'; '.join(reasons)})" if reasons else text


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} sites"
