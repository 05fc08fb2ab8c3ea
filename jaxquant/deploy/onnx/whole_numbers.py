"""Whole numbers that steer operations: indices and sizes, known when the model is exported or not.

What is known is computed here, in NumPy; what depends on the inputs, or on sizes that vary, becomes
nodes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size
from jaxquant.deploy.onnx.nodes import Nodes

Whole = np.ndarray | str  # known, or the name of an int64 tensor of the graph


def name_of(builder: Nodes, number: Whole) -> str:
    return number if isinstance(number, str) else builder.constant(number.astype(np.int64), "whole")


def of_size(builder: Nodes, size: Size) -> Whole:
    """A size, which may be an expression of sizes that vary; int64 [1].

    Raises:
      NotCovered: the expression holds a name that no input has, or a function that is not known.
    """
    if isinstance(size, int):
        return np.array([size])
    # JAX writes a power with ^, which Python reads as another operator.
    tree = ast.parse(size.replace("^", "**").strip(), mode="eval").body
    return _evaluate(builder, tree, size)


def shape(builder: Nodes, sizes: Sequence[Size], may_infer: bool = True) -> str:
    """A shape as a tensor; with `may_infer`, one size that varies is left to Reshape as -1."""
    varying = [size for size in sizes if isinstance(size, str)]
    # A 0 would be read as a size that is kept.
    if len(varying) <= 1 and (may_infer or not varying) and 0 not in sizes:
        return builder.ints([-1 if isinstance(size, str) else size for size in sizes])
    return builder.node(
        "Concat", [name_of(builder, of_size(builder, size)) for size in sizes], "shape", axis=0
    )


def _evaluate(builder: Nodes, tree: ast.expr, text: str) -> Whole:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return np.array([tree.value])
    if isinstance(tree, ast.Name):
        return builder.named_size(tree.id)
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return multiply(builder, np.array([-1]), _evaluate(builder, tree.operand, text))
    # Sizes are expressions of sums, products, powers and a few functions: JAX's own grammar.
    if isinstance(tree, ast.BinOp):
        left, right = (_evaluate(builder, side, text) for side in (tree.left, tree.right))
        if isinstance(tree.op, ast.Pow) and isinstance(right, np.ndarray):
            # A power of sizes that vary is a product of them: exponents are numbers.
            power: Whole = np.array([1])
            for _ in range(int(right[0])):
                power = multiply(builder, power, left)
            return power
        for kind, function in _OPERATORS.items():
            if isinstance(tree.op, kind):
                return function(builder, left, right)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        function_of = _FUNCTIONS.get(tree.func.id)
        if function_of is not None and len(tree.args) == 2:
            return function_of(
                builder, *(_evaluate(builder, argument, text) for argument in tree.args)
            )
    raise NotCovered(f"the size {text!r}")


def add(builder: Nodes, left: Whole, right: Whole) -> Whole:
    return _apply(builder, "Add", np.add, left, right)


def subtract(builder: Nodes, left: Whole, right: Whole) -> Whole:
    return _apply(builder, "Sub", np.subtract, left, right)


def multiply(builder: Nodes, left: Whole, right: Whole) -> Whole:
    return _apply(builder, "Mul", np.multiply, left, right)


def smaller(builder: Nodes, left: Whole, right: Whole) -> Whole:
    return _apply(builder, "Min", np.minimum, left, right)


def larger(builder: Nodes, left: Whole, right: Whole) -> Whole:
    return _apply(builder, "Max", np.maximum, left, right)


def modulo(builder: Nodes, left: Whole, right: Whole) -> Whole:
    """The remainder with the sign of the divisor, as in Python."""
    return _apply(builder, "Mod", np.mod, left, right)


def floor_divide(builder: Nodes, left: Whole, right: Whole) -> Whole:
    """The quotient rounded down, where ONNX's division of whole numbers rounds towards zero."""
    multiple = subtract(builder, left, modulo(builder, left, right))
    return _apply(builder, "Div", np.floor_divide, multiple, right)


def clipped(builder: Nodes, number: Whole, last: Whole) -> Whole:
    """Between 0 and `last`."""
    return larger(builder, smaller(builder, number, last), np.array([0]))


def reshaped(builder: Nodes, number: Whole, sizes: Sequence[Size]) -> Whole:
    if isinstance(number, np.ndarray):
        # At most one of the sizes is not known, which NumPy infers.
        return number.reshape([-1 if isinstance(size, str) else size for size in sizes])
    return builder.node("Reshape", [number, shape(builder, sizes)])


def counted(builder: Nodes, size: Size) -> Whole:
    """0, 1, 2, ... below a size: [size]."""
    number = of_size(builder, size)
    if isinstance(number, np.ndarray):
        return np.arange(int(number[0]))
    # Range takes numbers without axes.
    limit = builder.node("Reshape", [number, builder.constant(np.zeros(0, np.int64), "scalar")])
    start, step = (builder.constant(np.int64(k), "whole") for k in (0, 1))
    return builder.node("Range", [start, limit, step])


def stacked(builder: Nodes, parts: Sequence[Whole], sizes: Sequence[Size]) -> Whole:
    """[*sizes, parts]: each part, which broadcasts against `sizes`, a column of the last axis."""
    # Known parts stay known: places that do not depend on inputs become constants.
    if all(isinstance(part, np.ndarray) for part in parts) and not any(
        isinstance(size, str) for size in sizes
    ):
        known = [int(size) for size in sizes]
        return np.stack([np.broadcast_to(part, known) for part in parts], axis=-1)
    wanted = shape(builder, sizes, may_infer=False)
    columns = []
    for part in parts:
        name = builder.node("Expand", [name_of(builder, part), wanted])
        columns.append(builder.node("Unsqueeze", [name, builder.ints([len(sizes)])]))
    return columns[0] if len(columns) == 1 else builder.node("Concat", columns, axis=-1)


def within(builder: Nodes, number: Whole, last: Whole) -> np.ndarray | str:
    """Where a number is between 0 and `last`: truth values."""
    if isinstance(number, np.ndarray) and isinstance(last, np.ndarray):
        return (number >= 0) & (number <= last)
    low = builder.node(
        "GreaterOrEqual", [name_of(builder, number), builder.constant(np.int64(0), "whole")]
    )
    high = builder.node("LessOrEqual", [name_of(builder, number), name_of(builder, last)])
    return builder.node("And", [low, high])


def both(builder: Nodes, left: np.ndarray | str, right: np.ndarray | str) -> np.ndarray | str:
    """Where both truth values are true."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left & right
    names = [side if isinstance(side, str) else builder.constant(side) for side in (left, right)]
    return builder.node("And", names)


def _apply(
    builder: Nodes, op: str, function: Callable[..., np.ndarray], left: Whole, right: Whole
) -> Whole:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return np.asarray(function(left, right))
    return builder.node(op, [name_of(builder, left), name_of(builder, right)])


_OPERATORS: dict[type[ast.operator], Callable[[Nodes, Whole, Whole], Whole]] = {
    ast.Add: add,
    ast.Sub: subtract,
    ast.Mult: multiply,
}
_FUNCTIONS: dict[str, Callable[[Nodes, Whole, Whole], Whole]] = {
    "floordiv": floor_divide,
    "max": larger,
    "min": smaller,
    "mod": modulo,
}
