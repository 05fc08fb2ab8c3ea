"""Random loops and branches against the unrolled program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant
from tests.loops import measure, programs

SEEDS = st.integers(0, 3)
QUIET: dict[str, Any] = {"progress": False, "allow_batch_dependence": True}


def values(seed):
    x = np.random.default_rng(seed).uniform(-1, 1, (programs.BATCH, programs.WIDTH))
    return jnp.asarray(x, jnp.float32)


def dequantized(params):
    """The float weights that stored ones stand for."""

    def is_stored(leaf: Any) -> bool:
        return isinstance(leaf, dict) and "int8" in leaf

    return jax.tree.map(
        lambda leaf: leaf["int8"].astype(jnp.float32) * leaf["scale"] if is_stored(leaf) else leaf,
        params,
        is_leaf=is_stored,
    )


def told(qapply, program, is_observed=True):
    """Every weight has a row, with a reason where no step reads it, or none in calibration."""
    rows = {row["name"]: row for row in qapply.report().rows}
    weights = {f"w{number}" for number in range(programs.size(program))}
    assert weights == set(rows)
    idle = {f"w{number}" for number in programs.idle(program)}
    left = {name for name, row in rows.items() if row["status"] != "int8"}
    assert left == idle if is_observed else left >= idle
    assert all(rows[name]["reason"] for name in left)


def weights_alone(program, seed):
    """By stored weights a program gives what its twin gives by the weights they stand for."""
    params, x = programs.make_params(program, seed), values(seed)
    qparams, qapply = jaxquant.quant_weights(
        params, programs.as_it_is(program), measure.shapes(x), **QUIET
    )
    told(qapply, program)
    expected = programs.unrolled(program)(dequantized(qparams["params"]), x)
    np.testing.assert_allclose(qapply(qparams, x), expected, rtol=0, atol=2e-5)


def dynamic(program, seed):
    """The twin computes the same integers, but where the last bit of a float decides."""
    params, x = programs.make_params(program, seed), values(seed)
    found = [
        jaxquant.quant_dynamic(params, make(program), measure.shapes(x), **QUIET)
        for make in (programs.as_it_is, programs.unrolled)
    ]
    told(found[0][1], program)
    outputs = [qapply(qparams, x) for qparams, qapply in found]
    np.testing.assert_allclose(*outputs, rtol=0, atol=0.02)


def static(program, seed):
    """What a step gives is off by a few steps of the grid that all steps share."""
    params, x = programs.make_params(program, seed), values(seed)
    apply_fn = programs.as_it_is(program)
    settings = {"algo": "abs_max", "recover": (), **QUIET}
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x, -x], **settings)
    is_reached = programs.is_reached(program)
    told(qapply, program, is_observed=is_reached)
    found, expected = qapply(qparams, x), programs.unrolled(program)(params, x)
    assert np.isfinite(found).all()
    if is_reached:  # else a small error may choose another branch
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.06)


# Where a small error chooses another branch, the model is told to be poor, and is.
pytestmark = pytest.mark.filterwarnings("ignore:the quantized model's outputs have an SQNR")

CHECKS = {check.__name__: check for check in (weights_alone, dynamic, static)}


@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=3, derandomize=True, database=None)
@given(program=programs.programs(), seed=SEEDS)
def test_a_program_with_loops_is_the_unrolled_one(check, program, seed):
    CHECKS[check](program, seed)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=40, derandomize=True, database=None)
@given(program=programs.programs(), seed=SEEDS)
def test_many_programs_with_loops_are_the_unrolled_ones(check, program, seed):
    CHECKS[check](program, seed)
