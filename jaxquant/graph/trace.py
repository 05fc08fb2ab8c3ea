"""Trace a function of (params, *inputs) into a Graph: calls inlined, static tensors marked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import contraction, flax_tags, ir, meshes, picked, symbolic, whiles
from jaxquant.graph.calls import ModelError, check_call
from jaxquant.graph.marks import unmarked
from jaxquant.graph.refused import hint_of, refuse_updates
from jaxquant.graph.tables import with_looked_up_rows
from jaxquant.graph.tied import find_tables, with_tied_tables
from jaxquant.jax_shim import jaxprs

# What JAX puts where it inlines a call that gives what it is given, or ends in a named function
# (`jax.nn.gelu`): nothing is computed, and one tensor with two names would look like two.
_COPIES = frozenset({"copy", "copy_p"})


def trace(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    *,
    differentiable: bool = False,
) -> ir.Graph:
    """Trace `apply_fn(params, *inputs)`; arrays and `ShapeDtypeStruct`s are both taken.

    Args:
      apply_fn: a pure function of the parameters and the inputs.
      params: pytree of arrays (nested dicts, `FrozenDict`, `nnx.State`, ...).
      inputs: the positional arguments after `params`, each a pytree of arrays.
      differentiable: keep calls with their own derivative rule that hold no convolution and no dot
        (ReLU is one), instead of inlining them.

    Returns:
      The graph; its `leaves` follow the order of `jax.tree.leaves(params)`.

    Raises:
      CallError: `apply_fn` takes another number of inputs.
      ModelError: `apply_fn` lacks variables, needs a PRNG key or updates variables.
      Exception: whatever `apply_fn` raises about these inputs.
    """
    check_call(apply_fn, inputs)
    # Shapes alone: the trace reads no value, so that a plan never depends on one by accident.
    param_structs = jax.tree.map(ir.struct, params)
    input_structs = jax.tree.map(ir.struct, tuple(inputs))
    try:
        # Without jit JAX would write loops step by step: another graph.
        with flax_tags.tagging(), jax.disable_jit(False):
            closed, out_shape = jax.make_jaxpr(apply_fn, return_shape=True)(
                param_structs, *input_structs
            )
    except Exception as error:
        hint = hint_of(error, params)
        if hint is None:
            raise
        raise ModelError(hint) from error
    refuse_updates(params, out_shape)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    n_inputs = len(jax.tree.leaves(input_structs))
    builder = _Builder(differentiable)
    invars = [builder.source(var.aval, path) for var, path in zip(closed.jaxpr.invars, paths)]
    given = [builder.new(var.aval, static=False) for var in closed.jaxpr.invars[len(paths) :]]
    if len(given) != n_inputs:
        raise AssertionError("the trace has another number of inputs than the arguments")
    outputs = builder.inline(closed.jaxpr, closed.consts, [*invars, *given], _Place())
    builder.classes = flax_tags.nnx_classes(apply_fn, params)
    # Forms that JAX writes in roundabout ways are brought back before anything looks for sites.
    graph = builder.graph(invars, given, outputs, jax.tree.structure(out_shape))
    return with_tied_tables(with_looked_up_rows(symbolic.restore_slices(graph)))


def trace_body(
    outer: ir.Graph, eqn: ir.Equation, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]
) -> tuple[ir.Graph, tuple[ir.Var, ...]]:
    """The graph of a control-flow body, and the tensors that its operands become, in their order.

    `operands` are the atoms of `outer` that feed the body, or None where what feeds it is not an
    operand (a loop's carry, an index).  One that is computed from parameters becomes a leaf, named
    after the largest of them; the others become inputs.
    """
    builder = _Builder(outer.differentiable)
    invars: list[ir.Var] = []
    leaves: list[ir.Var] = []
    for var, operand in zip(jaxpr.invars, operands, strict=True):
        is_static = isinstance(operand, int) and outer.static[operand]
        # What comes of parameters is one inside too, so that its sites have paths.
        if is_static and outer.sources(operand):
            leaves.append(builder.source(var.aval, path_of(outer, operand)))
            invars.append(leaves[-1])
        else:
            invars.append(builder.new(var.aval, static=False))
    outputs = builder.inline(jaxpr, consts, invars, _Place(eqn.scope))
    inputs = [var for var in invars if var not in leaves]
    # A table outside is one inside too, though the body may see but a product with it.
    outside = find_tables(outer)
    tables = [v for v, x in zip(invars, operands, strict=True) if v in leaves and x in outside]
    graph = builder.graph(leaves, inputs, outputs, None)
    graph = with_looked_up_rows(symbolic.restore_slices(graph))
    return with_tied_tables(graph, tables), tuple(invars)


def path_of(graph: ir.Graph, var: ir.Var) -> str:
    """The path that a static tensor is named after: that of the largest parameter in it, or "".

    What is put together of the pieces of a parameter that is cut has the path of the whole.
    """
    sources = graph.sources(var)
    if not sources:
        return ""
    leaf = largest(graph, sources)
    shape = graph.shape(leaf)
    return graph.paths[leaf] if leaf == var or not shape else unmarked(graph.paths[leaf], shape[0])


def largest(graph: ir.Graph, sources: Sequence[ir.Var]) -> ir.Var:
    """The parameter with the most elements, the first of equals; of constants where there is none.

    A constant may have the size of the batch, so that it must not decide beside a parameter.
    """

    def rank(var: ir.Var) -> tuple[bool, int, int]:
        return var not in graph.constants, math.prod(graph.shape(var)), -var

    return max(sources, key=rank)


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as 'a/b/c'."""
    return "/".join(path_parts(path))


def path_parts(path: Sequence[Any]) -> tuple[str, ...]:
    """The components of a key path; the `.value` of an nnx variable is left out.

    A pytree that is one array has the path ("param",).
    """
    parts = []
    for entry in path:
        # JAX's keys are of dicts, of attributes, and of sequences.
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                parts.append(str(getattr(entry, attribute)))
                break
        else:
            parts.append(str(entry))
    if len(parts) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and parts[-1] == "value":
        parts.pop()
    return tuple(parts) or ("param",)


class _Place(NamedTuple):
    """Where in the user's code an equation is.

    Attributes:
      scope: the name scopes around it, "a/b".
      calls: the calls around it, each by its name and the number of equations before it.
      source: where the outermost call is; None outside of calls.  JAX traces the body of a call
        once, so its equations tell where the first of all calls was.
    """

    scope: str = ""
    calls: tuple[str | int, ...] = ()
    source: Any = None

    def at(self, eqn: Any) -> _Place:
        """The place of an equation here."""
        scope = "/".join(s for s in (self.scope, jaxprs.scope_of(eqn)) if s)
        return _Place(scope, self.calls, eqn.source_info if self.source is None else self.source)

    def inside(self, name: str, number: int) -> _Place:
        """The place of what a call holds."""
        return self._replace(calls=(*self.calls, name, number))


def _read(env: Mapping[Any, ir.Atom], atom: Any) -> ir.Atom:
    if isinstance(atom, jaxprs.Literal):
        return ir.Literal(np.asarray(atom.val, dtype=jaxprs.dtype_of(atom)))
    return env[atom]


@dataclasses.dataclass
class _Builder:
    differentiable: bool
    avals: list[Any] = dataclasses.field(default_factory=list)
    static: list[bool] = dataclasses.field(default_factory=list)
    equations: list[ir.Equation] = dataclasses.field(default_factory=list)
    constants: dict[ir.Var, Any] = dataclasses.field(default_factory=dict)
    paths: dict[ir.Var, str] = dataclasses.field(default_factory=dict)
    classes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def new(self, aval: Any, *, static: bool) -> ir.Var:
        self.avals.append(aval)
        self.static.append(static)
        return len(self.avals) - 1

    def source(self, aval: Any, path: str) -> ir.Var:
        var = self.new(aval, static=True)
        self.paths[var] = path
        return var

    def inline(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[ir.Atom], place: _Place
    ) -> list[ir.Atom]:
        """Add the equations of a jaxpr, those of calls in place of the calls; gives its results."""
        env: dict[Any, ir.Atom] = dict(zip(jaxpr.invars, args, strict=True))
        env.update(zip(jaxpr.constvars, self._sources_of(jaxpr.constvars, consts), strict=True))
        for eqn in jaxpr.eqns:
            operands = [_read(env, x) for x in eqn.invars]
            here = place.at(eqn)
            results = self._inlined(eqn, operands, here)
            if results is None:
                results = self._add(eqn, operands, here)
            env.update(zip(eqn.outvars, results, strict=True))
        return [_read(env, x) for x in jaxpr.outvars]

    def _sources_of(self, constvars: Sequence[Any], consts: Sequence[Any]) -> list[ir.Var]:
        """The tensors of constants, which have names as parameters have them."""
        found = []
        for var, const in zip(constvars, consts, strict=True):
            found.append(self.source(var.aval, f"constant_{len(self.constants)}"))
            self.constants[found[-1]] = const
        return found

    def _inlined(
        self, eqn: Any, operands: Sequence[ir.Atom], here: _Place
    ) -> Sequence[ir.Atom] | None:
        """The results of an equation that others stand for; None where it stands for itself."""
        # A call that means nothing by itself (jit, remat): what it calls stands in its place.
        body = jaxprs.inlined_body(eqn)
        if body is not None and not self.keeps(eqn):
            name = str(eqn.params.get("name", eqn.primitive.name))
            return self.inline(*body, operands, here.inside(name, len(self.equations)))

        # A scan over layers and a map over devices are written so that their weights are found.
        if (other := self._written_anew(eqn, operands)) is not None:
            return self.inline(other.jaxpr, other.consts, operands, here)
        return operands if _is_copy(eqn) else None

    def _add(self, eqn: Any, operands: Sequence[ir.Atom], here: _Place) -> tuple[ir.Var, ...]:
        """The results of one equation of the graph, static if all that it reads is."""
        static = all(isinstance(x, ir.Literal) or self.static[x] for x in operands)
        outputs = tuple(self.new(var.aval, static=static) for var in eqn.outvars)
        # Flax writes modules into the scope; sites are named without their classes.
        plain_scope, modules = flax_tags.split_scope(here.scope)
        self.equations.append(
            ir.Equation(
                len(self.equations),
                eqn.primitive,
                tuple(operands),
                outputs,
                eqn.params,
                plain_scope,
                here.calls,
                modules,
                here.source,
            )
        )
        return outputs

    def _written_anew(self, eqn: Any, operands: Sequence[ir.Atom]) -> jaxprs.ClosedJaxpr | None:
        """What an equation computes in another form, whose weights are found; None for others."""
        if eqn.primitive.name == "scan":
            return self._as_layers(eqn, operands)
        other_form = _OTHER_FORMS.get(eqn.primitive.name)
        return None if other_form is None else other_form(eqn)

    def _as_layers(self, eqn: Any, operands: Sequence[ir.Atom]) -> jaxprs.ClosedJaxpr | None:
        """A scan with the weights that it picks by its numbers as layers; None for another."""
        is_weight = [
            isinstance(x, int)
            and self.static[x]
            and jnp.issubdtype(self.avals[x].dtype, jnp.floating)
            for x in operands
        ]
        return picked.as_layers(eqn, is_weight, [self._number(x) for x in operands])

    def _number(self, atom: ir.Atom) -> np.ndarray | None:
        """A few integers that follow from nothing, as the numbers of layers; None for others."""
        if isinstance(atom, ir.Literal):
            return atom.value if picked.is_number(atom.value) else None
        if not self.static[atom] or not picked.is_number(self.avals[atom]):
            return None
        if atom in self.constants:
            return np.asarray(self.constants[atom])
        producer = next((eqn for eqn in self.equations if atom in eqn.outputs), None)
        if producer is None:
            return None
        operands = [self._number(x) for x in producer.inputs]
        if any(x is None for x in operands):
            return None
        # `layers - 1 - i`, say: computed now, since the numbers say which weight each step takes.
        with jax.ensure_compile_time_eval():
            results = jaxprs.bind(producer.primitive, operands, dict(producer.params))
        return np.asarray(results[producer.outputs.index(atom)])

    def keeps(self, eqn: Any) -> bool:
        """Whether a call stays one equation, for the sake of its derivative rule."""
        return self.differentiable and jaxprs.has_custom_derivative(eqn) and not _holds_site(eqn)

    def graph(
        self,
        leaves: Sequence[ir.Var],
        inputs: Sequence[ir.Var],
        outputs: Sequence[ir.Atom],
        out_tree: Any,
    ) -> ir.Graph:
        return ir.Graph(
            avals=tuple(self.avals),
            equations=tuple(self.equations),
            leaves=tuple(leaves),
            inputs=tuple(inputs),
            constants=dict(self.constants),
            outputs=tuple(outputs),
            paths=dict(self.paths),
            static=tuple(self.static),
            out_tree=out_tree,
            classes=self.classes,
            differentiable=self.differentiable,
        )


def _is_copy(eqn: Any) -> bool:
    """Whether an equation gives what it is given, so that nothing is computed.

    A sum over no axes does, which `jnp.sum` of a scalar is under `jax.vmap`.  Exported, it would be
    a sum over all axes: runtimes take no axes for that.
    """
    is_reduction = eqn.primitive.name.startswith("reduce_") and "axes" in eqn.params
    return eqn.primitive.name in _COPIES or (is_reduction and not eqn.params["axes"])


def _holds_site(eqn: Any) -> bool:
    inside = jaxprs.sub_bodies(eqn.params)
    return eqn.primitive.name in contraction.PRIMITIVES or any(
        whiles.holds_product(jaxpr) for _, jaxpr, _ in inside
    )


_OTHER_FORMS = {"shard_map": meshes.as_batches, "while": whiles.with_test_in_body}
