"""A model is traced once for each input shape, whatever is done with it."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from jaxquant.graph.model import FloatModel
from tests import networks


def counting(apply_fn):
    """A function, and how often it is traced for each shape of its input."""
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()

    def counted(params, x):
        seen[x.shape] += 1
        return apply_fn(params, x)

    return counted, seen


def test_a_quantization_traces_the_function_once_for_each_shape():
    apply_fn, seen = counting(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"])
    params = {"a": jnp.eye(8), "b": jnp.ones((8, 3))}
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(size, 8)).astype(np.float32) for size in (4, 4, 6)]
    jaxquant.quant_post(params, apply_fn, batches, progress=False)
    assert seen[4, 8] == seen[6, 8] == 1


def test_models_of_one_shape_are_one():
    source = FloatModel(networks.plain_net, networks.plain_params())
    x = np.zeros(networks.IMAGE, np.float32)
    model = source.trace((x,))
    assert source.trace((x + 1,)) is model
    assert source.trace((jax.ShapeDtypeStruct(x.shape, x.dtype),)) is model
    assert source.trace((x[:2],)) is not model
    assert model.sites is model.sites
