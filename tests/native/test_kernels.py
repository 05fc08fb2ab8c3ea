"""The C++ of the kernels by itself: no warning, and no sanitizer that complains.

`kernels.cc` compares every instruction set that this processor has with plain loops, AMX by an
emulation (`amx_emulation.h`) also where the processor lacks it; `float_kernels.cc` does so with
those of floats, by vectors of every length.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import jax
import pytest

from jaxquant.native import compiler, fields, instructions, sources
from tests.native.cases import needs_kernels

pytestmark = needs_kernels  # without a compiler there is nothing to try

_TESTS = pathlib.Path(__file__).parent
_SOURCES = sources.FOLDER
_STRICT = ("-std=c++17", *sources.WARNINGS, "-Werror", *fields.definitions())
_SANITIZED = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def compile_(
    *arguments: object, machine: str = "-march=native"
) -> subprocess.CompletedProcess[str]:
    command = [*compiler.find_compiler(), *_STRICT, machine, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("source", ["handlers.cc", "processor.cc"])
def test_no_warning(source: str):
    headers = ("-isystem", jax.ffi.include_dir())
    done = compile_("-fsyntax-only", *headers, _SOURCES / source)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++")
def test_no_warning_of_clang(monkeypatch: pytest.MonkeyPatch):
    """What compiles them on macOS, and for wheels."""
    monkeypatch.setenv("CXX", "clang++")
    headers = ("-isystem", jax.ffi.include_dir())
    done = compile_("-fsyntax-only", *headers, _SOURCES / "handlers.cc")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_warning_of_the_optimizer(tmp_path: pathlib.Path):
    """Some warnings need what only the optimizer finds out."""
    headers = ("-isystem", jax.ffi.include_dir())
    done = compile_(
        "-O3", "-fPIC", "-shared", *headers, _SOURCES / "handlers.cc", "-o", tmp_path / "library.so"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "optimized", "arguments"),
    [
        ("kernels.cc", "-O0", ("1",)),
        ("float_kernels.cc", "-O0", ()),
        pytest.param("kernels.cc", "-O1", ("300",), marks=pytest.mark.slow),
        pytest.param("float_kernels.cc", "-O3", (), marks=pytest.mark.slow),
    ],
)
def test_against_plain_loops(
    source: str, optimized: str, arguments: tuple[str, ...], tmp_path: pathlib.Path
):
    empty = tmp_path / "empty.cc"
    empty.write_text("int main() {}\n")
    if compile_(*_SANITIZED, empty, "-o", tmp_path / "empty").returncode:
        pytest.skip("the compiler has no sanitizers")
    program = tmp_path / "kernels"
    done = compile_(
        optimized, *_SANITIZED, "-pthread", "-I", _SOURCES, _TESTS / source, "-o", program
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Leaks are looked for by means that a container may forbid.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    found = subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(not (CROSS and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user")
@pytest.mark.parametrize("wanted", instructions.ARM, ids=lambda wanted: wanted.name)
def test_on_emulated_arm(
    wanted: instructions.InstructionSet, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """The sets of ARM against plain loops, without sanitizers, which the emulator does not run."""
    monkeypatch.setenv("CXX", f"{CROSS} -static")
    program = tmp_path / "kernels"
    (machine,) = wanted.flags
    sources = ("-pthread", "-I", _SOURCES, _TESTS / "kernels.cc")
    done = compile_("-O1", *sources, "-o", program, machine=machine)
    assert done.returncode == 0, done.stderr
    found = subprocess.run(
        [str(EMULATOR), "-cpu", "max", program, "60"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
