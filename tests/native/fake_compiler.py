"""A compiler that takes no time: it gives a library that was compiled before."""

from __future__ import annotations

import pathlib
import textwrap

from jaxquant import native
from jaxquant.native import build

# Before a test gives the kernels another cache.
_MADE = build.build() if native.available().available else None


class FakeCompiler:
    """A shell script in the place of a C++ compiler.

    Attributes:
      command: what CXX is set to.
    """

    def __init__(self, folder: pathlib.Path, instead: str = "") -> None:
        """`instead` is shell code that runs where the kernels are to be compiled; the path of the
        library that is wanted is in $output, that of one that was compiled before in $made."""
        self._log = folder / "log"
        self.command = str(folder / "fake-c++")
        script = f"""\
            #!/bin/sh
            for output; do :; done
            made={_MADE}
            case "$*" in
              *--version*) echo fake ;;
              *-dM*) ;;
              *processor.cc*) exec c++ "$@" ;;
              *) echo compiles >> {self._log}
                 {instead or 'cp "$made" "$output"'} ;;
            esac
            """
        path = pathlib.Path(self.command)
        path.write_text(textwrap.dedent(script))
        path.chmod(0o755)

    @property
    def compilations(self) -> int:
        """How often it was to compile the kernels."""
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0
