"""Which tensors between sites are int8, which are float, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.sites import Site
from jaxquant.plan.plan import FLOAT
from jaxquant.run.program import Program


def tensor_rows(program: Program) -> list[dict[str, Any]]:
    """One dict per tensor that an operation reads: name, status, reason.

    The status is "int8"; "float", with who reads it so; or "fused", a float32 value that an
    epilogue hands to the next elementwise operation without storing it.  A tensor that is read
    both ways has a row each.  Tensors within a site, an epilogue or an activation function are not
    listed, nor are the model's outputs.
    """
    names = program.model.names
    rows: dict[tuple[ir.Var, str], dict[str, Any]] = {}
    # Of several readers in one way the first is told.
    for var, status, reason in itertools.chain(_read_by_sites(program), _read_by_others(program)):
        name = names.get(var, f"tensor_{var}")
        rows.setdefault((var, status), {"name": name, "status": status, "reason": reason})
    within = [tensor_rows(body) for bodies in program.bodies.values() for body in bodies]
    return [*rows.values(), *itertools.chain.from_iterable(within)]


def _read_by_sites(program: Program) -> Iterator[tuple[ir.Var, str, str]]:
    """What sites read: the tensor, its status, and why it is float."""
    forms, mode = program.binding.forms, program.mode
    planned = {site.name: site for site in program.plan.sites}
    dynamic = {each.site.name for each in program.binding.sites if each.dynamic and mode.integer}
    # What moves integers runs too, though no float of it is needed.
    live = {eqn.index for eqn in program.equations} | forms.moves
    live |= {site.site.equation for site in program.binding.sites}
    for site in program.model.sites:
        if not site.inside and site.equation not in live:
            continue  # absorbed by an epilogue
        reason = _float_reason(site, planned)
        quantized = site.name in planned and planned[site.name].status != FLOAT
        if quantized and not mode.integer:
            reason = "its weight alone is quantized"
        for var in site.operands:
            if reason:
                yield var, FLOAT, f"read by {site.name}: {reason}"
            elif var in forms.int8 or site.name in dynamic:
                yield var, "int8", ""
            elif site.kind in kinds.ELEMENTWISE_KINDS:
                yield var, "fused", f"in the epilogue before {site.name}"


def _read_by_others(program: Program) -> Iterator[tuple[ir.Var, str, str]]:
    """What is no site and reads floats where an int8 tensor might have been, likewise."""
    graph, forms = program.graph, program.binding.forms
    by_equation = {site.equation for site in program.model.sites if not site.inside}
    for eqn in program.equations:
        if eqn.index in by_equation:
            continue
        if primitives.is_elementwise(eqn) or primitives.is_movement(graph, eqn):
            continue
        for var in eqn.input_vars:
            if eqn.index in forms.reads_int8 and var in forms.int8:
                continue
            if not graph.static[var] and jnp.issubdtype(graph.dtype(var), jnp.floating):
                inside = eqn.index in program.bodies
                why = "goes from step to step in float" if inside else "has no int8 form"
                yield var, FLOAT, f"read by {eqn.name}, which {why}"


def _float_reason(site: Site, planned: dict[str, Any]) -> str:
    if site.name in planned:
        return str(planned[site.name].reason)
    return f"{site.kind!r} is not in quantizable_op_type"
