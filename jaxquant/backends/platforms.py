"""Where each backend runs: one table, read when a program is lowered.

A program names no platform: each of its calls holds the forms of all of them, and JAX asks for one
when it compiles, or for several when it exports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from jaxquant.backends import tpu_floats
from jaxquant.backends.backend import Backend, Call, FloatOperation, Links, Operands, Product
from jaxquant.backends.few_rows import FewRows
from jaxquant.backends.native import Native
from jaxquant.backends.xla import Xla
from jaxquant.jax_shim import choices

# Platform, by JAX's name -> its backends, the preferred one first; the last one runs every call.
Table: TypeAlias = Mapping[str, tuple[Backend, ...]]

XLA = Xla()
PLATFORMS: Table = {
    "cpu": (Native(), FewRows(), XLA),
    "cuda": (XLA,),
    "rocm": (XLA,),
    "tpu": (XLA,),
}
# Where the kernels are asked for by name, they run all that they can.
KERNELS_ALWAYS: Table = {**PLATFORMS, "cpu": (Native(packs_all=True), XLA)}
XLA_ALONE: Table = dict.fromkeys(PLATFORMS, (XLA,))


def kernels(table: Table) -> list[Backend]:
    """The backends of a table that do not run every call."""
    return [backend for row in table.values() for backend in row[:-1]]


def covers(table: Table, call: Call) -> bool:
    """Whether a backend of the table has a form of its own for a call."""
    return any(backend.covers(call) for backend in kernels(table))


def goes_on(table: Table, call: Call) -> bool:
    """Whether a call may hold what follows its site.

    Where a backend has a form of its own for it; and where there is a device, for which XLA fuses
    it in any case.  On CPU without kernels the equations stay as they are.
    """
    # By the process's default device, since the program is made before it is lowered.
    return jax.default_backend() != "cpu" or covers(table, call)


def joins(table: Table, call: Call) -> bool:
    """Whether a backend of the table takes a call into a sequence."""
    return any(backend.joins(call) for backend in kernels(table))


def covers_product(table: Table, product: Product, is_packed: bool = False) -> bool:
    """Whether a backend of the table has a form of its own for a product with stored matrices."""
    return any(backend.covers_product(product, is_packed) for backend in kernels(table))


def pack_product(table: Table, product: Product, integers: jax.Array) -> jax.Array | None:
    """The matrix in the layout of a backend of the table; None where all read it as it lies."""
    # A weight is packed in one layout: that of the first kernel that has one.
    packed = (backend.pack_product(product, integers) for backend in kernels(table))
    return next((each for each in packed if each is not None), None)


def run(table: Table, call: Call, operands: Operands) -> Sequence[jax.Array]:
    """The results of a call, by the backend that the table has for it where it will run."""
    is_packed = "packed" in operands
    # Forms take arrays alone, by their order.
    names = tuple(operands)

    def form(backend: Backend) -> choices.Form:
        return lambda *arrays: backend.call(call, dict(zip(names, arrays, strict=True)))

    return _chosen(
        table,
        lambda backend: backend.covers(call, is_packed),
        form,
        call.outputs,
        list(operands.values()),
    )


def run_sequence(
    table: Table,
    calls: Sequence[Call],
    links: Sequence[Links],
    operands: Sequence[Operands],
    results: Sequence[tuple[int, int]],
) -> Sequence[jax.Array]:
    """The results of several calls; see `Backend.sequence`."""
    names = [tuple(each) for each in operands]

    def form(backend: Backend) -> choices.Form:
        # What is chosen between takes flat arrays, of which each call takes its own.
        def of_arrays(*arrays: jax.Array) -> Sequence[jax.Array]:
            rest = iter(arrays)
            given = [{name: next(rest) for name in each} for each in names]
            return backend.sequence(calls, links, given, results)

        return of_arrays

    def covers_all(backend: Backend) -> bool:
        """Together they are worth it where one of them is."""
        pairs = zip(calls, operands, strict=True)
        is_fast = any(backend.covers(call, "packed" in each) for call, each in pairs)
        return is_fast and all(backend.joins(call) for call in calls)

    # What is linked is no operand: it stays inside.
    outputs = [calls[position].outputs[k] for position, k in results]
    arrays = [value for each in operands for value in each.values()]
    return _chosen(table, covers_all, form, outputs, arrays)


def run_product(
    table: Table, product: Product, *operands: jax.Array, packed: Sequence[jax.Array] = ()
) -> Sequence[jax.Array]:
    """A product with stored matrices, by the backend that the table has for it where it will run.

    On several devices that is XLA, which leaves a sharded weight where it is.
    """
    count = len(operands)

    def form(backend: Backend) -> choices.Form:
        return lambda *arrays: backend.product(product, *arrays[:count], packed=arrays[count:])

    def covers(backend: Backend) -> bool:
        return backend.covers_product(product, bool(packed))

    given = [*operands, *packed]
    # One device: packed matrices are not spread over a mesh.
    return _chosen(table, covers, form, product.outputs, given, one_device=True)


def covers_operation(table: Table, operation: FloatOperation) -> bool:
    """Whether an operation of floats has another form somewhere: a kernel, or that of TPUs."""
    has_kernel = any(backend.covers_operation(operation) for backend in kernels(table))
    return has_kernel or tpu_floats.has(operation)


def run_operation(table: Table, operation: FloatOperation, *operands: jax.Array) -> jax.Array:
    """The result of an operation, by the backend that the table has for it where it will run."""

    def form(backend: Backend) -> choices.Form:
        return lambda *arrays: [backend.operation(operation, *arrays)]

    def covers(backend: Backend) -> bool:
        return backend.covers_operation(operation)

    (result,) = _chosen(table, covers, form, [operation.output], operands, one_device=True)
    return result


def _chosen(
    table: Table,
    covers: Callable[[Backend], bool],
    form: Callable[[Backend], choices.Form],
    outputs: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[Any],
    one_device: bool = False,
) -> Sequence[jax.Array]:
    """What the first backend gives that covers it, where it will run.

    Args:
      table: the backends.
      covers: which of them do.
      form: what one of them runs.
      outputs, operands: of that.
      one_device: whether kernels run on one device alone.
    """
    rows = {platform: [b for b in row if covers(b)] for platform, row in table.items()}
    # Where the first of all platforms is the same backend there is nothing to choose.
    backends = list(dict.fromkeys(backend for row in rows.values() for backend in row[:1]))
    if len(backends) == 1:  # nothing to choose
        return form(backends[0])(*operands)
    backends = list(dict.fromkeys(backend for row in rows.values() for backend in row))

    def pick(place: choices.Place) -> int:
        # A platform that the table does not know has XLA.
        row = rows.get(place.platform, [XLA])
        is_fit = not place.is_export and (place.is_one_device or not one_device)
        able = (backend for backend in row if backend.is_exported or is_fit)
        return backends.index(next(able))

    return choices.choose(pick, [form(backend) for backend in backends], outputs, operands)
