"""Flax models of Hugging Face's `transformers`, unedited, in an environment of their own."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.network
def test_its_flax_models_run_unedited(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    # What this environment has need not be installed again.
    (packages / "around.pth").write_text("\n".join(site.getsitepackages()))
    subprocess.run([python, "-m", "pip", "install", "-q", "transformers<5"], check=True)
    run = subprocess.run(
        [python, "-m", "tests.hugging_face"], cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
    )  # fmt: skip
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 4 * 3 + 1
    *others, generated = rows
    for row in others:
        assert row["sqnr"] > 30, row
        assert row["int8"] >= 10, row
    assert generated["same"] > 0.9
    assert generated["int8"] >= 20
