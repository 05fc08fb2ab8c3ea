import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.errors import SettingsError
from experiments.text import zoo
from experiments.text.corpus import Labelled
from experiments.text.train import accuracy, train


def test_a_network_learns_what_is_there_to_learn(rng):
    ids = rng.integers(0, 5, 500).astype(np.int32)
    text = Labelled(ids, (ids * 2) % 5, 5)  # each character tells its own label
    model = nn.Embed(5, 5)
    apply = jax.jit(model.apply)

    def score(params):
        return accuracy(lambda ids: apply({"params": params}, ids), text.windows(10))

    losses = {}
    with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to an integer
        trained = train(model, text, 10, steps=1001, show=losses.__setitem__)
    assert list(losses) == list(range(0, 1001, 100))
    assert losses[1000] < losses[0] / 2
    assert score(trained) > 0.95 > 0.5 > score(train(model, text, 10, steps=0))


def test_an_unknown_network_is_refused():
    with pytest.raises(
        SettingsError, match="no model 'rnn'; there are transformer, llama, lstm_tagger"
    ):
        zoo.find("rnn")
