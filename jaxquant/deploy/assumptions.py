"""What a model takes for granted of the sizes that vary, told by where JAX could not decide.

A model that reads `positions[:s]` of 512 rows takes no more than 512 tokens, and JAX traces it for
a size `s` once it knows `s <= 512`.  The inputs that the model was quantized with tell which way a
comparison goes; whether the model takes inputs for which it goes the other way, a trace does.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxquant.deploy.stored import sizes
from jaxquant.graph import ir

_COMPARISON = re.compile(r"comparison '(.+?)' (<=|>=|<|>) '(.+?)' is inconclusive")
# A size that was cut at that of a table stands for itself in errors: "min(512, s)".
_EXTREME = re.compile(r"\b(?:min|max)\(([^(),]+), ([^(),]+)\)")

_MOST_DOUBLINGS = 24  # of a size, until it is larger than any table

_SIGNS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt
}  # fmt: skip
_OPPOSITE = {"<=": ">", ">": "<=", ">=": "<", "<": ">="}


class SizeComparison(NamedTuple):
    """Two expressions of sizes and how they compare, as `jax.export` spells them."""

    left: str
    sign: str
    right: str

    def __str__(self) -> str:
        """As a constraint; `jax.export` reads <=, >= and == alone."""
        strict = {"<": f"{self.left} <= {self.right} - 1", ">": f"{self.left} >= {self.right} + 1"}
        return strict.get(self.sign, f"{self.left} {self.sign} {self.right}")

    @property
    def opposite(self) -> SizeComparison:
        return self._replace(sign=_OPPOSITE[self.sign])

    def holds(self, known: Mapping[str, int]) -> bool:
        """Whether it does for some sizes.

        Raises:
          ValueError: it is of other sizes.
        """
        left, right = (sizes.evaluate(side, known) for side in (self.left, self.right))
        return bool(_SIGNS[self.sign](left, right))


class Assumption(NamedTuple):
    """A comparison of sizes that holds for the model that was quantized.

    Attributes:
      constraint: as `jax.export` reads it.
      beyond: shapes and dtypes of inputs for which it does not hold; None where none are found.
    """

    constraint: str
    beyond: Any


def undecided(error: Exception) -> SizeComparison | None:
    """The comparison of sizes that JAX could not decide; None where the error is of another kind.

    >>> str(undecided(TypeError("Incompatible shapes: (s, 8), (min(512, s), 8)")))
    's <= 512'
    """
    text = str(error)
    if found := _COMPARISON.search(text):
        return SizeComparison(*found.groups())
    if found := _EXTREME.search(text):
        least, size = found.groups()  # JAX writes numbers first
        return SizeComparison(size, "<=", least)
    return None


def assumed_in(error: Exception, inputs: Any, example: Any) -> Assumption | None:
    """What the quantized model assumed where an error says that it may or may not hold.

    Args:
      error: what JAX raised.
      inputs: shapes and dtypes, with the sizes that vary.
      example: the inputs that the model was quantized with.

    Returns:
      None where the error is of another kind or the example does not tell.
    """
    comparison = undecided(error)
    if comparison is None:
        return None
    pairs = zip(jax.tree.leaves(inputs), map(ir.struct, jax.tree.leaves(example)), strict=True)
    # The sizes that the example has tell which way the comparison went when it was traced.
    wanted = [
        (str(size), number)
        for spec, struct in pairs
        for size, number in zip(spec.shape, struct.shape, strict=True)
        if not isinstance(size, int)
    ]
    try:
        known = sizes.solve(wanted)

        # Where the example breaks the comparison, the model was traced for its opposite.
        holding = comparison if comparison.holds(known) else comparison.opposite
        return Assumption(str(holding), _beyond(holding, known, inputs))
    except ValueError:
        return None


def _beyond(comparison: SizeComparison, known: Mapping[str, int], inputs: Any) -> Any:
    """The inputs with one size so large, or so small, that the comparison does not hold."""
    for name, size in known.items():
        # Doubled and halved: any size past the bound will do, the nearest is not asked for.
        larger = (size << k for k in range(1, _MOST_DOUBLINGS))
        smaller = (size >> k for k in range(1, size.bit_length()))
        for other in itertools.chain(larger, smaller):
            changed = {**known, name: other}
            if not comparison.holds(changed):
                return jax.tree.map(lambda spec, at=changed: _of_sizes(spec, at), inputs)
    return None


def _of_sizes(spec: Any, known: Mapping[str, int]) -> jax.ShapeDtypeStruct:
    shape = tuple(d if isinstance(d, int) else sizes.evaluate(str(d), known) for d in spec.shape)
    return jax.ShapeDtypeStruct(shape, spec.dtype)
