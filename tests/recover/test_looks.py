"""Rows that are drawn from all steps of a loop."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxquant.recover.looks import is_replaced


def test_every_step_has_its_share_of_the_rows():
    rows = np.full(4000, -1)
    for step in range(4):
        is_new = np.asarray(is_replaced(jnp.int32(step), len(rows)))
        rows[is_new] = step
    counts = np.bincount(rows, minlength=4)  # which raises for a row of no step
    assert abs(counts - 1000).max() < 120
