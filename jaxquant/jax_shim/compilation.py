"""How XLA is asked to compile: options that not every XLA has, and what a program records."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def without_source_locations() -> Iterator[None]:
    """Programs that are lowered inside do not name the source files that they came from."""
    name = "jax_traceback_in_locations_limit"
    known = getattr(jax.config, name, None)
    # An option of JAX's own, which may go in another release.
    if known is None:
        yield
        return
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, known)


@functools.cache
def quick_compilation() -> dict[str, Any]:
    """Compiler options for a program that runs a few times: two thirds of the time to compile.

    On CPU; it runs as fast, where what takes long are convolutions and dots.  Empty elsewhere, and
    without an option that this XLA does not have.
    """
    # These are options of XLA's CPU compiler.
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
    return {name: value for name, value in options.items() if has_option(name, value)}


def has_option(name: str, value: Any) -> bool:
    """Whether this XLA has a compiler option; they come and go."""
    # XLA has no list of its options: it refuses what it does not know.
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except (RuntimeError, ValueError):
        return False
    return True
