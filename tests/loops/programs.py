"""Random programs of dots within loops and branches, each with its unrolled twin.

A program is a tree of pieces.  It is called with parameters and `x` [B, D]; every piece gives
another [B, D] of values in (-1, 1).  `L` is the length of a loop.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

BATCH, WIDTH = 3, 4
LENGTHS = (0, 1, 7)

Params: TypeAlias = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dot with a weight [D, D]."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """`lax.scan` with `x` as its carry.

    A step runs the body, whose weights are the loop's constants, and then a dot with a slice of
    stacked weights [L, D, D].  The mean of the stacked carries [L, B, D] is added to the last one.
    """

    body: Program
    length: int
    reverse: bool
    unroll: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """A recurrence over the rows of `x`, one row a step, whose states are stacked."""

    reverse: bool


@dataclasses.dataclass(frozen=True)
class Fori:
    """`lax.fori_loop`, which is a scan where its length is known."""

    body: Program
    length: int


@dataclasses.dataclass(frozen=True)
class While:
    """`lax.while_loop` with a counter beside `x`."""

    body: Program
    length: int


@dataclasses.dataclass(frozen=True)
class Cond:
    """`lax.cond` on the values; its branches may be unlike."""

    left: Program
    right: Program


Piece: TypeAlias = Dense | Scan | Rows | Fori | While | Cond
Program: TypeAlias = tuple[Piece, ...]


def programs() -> st.SearchStrategy[Program]:
    """Programs that end in a dot outside of loops, so that there is always one to quantize."""
    piece = st.recursive(st.just(Dense()) | st.builds(Rows, st.booleans()), _holders, max_leaves=4)
    return st.lists(piece, min_size=1, max_size=2).map(lambda pieces: (*pieces, Dense()))


def _holders(inner: st.SearchStrategy[Piece]) -> st.SearchStrategy[Piece]:
    body, length = st.lists(inner, max_size=2).map(tuple), st.sampled_from(LENGTHS)
    return (
        st.builds(Scan, body, length, st.booleans(), st.sampled_from([1, 2]))
        | st.builds(Fori, body, length)
        | st.builds(While, body, length)
        | st.builds(Cond, body, body)
    )


def make_params(program: Program, seed: int) -> Params:
    """The weights that a program reads, in its order; so small that no loop amplifies an error."""
    rng = np.random.default_rng(seed)
    return {
        f"w{number}": jnp.asarray(rng.normal(size=(*lead, WIDTH, WIDTH)) / 2, jnp.float32)
        for number, lead in enumerate(_leading(program))
    }


def _leading(program: Program) -> Iterator[tuple[int, ...]]:
    """For each weight the axes before its own."""
    for piece in program:
        match piece:
            case Dense():
                yield ()
            case Rows():
                yield from ((), ())
            case Scan():
                yield from _leading(piece.body)
                yield (piece.length,)
            case Fori() | While():
                yield from _leading(piece.body)
            case Cond():
                yield from _leading(piece.left)
                yield from _leading(piece.right)


def size(program: Program) -> int:
    """How many weights it has."""
    return len(list(_leading(program)))


def idle(program: Program) -> list[int]:
    """The numbers of the weights that no step reads, in loops whose length is known to be 0."""
    found, first = [], 0
    for piece in program:
        inside = size((piece,))
        if isinstance(piece, Scan | Fori) and piece.length == 0:
            found += range(first, first + inside)
        elif isinstance(piece, Scan | Fori | While):
            found += [first + number for number in idle(piece.body)]
        elif isinstance(piece, Cond):
            found += [first + number for number in idle((*piece.left, *piece.right))]
        first += inside
    return found


def is_reached(program: Program) -> bool:
    """Whether every step runs for any values: no branch, and no `while` that ends before it."""
    return all(
        is_reached(piece.body) and (piece.length > 0 or not isinstance(piece, While))
        if isinstance(piece, Scan | Fori | While)
        else not isinstance(piece, Cond)
        for piece in program
    )


def as_it_is(program: Program) -> Callable[[Params, jax.Array], jax.Array]:
    """(params, x) -> y, the loops as loops."""
    return lambda params, x: _run(program, params, itertools.count(), x, unrolled=False)


def unrolled(program: Program) -> Callable[[Params, jax.Array], jax.Array]:
    """(params, x) -> y, Python loops in their place, and of a choice both branches."""
    return lambda params, x: _run(program, params, itertools.count(), x, unrolled=True)


def _run(
    program: Program, params: Params, numbers: Iterator[int], x: jax.Array, unrolled: bool
) -> jax.Array:
    for piece in program:
        names = [f"w{number}" for number in itertools.islice(numbers, size((piece,)))]
        weights = [params[name] for name in names]
        x = (_by_hand if unrolled else _by_jax)(piece, weights, x)
    return x


def _inside(program: Program, weights: list[jax.Array], unrolled: bool) -> Any:
    """The body of a piece as a function of `x`, its weights closed over."""
    params = {f"w{number}": weight for number, weight in enumerate(weights)}
    return lambda x: _run(program, params, itertools.count(), x, unrolled)


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.tanh(x @ weight)


def _by_jax(piece: Piece, weights: list[jax.Array], x: jax.Array) -> jax.Array:
    match piece:
        case Dense():
            return _dot(x, weights[0])
        case Rows():

            def row(state: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
                state = jnp.tanh(value @ weights[0] + state @ weights[1])
                return state, state

            return lax.scan(row, x[0] * 0.5, x, reverse=piece.reverse)[1]
        case Scan():
            body = _inside(piece.body, weights[:-1], unrolled=False)

            def step(carry: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
                carry = _dot(body(carry), weight)
                return carry, carry

            last, carries = lax.scan(
                step, x, weights[-1], reverse=piece.reverse, unroll=piece.unroll
            )
            return _joined(last, carries)
        case Fori():
            body = _inside(piece.body, weights, unrolled=False)
            return lax.fori_loop(0, piece.length, lambda _, carry: body(carry), x)
        case While():
            body = _inside(piece.body, weights, unrolled=False)
            start = jnp.zeros((), jnp.int32), x
            return lax.while_loop(
                lambda carry: carry[0] < piece.length,
                lambda carry: (carry[0] + 1, body(carry[1])),
                start,
            )[1]
        case Cond():
            left, right = _branches(piece, weights, unrolled=False)
            return lax.cond(_chooses(x), left, right, x)


def _by_hand(piece: Piece, weights: list[jax.Array], x: jax.Array) -> jax.Array:
    match piece:
        case Dense():
            return _dot(x, weights[0])
        case Rows():
            state, found = x[0] * 0.5, {}
            for number in range(BATCH)[:: -1 if piece.reverse else 1]:
                state = jnp.tanh(x[number] @ weights[0] + state @ weights[1])
                found[number] = state
            return jnp.stack([found[number] for number in range(BATCH)])
        case Scan():
            body = _inside(piece.body, weights[:-1], unrolled=True)
            carries = [jnp.zeros((0, *x.shape), x.dtype)]
            for number in range(piece.length)[:: -1 if piece.reverse else 1]:
                x = _dot(body(x), weights[-1][number])
                carries.append(x[None])
            return _joined(x, jnp.concatenate(carries))
        case Fori() | While():
            body = _inside(piece.body, weights, unrolled=True)
            for _ in range(piece.length):
                x = body(x)
            return x
        case Cond():
            left, right = _branches(piece, weights, unrolled=True)
            return jnp.where(_chooses(x), left(x), right(x))


def _joined(last: jax.Array, carries: jax.Array) -> jax.Array:
    mean = carries.sum(axis=0) / max(len(carries), 1)
    return (last + mean) / 2


def _branches(piece: Cond, weights: list[jax.Array], unrolled: bool) -> tuple[Any, Any]:
    cut = size(piece.left)
    return (
        _inside(piece.left, weights[:cut], unrolled),
        _inside(piece.right, weights[cut:], unrolled),
    )


def _chooses(x: jax.Array) -> jax.Array:
    return x.sum() > 0
