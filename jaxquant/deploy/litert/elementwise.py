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
    builder: Builder,
    op: str,
    values: Sequence[Value],
    dtype: str = "",
    options: str = "",
    **settings: Any,
) -> Value:
    """One elementwise operator; its result has the operands' dtype where none is given."""
    names, result = aligned(builder, values)
    dtype = dtype or builder.tensors[names[-1]].dtype
    options = options or _OPTIONS.get(op, "")
    name = builder.op(op, names, result.physical, dtype, None, options, **settings)
    return dataclasses.replace(result, name=name)


def scalar(builder: Builder, number: float, like: str = "float32") -> Value:
    return builder.named(np.asarray(number, like))


def emit(builder: Builder, node: Node, values: Sequence[Value], dtypes: Sequence[str]) -> Value:
    """The result of an elementwise node; `dtypes` are those of its operands in the file."""
    if node.op in _COMPOSED:
        return _COMPOSED[node.op](builder, node, list(values))
    if node.op in _DIRECT:
        return apply(builder, _DIRECT[node.op], values)
    if node.op in _COMPARISONS:
        return apply(builder, _COMPARISONS[node.op], values, "bool")
    # These operators know truth values alone; JAX's go by bits of whole numbers too.
    if node.op in _LOGICAL and dtypes[0] == "bool":
        return apply(builder, _LOGICAL[node.op], values)
    on = f" on {dtypes[0]}" if dtypes else ""
    raise NotCovered(f"the operation {node.op!r}{on}")


Compose = Callable[[Builder, Node, list[Value]], Value]


def _identity(builder: Builder, node: Node, x: list[Value]) -> Value:
    return x[0]


def _cast(builder: Builder, node: Node, x: list[Value]) -> Value:
    return cast(builder, x[0], litert_dtype(str(node.params["new_dtype"])))


def cast(builder: Builder, value: Value, dtype: str) -> Value:
    """The value as another dtype."""
    before = builder.dtype(value)
    if before == dtype:
        return value
    array = builder.array(value.name)
    if array is not None:
        return dataclasses.replace(value, name=builder.constant(array.astype(dtype)))
    return apply(
        builder, "CAST", [value], dtype, "CastOptions", InDataType=before, OutDataType=dtype
    )


def _integer_pow(builder: Builder, node: Node, x: list[Value]) -> Value:
    exponent = int(node.params["y"])
    # A product is cheaper than a power, and is rounded once.
    if exponent == 2:
        return apply(builder, "MUL", [x[0], x[0]])
    return apply(builder, "POW", [x[0], scalar(builder, exponent, builder.dtype(x[0]))])


def _exp2(builder: Builder, node: Node, x: list[Value]) -> Value:
    return apply(builder, "EXP", [apply(builder, "MUL", [x[0], scalar(builder, float(np.log(2)))])])


def _expm1(builder: Builder, node: Node, x: list[Value]) -> Value:
    return apply(builder, "SUB", [apply(builder, "EXP", x), scalar(builder, 1)])


def _log1p(builder: Builder, node: Node, x: list[Value]) -> Value:
    return apply(builder, "LOG", [apply(builder, "ADD", [x[0], scalar(builder, 1)])])


def _round(builder: Builder, node: Node, x: list[Value]) -> Value:
    if "EVEN" not in str(node.params.get("rounding_method")):
        raise NotCovered("rounding of halves away from zero")
    return apply(builder, "ROUND", x)


def _where(builder: Builder, node: Node, x: list[Value]) -> Value:
    if len(x) != 3 or builder.dtype(x[0]) != "bool":
        raise NotCovered("a choice between other than two cases")
    # JAX has the case for False first.
    return apply(builder, "SELECT_V2", [x[0], x[2], x[1]])


def _clamp(builder: Builder, node: Node, x: list[Value]) -> Value:
    low, value, high = x
    return apply(builder, "MINIMUM", [apply(builder, "MAXIMUM", [value, low]), high])


def _gelu(builder: Builder, node: Node, x: list[Value]) -> Value:
    is_approximate = node.params["approximate"] == "tanh"
    return apply(builder, "GELU", x, options="GeluOptions", Approximate=is_approximate)


def _softmax(builder: Builder, node: Node, x: list[Value]) -> Value:
    value, axis = x[0], node.params["axis"]
    # The operator sums along the last axis in memory.
    order = (*(a for a in value.order if a != axis), axis)
    return apply(
        builder, "SOFTMAX", [builder.ordered(value, order)], options="SoftmaxOptions", Beta=1.0
    )


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
