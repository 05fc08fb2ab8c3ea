"""Bias correction taken out of an int8 model, and done anew for a mixture of both models.

A corrected bias takes away the mean error that has gathered up to its site, so a site that follows
a bad one looks bad by itself: its bias expects what the bad one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import evaluate
from jaxquant.plan import layout
from jaxquant.plan.bind import Int8Site
from jaxquant.plan.plan import Plan
from jaxquant.recover.activation import find_activation
from jaxquant.recover.shift import Shift, compare_outputs
from jaxquant.run.program import Program
from jaxquant.tune.parts import Part
from jaxquant.weights.fold import fold
from jaxquant.weights.quantize import accumulator_terms, epilogue_arrays, whole_steps


def is_corrected(plan: Plan) -> bool:
    """True where some of the plan's biases are corrected."""
    return "bias_correction" in plan.recover


def without_correction(program: Program, params: Any, qparams: Mapping[str, Any]) -> dict[str, Any]:
    """`qparams` with the biases that follow from the parameters and the stored weights."""
    if not is_corrected(program.plan):
        return dict(qparams)
    steps = [step for s in program.binding.sites for step in s.epilogue.steps]
    wanted = [step.operand for step in steps if isinstance(step.operand, int)]
    operands = fold(program.graph, params, [], wanted)[1]
    sites, corrected = dict(qparams["sites"]), program.plan.recovered_by("bias_correction")
    for int8_site in program.binding.sites:
        name = int8_site.site.name
        if name not in program.slots or name not in corrected:
            continue
        scale, offset = _weight_terms(program, int8_site, qparams)
        arrays = epilogue_arrays(program.graph, int8_site, operands, scale, offset)
        bias = arrays.get("bias", np.zeros_like(arrays["multiplier"]))
        stored = qparams["sites"][name]
        whole = whole_steps(bias, np.asarray(stored["multiplier"]))
        sites[name] = {**stored, "bias": jnp.asarray(whole)}
    return {**qparams, "sites": sites}


def _weight_terms(
    program: Program, int8_site: Int8Site, qparams: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """What one unit of a site's accumulator is worth, and what its input's zero point adds."""
    site, binding = int8_site.site, program.binding
    scales = {tensor.name: tensor.scale for tensor in program.plan.tensors}
    slot = program.slots[site.name]
    weight, scale = jax.device_get(
        [layout.get(qparams["params"], path) for path in (slot.int8, slot.scale)]
    )
    known = [scales[binding.scales[v]] for v in site.operands if v in binding.scales]
    unit = np.asarray(scale, np.float64) * np.prod(known)
    zero_point = binding.zero_points.get(site.operands[0], 0)
    return accumulator_terms(weight, site.channel_axes, unit, zero_point)


def has_bias(program: Program, part: Part) -> bool:
    """True for a part whose bias is corrected."""
    corrected = program.plan.recovered_by("bias_correction")
    return part.site is not None and part.name in program.slots and part.name in corrected


def shift_at(
    part: Part, reference: evaluate.Environment, value: jax.Array
) -> tuple[Shift, jax.Array]:
    """How far a part's channels are off, and the value with their mean error taken away."""
    assert part.site is not None
    epilogue = part.site.epilogue
    activation = find_activation(reference.graph, epilogue.output)
    compared = compare_outputs(epilogue, activation, reference, value)
    corrected = value + epilogue.channels.spread(compared.mean, value.ndim)
    return Shift.of(compared.shift, compared.powers[2]), corrected
