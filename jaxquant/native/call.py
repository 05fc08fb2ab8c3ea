"""One native call: to XLA, under `vmap`, and on a sharded batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.jax_shim import choices, jaxprs


@dataclasses.dataclass(frozen=True)
class Static:
    """What a call is compiled for.

    Attributes:
      handler: the name of its function in the library.
      outputs: shape and dtype of every result, of one sample: without the batch.
      batched: which operands have the batch as their leading axis; the first one does.
      attributes: of the handler, by name.
    """

    handler: str
    outputs: tuple[tuple[tuple[int, ...], str], ...]
    batched: tuple[int, ...]
    attributes: tuple[tuple[str, Any], ...]


def call(static: Static, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Run the kernel that `static` describes; the results are [batch, ...]."""
    return tuple(_batched(static)(*jaxprs.match_varying(operands)))


@functools.lru_cache(maxsize=4096)
def _batched(static: Static) -> Callable[..., Any]:
    """The call with its batching rule: a mapped axis of samples becomes part of the batch."""
    direct, partitioned = functools.partial(_ffi_call, static), _partitioned(static)
    batched = frozenset(static.batched)

    @jax.custom_batching.custom_vmap
    def run(*operands: jax.Array) -> Any:
        outputs = _outputs(static, operands)
        return choices.choose_by_devices(direct, partitioned, outputs, operands)

    @run.def_vmap
    def over_axis(size: int, mapped: Sequence[bool], *operands: jax.Array) -> Any:
        results = len(static.outputs)
        if any(m for k, m in enumerate(mapped) if k not in batched):
            # Weights that differ: one call for each.
            def one(index: jax.Array) -> Any:
                return run(*(x[index] if m else x for x, m in zip(operands, mapped, strict=True)))

            # One after the other: a kernel uses all cores for each.
            return jax.lax.map(one, jax.numpy.arange(size)), [True] * results
        folded = []
        for k, (x, m) in enumerate(zip(operands, mapped, strict=True)):
            if k in batched:
                # A kernel has one batch: what is the same for all along the mapped axis is copied
                # into it.
                x = x if m else jax.numpy.broadcast_to(x, (size, *x.shape))
                x = x.reshape(size * x.shape[1], *x.shape[2:])
            folded.append(x)
        # The batch comes apart again into the mapped axis and the samples.
        outs = [y.reshape(size, -1, *y.shape[1:]) for y in run(*folded)]
        return outs, [True] * results

    return run


@functools.lru_cache(maxsize=4096)
def _partitioned(static: Static) -> Callable[..., Any]:
    """The call, each device doing its part of a sharded batch."""

    batched = frozenset(static.batched)

    def run(*operands: jax.Array) -> Any:
        return _ffi_call(static, *operands)

    # Each device computes the rows of its batch; whatever else is sharded is gathered first.
    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        # The first operand has the batch, and decides where it lies.
        batch = _batch_axes(arguments[0].sharding)
        taken = tuple(
            _sharding(mesh, len(a.shape), batch if k in batched else None)
            for k, a in enumerate(arguments)
        )
        given = [_sharding(mesh, len(r.shape), batch) for r in results]
        return mesh, run, given, taken

    def infer(mesh: Any, arguments: Any, results: Any) -> Any:
        batch = _batch_axes(arguments[0].sharding)
        return [_sharding(mesh, len(r.shape), batch) for r in results]

    partitioned = custom_partitioning(run)
    partitioned.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=functools.partial(_sharding_rule, batched),
    )
    return partitioned


def _sharding_rule(batched: frozenset[int], mesh: Any, arguments: Any, results: Any) -> str:
    """Only the batch, `n`, may be sharded; every other axis is a factor of its own."""
    names = (f"f{k}" for k in itertools.count())

    def axes(rank: int, is_batched: bool) -> str:
        return " ".join("n" if is_batched and axis == 0 else next(names) for axis in range(rank))

    operands = ", ".join(axes(len(a.shape), k in batched) for k, a in enumerate(arguments))
    return operands + " -> " + ", ".join(axes(len(r.shape), True) for r in results)


def _batch_axes(sharding: Any) -> Any:
    spec: Sequence[Any] = getattr(sharding, "spec", ())
    return spec[0] if len(spec) else None


def _sharding(mesh: Any, rank: int, batch: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(batch) if rank else PartitionSpec())


def _outputs(static: Static, operands: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    batch = operands[0].shape[0]
    return [
        jax.ShapeDtypeStruct((batch, *shape), np.dtype(dtype)) for shape, dtype in static.outputs
    ]


def _ffi_call(static: Static, *operands: jax.Array) -> Any:
    results = _outputs(static, operands)
    attributes: dict[str, Any] = {}
    for name, value in static.attributes:
        # Handlers read int64 and no other integer.
        if isinstance(value, int):
            attributes[name] = np.int64(value)
        else:
            # All records (`jaxquant.native.fields`) are whole numbers but for the bounds of clips.
            kind = np.float32 if name in ("clamps", "codes") else np.int64
            attributes[name] = np.asarray(value, kind)
    return list(jax.ffi.ffi_call(static.handler, results)(*operands, **attributes))
