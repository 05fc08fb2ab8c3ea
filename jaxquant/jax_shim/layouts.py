"""The order of an array's axes in memory, where XLA would choose another one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def held_in(value: jax.Array, order: Sequence[int]) -> jax.Array:
    """A value that XLA lays out in this order of its axes, the one of the longest steps first.

    An exported program cannot hold it: what it becomes is no stable part of StableHLO.
    """
    held: jax.Array = with_layout_constraint(value, Layout(tuple(order)))
    return held
