"""Bias correction taken out of an int8 model, and done anew for a mixture of both models.

A corrected bias takes away the mean error that has gathered up to its site, so a site that follows
a bad one looks bad by itself: its bias expects what the bad one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import evaluate, ir
from jaxquant.plan import layout
from jaxquant.plan.binding import Int8Site
from jaxquant.plan.plan import Plan
from jaxquant.recover.activation import find_activation
from jaxquant.recover.shift import Shift, compare_outputs
from jaxquant.run.layers import GraphLayer
from jaxquant.run.program import Program
from jaxquant.tune.parts import Part
from jaxquant.weights.epilogue import accumulator_terms, epilogue_arrays, whole_steps
from jaxquant.weights.fold import fold
from jaxquant.weights.integers import relative_scales


def is_corrected(plan: Plan) -> bool:
    """True where some of the plan's biases are corrected."""
    return "bias_correction" in plan.recover


def without_correction(program: Program, params: Any, qparams: Mapping[str, Any]) -> dict[str, Any]:
    """`qparams` with the biases that follow from the parameters and the stored weights."""
    if not is_corrected(program.whole_plan):
        return dict(qparams)
    biases: dict[str, list[np.ndarray]] = {}  # in every layer
    for layer in GraphLayer(program, program.binding, qparams, params).walk():
        for name, bias in _plain_biases(layer).items():
            biases.setdefault(name, []).append(bias)
    sites = dict(qparams["sites"])
    for name, layers in biases.items():
        shape = np.shape(sites[name]["multiplier"])  # [C], or in scans over stacked weights more
        sites[name] = {**sites[name], "bias": jnp.asarray(np.stack(layers).reshape(shape))}
    return {**qparams, "sites": sites}


def _plain_biases(layer: GraphLayer) -> dict[str, np.ndarray]:
    """The biases without correction of the sites of a graph that have a corrected one."""
    graph, binding = layer.program.graph, layer.binding
    # Each layer of a scan has biases of its own.
    corrected = [s for s in binding.sites if is_corrected_site(layer.program, s.site.name)]
    steps = [step for s in corrected for step in s.epilogue.steps]
    # From the float parameters anew: the correction cannot be told from the bias it is in.
    wanted = [step.operand for step in steps if isinstance(step.operand, int)]
    operands = fold(graph, layer.params, [], wanted)[1]
    found = {}
    for int8_site in corrected:
        scale, offset = _weight_terms(layer, int8_site)
        arrays = epilogue_arrays(int8_site, operands, scale, offset)
        bias = arrays.get("bias", np.zeros_like(arrays["multiplier"]))
        stored = layer.qparams["sites"][int8_site.site.name]

        # A planned bias is a whole number of multipliers, and has to come out as the stored one
        # does.
        if not int8_site.dynamic:
            bias = whole_steps(bias, np.asarray(stored["multiplier"]))
        found[int8_site.site.name] = bias
    return found


def _weight_terms(layer: GraphLayer, int8_site: Int8Site) -> tuple[np.ndarray, np.ndarray | None]:
    """What one unit of a site's accumulator is worth, and what its input's zero point adds."""
    site, binding = int8_site.site, layer.binding
    scales = {tensor.name: tensor.scale for tensor in binding.plan.tensors}
    slot = layer.program.slots[site.name]
    weight, scale = jax.device_get(
        [layout.get(layer.qparams["params"], path) for path in (slot.int8, slot.scale)]
    )
    # What is scaled in the call has no step of the plan: its unit is 1.
    known = [scales[binding.scales[v]] for v in int8_site.with_scales]
    step = np.prod(known)
    if site.as_contraction.choosing is not None:
        # A ragged dot's zero point is in no bias: it is taken from the sums.
        return relative_scales(site, weight, scale)[0] * step, None
    unit = np.asarray(scale, np.float64) * step
    zero_point = 0 if int8_site.dynamic else binding.zero_points.get(site.operands[0], 0)
    return accumulator_terms(weight, site.channel_axes, unit, zero_point)


def is_corrected_site(program: Program, name: str) -> bool:
    """True for a site of a program's own graph whose bias is corrected."""
    return name in program.slots and name in program.plan.recovered_by("bias_correction")


def has_bias(program: Program, part: Part) -> bool:
    """True for a part whose bias is corrected."""
    return part.site is not None and is_corrected_site(program, part.name)


def shift_at(
    part: Part,
    reference: evaluate.Environment,
    value: jax.Array,
    real: Callable[[ir.Var], jax.Array | None] = lambda var: None,
) -> tuple[Shift, jax.Array]:
    """How far a part's channels are off, and the value with their mean error taken away.

    Args:
      part: it.
      reference: the float model's values.
      value: what the part gives.
      real: gives which entries of a tensor belong to no padding; None for all.
    """
    assert part.site is not None
    epilogue = part.site.epilogue
    activation = find_activation(reference.graph, epilogue.output)
    compared = compare_outputs(epilogue, activation, reference, value, real(epilogue.output))
    corrected = value + epilogue.channels.spread(compared.mean, value.ndim)
    return Shift.of(compared.shift, compared.powers[2]), corrected
