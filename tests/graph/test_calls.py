"""How many inputs a function takes, by its signature."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxquant.graph.calls import CallError, check_call

X = jnp.ones((2, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2)(x)


def fixed(p, x, train):
    return x


@pytest.mark.parametrize(
    ("apply_fn", "inputs"),
    [
        (lambda p, *xs: xs, (X, X, X)),
        (lambda p, x, mask=None: x, (X,)),
        (functools.partial(fixed, train=False), (X,)),
        (jax.jit(fixed, static_argnames="train"), (X, True)),
        (Net().apply, (X, True)),
        (max, (X, X)),  # a function whose signature Python does not know
    ],
)
def test_a_call_that_fits_passes(apply_fn, inputs):
    check_call(apply_fn, inputs)


@pytest.mark.parametrize(
    ("apply_fn", "inputs", "match"),
    [
        (
            lambda p, *, x: x,
            (X,),
            r"by their places: `lambda p, x: apply_fn\(p, x=x\)`",
        ),
        (lambda p, x: x, (X, X), r"apply_fn\(p, x\) .* 2 inputs, float32\[2, 3\].*; leave out"),
        (Net().apply, (X, X, X), r"apply_fn\(variables, x, train\) .* 3 inputs"),
        (lambda x: x, (X,), r"apply_fn\(x\) .*: it is a function of both"),
        (fixed, (X,), r"`train` must be .*`lambda p, x: apply_fn\(p, x, train=\.\.\.\)`"),
        (lambda p, x, *, a, b: x, (X,), r"`a` and `b` must be"),
    ],
)
def test_a_call_that_does_not_fit_says_how_to_make_it(apply_fn, inputs, match):
    with pytest.raises(CallError, match=match):
        check_call(apply_fn, inputs)
