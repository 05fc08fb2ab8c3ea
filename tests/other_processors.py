"""Programs that see another x86 processor than there is, by `hide_cpu_features.c`."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("hide_cpu_features.c")
_UNAVAILABLE = 77  # the exit status of a program whose CPUID cannot fault
# What is hidden, by the processor that is left.
HIDDEN = {"this": "", "AVX-512 without VNNI": "vnni", "AVX2": "vnni,avx512"}


def run_python(processor: str, folder: Path, program: str, *arguments: object) -> None:
    """Run a Python program as on one of the processors of `HIDDEN`; it has to succeed.

    Skips the test where that processor cannot be had.

    Args:
      processor: which.
      folder: a temporary one, for the library that hides features.
      program: the source.
      arguments: of the program.
    """
    environment = dict(os.environ)
    if HIDDEN[processor]:
        library = _library(folder)
        environment |= {"LD_PRELOAD": str(library), "HIDE_CPU_FEATURES": HIDDEN[processor]}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == _UNAVAILABLE:
        pytest.skip("this processor or system cannot make CPUID fault")
    assert done.returncode == 0, done.stderr


def _library(folder: Path) -> Path:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("only x86 on Linux shows other processors than there are")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = folder / "hide_cpu_features.so"
    if not path.exists():
        command = [compiler, "-O1", "-shared", "-fPIC", str(_SOURCE), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return path
