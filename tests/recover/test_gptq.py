"""Second-order rounding of stored weights, as users call it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant
from jaxquant.recover import gptq, gptq_weight
from tests.loops import measure
from tests.networks import rows

WIDTH = 16
FOUR = {"weight_bits": 4, "group_size": 8, "progress": False}
EVERYWHERE = (jaxquant.Rule("*", weight_bits=4),)  # the first and the last site too


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def together(seed: int, *shape: int) -> np.ndarray:
    """Samples whose channels go together: half as many sources as there are channels."""
    sources = draw(seed, *shape[:-1], shape[-1] // 2) @ draw(99, shape[-1] // 2, shape[-1])
    return sources + 0.1 * draw(seed + 1, *shape)


def quantize(params: Any, apply_fn: Any, data: Any, **options: Any) -> Any:
    return jaxquant.quant_weights(params, apply_fn, data, **{**FOUR, **options})


def gain(params: Any, apply_fn: Any, data: Any, unseen: Any, **options: Any) -> float:
    """By how many dB the outputs are nearer on samples that calibration did not see."""
    reference = apply_fn(params, unseen)

    def sqnr(**more: Any) -> float:
        qparams, qapply = quantize(params, apply_fn, data, **options, **more)
        return measure.sqnr(reference, qapply(qparams, unseen))

    return sqnr() - sqnr(recover=())


def conv(groups: int) -> Any:
    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=names, feature_group_count=groups
        )

    return apply_fn


CASES = {
    "dense": (lambda p, x: x @ p["w"], (64, WIDTH), (WIDTH, 24), 3.0),
    "transposed": (lambda p, x: x @ p["w"].T, (64, WIDTH), (24, WIDTH), 3.0),
    "not whole groups": (lambda p, x: x @ p["w"], (64, 14), (14, 24), 3.0),
    "conv": (conv(1), (6, 5, 5, 8), (3, 3, 8, 6), 2.5),
    "grouped": (conv(2), (6, 5, 5, 8), (3, 3, 4, 6), 1.5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_error_falls_on_samples_that_were_not_seen(case):
    apply_fn, x_shape, w_shape, least = case
    params, data = {"w": draw(0, *w_shape)}, [together(1, *x_shape), together(3, *x_shape)]
    assert gain(params, apply_fn, data, together(5, *x_shape)) > least


def test_eight_bits_and_a_scale_a_channel():
    params, data = {"w": draw(0, WIDTH, 24)}, together(1, 128, WIDTH)
    options = {"weight_bits": 8, "group_size": None}
    assert gain(params, lambda p, x: x @ p["w"], data, together(5, 64, WIDTH), **options) > 3


def network(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["a"]) @ p["b"]


PARAMS = {"a": draw(0, WIDTH, WIDTH) / 4, "b": draw(1, WIDTH, WIDTH)}
X = together(2, 96, WIDTH)


def test_the_report_tells_of_each_site():
    _, qapply = quantize(PARAMS, network, X, rules=(jaxquant.Rule("b", recover=()),))
    report = qapply.report()
    assert report.summary["recovery"]["gptq"].startswith("1 of 1 weights, the error of their")
    found = rows(qapply)
    assert found["a"]["rounding"].startswith("gptq: error ")
    assert found["b"]["rounding"] == ""
    assert found["a"]["rounding"] in str(report).replace("\n      ", " ")
    assert "gptq: error" in report._repr_html_()
    _, qapply = quantize(PARAMS, network, X, recover=())
    assert qapply.report().summary["recovery"] == {}


def test_shapes_round_to_nearest_and_few_samples_do_too():
    plain, _ = quantize(PARAMS, network, jax.ShapeDtypeStruct((2, WIDTH), jnp.float32))
    few, qapply = quantize(PARAMS, network, X[:8])
    measure.assert_same_numbers(measure.flat(few), measure.flat(plain))
    assert rows(qapply)["a"]["rounding"] == "to nearest: 8 output positions are too few to round on"
    with pytest.raises(ValueError, match=r"example is shapes alone: pass samples, or leave"):
        quantize(PARAMS, network, jax.ShapeDtypeStruct((2, WIDTH), jnp.float32), recover=("gptq",))


def test_batches_are_read_as_asked():
    whole, _ = quantize(PARAMS, network, X[:80])
    in_parts, _ = quantize(PARAMS, network, iter(X), batch_size=80, batch_nums=1)
    measure.assert_same_numbers(measure.flat(in_parts), measure.flat(whole))


def test_several_passes_give_the_same(monkeypatch):
    batches = [X[:48], X[48:]]
    once, _ = quantize(PARAMS, network, (x for x in batches))
    monkeypatch.setattr(gptq, "MEMORY", 1)
    twice, _ = quantize(PARAMS, network, batches)
    measure.assert_same_numbers(measure.flat(twice), measure.flat(once))
    with pytest.raises(ValueError, match=r"several passes over the data.*pass a list"):
        quantize(PARAMS, network, (x for x in batches))


def test_what_would_take_too_much_memory_stays_to_nearest(monkeypatch):
    monkeypatch.setattr(gptq_weight, "LARGEST_SUMS", 16 * 8**2)
    params = {"a": draw(0, WIDTH, 8), "b": draw(1, 8, 4)}
    found = rows(quantize(params, network, X)[1])
    assert found["a"]["rounding"] == "to nearest: its covariances would take 0.0 GB"
    assert found["b"]["rounding"].startswith("gptq: ")


def test_dead_and_constant_channels_and_fewer_samples_than_channels():
    x = X.copy()
    x[:, 3], x[:, 5] = 0, 2.5
    apply_fn, unseen = lambda p, x: x @ p["a"], together(5, 64, WIDTH)
    unseen[:, 3], unseen[:, 5] = 0, 2.5
    assert gain({"a": PARAMS["a"]}, apply_fn, x, unseen) > 2
    constant, zero = np.ones((64, WIDTH), np.float32), np.zeros((64, WIDTH), np.float32)
    for data, told in ((constant, "gptq: error"), (zero, "to nearest: ")):
        qparams, qapply = quantize({"a": PARAMS["a"]}, apply_fn, data)
        assert rows(qapply)["a"]["rounding"].startswith(told)
        assert measure.sqnr(X @ PARAMS["a"], qapply(qparams, X)) > 12
    wide, few = {"a": draw(0, 128, 8)}, draw(1, 40, 128)  # that tell nothing of others
    assert gain(wide, apply_fn, few, draw(2, 64, 128)) > -0.5


def test_inputs_that_are_the_same_everywhere():
    # Sums of squares that are far larger than their rounding leaves of what varies.
    params = {"w": draw(0, 64, 8), "b": draw(1, 8)}
    x = np.repeat(100 * draw(2, 1, 64), 512, axis=0)
    qparams, qapply = quantize(params, lambda p, x: x @ p["w"] + p["b"], x, rules=EVERYWHERE)
    assert measure.sqnr(x @ params["w"] + params["b"], qapply(qparams, x)) > 80


def test_nan_names_the_site_and_the_batch():
    bad = X.copy()
    bad[7, 3] = np.nan
    with pytest.raises(ValueError, match=r"input of site 'a' holds NaN or infinity in batch 1"):
        quantize(PARAMS, network, [X, bad])


def layer(x: jax.Array, p: Any) -> jax.Array:
    return x + jnp.tanh(x @ p["a"]) @ p["b"]


def test_layers_of_a_scan_are_rounded_as_those_of_a_python_loop():
    stacked = {"a": draw(0, 3, WIDTH, WIDTH) / 4, "b": draw(1, 3, WIDTH, WIDTH) / 4}
    layers = [{n: x[k] for n, x in stacked.items()} for k in range(3)]
    by_name = {f"layers_{k}": each for k, each in enumerate(layers)}

    def scanned(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, p: (layer(x, p), None), x, p["layers"])[0]

    def by_hand(p: Any, x: jax.Array) -> jax.Array:
        for number in range(3):
            x = layer(x, p[f"layers_{number}"])
        return x

    looped, qapply = quantize({"layers": stacked}, scanned, X, rules=EVERYWHERE)
    single, _ = quantize(by_name, by_hand, X, rules=EVERYWHERE)
    found, wanted = measure.flat(looped), measure.stacked(single)
    for path, array in wanted.items():  # a sum of floats may differ in its last bit
        assert np.mean(found[path] == array) > 0.99, path
    told = rows(qapply)["layers/a"]["rounding"]
    assert told.startswith("gptq in 3 of 3 layers: error ")


def test_a_weight_of_several_sites_is_rounded_for_all_of_them():
    shared = {"w": PARAMS["a"]}
    unseen = together(5, 64, WIDTH)

    def twice(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"]) @ p["w"]

    def loop(p: Any, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["w"]), x)

    def tied(p: Any, ids: jax.Array) -> jax.Array:
        return jnp.tanh(p["w"][ids]) @ p["w"].T

    assert gain(shared, twice, X, unseen) > 1
    assert gain(shared, loop, X, unseen) > 1
    ids = np.random.default_rng(0).integers(0, 50, (2, 64))
    table = {"w": together(7, 50, WIDTH) / 2}
    qparams, qapply = quantize(table, tied, ids[0])
    assert {row["rounding"][:4] for row in qapply.report().rows} == {"", "gptq"}
    assert set(qparams["params"]["w"]) == {"int4", "scale"}


def test_what_is_no_stored_weight_stays_where_it_is():
    place = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("all",)), PartitionSpec())
    params = {"w": draw(0, WIDTH, 8), "shift": jax.device_put(draw(1, 8), place)}
    qparams, qapply = quantize(params, lambda p, x: x @ p["w"] + p["shift"], together(2, 64, WIDTH))
    assert "gptq" in str(qapply.report().rows)
    assert qparams["params"]["shift"].sharding == place
    # Not bound to a device: one call takes it beside what is spread over several.
    assert not qparams["params"]["w"]["int4"].committed


def test_saved_and_loaded_it_is_the_same(tmp_path):
    qparams, qapply = quantize(PARAMS, network, X)
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, again = jaxquant.load_quantized_model(tmp_path / "model")
    measure.assert_same_numbers(measure.flat(loaded), measure.flat(qparams))
    np.testing.assert_array_equal(again(loaded, X), qapply(qparams, X))


def test_other_modes_refuse_it_and_it_takes_no_other_steps():
    with pytest.raises(ValueError, match=r"'gptq' is a step of jaxquant\.quant_weights"):
        jaxquant.quant_post(PARAMS, network, [X], recover=("gptq",), progress=False)
    with pytest.raises(ValueError, match=r"'adaround' is a step of jaxquant\.quant_post"):
        quantize(PARAMS, network, X, recover=("adaround",))
