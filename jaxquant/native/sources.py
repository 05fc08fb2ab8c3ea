"""The C++ of the kernels, and by what flags it is compiled."""

from __future__ import annotations

import pathlib
import re

import jax

from jaxquant.native import fields
from jaxquant.native.cache import hashed

FOLDER = pathlib.Path(__file__).parent / "src"
MAIN, PROCESSOR = FOLDER / "handlers.cc", FOLDER / "processor.cc"
# GCC's own header of AVX-512 starts from values that it leaves undefined, which GCC before 13 takes
# for ours (its bug 105593).  Conditions are joined by `&` where a branch would be in the way of
# vectors, which Clang suspects.  Neither compiler knows all warnings of the other.
WARNINGS = (
    "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
    "-Wno-bitwise-instead-of-logical", "-Wno-unknown-warning-option",
)  # fmt: skip
# Nobody reads the flags of floating-point exceptions: without them choices between two values need
# no branch, and loops with such become vectors on AVX2.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-fvisibility=hidden", *WARNINGS, *fields.definitions(),
)  # fmt: skip
PROCESSOR_FLAGS = ("-std=c++17", "-O0", "-fPIC", "-shared", *WARNINGS)


def parts() -> list[bytes]:
    """What a compiled library is made of, file after file, and the flags for all sets."""
    # Sorted, since folders list their files in any order.
    files = sorted(path for path in FOLDER.iterdir() if path.suffix in (".h", ".cc"))
    texts = [part for path in files for part in (path.name.encode(), path.read_bytes())]
    return [*texts, *(flag.encode() for flag in FLAGS)]


def digest() -> str:
    """Tells these sources from others."""
    return hashed(parts(), 20)


def interface_version() -> tuple[int, int]:
    """The version of the interface between XLA and handlers that this jaxlib has, major and minor.

    A library that was compiled for the same major and no later minor one runs.
    """
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])
