"""`shard_map` as JAX records it: its mesh, how operands are split, the axes that values have."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax._src import source_info_util
from jax._src.interpreters.batching import BatchTracer

from jaxquant.jax_shim import jaxprs


@dataclasses.dataclass(frozen=True)
class Split:
    """How an operand or result of a `shard_map` is split over devices.

    Attributes:
      spec: for each of its dimensions, the axes of the mesh that it is split over, the first one
        into the largest parts; the last dimensions may be missing.
    """

    spec: tuple[tuple[str, ...], ...]

    @property
    def axes(self) -> frozenset[str]:
        """The axes of the mesh along which it is split."""
        return frozenset(axis for names in self.spec for axis in names)

    def by_dimension(self, rank: int) -> list[tuple[str, ...]]:
        """For each of so many dimensions the axes that it is split over."""
        return [*self.spec, *[()] * (rank - len(self.spec))]


@dataclasses.dataclass(frozen=True)
class MeshMap:
    """A `shard_map`.

    Attributes:
      body: what one device computes.
      sizes: the axes of the mesh that it runs along, with their sizes, in the order of the mesh.
      operands, results: how they are split.
    """

    body: jaxprs.Jaxpr
    sizes: Mapping[str, int]
    operands: tuple[Split, ...]
    results: tuple[Split, ...]

    def number(self, axes: Sequence[str]) -> int:
        """How many parts some axes make."""
        return math.prod(self.sizes[axis] for axis in axes)


def mesh_map(params: Mapping[str, Any]) -> MeshMap:
    """What the parameters of a `shard_map` say."""
    # Outer maps have their own axes: what this one adds is what it splits over.
    manual = params.get("newly_manual_axes", params.get("manual_axes"))
    mesh = params["mesh"]
    own = mesh.axis_names if manual is None else manual
    return MeshMap(
        params["jaxpr"],
        {axis: mesh.shape[axis] for axis in mesh.axis_names if axis in own},
        tuple(map(_split, params["in_specs"])),
        tuple(map(_split, params["out_specs"])),
    )


def _split(spec: Any) -> Split:
    return Split(
        tuple(() if x is None else x if isinstance(x, tuple) else (x,) for x in tuple(spec))
    )


def names_axes(eqn: jaxprs.JaxprEqn) -> bool:
    """Whether an equation, or one of its body, reads axes of a mesh by their names."""
    return any(type(effect).__name__ == "NamedAxisEffect" for effect in eqn.effects)


def mapped_axes(x: Any) -> frozenset[str]:
    """The names of the axes of `jax.vmap` along which a traced value differs."""
    found = set()

    # Maps in each other are tracers in each other.
    while isinstance(x, BatchTracer):
        if x.batch_dim is not None:
            found.add(x._trace.axis_data.name)
        x = x.val
    return frozenset(found)


@contextlib.contextmanager
def without_name_stack() -> Iterator[None]:
    """While open, equations have no scope of what is around them."""
    with source_info_util.reset_name_stack():
        yield
