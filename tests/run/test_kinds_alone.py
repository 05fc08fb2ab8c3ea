"""Every kind of full quantization on its own: on the model's input, with its output behind it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import networks, reference
from tests.plan import full
from tests.run.kinds import COMPARISONS, INDICES, MOVES, PAIRS, SUMS, C, X, quantize

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("numbers_as_they_are")]


def alone_fn(p, x):
    a, b = x, x[..., ::-1] * 0.5 + 1.0
    out = {name: op(a) for name, (_, op, _) in (MOVES | SUMS).items()}
    out |= {name: op(a, axis=-1) for name, (op, _) in INDICES.items()}
    out |= {name: op(a[:, 1:], a[:, :-1]) for name, (op, _) in (PAIRS | COMPARISONS).items()}
    out |= {"softmax": jax.nn.softmax(a * 0.0625), "dot": b @ p["w"]}
    return out


@pytest.fixture(scope="module")
def alone():
    params = {"w": networks.exact_weight((C, C))}
    x = X + 0.375  # what rounding to the grid takes away
    return np.asarray(x), full.quantize(alone_fn, params, x)(x)


@pytest.mark.parametrize("name", [n for n in MOVES if MOVES[n][0] == "pool2d"])
def test_selections_alone(alone, name):
    x, out = alone
    np.testing.assert_array_equal(out[name], MOVES[name][2](quantize(x, 2.0)) * 2.0)


@pytest.mark.parametrize("name", [n for n in MOVES if MOVES[n][0] != "pool2d"])
def test_joins_and_layout_operations_of_a_float_tensor_for_a_float_consumer_stay_float(alone, name):
    x, out = alone
    np.testing.assert_array_equal(out[name], MOVES[name][2](x))


@pytest.mark.parametrize("name", SUMS)
def test_sums_alone(alone, name):
    x, out = alone
    expected = SUMS[name][2](quantize(x, 2.0).astype(np.float64)) * 2.0
    np.testing.assert_allclose(out[name], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", PAIRS | COMPARISONS)
def test_operations_of_two_tensors_alone(alone, name):
    x, out = alone
    grid = quantize(x, 2.0) * 2.0
    expected = (PAIRS | COMPARISONS)[name][1](grid[:, 1:], grid[:, :-1])
    np.testing.assert_allclose(out[name], expected, rtol=1e-6)


@pytest.mark.parametrize("name", INDICES)
def test_indices_alone(alone, name):
    x, out = alone
    np.testing.assert_array_equal(out[name], INDICES[name][1](quantize(x, 2.0), axis=-1))


def test_softmax_alone(alone):
    x, out = alone
    expected = reference.softmax(quantize(x * 0.0625, 0.125) * 0.125)
    np.testing.assert_allclose(out["softmax"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("value", "scale"), [(0.0, 2.0), (3.0, 2.0), (-1000.0, 8.0)])
def test_padding_is_rounded_to_the_tensors_grid_which_holds_it(value, scale):
    def apply_fn(p, x):
        return jnp.pad(x, ((0, 0), (1, 1)), constant_values=value) @ p["w"]

    params, x = {"w": 127 * jnp.eye(C + 2)}, networks.whole_numbers((3, C)) + 0.375
    model = full.quantize(apply_fn, params, x)
    padded = np.pad(quantize(x, scale), ((0, 0), (1, 1)), constant_values=quantize(value, scale))
    np.testing.assert_array_equal(model(x), 127 * scale * padded)


def test_a_padded_max_pool_never_picks_the_padding():
    def apply_fn(p, x):
        return nn.max_pool(x, (3, 3), (2, 2), "SAME") @ p["w"]

    x = -jnp.abs(X)
    model = full.quantize(apply_fn, {"w": 127 * jnp.eye(C)}, x)
    np.testing.assert_array_equal(model(x), apply_fn({"w": 127 * jnp.eye(C)}, x))


def test_a_gather_out_of_range_gives_zero_where_a_float_one_gives_nan():
    def apply_fn(p, x, ids):
        return jnp.take(x, ids, axis=1, fill_value=None) @ p["w"]

    params, x = {"w": 127 * jnp.eye(2)}, networks.whole_numbers((3, C))
    model = full.quantize(apply_fn, params, x, jnp.array([1, 0]), skip=())
    expected = np.stack([x[:, 1], np.zeros(3)], 1)
    np.testing.assert_array_equal(model(x, jnp.array([1, 700])), 127 * expected)


def test_a_lookup_in_a_parameter_table_hands_on_no_integers():
    def apply_fn(p, ids):
        return p["embed"]["table"][ids] @ p["fc"]["w"]

    table, w = networks.exact_weight((9, C)), networks.exact_weight((C, 3))
    model = full.quantize(apply_fn, {"embed": {"table": table}, "fc": {"w": w}}, np.arange(9))
    np.testing.assert_array_equal(model.qparams["params"]["embed"]["table"]["int8"], table)
    assert [site.kind for site in model.plan.sites] == ["lookup_table", "mul"]
    np.testing.assert_array_equal(model(np.array([3, 0])), table[jnp.array([3, 0])] @ w)


@pytest.mark.parametrize("kind", ["transpose", "pad", "nearest_interp"])
def test_a_layout_operation_has_nothing_to_do_alone(kind):
    ops = {"transpose": jnp.transpose, "pad": lambda x: jnp.pad(x, 1)}
    ops["nearest_interp"] = lambda x: jax.image.resize(x, (8, 8), "nearest")
    with pytest.raises(ValueError, match=rf"no site is left to quantize .*{kind}"):
        full.plan_of(
            lambda p, x: ops[kind](x),
            {},
            jnp.ones((4, 4)),
            quantizable_op_type=(kind,),
            is_full_quantize=False,
        )
