"""A training that takes seconds and downloads nothing."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.train import common
from experiments import data, zoo
from experiments.preprocessing import Preprocessing
from tests.experiments.training.networks import Small


def colours(count: int, seed: int) -> data.Dataset:
    """Images [8, 8, 3] of two classes that their colours tell apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = rng.integers(0, 160, (count, 8, 8, 3))
    pixels[..., 0] += 80 * labels[:, None, None]
    examples = [lambda x=x, y=y: (x, int(y)) for x, y in zip(pixels.astype(np.uint8), labels)]
    return data.from_examples("colours", examples)


def install(monkeypatch: pytest.MonkeyPatch) -> ConfigDict:
    """Puts the network "tiny" into the zoo and the colours into the data; returns its settings."""
    entry = zoo.Entry(
        module=lambda: Small(num_classes=2, dropout=0.2),
        preprocessing=Preprocessing(8, mean=(100.0,) * 3, std=(60.0,) * 3, resize=8),
        namings=(),
    )
    monkeypatch.setitem(zoo.MODELS, "tiny", entry)
    datasets = colours(64, seed=0), colours(32, seed=1)
    monkeypatch.setattr(data, "embedded", lambda name, size: datasets)
    return common.get_config(
        "tiny",
        dataset="colours",
        augmentation="shift",
        batch_size=8,
        steps=4,
        warmup_epochs=0.0,
        learning_rate=0.05,
        log_steps=1,
        devices=1,
        progress=False,
        eval_epochs=0.0,
    )
