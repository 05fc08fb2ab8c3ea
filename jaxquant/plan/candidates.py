"""Which sites may become int8, by the user's choices: kinds, skips, and what has no int8 form."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.feeding import picked_weight
from jaxquant.graph.meshes import why_kept
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.regions import CONTROL_FLOW
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.constants import has_infinity, takes_constants
from jaxquant.plan.fillers import fillers_in
from jaxquant.plan.modes import MODES
from jaxquant.plan.rules import Rule, first_layer, matching, setting

# How many products int32 holds the sum of: of a tensor and a weight, of a tensor less its zero
# point and a weight, of two tensors less theirs.
LARGEST_SUM = (2**31 - 1) // (128 * 127)
LARGEST_SUM_OF_ROWS = (2**31 - 1) // (255 * 127)
LARGEST_SUM_OF_TENSORS = (2**31 - 1) // 255**2
SKIP_SCOPE = "skip_quant"


def reported(found: Sequence[Site], config: QuantConfig) -> tuple[Site, ...]:
    """The sites of the report: convolutions, dots, embeddings, and what else was asked for."""
    return tuple(
        site
        for site in found
        if site.kind in (*kinds.DOT_KINDS, *kinds.PRODUCTS, kinds.LOOKUP_KIND)
        # Of all other kinds there are many, about which nobody asked.
        or (site.kind in config.kinds and not site.inside)
    )


@once
def candidates(model: Model, found: tuple[Site, ...], config: QuantConfig) -> tuple[Site, ...]:
    """The sites of a model's own graph that become int8 where that is of use."""
    return tuple(site for site in found if not reason_for_float(model, site, config))


def reason_for_float(model: Model, site: Site, config: QuantConfig) -> str:
    """Why a site of a model's own graph stays float; "" where it may become int8."""
    graph = model.graph
    if in_skip_scope(site.scope):
        return f"inside jax.named_scope({SKIP_SCOPE!r})"
    # What the user asks for by name goes before the settings that are for the whole model.
    rule = _last_on_dtype(config.all_rules, site)
    if rule is not None and rule.dtype == "float":
        return rule.reason or f"rule {rule.pattern!r}"
    # A rule of the user's own on these sites wins over the setting for the first and last.
    if rule is None and config.skip_first_last and site.name in first_and_last(model.located):
        return "first or last layer (skip_first_last)"
    # The stacks of a scan that was cut are put together by a concatenation of ours, not the
    # model's.
    if not site.inside and site.equation in model.joins:
        return "it puts together what a rule cut a scan into"
    if site.inside:
        return _why_inside(model, site)
    # Then what the kind has, and last what this very site has in its shapes and dtypes.
    if site.kind in kinds.PRODUCTS:
        return behaviours.WITHOUT_INT8_FORM[kinds.PRODUCTS[site.kind]]
    if site.kind not in config.kinds:
        reason = f"{site.kind!r} is not in quantizable_op_type"
        # The reason behind the reason: nobody would look for a picked weight under its kind.
        return f"{why}: {reason}" if (why := _picked(graph, site)) else reason
    return _unfit(model, site) if MODES[config.mode].integer else _weightless(graph, site)


def _why_inside(model: Model, site: Site) -> str:
    """Why a site in a body that is no model of its own stays float."""
    region = model.root
    # The innermost of the bodies around it that says anything.
    for index, number in zip(site.location[:-1:2], site.location[1::2], strict=True):
        eqn = region.graph.equations[index]
        region = region.bodies(eqn)[number]
        if eqn.params.get("length") == 0:
            return "inside a scan of length 0, of which no step runs"
        if eqn.name == "shard_map":
            return f"inside shard_map, which runs in float: {why_kept(eqn.params)}"
        if eqn.name not in CONTROL_FLOW:
            break
    return f"inside {'/'.join(site.inside)}, which runs in float"


def is_dynamic(site: Site, config: QuantConfig) -> bool:
    """Whether what a convolution or dot reads is scaled in each call, by a rule or as all are."""
    rules, otherwise = config.all_rules, config.activation_quantize_type == "dynamic"
    asked = setting(rules, matching(rules, site, first_layer(site)), "dynamic", otherwise)
    return bool(asked) and site.kind in kinds.DOT_KINDS


def has_asymmetric_rows(graph: ir.Graph, site: Site, config: QuantConfig) -> bool:
    """Whether the rows of a site that is scaled in the call have zero points.

    Those that meet a stored weight do, but where they choose it: then each sum would have a part
    of its own to take away.
    """
    given, eqn = site.contraction, graph.equations[site.equation]
    if given is None or not given.is_dot or given.choosing is not None:
        return False
    if site.stored_weight is None:
        return False
    # A zero point doubles the largest product, and so halves how many may be summed.
    if given.terms(graph.shape(eqn.inputs[1])) > LARGEST_SUM_OF_ROWS:
        return False
    rules, symmetric = config.all_rules, config.activation_quantize_type == "symmetric"
    places = matching(rules, site, first_layer(site))
    return not setting(rules, places, "symmetric", otherwise=symmetric)


def _picked(graph: ir.Graph, site: Site) -> str:
    """A sentence where the weight of a product is picked in the call, and so float; else ""."""
    # Only products have weights that could be picked.
    operands = site.operands if site.kind in kinds.DOT_KINDS else ()
    paths = [path for var in operands if (path := picked_weight(graph, var))]
    if not paths:
        return ""
    return (
        f"its weight is picked from {paths[0]!r} by a number that the model computes, or by a scan "
        "in several steps"
    )


def _last_on_dtype(rules: Sequence[Rule], site: Site) -> Rule | None:
    """The rule that decides on a site's type; None where none does."""
    places = matching(rules, site, first_layer(site))
    # Of several rules the last wins, as everywhere.
    dtypes = [rules[place] for place in places if rules[place].dtype is not None]
    return dtypes[-1] if dtypes else None


def in_skip_scope(scope: str) -> bool:
    """True for a scope inside `jax.named_scope("skip_quant")`."""
    return SKIP_SCOPE in scope.split("/")


def _unfit(model: Model, site: Site) -> str:
    graph = model.graph
    eqn = graph.equations[site.equation]
    # A mask of -inf would make the scale infinite, unless int8 can hand the constant through.
    for operand in site.operands:
        # As a site it might be int8; what it reads would be one integer and the filler.
        if operand in fillers_in(model.root):
            value = fillers_in(model.root)[operand]
            return (
                f"its input holds {value:.3g} where values do not count, which int8 has no room for"
            )
        # Through rearrangements, which hand an infinity on.
        source = graph.producer.get(primitives.movement_root(graph, operand))
        if source is None or not has_infinity(graph, source):
            continue
        if not takes_constants(graph, source):
            return f"its input holds infinities, which {source.name} puts there"
    if site.is_lookup:
        return _weightless(graph, site)
    contraction = site.contraction
    if contraction is None:
        return ""
    # Integers in the model are indices or codes already; they have no scale to be rounded by.
    for factor in eqn.inputs[:2]:
        # A product of integers is none of floats, whatever range it has.
        if not jnp.issubdtype(graph.dtype(factor), jnp.floating):
            return f"an operand is {graph.dtype(factor)}, not float"
    if contraction.window is not None:
        if site.weight is None:
            return "its kernel depends on the inputs"
        if contraction.window.batch_groups != 1:
            return "batch_group_count is not 1"
    elif contraction.choosing is not None and site.stored_weight is None:
        return "the weights that its rows choose from are no parameters"
    # Exact sums are the promise: every term is at most 127 * 127, with a zero point 127 * 255.
    terms = contraction.terms(graph.shape(eqn.inputs[1]))
    if terms > (LARGEST_SUM_OF_TENSORS if site.weight is None else LARGEST_SUM):
        return f"its sums of {terms} products may overflow int32"
    return ""


def _weightless(graph: ir.Graph, site: Site) -> str:
    """Why a site has no weight that can be stored as integers; "" where it has one."""
    if site.weight is None:
        return _picked(graph, site) or "its weight depends on the inputs"
    # Another batch would need another weight, and one is stored.
    if site.weight in graph.sized_by_batch:
        return "its weight is made to the size of the batch"
    if not graph.sources(site.weight):
        return "its weight is computed from no parameter"
    if not jnp.issubdtype(graph.dtype(site.weight), jnp.floating):
        return f"its weight is {graph.dtype(site.weight)}, not float"
    return ""


def first_and_last(found: Sequence[Site]) -> tuple[str, str]:
    """The names of the first and the last site with a weight outside of loops; "" without one."""
    weighted = [
        site.name
        for site in found
        if site.kind in kinds.WEIGHTED_KINDS and site.weight_path and not site.inside
    ]
    return (weighted[0], weighted[-1]) if weighted else ("", "")
