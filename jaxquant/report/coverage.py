"""Which tensors between sites are int8, which are float, and why."""

from __future__ import annotations

import itertools
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
    graph, forms = program.graph, program.binding.forms
    mode = program.mode
    sites, names = program.model.sites, program.model.names
    planned = {site.name: site for site in program.plan.sites}
    dynamic = {each.site.name for each in program.binding.sites if each.dynamic and mode.integer}
    rows: dict[tuple[ir.Var, str], dict[str, Any]] = {}

    # Of several readers in one way the first is told.
    def add(var: ir.Var, status: str, reason: str) -> None:
        name = names.get(var, f"tensor_{var}")
        rows.setdefault((var, status), {"name": name, "status": status, "reason": reason})

    # What moves integers runs too, though no float of it is needed.
    live = {eqn.index for eqn in program.equations} | forms.moves
    live |= {site.site.equation for site in program.binding.sites}
    for site in sites:
        if not site.inside and site.equation not in live:
            continue  # absorbed by an epilogue
        reason = _float_reason(site, planned)
        quantized = site.name in planned and planned[site.name].status != FLOAT
        if quantized and not mode.integer:
            reason = "its weight alone is quantized"
        for var in site.operands:
            if reason:
                add(var, FLOAT, f"read by {site.name}: {reason}")
            elif var in forms.int8 or site.name in dynamic:
                add(var, "int8", "")
            elif site.kind in kinds.ELEMENTWISE_KINDS:
                add(var, "fused", f"in the epilogue before {site.name}")
    # Second, what is no site and reads floats where an int8 tensor might have been.
    by_equation = {site.equation for site in sites if not site.inside}
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
                add(var, FLOAT, f"read by {eqn.name}, which {why}")
    within = [tensor_rows(body) for bodies in program.bodies.values() for body in bodies]
    return [*rows.values(), *itertools.chain.from_iterable(within)]


def _float_reason(site: Site, planned: dict[str, Any]) -> str:
    if site.name in planned:
        return str(planned[site.name].reason)
    return f"{site.kind!r} is not in quantizable_op_type"
