"""Whether the kernels run here, their registration with XLA, and what they are faster at."""

from __future__ import annotations

import functools
import os
import threading
from typing import NamedTuple

import jax

from jaxquant.native import build
from jaxquant.native.foreign import (
    ATTENTION,
    CONV,
    DIFFERENCES,
    DOT,
    FLOAT_DEPTHWISE,
    GELU,
    GROUPS,
    HANDLERS,
    HISTOGRAM,
    LAYER_NORM,
    PACK,
    QUANTIZE,
    QUANTIZE_ROWS,
    SEQUENCE,
    STORED,
)

__all__ = [
    "ATTENTION",
    "CONV",
    "DIFFERENCES",
    "DISABLE_VARIABLE",
    "DOT",
    "FLOAT_DEPTHWISE",
    "GELU",
    "GROUPS",
    "HISTOGRAM",
    "LAYER_NORM",
    "PACK",
    "QUANTIZE",
    "QUANTIZE_ROWS",
    "SEQUENCE",
    "STORED",
    "Availability",
    "available",
    "int8_is_faster",
    "is_known",
    "require",
    "runs_here",
    "runs_int8_here",
]

DISABLE_VARIABLE = "JAXQUANT_NATIVE"
# Kernels whose int8 convolutions and dots take longer than XLA's: several times as long
# (experiments/benchmarks/instruction_sets.py).
_SLOWER_THAN_XLA = ("portable",)
_LOADING = threading.Lock()  # two threads that ask at once do not load the library twice


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
    # A second thread would compile them again beside the first.
    with _LOADING:
        try:
            library = build.load()
        except build.BuildError as error:
            # A path or a compiler may have put bytes into it that cannot be printed.
            reason = str(error).encode("utf-8", "backslashreplace").decode()
            return Availability(False, reason)
        # Registered for the whole process: XLA has one table of handlers.
        for name in HANDLERS:
            capsule = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
        return Availability(True, f"{instruction_set()} kernels")


def is_known() -> bool:
    """Whether this process has asked `available` already, which may take long the first time."""
    return available.cache_info().currsize > 0


def instruction_set() -> str:
    """What the loaded kernels are written for: "AVX2", for example; "portable" for nothing."""
    return build.load().jaxquant_kernels().decode()


@functools.cache
def int8_is_faster() -> Availability:
    """Whether the kernels run here and do int8 convolutions and dots faster than XLA.

    The answers were measured on whole networks and single layers, for the sets of instructions that
    could be had (docs/native_kernels.md); nothing is timed here.  The reason says which kernels, or
    why XLA is to be preferred.
    """
    ok, reason = available()
    # Without vectors XLA's own sums are the faster ones.
    if ok and instruction_set() in _SLOWER_THAN_XLA:
        return Availability(
            False,
            f"faster than the {reason}, all that there are for a processor without AVX2",
        )
    return Availability(ok, reason)


def runs_here() -> bool:
    """True where the kernels run and computations are on the CPU; elsewhere compiles nothing."""
    return jax.default_backend() == "cpu" and available().available


def runs_int8_here() -> bool:
    """True where int8 convolutions and dots are better left to the kernels; as `runs_here`."""
    return jax.default_backend() == "cpu" and int8_is_faster().available


def require() -> None:
    """Register the kernels.

    Raises:
      RuntimeError: they do not run here.
    """
    ok, reason = available()
    if not ok:
        raise RuntimeError(f"the native kernels are not available: {reason}")
