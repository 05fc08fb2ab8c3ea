"""Graphs with symbolic sizes have the operations of those with numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxquant.graph import evaluate, symbolic
from jaxquant.graph.trace import trace

SHAPE = (2, 8, 8, 4)
INDEXING = {
    "reversed": lambda x: x[:, ::-1],
    "strided": lambda x: x[:, ::2, ::2],
    "range": lambda x: x[:, 1:3],
    "one": lambda x: x[:, 0],
    "one, range, strided": lambda x: x[:, 0, 1:3, ::2],
    "last": lambda x: x[..., -1],
    "strided backwards": lambda x: x[:, ::-2],
    "one element by a stride": lambda x: x[:, 0:1:2],
    "one element by a stride, and one": lambda x: x[:, 7:8:3, 3],
    "stride, range, stride": lambda x: x[:, 1:8:2, 2:5, ::2],
    "all of it": lambda x: x[:, :8:1],
    "split": lambda x: jnp.split(x, 2, 1)[1],
    "picked": lambda x: x[:, jnp.array([1, 0, 2])],
    "the one of one": lambda x: x[:, 3:4][:, 0],
    "taken in a row": lambda x: jnp.take(x, 2 * jnp.arange(3), axis=1),
    "resized": lambda x: jax.image.resize(x, (x.shape[0], 4, 5, 4), "nearest"),
    "as many as the batch": lambda x: jnp.concatenate([x, x])[: x.shape[0]],
    "the first sample": lambda x: x[:1],
    "median": lambda x: jnp.median(x, axis=-1),
    "of a constant for each sample": lambda x: x + jnp.ones((x.shape[0], 8))[:, None, None, 4:],
}


@pytest.mark.parametrize("name", INDEXING)
def test_indexing_is_the_same_operation(name):
    function = INDEXING[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    (batch,) = export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, *SHAPE[1:]), jnp.float32)
    with_numbers = trace(lambda _, x: function(x), {"w": jnp.ones(1)}, (x,))
    symbolic = trace(lambda _, x: function(x), {"w": jnp.ones(1)}, (spec,))
    varying = [
        sorted(e.name for e in graph.equations if not graph.static[e.outputs[0]])
        for graph in (with_numbers, symbolic)
    ]
    assert varying[0] == varying[1]

    def run(x):
        return evaluate.outputs(evaluate.evaluate(symbolic, {}, [x]))

    exported = export.export(jax.jit(run))(spec)
    np.testing.assert_array_equal(exported.call(x), function(x))


def test_a_size_is_compared_as_far_as_it_is_known():
    (size, _) = export.symbolic_shape("s, t", constraints=("s >= 4",))
    assert symbolic.at_least(7, 3) is True
    assert symbolic.at_least(size, 4) is True
    assert symbolic.at_least(size - 10, size) is False
    assert symbolic.at_least(size, 5) is None
