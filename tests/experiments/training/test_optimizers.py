import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import zoo
from experiments.training import TrainingError
from experiments.training.optimizers import OPTIMIZERS, is_decayed, make_optimizer
from experiments.weights.tree import template


@pytest.mark.parametrize("name", ["cifar10_resnet20", "vgg16", "mobilenet_v2", "googlenet"])
def test_kernels_alone_are_decayed(name):
    entry = zoo.find(name)
    params = template(entry.module(), entry.preprocessing.size)["params"]
    mask = is_decayed(params)
    for shape, decayed in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
        assert decayed == (shape.ndim > 1)


def step(optimizer, params, gradient):
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


def test_one_step_of_sgd_is_its_formula():
    params = {"layer": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0])}}
    gradient = {"layer": {"kernel": jnp.array([[1.0]]), "bias": jnp.array([1.0])}}
    optimizer = make_optimizer(
        "sgd", lambda step: 0.1, momentum=0.5, nesterov=True, weight_decay=0.25
    )
    after = step(optimizer, params, gradient)
    # Nesterov's first step: gradient + momentum * gradient, the kernel's with the decay.
    np.testing.assert_allclose(after["layer"]["kernel"], 2 - 0.1 * 1.5 * (1 + 0.25 * 2), rtol=1e-6)
    np.testing.assert_allclose(after["layer"]["bias"], 2 - 0.1 * 1.5, rtol=1e-6)


def test_the_whole_gradient_is_clipped():
    params = {"a": {"bias": jnp.array([0.0, 0.0])}, "b": {"bias": jnp.array([0.0])}}
    gradient = {"a": {"bias": jnp.array([3.0, 0.0])}, "b": {"bias": jnp.array([4.0])}}
    optimizer = make_optimizer("sgd", lambda step: 1.0, momentum=0.0, nesterov=False, clip_norm=1.0)
    after = step(optimizer, params, gradient)
    np.testing.assert_allclose(after["a"]["bias"], [-0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(after["b"]["bias"], [-0.8], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_goes_down(name):
    params = {"kernel": jnp.array([[1.0, -2.0]])}
    after = step(make_optimizer(name, lambda step: 1e-2), params, params)
    assert jnp.abs(after["kernel"]).sum() < jnp.abs(params["kernel"]).sum()


def test_an_unknown_one_is_named():
    with pytest.raises(TrainingError, match="no optimizer 'adam': choose sgd or rmsprop"):
        make_optimizer("adam", lambda step: 1.0)
