"""Libraries that a wheel carries run without a compiler, where they fit."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import zipfile

import pytest

from jaxquant import native
from jaxquant.native import build, compiler, instructions, shipped, shipping
from tests.native.cases import needs_kernels

pytestmark = needs_kernels


class FakeZig:
    """A compiler that takes no time: it gives the libraries that this process has.

    Attributes:
      command: what `compile_all` is given.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._log, processor, path = folder / "log", folder / "processor", folder / "zig"
        using = compiler.Compiler.of(compiler.find_compiler())
        using.compile_processor(processor, instructions.all_here()[-1].flags)
        path.write_text(f"""#!/bin/sh
            for output; do :; done
            echo "$@" >> {self._log}
            case "$*" in
              *processor.cc*) cp {processor} "$output" ;;
              *) cp {build.build()} "$output" ;;
            esac
            """)
        path.chmod(0o755)
        self.command = [str(path)]

    @property
    def calls(self) -> list[set[str]]:
        """The words of each call."""
        return [set(shlex.split(line)) for line in self._log.read_text().splitlines()]


@pytest.fixture
def zig(tmp_path: pathlib.Path) -> FakeZig:
    return FakeZig(tmp_path)


HERE = next((tag for tag, t in shipping.TARGETS.items() if t.machine == platform.machine()), "")


@pytest.fixture
def folder(zig: FakeZig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """What a wheel would carry, in a place of its own."""
    if not HERE:
        pytest.skip(f"no wheel is made for {platform.machine()}")
    path = tmp_path / "compiled"
    path.mkdir()
    sets = shipping.compile_all(path, HERE, zig.command)
    assert sets == [wanted.name for wanted in instructions.all_here()]
    monkeypatch.setattr(shipped, "FOLDER", path)
    return path


@pytest.mark.parametrize(
    ("tag", "target", "best"),
    [
        (
            "manylinux_2_27_x86_64",
            "x86_64-linux-gnu.2.27",
            {"-march=x86_64", "-mavx512vnni", "-mamx-int8"},
        ),
        (
            "manylinux_2_27_aarch64",
            "aarch64-linux-gnu.2.27",
            {"-mcpu=generic+v8_2a+dotprod+i8mm"},
        ),
        ("macosx_11_0_arm64", "aarch64-macos.11.0", {"-mcpu=generic+v8_2a+dotprod+i8mm"}),
    ],
)
def test_each_system_is_compiled_for(
    zig: FakeZig, tmp_path: pathlib.Path, tag: str, target: str, best: set[str]
):
    sets = shipping.compile_all(tmp_path, tag, zig.command)
    *kernels, processor = zig.calls
    assert len(kernels) == len(sets)
    assert all({"-target", target} <= call for call in zig.calls)
    assert best <= kernels[0]
    # What asks the processor runs on any: it has the flags of the plainest set.
    assert {flag for flag in processor if flag.startswith("-m")} <= kernels[-1]
    assert not any(word.startswith("-mtune") for call in zig.calls for word in call)
    assert {path.name for path in tmp_path.glob("*.so")} == {
        shipped.PROCESSOR,
        *map(shipped.file_of, sets),
    }


def test_of_another_system_is_told_which_there_are(tmp_path: pathlib.Path):
    with pytest.raises(build.BuildError, match="'native', but for manylinux_2_27_x86_64, many"):
        shipping.compile_all(tmp_path, "native")


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
x = jnp.linspace(-1, 1, 128).reshape(2, 64)
qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], progress=False)
qapply(qapply.prepare(qparams), x[:1])
print(build.build().parent.name, qapply.backend)
"""


@pytest.mark.parametrize("platform_tag", ["macosx_11_0_arm64", "manylinux_2_27_x86_64"])
def test_clang_compiles_the_kernels(tmp_path: pathlib.Path, platform_tag: str):
    pytest.importorskip("ziglang")
    machine, name = shipping.TARGETS[platform_tag]
    using = compiler.Compiler([*shipping.ZIG, "-target", name], version="", seconds=None)
    best = shipping.for_zig(instructions.of_machine(machine)[0])
    # What it accepts, and not what it makes of it, which takes ten times as long.
    using.compile_kernels(best, tmp_path / "kernels.o", ("-O0", "-c"))
    assert (tmp_path / "kernels.o").stat().st_size


@pytest.mark.slow
def test_a_wheel_runs_natively_without_a_compiler(tmp_path: pathlib.Path):
    pytest.importorskip("hatchling")
    pytest.importorskip("ziglang")
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    environment = {**os.environ, "JAXQUANT_WHEEL": HERE}
    subprocess.run(command, cwd=root, env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{HERE}.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    without = {"PATH": "", "HOME": "/nowhere", "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env=without, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compiled native"), done.stdout
    assert native.available().reason.split()[0] in done.stdout
