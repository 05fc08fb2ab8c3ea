"""Learned rounding of a whole model: one pass of the int8 program that learns at each site.

The samples go through the program equation by equation; where they reach a site, its rounding is
learned on what arrived, and they go on with what it gives then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.calibration.padding import real_in
from jaxquant.graph.model import FloatModel
from jaxquant.plan.bind import bind
from jaxquant.plan.plan import Plan
from jaxquant.recover import adaround
from jaxquant.recover.learner import Learner
from jaxquant.recover.roundings import Roundings, make_source
from jaxquant.recover.step import Draft, Step, Task
from jaxquant.run.program import Program


def learn_roundings(task: Task, draft: Draft) -> Draft:
    """Learn the rounding of every weight that an int8 site with this step has for itself.

    Inside a scan over stacked weights each layer learns its own, in turn.  In another loop and in a
    choice, whose steps share a weight, a site learns from all steps, on what the float model gives
    it there: it comes before itself.

    At sites that have "bias_correction" too, the mean error of every channel is taken away on the
    way.  Where the samples cannot be joined the first batch alone is learned from.  `task.file`
    keeps the sites that are done; a later call with the same model, parameters and samples goes on
    from there.

    Args:
      task: the float model and the samples.
      draft: the int8 model, with nearest rounding and no corrected biases.

    Raises:
      ImportError: optax is not installed.
      FileError: the file is damaged, or of another model, other parameters or other samples.
    """
    adaround.check_optax()
    source, plan, examples = task.source, draft.program.whole_plan, task.alike
    with task.progress.stage("tracing"):
        inputs, program = _joined(source, plan, examples)

    # Made when a file is read or written: hashing the parameters takes a while.
    roundings = Roundings(task.file, lambda: make_source(program.graph, source.params, examples))
    real = real_in(task.padding, program.model, inputs)
    learner = Learner(program, source.params, draft.qparams, draft.divisors, real)
    with task.progress.stage("adaround", len(learner.outcomes), "site") as stage:
        learned = learner.learn(jax.tree.leaves(inputs), roundings, stage)
    qparams = _without_new(learned, draft.qparams["sites"])
    return draft.replaced("adaround", _summary(learner.outcomes), qparams=qparams)


STEP = Step(names=("adaround",), run=learn_roundings, check=adaround.check_optax, keeps_file=True)


def _summary(outcomes: Mapping[str, str]) -> str:
    """How many sites were learned, and why the others were not."""
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


def _joined(
    source: FloatModel, plan: Plan, examples: Sequence[tuple[Any, ...]]
) -> tuple[Any, Program]:
    """All examples as one batch, and the program for it."""

    def program(inputs: Any) -> Program:
        return Program(bind(source.trace(inputs), plan), source.params, by_site=True)

    # Batches that differ along other axes than the first cannot be joined.
    lengths = {np.shape(x)[:1] for inputs in examples for x in jax.tree.leaves(inputs)}
    if len(examples) > 1 and len(lengths) == 1 and lengths != {()}:
        inputs = jax.tree.map(lambda *xs: np.concatenate(xs), *examples)
        try:
            # Its shape may be written in the model: then the first batch has to do.
            return inputs, program(inputs)
        except Exception:  # whatever a model says that takes this batch size alone
            pass
    return examples[0], program(examples[0])


def _without_new(qparams: Any, before: Mapping[str, Mapping[str, Any]]) -> Any:
    """The arrays without biases that were not there before and are zero; on the device."""
    sites = {
        # A bias of zeros that nobody had would make another program of the model.
        name: {k: x for k, x in arrays.items() if k in before[name] or x.any()}
        for name, arrays in qparams["sites"].items()
    }
    return jax.device_put({**qparams, "sites": sites})
