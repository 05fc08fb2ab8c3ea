"""The training configs, and the main job on small data: nothing is downloaded."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common as quantization
from configs.train import common
from experiments import quant_post, train, zoo
from experiments.training import TrainingError
from experiments.training.checkpoints import Checkpoints
from experiments.training.job import prepare
from experiments.training.log import read
from experiments.weights.tree import template
from tests.experiments.training.tiny import install

REPOSITORY = Path(common.__file__).parent.parent.parent
CONFIGS = sorted(
    path.stem
    for path in (REPOSITORY / "configs" / "train").glob("*.py")
    if path.stem not in ("__init__", "common")
)
VARIANTS = [
    ("cifar10_resnet", f"depth={depth}") for depth in (20, 32, 44, 56, 110, 50, 101, 152)
] + [
    *[("cifar10_vgg", f"depth={depth}") for depth in (16, 19)],
    *[("vgg", f"depth={depth}") for depth in (16, 19)],
    *[("resnet", f"depth={depth}") for depth in (50, 101, 152)],
    *[("cifar10_mobilenet", f"version={version}") for version in (1, 2)],
    *[("mobilenet", f"version={version}") for version in (1, 2)],
    *[("efficientnet_lite", f"variant=lite{i}") for i in range(5)],
    ("cifar10_efficientnet_lite", None),
    ("cifar10_googlenet", None),
    ("googlenet", None),
]


def get_config(name: str, arg: str | None = None):
    return importlib.import_module(f"configs.train.{name}").get_config(arg)


@pytest.fixture
def tiny(monkeypatch):
    return install(monkeypatch)


def saved_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, the optimizer's too."""
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    with Checkpoints(workdir) as saved:
        state = saved.restore(prepare(config).state)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(one: Path, other: Path) -> None:
    first, second = saved_arrays(one), saved_arrays(other)
    assert first.keys() == second.keys()
    assert len(first) == 14  # parameters, statistics, momentum and two counts of the steps
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    measured = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in read(workdir)]
        for workdir in (one, other)
    ]
    assert measured[0] == measured[1]
    assert [line["step"] for line in measured[0]] == [1, 2, 3, 4, 4]


def test_a_run_that_was_stopped_goes_on_bit_by_bit(tiny, tmp_path):
    result = train.run(tiny, tmp_path / "whole")
    answers = iter([False, True])
    assert train.run(tiny, tmp_path / "stopped", lambda: next(answers)) is None
    assert sorted(p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()) == ["2"]
    assert not (tmp_path / "stopped" / "weights").exists()
    assert train.run(tiny, tmp_path / "stopped") == result
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")

    # And one that was killed between two checkpoints.
    class Killed(Exception):
        pass

    def kill():
        if len(read(tmp_path / "killed")) == 2:  # two steps logged, the third one under way
            raise Killed
        return False

    tiny.checkpoint_steps = 2
    with pytest.raises(Killed):
        train.run(tiny, tmp_path / "killed", kill)
    assert train.run(tiny, tmp_path / "killed") == result
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert train.run(tiny, tmp_path / "killed") == result  # nothing is left to train

    tiny.learning_rate = 0.5
    with pytest.raises(TrainingError, match=r"learning_rate: 0\.05 there, 0\.5 given"):
        train.run(tiny, tmp_path / "killed")


def test_a_separable_problem_is_learnt_and_its_weights_are_quantized(tiny, tmp_path):
    tiny.steps = 60
    tiny.eval_epochs = 4.0
    tiny.log_steps = 20
    result = train.run(tiny, tmp_path)
    assert result["top1"] > 90
    tests = [line for line in read(tmp_path) if "test_top1" in line]
    assert [line["step"] for line in tests] == [32, 60]
    assert tests[-1]["test_top1"] == result["top1"]
    losses = [line["loss"] for line in read(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0]

    config = quantization.get_config("tiny", dataset="colours")
    config.weights = str(tmp_path / "weights")
    config.progress = False
    _, measured, _ = quant_post.run(config)
    assert measured["fp32"]["top1"] == result["top1"]
    assert measured["int8"]["top1"] > 90


def test_checkpoints_without_settings_are_not_gone_on_with(tiny, tmp_path):
    tiny.steps = 1
    train.run(tiny, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(TrainingError, match=r"checkpoints without config\.json"):
        train.run(tiny, tmp_path)


def test_a_run_that_diverges_says_so(tiny, tmp_path):
    tiny.learning_rate = 1e30
    with pytest.raises(TrainingError, match=r"step \d: the .* not finite.*diverged"):
        train.run(tiny, tmp_path)


@pytest.mark.parametrize(("name", "arg"), VARIANTS)
def test_configs_name_networks_that_train_at_their_size(name, arg):
    config = get_config(name, arg)
    entry = zoo.find(config.model)
    assert template(zoo.build(config.model), entry.preprocessing.size)["params"]
    assert config.model.startswith("cifar10_") == (config.dataset == "cifar10")
    assert np.max(np.abs(entry.preprocessing.normalise(np.full((1, 3), 255, np.uint8)))) < 4


def test_every_config_is_in_the_list():
    assert {name for name, _ in VARIANTS} == set(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "cifar10_resnet"])
def test_every_config_runs(name, tmp_path):
    config = get_config(name, "runlocal")
    result = train.run(config, tmp_path)
    assert 0 <= result["top1"] <= result["top5"] <= 100
    _, variables = zoo.load(config.model, str(tmp_path / "weights"), image_size=config.image_size)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_the_command_runs_from_any_folder(tmp_path):
    command = [
        sys.executable,
        f"{REPOSITORY}/experiments/train.py",
        f"--config={REPOSITORY}/configs/train/cifar10_resnet.py:runlocal",
        f"--workdir={tmp_path}/out",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0.5 epochs of noise (16 images), 2 steps of 4 images" in done.stdout
    assert "top-1" in done.stdout
    assert (tmp_path / "out" / "weights").is_dir()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"] == "cifar10_resnet20"

    changed = [*command, "--config.steps=3"]
    done = subprocess.run(changed, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: the work folder has a run with other settings" in done.stderr
    assert "steps: 2 there, 3 given" in done.stderr
    assert "Traceback" not in done.stderr
