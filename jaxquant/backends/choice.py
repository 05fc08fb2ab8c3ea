"""Which backend runs the int8 models of this process."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxquant import native
from jaxquant.backends.platforms import KERNELS_ALWAYS, PLATFORMS, XLA_ALONE, Table

BACKENDS = ("auto", "native", "xla")


class Choice(NamedTuple):
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


def choose_backend(requested: str, has_scales: bool) -> Choice:
    """What runs a model: what was asked for, or by "auto" what is faster on this processor.

    Compiles and loads the kernels only where they could be chosen.

    Args:
      requested: one of `BACKENDS`, as `check_backend` lets it pass.
      has_scales: whether the model's scales are known before it runs; else kernels run its dots of
        few rows, with the stored weight, and are faster at those on every processor.
    """
    if requested == "xla":
        return Choice("xla", "chosen")
    if jax.default_backend() != "cpu":
        return Choice("xla", f"on {jax.default_backend()}")
    ok, reason = native.available()
    # Without planned scales XLA runs what is large, kernels the rows of a few tokens.
    if ok and not has_scales:
        reason = f"{reason}, for dots of few rows"
    # By "native" the user has decided; by "auto" XLA may be faster, as on processors without VNNI.
    elif ok and requested == "auto":
        ok, reason = native.int8_is_faster()
    return Choice("native" if ok else "xla", reason)


def table_of(requested: str, choice: Choice) -> Table:
    """What runs where, by what was asked for and chosen."""
    if choice.name == "xla":
        return XLA_ALONE
    return KERNELS_ALWAYS if requested == "native" else PLATFORMS


def fastest_here() -> Table:
    """What runs where, with the kernels where they run here and are faster."""
    return PLATFORMS if native.runs_int8_here() else XLA_ALONE
