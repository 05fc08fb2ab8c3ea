"""Compile the kernels with the machine's own compiler, once, and load them.

The library is kept in a per-user cache (`jaxquant.native.cache`) under a name that hashes the
sources, the compiler, jaxlib and the processor, so that a change of any of them compiles anew: one
home directory may serve many machines.  Where it cannot be compiled, one that was compiled for a
lesser processor does.  Needs a C++17 compiler (`$CXX`, else `c++`, `g++` or `clang++`); the FFI
headers come with jaxlib.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
from typing import NamedTuple

import jax
import jaxlib.version

from jaxquant.native import fields, foreign, processor
from jaxquant.native.cache import CACHE_VARIABLE, Folder, Sealed, cache_dir, hashed
from jaxquant.native.errors import BuildError, CompilerTimeout

__all__ = ["CACHE_VARIABLE", "BuildError", "build", "cache_dir", "find_compiler", "load"]

_SOURCES = pathlib.Path(__file__).parent / "src"
_MAIN, _PROCESSOR = "handlers.cc", "processor.cc"
# GCC's own header of AVX-512 starts from values that it leaves undefined, which GCC before 13 takes
# for ours (its bug 105593).
WARNINGS = ("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
# Nobody reads the flags of floating-point exceptions: without them choices between two values need
# no branch, and loops with such become vectors on AVX2.
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno",
    "-fno-trapping-math", *WARNINGS, *fields.definitions(),
)  # fmt: skip
_ANY_PROCESSOR = ("-std=c++17", "-O0", "-fPIC", "-shared", *WARNINGS)
_SECONDS = 300.0  # that the compiler may take


def find_compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
      BuildError: there is none.
    """
    if given := os.environ.get("CXX"):
        try:
            command = shlex.split(given)
        except ValueError as error:
            raise BuildError(f"CXX is {given!r}, which is no command: {error}") from None
        if command:
            return command
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
      BuildError: there is no compiler, or it failed, or no folder to keep the library in.
    """
    return _obtain(flags).path


@functools.cache
def load(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The loaded library, compiled if need be, with its functions declared.

    Raises:
      BuildError: it cannot be compiled or loaded.
    """
    return _obtain(flags).library


class _Loaded(NamedTuple):
    path: pathlib.Path
    library: ctypes.CDLL


def _obtain(flags: tuple[str, ...]) -> _Loaded:
    try:
        with Folder(cache_dir()) as folder:
            return _remembering_timeouts(folder, find_compiler(), flags)
    except OSError as error:  # a full disk, sources that cannot be read, no descriptor left, ...
        raise BuildError(f"cannot compile the kernels: {error}") from None


def _remembering_timeouts(folder: Folder, command: list[str], flags: tuple[str, ...]) -> _Loaded:
    """A compiler that hangs is not waited for in every process."""
    note = f"timeout-{_name(command, flags)}"
    if (reason := folder.failure(note)) is not None:
        raise BuildError(reason)
    try:
        return _from_cache(folder, command, flags)
    except CompilerTimeout as error:
        folder.remember_failure(note, str(error))
        raise


def _from_cache(folder: Folder, command: list[str], flags: tuple[str, ...]) -> _Loaded:
    version = _printed_by([*command, "--version"])
    present = _processor(folder, command, version)
    family = f"kernels-{_name(command, flags, version)}"
    name = f"{family}-{hashed([present.text.encode()], 12)}.so"
    if (found := folder.find(name)) is not None:
        return _load(found)
    with folder.workshop() as workshop:
        compiling = [*command, *_FLAGS, *flags]
        try:
            needs = processor.needed(
                _printed_by([*compiling, "-dM", "-E", "-x", "c++", os.devnull])
            )
            if present.features is not None and (lacks := needs - present.features):
                raise BuildError(
                    f"{shlex.join(compiling)} uses {', '.join(sorted(lacks))}, which this "
                    "processor does not have"
                )
            headers = ["-isystem", jax.ffi.include_dir()]
            output = workshop.path / "library.so"
            _printed_by([*compiling, str(_SOURCES / _MAIN), *headers, "-o", str(output)])
            made = workshop.sealed(output.name, needs)
        except BuildError:
            if (found := _for_a_lesser_processor(folder, family, present)) is None:
                raise
            return _load(found)
        loaded = _load(made)  # before it is kept: what does not load is compiled anew next time
        return loaded._replace(path=workshop.store(made, name).path)


def _for_a_lesser_processor(
    folder: Folder, family: str, present: processor.Processor
) -> Sealed | None:
    """The best library that was compiled on another machine and runs here; None for none."""
    best = None
    for name in folder.names():
        if not (name.startswith(family) and name.endswith(".so")):
            continue
        if (found := folder.find(name)) is None:
            continue
        if present.runs(found.needs) and (best is None or len(found.needs) > len(best.needs)):
            best, found = found, best
        if found is not None:
            os.close(found.descriptor)
    return best


def _processor(folder: Folder, command: list[str], version: str) -> processor.Processor:
    """What the processor has, by a library of its own."""
    any_processor = list(_ANY_PROCESSOR)
    if platform.machine() in ("x86_64", "AMD64"):
        any_processor.append("-march=x86-64")  # behind what CXX may say
    source = (_SOURCES / _PROCESSOR).read_bytes()
    parts = [source, *map(os.fsencode, (*command, *any_processor, version, platform.machine()))]
    name = f"processor-{hashed(parts, 20)}.so"
    if (found := folder.find(name)) is not None:
        return _ask(found)
    with folder.workshop() as workshop:
        output = workshop.path / "library.so"
        compiling = [*command, *any_processor, str(_SOURCES / _PROCESSOR), "-o", str(output)]
        _printed_by(compiling)
        made = workshop.sealed(output.name, frozenset())
        present = _ask(made)
        workshop.store(made, name)
        return present


def _ask(found: Sealed) -> processor.Processor:
    try:
        return processor.ask(_dlopen(found))
    except (OSError, AttributeError) as error:
        raise BuildError(f"{found.path} does not load: {error}") from None


def _load(found: Sealed) -> _Loaded:
    try:
        library = _dlopen(found)
        foreign.declare(library)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{found.path} does not load: {error}") from None
    return _Loaded(found.path, library)


def _dlopen(found: Sealed) -> ctypes.CDLL:
    """Load the file that was checked, whatever has its name by now.

    The descriptor stays open: a later one of its number would have its name, by which the loader
    takes a library for one that is loaded already.
    """
    descriptor = f"/proc/self/fd/{found.descriptor}"
    return ctypes.CDLL(descriptor if os.path.exists(descriptor) else str(found.path))


def _name(command: list[str], flags: tuple[str, ...], version: str = "") -> str:
    files = sorted(p for p in _SOURCES.iterdir() if p.suffix in (".h", ".cc"))
    parts = [part for path in files for part in (path.name.encode(), path.read_bytes())]
    texts = (*command, *_FLAGS, *flags, version, platform.machine(), jaxlib.version.__version__)
    return hashed([*parts, *map(os.fsencode, texts)], 20)


def _printed_by(command: list[str]) -> str:
    """What a compiler prints.

    It reads nothing, and is the leader of a group of processes, so that those that it started end
    with it.

    Raises:
      BuildError: it does not run, or fails.
      CompilerTimeout: it takes too long.
    """
    text = shlex.join(command)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{text} does not run: {error}") from None
    try:
        printed, errors = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        _end(process)
        raise CompilerTimeout(f"{text} did not end within {_SECONDS:g} s") from None
    except BaseException:  # Ctrl-C does not reach another group
        _end(process)
        raise
    if process.returncode:
        said = errors.decode(errors="replace").strip()[-2000:]
        raise BuildError(f"{text} failed (exit status {process.returncode}):\n{said}")
    return printed.decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
