"""The machine's C++ compiler, and what it is asked for."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxquant.native import processor, sources
from jaxquant.native.errors import BuildError, CompilerTimeout
from jaxquant.native.instructions import InstructionSet

_SECONDS = 300.0  # that the compiler may take


class Compiler(NamedTuple):
    """A command that compiles C++.

    Attributes:
      command: with what is to stand before all other flags.
      version: what it says of itself.
      seconds: that it may take; None where somebody looks on who can end it.
    """

    command: list[str]
    version: str
    seconds: float | None

    @classmethod
    def of(cls, command: list[str]) -> Compiler:
        """Ask a compiler for its version.

        Raises:
          BuildError: it does not run, or fails.
        """
        return cls(command, _printed_by([*command, "--version"], _SECONDS), _SECONDS)

    def compiling(self, wanted: InstructionSet) -> list[str]:
        """The command for a set of instructions, without the files."""
        return [*self.command, *sources.FLAGS, *wanted.flags]

    def needed(self, wanted: InstructionSet) -> frozenset[str]:
        """The features that the compiler may use for a set, to which `$CXX` may add some.

        Raises:
          BuildError: it does not know the set.
        """
        # Asked of the compiler itself: `$CXX` may allow more than our flags do.
        command = [*self.compiling(wanted), "-dM", "-E", "-x", "c++", os.devnull]
        return processor.needed(_printed_by(command, self.seconds))

    def compile_kernels(
        self, wanted: InstructionSet, output: pathlib.Path, linking: Sequence[str] = ()
    ) -> None:
        """Compile the kernels for a set of instructions; `linking` are further flags.

        Raises:
          BuildError: it fails.
        """
        headers = ["-isystem", jax.ffi.include_dir()]
        files = [str(sources.MAIN), *headers, *linking, "-o", str(output)]
        _printed_by([*self.compiling(wanted), *files], self.seconds)

    def compile_processor(self, output: pathlib.Path, flags: Sequence[str]) -> None:
        """Compile what asks the processor, by flags that no processor lacks anything of.

        Raises:
          BuildError: it fails.
        """
        files = [str(sources.PROCESSOR), *flags, "-o", str(output)]
        _printed_by([*self.command, *sources.PROCESSOR_FLAGS, *files], self.seconds)


def find_compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
      BuildError: there is none.
    """
    if given := os.environ.get("CXX"):
        try:
            # As make has it: CXX may hold flags.
            command = shlex.split(given)
        except ValueError as error:
            raise BuildError(f"CXX is {given!r}, which is no command: {error}") from None
        if command:
            return command
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler is on the PATH (install g++ or clang++, or set CXX)")


def _printed_by(command: list[str], seconds: float | None) -> str:
    """What a compiler prints.

    It reads nothing, and is the leader of a group of processes, so that those that it started end
    with it.

    Raises:
      BuildError: it does not run, or fails.
      CompilerTimeout: it takes too long.
    """
    text = shlex.join(command)
    # A group of its own, so that a timeout ends what the compiler started, too.
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
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        raise CompilerTimeout(f"{text} did not end within {seconds:g} s") from None
    except BaseException:  # Ctrl-C does not reach another group
        _end(process)
        raise
    if process.returncode:
        said = errors.decode(errors="replace").strip()[-2000:]
        raise BuildError(f"{text} failed (exit status {process.returncode}):\n{said}")
    return printed.decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    # It may have ended meanwhile.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
