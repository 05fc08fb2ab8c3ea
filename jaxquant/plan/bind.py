"""Find a plan in a graph again, which may be traced for another input shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxquant.graph import ir, kinds
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours
from jaxquant.plan.binding import Binding, BoundBody, Int8Site, on_grids
from jaxquant.plan.epilogue import find_epilogue, fingerprint
from jaxquant.plan.form_search import find_forms
from jaxquant.plan.forms import Forms
from jaxquant.plan.modes import MODES, Mode
from jaxquant.plan.plan import INT8, LITERT, Plan, SitePlan
from jaxquant.plan.restore import Restored, restorable


def bind(model: Model, plan: Plan) -> Binding:
    """Find the plan's sites and tensors in a model, which may be traced for another input shape.

    Raises:
      ValueError: the graph has other sites or int8 tensors than the plan.
    """
    known = {site.name for site in model.located}
    differing = [site.name for site in plan.sites if site.name not in known]
    # Which rearrangements there are may depend on the batch; the int8 tensors are compared.
    if lost := [name for name in differing if not kinds.is_layout(_kind(plan, name))]:
        raise _other_graph(lost)
    binding = _bind(model, plan, ())
    # Forms were found anew in this graph: the same tensors on grids means the same program.
    tensors = {tensor.name for tensor in binding.whole_plan.tensors}
    if strange := {tensor.name for tensor in plan.tensors} ^ tensors:
        raise _other_graph(strange)
    return binding


def _kind(plan: Plan, name: str) -> str:
    return next(site.kind for site in plan.sites if site.name == name)


def _bind(model: Model, plan: Plan, layer: tuple[int, ...]) -> Binding:
    """Bind the part of a whole plan that is in a model, for one layer of the scans around it."""
    # Bodies first: what they store is what the graph around reads.
    bodies = {
        index: tuple(_bind_body(body, plan, layer) for body in inside)
        for index, inside in model.bodies.items()
    }
    binding = _bind_graph(model, part_of(plan, model, layer), _stored_inside(model, bodies))
    return dataclasses.replace(binding, bodies=bodies, layer=layer)


def _stored_inside(
    model: Model, bodies: Mapping[int, tuple[BoundBody, ...]]
) -> dict[ir.Var, Restored]:
    """How the operands of loops and choices follow from what is stored for the sites in these."""
    found = {}
    for body in (body for inside in bodies.values() for body in inside):
        restored = body.layers[0].restorable
        for leaf, operand in body.model.leaf_operands.items():
            if leaf in restored:
                # What a scan reads slice by slice is stored whole.
                slices = model.graph.shape(operand)[0] if leaf in body.model.sliced else None
                site, inside = restored[leaf].site, restored[leaf]
                found[operand] = Restored(site, model.graph, (), inside, slices)
    return found


def _bind_body(body: Model, plan: Plan, around: tuple[int, ...]) -> BoundBody:
    """Bind the layers of a body, for one layer of the scans around it."""
    layer, *others = layers_of(body, around)
    first = _bind(body, plan, layer)
    # Bodies inside differ from layer to layer in turn, so that each layer is bound by itself.
    if first.bodies:
        return BoundBody(body, (first, *(_bind(body, plan, other) for other in others)))

    # Else only the grids differ, and the search for forms is done once.
    rest = (
        dataclasses.replace(first.with_tensors(part_of(plan, body, other).tensors), layer=other)
        for other in others
    )
    return BoundBody(body, (first, *rest))


def layers_of(body: Model, around: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The layers of a body, for one layer of the scans around it."""
    if body.layers is None:
        return [around]
    return [(*around, number) for number in range(body.layers)]


def part_of(plan: Plan, model: Model, layer: tuple[int, ...]) -> Plan:
    """The part of a whole plan in a model's own graph, its tensors with their plain names."""
    own = {site.name for site in model.sites if not is_elsewhere(model, site)}
    # Names end in the layer's number in the whole plan, and have none in a graph.
    suffix = layer_suffix(layer)
    entries = {f"{name}{suffix}" for name in model.names.values()}
    return dataclasses.replace(
        plan,
        sites=tuple(site for site in plan.sites if site.name in own),
        tensors=tuple(tensor.by_itself() for tensor in plan.tensors if tensor.name in entries),
    )


def is_elsewhere(model: Model, site: Site) -> bool:
    """True for a site that is in a body of its own model."""
    return bool(site.inside) and site.name in model.in_bodies


def _bind_graph(model: Model, plan: Plan, inside: Mapping[ir.Var, Restored]) -> Binding:
    """Bind what is in a model's own graph; for `inside` see `jaxquant.plan.restore.restorable`."""
    graph, mode = model.graph, MODES[plan.mode]
    planned = {site.name: site for site in plan.sites}
    found = [_as_planned(site, planned) for site in model.sites if not is_elsewhere(model, site)]

    _check_sites(found, planned)

    chosen, forms = _forms_of(model, plan, found, planned)
    names = model.names

    # The graph decides about tensors, the plan about numbers: both name the same ones, or differ.
    entries = {var: names[var] for var in forms.entries}
    if set(entries.values()) != {tensor.name for tensor in plan.tensors}:
        raise _other_graph(set(entries.values()) ^ {tensor.name for tensor in plan.tensors})

    bound = []
    by_behaviour = {behaviours.PICK: set[int](), behaviours.DECIDE: set[int]()}
    for site in chosen:
        behaviour = behaviours.behaviour_of(site.kind, graph.equations[site.equation])
        if behaviour in (behaviours.ACCUMULATE, behaviours.LOOK_UP):
            bound.append(_bind_site(graph, site, planned[site.name], mode))
        elif behaviour in by_behaviour:
            by_behaviour[behaviour].add(site.equation)

    # An int8 tensor that is handed on has the scale of the one that it began as.
    scales = {var: names[entry] for var, entry in forms.heads.items()}
    zero_points, per_channel = on_grids(scales, plan.tensors)
    return Binding(
        model,
        plan,
        tuple(bound),
        frozenset(by_behaviour[behaviours.PICK]),
        frozenset(by_behaviour[behaviours.DECIDE]),
        forms,
        entries,
        scales,
        zero_points,
        restorable(graph, [each.site for each in bound], mode.integer, inside),
        per_channel,
    )


def _forms_of(
    model: Model, plan: Plan, found: Sequence[Site], planned: Mapping[str, SitePlan]
) -> tuple[list[Site], Forms]:
    """The sites that are int8, and the int8 forms that follow from them."""
    # Found again, not stored: the plan says what sites are, and the rest follows.
    chosen = [s for s in found if s.name in planned and planned[s.name].status == INT8]
    # Sites that were left in float hand no int8 through, as when the plan was made.
    left = [s for s in found if s.name in planned and planned[s.name].status != INT8]
    barred = {site.equation for site in left if not (site.inside or site.is_lookup)}

    # What is scaled in the call makes no tensor int8.
    static = [site for site in chosen if not (site.is_lookup or planned[site.name].dynamic)]
    read = static if MODES[plan.mode].tensor_scales else ()
    return chosen, find_forms(model, read, plan.kinds, barred, plan.target == LITERT)


def _check_sites(found: Sequence[Site], planned: Mapping[str, SitePlan]) -> None:
    """Raise ValueError where a graph has other sites than the plan, or of other kinds."""
    here = {site.name: site for site in found}
    differing = [
        name
        for name, plan_of_site in planned.items()
        # Which rearrangements there are may depend on the batch; the int8 tensors are compared.
        if not kinds.is_layout(plan_of_site.kind)
        and (name not in here or not _is_kind(here[name], plan_of_site))
    ]
    dots = [site for site in found if site.kind in kinds.DOT_KINDS]
    differing += [site.name for site in dots if site.name not in planned]
    if differing:
        raise _other_graph(differing)


def _bind_site(graph: ir.Graph, site: Site, planned: SitePlan, mode: Mode) -> Int8Site:
    """A site with its epilogue, which has to be the planned one."""
    # As many steps as were planned: another batch size may let the chain go on.
    epilogue = find_epilogue(graph, site, steps_at_most=len(planned.affine))
    known = fingerprint(graph, site, epilogue) == planned.fingerprint
    if epilogue.affine != planned.affine or not known:
        raise _other_graph([site.name])
    is_dynamic = not (mode.tensor_scales or site.is_lookup) or planned.dynamic
    return Int8Site(site, epilogue, is_dynamic, planned.asymmetric)


def _is_kind(site: Site, planned: SitePlan) -> bool:
    """True for a site of the planned kind.

    `jax.vmap` of a convolution with its kernel makes a group of each sample, whose number tells
    what kind of convolution it is.
    """
    # By a group for each sample `vmap` makes either kind of the other.
    convolutions = {"conv2d", "depthwise_conv2d"}
    alike = planned.computes_weight and {site.kind, planned.kind} <= convolutions
    return alike or site.kind == planned.kind


def _as_planned(site: Site, planned: Mapping[str, SitePlan]) -> Site:
    """The site, its weight stored or computed as it is in the plan: one trace does not tell."""
    if site.name not in planned or site.weight is None:
        return site
    return dataclasses.replace(site, computes_weight=planned[site.name].computes_weight)


def _other_graph(names: Sequence[str] | set[str]) -> ValueError:
    return ValueError(
        "these inputs give another graph than the one that was quantized; "
        f"the sites {', '.join(sorted(set(names))[:5])} differ. A model that computes something "
        "else for this input shape or structure has to be quantized with such a sample"
    )
