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
    operators = {**_DIRECT, **_OF_TRUTH_VALUES} if dtypes[0] == "bool" else _DIRECT
    return apply(builder, operators[node.op], values)


Compose = Callable[[Builder, Node, list[Value], Sequence[str]], Value]


def _identity(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return x[0]


def _cast(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    target = onnx_dtype(str(node.params["new_dtype"]))
    return x[0] if target == dtypes[0] else cast(b, x[0], target)


def cast(b: Builder, value: Value, dtype: str) -> Value:
    return apply(b, "Cast", [value], to=ONNX_TYPES[dtype])


def onnx_dtype(dtype: str) -> str:
    """The dtype of the ONNX tensor: narrow floats become float32, as epilogues compute in it."""
    if dtype in ("float32", "float16", "bfloat16", "float64"):
        return "float32"
    if dtype not in ONNX_TYPES:
        raise NotCovered(f"the dtype {dtype}")
    return dtype


def _integer_pow(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    exponent = int(node.params["y"])
    if exponent == 2:
        return apply(b, "Mul", [x[0], x[0]])
    return apply(b, "Pow", [x[0], scalar(b, exponent, dtypes[0])])


def _square(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Mul", [x[0], x[0]])


def _rsqrt(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Reciprocal", [apply(b, "Sqrt", x)])


def _cbrt(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    root = apply(b, "Pow", [apply(b, "Abs", x), scalar(b, 1 / 3)])
    return apply(b, "Mul", [apply(b, "Sign", x), root])


def _exp2(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Exp", [apply(b, "Mul", [x[0], scalar(b, float(np.log(2)))])])


def _expm1(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Sub", [apply(b, "Exp", x), scalar(b, 1)])


def _log1p(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Log", [apply(b, "Add", [x[0], scalar(b, 1)])])


def _log2(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Mul", [apply(b, "Log", x), scalar(b, float(1 / np.log(2)))])


def _one_minus_square(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    """As JAX computes it: (1 + x)(1 - x) keeps its digits where |x| is near 1."""
    one = scalar(b, 1)
    return apply(b, "Mul", [apply(b, "Add", [one, *x]), apply(b, "Sub", [one, *x])])


def _polynomial(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    """A polynomial in the first operand; the others are its coefficients, constant one first."""
    variable, *coefficients, total = x
    for coefficient in reversed(coefficients):
        total = apply(b, "Add", [apply(b, "Mul", [total, variable]), coefficient])
    return total


def _erfc(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Sub", [scalar(b, 1), apply(b, "Erf", x)])


def _round(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    if "EVEN" in str(node.params.get("rounding_method")):
        return apply(b, "Round", x)
    # Halves away from zero.  Not floor(|x| + 1/2), which is 1 for the largest float below 1/2.
    size = apply(b, "Abs", x)
    below = apply(b, "Floor", [size])
    rest = apply(b, "Sub", [size, below])
    up = apply(b, "GreaterOrEqual", [rest, scalar(b, 0.5)])
    rounded = apply(b, "Where", [up, apply(b, "Add", [below, scalar(b, 1)]), below])
    return apply(b, "Mul", [apply(b, "Sign", x), rounded])


def _ne(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Not", [apply(b, "Equal", x)])


def _is_finite(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    odd = apply(b, "Or", [apply(b, "IsNaN", x), apply(b, "IsInf", x)])
    return apply(b, "Not", [odd])


def _rem(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    return apply(b, "Mod", x, fmod=1)


def _where(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    if len(x) != 3 or dtypes[0] != "bool":
        raise NotCovered("a choice between other than two cases")
    if dtypes[1] == "bool":  # which runtimes' Where does not take
        chosen = apply(b, "And", [x[0], x[2]])
        return apply(b, "Or", [chosen, apply(b, "And", [apply(b, "Not", [x[0]]), x[1]])])
    return apply(b, "Where", [x[0], x[2], x[1]])


def _clamp(b: Builder, node: Node, x: list[Value], dtypes: Sequence[str]) -> Value:
    low, value, high = x
    if low.rank == high.rank == 0 and dtypes[1] == "float32":
        return clip(b, value, low, high)
    return apply(b, "Min", [apply(b, "Max", [value, low]), high])


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
