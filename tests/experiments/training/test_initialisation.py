import jax
import numpy as np

from experiments import zoo
from experiments.training.initialisation import initial_variables
from experiments.weights.tree import template


def test_the_seed_decides():
    shapes = template(zoo.build("cifar10_resnet20"), 32)
    first, again, other = (initial_variables(shapes, seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (
        first["params"]["stem"]["conv"]["kernel"] != other["params"]["stem"]["conv"]["kernel"]
    ).all()


def test_signals_keep_their_size_and_the_first_loss_is_that_of_chance(rng):
    module = zoo.build("cifar10_vgg16")
    variables = initial_variables(template(module, 32), seed=0)
    images = rng.normal(size=(16, 32, 32, 3)).astype(np.float32)
    logits = jax.jit(module.apply)(variables, images)
    loss = -np.mean(jax.nn.log_softmax(logits))
    assert 0.1 < np.std(logits) < 2  # after sixteen layers without BatchNorm
    assert abs(loss - np.log(10)) < 0.5


def test_residual_blocks_may_start_as_the_identity():
    shapes = template(zoo.build("cifar10_resnet50"), 32)
    params = initial_variables(shapes, 0, zero_residuals=True)["params"]
    block = params["stage2_block3"]
    assert not block["conv3"]["bn"]["scale"].any()
    assert (block["conv1"]["bn"]["scale"] == 1).all()
    assert (params["stage1_block1"]["shortcut"]["bn"]["scale"] == 1).all()
    assert (
        initial_variables(shapes, 0)["params"]["stage2_block3"]["conv3"]["bn"]["scale"] == 1
    ).all()
