"""Libraries that a wheel carries, one for each set of instructions: nobody needs a compiler then.

They lie in the package, beside the Python code that is trusted as much, so that nothing of what
`jaxquant.native.cache` guards against applies.
"""

from __future__ import annotations

import ctypes
import json
import pathlib

from jaxquant.native import instructions, processor, sources

FOLDER = pathlib.Path(__file__).parent / "compiled"
_MANIFEST, PROCESSOR = "manifest.json", "processor.so"


def file_of(name: str) -> str:
    """The file of a set of instructions."""
    return f"kernels-{name}.so"


def write_manifest(folder: pathlib.Path) -> None:
    """Say of what the libraries in a folder were made."""
    made_of = {"sources": sources.digest(), "interface": sources.interface_version()}
    (folder / _MANIFEST).write_text(json.dumps(made_of))


def find(name: str | None = None, folder: pathlib.Path | None = None) -> pathlib.Path | None:
    """The library of a set of instructions, by default of the best that this processor has.

    Args:
      name: of the set.
      folder: where they are; by default in the package.

    Returns:
      None where the package carries none, or none that this processor, these sources and this
      jaxlib go with: it is compiled then.

    Raises:
      BuildError: `$JAXQUANT_INSTRUCTIONS` asks for a set that this processor does not have.
    """
    folder = folder or FOLDER
    if not (folder / _MANIFEST).is_file():
        return None
    made_of = json.loads((folder / _MANIFEST).read_text())
    major, minor = made_of["interface"]
    here = sources.interface_version()
    # A wheel's libraries are of its own sources and of an XLA interface that this jaxlib has.
    # A handler that knows a later interface than jaxlib would be refused by XLA.
    if made_of["sources"] != sources.digest() or major != here[0] or minor > here[1]:
        return None
    present = processor.ask(ctypes.CDLL(str(folder / PROCESSOR)))
    for wanted in instructions.runnable(present):
        path = folder / file_of(wanted.name)
        if name in (None, wanted.name) and path.is_file():
            return path
    return None
