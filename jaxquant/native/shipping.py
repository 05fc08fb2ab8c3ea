"""Compile the libraries that a wheel carries; `hatch_build.py` calls it.

The compiler is Zig's (`ziglang` on PyPI): Clang with the headers and the C++ standard library of
every system, so that any machine makes the wheels of all.  What it makes asks for nothing but the
system's C library, of the age that is written here.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jaxquant.native import compiler, instructions, shipped
from jaxquant.native.errors import BuildError

ZIG = (sys.executable, "-m", "ziglang", "c++")
# Checks of undefined behaviour and symbols for a debugger are not for users.  The operators of the
# standard library that are inside are those that are used inside: what `new` throws is caught.
_LINKING = ("-fno-sanitize=all", "-s", "-Wl,-Bsymbolic")


class Target(NamedTuple):
    """The system of a wheel.

    Attributes:
      machine: its architecture, as Python calls it.
      name: as Zig calls it, with the oldest version that it runs on.
    """

    machine: str
    name: str


# By the platform tag of a wheel: those of jaxlib, which has a CPU backend on no older system.
TARGETS = {
    "manylinux_2_27_x86_64": Target("x86_64", "x86_64-linux-gnu.2.27"),
    "manylinux_2_27_aarch64": Target("aarch64", "aarch64-linux-gnu.2.27"),
    "macosx_11_0_arm64": Target("arm64", "aarch64-macos.11.0"),
}


def compile_all(folder: pathlib.Path, platform_tag: str, command: Sequence[str] = ZIG) -> list[str]:
    """Compile every set of instructions of a system.

    Args:
      folder: where the libraries are written.
      platform_tag: of the wheel, one of `TARGETS`.
      command: the compiler.

    Returns:
      The names of the sets.

    Raises:
      BuildError: no such wheel is made, or the compiler is missing or fails.
    """
    if platform_tag not in TARGETS:
        raise BuildError(f"no wheel is made for {platform_tag!r}, but for {', '.join(TARGETS)}")
    machine, name = TARGETS[platform_tag]
    # Somebody builds a wheel and looks on, so that nothing ends the compiler.
    using = compiler.Compiler([*command, "-target", name], version="", seconds=None)
    sets = instructions.of_machine(machine)
    for wanted in sets:
        output = folder / shipped.file_of(wanted.name)
        using.compile_kernels(for_zig(wanted), output, _LINKING)
    # The last set is what any processor of the architecture runs.
    using.compile_processor(folder / shipped.PROCESSOR, (*for_zig(sets[-1]).flags, *_LINKING))
    shipped.write_manifest(folder)
    return [wanted.name for wanted in sets]


def for_zig(wanted: instructions.InstructionSet) -> instructions.InstructionSet:
    """A set with its flags in Zig's words.

    `-march=armv8.2-a+dotprod` is `-mcpu=generic+v8_2a+dotprod` for it.  What a library is tuned for
    is left out, since Zig takes that for what it may use.
    """
    flags = []
    for flag in wanted.flags:
        # Zig has clang's compiler and its own names for processors.
        if flag.startswith("-march=arm"):
            version, *features = flag.removeprefix("-march=arm").split("+")
            version = version.replace("-", "").replace(".", "_")
            flags.append("+".join(["-mcpu=generic", version, *features]))
        elif not flag.startswith("-mtune="):
            flags.append("-march=x86_64" if flag == "-march=x86-64" else flag)
    return wanted._replace(flags=tuple(flags))
