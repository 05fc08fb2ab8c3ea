"""Parts of different range: which operations stay float, so that no part is rounded away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.calibration.observations import TensorStats
from jaxquant.plan.evenness import sqnr_on
from tests import networks
from tests.plan import full

ROWS, C = 48, 8
X = networks.images(0, (ROWS, C))
PARAMS = {
    name: {"w": networks.images(seed, shape)}
    for seed, (name, shape) in enumerate(
        {
            "box": (C, C),
            "score": (C, C),
            "head": (2 * C, 3),
            "rows": (C, 3),
            "cls": (1, 1, C),
        }.items()
    )
}


def box(p, x):
    return jax.nn.sigmoid(x @ p["box"]["w"]) * 640.0


def score(p, x):
    return jax.nn.sigmoid(x @ p["score"]["w"] - 2.0)


def both(p, x):
    return jnp.concatenate([box(p, x), score(p, x)], -1)


def stacked(p, x):
    return jnp.stack([box(p, x), score(p, x)], 1)


def class_token(p, x):
    token = jnp.broadcast_to(p["cls"]["w"] * 0.01, (x.shape[0], 1, C))
    return jnp.concatenate([token, jnp.stack([x @ p["box"]["w"], x], 1)], 1)


def gated(p, x):
    value, gate = jnp.split(both(p, x), 2, -1)
    return (value * jax.nn.tanh(gate)) @ p["rows"]["w"]


def heads_of_one_dense(p, x):
    y = (x @ jnp.concatenate([p["box"]["w"] * 100.0, p["score"]["w"] * 0.01], 1)) * 1.0
    return y[:, :C] @ p["rows"]["w"], y[:, C:] @ p["rows"]["w"]


# (model, the sites that stay float)
UNEVEN = {
    "an output": (both, {"concat"}),
    "an output, stacked": (stacked, {"concat"}),
    "an output that a dot reads too": (
        lambda p, x: (both(p, x), both(p, x) @ p["head"]["w"]),
        None,
    ),
    "scaled before a dot": (
        lambda p, x: (both(p, x) / jnp.array([640.0] * C + [1.0] * C)) @ p["head"]["w"],
        {"concat"},
    ),
    "a concatenation in another": (
        lambda p, x: jnp.concatenate(
            [jnp.concatenate([score(p, x), score(p, x)], -1), box(p, x)], -1
        ),
        {"concat", "concat:1"},
    ),
    "its mean": (lambda p, x: jnp.stack([both(p, x), both(p, -x)]).mean(0), None),
    "its maximum": (lambda p, x: jnp.stack([both(p, x), both(p, -x)]).max(0), None),
    "added to": (lambda p, x: both(p, x) + jnp.tile(x, (1, 2)) * 0.01, None),
    "multiplied by another": (lambda p, x: both(p, x)[:, :, None] * x[:, None, :2], None),
    "split again": (
        lambda p, x: [part @ p["rows"]["w"] for part in jnp.split(both(p, x), 2, -1)],
        {"concat", "slice"},
    ),
    "gathered from": (lambda p, x: both(p, x)[:, jnp.arange(C, 2 * C)] @ p["rows"]["w"], None),
    "rows of a dot": (lambda p, x: stacked(p, x) @ p["rows"]["w"], {"concat", "rows"}),
    "a small class token": (lambda p, x: class_token(p, x) @ p["rows"]["w"], None),
    "a gate": (gated, None),
    "two heads of one dense layer": (heads_of_one_dense, {"slice:1"}),
    "a mask of -1e9": (
        lambda p, x: jax.nn.softmax(
            jnp.concatenate([x @ p["box"]["w"], jnp.full((x.shape[0], 1), -1e9)], -1)
        ),
        {"concat", "softmax"},
    ),
    "a mask of -inf": (
        lambda p, x: jax.nn.softmax(
            jnp.concatenate([x @ p["box"]["w"], jnp.full((x.shape[0], 1), -jnp.inf)], -1)
        ),
        {"concat", "softmax"},
    ),
}


def least_db(expected, found) -> float:
    """The SQNR in dB of the worst column (of each row of rank 3) that is not all zero."""
    wanted = np.asarray(expected, np.float64)
    noise = ((wanted - np.asarray(found)) ** 2).sum(0)
    signal = (wanted**2).sum(0)
    used = signal > 0
    return float(10 * np.log10(signal[used] / np.maximum(noise[used], 1e-30)).min())


@pytest.mark.parametrize("name", UNEVEN)
def test_no_part_is_rounded_away(name):
    apply_fn, left = UNEVEN[name]
    qparams, qapply = jaxquant.quant_post(
        PARAMS, apply_fn, [X], algo="abs_max", is_full_quantize=True, progress=False
    )
    expected, found = apply_fn(PARAMS, X), qapply(qparams, X)
    for y, y_hat in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert least_db(y, y_hat) > 18
    floats = {row["name"] for row in qapply.report().rows if row["status"] == "float"}
    assert left is None or floats == left


def test_the_reason_tells_the_ranges_and_the_part():
    def apply_fn(p, x):
        joined = both(p, x)
        return joined, joined.mean(-1), joined @ p["head"]["w"]

    _, qapply = jaxquant.quant_post(
        PARAMS, apply_fn, [X], algo="abs_max", is_full_quantize=True, progress=False
    )
    rows = networks.rows(qapply)
    assert "parts differ in range" in rows["concat"]["reason"]
    assert "concat/input_1" in rows["concat"]["reason"]
    assert rows["mean"]["reason"] == "the parts of its input differ in range (see 'concat')"
    assert rows["head"]["status"] == "int8"


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_even_parts_stay_int8(factor):
    def apply_fn(p, x):
        a, b = jax.nn.relu(x @ p["box"]["w"]), jax.nn.relu(x @ p["score"]["w"]) * factor
        return jax.nn.relu(jnp.concatenate([a, b], -1) * 0.5) @ p["head"]["w"]

    _, qapply = jaxquant.quant_post(
        PARAMS, apply_fn, [X], algo="abs_max", is_full_quantize=True, progress=False
    )
    assert networks.rows(qapply)["concat"]["status"] == "int8"


@pytest.mark.parametrize("between", [lambda y: y, jax.nn.relu])
def test_a_dot_over_the_joined_axis_has_scales_for_its_parts(between):
    """Its weights are large where the input is small, so that both parts count alike."""
    large = jnp.array([640.0] * C + [1.0] * C)[:, None]

    def apply_fn(p, x):
        return between(both(p, x)) @ p["head"]["w"]

    params = {**PARAMS, "head": {"w": PARAMS["head"]["w"] / large}}
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [X], algo="abs_max", is_full_quantize=True, recover=(), progress=False
    )
    assert least_db(apply_fn(params, X), qapply(qparams, X)) > 25
    rows = networks.rows(qapply)
    assert rows["concat"]["status"] == "float"
    assert rows["head"]["status"] == "int8"
    assert "1 of" in qapply.report().summary["recovery"]["equalization"]


def test_the_sqnr_on_a_scale_is_that_of_rounding():
    x = np.abs(networks.images(1, (1 << 16,))).astype(np.float64)
    counts, _ = np.histogram(x, 2048, (0, 8))
    stats = TensorStats(counts.astype(np.uint64), 8 / 2048, 0.0, x.max(), x.max(), x.size)
    for scale, threshold in ((0.02, 3.0), (0.3, 8.0), (4.0, 8.0)):
        error = x - np.rint(np.minimum(x, threshold) / scale) * scale
        expected = 10 * np.log10((x**2).sum() / (error**2).sum())
        assert sqnr_on(stats, scale, threshold) == pytest.approx(expected, abs=0.2)


def test_exact_zeros_have_no_error():
    counts = np.zeros(2048, np.uint64)
    counts[0], counts[1500] = 10**9, 1
    stats = TensorStats(counts, 2.0**-11, 0.0, 0.75, 0.75, 10**9 + 1)
    assert sqnr_on(stats, 1 / 127, 1.0) > 40


def test_a_part_that_is_all_zero_is_not_lost():
    def apply_fn(p, x):
        shifted = jnp.concatenate([jnp.zeros((x.shape[0], 1, C)), x[:, None]], 1)
        return shifted @ p["rows"]["w"]

    assert {site.status for site in full.plan_of(apply_fn, PARAMS, X).sites} == {"int8"}
