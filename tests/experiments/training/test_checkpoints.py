import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import zoo
from experiments.training import TrainingError
from experiments.training.checkpoints import Checkpoints, save_weights
from experiments.training.initialisation import initial_variables
from experiments.training.optimizers import make_optimizer
from experiments.training.step import State, initial_state
from experiments.weights.tree import template


def a_state(step: int, optimizer: str = "sgd") -> State:
    shapes = template(zoo.build("cifar10_resnet20"), 32)
    state = initial_state(
        initial_variables(shapes, seed=step), make_optimizer(optimizer, lambda step: 0.1)
    )
    return jax.device_put(state._replace(step=jnp.asarray(step, jnp.int32)))


def test_the_newest_state_comes_back_bit_by_bit(tmp_path):
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest() is None
        for step in (1, 2, 3):
            saved.save(a_state(step))
        saved.save(a_state(3))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path) as saved:
        assert saved.latest() == 3
        restored = saved.restore(a_state(0))
    assert jax.tree.structure(restored) == jax.tree.structure(a_state(3))
    jax.tree.map(np.testing.assert_array_equal, restored, a_state(3))


def test_variables_load_into_the_zoo(tmp_path):
    state = a_state(5)
    with Checkpoints(tmp_path) as saved:
        saved.save(state)
    for path in (tmp_path / "checkpoints" / "5" / "variables", save_weights(tmp_path, state)):
        _, loaded = zoo.load("cifar10_resnet20", str(path))
        jax.tree.map(np.testing.assert_array_equal, loaded, state.variables)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(a_state(1, "rmsprop"))
        with pytest.raises(TrainingError, match="step 1 does not fit this run"):
            saved.restore(a_state(0, "sgd"))
