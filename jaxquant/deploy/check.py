"""Checks that the arrays, the plan and the graph of a model belong together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.code_tables import MXFP4
from jaxquant.files import tensor_names
from jaxquant.graph import ir
from jaxquant.plan import layout
from jaxquant.plan.groups import group_layout
from jaxquant.plan.modes import MODES
from jaxquant.run.program import Program

# The shapes that an array may have, () for what the epilogue allows; and the dtypes.
_Struct = tuple[tuple[tuple[int, ...], ...], tuple[Any, ...]]
_FLOAT32, _INT32, _INT8, _UINT8 = (
    (np.dtype(each),) for each in (np.float32, np.int32, np.int8, np.uint8)
)


def check_program(program: Program, qparams: Mapping[str, Any], inputs: tuple[Any, ...]) -> None:
    """Check the arrays of a program, and run it on their shapes.

    Args:
      program: for `inputs`, as XLA runs it.
      qparams: its arrays.
      inputs: shapes and dtypes.

    Raises:
      ValueError: an array is missing, too many, or of another shape or dtype, or the program does
        not run or gives something else than the model.
    """
    check_arrays(program, qparams)
    graph = program.graph

    def run(arrays: Any, *given: Any) -> list[Any]:
        env = program.run(arrays, jax.tree.leaves(given))
        return [env.read(x) for x in graph.outputs]

    # On shapes alone: a file that does not fit is refused before anything is computed.
    try:
        found = jax.eval_shape(run, jax.tree.map(ir.struct, qparams), *inputs)
    except Exception as error:  # a primitive raises what it likes about its operands
        raise ValueError(
            f"the program does not run: {str(error).split(chr(10))[0][:300]}"
        ) from error
    wanted = [(graph.shape(x), graph.dtype(x)) for x in graph.outputs]
    if [(x.shape, x.dtype) for x in found] != wanted:
        raise ValueError("the program gives something else than the model")


def check_arrays(program: Program, qparams: Mapping[str, Any]) -> None:
    """Check shapes and dtypes: the native kernels read what the program says is there.

    Raises:
      ValueError: an array is missing, too many, or of another shape or dtype.
    """
    wanted = dict(_wanted(program))
    found = {
        tuple(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(qparams)[0]
    }
    # A bias is there or not by what the parameters hold, which a program does not know.
    optional = {path for path in found if path[0] == "sites" and path[2:] == ("bias",)}
    for path in optional & {(*site[:2], "bias") for site in wanted}:
        wanted[path] = ((), _FLOAT32)
    for path in {**wanted, **found}:
        name = tensor_names.join(path)
        if path not in found:
            raise ValueError(f"the array {name!r} is missing")
        if path not in wanted:
            raise ValueError(f"the array {name!r} is not one of this model")
        shapes, dtypes = wanted[path]
        leaf = found[path]
        if leaf.dtype not in dtypes or (shapes and tuple(leaf.shape) not in shapes):
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"the array {name!r} is {leaf.dtype}{list(leaf.shape)}, not "
                f"{' or '.join(map(str, dtypes))}{expected}"
            )


def _wanted(program: Program) -> Iterator[tuple[tuple[str, ...], _Struct]]:
    graph = program.graph
    for var, path in program.float_paths.items():
        yield ("params", *path), ((tuple(graph.shape(var)),), (graph.dtype(var),))
    yield from _wanted_by_sites(program)


def _wanted_by_sites(program: Program) -> Iterator[tuple[tuple[str, ...], _Struct]]:
    """What the sites of a program and of its loops read, those inside by layers."""
    graph, plan = program.graph, program.plan
    for body in (body for bodies in program.bodies.values() for body in bodies):
        # A loop has the arrays of all its layers in one, layers first; what they share it has once.
        layers = () if body.model.layers is None else (body.model.layers,)
        for path, (shapes, dtypes) in _wanted_by_sites(body):
            is_shared = path in body.body.shared
            yield path, (tuple((*(() if is_shared else layers), *s) for s in shapes), dtypes)
    integer = MODES[plan.mode].integer
    for int8_site in program.binding.sites:
        site = int8_site.site
        if integer and not site.is_lookup:
            yield ("sites", site.name, "multiplier"), ((), _FLOAT32)
        if site.name not in program.slots:
            continue
        slot = program.slots[site.name]
        view = layout.weight_view(graph, site, integer)
        shape = tuple(view.shape)
        if integer:
            channels = math.prod(shape[axis] for axis in view.channels)
            yield ("params", *slot.int8), ((shape,), _INT8)
            yield ("params", *slot.scale), (((channels,), ()), _FLOAT32)
            if site.contraction is not None and site.contraction.choosing is not None:
                yield ("sites", site.name, "relative_scale"), (((channels,),), _FLOAT32)
            if int8_site.asymmetric:
                yield ("sites", site.name, "weight_sum"), (((channels,),), _INT32)
            continue
        # Weights that are read in float are stored by groups, in an order of their own.
        groups = group_layout(shape, view.channels, plan.group_size)
        # Codes of four bits: two of them a byte along the summed axis, one scale a group.
        by_group, pairs = list(groups.shape), list(groups.shape)
        by_group[groups.axis] = groups.groups
        pairs[groups.axis] = -(-pairs[groups.axis] // 2)
        stored = (shape, _INT8) if slot.weight_bits == 8 else (tuple(pairs), _UINT8)
        yield ("params", *slot.int8), ((stored[0],), stored[1])
        # Programs compute with scales of either dtype, and so they are loaded.
        units = _UINT8 if slot.weight_dtype == MXFP4 else (groups.scale_dtype, *_FLOAT32)
        yield ("params", *slot.scale), ((tuple(by_group),), units)
    for tensor in plan.tensors:
        for name in ("scale", "inv_scale"):
            yield ("tensors", tensor.name, name), ((), _FLOAT32)
        if program.model.scans:
            yield ("tensors", tensor.name, "zero_point"), (((),), _INT32)
