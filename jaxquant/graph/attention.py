"""Attention, `softmax(scale * q kᵀ + bias, where=mask) v`, as Flax, JAX and users write it.

Axes may come in any order, heads may share keys and values, and what is written as several biases,
masks and factors is one of each.  Source: Vaswani et al., arXiv:1706.03762.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxquant.graph import ir, matching, softmax
from jaxquant.graph.attention_scores import Order, Scores, Weights, is_plain
from jaxquant.graph.contraction import Axes, Contraction


class Layout(NamedTuple):
    """Where the axes of the tensors of an attention are.

    Each has one entry for every batch axis, and two behind them; a tensor may have further axes of
    size 1.  Keys and values lack the batch axes along which they are shared, such as that of heads
    in a group: None.

    Attributes:
      query: the rows, the depth.
      key: the keys, the depth.
      value: the keys, the places of a value.
      result: the rows, the places of a value.
    """

    query: tuple[int, ...]
    key: tuple[int | None, ...]
    value: tuple[int | None, ...]
    result: tuple[int, ...]


def match(graph: ir.Graph, last: ir.Equation) -> matching.Match | None:
    """The attention that ends in an equation, or in transposes of its result; None of others.

    The inputs of the match are q, k and v, then its biases, then its masks.
    """
    # Frameworks put the heads' axis back behind the second dot: those transposes belong to it.
    product, members, moves = last, {last.index}, []
    while product.name == "transpose":
        moves.append(tuple(product.params["permutation"]))
        before = matching.producer(graph, product.inputs[0])
        if before is None:
            return None
        product = before
        members.add(product.index)
    second = graph.contractions.get(product.index)
    if second is None or not is_plain(graph, product, second):
        return None
    weighted = _find_weights(graph, product, second)
    if weighted is None:
        return None
    side, taken, found = weighted
    scores = Scores(graph, found.inputs[0])
    if scores.product is None or scores.contraction is None:
        return None
    members |= found.members | scores.members | taken.members
    # What else reads a tensor in the middle would need it to exist, so it stays as it is then.
    parts = _layout(graph, scores, taken.axes, second, side)
    if parts is None or not matching.is_private(graph, members, last.outputs[0]):
        return None
    layout, keys, batch = parts
    for move in reversed(moves):
        layout = layout._replace(result=tuple(move.index(axis) for axis in layout.result))

    # Queries, keys and values, by what they are and not by the sides that einsum chose.
    read = (
        scores.product.inputs[1 - keys],
        scores.product.inputs[keys],
        product.inputs[1 - side],
    )
    precisions = scores.product.params["precision"], product.params["precision"]
    return matching.Match(
        tuple(x for x in (*read, *scores.biases, *scores.masks) if isinstance(x, int)),
        frozenset(members),
        {"layout": layout, "precisions": precisions, **scores.params(keys, batch)},
    )


def _find_weights(
    graph: ir.Graph, product: ir.Equation, second: Contraction
) -> tuple[int, Weights, matching.Match] | None:
    """The operand of the second product that a softmax gives: its side, it, and the softmax."""
    # Either side: einsum puts the weights on both.
    for side in (0, 1):
        taken = Weights(graph, product.inputs[side], second.operands[side])
        division = matching.producer(graph, taken.source)
        found = None if division is None else softmax.match_operator(graph, division)
        if found is not None and taken.axes.contracted == (found.params["axis"],):
            return side, taken, found
    return None


def _layout(
    graph: ir.Graph, scores: Scores, read: Axes, second: Contraction, side: int
) -> tuple[Layout, int, Order] | None:
    """The axes of two dots around a softmax.

    Args:
      graph: the traced model.
      scores: what the softmax reads, with the dot of q and k.
      read: the axes of what the softmax gives in the second dot.
      second: the dot of the weights and v.
      side: which operand of it the weights are.

    Returns:
      The layout, which operand of the first dot the keys are, and those batch axes of its result
      that the second one has too: others have size 1.
    """
    first = scores.contraction
    assert first is not None
    assert scores.product is not None
    weights, values = scores.before_moves(read), second.operands[1 - side]
    if weights is None:
        # What moved the scores on the way may lack an axis of the product.
        return None

    # Which operand the keys are shows by what is summed with the values.
    keys = next((k for k in (0, 1) if first.result.free[k] == weights.contracted), None)
    if keys is None or len(values.free) != 1:
        return None
    query, key, rows = first.operands[1 - keys], first.operands[keys], first.result.free[1 - keys]
    sizes = graph.shape(scores.product.outputs[0])
    left = [k for k, axis in enumerate(first.result.batch) if axis in weights.batch]
    batch = tuple(first.result.batch[k] for k in left)
    # An axis of size 1 that the second dot lacks is nothing to go along.
    if any(sizes[axis] != 1 for axis in {*first.result.batch} - {*batch}):
        return None
    if not rows or {*weights.batch} != {*batch} or {*weights.free} != {*rows}:
        return None

    # The second dot may have the batch axes in another order: all follow the first one's.
    of_batch = [weights.batch.index(axis) for axis in batch]
    of_rows = scores.rows(keys)
    shared = (None,) * (len(rows) - 1)  # what several rows share is one batch for each of them
    layout = Layout(
        query=(
            *(query.batch[k] for k in left),
            *(query.free[k] for k in of_rows),
            *query.contracted,
        ),
        key=(*(key.batch[k] for k in left), *shared, *key.free, *key.contracted),
        value=(*(values.batch[k] for k in of_batch), *shared, *values.contracted, *values.free),
        result=(
            *(second.result.batch[k] for k in of_batch),
            *(second.result.free[side][weights.free.index(rows[k])] for k in of_rows),
            *second.result.free[1 - side],
        ),
    )
    return layout, keys, batch
