"""Dtypes of PRNG keys, which have no NumPy counterpart."""

from __future__ import annotations

from typing import Any

import jax


def is_key_dtype(dtype: Any) -> bool:
    """True for the dtype of PRNG keys, which has no NumPy counterpart."""
    return jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def key_implementation(dtype: Any) -> str:
    """The name of the generator that a dtype of PRNG keys belongs to."""
    return str(dtype._impl.name)
