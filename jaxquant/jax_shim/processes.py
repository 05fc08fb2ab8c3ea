"""The meeting of several processes, with a patience that JAX's own barriers do not have."""

from __future__ import annotations

import time

import jax
from jax._src import distributed


def missing_processes(name: str, seconds: float) -> list[int]:
    """Wait until every process has come here; returns those that did not within `seconds`.

    Args:
      name: the same in every process, and another for each meeting.
      seconds: how long to wait for all of them together.
    """
    client = distributed.global_state.client
    if client is None:
        return []
    client.key_value_set(f"{name}/{jax.process_index()}", "here")
    end, missing = time.monotonic() + seconds, []
    for index in range(jax.process_count()):
        # The processes that are here tell it at once; the time left is for the last one.
        left = max(1, int(1000 * (end - time.monotonic())))
        try:
            client.blocking_key_value_get(f"{name}/{index}", left)
        except RuntimeError:  # JaxRuntimeError: DEADLINE_EXCEEDED
            missing.append(index)
    return missing
