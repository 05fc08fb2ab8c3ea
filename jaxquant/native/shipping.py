"""Compile the libraries that a wheel carries; `hatch_build.py` calls it."""

from __future__ import annotations

import pathlib
import sys

from jaxquant.native import instructions, shipped
from jaxquant.native.compiler import Compiler, find_compiler
from jaxquant.native.errors import BuildError

# The standard library inside, unseen: a machine may have an older one, or none.
_ALONE = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")


def compile_all(folder: pathlib.Path) -> list[str]:
    """Compile every set of instructions of this architecture that the compiler knows.

    Args:
      folder: where the libraries are written.

    Returns:
      The names of the sets.

    Raises:
      BuildError: there is no compiler, or it knows none of the sets, or fails.
    """
    linking = _ALONE if sys.platform == "linux" else ()
    compiler = Compiler.of(find_compiler())
    made = []
    for wanted in instructions.all_here():
        try:
            compiler.needed(wanted)
        except BuildError:  # the compiler is older than the set
            continue
        path = folder / shipped.file_of(wanted.name)
        compiler.compile_kernels(wanted, path, linking)
        made.append(wanted.name)
    if not made:
        raise BuildError(f"{compiler.command} knows no set of instructions")
    compiler.compile_processor(folder / shipped.PROCESSOR, linking)
    shipped.write_manifest(folder)
    return made
