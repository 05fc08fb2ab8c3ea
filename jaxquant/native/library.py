"""Whether the kernels run here, and their registration with XLA."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import NamedTuple

import jax

from jaxquant.native import build

CONV, DOT, PACK = "jaxquant_conv", "jaxquant_dot", "jaxquant_pack"
SEQUENCE = "jaxquant_sequence"
HISTOGRAM, DIFFERENCES = "jaxquant_histogram", "jaxquant_differences"
FLOAT_DEPTHWISE = "jaxquant_float_depthwise"
DISABLE_VARIABLE = "JAXQUANT_NATIVE"


class Availability(NamedTuple):
    """Whether the native kernels run in this process; `reason` says which, or why not."""

    available: bool
    reason: str


@functools.cache
def available() -> Availability:
    """Compile, load and register the kernels, once a process; say what came of it.

    `JAXQUANT_NATIVE=0` in the environment leaves them out.

    >>> availability = available()
    >>> isinstance(availability.reason, str)
    True
    """
    if os.environ.get(DISABLE_VARIABLE) == "0":
        return Availability(False, f"{DISABLE_VARIABLE}=0 in the environment")
    try:
        library = build.load()
    except build.BuildError as error:
        return Availability(False, str(error))
    for name in (CONV, DOT, SEQUENCE, PACK, HISTOGRAM, DIFFERENCES, FLOAT_DEPTHWISE):
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    library.jaxquant_kernels.restype = ctypes.c_char_p
    return Availability(True, f"{library.jaxquant_kernels().decode()} kernels")


def runs_here() -> bool:
    """True where the kernels run and computations are on the CPU; elsewhere compiles nothing."""
    return jax.default_backend() == "cpu" and available().available


def require() -> None:
    """Register the kernels.

    Raises:
      RuntimeError: they do not run here.
    """
    ok, reason = available()
    if not ok:
        raise RuntimeError(f"the native kernels are not available: {reason}")
