"""Libraries that a wheel carries run without a compiler, where they fit."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from jaxquant import native
from jaxquant.native import build, instructions, shipped, shipping
from tests.native.cases import needs_kernels
from tests.native.fake_compiler import FakeCompiler

pytestmark = needs_kernels


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """What a wheel would carry, in a place of its own."""
    monkeypatch.setenv("CXX", FakeCompiler(tmp_path).command)
    path = tmp_path / "compiled"
    path.mkdir()
    assert shipping.compile_all(path) == [wanted.name for wanted in instructions.all_here()]
    monkeypatch.setattr(shipped, "FOLDER", path)
    return path


def test_no_compiler_is_asked(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "false")
    assert build.build().parent == folder
    assert build.build("portable") == folder / "kernels-portable.so"
    monkeypatch.setenv(instructions.VARIABLE, "portable")
    assert build.build() == folder / "kernels-portable.so"


def test_the_best_set_is_taken_that_the_processor_has(folder: pathlib.Path):
    best = build.build()
    best.unlink()  # as of a compiler that does not know it
    assert shipped.find() not in (best, None)


@pytest.mark.parametrize(
    ("field", "other"), [("sources", "others"), ("interface", [1, 0]), ("interface", [0, 10**6])]
)
def test_what_does_not_fit_is_left(folder: pathlib.Path, field: str, other: object):
    """Sources that were changed; a jaxlib of another interface, or older than the wheel's."""
    manifest = folder / "manifest.json"
    made_of = json.loads(manifest.read_text())
    assert shipped.find() is not None
    manifest.write_text(json.dumps(made_of | {field: other}))
    assert shipped.find() is None


def test_a_checkout_carries_none():
    assert not shipped.FOLDER.exists()
    assert shipped.find() is None


CODE = """
import jax.numpy as jnp, jaxquant
from jaxquant.native import build
params, apply_fn = {"w": jnp.eye(64)}, lambda p, x: x @ p["w"]
qparams, qapply = jaxquant.quant_post(params, apply_fn, [jnp.ones((2, 64))], progress=False)
qapply(qapply.prepare(qparams), jnp.ones((1, 64)))
print(build.build().parent.name, qapply.backend)
"""


@pytest.mark.slow
def test_a_wheel_runs_natively_without_a_compiler(tmp_path: pathlib.Path):
    pytest.importorskip("hatchling")
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    environment = {**os.environ, "JAXQUANT_WHEEL": "native"}
    subprocess.run(command, cwd=root, env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-any" not in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    without = {"PATH": "", "HOME": "/nowhere", "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env=without, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compiled native"), done.stdout
    assert native.available().reason.split()[0] in done.stdout
