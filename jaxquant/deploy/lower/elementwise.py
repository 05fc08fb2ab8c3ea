"""How operands of an elementwise operation meet, in any format."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from jaxquant.deploy.lower.uses import with_scalar
from jaxquant.deploy.lower.values import Size, Value
from jaxquant.deploy.network import Node


class Turning(Protocol):
    """What turns the axes of a value in a graph that is written."""

    def plain(self, value: Value) -> Value: ...

    def ordered(self, value: Value, order: Sequence[int]) -> Value: ...


def aligned(builder: Turning, values: Sequence[Value]) -> tuple[list[str], Value]:
    """Operands in one physical order, and a value with the shape and order of the result.

    The order is that of the operand with the most axes of more than one element, so that
    activations stay as they are and constants are turned.
    """
    rank = max(value.rank for value in values)
    # The largest operand keeps its order, since the others are cheaper to turn.
    leader = max(values, key=lambda v: (v.rank, sum(size != 1 for size in v.shape)))
    names = []
    shape: list[Size] = [1] * rank
    for value in values:
        # Scalars broadcast in any order of axes.
        if value.rank == 0:
            names.append(builder.plain(value).name)
            continue
        names.append(builder.ordered(value, leader.order).name)
        shape = [new if old == 1 else old for old, new in zip(shape, value.shape, strict=True)]
    return names, Value("", tuple(shape), leader.order)


def scaled(node: Node, values: Sequence[Value]) -> Value | None:
    """A multiplication or division of a value with a factor by a number: another factor."""
    split = with_scalar(node, node.op) if node.op in ("mul", "div") else None
    # A number divided by the value is no multiple of it.
    if split is None or (node.op == "div" and not isinstance(node.inputs[0], int)):
        return None
    value = values[0] if isinstance(node.inputs[0], int) else values[1]
    number = float(split[1].array())
    # A value without a factor is multiplied by an operator; zero would lose what the value was.
    if value.factor == 1.0 or number == 0:
        return None
    factor = value.factor * number if node.op == "mul" else value.factor / number
    return dataclasses.replace(value, factor=1.0 if abs(factor - 1) < 1e-6 else factor)
