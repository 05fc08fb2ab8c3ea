import functools
import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.calibration import counting, histogram
from jaxquant.calibration.examples import with_example
from jaxquant.calibration.sweep import Sweep
from jaxquant.graph.model import FloatModel
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.observed import observed_tensors

W = {"w": jnp.eye(4)}


def dot(p, x):
    return x @ p["w"]


def data(*sizes, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, 4)).astype(np.float32) * scale for n in sizes]


def calibrate(ds, apply_fn=dot, params=W, **kwargs):
    return jaxquant.calibrate(params, apply_fn, ds, progress=False, **kwargs)


def assert_stats(stats, values):
    """The statistics are those that NumPy gives for all the values at once."""
    values = np.concatenate([np.ravel(v) for v in values]).astype(np.float64)
    assert (stats.min, stats.max) == (values.min(), values.max())
    assert stats.abs_max == np.abs(values).max()
    assert stats.count == values.size
    width = 2.0 ** (np.floor(np.log2(stats.abs_max)) + 1) / 2048
    assert stats.bin_width == width
    edges = np.arange(2049) * width
    np.testing.assert_array_equal(stats.counts, np.histogram(np.abs(values), edges)[0])


def same(a, b):
    assert list(a.tensors) == list(b.tensors)
    for one, other in zip(a.tensors.values(), b.tensors.values()):
        np.testing.assert_array_equal(one.counts, other.counts)
        fields = ("bin_width", "min", "max", "abs_max", "count")
        assert [getattr(one, f) for f in fields] == [getattr(other, f) for f in fields]


def test_statistics_are_numpys_whatever_the_order_and_the_split():
    """One tensor seen as it is and one computed from it, over batches of several sizes."""
    batches = data(4, 4) + data(2, scale=40.0)

    def apply_fn(p, x):
        return jnp.maximum(x @ p["w"], 0) @ p["v"]["kernel"]

    params = W | {"v": {"kernel": jnp.ones((4, 2))}}
    seen = calibrate(batches, apply_fn, params)
    assert list(seen.tensors) == ["w/input", "v/input"]
    assert_stats(seen.tensors["w/input"], batches)
    assert_stats(seen.tensors["v/input"], [np.maximum(b, 0) for b in batches])
    assert (seen.batches, seen.samples) == (3, 10)
    np.testing.assert_array_equal(seen.examples[0][0], batches[0])

    same(calibrate(batches[::-1], apply_fn, params), seen)
    whole = np.concatenate(batches)
    same(calibrate(whole, apply_fn, params), seen)


@pytest.fixture(scope="module")
def sweeps():
    """Every way to feed ten samples that is not an array: all give the same statistics."""
    x = data(10)[0]
    return x, calibrate([x])


@pytest.mark.parametrize(
    ("ds", "kwargs"),
    [
        (lambda x: (sample for sample in x), {"batch_size": 5}),
        (lambda x: lambda: iter([x[:5], x[5:]]), {}),
        (lambda x: ({"image": s, "label": 0} for s in x), {"batch_size": 5, "select": "image"}),
        (lambda x: [(x[:5], "text"), (x[5:], "text")], {"select": 0}),
        (lambda x: [x[:5], x[5:], 1 / x[:5]], {"batch_nums": 2}),
    ],
    ids=["generator of samples", "callable", "select a key", "select an index", "batch_nums"],
)
def test_forms_of_ds(sweeps, ds, kwargs):
    x, expected = sweeps
    seen = calibrate(ds(x), **kwargs)
    assert (seen.batches, seen.samples) == (2, 10)
    same(seen, expected)


def test_a_ragged_last_batch_counts_by_its_elements():
    x = data(7)[0]
    seen = calibrate((s for s in x), batch_size=5)
    assert (seen.batches, seen.samples) == (2, 7)
    assert_stats(seen.tensors["w/input"], [x])


def lengths(*sizes):
    return [(np.ones((2, n, 4), np.float32) * n,) for n in sizes]


def test_batches_of_several_lengths_count_together():
    batches = [x * np.float32([1, 2, 3, 4]) for (x,) in lengths(3, 1, 5, 3)]
    seen = calibrate(batches)
    assert_stats(seen.tensors["w/input"], batches)
    assert (seen.batches, seen.samples) == (4, 8)


def test_examples_are_of_up_to_four_shapes():
    kept = ()
    for inputs in lengths(3, 1, 3, 5, 7, 9, 1):
        kept = with_example(kept, inputs)
    assert [x.shape[1] for (x,) in kept] == [3, 1, 3, 5, 7, 1]
    (ragged,) = lengths(3)[0]
    assert with_example(kept, (ragged[:1],)) is kept


def test_many_shapes_of_batches_are_warned_of(monkeypatch):
    monkeypatch.setattr("jaxquant.calibration.sweep._MANY_SHAPES", 2)
    with pytest.warns(UserWarning, match="more than 2 shapes"):
        calibrate(lengths(3, 2, 3, 1))


def test_one_trace_per_input_shape():
    traces = []

    def apply_fn(p, x):
        traces.append(x.shape)
        return x @ p["w"]

    calibrate(data(3, 3, 2, 3, 2, 3), apply_fn)
    assert set(traces) == {(2, 4), (3, 4)}
    assert len(traces) <= 3  # the first shape perhaps once more, to find the sites


def test_the_step_compiles_once_per_input_shape():
    counted = []

    def count(x):
        counted.append(x.shape)
        return counting.portable_counts(x)

    tensors_of = functools.partial(observed_tensors, config=QuantConfig())
    sweep = Sweep(FloatModel(dot, W), tensors_of, count=count)
    for batch in data(3, 2, 3, 2, 3):
        sweep.add((batch,))
    assert counted == [(3, 4), (2, 4)]


def test_the_state_does_not_grow_with_the_number_of_samples():
    """What is on devices between batches: the state, and the flags of one batch."""
    sweep = Sweep(FloatModel(dot, W), functools.partial(observed_tensors, config=QuantConfig()))
    held = []
    for batch in data(4, 4, 4, 4):
        sweep.add((batch,))
        gc.collect()
        held.append(sorted((x.shape, str(x.dtype)) for x in jax.live_arrays()))
    assert held[1:] == held[:1] * 3
    assert jax.tree.structure(sweep.state) == jax.tree.structure(histogram.init())


def test_integer_and_bool_inputs_beside_float_ones():
    def apply_fn(p, ids, mask, x):
        hidden = p["embed"][ids] + x
        hidden = jnp.where(mask[:, None], hidden, 0.0)
        return hidden @ p["fc"]["w"]

    rng = np.random.default_rng(0)
    params = {"embed": jnp.asarray(rng.normal(size=(9, 4)), jnp.float32), "fc": {"w": jnp.eye(4)}}
    ids = rng.integers(0, 9, 6)  # int64: what NumPy gives
    mask = np.array([1, 0, 1, 1, 1, 0], bool)
    x = data(6)[0]
    seen = calibrate((ids, mask, x), apply_fn, params, batch_size=4)
    hidden = np.where(mask[:, None], np.asarray(params["embed"])[ids] + x, 0)
    assert_stats(seen.tensors["fc/input"], [hidden])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_activations(dtype):
    x = jnp.asarray(data(6)[0], dtype)
    seen = calibrate([x], params={"w": jnp.eye(4, dtype=dtype)})
    assert_stats(seen.tensors["w/input"], [np.asarray(x, np.float64)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_a_bad_activation_names_site_and_batch(bad, at):
    """In the first batch and in the last one, whose flags are read after the loop."""
    batches = data(2, 2, 2)
    batches[at][1, 3] = bad
    with pytest.raises(ValueError, match=f"input of site 'w' holds NaN or infinity in batch {at}"):
        calibrate(batches)


def test_a_bad_activation_stops_the_sweep_early():
    batches, read = data(*[2] * 6), []
    batches[1][0, 0] = np.nan

    def ds():
        for index, batch in enumerate(batches):
            read.append(index)
            yield batch

    with pytest.raises(ValueError, match="in batch 1"):
        calibrate(ds)
    assert max(read) <= 3


def test_a_bad_activation_inside_the_model_names_the_first_site_that_reads_it():
    def apply_fn(p, x):
        return jnp.log(x @ p["w"]) @ p["v"]["kernel"]

    params = W | {"v": {"kernel": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match="input of site 'v' holds NaN or infinity in batch 0"):
        calibrate([-np.ones((2, 4), np.float32)], apply_fn, params)


def test_a_layer_norm_inside_does_not_hide_the_batch_axis():
    """Batches of one sample."""
    x = data(3)[0]
    params = {"norm": {"scale": jnp.ones(4)}, **W}

    def apply_fn(p, v):
        return (v * jax.lax.rsqrt((v * v).mean(-1, keepdims=True)) * p["norm"]["scale"]) @ p["w"]

    seen = calibrate((s for s in x), apply_fn, params, batch_size=1)
    assert (seen.batches, seen.samples) == (3, 3)
    assert seen.tensors["w/input"].count == x.size


def test_all_zero_activations():
    stats = calibrate([np.zeros((2, 4), np.float32)]).tensors["w/input"]
    assert (stats.min, stats.max, stats.abs_max, stats.count) == (0, 0, 0, 8)
    assert stats.counts[0] == 8


def test_tensors_inside_loops_are_observed_over_all_steps():
    def apply_fn(p, x):
        return jax.lax.fori_loop(0, 2, lambda _, c: c @ p["loop"], x) @ p["w"]

    seen = calibrate([np.ones((2, 4), np.float32)], apply_fn, W | {"loop": jnp.eye(4) * 2})
    assert list(seen.tensors) == ["w/input", "loop/input"]
    assert seen.tensors["w/input"].abs_max == 4
    loop = seen.tensors["loop/input"]
    assert (loop.min, loop.max, loop.count) == (1, 2, 16)


def test_linen_dropout_in_inference_mode():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="fc")(nn.Dropout(0.5, deterministic=True)(x))

    x = data(4)[0]
    params = Net().init(jax.random.key(0), x)
    assert_stats(calibrate([x], Net().apply, params).tensors["fc/input"], [x])


def test_the_observations_of_a_full_quantization_serve_the_default_and_skips():
    def apply_fn(p, x):
        y = jnp.concatenate([x @ p["w"], x], -1)
        return y @ p["v"]

    params = W | {"v": jnp.ones((8, 2))}
    observations = jaxquant.calibrate(
        params, apply_fn, data(4), is_full_quantize=True, progress=False
    )
    for options in (
        {},
        {"is_full_quantize": True},
        {"is_full_quantize": True, "skip": ("concat",)},
    ):
        _, qapply = jaxquant.quantize(params, apply_fn, observations, **options)
        assert qapply.report().summary["sites_int8"] == (3 if len(options) == 1 else 2)
