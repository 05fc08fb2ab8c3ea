"""The parameters of primitives, and dtypes, as plain data.

Numbers, texts, truth values and None are themselves, and every sequence is a list, which is read
as a tuple.  All else is an object with one entry, which says what it is:

    {"size": "2*h"}  {"dtype": "float32"}  {"float": "nan"}  {"scalar": [0.5, "float32"]}
    {"enum": ["GatherScatterMode", "CLIP"]}  {"record": ["ConvDimensionNumbers", {...}]}
    {"generator": "threefry2x32"}  {"body": 3}
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.deploy.stored import primitives, sizes
from jaxquant.jax_shim import jaxprs, prng

_ENUMS = {
    kind.__name__: kind
    for kind in (
        lax.AccuracyMode,
        lax.DotAlgorithmPreset,
        lax.FftType,
        lax.GatherScatterMode,
        lax.Precision,
        lax.RandomAlgorithm,
        lax.RoundingMethod,
    )
}
_RECORDS = {
    kind.__name__: kind
    for kind in (
        lax.ConvDimensionNumbers,
        lax.GatherDimensionNumbers,
        lax.RaggedDotDimensionNumbers,
        lax.ScatterDimensionNumbers,
    )
}
_KEY = "key:"  # before the name of the generator, in the dtype of PRNG keys
_MAX_DEPTH = 16
_MAX_SIZE = 2**62


def encode_dtype(dtype: Any) -> str:
    if prng.is_key_dtype(dtype):
        return _KEY + prng.key_implementation(dtype)
    return str(np.dtype(dtype))


def decode_dtype(text: str) -> Any:
    """The dtype that `encode_dtype` was given; raises ValueError where there is none."""
    if text.startswith(_KEY):
        return primitives.key_dtype(text.removeprefix(_KEY))
    try:
        dtype = jnp.dtype(text)
    except TypeError as error:
        raise ValueError(f"{text[:40]!r} is no dtype") from error
    is_number = dtype.kind in "biufc" or dtype in _EXTENDED
    # Aliases and other byte orders have names that read back as another text.
    if str(dtype) != text or not is_number or not dtype.isnative:
        raise ValueError(f"{text[:40]!r} is no dtype of numbers")
    return dtype


_EXTENDED = frozenset(
    jnp.dtype(getattr(jnp, name))
    for name in dir(jnp)
    if name.startswith(("bfloat16", "float8", "float4", "int2", "int4", "uint2", "uint4"))
)


def encode_scalar(value: Any) -> list[Any]:
    """A number of NumPy as [number, dtype]."""
    array = np.asarray(value)
    # Python's numbers: JSON knows none of NumPy's.
    if array.dtype.kind in "biu":
        return [array.item(), str(array.dtype)]
    if array.dtype.kind == "c":
        number = complex(array.item())
        return [[_encode_float(number.real), _encode_float(number.imag)], str(array.dtype)]
    return [_encode_float(float(array)), str(array.dtype)]


def decode_scalar(data: Any) -> np.ndarray:
    """The number that `encode_scalar` was given.

    Raises:
      ValueError: it is none, or not one of its dtype.
    """
    if not isinstance(data, list) or len(data) != 2 or not isinstance(data[1], str):
        raise ValueError("a number is damaged")
    value, dtype = data[0], decode_dtype(data[1])
    if prng.is_key_dtype(dtype):
        raise ValueError("a key is no number")
    if isinstance(value, list):
        if dtype.kind != "c" or len(value) != 2:
            raise ValueError("a complex number is damaged")
        return np.asarray(complex(*map(_decode_float, value)), dtype)
    if dtype.kind == "b" and isinstance(value, bool):
        return np.asarray(value)
    # True is a 1 to Python, and would pass for a number.
    if dtype.kind == "b" or isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is no {dtype}")
    # Out of range NumPy would wrap around, or raise what nobody expects.
    if jnp.issubdtype(dtype, jnp.integer):
        bounds = jnp.iinfo(dtype)
        if not (isinstance(value, int) and bounds.min <= value <= bounds.max):
            raise ValueError(f"{str(value)[:40]!r} is no {dtype}")
        return np.asarray(value, dtype)
    return np.asarray(_decode_float(value), dtype)


def _encode_float(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _decode_float(value: Any) -> float:
    if type(value) in (int, float) or value in ("nan", "inf", "-inf"):
        return float(value)
    raise ValueError(f"{str(value)[:40]!r} is no number")


def encode(value: Any, body: Callable[[Any], int]) -> Any:
    """A parameter as plain data.

    Args:
      value: the parameter.
      body: gives the number of a jaxpr, which is stored elsewhere.

    Raises:
      ValueError: there is no form for such a value.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    # JSON has no infinity; as a text it reads back the same.
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}

    # What follows is known by its class, and named in the file by its key.
    if isinstance(value, (jaxprs.Jaxpr, jaxprs.ClosedJaxpr)):
        return {"body": body(value)}
    if type(value).__name__ in _RECORDS:
        fields = {name: encode(item, body) for name, item in _fields(value).items()}
        return {"record": [type(value).__name__, fields]}
    if type(value).__name__ in _ENUMS:
        return {"enum": [type(value).__name__, value.name]}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return [encode(item, body) for item in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0:
        return {"scalar": encode_scalar(value)}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"dtype": encode_dtype(value)}
    if jax.export.is_symbolic_dim(value):
        return {"size": str(value)}
    if type(value).__name__ == "PRNGImpl":
        return {"generator": value.name}
    raise ValueError(f"a {type(value).__name__} has no form in a file")


def decode(data: Any, known: Mapping[str, Any], body: Callable[[int], Any]) -> Any:
    """The parameter that `encode` was given, for some sizes.

    Args:
      data: as `encode` gives it.
      known: the named sizes.
      body: the jaxpr of a number.

    Raises:
      ValueError: it is damaged.
    """
    return _decode(data, known, body, 0)


def _decode(data: Any, known: Mapping[str, Any], body: Callable[[int], Any], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError("a parameter is too deep")
    if data is None or type(data) in (bool, str, float):
        return data

    # Larger ones are no parameter of any primitive, and Python's have no end.
    if type(data) is int:
        if abs(data) > _MAX_SIZE:
            raise ValueError(f"the number {data} is too large")
        return data
    if isinstance(data, list):
        return tuple(_decode(item, known, body, depth + 1) for item in data)
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("a parameter is damaged")
    # Whatever is no number, text or list says by a key what it is.
    ((kind, content),) = data.items()
    if kind == "scalar":
        # A number without axes, as primitives have it among their parameters.
        return decode_scalar(content)[()]
    if kind == "float":
        return _decode_float(content)
    if kind == "body" and type(content) is int:
        return body(content)
    if kind in ("size", "dtype", "generator") and isinstance(content, str):
        if kind == "size":
            return sizes.evaluate(content, known)
        return decode_dtype(content) if kind == "dtype" else primitives.generator(content)
    if kind in ("enum", "record") and isinstance(content, list) and len(content) == 2:
        name, given = content
        if kind == "enum" and name in _ENUMS and isinstance(given, str):
            return _member(_ENUMS[name], given)
        if kind == "record" and name in _RECORDS and isinstance(given, dict):
            fields = {k: _decode(v, known, body, depth + 1) for k, v in given.items()}
            return _record(_RECORDS[name], fields)
    raise ValueError(f"a parameter is damaged: {str(data)[:60]}")


def _member(kind: Any, name: str) -> enum.Enum:
    members = {member.name: member for member in kind}
    if name not in members:
        raise ValueError(f"{kind.__name__} has no {name[:40]!r}")
    member: enum.Enum = members[name]
    return member


def _fields(record: Any) -> Mapping[str, Any]:
    if hasattr(record, "_asdict"):
        return dict(record._asdict())
    if dataclasses.is_dataclass(record):
        return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    slots = getattr(type(record), "__slots__", ()) or vars(record)
    return {name.lstrip("_"): getattr(record, name) for name in slots}


def _record(kind: Any, fields: Mapping[str, Any]) -> Any:
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} is damaged: {error}") from None
