"""Functions that are no models, or that train, are told what to pass."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from tests import networks
from tests.bad_input import PARAMS, X, mlp, never, quant_post


def test_a_model_with_nothing_to_quantize_stops_before_the_data_is_read():
    read = []

    def ds():
        for index in range(3):
            read.append(index)
            yield X

    with pytest.raises(ValueError, match="nothing to quantize: apply_fn holds no convolution"):
        jaxquant.calibrate(jnp.ones(4), lambda p, x: x * p, ds, progress=False)
    assert read == [0]


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="fc")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name="fc")(x))


def test_apply_fn_that_needs_an_rng_says_what_to_pass():
    variables = Dropped().init(jax.random.key(0), X, False)
    with pytest.raises(ValueError, match=r"needs a PRNG key .* `deterministic=True`") as info:
        quant_post(variables, lambda p, x: Dropped().apply(p, x, True))
    assert "model.apply(p, x, train=False)" in str(info.value)


def test_apply_fn_that_updates_variables_says_what_to_pass():
    variables = Normed().init(jax.random.key(0), X, False)
    with pytest.raises(ValueError, match=r"updates variables .* use_running_average=True"):
        quant_post(variables, lambda p, x: Normed().apply(p, x, True))


def test_apply_fn_that_returns_updated_collections_says_what_to_pass():
    variables = Normed().init(jax.random.key(0), X, False)
    apply_fn = lambda p, x: Normed().apply(p, x, True, mutable=["batch_stats"])  # noqa: E731
    with pytest.raises(
        ValueError, match=r"returns updated variables \(batch_stats\) .* without `mutable="
    ):
        quant_post(variables, apply_fn)


def test_an_nnx_model_in_training_mode():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.fc(x))

    model = Model(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    with pytest.raises(ValueError, match=r"draws random numbers .*`model.eval\(\)`"):
        quant_post(state, lambda s, x: nnx.merge(graphdef, s)(x))


def test_an_nnx_model_in_inference_mode_keeps_its_keys_among_the_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.fc(x))

    model = Model(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    qparams, qapply = networks.quantize(state, lambda s, x: nnx.merge(graphdef, s)(x), X)
    np.testing.assert_allclose(qapply(qparams, X), model(X), atol=0.05)


def test_an_error_of_the_model_itself_passes_through():
    def apply_fn(p, x):
        raise KeyError("wrong key of the model")

    with pytest.raises(KeyError, match="wrong key of the model"):
        quant_post(apply_fn=apply_fn)


@pytest.mark.parametrize("error", [KeyError("the wrong rng"), ValueError("no PRNG here")])
def test_an_error_that_speaks_of_rng_is_not_a_missing_key(error):
    def apply_fn(p, x):
        raise error

    with pytest.raises(type(error), match=r"the wrong rng|no PRNG here"):
        quant_post(apply_fn=apply_fn)


@pytest.mark.parametrize("name", ["cache", "intermediates", "batch_stats"])
def test_a_plain_function_may_return_whatever_it_wants(name):
    qparams, qapply = networks.quantize(PARAMS, lambda p, x: (mlp(p, x), {name: x * 2}), X)
    logits, others = qapply(qparams, X)
    assert logits.shape == (3, 2)
    np.testing.assert_array_equal(others[name], 2 * X)


@dataclasses.dataclass
class TrainState:
    params: dict
    opt_state: tuple = ()


@pytest.mark.parametrize(
    ("params", "apply_fn", "match"),
    [
        (TrainState(PARAMS), never, r"params is a TrainState, .* pass its `\.params`"),
        (PARAMS, Dropped(), r"apply_fn is a Dropped: .*model\.apply"),
        (Dropped(), never, r"is Dropped, not an array; pass the variables of `model\.init`"),
        (PARAMS, nnx.Linear(4, 2, rngs=nnx.Rngs(0)), r"apply_fn is a Linear: .*nnx\.split"),
        (PARAMS, 3, "apply_fn is a function .* got int"),
    ],
)
def test_a_whole_model_in_place_of_its_parts(params, apply_fn, match):
    with pytest.raises(TypeError, match=match):
        quant_post(params, apply_fn)
