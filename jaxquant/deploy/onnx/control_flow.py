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


def emit(emitter: Emitter, node: Node, values: Sequence[Value]) -> list[Value]:
    """The results of a loop or a choice; `values` are its operands, with all their copies."""
    values = [emitter.builder.ordered(value, straight(value.rank)) for value in values]
    names = _EMITTERS[node.op](emitter, node, values)
    return [
        Value(name, emitter.shape(var), straight(len(emitter.shape(var))))
        for name, var in zip(names, node.outputs, strict=True)
    ]


def _scan(emitter: Emitter, node: Node, values: list[Value]) -> list[str]:
    builder, (body,) = emitter.builder, node.bodies
    consts, carries = node.params["num_consts"], node.params["num_carry"]
    for var, value in zip(body.inputs[:consts], values[:consts], strict=True):
        emitter.set_input(var, value)
    varying, names = body.inputs[consts:], [value.name for value in values[consts:]]
    # What each step reads alike is read from the outer graph, as ONNX allows.
    graph = _graph(emitter, body, varying, body.outputs, [])
    columns, stacks = len(varying) - carries, len(body.outputs) - carries
    if not columns:  # a number of rounds alone: Scan takes it of a tensor that it goes along
        rounds = whole_numbers.counted(builder, node.params["length"])
        names.append(whole_numbers.name_of(builder, rounds))
        graph.input.append(_number(emitter, "round", "int64"))
        columns = 1
    reverse = int(bool(node.params["reverse"]))
    attributes: dict[str, Any] = {"body": graph, "num_scan_inputs": columns}
    attributes["scan_input_directions"] = [reverse] * columns
    if stacks:  # an attribute without elements would have no type
        attributes["scan_output_directions"] = [reverse] * stacks
    return builder.split_node("Scan", names, len(body.outputs), **attributes)


def _while(emitter: Emitter, node: Node, values: list[Value]) -> list[str]:
    builder, bodies = emitter.builder, {body.key: body for body in node.bodies}
    condition, body = bodies["cond_jaxpr"], bodies["body_jaxpr"]
    n_condition, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
    carried = values[n_condition + n_body :]
    for each, consts in (
        (condition, values[:n_condition]),
        (body, values[n_condition : n_condition + n_body]),
    ):
        for var, value in zip(each.inputs, consts, strict=False):
            emitter.set_input(var, value)

    # A Loop asks before the first round too, so the test is written once before it.
    first = _inlined(emitter, condition, condition.inputs[n_condition:], carried)
    varying = body.inputs[n_body:]
    # A body says itself, in its first output, whether there is another round.
    counter = [_number(emitter, "round", "int64"), _number(emitter, "again", "bool")]
    graph = _graph(emitter, body, varying, body.outputs, counter, (condition, n_condition))
    names = [value.name for value in carried]
    return builder.split_node("Loop", ["", first[0].name, *names], len(names), body=graph)


def _cond(emitter: Emitter, node: Node, values: list[Value]) -> list[str]:
    """Branch 0 where the index is 0, or smaller; else the others, the last from its number on."""
    index, operands = values[0], values[1:]
    for body in node.bodies:
        for var, value in zip(body.inputs, operands, strict=True):
            emitter.set_input(var, value)
    return _choice(emitter, index.name, list(node.bodies), 0)


def _choice(emitter: Emitter, index: str, bodies: Sequence[Body], number: int) -> list[str]:
    builder, count = emitter.builder, len(bodies[0].outputs)
    if len(bodies) == 1:
        # The last of the choices needs no test: it stands where the others were refused.
        with builder.subgraph() as nodes:
            names = [_output(emitter, bodies[0], atom).name for atom in bodies[0].outputs]
        builder.nodes += nodes
        return names
    # ONNX has If alone: a choice of several is one inside the other.
    is_this = builder.node("LessOrEqual", [index, builder.constant(np.int32(number), "branch")])
    this = _graph(emitter, bodies[0], (), bodies[0].outputs, [])
    with builder.subgraph() as nodes:
        if len(bodies) == 2:
            names = [_identity(emitter, value) for value in _inlined(emitter, bodies[1], (), ())]
        else:
            names = _choice(emitter, index, bodies[1:], number + 1)
    infos = [
        _info(emitter, name, atom) for name, atom in zip(names, bodies[1].outputs, strict=True)
    ]
    other = builder.onnx.helper.make_graph(nodes, builder.unique("branch"), [], infos)
    return builder.split_node("If", [is_this], count, then_branch=this, else_branch=other)


def _inlined(
    emitter: Emitter, body: Body, inputs: Sequence[Var], values: Sequence[Value]
) -> list[Value]:
    """The results of a body, added to the graph that is being built."""
    for var, value in zip(inputs, values, strict=True):
        emitter.set_input(var, value)
    emitter.emit(body.nodes)
    return [_output(emitter, body, atom) for atom in body.outputs]


def _graph(
    emitter: Emitter,
    body: Body,
    varying: Sequence[Var],
    outputs: Sequence[Atom],
    counter: Sequence[Any],
    condition: tuple[Body, int] | None = None,
) -> Any:
    """A body as a graph with inputs.

    Args:
      emitter: of the file.
      body: what is repeated.
      varying: the inputs that each round sets.
      outputs: what it gives.
      counter: further inputs in front.
      condition: what says of these results whether there is another round, the first output then,
        and how many constants it takes.
    """
    builder = emitter.builder
    infos, values = list(counter), []

    # Inputs of a body have names that nothing outside has: ONNX has one scope for both.
    for var in varying:
        shape = emitter.shape(var)
        values.append(Value(builder.unique("carried"), shape, straight(len(shape))))
        infos.append(_info(emitter, values[-1].name, var))
    with builder.subgraph() as nodes:
        results = _inlined(emitter, body, varying, values)
        names = [_identity(emitter, value) for value in results]
        ends = [_info(emitter, name, atom) for name, atom in zip(names, outputs, strict=True)]
        # ONNX asks for the test of the next round at the end of each one.
        if condition is not None:
            test, consts = condition
            (again,) = _inlined(emitter, test, test.inputs[consts:], results)
            names.insert(0, _identity(emitter, again))
            ends.insert(0, _info(emitter, names[0], test.outputs[0]))
    return builder.onnx.helper.make_graph(nodes, builder.unique("body"), infos, ends)


def _output(emitter: Emitter, body: Body, atom: Atom) -> Value:
    """A result of a body, with all its copies and its axes in order."""
    value = emitter.value(atom)
    if isinstance(atom, int):
        value = emitter.full(value, atom)
    return emitter.builder.ordered(value, straight(value.rank))


def _identity(emitter: Emitter, value: Value) -> str:
    """A name of its own: a graph may not give what another one made."""
    return emitter.builder.node("Identity", [value.name])


def _number(emitter: Emitter, name: str, dtype: str) -> Any:
    """An input of a body that is one number."""
    helper = emitter.builder.onnx.helper
    return helper.make_tensor_value_info(emitter.builder.unique(name), ONNX_TYPES[dtype], [])


def _info(emitter: Emitter, name: str, atom: Atom) -> Any:
    shape = list(emitter.shape(atom)) if isinstance(atom, int) else []
    try:
        code = ONNX_TYPES[onnx_dtype(emitter.dtype(atom))]
    except NotCovered as error:
        raise NotCovered(f"{error} in a loop") from None
    return emitter.builder.onnx.helper.make_tensor_value_info(name, code, shape)


_EMITTERS = {"scan": _scan, "while": _while, "cond": _cond}
TABLE = dict.fromkeys(_EMITTERS, emit)
