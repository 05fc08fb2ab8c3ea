"""What to do about a function that cannot be traced as it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxquant.graph.calls import ModelError

# The variable collection that training updates.  Others are results of a call like any other:
# caches of a decoder, intermediates.
_STATISTICS = "batch_stats"


def hint_of(error: Exception, params: Any) -> str | None:
    """What to do about an error that Flax raised inside `apply_fn`, or None if it is not known."""
    if type(error).__module__.partition(".")[0] != "flax":
        return None

    # By name: Flax need not be installed for a model to be quantized.
    name = type(error).__name__
    text = str(error).split("\n")[0][:300]
    if name == "InvalidRngError":
        return (
            f"apply_fn needs a PRNG key ({text}). Quantization runs the model in inference mode: "
            "pass a deterministic function, e.g. "
            "`lambda p, x: model.apply(p, x, train=False)` or `deterministic=True`"
        )
    # Statistics alone say training mode; any other collection is state.
    if name == "ModifyScopeVariableError" and f'collection "{_STATISTICS}"' not in text:
        return (
            f"apply_fn updates variables while it runs ({text}). A cache or another state goes in "
            "as an input and comes back as a result: `lambda p, cache, x: "
            "model.apply({**p, 'cache': cache}, x, mutable=['cache'])`"
        )
    if name == "ModifyScopeVariableError":
        return (
            f"apply_fn updates variables while it runs ({text}). Pass the model in inference mode: "
            "`lambda p, x: model.apply(p, x, train=False)` (BatchNorm: use_running_average=True)"
        )
    if name in ("ScopeCollectionNotFound", "ScopeParamNotFoundError"):
        keys = list(params) if isinstance(params, Mapping) else type(params).__name__
        return (
            f"apply_fn does not find all of its variables in params, whose keys are {keys} ({text})"
            ". linen's `apply` takes what `init` returned, every collection under its name: "
            "{'params': ...} and, with BatchNorm, 'batch_stats'"
        )
    return None


def refuse_updates(params: Any, out_shape: Any) -> None:
    """Raise where the output is `(result, updated statistics)`, as `mutable=` makes it."""
    if not (isinstance(out_shape, tuple) and len(out_shape) == 2):
        return
    if all(isinstance(x, Mapping) and _STATISTICS in x for x in (params, out_shape[1])):
        raise ModelError(
            f"apply_fn returns updated variables ({_STATISTICS}) beside its result. "
            "Pass the model in inference mode and return the result alone: "
            "`lambda p, x: model.apply(p, x, train=False)`, without `mutable=`"
        )
