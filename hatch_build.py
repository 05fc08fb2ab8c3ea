"""Puts compiled kernels into a wheel where `JAXQUANT_WHEEL` gives its platform.

JAXQUANT_WHEEL=manylinux_2_27_x86_64 python -m build --wheel    # or manylinux_2_27_aarch64, ...
python -m build --wheel                                         # pure: compiled on first use

Any machine makes the wheels of all platforms (`jaxquant.native.shipping.TARGETS`): the compiler is
Zig's, which the build installs as a package.
"""

import os
import pathlib
import sys
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    """Compiles one library for each set of instructions of the platform."""

    PLUGIN_NAME = "custom"

    @property
    def platform_tag(self) -> str:
        """The platform of the wheel, empty for a pure one."""
        return os.environ.get("JAXQUANT_WHEEL", "")

    def dependencies(self) -> list[str]:
        """The interface between XLA and the kernels comes with jaxlib."""
        return [*self.metadata.core.dependencies, "ziglang>=0.15"] if self.platform_tag else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not self.platform_tag or version == "editable":
            return
        sys.path.insert(0, self.root)
        try:
            from jaxquant.native.shipping import compile_all
        finally:
            sys.path.remove(self.root)
        self._made = tempfile.TemporaryDirectory()
        sets = compile_all(pathlib.Path(self._made.name), self.platform_tag)
        self.app.display_info(f"kernels for {', '.join(sets)}")
        build_data["force_include"][self._made.name] = "jaxquant/native/compiled"
        build_data["pure_python"] = False
        # Nothing of it is of one version of Python: `ctypes` loads it.
        build_data["tag"] = f"py3-none-{self.platform_tag}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_made"):
            self._made.cleanup()
