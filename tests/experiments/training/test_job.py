import jax
import numpy as np
import pytest

from experiments import data
from experiments.training import TrainingError
from experiments.training.job import prepare
from tests.experiments.training.tiny import colours, install


@pytest.fixture
def tiny(monkeypatch):
    return install(monkeypatch)


def test_epochs_become_steps(tiny):
    tiny.steps = 0
    tiny.epochs = 2.5
    tiny.warmup_epochs = 0.5
    job = prepare(tiny)
    assert (job.epoch, job.steps) == (8, 20)
    assert float(job.rate(3)) == float(job.rate(4)) == pytest.approx(0.05)
    assert float(job.rate(2)) < 0.05
    tiny.steps = 3
    tiny.warmup_epochs = 0.0
    assert prepare(tiny).steps == 3


def test_classes_and_size_are_those_asked_for(tiny):
    tiny.num_classes = 5
    tiny.image_size = 6
    job = prepare(tiny)
    assert job.state.variables["params"]["classifier"]["bias"].shape == (5,)
    images, _ = next(job.batches(0))
    assert images.shape == (8, 6, 6, 3)


def test_the_accuracy_is_that_of_the_network_in_inference(tiny):
    tiny.devices = 4
    job = prepare(tiny)
    assert len(job.state.step.sharding.device_set) == 4
    params = jax.device_get(job.state.variables["params"])
    params["classifier"]["kernel"] = np.zeros((4, 2), np.float32)
    params["classifier"]["bias"] = np.float32([0, 1])  # always the second class
    variables = {**job.state.variables, "params": params}
    result = job.accuracy(job.state._replace(variables=variables))
    assert result == {"top1": 50.0, "top5": 100.0}


def test_too_many_classes_are_found_before_the_training(tiny, monkeypatch):
    labelled = data.from_examples("three", [lambda: (np.zeros((8, 8, 3), np.uint8), 2)] * 9)
    monkeypatch.setattr(data, "embedded", lambda name, size: (labelled, colours(8, 0)))
    with pytest.raises(data.DataError, match=r"three has the label 2, and the network 2 classes"):
        prepare(tiny)
    tiny.batch_size = 16
    tiny.num_classes = 3
    with pytest.raises(TrainingError, match="9 training images do not fill one batch of 16"):
        prepare(tiny)
