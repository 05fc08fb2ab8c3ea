"""Whether the kernels run here, and their registration with XLA."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import jax

from jaxquant.run.native import build

CONV, DOT = "jaxquant_conv", "jaxquant_dot"
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
    for name in (CONV, DOT):
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    if not library.jaxquant_has_avx512_vnni():
        return Availability(True, "portable kernels: this CPU has no AVX512-VNNI")
    return Availability(True, "AVX512-VNNI kernels")


def require() -> None:
    """Register the kernels.

    Raises:
      RuntimeError: they do not run here.
    """
    ok, reason = available()
    if not ok:
        raise RuntimeError(f"the native kernels are not available: {reason}")
