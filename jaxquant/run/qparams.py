"""Whether arrays are those of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxquant.graph.kinds import LOOKUP_KIND
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import Plan

_ENTRIES = {"params", "sites", "tensors"}


def check_qparams(qparams: Mapping[str, Any], plan: Plan) -> None:
    """Raise ValueError where something is not the qparams of a plan."""
    if not isinstance(qparams, Mapping) or set(qparams) - {"packed"} != _ENTRIES:
        raise ValueError(
            "qapply takes the qparams that quant_post returned beside it (a dict of 'params', "
            f"'sites' and 'tensors'), got {_outline(qparams)}"
        )
    # Names alone: arrays may be traced, or on any device.
    tensors = {tensor.base for tensor in plan.tensors}
    integer = MODES[plan.mode].integer
    # Weights that are dequantized have their scale beside them, and no entry under "sites".
    with_arrays = [s for s in plan.sites if s.fingerprint and s.kind != LOOKUP_KIND and integer]
    sites = {site.name for site in with_arrays}
    differing = (tensors ^ set(qparams["tensors"])) | (sites ^ set(qparams["sites"]))
    if differing:
        raise ValueError(
            "these qparams belong to another model or plan than this qapply: "
            f"{', '.join(sorted(differing)[:5])} differ; pass those that were returned beside it"
        )


def _outline(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))[:5]}"
    return type(value).__name__
