"""Dots of few int8 rows with weights as they lie give what XLA gives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.backends.backend import Residual
from jaxquant.backends.few_rows import FewRows
from jaxquant.backends.xla import Xla
from tests.backends.test_native import call_of, operands_of, turned
from tests.native.cases import needs_kernels

pytestmark = needs_kernels

# The shapes of x and of the weight, and the dimension numbers.
DOTS = {
    "one row": ((1, 70), (70, 33), (((1,), (0,)), ((), ()))),
    "wide": ((2, 64), (64, 96), (((1,), (0,)), ((), ()))),
    "some rows": ((2, 3, 1100), (1100, 5), (((2,), (0,)), ((), ()))),
    "to heads": ((7, 6), (6, 3, 4), (((1,), (0,)), ((), ()))),
    "of heads": ((1, 2, 3, 4), (3, 4, 7), (((2, 3), (0, 1)), ((), ()))),
    "sums last": ((2, 70), (33, 70), (((1,), (1,)), ((), ()))),
    "first axis": ((6, 4), (6, 5), (((0,), (0,)), ((), ()))),
}
OTHERS = {
    "crossed": ((2, 3, 4), (4, 3, 7), (((1, 2), (1, 0)), ((), ()))),
    "heads first": ((2, 5, 6), (3, 6, 4), (((2,), (1,)), ((), ()))),
    "experts": ((3, 2, 6), (3, 6, 5), (((2,), (1,)), ((0,), (0,)))),
    "many rows": ((9, 6), (6, 5), (((1,), (0,)), ((), ()))),
    "no rows": ((0, 6), (6, 5), (((1,), (0,)), ((), ()))),
    "vector": ((4, 6), (6,), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("residual", [None, Residual(False, 0)])
@pytest.mark.parametrize("name", DOTS)
def test_gives_what_xla_gives(name: str, residual: Residual | None, position: int):
    x, weight, numbers = DOTS[name]
    call = call_of(x, weight, numbers, position=position, residual=residual)
    assert FewRows().covers(call, is_packed=False)
    assert not FewRows().covers(call, is_packed=True)
    operands = operands_of(call, x)
    got, want = (
        jax.jit(functools.partial(each.call, call))(operands) for each in (FewRows(), Xla())
    )
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.unique(theirs).size > 1


def test_movements_come_behind_the_sums():
    call = call_of(*DOTS["to heads"], movements=(turned(1, 0, 2),))
    operands = operands_of(call, DOTS["to heads"][0])
    for ours, theirs in zip(
        FewRows().call(call, operands), Xla().call(call, operands), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", OTHERS)
def test_leaves_to_others(name: str):
    assert not FewRows().covers(call_of(*OTHERS[name]), is_packed=False)


def test_a_weight_on_several_devices_stays_where_it_is():
    devices = jax.devices()[:2]
    assert len(devices) == 2
    mesh = jax.sharding.Mesh(np.array(devices), ("m",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "m"))
    x, weight, numbers = DOTS["wide"]
    call = call_of(x, weight, numbers)
    operands = operands_of(call, x)
    there = {
        name: jax.device_put(
            value,
            spread if name == "weight" else spread.update(spec=jax.sharding.PartitionSpec()),
        )
        for name, value in operands.items()
    }
    run = jax.jit(functools.partial(FewRows().call, call))
    assert "jaxquant_stored" not in run.lower(there).compile().as_text()
    np.testing.assert_array_equal(run(there)[0], Xla().call(call, operands)[0])


def test_a_static_model_reads_its_weights_as_they_lie():
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    params = {"up": weight, "down": weight.T.copy()}

    def apply_fn(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    x = np.random.default_rng(1).normal(size=(40, 64)).astype(np.float32)
    qparams, qapply = jaxquant.quant_post(params, apply_fn, x)
    called = [
        jax.jit(qapply).lower(arrays, x[:rows]).as_text().count("@jaxquant_stored(")
        for arrays in (qparams, qapply.prepare(qparams, x))
        for rows in (1, 8, 9)
    ]
    assert called == [2, 2, 0, 0, 0, 0]
    want = qapply.with_backend("xla")(qparams, x[:3])
    np.testing.assert_allclose(qapply(qparams, jnp.asarray(x[:3])), want, rtol=1e-6)
