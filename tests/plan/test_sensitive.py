"""Which sites are kept in 8 bits where 4 are asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from tests.networks import rows

WIDTH = 48
IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
PARAMS = {
    "words": np.ones((600, WIDTH), np.float32),
    "kinds": np.ones((4, WIDTH), np.float32),
    "first": np.ones((WIDTH, 2), np.float32),
    "up": np.ones((2, 900), np.float32),
    "down": np.ones((900, WIDTH), np.float32),
}


def apply_fn(p: Any, ids: jax.Array) -> jax.Array:
    x = p["words"][ids] + p["kinds"][ids % 4]
    x = x @ p["first"]
    return jax.nn.relu(x @ p["up"]) @ p["down"] @ p["words"].T


def bits(**options: Any) -> dict[str, str]:
    _, qapply = jaxquant.quant_weights(PARAMS, apply_fn, IDS, progress=False, **options)
    return {name: row["mode"].removesuffix(" weights") for name, row in rows(qapply).items()}


def test_small_tables_and_the_first_site_but_no_large_ones():
    found = bits(weight_bits=4)
    assert {name for name, mode in found.items() if mode == "int8"} == {"kinds", "first"}
    assert set(found.values()) == {"int4", "int8"}


def test_rules_of_the_user_come_behind():
    found = bits(weight_bits=4, rules=(jaxquant.Rule("kinds", weight_bits=4),
                                       jaxquant.Rule("down", weight_bits=8)))  # fmt: skip
    assert {name for name, mode in found.items() if mode == "int8"} == {"first", "down"}


def test_the_report_has_the_rules():
    _, qapply = jaxquant.quant_weights(PARAMS, apply_fn, IDS, weight_bits=4, progress=False)
    patterns = {rule.pattern for rule in qapply.report().rules}
    assert patterns == {"site:kinds", "site:first"}
    _, qapply = jaxquant.quant_weights(PARAMS, apply_fn, IDS, progress=False)
    assert qapply.report().rules == ()
