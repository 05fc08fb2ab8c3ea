"""What runs the convolutions and dots of an int8 model in this process."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxquant import native
from jaxquant.plan.modes import MODES

BACKENDS = ("auto", "native", "xla")


class Backend(NamedTuple):
    """What runs the convolutions and dots, "native" or "xla", and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def check_backend(requested: str) -> None:
    """Refuse a backend that cannot be chosen here.

    Raises:
      ValueError: there is no such backend.
      RuntimeError: the native kernels are asked for and do not run here.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend {requested!r}; choose one of {', '.join(BACKENDS)}")
    if requested == "native":
        native.require()


def choose_backend(requested: str, mode: str) -> Backend:
    """What runs a model: what was asked for, or by "auto" what is faster on this processor.

    Compiles and loads the kernels only where they could be chosen.

    Args:
      requested: one of `BACKENDS`, as `check_backend` lets it pass.
      mode: of the model's plan, a key of `jaxquant.plan.modes.MODES`.
    """
    if requested == "xla":
        return Backend("xla", "chosen")
    if not MODES[mode].tensor_scales:
        return Backend("xla", "the native kernels take scales that are known beforehand")
    if jax.default_backend() != "cpu":
        return Backend("xla", f"on {jax.default_backend()}")
    ok, reason = native.available()
    if ok and requested == "auto":
        ok, reason = native.int8_is_faster()
    return Backend("native" if ok else "xla", reason)
