"""Compile the kernels with the machine's own compiler, once, and load them.

It is compiled for the best set of instructions that the processor has
(`jaxquant.native.instructions`), and kept in a per-user cache (`jaxquant.native.cache`) under a
name that hashes the sources, the compiler, jaxlib and the set, so that a change of any of them
compiles anew: one home directory may serve many machines, which share what is for the same set.
Where it cannot be compiled, one that was compiled for a lesser set does.  Needs a C++17 compiler
(`$CXX`, else `c++`, `g++` or `clang++`); the FFI headers come with jaxlib.
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
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jaxlib.version

from jaxquant.native import fields, foreign, instructions, processor
from jaxquant.native.cache import CACHE_VARIABLE, Folder, Sealed, cache_dir, hashed
from jaxquant.native.errors import BuildError, CompilerTimeout
from jaxquant.native.instructions import InstructionSet

__all__ = ["CACHE_VARIABLE", "BuildError", "build", "cache_dir", "find_compiler", "load"]

_SOURCES = pathlib.Path(__file__).parent / "src"
_MAIN, _PROCESSOR = "handlers.cc", "processor.cc"
# GCC's own header of AVX-512 starts from values that it leaves undefined, which GCC before 13 takes
# for ours (its bug 105593).
WARNINGS = ("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
# Nobody reads the flags of floating-point exceptions: without them choices between two values need
# no branch, and loops with such become vectors on AVX2.
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno",
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


def build(name: str | None = None) -> pathlib.Path:
    """Compile the kernels unless the cache has them.

    Args:
      name: of the set of instructions; None for the best that this processor has.

    Returns:
      The path of the shared library.

    Raises:
      BuildError: there is no compiler, or it failed, or no folder to keep the library in, or the
        processor lacks the set.
    """
    return _obtain(name).path


@functools.cache
def load(name: str | None = None) -> ctypes.CDLL:
    """The loaded library, compiled if need be, with its functions declared.

    Args:
      name: as of `build`.

    Raises:
      BuildError: it cannot be compiled or loaded.
    """
    return _obtain(name).library


class _Loaded(NamedTuple):
    path: pathlib.Path
    library: ctypes.CDLL


class _Compiler(NamedTuple):
    command: list[str]
    version: str


def _obtain(name: str | None) -> _Loaded:
    try:
        with Folder(cache_dir()) as folder:
            return _remembering_timeouts(folder, find_compiler(), name)
    except OSError as error:  # a full disk, sources that cannot be read, no descriptor left, ...
        raise BuildError(f"cannot compile the kernels: {error}") from None


def _remembering_timeouts(folder: Folder, command: list[str], name: str | None) -> _Loaded:
    """A compiler that hangs is not waited for in every process."""
    note = f"timeout-{_hash(command)}"
    if (reason := folder.failure(note)) is not None:
        raise BuildError(reason)
    try:
        compiler = _Compiler(command, _printed_by([*command, "--version"]))
        return _best(folder, compiler, name)
    except CompilerTimeout as error:
        folder.remember_failure(note, str(error))
        raise


def _best(folder: Folder, compiler: _Compiler, name: str | None) -> _Loaded:
    """The library of the best set that can be had, or of the one that is named."""
    present = _processor(folder, compiler)
    compiles, failure = True, BuildError(f"this processor does not have {name}")
    for wanted in instructions.runnable(present):
        if name not in (None, wanted.name):
            continue
        file = f"kernels-{wanted.name}-{_hash(compiler.command, wanted.flags, compiler.version)}.so"
        if (found := _cached(folder, file, present)) is not None:
            return _load(found)
        if not compiles:
            continue  # but one that was compiled before will do
        try:
            needs = _needed(compiler, wanted)
        except CompilerTimeout:
            raise
        except BuildError as error:  # an old compiler does not know the set
            failure = error
            continue
        if lacks := needs - (present.features or needs):
            command = shlex.join(_compiling(compiler, wanted))
            failure = BuildError(
                f"{command} uses {', '.join(sorted(lacks))}, which this processor does not have"
            )
            continue
        try:
            return _compiled(folder, file, _compiling(compiler, wanted), needs)
        except CompilerTimeout:
            raise
        except BuildError as error:
            compiles, failure = False, error
    raise failure


def _compiling(compiler: _Compiler, wanted: InstructionSet) -> list[str]:
    return [*compiler.command, *_FLAGS, *wanted.flags]


def _needed(compiler: _Compiler, wanted: InstructionSet) -> frozenset[str]:
    """The features that the compiler may use, to which `$CXX` may add some."""
    command = [*_compiling(compiler, wanted), "-dM", "-E", "-x", "c++", os.devnull]
    return processor.needed(_printed_by(command))


def _cached(folder: Folder, file: str, present: processor.Processor) -> Sealed | None:
    """A library that was compiled, here or on another machine, and runs here."""
    found = folder.find(file)
    if found is not None and found.needs and not present.runs(found.needs):
        os.close(found.descriptor)
        return None
    return found


def _compiled(folder: Folder, file: str, compiling: list[str], needs: frozenset[str]) -> _Loaded:
    headers = ["-isystem", jax.ffi.include_dir()]
    with folder.workshop() as workshop:
        output = workshop.path / "library.so"
        _printed_by([*compiling, str(_SOURCES / _MAIN), *headers, "-o", str(output)])
        made = workshop.sealed(output.name, needs)
        loaded = _load(made)  # before it is kept: what does not load is compiled anew next time
        return loaded._replace(path=workshop.store(made, file).path)


def _processor(folder: Folder, compiler: _Compiler) -> processor.Processor:
    """What the processor has, by a library of its own."""
    command = [*compiler.command, *_ANY_PROCESSOR]
    if platform.machine() in ("x86_64", "AMD64"):
        command.append("-march=x86-64")  # behind what CXX may say
    source = (_SOURCES / _PROCESSOR).read_bytes()
    parts = [source, *map(os.fsencode, (*command, compiler.version, platform.machine()))]
    file = f"processor-{hashed(parts, 20)}.so"
    if (found := folder.find(file)) is not None:
        return _ask(found)
    with folder.workshop() as workshop:
        output = workshop.path / "library.so"
        _printed_by([*command, str(_SOURCES / _PROCESSOR), "-o", str(output)])
        made = workshop.sealed(output.name, frozenset())
        present = _ask(made)
        workshop.store(made, file)
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


def _hash(command: list[str], flags: Sequence[str] = (), version: str = "") -> str:
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
