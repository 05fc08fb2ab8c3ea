"""Loops and choices: scan, while and cond become Scan, Loop and If.

A body is a graph of its own, with int8 sites or without, which may read what was emitted before it;
everything that it takes and gives has its axes in order and all its copies.  Scans over stacked
weights that are int8 are none of these: they are unrolled (`jaxquant.deploy.to_network`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Value, straight
from jaxquant.deploy.network import Atom, Body, Node, Var
from jaxquant.deploy.onnx import whole_numbers
from jaxquant.deploy.onnx.elementwise import ONNX_TYPES, onnx_dtype
from jaxquant.deploy.onnx.emitter import Emitter


def emit(e: Emitter, node: Node, values: Sequence[Value]) -> list[Value]:
    """The results of a loop or a choice; `values` are its operands, with all their copies."""
    values = [e.builder.ordered(value, straight(value.rank)) for value in values]
    names = _EMITTERS[node.op](e, node, values)
    return [
        Value(name, e.shape(var), straight(len(e.shape(var))))
        for name, var in zip(names, node.outputs, strict=True)
    ]


def _scan(e: Emitter, node: Node, values: list[Value]) -> list[str]:
    b, (body,) = e.builder, node.bodies
    consts, carries = node.params["num_consts"], node.params["num_carry"]
    for var, value in zip(body.inputs[:consts], values[:consts], strict=True):
        e.set_input(var, value)
    varying, names = body.inputs[consts:], [value.name for value in values[consts:]]
    # What each step reads alike is read from the outer graph, as ONNX allows.
    graph = _graph(e, body, varying, body.outputs, [])
    columns, stacks = len(varying) - carries, len(body.outputs) - carries
    if not columns:  # a number of rounds alone: Scan takes it of a tensor that it goes along
        rounds = whole_numbers.counted(b, node.params["length"])
        names.append(whole_numbers.name_of(b, rounds))
        graph.input.append(_number(e, "round", "int64"))
        columns = 1
    reverse = int(bool(node.params["reverse"]))
    attributes: dict[str, Any] = {"body": graph, "num_scan_inputs": columns}
    attributes["scan_input_directions"] = [reverse] * columns
    if stacks:  # an attribute without elements would have no type
        attributes["scan_output_directions"] = [reverse] * stacks
    return b.split_node("Scan", names, len(body.outputs), **attributes)


def _while(e: Emitter, node: Node, values: list[Value]) -> list[str]:
    b, bodies = e.builder, {body.key: body for body in node.bodies}
    condition, body = bodies["cond_jaxpr"], bodies["body_jaxpr"]
    n_condition, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
    carried = values[n_condition + n_body :]
    for each, consts in (
        (condition, values[:n_condition]),
        (body, values[n_condition : n_condition + n_body]),
    ):
        for var, value in zip(each.inputs, consts, strict=False):
            e.set_input(var, value)
    first = _inlined(e, condition, condition.inputs[n_condition:], carried)
    varying = body.inputs[n_body:]
    # A body says itself, in its first output, whether there is another round.
    counter = [_number(e, "round", "int64"), _number(e, "again", "bool")]
    graph = _graph(e, body, varying, body.outputs, counter, (condition, n_condition))
    names = [value.name for value in carried]
    return b.split_node("Loop", ["", first[0].name, *names], len(names), body=graph)


def _cond(e: Emitter, node: Node, values: list[Value]) -> list[str]:
    """Branch 0 where the index is 0, or smaller; else the others, the last from its number on."""
    index, operands = values[0], values[1:]
    for body in node.bodies:
        for var, value in zip(body.inputs, operands, strict=True):
            e.set_input(var, value)
    return _choice(e, index.name, list(node.bodies), 0)


def _choice(e: Emitter, index: str, bodies: Sequence[Body], number: int) -> list[str]:
    b, count = e.builder, len(bodies[0].outputs)
    if len(bodies) == 1:
        with b.subgraph() as nodes:
            names = [_output(e, bodies[0], atom).name for atom in bodies[0].outputs]
        b.nodes += nodes
        return names
    # ONNX has If alone: a choice of several is one inside the other.
    is_this = b.node("LessOrEqual", [index, b.constant(np.int32(number), "branch")])
    this = _graph(e, bodies[0], (), bodies[0].outputs, [])
    with b.subgraph() as nodes:
        if len(bodies) == 2:
            names = [_identity(e, value) for value in _inlined(e, bodies[1], (), ())]
        else:
            names = _choice(e, index, bodies[1:], number + 1)
    infos = [_info(e, name, atom) for name, atom in zip(names, bodies[1].outputs, strict=True)]
    other = b.onnx.helper.make_graph(nodes, b.unique("branch"), [], infos)
    return b.split_node("If", [is_this], count, then_branch=this, else_branch=other)


def _inlined(e: Emitter, body: Body, inputs: Sequence[Var], values: Sequence[Value]) -> list[Value]:
    """The results of a body, added to the graph that is being built."""
    for var, value in zip(inputs, values, strict=True):
        e.set_input(var, value)
    e.emit(body.nodes)
    return [_output(e, body, atom) for atom in body.outputs]


def _graph(
    e: Emitter,
    body: Body,
    varying: Sequence[Var],
    outputs: Sequence[Atom],
    counter: Sequence[Any],
    condition: tuple[Body, int] | None = None,
) -> Any:
    """A body as a graph with inputs.

    Args:
      e: the emitter.
      body: what is repeated.
      varying: the inputs that each round sets.
      outputs: what it gives.
      counter: further inputs in front.
      condition: what says of these results whether there is another round, the first output then,
        and how many constants it takes.
    """
    b = e.builder
    infos, values = list(counter), []
    for var in varying:
        shape = e.shape(var)
        values.append(Value(b.unique("carried"), shape, straight(len(shape))))
        infos.append(_info(e, values[-1].name, var))
    with b.subgraph() as nodes:
        results = _inlined(e, body, varying, values)
        names = [_identity(e, value) for value in results]
        ends = [_info(e, name, atom) for name, atom in zip(names, outputs, strict=True)]
        # ONNX asks for the test of the next round at the end of each one.
        if condition is not None:
            test, consts = condition
            (again,) = _inlined(e, test, test.inputs[consts:], results)
            names.insert(0, _identity(e, again))
            ends.insert(0, _info(e, names[0], test.outputs[0]))
    return b.onnx.helper.make_graph(nodes, b.unique("body"), infos, ends)


def _output(e: Emitter, body: Body, atom: Atom) -> Value:
    """A result of a body, with all its copies and its axes in order."""
    value = e.value(atom)
    if isinstance(atom, int):
        value = e.full(value, atom)
    return e.builder.ordered(value, straight(value.rank))


def _identity(e: Emitter, value: Value) -> str:
    """A name of its own: a graph may not give what another one made."""
    return e.builder.node("Identity", [value.name])


def _number(e: Emitter, name: str, dtype: str) -> Any:
    """An input of a body that is one number."""
    helper = e.builder.onnx.helper
    return helper.make_tensor_value_info(e.builder.unique(name), ONNX_TYPES[dtype], [])


def _info(e: Emitter, name: str, atom: Atom) -> Any:
    shape = list(e.shape(atom)) if isinstance(atom, int) else []
    try:
        code = ONNX_TYPES[onnx_dtype(e.dtype(atom))]
    except NotCovered as error:
        raise NotCovered(f"{error} in a loop") from None
    return e.builder.onnx.helper.make_tensor_value_info(name, code, shape)


_EMITTERS = {"scan": _scan, "while": _while, "cond": _cond}
TABLE = dict.fromkeys(_EMITTERS, emit)
