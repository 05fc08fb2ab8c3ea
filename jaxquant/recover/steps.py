"""The recovery steps that were asked for, in their order, and what the report says of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxquant.calibration.padding import Padding
from jaxquant.graph.model import FloatModel
from jaxquant.plan.binding import Binding
from jaxquant.plan.modes import MODES
from jaxquant.plan.rules import RECOVERY_STEPS
from jaxquant.progress import Progress
from jaxquant.recover.compare import Comparison
from jaxquant.recover.step import Data, Draft, Step, Task
from jaxquant.run.program import Program, program_by_site
from jaxquant.weights.quantize import quantize_params

# The steps of the table of names, each once, in its order.
STEPS: tuple[Step, ...] = tuple(
    importlib.import_module(f"jaxquant.recover.{module}").STEP
    for module in dict.fromkeys(RECOVERY_STEPS.values())
)


class Recovered(NamedTuple):
    """The int8 model after all steps.

    Attributes:
      qparams, program: of that model.
      uncorrected: its arrays before bias correction; None without that step.
      comparison: of it with the float model.
      notes: a line of what each step did.
      by_site: what became of the weights of single sites.
    """

    qparams: Any
    uncorrected: Any
    program: Program
    comparison: Comparison
    notes: dict[str, str]
    by_site: Mapping[str, str]


def check_steps(names: Sequence[str]) -> None:
    """Raise ImportError where a step needs a package that is not installed."""
    for step in STEPS:
        if step.is_asked_for(names):
            step.check()


def with_files() -> tuple[str, ...]:
    """The names of the steps that keep in a file what they did."""
    return tuple(name for step in STEPS if step.keeps_file for name in step.names)


def quantize_and_recover(
    source: FloatModel,
    binding: Binding,
    examples: Sequence[tuple[Any, ...]],
    *,
    file: str | os.PathLike[str] | None = None,
    data: Data | None = None,
    padding: Padding | None = None,
    progress: Progress,
) -> Recovered:
    """Quantize the parameters and repair the int8 model by the steps that its sites have.

    The order is that of the table of steps, whatever the order in the plan.

    Args:
      source: the float model.
      binding: what becomes int8 of it.
      examples: batches of calibration samples.
      file: where a step may keep what took long; None for nowhere.
      data: all calibration batches; None where the examples are all.
      padding: which positions of them are not looked at; None for none.
      progress: shows the steps.
    """
    task = Task(source, examples, file, progress, data, padding)
    with progress.stage("quantizing weights"):
        # Rounded to nearest first: each step repairs what is there.
        qparams = quantize_params(binding, source.params)
    # By site: the steps change single sites, so calls are not fused into sequences yet.
    draft = Draft(program_by_site(binding, source.params), qparams)
    has_tensors = MODES[binding.plan.mode].tensor_scales
    for step in STEPS:
        if (step.is_automatic and has_tensors) or step.is_asked_for(binding.whole_plan.recover):
            draft = step.run(task, draft)
    return Recovered(
        qparams=draft.qparams,
        uncorrected=draft.uncorrected,
        program=draft.program,
        comparison=task.comparison(draft.program),
        notes={**draft.notes},
        by_site=draft.by_site,
    )
