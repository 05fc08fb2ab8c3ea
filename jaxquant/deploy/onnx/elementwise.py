"""Elementwise primitives as ONNX operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.lower.elementwise import aligned
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Value
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.graph.primitives import PLACEMENTS

_DIRECT = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "add": "Add",
    "add_any": "Add",
    "and": "And",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tan": "Tan",
    "tanh": "Tanh",
    "xor": "Xor",
}
_ON_TRUTH_VALUES = frozenset({"and", "or", "not", "xor"})
_OF_TRUTH_VALUES = {"max": "Or", "min": "And"}
_ORDER = frozenset({"lt", "le", "gt", "ge"})  # which ONNX has for numbers alone
ONNX_TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "uint8": 2, "int8": 3, "uint32": 12}


def apply(builder: Builder, op: str, values: Sequence[Value], **attributes: Any) -> Value:
    """One elementwise ONNX operator."""
    names, result = aligned(builder, values)
    return dataclasses.replace(result, name=builder.node(op, names, **attributes))


def scalar(builder: Builder, number: float, like: str = "float32") -> Value:
    return Value(builder.constant(np.asarray(number, like)), (), ())


def emit(builder: Builder, node: Node, values: Sequence[Value], dtypes: Sequence[str]) -> Value:
    """The result of an elementwise node; `dtypes` are those of the ONNX operands."""
    if node.op in _COMPOSED:
        return _COMPOSED[node.op](builder, node, list(values), dtypes)
    if node.op not in _DIRECT:
        raise NotCovered(f"the operation {node.op!r}")
    if node.op in _ON_TRUTH_VALUES and dtypes[0] != "bool":
        raise NotCovered(f"the operation {node.op!r} on {dtypes[0]}")
    if dtypes[0] == "bool" and node.op in _ORDER:
        values = [cast(builder, value, "int32") for value in values]
    # On truth values Max and Min are no operators, but `or` and `and` are the same.
    operators = {**_DIRECT, **_OF_TRUTH_VALUES} if dtypes[0] == "bool" else _DIRECT
    return apply(builder, operators[node.op], values)


Compose = Callable[[Builder, Node, list[Value], Sequence[str]], Value]


def _identity(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return x[0]


def _cast(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    target = onnx_dtype(str(node.params["new_dtype"]))
    return x[0] if target == dtypes[0] else cast(builder, x[0], target)


def cast(builder: Builder, value: Value, dtype: str) -> Value:
    return apply(builder, "Cast", [value], to=ONNX_TYPES[dtype])


def onnx_dtype(dtype: str) -> str:
    """The dtype of the ONNX tensor: narrow floats become float32, as epilogues compute in it."""
    if dtype in ("float32", "float16", "bfloat16", "float64"):
        return "float32"
    if dtype not in ONNX_TYPES:
        raise NotCovered(f"the dtype {dtype}")
    return dtype


def _integer_pow(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    exponent = int(node.params["y"])
    # A product is cheaper than a power, and is rounded once.
    if exponent == 2:
        return apply(builder, "Mul", [x[0], x[0]])
    return apply(builder, "Pow", [x[0], scalar(builder, exponent, dtypes[0])])


def _square(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Mul", [x[0], x[0]])


def _rsqrt(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Reciprocal", [apply(builder, "Sqrt", x)])


def _cbrt(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    root = apply(builder, "Pow", [apply(builder, "Abs", x), scalar(builder, 1 / 3)])
    return apply(builder, "Mul", [apply(builder, "Sign", x), root])


def _exp2(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Exp", [apply(builder, "Mul", [x[0], scalar(builder, float(np.log(2)))])])


def _expm1(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Sub", [apply(builder, "Exp", x), scalar(builder, 1)])


def _log1p(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Log", [apply(builder, "Add", [x[0], scalar(builder, 1)])])


def _log2(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Mul", [apply(builder, "Log", x), scalar(builder, float(1 / np.log(2)))])


def _one_minus_square(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    """As JAX computes it: (1 + x)(1 - x) keeps its digits where |x| is near 1."""
    one = scalar(builder, 1)
    return apply(
        builder, "Mul", [apply(builder, "Add", [one, *x]), apply(builder, "Sub", [one, *x])]
    )


def _polynomial(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    """A polynomial in the first operand; the others are its coefficients, constant one first."""
    variable, *coefficients, total = x
    for coefficient in reversed(coefficients):
        total = apply(builder, "Add", [apply(builder, "Mul", [total, variable]), coefficient])
    return total


def _erfc(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Sub", [scalar(builder, 1), apply(builder, "Erf", x)])


def _round(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    if "EVEN" in str(node.params.get("rounding_method")):
        return apply(builder, "Round", x)
    # Halves away from zero.  Not floor(|x| + 1/2), which is 1 for the largest float below 1/2.
    size = apply(builder, "Abs", x)
    below = apply(builder, "Floor", [size])
    rest = apply(builder, "Sub", [size, below])
    up = apply(builder, "GreaterOrEqual", [rest, scalar(builder, 0.5)])
    rounded = apply(
        builder, "Where", [up, apply(builder, "Add", [below, scalar(builder, 1)]), below]
    )
    return apply(builder, "Mul", [apply(builder, "Sign", x), rounded])


def _ne(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Not", [apply(builder, "Equal", x)])


def _is_finite(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    odd = apply(builder, "Or", [apply(builder, "IsNaN", x), apply(builder, "IsInf", x)])
    return apply(builder, "Not", [odd])


def _rem(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(builder, "Mod", x, fmod=1)


def _where(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    if len(x) != 3 or dtypes[0] != "bool":
        raise NotCovered("a choice between other than two cases")
    if dtypes[1] == "bool":  # which runtimes' Where does not take
        chosen = apply(builder, "And", [x[0], x[2]])
        return apply(
            builder, "Or", [chosen, apply(builder, "And", [apply(builder, "Not", [x[0]]), x[1]])]
        )
    # JAX has the case for False first.
    return apply(builder, "Where", [x[0], x[2], x[1]])


def _clamp(builder: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    low, value, high = x
    if low.rank == high.rank == 0 and dtypes[1] == "float32":
        return clip(builder, value, low, high)
    return apply(builder, "Min", [apply(builder, "Max", [value, low]), high])


def clip(builder: Builder, value: Value, low: Value, high: Value) -> Value:
    """Clip between two scalars, which runtimes fuse with the operation before it."""
    value = builder.plain(value)
    name = builder.node("Clip", [value.name, low.name, high.name])
    return dataclasses.replace(value, name=name)


def relu(builder: Builder, value: Value) -> Value:
    value = builder.plain(value)
    return dataclasses.replace(value, name=builder.node("Relu", [value.name]))


_COMPOSED: dict[str, Compose] = {
    "cbrt": _cbrt,
    "clamp": _clamp,
    "convert_element_type": _cast,
    "copy": _identity,
    "copy_p": _identity,
    "erfc": _erfc,
    "exp2": _exp2,
    "expm1": _expm1,
    "integer_pow": _integer_pow,
    "is_finite": _is_finite,
    "log1p": _log1p,
    "log2": _log2,
    "ne": _ne,
    "one_minus_square": _one_minus_square,
    "polynomial": _polynomial,
    "reduce_precision": _identity,
    "rem": _rem,
    "round": _round,
    "rsqrt": _rsqrt,
    "select_n": _where,
    "square": _square,
    "stop_gradient": _identity,
    **dict.fromkeys(PLACEMENTS, _identity),
}
OPERATIONS = frozenset((*_DIRECT, *_COMPOSED))
