"""Which loops stop by the floats that they compute."""

import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.graph.adaptive import is_adaptive
from jaxquant.graph.model import trace_model


def until_small(x):
    return lax.while_loop(lambda x: jnp.abs(x).max() > 0.1, lambda x: 0.5 * x, x)


def until_done(x):
    """By a truth value that the body computes."""
    return lax.while_loop(
        lambda c: jnp.logical_not(c[1]),
        lambda c: (0.5 * c[0], (c[0].sum() < 0.1) | c[1]),
        (x, x[0] > 9),
    )[0]


def counted(x):
    return lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, 0.5 * c[1]), (0, x))[1]


def until_word(x):
    """A number that floats choose: both forms of a model write the same text."""
    step = lambda c: (0.5 * c[0], jnp.argmax(c[0]))  # noqa: E731
    return lax.while_loop(lambda c: c[1] != 0, step, (x, jnp.argmax(x)))[0]


def scanned(x):
    return lax.scan(lambda y, z: (y + z, None), x[0], x)[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [(until_small, True), (until_done, True), (counted, False), (until_word, False),
     (scanned, False)],
)  # fmt: skip
def test_is_adaptive(function, expected):
    model = trace_model(lambda p, x: function(x), {}, (jnp.arange(4.0),))
    (eqn,) = [e for e in model.graph.equations if e.name in ("while", "scan")]
    found = [is_adaptive(body) for body in model.root.bodies(eqn)]
    assert any(found) == expected
