"""Bias correction: take away the mean error that quantization leaves in each output channel.

M. Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, 2019,
section 4.2; here the error is measured on calibration data, sites in order, each behind the
corrected ones before it.  Inside a scan over stacked weights each layer has its own, behind the
corrected layers before it; in another loop one is for all steps.  The paper's error is that of the
pre-activations.  Where an activation flattens them (most of what a ReLU sees is negative) their
mean says little of what goes on, so the mean is weighted by the activation's slope; see
`jaxquant.recover.shift.Shift`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.plan.plan import Plan
from jaxquant.recover.shift import Shift
from jaxquant.recover.step import Draft, Step, Task
from jaxquant.weights.epilogue import whole_steps


def correct_biases(task: Task, draft: Draft) -> Draft:
    """Correct the biases of the int8 sites that have this step and a weight.

    The samples weigh by the sizes of their batches.
    """
    comparison, qparams = task.comparison(draft.program), draft.qparams
    sites = dict(qparams["sites"])
    for name in comparison.corrected:  # so that one compiled comparison serves the result too
        sites[name] = {"bias": np.zeros_like(sites[name]["multiplier"]), **sites[name]}
    start = {**qparams, "sites": jax.device_put(sites)}
    with task.progress.stage("bias correction", len(task.examples), "batch") as stage:
        # One batch after the other, so that one of them at a time is on the device.
        batches = stage.each(task.examples)
        shifts = (task.comparison(draft.program, x)(start, x, correct=True).shifts for x in batches)
        qparams = with_shifts(draft.program.whole_plan, start, shifts)
    note = f"{len(comparison.corrected)} sites"
    return draft.replaced("bias_correction", note, qparams=qparams, uncorrected=start)


STEP = Step(names=("bias_correction",), run=correct_biases)


def with_shifts(plan: Plan, qparams: Any, batches: Iterable[Mapping[str, Shift]]) -> Any:
    """`qparams` with the mean of each site's shift, over all batches, added to its bias.

    A site that scales its input in the call has no steps that a bias could be a whole number of.
    """
    total: dict[str, np.ndarray] = {}
    for shifts in batches:  # in NumPy: nothing to compile
        for name, shift in jax.device_get(dict(shifts)).items():
            total[name] = total.get(name, 0.0) + shift.sums()
    if not total:
        return qparams
    sites, dynamic = dict(qparams["sites"]), {site.name for site in plan.sites if site.dynamic}
    for name, sums in total.items():
        arrays = sites[name]
        # Over all batches, so that each weighs by its samples.
        mean = Shift(*sums).mean().reshape(arrays["bias"].shape)

        # In float64: sums of many batches, of which the last bits tell a small mean.
        bias = np.asarray(arrays["bias"], np.float64) + mean
        if name in dynamic:
            bias = bias.astype(np.float32)
        else:
            bias = whole_steps(bias, np.asarray(arrays["multiplier"]))
        sites[name] = {**arrays, "bias": jax.device_put(bias)}
    return {**qparams, "sites": sites}
