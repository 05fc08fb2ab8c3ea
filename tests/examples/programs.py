"""Builds and runs the programs of examples/, which take MODEL INPUT OUTPUT."""

import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def tool(name: str) -> str:
    """A compiler, or a skip that says that it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on the PATH")
    return found


def build(*command) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_cpp(source: Path, program: Path, library: Path, *options) -> None:
    """The command that stands in the source's first lines."""
    link = (library, f"-Wl,-rpath,{library.parent}", "-o", program)
    build(tool("g++"), "-std=c++17", "-O2", "-Wall", "-Wextra", *options, source, *link)


def image() -> np.ndarray:
    """One image for `tests.deploy.models.small`, as `[1, 8, 8, 3]`."""
    return np.asarray(jax.random.normal(jax.random.key(3), (1, 8, 8, 3)))


def answer(folder: Path, command: list, model: Path, values: np.ndarray) -> np.ndarray:
    """What a program writes for these values."""
    given, result = folder / "input.f32", folder / "output.f32"
    values.tofile(given)
    build(*command, model, given, result)
    return np.fromfile(result, np.float32)


def refusal(folder: Path, command: list, model: Path, values: np.ndarray) -> str:
    """What a program says that must not take these values."""
    given = folder / "refused.f32"
    values.tofile(given)
    command = [*map(str, command), model, given, folder / "none.f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return done.stderr
