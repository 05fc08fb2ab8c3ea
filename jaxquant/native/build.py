"""Compile the kernels with the machine's own compiler, once, and load them.

The library is kept in a per-user cache under a name that hashes the sources, the compiler, the CPU
and jaxlib, so that a change of any of them compiles anew.  Needs a C++17 compiler (`$CXX`, else
`c++`, `g++` or `clang++`); the FFI headers come with jaxlib.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax
import jaxlib.version

from jaxquant.native.foreign import declare

_SOURCES = pathlib.Path(__file__).parent / "src"
_MAIN = "handlers.cc"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-w")
_SECONDS = 300
CACHE_VARIABLE = "JAXQUANT_CACHE_DIR"


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def cache_dir() -> pathlib.Path:
    """Where compiled kernels are kept: `$JAXQUANT_CACHE_DIR`, else the user's cache directory."""
    if given := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "jaxquant"


def find_compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
      BuildError: there is none.
    """
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler is on the PATH (install g++ or clang++, or set CXX)")


def build(flags: tuple[str, ...] = ()) -> pathlib.Path:
    """Compile the kernels unless the cache has them.

    Args:
      flags: further compiler flags, which come last.

    Returns:
      The path of the shared library.

    Raises:
      BuildError: there is no compiler, or it failed.
    """
    compiler = find_compiler()
    target = cache_dir() / f"kernels-{_key(compiler, flags)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, beside = tempfile.mkstemp(suffix=".so", dir=target.parent)
    except OSError as error:
        raise BuildError(f"cannot write to {target.parent}: {error}") from None
    os.close(handle)
    command = [*compiler, *_FLAGS, *flags, str(_SOURCES / _MAIN)]
    command += ["-isystem", jax.ffi.include_dir(), "-o", beside]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
        os.replace(beside, target)  # another process may have put the same library there
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)} did not run: {error}") from None
    finally:
        pathlib.Path(beside).unlink(missing_ok=True)
    return target


@functools.cache
def load(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The loaded library, compiled if need be.

    Raises:
      BuildError: it cannot be compiled or loaded.
    """
    path = build(flags)
    try:
        library = ctypes.CDLL(str(path))
        declare(library)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} does not load: {error}") from None
    return library


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    for text in (
        *compiler,
        *_FLAGS,
        *flags,
        _version(compiler),
        _cpu(),
        jaxlib.version.__version__,
    ):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(compiler)} does not run: {error}") from None


def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model", "cpu family", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


if __name__ == "__main__":
    print(build())
