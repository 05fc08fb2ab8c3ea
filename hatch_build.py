"""Puts compiled kernels into a wheel where `JAXQUANT_WHEEL=native` asks for them.

JAXQUANT_WHEEL=native python -m build --wheel    # for this system and architecture
python -m build --wheel                          # pure: compiles on first use, or runs by XLA
"""

import os
import pathlib
import sys
import sysconfig
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    """Compiles one library for each set of instructions of the architecture."""

    PLUGIN_NAME = "custom"

    @property
    def is_wanted(self) -> bool:
        return os.environ.get("JAXQUANT_WHEEL") == "native"

    def dependencies(self) -> list[str]:
        """The interface between XLA and the kernels comes with jaxlib."""
        return self.metadata.core.dependencies if self.is_wanted else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not self.is_wanted or version == "editable":
            return
        sys.path.insert(0, self.root)
        try:
            from jaxquant.native.shipping import compile_all
        finally:
            sys.path.remove(self.root)
        self._made = tempfile.TemporaryDirectory()
        sets = compile_all(pathlib.Path(self._made.name))
        self.app.display_info(f"kernels for {', '.join(sets)}")
        build_data["force_include"][self._made.name] = "jaxquant/native/compiled"
        build_data["pure_python"] = False
        # Nothing of it is of one version of Python: `ctypes` loads it.
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{system}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_made"):
            self._made.cleanup()
