"""Elementwise operations that LiteRT has int8 kernels for, and what it fuses with any of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.litert.chains import Chain
from jaxquant.deploy.litert.contraction import Result
from jaxquant.deploy.litert.graph import Grid
from jaxquant.deploy.lower.elementwise import aligned
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.uses import with_scalar
from jaxquant.deploy.lower.values import Value
from jaxquant.deploy.network import Node

# Of two int8 tensors on grids of their own.
OPERATIONS = {"add": "ADD", "add_any": "ADD", "mul": "MUL", "sub": "SUB"}
_OPTIONS = {"ADD": "AddOptions", "MUL": "MulOptions", "SUB": "SubOptions"}
_ACTIVATIONS = {
    "NONE": (-math.inf, math.inf),
    "RELU": (0.0, math.inf),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}


def fused(grid: Grid, chain: Chain) -> Result:
    """What an operation gives whose values are clipped as the chain says.

    An activation fits where it leaves the same integers; where none does, `bounded` clips them.
    """
    # Compared as integers: bounds that fall on the same ones clip alike.
    wanted = grid.integer(chain.low), grid.integer(chain.high)
    for name, bounds in _ACTIVATIONS.items():
        if (grid.integer(bounds[0]), grid.integer(bounds[1])) == wanted:
            return Result(grid, name)
    return Result(grid)


def bounded(builder: Builder, value: Value, chain: Chain, result: Result) -> Value:
    """The clips of a chain, where the operation before fuses none."""
    grid = builder.grid(value)
    assert grid is not None, "a chain ends in int8"
    if result.activation != "NONE":
        return value
    for op, bound, end in (("MAXIMUM", chain.low, -128), ("MINIMUM", chain.high, 127)):
        # A bound at the end of int8 is there anyway.
        number = grid.integer(bound)
        if number != end:
            constant = builder.constant(np.int8(number), "bound", grid)
            name = builder.alike(op, value, [constant], value.physical)
            value = dataclasses.replace(value, name=name)
    return value


def clipped(builder: Builder, node: Node, values: Sequence[Value]) -> Value:
    """The larger or smaller of an int8 tensor and a number, on the grid of the tensor."""
    split = with_scalar(node, node.op)
    if split is None:
        raise NotCovered(f"the operation {node.op!r} of two int8 tensors")
    value = values[0] if isinstance(node.inputs[0], int) else values[1]
    number = float(split[1].array())
    grid = builder.grid(value)
    assert grid is not None, "a move reads int8"
    # A bound on the same grid is compared as an integer.
    constant = builder.constant(np.int8(grid.integer(number)), "bound", grid)
    op = "MAXIMUM" if node.op == "max" else "MINIMUM"
    return dataclasses.replace(value, name=builder.alike(op, value, [constant], value.physical))


def emit(builder: Builder, node: Node, values: Sequence[Value], result: Result) -> Value:
    """An addition, subtraction or product of two int8 tensors, rounded onto an int8 grid."""
    op = OPERATIONS[node.op]
    names, value = aligned(builder, values)
    settings = {"FusedActivationFunction": result.activation}
    name = builder.op(
        op, names, value.physical, result.dtype, result.grid, _OPTIONS[op], **settings
    )
    return dataclasses.replace(value, name=name)
