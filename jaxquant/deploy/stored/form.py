"""A stored graph as dataclasses of plain data; see `jaxquant.deploy.stored.write` and `read`.

Tensors are numbers: first the leaves, then the constants, then the inputs, then what the equations
give, in order.  In a body they are the constants, the inputs, and what its equations give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Atom = int | tuple[Any, ...]  # a tensor, or a number as `values.encode_scalar` gives it
Size = int | str


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Shape and dtype; a size that varies is an expression, see `sizes`."""

    shape: tuple[Size, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: the keys on the way to it, and what it was before it was quantized."""

    path: tuple[str, ...]
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array that the function closed over.

    `array` is the name of its values in the file; "" for one that the int8 model does not read.
    """

    path: str
    tensor: Tensor
    array: str


@dataclasses.dataclass(frozen=True)
class Equation:
    """One application of a primitive, `op`, which gives so many `outputs`.

    `params` are as `values.encode` gives them; `scope` and `calls` those of `ir.Equation`.
    """

    op: str
    inputs: tuple[Atom, ...]
    outputs: int
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scope: str = ""
    calls: tuple[str | int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Body:
    """What control flow runs.  It may hold bodies that come before it, never itself."""

    constants: tuple[Constant, ...]
    inputs: int
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]


@dataclasses.dataclass(frozen=True)
class StoredForm:
    """A graph.

    Attributes:
      leaves, constants: what it reads beside its inputs.
      inputs: the flattened inputs.
      input_tree, output_tree: their structures, as `trees.encode_tree` gives them; that of the
        inputs is of the tuple of arguments behind the parameters.
      example: shapes of inputs that it takes; where sizes vary, those of the calibration data.
      constraints: what was assumed of the sizes that vary, such as "s <= 512".
      equations: in order.
      bodies: of control flow.
      outputs: the flattened outputs.
    """

    leaves: tuple[Leaf, ...]
    constants: tuple[Constant, ...]
    inputs: tuple[Tensor, ...]
    input_tree: Any
    output_tree: Any
    example: tuple[tuple[int, ...], ...]
    constraints: tuple[str, ...]
    equations: tuple[Equation, ...]
    bodies: tuple[Body, ...]
    outputs: tuple[Atom, ...]
