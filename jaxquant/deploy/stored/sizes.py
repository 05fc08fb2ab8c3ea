"""The sizes of arrays as expressions of named sizes: "2*h", "floordiv(batch + 1, 2)".

They are written as `jax.export` spells symbolic dimensions.  Here they are read without it, into
numbers or into other symbolic dimensions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import export

Size = Any  # an int, or a symbolic dimension of jax.export

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.]*)|(.))", re.ASCII)
_MAX_CHARACTERS = 1000
_MAX_DEPTH = 20  # of brackets
_MAX_NUMBER = 2**40
_MAX_EXPONENT = 8
_FUNCTIONS = ("floordiv", "mod", "max", "min")


def evaluate(text: str, sizes: Mapping[str, Size]) -> Size:
    """The value of an expression.

    Args:
      text: the expression.
      sizes: what the names in it stand for.

    Raises:
      ValueError: it is no such expression, names another size, or divides by zero.

    Example:
      >>> evaluate("2*h + floordiv(b, 2)", {"h": 3, "b": 5})
      8
    """
    return _value(_parse(text), sizes, text)


def names(text: str) -> frozenset[str]:
    """The named sizes in an expression."""
    found, stack = set(), [_parse(text)]
    while stack:
        operation, *operands = stack.pop()
        if operation == "name":
            found.add(operands[0])
        elif operation != "number":
            stack += operands
    return frozenset(found)


def solve(wanted: Sequence[tuple[str | int, Size]]) -> dict[str, Size]:
    """The named sizes from what expressions of them have to be.

    Args:
      wanted: expressions, or numbers, with their values.  Each name has to stand somewhere in an
        expression that is linear in it and has no other unknown name.

    Raises:
      ValueError: no sizes fit, or they cannot be found; the message says which expression.

    Example:
      >>> solve([("b", 4), ("2*h", 10), (3, 3)])
      {'b': 4, 'h': 5}
    """
    found: dict[str, Size] = {}
    unsolved = [(text, value) for text, value in wanted if isinstance(text, str)]
    while unsolved:
        # An expression with one unknown gives it; those with more wait for the others.
        solvable = [(t, v) for t, v in unsolved if len(names(t) - set(found)) <= 1]
        if not solvable:
            raise ValueError(
                f"the sizes in {', '.join(t for t, _ in unsolved)} cannot be told apart"
            )
        for text, value in solvable:
            for name in names(text) - set(found):
                found[name] = _solve_linear(text, name, value, found)
        unsolved = [pair for pair in unsolved if pair not in solvable]

    # Whatever was not needed to find them has to agree.
    for size, value in wanted:
        given = evaluate(size, found) if isinstance(size, str) else size
        if given != value:
            raise ValueError(f"the size {value} is not {size}")
    return found


def _solve_linear(text: str, name: str, value: Size, known: Mapping[str, Size]) -> Size:
    # Three points tell whether it is linear; the slope of a size that varies may itself vary.
    at = [evaluate(text, {**known, name: k}) for k in range(3)]
    slope = at[1] - at[0]
    is_linear = isinstance(slope, int) and slope and at[2] - at[1] == slope
    if not is_linear or (value - at[0]) % slope != 0:
        raise ValueError(f"the size {value} is not {text} for any {name}")
    return (value - at[0]) // slope


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Any, ...]:
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"a size of {len(text)} characters")
    # Characters that are no token stay in the list, where no rule of the grammar takes them.
    tokens = [match.group().strip() for match in _TOKEN.finditer(text) if match.group().strip()]
    parser = _Parser(tokens, text)
    tree = parser.sum(0)
    parser.end()
    return tree


class _Parser:
    """A sum of products of powers, by recursive descent."""

    def __init__(self, tokens: list[str], text: str) -> None:
        self._tokens, self._text, self._place = tokens, text, 0

    def sum(self, depth: int) -> tuple[Any, ...]:
        if depth > _MAX_DEPTH:
            raise ValueError(f"the size {self._text[:60]!r} has too many brackets in each other")
        negative = self._take("-")
        total = self._factors(depth)
        if negative:
            total = ("*", ("number", -1), total)
        while True:
            if self._take("+"):
                total = ("+", total, self._factors(depth))
            elif self._take("-"):
                # A difference is a sum with a factor of -1, so that there is one form to evaluate.
                total = ("+", total, ("*", ("number", -1), self._factors(depth)))
            else:
                return total

    def end(self) -> None:
        if self._place != len(self._tokens):
            raise self._error()

    def _factors(self, depth: int) -> tuple[Any, ...]:
        factors = self._power(depth)
        while self._take("*"):
            factors = ("*", factors, self._power(depth))
        return factors

    def _power(self, depth: int) -> tuple[Any, ...]:
        base = self._atom(depth)
        if not self._take("^"):
            return base
        exponent = self._atom(depth)
        if exponent[0] != "number" or not 0 < exponent[1] <= _MAX_EXPONENT:
            raise self._error()
        # A power of a power would be as large as anyone likes.
        return ("^", base, exponent)

    def _atom(self, depth: int) -> tuple[Any, ...]:
        token = self._tokens[self._place] if self._place < len(self._tokens) else ""
        self._place += 1
        # Measured before it is converted: a text may hold digits without end.
        if token.isdecimal() and len(token) <= 13 and int(token) <= _MAX_NUMBER:
            return ("number", int(token))
        if token == "(":
            inner = self.sum(depth + 1)
            self._need(")")
            return inner
        if token in _FUNCTIONS:
            self._need("(")
            first = self.sum(depth + 1)
            self._need(",")
            second = self.sum(depth + 1)
            self._need(")")
            return (token, first, second)
        if token.isidentifier():
            return ("name", token)
        raise self._error()

    def _take(self, token: str) -> bool:
        found = self._place < len(self._tokens) and self._tokens[self._place] == token
        self._place += found
        return found

    def _need(self, token: str) -> None:
        if not self._take(token):
            raise self._error()

    def _error(self) -> ValueError:
        return ValueError(f"{self._text[:60]!r} is no size")


def _value(tree: tuple[Any, ...], sizes: Mapping[str, Size], text: str) -> Size:
    operation, *operands = tree
    if operation == "number":
        return operands[0]
    if operation == "name":
        if operands[0] not in sizes:
            raise ValueError(f"the size {operands[0]!r} of {text[:60]!r} is not known")
        return sizes[operands[0]]
    # All other operations have two operands.
    left, right = (_value(operand, sizes, text) for operand in operands)
    if operation == "+":
        return left + right
    if operation == "*":
        return left * right
    if operation == "^":
        return left**right
    if operation in ("floordiv", "mod"):
        if isinstance(right, int) and right == 0:
            raise ValueError(f"the size {text[:60]!r} divides by zero")
        return left // right if operation == "floordiv" else left % right
    return _extreme(operation, left, right)


def _extreme(operation: str, left: Size, right: Size) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return max(left, right) if operation == "max" else min(left, right)
    # Symbolic sizes have no maximum in Python; jax.export makes one from its text.
    scope = next(x.scope for x in (left, right) if jax.export.is_symbolic_dim(x))
    return export.symbolic_shape(f"{operation}({left}, {right})", scope=scope)[0]
