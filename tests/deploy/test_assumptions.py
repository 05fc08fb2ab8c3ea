"""What is read of errors about sizes, and what holds for the inputs of a model."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxquant.deploy.assumptions import assumed_in, undecided

EXAMPLE = (jax.ShapeDtypeStruct((2, 8), jnp.float32),)


def symbolic(text):
    return export.symbolic_args_specs(EXAMPLE, text)


def error_of(text, function):
    with pytest.raises((ValueError, jax.errors.InconclusiveDimensionOperation)) as info:
        jax.eval_shape(function, *symbolic(text))
    return info.value


@pytest.mark.parametrize(
    ("function", "constraint", "beyond"),
    [
        (lambda x: x + jnp.ones(9)[: x.shape[1]], "s <= 9", (2, 16)),
        (lambda x: x if x.shape[1] < 9 else -x, "s <= 9 - 1", (2, 16)),
        (lambda x: x if x.shape[1] > 8 else -x, "s <= 8", (2, 16)),
        (lambda x: x if x.shape[0] * 4 <= 7 else -x, "4*b >= 7 + 1", (1, 8)),
        (lambda x: jax.lax.dynamic_slice_in_dim(jnp.ones(12), 0, x.shape[1]), "s <= 12", (2, 16)),
    ],
)
def test_an_assumption_holds_for_the_example_and_not_beyond(function, constraint, beyond):
    found = assumed_in(error_of("b, s", function), symbolic("b, s"), EXAMPLE)
    assert found.constraint == constraint
    assert found.beyond[0].shape == beyond
    # It decides, so that the model is traced under it.
    known = export.symbolic_args_specs(EXAMPLE, "b, s", constraints=(constraint,))
    jax.eval_shape(function, *known)


def test_sizes_of_several_axes_together():
    error = error_of("b, 2*s", lambda x: x if x.shape[1] <= 10 else -x)
    found = assumed_in(error, symbolic("b, 2*s"), EXAMPLE)
    assert (found.constraint, found.beyond[0].shape) == ("2*s <= 10", (2, 16))


def test_nothing_is_assumed_of_other_errors():
    assert undecided(TypeError("Incompatible shapes: (2, 3), (4, 3)")) is None
    assert assumed_in(TypeError("no sizes"), symbolic("b, s"), EXAMPLE) is None
    # The example is none of such a model.
    error = error_of("b, 3*s", lambda x: x if x.shape[1] <= 10 else -x)
    assert assumed_in(error, symbolic("b, 3*s"), EXAMPLE) is None
