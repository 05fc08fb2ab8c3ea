"""The configs, and the main job on noise: nothing is downloaded."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxquant
from configs import common
from experiments import quant_post, settings, zoo
from experiments.weights.tree import WeightsError

REPOSITORY = Path(common.__file__).parent.parent
CONFIGS = sorted(
    path.stem
    for path in (REPOSITORY / "configs").glob("*.py")
    if path.stem not in ("__init__", "accuracy_table", "common", "settings")
)


def get_config(name: str, arg: str | None = None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def test_config_arguments_are_typed():
    parsed = common.parse_arg("runlocal,steps=3", runlocal=False, steps=1, variant="lite0")
    assert parsed.to_dict() == {"runlocal": True, "steps": 3, "variant": "lite0"}
    with pytest.raises(ValueError, match=r"'runlcal' .* known are runlocal"):
        common.parse_arg("runlcal", runlocal=False)
    with pytest.raises(ValueError, match="write True or False"):
        common.parse_arg("runlocal=maybe", runlocal=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_name_models_of_the_zoo(name):
    zoo.find(get_config(name).model)


def check_results(workdir: Path, model: str) -> None:
    assert json.loads((workdir / "config.json").read_text())["model"] == model
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    metrics = {line["measurement"]: line for line in map(json.loads, lines)}
    assert metrics["sites_int8"]["value"] > 0
    assert metrics["fp32"]["megabytes"] > 3 * metrics["int8"]["megabytes"]
    assert np.isfinite(metrics["sqnr_db"]["value"])
    report = json.loads((workdir / "report.json").read_text())
    assert {row["status"] for row in report["rows"]} <= {"int8", "float"}
    assert (workdir / "report.txt").read_text().strip()
    assert "<!doctype html>" in (workdir / "report.html").read_text().lower()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "cifar10_resnet20" else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_every_config_runs_from_any_folder(name, tmp_path):
    arguments = [
        f"--config={REPOSITORY}/configs/{name}.py:runlocal",
        f"--workdir={tmp_path}/out",
        f"--config.save_model_path={tmp_path}/models/int8.safetensors",
    ]
    command = [sys.executable, f"{REPOSITORY}/experiments/quant_post.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = get_config(name).model
    assert done.stdout.startswith(f"{model}, KL: noise (6 images) to evaluate on")
    assert "4 images) to calibrate on (of the same images)" in done.stdout
    assert "SQNR of the logits" in done.stdout
    assert "top-1 loss, 95 % interval" in done.stdout
    check_results(tmp_path / "out", model)
    _, qapply = jaxquant.load_quantized_model(tmp_path / "models" / "int8.safetensors")
    assert "sites quantized" in repr(qapply)


def test_a_model_without_weights_stops_before_any_work():
    with pytest.raises(WeightsError, match="vgg16: no package carries its weights"):
        quant_post.run(get_config("vgg16"))


def folder_of(path: Path, count: int) -> str:
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8)).save(path / f"{i}.png")
    rows = "".join(f"{i}.png,0\n" for i in range(count))
    (path / "labels.csv").write_text("file,label\n" + rows)
    return str(path)


def test_folders_go_before_the_embedded_data(tmp_path):
    config = get_config("efficientnet_lite0")
    config.calib_samples = 2
    config.data_dir = folder_of(tmp_path / "evaluation", 5)
    calibration, evaluation = settings.choose_data(config, 32)
    assert (calibration.name, calibration.size) == ("evaluation", 2)
    assert (evaluation.name, evaluation.size) == ("evaluation", 5)

    config.calib_dir = folder_of(tmp_path / "calibration", 3)
    config.eval_samples = 4
    calibration, evaluation = settings.choose_data(config, 32)
    assert (calibration.name, calibration.size) == ("calibration", 2)
    assert (evaluation.name, evaluation.size) == ("evaluation", 4)
