"""Elementwise primitives on floats and whole numbers as LiteRT operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.lower.elementwise import aligned
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Value
from jaxquant.deploy.network import Node
from jaxquant.graph.primitives import PLACEMENTS

_DIRECT = {
    "abs": "ABS",
    "add": "ADD",
    "add_any": "ADD",
    "ceil": "CEIL",
    "cos": "COS",
    "div": "DIV",
    "exp": "EXP",
    "floor": "FLOOR",
    "log": "LOG",
    "logistic": "LOGISTIC",
    "max": "MAXIMUM",
    "min": "MINIMUM",
    "mul": "MUL",
    "neg": "NEG",
    "pow": "POW",
    "rsqrt": "RSQRT",
    "sign": "SIGN",
    "sin": "SIN",
    "sqrt": "SQRT",
    "square": "SQUARE",
    "sub": "SUB",
    "tanh": "TANH",
}
_COMPARISONS = {
    "eq": "EQUAL",
    "ge": "GREATER_EQUAL",
    "gt": "GREATER",
    "le": "LESS_EQUAL",
    "lt": "LESS",
    "ne": "NOT_EQUAL",
}
_LOGICAL = {"and": "LOGICAL_AND", "not": "LOGICAL_NOT", "or": "LOGICAL_OR"}
# The operators whose kernels read what is fused with them.
_OPTIONS = {"ADD": "AddOptions", "DIV": "DivOptions", "MUL": "MulOptions", "SUB": "SubOptions"}
_DTYPES = ("float32", "int32", "int64", "bool", "uint8", "int8", "uint32")


def litert_dtype(dtype: str) -> str:
    """The dtype in the file: narrow floats become float32, as epilogues compute in it."""
    if dtype in ("float32", "float16", "bfloat16", "float64"):
        return "float32"
    if dtype not in _DTYPES:
        raise NotCovered(f"the dtype {dtype}")
    return dtype


def apply(
    b: Builder,
    op: str,
    values: Sequence[Value],
    dtype: str = "",
    options: str = "",
    **settings: Any,
) -> Value:
    """One elementwise operator; its result has the operands' dtype where none is given."""
    names, result = aligned(b, values)
    dtype = dtype or b.tensors[names[-1]].dtype
    options = options or _OPTIONS.get(op, "")
    name = b.op(op, names, result.physical, dtype, None, options, **settings)
    return dataclasses.replace(result, name=name)


def scalar(b: Builder, number: float, like: str = "float32") -> Value:
    return b.named(np.asarray(number, like))


def emit(b: Builder, node: Node, values: Sequence[Value], dtypes: Sequence[str]) -> Value:
    """The result of an elementwise node; `dtypes` are those of its operands in the file."""
    if node.op in _COMPOSED:
        return _COMPOSED[node.op](b, node, list(values))
    if node.op in _DIRECT:
        return apply(b, _DIRECT[node.op], values)
    if node.op in _COMPARISONS:
        return apply(b, _COMPARISONS[node.op], values, "bool")
    if node.op in _LOGICAL and dtypes[0] == "bool":
        return apply(b, _LOGICAL[node.op], values)
    on = f" on {dtypes[0]}" if dtypes else ""
    raise NotCovered(f"the operation {node.op!r}{on}")


Compose = Callable[[Builder, Node, list[Value]], Value]


def _identity(b: Builder, node: Node, x: list[Value]) -> Value:
    return x[0]


def _cast(b: Builder, node: Node, x: list[Value]) -> Value:
    return cast(b, x[0], litert_dtype(str(node.params["new_dtype"])))


def cast(b: Builder, value: Value, dtype: str) -> Value:
    """The value as another dtype."""
    before = b.dtype(value)
    if before == dtype:
        return value
    array = b.array(value.name)
    if array is not None:
        return dataclasses.replace(value, name=b.constant(array.astype(dtype)))
    return apply(b, "CAST", [value], dtype, "CastOptions", InDataType=before, OutDataType=dtype)


def _integer_pow(b: Builder, node: Node, x: list[Value]) -> Value:
    exponent = int(node.params["y"])
    if exponent == 2:
        return apply(b, "MUL", [x[0], x[0]])
    return apply(b, "POW", [x[0], scalar(b, exponent, b.dtype(x[0]))])


def _exp2(b: Builder, node: Node, x: list[Value]) -> Value:
    return apply(b, "EXP", [apply(b, "MUL", [x[0], scalar(b, float(np.log(2)))])])


def _expm1(b: Builder, node: Node, x: list[Value]) -> Value:
    return apply(b, "SUB", [apply(b, "EXP", x), scalar(b, 1)])


def _log1p(b: Builder, node: Node, x: list[Value]) -> Value:
    return apply(b, "LOG", [apply(b, "ADD", [x[0], scalar(b, 1)])])


def _round(b: Builder, node: Node, x: list[Value]) -> Value:
    if "EVEN" not in str(node.params.get("rounding_method")):
        raise NotCovered("rounding of halves away from zero")
    return apply(b, "ROUND", x)


def _where(b: Builder, node: Node, x: list[Value]) -> Value:
    if len(x) != 3 or b.dtype(x[0]) != "bool":
        raise NotCovered("a choice between other than two cases")
    return apply(b, "SELECT_V2", [x[0], x[2], x[1]])


def _clamp(b: Builder, node: Node, x: list[Value]) -> Value:
    low, value, high = x
    return apply(b, "MINIMUM", [apply(b, "MAXIMUM", [value, low]), high])


def _gelu(b: Builder, node: Node, x: list[Value]) -> Value:
    is_approximate = node.params["approximate"] == "tanh"
    return apply(b, "GELU", x, options="GeluOptions", Approximate=is_approximate)


def _softmax(b: Builder, node: Node, x: list[Value]) -> Value:
    value, axis = x[0], node.params["axis"]
    order = (*(a for a in value.order if a != axis), axis)
    return apply(b, "SOFTMAX", [b.ordered(value, order)], options="SoftmaxOptions", Beta=1.0)


_COMPOSED: dict[str, Compose] = {
    "clamp": _clamp,
    "convert_element_type": _cast,
    "copy": _identity,
    "copy_p": _identity,
    "exp2": _exp2,
    "expm1": _expm1,
    "gelu": _gelu,
    "integer_pow": _integer_pow,
    "log1p": _log1p,
    "optimization_barrier": _identity,
    "reduce_precision": _identity,
    "round": _round,
    "select_n": _where,
    "softmax": _softmax,
    "stop_gradient": _identity,
    **dict.fromkeys(PLACEMENTS, _identity),
}
OPERATIONS = frozenset((*_DIRECT, *_COMPARISONS, *_LOGICAL, *_COMPOSED))
# Kinds of `jaxquant.graph.operators` that are one operator here.
OPERATORS = ("gelu", "softmax")
