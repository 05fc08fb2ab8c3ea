"""What the devices of a `shard_map` compute, beside each other in one graph.

The body of a `shard_map` is what one device computes of its parts of the operands.  Here it is
written as `jax.vmap` over the axes of the mesh: an operand has a leading axis for each axis of the
mesh that it is split over, `psum` sums along one, `axis_index` counts along it.  So a product in it
is a product like any other: one whose weight is split over channels has the channels of all
devices, and a `psum` of one whose weight is split along what is summed over is part of the
product's own sum.  Its integers are summed then, and weights and activations have the scales that
they have on one device.

Nothing there is bound to devices: where its arrays are sharded, XLA's partitioner splits what reads
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxquant.graph import contraction, whiles
from jaxquant.jax_shim import jaxprs, mesh_maps
from jaxquant.jax_shim.jaxprs import Place
from jaxquant.jax_shim.mesh_maps import MeshMap, Split

# They tell the type checker of a `shard_map` where values differ, and compute nothing.
_CASTS = frozenset({"pvary", "reduced_vary_cast", "reduced_vary_cast_p"})
# Between devices, with a form along an axis.
_REDUCTIONS = {
    "pmax": jax.lax.reduce_max,
    "pmin": jax.lax.reduce_min,
    "psum": jax.lax.reduce_sum,
}
_COLLECTIVES = frozenset(
    {"all_gather", "all_to_all", "axis_index", "ppermute", "reduce_scatter", *_REDUCTIONS}
)
_OPENED = frozenset({"shard_map", "scan", "while", "cond", *jaxprs.inlined_calls()})
# What may stand between a product and the sum of it over devices.
_LINEAR = frozenset({"convert_element_type", "reshape", "squeeze", "transpose"})
_INVARIANT = "_invariant"  # behind the names of collectives whose results are alike on all devices


def as_batches(eqn: jaxprs.JaxprEqn) -> jaxprs.ClosedJaxpr | None:
    """What a `shard_map` computes, with the devices along axes of its tensors.

    Args:
      eqn: the `shard_map`.

    Returns:
      A function of the same operands; None where something in it has no such form.
    """
    # A quick look, before anything is traced.
    if _without_form(eqn.params):
        return None
    shapes = [jax.ShapeDtypeStruct(jaxprs.shape_of(x), jaxprs.dtype_of(x)) for x in eqn.invars]
    try:
        return jax.make_jaxpr(lambda *operands: _run(eqn.params, operands))(*shapes)
    except NotImplementedError:  # something in it has no batching rule
        return None


def why_kept(params: Mapping[str, Any]) -> str:
    """Why a `shard_map` stays as it is, of its parameters."""
    name = _without_form(params) or "something in it"
    return f"{name} has no form in which the devices are an axis"


def _without_form(params: Mapping[str, Any]) -> str:
    """A primitive in a `shard_map` that is known to have no form along an axis; or ""."""
    stack = [mesh_maps.mesh_map(params).body]
    while stack:
        for eqn in stack.pop().eqns:
            name = str(eqn.primitive.name)
            # An unknown call may hold collectives that nobody sees.
            inside = [jaxpr for _, jaxpr, _ in jaxprs.sub_bodies(dict(eqn.params))]
            if inside and name not in _OPENED:
                return name
            # Only what names an axis meets other devices.
            if not inside and mesh_maps.names_axes(eqn):
                if name.removesuffix(_INVARIANT) not in _COLLECTIVES:
                    return name
                if eqn.params.get("axis_index_groups") is not None:
                    return f"{name} with axis_index_groups"
            stack += inside
    return ""


def _run(params: Mapping[str, Any], operands: Sequence[Any]) -> list[Any]:
    """The results of a `shard_map` with these parameters, of whole operands."""
    mesh_map = mesh_maps.mesh_map(params)
    axes = tuple(mesh_map.sizes)
    parts = [_split(x, s, mesh_map) for x, s in zip(operands, mesh_map.operands, strict=True)]

    # Which results differ along which axes shows a first trace.  Along an axis that a result is not
    # split over it should not differ; where it does, the first device's is taken.
    differing: list[frozenset[str]] = []

    def of_one_device(*args: Any) -> list[Any]:
        with mesh_maps.without_name_stack():
            results = _interpret(mesh_map.body, (), args)
        differing[:] = map(mesh_maps.mapped_axes, results)
        return results

    def of_all(results: Sequence[frozenset[str]]) -> list[Any]:
        """The results, each with a leading axis for every one of its axes of the mesh."""
        function = of_one_device
        for axis in reversed(axes):
            # From the innermost axis out; `psum` and the others then go by the vmap's axis name.
            function = jax.vmap(
                function,
                in_axes=tuple(0 if axis in split.axes else None for split in mesh_map.operands),
                out_axes=[0 if axis in each else None for each in results],
                axis_name=axis,
                axis_size=mesh_map.sizes[axis],
            )
        return function(*parts)

    # By shapes alone: this trace only tells which results differ along which axes.
    jax.eval_shape(lambda: of_all([frozenset(axes)] * len(mesh_map.results)))
    along = [split.axes | own for split, own in zip(mesh_map.results, differing, strict=True)]
    return [
        _joined(x, split, [axis for axis in axes if axis in there], mesh_map)
        for x, split, there in zip(of_all(along), mesh_map.results, along, strict=True)
    ]


def _split(x: jax.Array, split: Split, mesh_map: MeshMap) -> jax.Array:
    """An operand's parts, along leading axes in the order of the mesh's."""
    shape: list[int] = []
    place: dict[str, int] = {}
    # A dimension that is split becomes the devices' axes and what each has of it.
    for size, names in zip(x.shape, split.by_dimension(x.ndim), strict=True):
        for name in names:
            place[name] = len(shape)
            shape.append(mesh_map.sizes[name])
        shape.append(size // mesh_map.number(names))
    first = [place[axis] for axis in mesh_map.sizes if axis in place]
    rest = [k for k in range(len(shape)) if k not in first]
    return x.reshape(shape).transpose(first + rest) if first else x


def _joined(x: jax.Array, split: Split, axes: Sequence[str], mesh_map: MeshMap) -> jax.Array:
    """A result, of its parts along leading axes."""
    picked = tuple(slice(None) if axis in split.axes else 0 for axis in axes)
    # Along an axis that a result is not split over all devices have the same.
    if any(each == 0 for each in picked):
        x = x[picked]
    left = [axis for axis in axes if axis in split.axes]
    if not left:
        return x
    order: list[int] = []
    shape: list[int] = []
    for k, names in enumerate(split.by_dimension(x.ndim - len(left))):
        order += [*(left.index(name) for name in names), len(left) + k]
        shape.append(x.shape[len(left) + k] * mesh_map.number(names))
    return x.transpose(order).reshape(shape)


class _Deferred(NamedTuple):
    """A dot that is not computed yet, so that a sum over devices may be one sum with its own.

    Attributes:
      factors: what it multiplies.
      params: of the `dot_general`.
      behind: the equations that rearrange or cast its result.
    """

    factors: tuple[jax.Array, jax.Array]
    params: Mapping[str, Any]
    behind: tuple[jaxprs.JaxprEqn, ...] = ()

    def value(self, axes: Sequence[str] = ()) -> jax.Array:
        """The result, summed over some axes of the mesh."""
        lhs, rhs = self.factors
        # All factors beside each other, so that the devices' sum is one more axis of the product's.
        for axis in axes:
            lhs, rhs = jax.lax.all_gather(lhs, axis), jax.lax.all_gather(rhs, axis)
        params = contraction.summed_over_leading(self.params, len(axes))
        (value,) = jaxprs.bind(jax.lax.dot_general_p, [lhs, rhs], params)
        for eqn in self.behind:
            (value,) = jaxprs.bind(eqn.primitive, [value], _of_one_device(eqn))
        return value


def _interpret(body: jaxprs.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate what one device computes, where the axes of the mesh are those of `jax.vmap`."""
    results = jaxprs.interpret(body, consts, args, _apply, lambda eqn, place: True)
    return [_computed(x) for x in results]


def _apply(eqn: jaxprs.JaxprEqn, place: Place, operands: list[Any]) -> Sequence[Any]:
    """Apply one equation; the result of a dot is a `_Deferred`.

    Loops and choices are made anew: their recorded bodies have the types of values inside a
    `shard_map`.
    """
    name = eqn.primitive.name
    collective = name.removesuffix(_INVARIANT)
    product = operands[0] if operands and isinstance(operands[0], _Deferred) else None
    if name in _CASTS:
        return operands
    # A `psum` of a product is moved into the product, also through what is linear between them.
    if product is not None and name in _LINEAR and len(operands) == 1:
        return [product._replace(behind=(*product.behind, eqn))]
    if product is not None and collective == "psum":
        return [product.value(eqn.params["axes"])]
    # Anything else needs its value now.
    operands = [_computed(x) for x in operands]
    if name == contraction.DOT:
        return [_Deferred((operands[0], operands[1]), _of_one_device(eqn))]
    if name == "shard_map":
        return _run(eqn.params, operands)
    if name in _LOOPS:
        return _LOOPS[name](eqn.params, operands)
    if collective in _REDUCTIONS:
        (x,), reduce = operands, _REDUCTIONS[collective]
        for axis in eqn.params["axes"]:
            # A sum over devices is a sum along the axis that gathering them makes.
            x = reduce(jax.lax.all_gather(x, axis), (0,))
        return [x]
    if name == "all_gather_invariant":
        axis, tiled = eqn.params["all_gather_dimension"], eqn.params["tiled"]
        return [jax.lax.all_gather(operands[0], eqn.params["axis_name"], axis=axis, tiled=tiled)]
    return jaxprs.bind(eqn.primitive, operands, _of_one_device(eqn))


def _computed(x: Any) -> Any:
    return x.value() if isinstance(x, _Deferred) else x


def _of_one_device(eqn: jaxprs.JaxprEqn) -> dict[str, Any]:
    """The parameters of an equation without shardings: inside, a device has its part alone."""
    return {k: None if k in ("sharding", "out_sharding") else v for k, v in eqn.params.items()}


def _scan(params: Mapping[str, Any], operands: Sequence[Any]) -> list[Any]:
    constants, carried = jaxprs.scan_counts(params)
    closed = params["jaxpr"]

    # The body is interpreted too: collectives inside it are of the same mesh.
    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        args = [*operands[:constants], *carry, *slices]
        results = _interpret(closed.jaxpr, closed.consts, args)
        return results[:carried], results[carried:]

    carry, stacked = jax.lax.scan(
        step,
        list(operands[constants : constants + carried]),
        list(operands[constants + carried :]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _while(params: Mapping[str, Any], operands: Sequence[Any]) -> list[Any]:
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    read_by_test, fixed = operands[:of_test], operands[of_test : of_test + of_body]

    def goes_on(carry: Sequence[Any]) -> jax.Array:
        lanes: jax.Array = _interpret(test.jaxpr, test.consts, [*read_by_test, *carry])[0]
        return lanes

    def step(carry: Sequence[Any]) -> list[Any]:
        return _interpret(body.jaxpr, body.consts, [*fixed, *carry])

    start = list(operands[of_test + of_body :])
    # Devices may stop at different steps: those that are done keep what they have.
    if whiles.has_lanes(test):
        return whiles.tested_in_body(goes_on, step, start)
    return jax.lax.while_loop(goes_on, step, start)


def _cond(params: Mapping[str, Any], operands: Sequence[Any]) -> list[Any]:
    index, *values = operands
    branches = [
        lambda *args, b=branch: _interpret(b.jaxpr, b.consts, args) for branch in params["branches"]
    ]
    return list(jax.lax.switch(index, branches, *values))


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
