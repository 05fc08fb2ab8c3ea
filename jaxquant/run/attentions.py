"""Attention between int8 sites, whose integers a TPU holds in floats.

Where the two products of an attention and the softmax between them are int8, there are scores and
weights of int8, which cost a TPU more than the products: to round to int8 and to lay that out takes
longer than to multiply, and does not fuse.  The same integers as floats are multiplied as bfloat16,
which holds them, and their sums in float32 are exact.  By XLA's estimate for TPU v5e, batch 32 of
128 tokens: an attention of 12 heads of 64 with its four dense layers takes 397 thousand cycles with
int8 between them, and 224 with floats.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.backends import in_floats
from jaxquant.graph import evaluate, ir, operators
from jaxquant.plan import layout
from jaxquant.plan.binding import Binding, Int8Site
from jaxquant.run.calls import SiteCall
from jaxquant.run.lowerings import Evaluation, Lowering


class Attention(NamedTuple):
    """The equations of an attention of int8 sites, and of the dense layers that give to it alone.

    Attributes:
      equations: to the end of the second product, in order.
      products: the sites of the two products.
      calls: those of queries, keys and values, as far as nothing else reads what they give.
    """

    equations: tuple[ir.Equation, ...]
    products: tuple[Int8Site, ...]
    calls: tuple[SiteCall, ...]

    @property
    def result(self) -> ir.Var:
        """What the second product gives, as a float."""
        return self.products[-1].epilogue.output

    @property
    def members(self) -> tuple[int, ...]:
        """The indices of its equations; the last one gives the result."""
        return tuple(eqn.index for eqn in self.equations)

    @property
    def inner(self) -> frozenset[ir.Var]:
        """What its equations give, which nothing else reads but for the result."""
        return frozenset(var for eqn in self.equations for var in eqn.outputs)

    @property
    def sites(self) -> tuple[Int8Site, ...]:
        """All of them."""
        return (*self.products, *(call.chain.site for call in self.calls))

    @property
    def operands(self) -> frozenset[ir.Var]:
        """What its sites read in int8."""
        return frozenset(var for each in self.sites for var in each.site.operands)


def find(
    binding: Binding, calls: Mapping[int, SiteCall], others: Collection[int], varies: bool
) -> list[Attention]:
    """The attentions whose integers floats may hold.

    Args:
      binding: the model.
      calls: those that run by themselves, by the index of their last equation.
      others: the indices of equations that run by themselves.
      varies: whether its zero points are known in the call alone.
    """
    graph = binding.graph
    ends = {graph.producer[each.epilogue.output].index: each for each in binding.sites}
    found = []
    for each in operators.find_operators(graph, ("attention",)).values():
        last = [index for index in each.members if index in ends]
        products = tuple(ends[index] for index in last)
        # An addition to the scores or a factor behind the second product may be a part of a site.
        if len(products) != 2 or not all(_fits(binding, site, varies) for site in products):
            continue
        members = {index for index in each.members if index <= last[-1]}
        before = [
            given
            for product in products
            for var in product.site.operands
            if (given := _given(binding, calls, product, var)) is not None
        ]
        members.update(index for _, indices in before for index in indices)
        equations = tuple(graph.equations[index] for index in sorted(members))
        attention = Attention(equations, products, tuple(call for call, _ in before))
        if not (attention.inner & binding.forms.rounded or {*attention.members} & {*others}):
            found.append(attention)
    return found


def _given(
    binding: Binding, calls: Mapping[int, SiteCall], product: Int8Site, var: ir.Var
) -> tuple[SiteCall, set[int]] | None:
    """The call that gives an operand of a product to it alone, in int8 alone.

    With the indices of its equations, and of those that move what it gives; None where there is
    none.
    """
    graph = binding.graph
    members: set[int] = set()
    reader = product.site.equation
    while True:
        read = graph.consumers.get(var, ())
        eqn = graph.producer.get(var)
        if eqn is None or var in graph.output_vars or [each.index for each in read] != [reader]:
            return None
        if eqn.index in calls:
            break
        if var in binding.names or len(eqn.input_vars) != 1:
            return None
        members.add(eqn.index)
        (var,), reader = eqn.input_vars, eqn.index
    chain = calls[eqn.index].chain
    if chain.float_out or chain.is_rounded or chain.grid != var or chain.residual is not None:
        return None
    return calls[eqn.index], members | {*chain.members}


def _fits(binding: Binding, each: Int8Site, varies: bool) -> bool:
    """True of a product of two int8 tensors whose sums float32 holds, whatever they are."""
    site, contraction = each.site, each.site.contraction
    is_dot = contraction is not None and contraction.is_dot and contraction.choosing is None
    if not is_dot or site.weight is not None or each.dynamic or len(site.operands) != 2:
        return False
    assert contraction is not None
    terms = contraction.terms(binding.graph.shape(site.operands[1]))
    zero_points = [-128 if varies else binding.zero_points[var] for var in site.operands]
    return isinstance(terms, int) and in_floats.fits(terms, zero_points)


def lowering(binding: Binding, each: Attention, table: Mapping[int, Lowering]) -> Lowering:
    """What runs in place of an attention: its own lowerings, on integers or on the same in floats.

    Args:
      binding: the model.
      each: the attention.
      table: the lowerings of its equations.
    """
    own = {index: table[index] for index in each.members if index in table}

    def run(state: Evaluation) -> evaluate.Values:
        arrays, tree = jax.tree.flatten(_read(binding, each, state))
        marked: list[ir.Var] = []

        def evaluated(*arrays: jax.Array, holds_floats: bool) -> list[jax.Array]:
            values = jax.tree.unflatten(tree, arrays)
            env = evaluate.Environment(binding.graph, {}, [None] * len(binding.graph.inputs))
            for var, value in values["floats"].items():
                env.write(var, value)
            quantized = state.quantized.apart(env, values["qparams"]["tensors"], holds_floats)
            for var, value in values["integers"].items():
                quantized.put(var, value, var)
            inner = Evaluation(values["qparams"], env, quantized, sums={})
            result = evaluate.run(env, own, inner).wide(each.result)
            marked[:] = sorted(quantized.marks)
            return [result, *(quantized.marks[var] for var in marked)]

        as_they_are = functools.partial(evaluated, holds_floats=False)
        outputs = jax.eval_shape(as_they_are, *arrays)
        result, *marks = in_floats.choose(
            functools.partial(evaluated, holds_floats=True), as_they_are, outputs, arrays
        )
        state.quantized.marks.update(zip(marked, marks, strict=True))
        return {each.result: result}

    return run


def _read(binding: Binding, each: Attention, state: Evaluation) -> dict[str, Any]:
    """What its lowerings read from outside: floats, integers, and arrays of the model."""
    forms = binding.forms
    integers, floats = set(each.operands), set[ir.Var]()
    for eqn in each.equations:
        floats.update(eqn.input_vars)
        if eqn.index in forms.reads_int8:
            integers.update(var for var in eqn.input_vars if var in forms.int8)
    given = sorted(floats - each.inner)
    return {
        "floats": {var: jnp.asarray(state.env.wide(var)) for var in given if var in state.env},
        "integers": {var: state.quantized.int8(var) for var in sorted(integers - each.inner)},
        "qparams": _arrays(binding, each, state.qparams),
    }


def _arrays(binding: Binding, each: Attention, qparams: Mapping[str, Any]) -> dict[str, Any]:
    """Those of its sites, of the weights of its calls, and of the grids of its tensors."""
    names = [each.site.name for each in each.sites]
    read = {var for eqn in each.equations for var in eqn.input_vars} | each.operands
    grids = sorted({binding.scales[var] for var in read if var in binding.forms.int8})
    params: dict[str, Any] = {}
    for call in each.calls:
        layout.put(params, call.slot.int8, layout.get(qparams["params"], call.slot.int8))
    packed = qparams.get("packed", {})
    return {
        "params": params,
        "sites": {name: qparams["sites"][name] for name in names},
        "tensors": {name: qparams["tensors"][name] for name in grids},
        "packed": {name: packed[name] for name in names if name in packed},
    }
