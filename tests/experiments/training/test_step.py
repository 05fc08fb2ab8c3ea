import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.preprocessing import Preprocessing
from experiments.training import TrainingError
from experiments.training.initialisation import initial_variables
from experiments.training.optimizers import make_optimizer
from experiments.training.step import State, data_parallel, initial_state, make_update
from experiments.weights.tree import template
from tests.experiments.training.networks import Small

HALF = Preprocessing(size=8, mean=(127.5,) * 3, std=(127.5,) * 3)


@pytest.fixture
def batch(rng):
    return rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 8).astype(
        np.int32
    )


def train(module, batch, *, steps=3, devices=1, smoothing=0.0, seed=0) -> tuple[State, list[dict]]:
    optimizer = make_optimizer("sgd", lambda step: 0.1, weight_decay=1e-3)
    mesh = data_parallel(8, jax.devices()[:devices])
    update = make_update(module, optimizer, HALF, mesh, label_smoothing=smoothing, seed=seed)
    state = initial_state(initial_variables(template(module, 8), 0), optimizer)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    metrics = []
    for _ in range(steps):
        state, measured = update(state, *batch)
        metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics


def test_the_loss_is_the_smoothed_cross_entropy_and_the_statistics_move(batch):
    images, labels = batch
    module = Small()
    start = initial_variables(template(module, 8), 0)
    state, (metrics,) = train(module, batch, steps=1, smoothing=0.3)

    inputs = (images.astype(np.float32) - 127.5) / 127.5
    logits, changed = module.apply(start, inputs, train=True, mutable=["batch_stats"])
    targets = 0.7 * np.eye(3)[labels] + 0.1
    loss = -np.mean(np.sum(targets * np.asarray(jax.nn.log_softmax(logits)), axis=1))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"], 100 * np.mean(logits.argmax(axis=1) == labels), rtol=1e-6
    )
    assert state.step == 1
    for new, expected in zip(
        jax.tree.leaves(state.variables["batch_stats"]), jax.tree.leaves(changed["batch_stats"])
    ):
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7)

    kernel = nn.Conv(4, (3, 3), padding="SAME", use_bias=False)
    before = kernel.apply({"params": start["params"]["stem"]["conv"]}, jnp.asarray(inputs))
    mean = state.variables["batch_stats"]["stem"]["bn"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * np.mean(before, axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_the_update_is_the_gradient_of_the_loss(batch):
    images, labels = batch
    module = Small()
    start = initial_variables(template(module, 8), 0)
    state, (metrics,) = train(module, batch, steps=1)

    def loss(params):
        inputs = HALF.normalise(jnp.asarray(images))
        variables = {**start, "params": params}
        logits, _ = module.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.grad(loss)(start["params"])
    bias = start["params"]["classifier"]["bias"] - 0.1 * 1.9 * gradient["classifier"]["bias"]
    np.testing.assert_allclose(
        state.variables["params"]["classifier"]["bias"], bias, rtol=1e-4, atol=1e-6
    )
    total = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(total), rtol=1e-4)


def test_several_devices_compute_what_one_does(batch):
    module = Small()
    one, losses = train(module, batch)
    four, others = train(module, batch, devices=4)
    for a, b in zip(losses, others):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3)
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(four.variables)):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(TrainingError, match=r"batch of 6 .* 4 devices: give a multiple"):
        data_parallel(6, jax.devices()[:4])


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed(batch):
    module = Small(dropout=0.5)
    first, again, other = (train(module, batch, seed=seed)[1] for seed in (0, 0, 1))
    assert [m["loss"] for m in first] == [m["loss"] for m in again]
    assert first[0]["loss"] != other[0]["loss"]


def test_bfloat16_computes_nearly_the_same_and_leaves_float32(batch):
    module = Small()
    exact, losses = train(module, batch, steps=2)
    state, others = train(module.clone(dtype=jnp.bfloat16), batch, steps=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.variables)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(others[0]["loss"], losses[0]["loss"], rtol=0.03)
    assert others[0]["loss"] != losses[0]["loss"]
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), exact, state)
