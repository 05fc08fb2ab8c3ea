"""Make the report of a quantization: what its program, its parameters and its samples tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.code_tables import INT, as_floats
from jaxquant.graph import ir
from jaxquant.graph.kinds import LOOKUP_KIND
from jaxquant.graph.layer_names import of_layer
from jaxquant.plan import layout
from jaxquant.plan.modes import DYNAMIC, MODES, WEIGHT_ONLY
from jaxquant.plan.plan import FLOAT, INT8, Plan, SitePlan
from jaxquant.report.coverage import tensor_rows
from jaxquant.report.report import Report
from jaxquant.report.sqnr import Quality
from jaxquant.run.program import Program


def make_report(
    program: Program,
    params: Any,
    qparams: Any,
    quality: Quality,
    recovery: Mapping[str, str],
    by_site: Mapping[str, str] | None = None,
) -> Report:
    """Collect the report's plain data; nothing of it holds a device array.

    Args:
      program, params, qparams: of the quantized model.
      quality: how far it is from the float model.
      recovery: what each recovery step did.
      by_site: what became of the weights of single sites.
    """
    plan = program.whole_plan
    rows = _rows(program, qparams, quality, by_site or {})
    # What plans and programs hold is turned into plain values here, once.
    tensors = tensor_rows(program)
    summary = {
        "sites_int8": sum(row["status"] == INT8 for row in rows),
        "sites_float": sum(row["status"] == FLOAT for row in rows),
        "kinds": _by_kind(rows),
        "tensors_int8": sum(tensor["status"] == INT8 for tensor in tensors),
        "tensors_float": sum(tensor["status"] == FLOAT for tensor in tensors),
        "output_sqnr_db": quality.outputs.sqnr_db if quality.outputs else None,
        "bytes_before": tree_bytes(params),
        "bytes_after": tree_bytes(qparams),
        "algo": plan.algo,
        "weight_quantize_type": plan.weight_quantize_type,
        "mode": plan.mode,
        "group_size": plan.group_size,
        "recovery": dict(recovery),
        "read_dequantized": sorted({r.site.weight_path for r in program.restored.values()}),
    }
    return Report(rows, tensors, summary, quality.outputs.rows if quality.outputs else ())


def _rows(
    program: Program, qparams: Any, quality: Quality, by_site: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One dict of plain values a site: it is saved as JSON, and shown without a device."""
    plan = program.whole_plan
    thresholds = _thresholds(plan)
    rounded = _float_sites_on_integers(program)
    rows = []
    for site in plan.sites:
        # The grid that a site is reported with is that of its first input.
        low, high = thresholds.get(site.inputs[0] if site.inputs else "", (None, None))
        least, largest = _weight_scales(program, qparams, site.name)
        reason = site.reason
        # It computes in float, on integers that it did not ask for.
        if site.name in rounded:
            reason += "; its weight is stored as the integers of another site"
        rows.append(
            {
                "name": site.name,
                "kind": site.kind,
                "scope": site.scope,
                "weight_path": site.weight_path,
                "status": site.status,
                "reason": reason,
                "inputs": list(site.inputs),
                "epilogue": [*site.affine, *site.activation],
                "threshold": low,
                "threshold_max": high,
                "weight_scale_min": least,
                "weight_scale_max": largest,
                "mode": _mode(plan, site),
                "own_sqnr_db": quality.own.get(site.name),
                "sqnr_db": quality.sites.get(site.name),
                "by_layer": _by_layer(site.name, quality),
                "rounding": by_site.get(site.name, ""),
            }
        )
    return rows


def _weight_scales(
    program: Program, qparams: Any, name: str
) -> tuple[float, float] | tuple[None, None]:
    """The least and the largest scale of a stored weight; None of a site without one."""
    # A site without a stored weight has no scale to show.
    if name not in program.slots:
        return None, None
    scale = np.asarray(as_floats(layout.get(qparams["params"], program.slots[name].scale)))
    return float(scale.min()), float(scale.max())


def _mode(plan: Plan, site: SitePlan) -> str:
    """How a site computes: "int8", say, or "float"."""
    if site.status == FLOAT:
        return FLOAT
    mode = DYNAMIC if site.dynamic else plan.mode
    if site.kind == LOOKUP_KIND:  # it computes nothing
        mode = WEIGHT_ONLY
    is_integer = site.weight_dtype == INT
    numbers = f"int{site.weight_bits}" if is_integer else site.weight_dtype
    return MODES[mode].label.format(numbers=numbers)


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Kind -> how many of its sites are int8 and float."""
    found: dict[str, dict[str, int]] = {
        kind: {INT8: 0, FLOAT: 0} for kind in sorted({row["kind"] for row in rows})
    }
    for row in rows:
        found[row["kind"]][row["status"]] += 1
    return found


def _by_layer(name: str, quality: Quality) -> list[dict[str, Any]] | None:
    """The layers of a site inside scans over stacked weights; None for another site."""
    if name not in quality.layers:
        return None
    own = quality.own_layers.get(name, {})
    return [
        {"name": of_layer(name, layer), "own_sqnr_db": own.get(layer), "sqnr_db": sqnr_db}
        for layer, sqnr_db in quality.layers[name].items()
    ]


def _thresholds(plan: Plan) -> dict[str, tuple[float, float]]:
    """Family -> the least and the largest threshold of its layers."""
    found: dict[str, tuple[float, float]] = {}
    for tensor in plan.tensors:
        family = tensor.base_family
        # Layers have thresholds of their own: the row shows from where to where.
        low, high = found.get(family, (tensor.threshold, tensor.threshold))
        found[family] = min(low, tensor.threshold), max(high, tensor.threshold)
    return found


def _float_sites_on_integers(program: Program) -> set[str]:
    """The sites in float whose weight is read from the integers of another one."""
    quantized = {each.site.name for each in program.binding.sites}
    graph = program.graph
    found = set()
    for site in program.model.sites:
        if site.weight is None or site.name in quantized:
            continue
        # A weight may be behind a transpose or a cast of what is stored.
        behind = {v for eqn in ir.upstream(graph, [site.weight]) for v in eqn.input_vars}
        if program.restored.keys() & {*behind, site.weight}:
            found.add(site.name)
    return found


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree; a PRNG key counts as its data."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        # A key has an extended dtype, whose size in bytes is its implementation's.
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            leaf = jax.random.key_data(leaf)
        struct = ir.struct(leaf)
        total += math.prod(struct.shape) * struct.dtype.itemsize
    return total
