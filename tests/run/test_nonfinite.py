"""NaN and infinity in the inputs come out, as they do of the float model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.run.nonfinite import mark
from tests import networks
from tests.plan.full import quantize as quantize_full

PARAMS = {
    "k": networks.images(0, (3, 3, 3, 4)),
    "w": networks.images(1, (4, 4)),
    "v": networks.images(2, (4, 2)),
}
IMAGES = networks.images(3, (3, 8, 8, 3))
ROWS = IMAGES[:, 0, :4, 0]


def convolve(p, x):
    y = lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(jax.nn.relu(y).mean((1, 2)) @ p["w"]) @ p["v"]


def pooled(p, x):
    return convolve(p, lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))


def normalized(p, x):
    """A dot that reads what is normalized, which is where its NaN are marked."""
    y = jnp.concatenate([x, 2 * x[..., :1]], axis=3)
    centred = y - y.mean(3, keepdims=True)
    y = centred * lax.rsqrt(jnp.square(centred).mean(3, keepdims=True) + 1e-3)
    return jax.nn.relu(y @ p["w"]).mean((1, 2)) @ p["v"]


@pytest.mark.parametrize("backend", ["xla", "native"])
@pytest.mark.parametrize("apply_fn", [convolve, pooled, normalized])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_the_bad_sample_alone_gives_nan(apply_fn, backend, bad):
    qparams, qapply = networks.quantize(PARAMS, apply_fn, IMAGES)
    qapply = qapply.with_backend(backend)
    good = qapply(qparams, IMAGES)
    # All of a pool's window, so that its largest value is minus infinity too.
    got = qapply(qparams, IMAGES.at[1, 2:4, 4:6, 1].set(bad))
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[::2], good[::2])


def test_one_sample_without_a_batch():
    def apply_fn(p, x):
        return x @ p["w"]

    qparams, qapply = networks.quantize(PARAMS, apply_fn, ROWS[0])
    assert np.isnan(qapply(qparams, ROWS[0].at[2].set(jnp.nan))).all()
    assert np.isfinite(qapply(qparams, ROWS[0])).all()


def test_full_quantization():
    def apply_fn(p, x):
        return (jax.nn.softmax(x @ p["w"]) + x) @ p["v"]

    model = quantize_full(apply_fn, PARAMS, ROWS)
    got = model.qapply(model.qparams, ROWS.at[1, 0].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(got)[:, 0], [False, True, False])


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_scalar_of_a_model_that_is_int8_throughout(in_loop):
    """As a schedule's step or a temperature: it is of all samples."""
    times = jnp.array([0.5, 1.0, 2.0])

    def apply_fn(p, x, time):
        def step(x, t):
            return (x @ p["w"]) * jnp.exp(-t * time), None

        return (lax.scan(step, x, times)[0] if in_loop else step(x, time)[0]) @ p["v"]

    one = jnp.float32(1)
    data = [(ROWS, one)]
    options = {"is_full_quantize": True, "recover": (), "progress": False}
    qparams, qapply = jaxquant.quant_post(PARAMS, apply_fn, data, **options)
    for call in (qapply.with_backend("xla"), qapply):
        assert np.isfinite(call(qparams, ROWS, one)).all()
        assert np.isnan(call(qparams, ROWS, one * jnp.nan)).all()
        bad = call(qparams, ROWS.at[1, 0].set(jnp.nan), one)
        np.testing.assert_array_equal(np.isnan(bad)[:, 0], [False, True, False])


def test_what_the_model_makes_itself():
    def apply_fn(p, x):
        return jnp.log(x) @ p["v"]

    x = jnp.abs(ROWS) + 0.5
    qparams, qapply = networks.quantize(PARAMS, apply_fn, x)
    got = qapply(qparams, x.at[2, 0].set(-0.1))
    np.testing.assert_array_equal(np.isnan(got)[:, 0], [False, False, True])


def test_an_index_out_of_range():
    def apply_fn(p, ids):
        return jnp.take(p["w"], ids, axis=0, mode="fill") @ p["v"]

    qparams, qapply = networks.quantize(PARAMS, apply_fn, jnp.array([0, 1, 2]))
    np.testing.assert_array_equal(
        np.isnan(qapply(qparams, jnp.array([0, 7, 2])))[:, 0], [False, True, False]
    )


def test_under_jit_and_vmap_and_in_half_precision():
    def apply_fn(p, x):
        return x @ p["w"].astype(x.dtype)

    x = ROWS.astype(jnp.bfloat16)
    qparams, qapply = networks.quantize(PARAMS, apply_fn, x)
    bad = x.at[0, 0].set(jnp.nan)
    for call in (jax.jit(qapply), jax.vmap(qapply, (None, 0))):
        got = call(qparams, bad)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32))[:, 0], [True, False, False])


def test_integers_and_masks_are_let_through():
    def apply_fn(p, x, mask):
        scores = x @ p["w"] + mask
        return {"best": scores.argmax(-1), "chances": jax.nn.softmax(scores) @ p["v"]}

    mask = jnp.zeros((3, 4)).at[:, 0].set(-jnp.inf)
    qparams, qapply = networks.quantize(PARAMS, apply_fn, ROWS, mask)
    got = qapply(qparams, ROWS, mask)
    assert np.isfinite(got["chances"]).all()
    got = qapply(qparams, ROWS.at[1, 0].set(jnp.nan), mask)
    np.testing.assert_array_equal(np.isnan(got["chances"])[:, 0], [False, True, False])
    assert got["best"].dtype == jnp.int32


def test_a_saved_model(tmp_path):
    qparams, qapply = networks.quantize(PARAMS, convolve, IMAGES)
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    qparams, qapply = jaxquant.load_quantized_model(tmp_path / "model")
    got = qapply(qparams, IMAGES.at[1, 0, 0, 0].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(got)[:, 0], [False, True, False])


LEAST = np.finfo(np.float32).min
UNIT = "5.421010862427522e-20"  # 2**-64, which a mark multiplies by


def test_the_least_floats_of_a_mask_are_numbers():
    """As additive masks have them: their sum overflows, they do not."""

    def apply_fn(p, x, mask):
        return jax.nn.softmax(x @ p["w"] + mask) @ p["v"]

    mask = jnp.zeros((3, 4)).at[:, :2].set(LEAST)
    model = quantize_full(apply_fn, PARAMS, ROWS, mask)
    for call in (model.qapply, jax.jit(model.qapply), jax.vmap(model.qapply, (None, 0, 0))):
        assert np.isfinite(call(model.qparams, ROWS, mask)).all()
        got = call(model.qparams, ROWS, mask.at[1, 2].set(jnp.nan))
        np.testing.assert_array_equal(np.isnan(got)[:, 0], [False, True, False])


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2**16)])
@pytest.mark.parametrize("value", [LEAST, -LEAST, np.float32(1e-45), np.float32(0)])
def test_a_mark_tells_what_is_not_finite(shape, value, is_stored):
    x = np.full(shape, value, np.float32)
    np.testing.assert_array_equal(mark(jnp.asarray(x), is_stored), np.zeros(3))
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 0] = bad
        got = mark(jnp.asarray(x), is_stored)
        np.testing.assert_array_equal(np.isnan(got), [False, True, False])


def test_a_mark_serves_what_is_computed_of_it_element_by_element():
    """A float stream through many layers is marked once, where the model's input is quantized."""

    def apply_fn(p, x):
        for _ in range(5):
            x = x * 0.7 + jnp.tanh(x @ p["w"])
        return x @ p["v"]

    qparams, qapply = networks.quantize(PARAMS, apply_fn, ROWS)
    by_xla = qapply.with_backend("xla")
    assert str(jax.make_jaxpr(by_xla)(qparams, ROWS)).count(UNIT) == 1
    got = qapply(qparams, ROWS.at[1, 0].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(got)[:, 0], [False, True, False])


def test_a_mark_does_not_serve_what_mixes_the_samples():
    def apply_fn(p, x):
        y = x * 0.7 + jnp.tanh(x @ p["w"])
        return (y + y.mean(0)) @ p["v"]

    qparams, qapply = jaxquant.quant_post(
        PARAMS, apply_fn, [ROWS], progress=False, allow_batch_dependence=True
    )
    assert np.isnan(qapply(qparams, ROWS.at[1, 0].set(jnp.nan))).all()


@pytest.mark.parametrize("leads", ["positions", "samples"])
def test_as_many_positions_as_samples_are_no_samples(leads):
    """What is marked where positions come first is a position of every sample."""
    x = ROWS[:3, None, :] + jnp.arange(3.0)[:, None]

    def apply_fn(p, x):
        y = jnp.exp(0.3 * x.swapaxes(0, 1)) @ p["w"]
        return jnp.tanh(y if leads == "positions" else y.swapaxes(0, 1)) @ p["v"]

    qparams, qapply = networks.quantize(PARAMS, apply_fn, x)
    got = np.isnan(qapply(qparams, x.at[1, 2, 0].set(jnp.nan)))
    by_sample = got.swapaxes(0, 1) if leads == "positions" else got
    assert by_sample.all(axis=(1, 2)).tolist() == [False, True, False]
    assert by_sample.any(axis=(1, 2)).tolist() == [False, True, False]
