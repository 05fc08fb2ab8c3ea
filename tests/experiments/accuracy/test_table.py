"""The whole table on networks of two layers and images of noise: nothing is downloaded."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from experiments import zoo
from experiments.accuracy import methods, table
from experiments.accuracy.measure import by_calibration
from experiments.accuracy.methods import METHODS
from experiments.data import DataError
from experiments.weights.tree import WeightsError
from tests.experiments.accuracy import jobs

REPOSITORY = Path(common.__file__).parent.parent
CHOSEN = methods.choose(["KL", "abs_max"])


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> ConfigDict:
    """Two networks with weights, and one without."""
    monkeypatch.setattr(zoo, "MODELS", zoo.MODELS | jobs.TINY)
    monkeypatch.setattr(table, "backend_of_processes", lambda: "cpu")
    config = common.get_config("", runlocal=True)
    config.image_size = 0
    with config.ignore_type():
        config.weights = ConfigDict({"tiny_a": "random", "tiny_b": "random", "tiny_c": ""})
    config.models = ("tiny_b", "tiny_c", "tiny_a")
    config.per_model = ConfigDict({"tiny_a": {"eval_samples": 5}})
    config.processes = 2
    config.memory_gigabytes = 100.0
    return config


def finish(plan: table.Plan, failures: dict[str, str]) -> tuple[str, list[dict]]:
    folder = plan.workdir
    text = table.finish(plan, failures, folder / "table.md", folder / "rows.jsonl")
    assert text in (folder / "table.md").read_text()
    return text, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def plan_of(config: ConfigDict, workdir: Path) -> table.Plan:
    return table.make_plan(config, [], CHOSEN, workdir)


def stamps(workdir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in workdir.glob("*/*")}


def test_every_network_with_weights_under_every_method(config, tmp_path):
    plan = plan_of(config, tmp_path)
    assert len(plan.slots) == 2
    assert table.run(plan, worker=jobs.measure_tiny) == {}
    text, rows = finish(plan, {})
    assert [(row["model"], row.get("method")) for row in rows] == [
        ("tiny_b", "KL"),
        ("tiny_b", "abs_max"),
        ("tiny_a", "KL"),
        ("tiny_a", "abs_max"),
        ("tiny_c", None),
    ]
    assert "- tiny_c: no weights: no package carries them." in text
    assert [row["images"] for row in rows[:4]] == [6, 6, 5, 5]
    for row in rows[:4]:
        assert row["sites_int8"] == 2
        assert row["fp32"]["megabytes"] > 1.5 * row["int8"]["megabytes"]
        assert row["sqnr_db"] > 20
        loss = row["top1_loss"]
        assert loss["points"] == pytest.approx(row["fp32"]["top1"] - row["int8"]["top1"])
        assert loss["low"] <= loss["points"] <= loss["high"]
        assert row["options"] == {"algo": row["method"]}
    assert rows[2]["sqnr_db"] != rows[3]["sqnr_db"]
    assert str(tmp_path) not in text + json.dumps(rows)

    before = stamps(tmp_path)
    again = plan_of(config, tmp_path)
    assert again.missing == {}
    assert "KL (finished), abs_max (finished)" in table.describe(again)
    assert table.run(again, worker=jobs.die) == {}
    assert finish(again, {}) == (text, rows)
    assert {k: v for k, v in stamps(tmp_path).items() if k in before} == before


def test_a_killed_run_goes_on_where_it_stopped(config, tmp_path):
    config.models = ("tiny_a",)
    plan = plan_of(config, tmp_path)
    failures = table.run(plan, worker=jobs.die_after_the_first_row)
    assert "ended with code -9" in failures["tiny_a"]
    before = stamps(tmp_path)
    assert len(before) == 2  # the float logits and a row
    text, rows = finish(plan, failures)
    assert "- tiny_a: failed: its process ended" in text
    assert [row.get("method") for row in rows] == ["KL", None]

    rest = plan_of(config, tmp_path)
    assert {name: [m.name for m in wanted] for name, wanted in rest.missing.items()} == {
        "tiny_a": ["abs_max"]
    }
    assert "KL (finished), abs_max (to run)" in table.describe(rest)
    assert table.run(rest, worker=jobs.measure_tiny) == {}
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert [row["method"] for row in finish(rest, {})[1]] == ["KL", "abs_max"]


def test_what_the_figures_depend_on_makes_a_new_row(config, tmp_path, monkeypatch, rng):
    config.models = ("tiny_a",)

    def keys(config: ConfigDict = config) -> tuple[str, str]:
        (network,) = plan_of(config, tmp_path).networks
        store = table.Store(tmp_path)
        row = store.row_path(network.row_key(CHOSEN[0]))
        return row.name, store.evaluation_path(network).name

    row, float32 = keys()
    assert keys() == (row, float32)

    changed = ConfigDict(config.to_dict())
    changed.calib_samples = 3
    assert keys(changed)[0] != row
    assert keys(changed)[1] == float32

    changed.per_model.tiny_a.eval_samples = 4
    assert keys(changed)[1] != float32

    arrays = {"conv/kernel": rng.normal(size=(3, 3, 3, 4)).astype(np.float32)}
    names = []
    for _ in range(2):
        np.savez(tmp_path / "w.npz", **arrays)
        given = ConfigDict(config.to_dict())
        given.weights.tiny_a = str(tmp_path / "w.npz")
        names.append(keys(given)[1])
        arrays["conv/kernel"][0, 0, 0, 0] += 1
    assert len({float32, *names}) == 3

    (planned,) = plan_of(config, tmp_path).networks
    key = planned.row_key(CHOSEN[0])
    monkeypatch.setattr(table.rows, "_library_sources", lambda: "another")
    assert keys()[0] != row
    assert keys()[1] == float32
    assert planned.row_key(CHOSEN[0]) == key  # what is running is still the old library


def test_a_torn_file_of_logits_is_made_again(config, tmp_path):
    config.models = ("tiny_a",)
    (network,) = plan_of(config, tmp_path).networks
    store = table.Store(tmp_path)
    path = store.evaluation_path(network)
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 torn")
    assert store.evaluation(network) is None


def test_methods_that_calibrate_alike_share_a_calibration():
    groups = [[method.name for method in group] for group in by_calibration(METHODS)]
    one_sweep = ["KL", "abs_max", "auto", "mse", "percentile", "emd", "ptf"]
    assert groups == [one_sweep, ["KL-full", "abs_max-full"], ["avg"]]


def test_bad_arguments_are_explained(config, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'vgg19'"):
        table.make_plan(config, ["vgg"], CHOSEN, tmp_path)
    config.data_dir = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        plan_of(config, tmp_path)
    config.data_dir = ""
    config.weights.tiny_c = str(tmp_path / "w.npz")
    with pytest.raises(WeightsError, match=r"w\.npz: no such weight file"):
        plan_of(config, tmp_path)


def test_networks_that_are_not_in_the_config_can_be_named(config, tmp_path):
    plan = table.make_plan(config, ["vgg16_torchvision", "tiny_a"], CHOSEN, tmp_path)
    assert [network.name for network in plan.networks] == ["vgg16_torchvision", "tiny_a"]
    assert list(plan.missing) == ["tiny_a"]


def test_as_many_processes_as_networks_cores_and_devices(config, tmp_path, monkeypatch):
    config.processes = 0
    monkeypatch.setattr(table.parallel, "usable_cores", lambda: 8)
    assert len(plan_of(config, tmp_path).slots) == 2
    monkeypatch.setattr(table, "backend_of_processes", lambda: "gpu")
    assert len(plan_of(config, tmp_path).slots) == 1


def test_the_backend_is_asked_in_another_process(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert table.backend_of_processes() == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(ValueError, match=r"JAX finds no device: .*abacus"):
        table.backend_of_processes()


def command(workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [f"--config={REPOSITORY}/configs/accuracy_table.py:runlocal", f"--workdir={workdir}"]
    script = f"{REPOSITORY}/experiments/accuracy_table.py"
    return subprocess.run(
        [sys.executable, script, *given, *arguments],
        cwd=workdir,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_lists_what_it_would_run(tmp_path):
    done = command(tmp_path, "--dry_run", "--methods=abs_max,KL")
    assert done.returncode == 0, done.stderr
    assert "vgg16                   no weights" in done.stdout
    assert "cifar10_resnet20        KL (to run), abs_max (to run); about 1" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_command_explains_what_is_wrong(tmp_path):
    (tmp_path / "README.md").write_text("no place")
    done = command(tmp_path, f"--markdown={tmp_path}/README.md")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "the table goes between" in done.stderr


@pytest.mark.slow
def test_the_command_writes_the_table(tmp_path):
    done = command(tmp_path, "--methods=KL")
    assert done.returncode == 0, done.stderr
    assert "| ResNet20, CIFAR-10 | KL |" in (tmp_path / "table.md").read_text()
    assert "- VGG16: no weights" in (tmp_path / "table.md").read_text()
    kl, vgg = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (kl["model"], kl["method"], vgg["model"]) == ("cifar10_resnet20", "KL", "vgg16")
