"""The configs, and the main job on noise: nothing is downloaded."""

import importlib
import json
from pathlib import Path

import pytest

from configs import common
from experiments import quant_post, results, zoo

CONFIGS = sorted(
    path.stem
    for path in Path(common.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "common")
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


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke(name, tmp_path):
    config = get_config(name, "runlocal")
    title, result, report = quant_post.run(config)
    results.write(tmp_path, config.to_dict(), result, report)

    assert config.model in title
    assert result["sites_int8"] > 0
    assert result["fp32"]["megabytes"] > 3 * result["int8"]["megabytes"]
    assert "SQNR" in results.table(title, result)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == config.model
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["measurement"] for line in lines} == set(result)
    assert json.loads((tmp_path / "report.json").read_text())["rows"]
    assert (tmp_path / "report.txt").read_text().strip()
