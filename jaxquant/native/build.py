"""The kernels' library: one that the package carries, or one that is compiled here, once.

Where a wheel carries none (`jaxquant.native.shipped`), it is compiled for the best set of
instructions that the processor has (`jaxquant.native.instructions`), and kept in a per-user cache
(`jaxquant.native.cache`) under a name that hashes the sources, the compiler, jaxlib and the set, so
that a change of any of them compiles anew: one home directory may serve many machines, which share
what is for the same set.  Where it cannot be compiled, one that was compiled for a lesser set does.
Needs a C++17 compiler (`$CXX`, else `c++`, `g++` or `clang++`); the FFI headers come with jaxlib.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import platform
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import jaxlib.version

from jaxquant.native import compiler, foreign, instructions, processor, shipped, sources
from jaxquant.native.cache import CACHE_VARIABLE, Folder, Sealed, cache_dir, hashed
from jaxquant.native.compiler import Compiler
from jaxquant.native.errors import BuildError, CompilerTimeout
from jaxquant.native.instructions import InstructionSet

__all__ = ["CACHE_VARIABLE", "BuildError", "build", "cache_dir", "load"]


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


def _obtain(name: str | None) -> _Loaded:
    # What a wheel carries is trusted as its Python code is, and needs no compiler.
    if (path := shipped.find(name)) is not None:
        return _loaded(path, path)
    try:
        with Folder(cache_dir()) as folder:
            return _remembering_timeouts(folder, compiler.find_compiler(), name)
    except OSError as error:  # a full disk, sources that cannot be read, no descriptor left, ...
        raise BuildError(f"cannot compile the kernels: {error}") from None


def _remembering_timeouts(folder: Folder, command: list[str], name: str | None) -> _Loaded:
    """A compiler that hangs is not waited for in every process."""
    note = f"timeout-{_hash(command)}"
    # In a file: the next process would wait for the same compiler as long.
    if (reason := folder.failure(note)) is not None:
        raise BuildError(reason)
    try:
        return _best(folder, Compiler.of(command), name)
    except CompilerTimeout as error:
        folder.remember_failure(note, str(error))
        raise


def _best(folder: Folder, using: Compiler, name: str | None) -> _Loaded:
    """The library of the best set that can be had, or of the one that is named."""
    present = _processor(folder, using)
    compiles, failure = True, BuildError(f"this processor does not have {name}")
    # From the best set down: one that is cached, else one that can be compiled here.
    for wanted in instructions.runnable(present):
        if name not in (None, wanted.name):
            continue
        # Where it runs is in the name, so that one folder serves machines of different sets.
        file = f"kernels-{wanted.name}-{_hash(using.command, wanted.flags, using.version)}.so"
        if (found := _cached(folder, file, present)) is not None:
            return _load(found)
        if not compiles:
            continue  # but one that was compiled before will do
        try:
            needs = using.needed(wanted)
        except CompilerTimeout:
            raise
        except BuildError as error:  # an old compiler does not know the set
            failure = error
            continue
        if lacks := needs - (present.features or needs):
            command = shlex.join(using.compiling(wanted))
            failure = BuildError(
                f"{command} uses {', '.join(sorted(lacks))}, which this processor does not have"
            )
            continue
        try:
            return _compiled(folder, file, using, wanted, needs)
        except CompilerTimeout:
            raise
        except BuildError as error:
            compiles, failure = False, error
    raise failure


def _cached(folder: Folder, file: str, present: processor.Processor) -> Sealed | None:
    """A library that was compiled, here or on another machine, and runs here."""
    found = folder.find(file)
    # The same file may be another machine's, whose compiler was told more by `$CXX`.
    if found is not None and found.needs and not present.runs(found.needs):
        os.close(found.descriptor)
        return None
    return found


def _compiled(
    folder: Folder, file: str, using: Compiler, wanted: InstructionSet, needs: frozenset[str]
) -> _Loaded:
    with folder.workshop() as workshop:
        output = workshop.path / "library.so"
        using.compile_kernels(wanted, output)
        if (found := folder.find(file)) is not None:
            return _load(found)
        made = workshop.sealed(output.name, needs)
        loaded = _load(made)  # before it is kept: what does not load is compiled anew next time
        return loaded._replace(path=workshop.store(made, file).path)


def _processor(folder: Folder, using: Compiler) -> processor.Processor:
    """What the processor has, by a library of its own."""
    # What any processor of the architecture runs is its last set; behind what CXX may say.
    flags = instructions.all_here()[-1].flags
    command = [*using.command, *sources.PROCESSOR_FLAGS, *flags]
    parts = [sources.PROCESSOR.read_bytes(), *map(os.fsencode, (*command, using.version))]
    file = f"processor-{hashed([*parts, platform.machine().encode()], 20)}.so"
    if (found := folder.find(file)) is not None:
        return _ask(found)
    with folder.workshop() as workshop:
        output = workshop.path / "library.so"
        using.compile_processor(output, flags)
        made = workshop.sealed(output.name, frozenset())
        # Asked by a library that runs on any processor, before one is chosen that does not.
        present = _ask(made)
        workshop.store(made, file)
        return present


def _ask(found: Sealed) -> processor.Processor:
    try:
        return processor.ask(ctypes.CDLL(str(_file(found))))
    except (OSError, AttributeError) as error:
        raise BuildError(f"{found.path} does not load: {error}") from None


def _load(found: Sealed) -> _Loaded:
    """The descriptor stays open: a later one of its number would have its name, by which the loader
    takes a library for one that is loaded already.
    """
    return _loaded(found.path, _file(found))


def _loaded(path: pathlib.Path, file: pathlib.Path) -> _Loaded:
    try:
        library = ctypes.CDLL(str(file))
        foreign.declare(library)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} does not load: {error}") from None
    return _Loaded(path, library)


def _file(found: Sealed) -> pathlib.Path:
    """The file that was checked, whatever has its name by now."""
    # By the descriptor: the path may be another file's since it was checked.
    descriptor = pathlib.Path(f"/proc/self/fd/{found.descriptor}")
    return descriptor if descriptor.exists() else found.path


def _hash(command: list[str], flags: Sequence[str] = (), version: str = "") -> str:
    # What any of these changes has another name, and is compiled anew.
    texts = (*command, *flags, version, platform.machine(), jaxlib.version.__version__)
    return hashed([*sources.parts(), *map(os.fsencode, texts)], 20)
