"""Plain data into dataclasses, with every type checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def decode(kind: type[T], data: Any, where: str) -> T:
    """`data`, as JSON has it, as a `kind`: a dataclass of numbers, strings, tuples, mappings.

    Args:
      kind: the dataclass, or another annotation of its fields.
      data: dicts, lists, strings, numbers, booleans and None.
      where: names the data in errors.

    Raises:
      ValueError: a field is missing, unknown, or of another type; the message says where.

    Example:
      >>> import dataclasses
      >>> Size = dataclasses.make_dataclass("Size", [("name", str), ("axes", tuple[int, ...])])
      >>> decode(Size, {"name": "a", "axes": [1, 2]}, "size")
      Size(name='a', axes=(1, 2))
    """
    return _decode(kind, data, where)


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, data, where)
    # All tuples here have members of one type, as long as the file says.
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where} is {_short(data)}, not a list")
        return tuple(_decode(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(data))
    if origin in (dict, Mapping):
        if not isinstance(data, dict):
            raise ValueError(f"{where} is {_short(data)}, not an object")
        return {key: _decode(arguments[1], x, f"{where}[{key!r}]") for key, x in data.items()}
    # JSON writes 1.0 as 1 at times; nothing else is converted.
    if kind is float and type(data) is int and abs(data) < 2**53:
        return float(data)
    # By identity: True is an int to isinstance, and would pass for one.
    if type(data) is not (type(None) if kind is None else kind):
        raise ValueError(f"{where} is {_short(data)}, not {getattr(kind, '__name__', kind)}")
    return data


def _union(members: tuple[Any, ...], data: Any, where: str) -> Any:
    problems = []
    for member in members:
        try:
            return _decode(member, data, where)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {_short(data)}, not an object")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    # A field too many is of a newer release, or was made up.
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{where} has the unknown entry {unknown[0]!r}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {name!r}")
    return kind(**values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
