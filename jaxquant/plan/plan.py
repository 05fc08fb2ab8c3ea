"""The plan of a quantization: plain data, hashable and JSON-able."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxquant.config import QuantConfig
from jaxquant.errors import nearest
from jaxquant.graph import ir, sites
from jaxquant.plan import epilogue as epilogues

VERSION = 1
INT8, FLOAT = "int8", "float"
SKIP_SCOPE = "skip_quant"


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor that is quantized: `scale = threshold / 127`, or 1 where the threshold is 0."""

    name: str
    threshold: float
    scale: float


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """One site: int8 with its input tensor and epilogue, or float with the reason."""

    name: str
    kind: str
    scope: str
    weight_path: str
    status: str
    reason: str
    tensor: str
    epilogue: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which sites are int8, and with which scales."""

    sites: tuple[SitePlan, ...]
    tensors: tuple[TensorPlan, ...]
    weight_quantize_type: str
    algo: str
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        data = json.loads(text)
        if data.get("version") != VERSION:
            raise ValueError(f"plan version {data.get('version')!r}; this release reads {VERSION}")
        site_plans = tuple(
            SitePlan(**{**s, "epilogue": tuple(s["epilogue"])}) for s in data.pop("sites")
        )
        tensor_plans = tuple(TensorPlan(**t) for t in data.pop("tensors"))
        return Plan(sites=site_plans, tensors=tensor_plans, **data)


@dataclasses.dataclass(frozen=True)
class Int8Site:
    """An int8 site in a graph: what `quantize` and `run` work from.

    `root` is the tensor to quantize, a rearrangement of which is the site's activation.
    """

    site: sites.Site
    tensor: str
    root: ir.Var
    epilogue: epilogues.Epilogue


def make_plan(graph: ir.Graph, thresholds: Mapping[str, float], config: QuantConfig) -> Plan:
    """Decide for every site of the graph whether it becomes int8.

    Args:
      graph: the traced model.
      thresholds: tensor name -> the |x| that maps to 127.
      config: the user's choices.

    Raises:
      ValueError: a skip pattern matches nothing, the model has no site, or none is left.
    """
    found = sites.find_sites(graph)
    if not found:
        raise ValueError(
            "there is nothing to quantize: apply_fn holds no convolution and no dot that depends "
            "on its inputs (elementwise multiplication and sums are not dots)"
        )
    _check_skip(found, config.skip)
    names = {var: name for name, var in sites.site_inputs(graph, found).items()}
    site_plans, used = [], {}
    for site in found:
        reason = _reason_for_float(graph, site, config)
        if reason:
            site_plans.append(_site_plan(site, FLOAT, reason, "", ()))
            continue
        tensor = names[sites.activation_root(graph, site)]
        if tensor not in thresholds:
            raise ValueError(
                f"site {site.name!r}: the observations hold nothing on its input tensor "
                f"{tensor!r}; calibrate with the same apply_fn"
            )
        used[tensor] = thresholds[tensor]
        operations = epilogues.find_epilogue(graph, site).names
        site_plans.append(_site_plan(site, INT8, "", tensor, operations))
    tensors = tuple(TensorPlan(n, t, scale_of(t)) for n, t in used.items())
    if not tensors:
        reasons = sorted({f"{s.kind}: {s.reason}" for s in site_plans})
        raise ValueError(f"no site is left to quantize ({'; '.join(reasons)})")
    return Plan(tuple(site_plans), tensors, config.weight_quantize_type, config.algo)


def scale_of(threshold: float) -> float:
    """The step of the symmetric int8 grid [-127, 127]; 1 for a tensor that is all zero."""
    return threshold / 127.0 if threshold > 0 else 1.0


def int8_sites(graph: ir.Graph, plan: Plan) -> tuple[Int8Site, ...]:
    """Find the plan's int8 sites in a graph, which may be traced for another input shape.

    Raises:
      ValueError: the graph has other sites than the plan.
    """
    found = sites.find_sites(graph)
    planned = {s.name: s for s in plan.sites}
    here = {s.name: s for s in found}
    differing = [n for n in planned if n not in here] + [n for n in here if n not in planned]
    differing += [n for n in here if n in planned and here[n].kind != planned[n].kind]
    names = {var: name for name, var in sites.site_inputs(graph, found).items()}
    result = []
    for site in found:
        if differing or planned[site.name].status != INT8:
            continue
        planned_site = planned[site.name]
        root = sites.activation_root(graph, site) if site.activation is not None else -1
        chain = epilogues.find_epilogue(graph, site)
        if names.get(root) != planned_site.tensor or chain.names != planned_site.epilogue:
            differing.append(site.name)
            continue
        result.append(Int8Site(site, planned_site.tensor, root, chain))
    if differing:
        raise ValueError(
            "these inputs give another graph than the one that was quantized; the sites "
            f"{', '.join(sorted(set(differing))[:5])} differ. A model that computes something else "
            "for this input shape or structure has to be quantized with such a sample"
        )
    return tuple(result)


def _site_plan(
    site: sites.Site, status: str, reason: str, tensor: str, epilogue: tuple[str, ...]
) -> SitePlan:
    return SitePlan(
        site.name, site.kind, site.scope, site.weight_path, status, reason, tensor, epilogue
    )


def _reason_for_float(graph: ir.Graph, site: sites.Site, config: QuantConfig) -> str:
    """Why the site stays float; "" where it becomes int8."""
    if SKIP_SCOPE in site.scope.split("/"):
        return f"inside jax.named_scope({SKIP_SCOPE!r})"
    for pattern in config.skip:
        if _matches(site, pattern):
            return f"skip={pattern!r}"
    if site.inside:
        return f"inside {'/'.join(site.inside)}: control flow runs in float"
    if site.kind == "matmul":
        return "a dot of two activations: no int8 form yet"
    if site.kind not in config.quantizable_op_type:
        return f"{site.kind!r} is not in quantizable_op_type"
    if site.weight is None or site.activation is None:
        return "its kernel depends on the inputs"
    for operand in (site.activation, site.weight):
        if not jnp.issubdtype(graph.dtype(operand), jnp.floating):
            return f"an operand is {graph.dtype(operand)}, not float"
    if graph.equations[site.equation].params.get("batch_group_count", 1) != 1:
        return "batch_group_count is not 1"
    return ""


def _matches(site: sites.Site, pattern: str) -> bool:
    return any(
        fnmatch.fnmatchcase(text, pattern) for text in (site.name, site.scope, site.weight_path)
    )


def _check_skip(found: Sequence[sites.Site], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matches(site, pattern) for site in found):
            names: list[str] = [site.name for site in found]
            raise ValueError(f"skip pattern {pattern!r} matches no site{nearest(pattern, names)}")


def summary_counts(plan: Plan) -> dict[str, Any]:
    """Numbers of int8 and float sites."""
    int8 = sum(s.status == INT8 for s in plan.sites)
    return {"sites_int8": int8, "sites_float": len(plan.sites) - int8}
