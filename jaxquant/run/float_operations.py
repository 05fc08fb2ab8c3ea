"""Operations of floats between int8 sites that backends run in one pass, or in another form.

What XLA makes of the equations of an attention takes longer than the int8 dots around it, on CPU
and on TPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from jaxquant.backends import platforms
from jaxquant.backends.backend import FloatOperation
from jaxquant.graph import evaluate, ir, operators
from jaxquant.graph.once import once
from jaxquant.plan.binding import Binding
from jaxquant.plan.liveness import live_equations, read_in_float
from jaxquant.run.lowerings import Evaluation, Lowering

KINDS = ("attention", "few_rows", "gelu", "layer_norm", "shares")


def find(
    binding: Binding,
    table: platforms.Table,
    in_float: Collection[int],
    finite: Callable[[ir.Var], bool],
) -> dict[int, tuple[operators.Operator, Lowering]]:
    """The operations that a backend of the table has a form for, by their last equation.

    Args:
      binding: the model.
      table: the backends.
      in_float: the equations that run as they are, of which an operation has to consist.
      finite: whether a tensor holds neither NaN nor infinity, so that it may be quantized without
        a look at it.
    """
    graph, found = binding.graph, {}
    read = read_in_float(binding, live_equations(binding).equations)
    for last, each in _operators(graph, frozenset(in_float)).items():
        result = graph.equations[last].outputs[0]
        others = _others(graph, each)
        operation = _operation(graph, each, others)
        # Where only int8 sites read the result, the kernel rounds it itself and no float is
        # written.
        quantized = dataclasses.replace(operation, is_int8=True)
        has_grid = result in binding.names and result not in binding.per_channel
        if each.kind == "shares" and not has_grid:
            continue  # of a softmax that is no site, as of a classifier
        is_only_int8 = has_grid and result not in read and finite(result)
        # An int8 result first: it saves the float, and the pass that rounds it.
        if is_only_int8 and platforms.covers_operation(table, quantized):
            operation = quantized
        if platforms.covers_operation(table, operation):
            found[last] = each, _lowering(table, (*each.inputs, *others), operation, result)
    return found


@once
def _operators(graph: ir.Graph, within: frozenset[int]) -> dict[int, operators.Operator]:
    return operators.find_operators(graph, KINDS, within)


def _others(graph: ir.Graph, each: operators.Operator) -> tuple[ir.Var, ...]:
    """What its equations read beside its inputs: numbers, which kernels have in its parameters."""
    members = [graph.equations[index] for index in each.members]
    made = {var for eqn in members for var in eqn.outputs}
    read = dict.fromkeys(var for eqn in members for var in eqn.input_vars)
    # What its own equations make is inside, and an input has its place already.
    return tuple(var for var in read if var not in made and var not in each.inputs)


def _operation(
    graph: ir.Graph, each: operators.Operator, others: tuple[ir.Var, ...]
) -> FloatOperation:
    members = [graph.equations[index] for index in each.members]
    result = members[-1].outputs[0]

    def struct(var: ir.Var) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(graph.shape(var), graph.dtype(var))

    # What other backends run, and what a kernel is compared with: the equations as they are.
    def equations(*arrays: jax.Array) -> jax.Array:
        values = dict(zip((*each.inputs, *others), arrays, strict=True))
        nothing = [None] * len(graph.inputs)
        # By `write`: the pattern's inputs may be any tensors, not those of the graph.
        env = evaluate.Environment(graph, {}, nothing)
        for var, value in values.items():
            env.write(var, value)
        read: jax.Array = evaluate.run(env, evaluate.float_table(members), env).read(result)
        return read

    inputs = tuple(struct(var) for var in each.inputs)
    shape, dtype = tuple(graph.shape(result)), graph.dtype(result)
    return FloatOperation(each.kind, each.params, inputs, shape, dtype, equations)


def _lowering(
    table: platforms.Table, read: tuple[ir.Var, ...], operation: FloatOperation, result: ir.Var
) -> Lowering:
    def lowering(state: Evaluation) -> evaluate.Values:
        arrays = [state.env.wide(var) for var in read]
        if not operation.is_int8:
            # A kernel's result lies in memory, so that whoever quantizes it may do so by a kernel
            # too.
            state.quantized.stored.add(result)
            return {result: platforms.run_operation(table, operation, *arrays)}
        quantized = state.quantized
        zero_point = jnp.asarray(quantized.zero_point(result), jnp.int32)
        arrays += [jnp.asarray(quantized.inv_scale(result)), zero_point]
        # Put as the tensor's int8 form, so that nobody quantizes it again.
        quantized.put(result, platforms.run_operation(table, operation, *arrays), result)
        return {}

    return lowering
