"""No sum that is quantized comes near the middle between two integers."""

from fractions import Fraction

import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.graph.trace import trace
from jaxquant.plan import ties
from jaxquant.plan.sums import ScaledGraph, SumScales, find_sums
from tests import networks, reference

C = 16
N = np.arange(-(2**20), 2**20, dtype=np.float64)  # sums that fit on the grid, and many that do not


def distance(quotients: np.ndarray) -> float:
    """From the middle between two integers, of those that do not saturate anyway."""
    quotients = quotients[np.abs(quotients) < 256]
    return float(np.abs(quotients - np.floor(quotients) - 0.5).min())


@hypothesis.given(hnp.arrays(np.float64, 8, elements=st.floats(1e-9, 50.0)))
def test_a_fraction_has_an_odd_denominator_and_is_barely_above(ratio):
    found = ties.fractions(ratio)
    for before, after in zip(ratio, found, strict=True):
        fraction = Fraction(after).limit_denominator(int(1 / before) + ties.LARGEST_DENOMINATOR)
        assert float(fraction) == pytest.approx(after, rel=1e-12)
        assert fraction.denominator % 2 == 1
        assert before * (1 - 1e-12) <= after <= before * (1 + ties.EXCESS)


def test_a_ratio_beyond_all_fractions_stays():
    assert ties.fractions(np.array([65.5, 1e30, 0.5])).tolist()[:2] == [65.5, 1e30]


@hypothesis.given(hnp.arrays(np.float64, 8, elements=st.floats(1e-9, 1e9)))
def test_a_multiple_is_above_by_half_at_most(multiplier):
    found = ties.multiples(multiplier, 1.0, keeps_small=True)
    assert (found >= multiplier * (1 - 1e-6)).all()
    assert (found <= multiplier * 1.5 + (multiplier >= 2)).all()
    assert (found[multiplier >= 2] % 1 == 0).all()


@hypothesis.given(hnp.arrays(np.float64, 8, elements=st.floats(1e-9, 1e9)))
def test_a_multiple_is_whole_where_nobody_reads_it_in_float(multiplier):
    found = ties.multiples(multiplier, 1.0, keeps_small=False)
    assert (found >= multiplier * (1 - 1e-6)).all()
    assert (found <= multiplier + 1).all()
    assert (found % 1 == 0).all()


def test_a_zero_tensor_and_a_small_one_leave_the_others_as_they_are():
    """The scale of what is all zero is 1; one far below the others has no odd multiple near."""
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(C, C)) * 1e-3, jnp.float32)
    params = {"a": a, "zero": jnp.zeros((C, C)), "b": a, "c": a, "d": a}

    def apply_fn(p, x):
        y = jax.nn.relu(x @ p["a"])
        return (y + y @ p["zero"] @ p["zero"]) @ p["b"], y @ p["c"], (y * 1e-4 + y) @ p["d"]

    x = np.float32(rng.normal(size=(64, C)))
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], recover=(), progress=False)
    assert qapply.report().summary["output_sqnr_db"] > 30
    _, scale = reference.quantize_weight(a, (1,))
    assert (np.asarray(qparams["params"]["a"]["scale"]) <= scale * 1.13).all()


@hypothesis.given(st.floats(1e-30, 1e30), st.floats(0.01, 1.0))
def test_scales_are_odd_multiples_of_a_unit_that_they_give_again(largest, part):
    unit = ties.unit_of(largest)
    scales = [ties.odd_multiple(scale, unit) for scale in (largest, part * largest)]
    for before, after in zip((largest, part * largest), scales, strict=True):
        assert (after / unit) % 2 == 1
        assert after == np.float32(after)
        assert abs(after - before) <= unit
    assert ties.unit_of(max(scales)) == unit


def outputs(apply_fn, params, x):
    """What `find_sums` knows of the tensors that a function returns."""
    graph = trace(apply_fn, params, (x,))
    dots = [e.inputs[0] for e in graph.equations if e.name == "dot_general"]
    scaled = ScaledGraph(graph, {var: f"{n}" for n, var in enumerate(dots)})
    found = find_sums(scaled)[scaled]
    return [found.get(var) for var in graph.outputs]


def test_sums_are_followed_through_what_moves_and_selects():
    def apply_fn(p, x):
        y = x @ p
        moved = jnp.maximum(y, 0)[:, None].transpose(1, 0, 2)
        joined = jnp.concatenate([moved, jnp.pad(moved, ((0, 0), (0, 0), (0, 0)))], 1)[0]
        return y, jnp.tanh(y), y * 2, joined @ p

    sums, *others = outputs(apply_fn, jnp.eye(4), jnp.ones((2, 4)))
    assert sums == SumScales(frozenset("1"), frozenset("1"))
    assert others == [None, None, None]


def test_what_is_added_belongs_together():
    def apply_fn(p, x):
        y = jnp.maximum(x @ p, 0)
        z = y + y @ p  # y itself is quantized too
        w = z - z @ p
        return y, z, w, w @ p

    y, z, w, last = outputs(apply_fn, jnp.eye(4), jnp.ones((2, 4)))
    assert y == z == SumScales(frozenset(), frozenset("123"))
    assert w == SumScales(frozenset("3"), frozenset("123"))
    assert last is None


def test_what_only_meets_a_quantized_tensor_is_none_of_it():
    def apply_fn(p, x):
        y = x @ p
        z = x * 2
        return z, y + z, y @ p  # y is quantized; z and the sum are not

    z, total, last = outputs(apply_fn, jnp.eye(4), jnp.ones((2, 4)))
    assert z is None
    assert total is None
    assert last is None


class Blocks(nn.Module):
    """Inverted residuals and a sum that is quantized on two scales."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(C, (3, 3), name="stem")(x))
        for n in range(2):
            gain = self.param(f"g{n}", nn.initializers.normal(1.0), (4 * C,))
            y = nn.relu6(nn.Conv(4 * C, (1, 1), name=f"e{n}")(x) * gain)
            y = nn.relu6(nn.Conv(4 * C, (3, 3), feature_group_count=4 * C, name=f"d{n}")(y))
            x = x + nn.Conv(C, (1, 1), name=f"p{n}")(y)
        pooled = nn.max_pool(-x, (2, 2), (2, 2))
        return nn.Conv(C, (1, 1), name="a")(x), nn.Conv(C, (1, 1), name="b")(pooled)


@pytest.fixture(scope="module")
def blocks():
    x = networks.images(0, (4, 8, 8, 3))
    params = networks.random_params(lambda: Blocks().init(jax.random.key(0), x))
    return params, *jaxquant.quant_post(params, Blocks().apply, [x], progress=False)


def test_no_sum_of_a_network_comes_near_a_tie(blocks):
    _, qparams, qapply = blocks
    scale = {tensor.name: tensor.scale for tensor in qapply.plan.tensors}
    for n in range(2):
        for site, reader in ((f"e{n}", f"d{n}"), (f"d{n}", f"p{n}")):
            multiplier = np.asarray(qparams["sites"][site]["multiplier"], np.float64)
            for ratio in np.abs(multiplier[::8]) / scale[f"{reader}/input"]:
                rounding = 256 * 2.0**-24  # of the multiplier to float32
                assert distance(N * ratio) > 0.5 * min(ratio, 2.0**-13) - rounding
    residual = [scale[f"{name}/input"] for name in ("e0", "e1", "a", "b")]
    unit = ties.unit_of(max(residual))
    assert all((s / unit) % 2 == 1 for s in residual)
    assert all(distance(N * 8 / (s / unit)) > 2.0**-17 for s in residual)
    for site in ("stem", "p0", "p1"):
        multiplier = np.asarray(qparams["sites"][site]["multiplier"], np.float64)
        assert (multiplier % unit == 0).all()
        assert (np.abs(multiplier) >= unit).all()


def test_weights_are_those_of_the_scales(blocks):
    params, qparams, qapply = blocks
    scales = {tensor.name: tensor.scale for tensor in qapply.plan.tensors}
    for site, weight in params["params"].items():
        if site.startswith("g"):
            continue
        entry = qparams["params"]["params"][site]["kernel"]
        kernel = np.asarray(weight["kernel"], np.float64)
        scale = np.asarray(entry["scale"], np.float64)
        _, least = reference.quantize_weight(kernel, (3,))
        assert (scale >= least * (1 - 1e-6)).all()
        if site[0] in "ed":
            reader = {"e": "d", "d": "p"}[site[0]] + site[1]
            ratio = np.abs(qparams["sites"][site]["multiplier"]) / scales[f"{reader}/input"]
            most = (1 + ties.EXCESS) * (1 + 1e-6)
            assert ((scale <= least * most) | (ratio <= ties.LEAST_RATIO * most)).all()
        difference = np.abs(np.asarray(entry["int8"]) * scale - kernel)
        assert (difference <= scale * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("read", ["nowhere", "by the caller", "by a float operation"])
def test_a_channel_of_next_to_nothing_keeps_its_weights_where_they_are_read(read, is_added):
    rng = np.random.default_rng(0)
    params = {n: np.float32(rng.normal(size=(C, C))) for n in "abc"}
    params["a"][:, 0] *= 1e-6

    def apply_fn(p, x):
        y = x @ p["a"]
        z = (y + x @ p["b"] if is_added else y) @ p["c"]
        if read == "nowhere":
            return z
        return z, (y if read == "by the caller" else jnp.tanh(y))

    x = np.float32(rng.normal(size=(64, C)))
    qparams, _ = jaxquant.quant_post(params, apply_fn, [x], recover=(), progress=False)
    _, least = reference.quantize_weight(params["a"], (1,))
    growth = qparams["params"]["a"]["scale"] / least
    assert (growth[1:] < 1.1).all()
    assert growth[0] > 100 if read == "nowhere" else growth[0] <= 1.5


def test_both_backends_give_the_same_bits(blocks):
    _, qparams, qapply = blocks
    x = networks.images(1, (64, 8, 8, 3))
    native, xla = qapply(qparams, x), qapply.with_backend("xla")(qparams, x)
    for a, b in zip(native, xla, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("kind", ["abs_max", "shared", "equalized"])
def test_weights_that_cannot_grow_by_channel_keep_their_scales(kind):
    """One scale for all of a weight, one weight for two sites, an equalized tensor."""
    rng = np.random.default_rng(0)
    params = {n: np.float32(rng.normal(size=(C, C)) * 2.0 ** rng.integers(-3, 3, C)) for n in "ab"}

    def apply_fn(p, x):
        y = jax.nn.relu(x @ p["a"])
        return y @ p["a" if kind == "shared" else "b"]

    x = np.float32(rng.normal(size=(64, C)))
    options = {"weight_quantize_type": "abs_max"} if kind == "abs_max" else {}
    recover = ("equalization",) if kind == "equalized" else ()
    qparams, _ = jaxquant.quant_post(
        params, apply_fn, [x], recover=recover, progress=False, **options
    )
    _, scale = reference.quantize_weight(params["a"], () if kind == "abs_max" else (1,))
    if kind == "equalized":
        factors = np.asarray(qparams["tensors"]["b/input"]["scale"])
        assert np.ptp(factors) > 0  # so this is the case
    np.testing.assert_allclose(
        qparams["params"]["a"]["scale"], scale if kind != "abs_max" else scale[0], rtol=1e-6
    )
