"""The experiments as programs: what is refused is refused at once and in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import program
from experiments.errors import SettingsError, refusing_settings

REPOSITORY = Path(program.__file__).parent.parent


# Each starts a process, which takes seconds: these few stand for the others by default.
def slow(*case: object) -> object:
    return pytest.param(*case, marks=pytest.mark.slow)


LOCAL = "--config=configs/efficientnet_lite0.py:runlocal"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"experiments/{name}.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quant_post", ["--config=configs/vgg.py"], "No such file or directory: 'configs/vgg.py'"),
        ("quant_post", [LOCAL, "--config.algoo=KL"], 'Did you mean "algo" instead of "algoo"?'),
        slow("quant_post", ["--config=configs/vgg16.py:fast"], "known are runlocal"),
        slow("quant_post", [LOCAL, "--config.batch_size=x"], "invalid literal for int()"),
        ("quant_post", [LOCAL, "--config.model=mobilnet_v1"], "did you mean 'mobilenet_v1'?"),
        slow(
            "quant_post", [LOCAL, "--config.dataset=imagenet"], "choose foolbox, cifar10 or noise"
        ),
        slow("quant_post", [LOCAL, "--config.save_model_path=m.onnx"], "a .safetensors file"),
        ("accuracy_table", ["--config.modles=vgg16"], 'Did you mean "models"'),
        slow("accuracy_table", ["--methods=KLL"], "did you mean 'KL'?"),
        ("train", ["--config=configs/train/resnet.py"], "nothing to train on"),
    ],
)
def test_what_is_refused_is_one_line(name, arguments, message, tmp_path):
    done = run(name, *arguments, f"--workdir={tmp_path}/run")
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [slow("algo=KLL", "'KLL' is not known"), ("skip=(headd,)", "matches no site")],
)
def test_options_are_refused_before_any_evaluation(option, message, tmp_path):
    done = run("quant_post", LOCAL, f"--config.{option}", f"--workdir={tmp_path}/run")
    assert done.returncode == 1
    assert message in done.stderr
    assert "FP32" not in done.stdout


def test_help_lists_the_settings():
    shown = run("quant_post", "--help").stdout
    assert "--config.calib_samples=100: images to calibrate on" in shown
    assert "--config.save_model_path=''" in shown


def test_a_work_folder_of_other_settings_is_kept(tmp_path):
    settings = {"algo": "KL", "skip": ("head",), "batch_size": 10}
    program.check_workdir(tmp_path, settings)  # nothing there yet
    (tmp_path / "config.json").write_text(json.dumps(settings))
    program.check_workdir(tmp_path, settings)
    with pytest.raises(SettingsError, match=r"algo: 'KL' there, 'mse' given") as caught:
        program.check_workdir(tmp_path, {**settings, "algo": "mse"})
    assert "batch_size" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SettingsError, match="is no JSON"):
        program.check_workdir(tmp_path, settings)


def test_only_what_refuses_an_argument_is_an_error_of_settings():
    with pytest.raises(SettingsError, match=r"^no such algo$"), refusing_settings():
        raise ValueError("no such algo")
    with pytest.raises(ZeroDivisionError), refusing_settings():
        raise ZeroDivisionError
