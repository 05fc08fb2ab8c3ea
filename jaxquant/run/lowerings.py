"""Lowerings: what runs in an int8 program in place of an equation.

Each of these functions makes the lowering of one equation or site.  A lowering reads the state of
one evaluation and gives the float values of tensors (`jaxquant.graph.evaluate`); what is quantized
on the way is kept in `Evaluation.quantized`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxquant.graph import evaluate, ir
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.binding import Int8Site
from jaxquant.run.quantized import QuantizedTensors


class Evaluation(NamedTuple):
    """The state of one evaluation of an int8 program.

    Attributes:
      qparams: the arrays of the model.
      env: the tensors in float.
      quantized: the tensors in int8.
      sums: of dots that a sibling has computed, by site, until they are read.
    """

    qparams: Mapping[str, Any]
    env: evaluate.Environment
    quantized: QuantizedTensors
    sums: dict[str, jax.Array]


Lowering: TypeAlias = evaluate.Lowering[Evaluation]
Hook: TypeAlias = Callable[[Int8Site, Lowering], Lowering]


def in_float(eqn: ir.Equation) -> Lowering:
    """The equation itself, on the float values of what it reads."""
    lowering = evaluate.as_it_is(eqn)
    return lambda state: lowering(state.env)


def on_dequantized(eqn: ir.Equation) -> Lowering:
    """The equation itself, on what the int8 forms of its operands stand for."""

    def lowering(state: Evaluation) -> evaluate.Values:
        return dict(zip(eqn.outputs, evaluate.apply(state.quantized, eqn), strict=True))

    return lowering


def selected(eqn: ir.Equation) -> Lowering:
    """What the int8 form of the result stands for: the equation moves or selects integers."""
    return lambda state: {var: state.quantized.wide(var) for var in eqn.outputs}


def rounded(lowering: Lowering, var: ir.Var) -> Lowering:
    """A lowering whose result everybody reads as what its int8 form stands for."""

    def with_rounding(state: Evaluation) -> evaluate.Values:
        values = lowering(state)
        # A call that rounded by itself has put both forms already.
        if var not in values or state.quantized.holds(var):
            return values
        # The exact value is what gets quantized; readers then see the rounded one.
        state.env.write(var, values[var])
        return {**values, var: state.quantized.wide(var)}

    return with_rounding


def decided(eqn: ir.Equation) -> Lowering:
    """argmax and comparisons: on int8 where the scales agree, else on the dequantized values."""
    otherwise = on_dequantized(eqn)

    def lowering(state: Evaluation) -> evaluate.Values:
        operands, quantized = eqn.input_vars, state.quantized
        # A number beside a tensor (x > 0) has no scale: that is decided on floats.
        are_tensors = len(operands) == len(eqn.inputs)
        if not are_tensors or not all(quantized.shares_scale(operands[0], v) for v in operands):
            return otherwise(state)
        # Rounding keeps the order of values, so integers of one scale decide as the floats do.
        values = [quantized.int8(v) for v in operands]
        results = jaxprs.bind(eqn.primitive, values, dict(eqn.params))
        return dict(zip(eqn.outputs, results, strict=True))

    return lowering
