"""Each bad input is a clear error at the call: it names the site, batch or argument."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from jaxquant.graph.calls import shapes_text
from jaxquant.plan.config import QuantConfig
from tests import networks

PARAMS = {"fc": {"w": jnp.eye(4)}, "head": {"w": jnp.ones((4, 2))}}
X = jnp.ones((3, 4))


def mlp(p, x):
    return jax.nn.relu(x @ p["fc"]["w"]) @ p["head"]["w"]


def never(*_):
    raise AssertionError("the model must not run")


def quant_post(params=PARAMS, apply_fn=mlp, ds=(X,), **kwargs):
    return jaxquant.quant_post(params, apply_fn, list(ds), progress=False, **kwargs)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"algo": "kl"}, "algo: 'kl' is not known; nearest: KL"),
        ({"algo": "absmax"}, "algo: 'absmax' is not known; nearest: abs_max"),
        ({"algo": "zzz"}, "algo: 'zzz' is not known; valid: KL, KL:paddle-3.3"),
        ({"algo": None}, "algo: None is not known"),
        ({"quantizable_op_type": ("conv4d",)}, "'conv4d' is not known; nearest: conv2d"),
        ({"quantizable_op_type": ("mul", "depthwise_conv")}, "nearest: depthwise_conv2d"),
        ({"quantizable_op_type": ()}, "quantizable_op_type is empty; choose from conv2d"),
        ({"weight_quantize_type": "absmax"}, "weight_quantize_type: 'absmax' .*nearest: abs_max"),
        ({"weight_quantize_type": "channel_wise"}, "nearest: channel_wise_abs_max"),
        ({"optimize_for": "sped"}, "optimize_for: 'sped' is not known; nearest: speed"),
        ({"optimize_for": None}, "optimize_for: None is not known; valid: size, speed"),
        ({"skip": ("",)}, "skip holds glob patterns on site names, .*got ''"),
        ({"skip": (3,)}, "skip holds glob patterns on site names, .*got 3"),
        ({"skip": ("module:",)}, "'module:' with one behind it; got 'module:'"),
        ({"hist_percent": 99.99}, r"hist_percent is a fraction .*got 99.99; 99.99 % is 0.9999"),
        ({"hist_percent": None}, "hist_percent is a fraction .* got None"),
        ({"calibration_file": ""}, "calibration_file is empty: give the path of a file, or None"),
        ({"recovery_file": "x.npz"}, "recovery_file keeps what the step 'adaround' learned"),
        ({"allow_batch_dependence": 1}, "allow_batch_dependence is True or False, got 1"),
    ],
)
def test_arguments_are_checked_before_anything_runs(config, match):
    with pytest.raises(ValueError, match=match):
        quant_post(apply_fn=never, **config)


@pytest.mark.parametrize("argument", ["quantizable_op_type", "skip"])
@pytest.mark.parametrize(
    "call",
    [
        lambda **config: QuantConfig(**config),
        lambda **config: quant_post(apply_fn=never, **config),
    ],
    ids=["QuantConfig", "quant_post"],
)
def test_one_name_in_place_of_a_sequence_is_told(argument, call):
    with pytest.raises(ValueError, match=rf"{argument} is a sequence .* write \('mul',\) for one"):
        call(**{argument: "mul"})


def test_a_config_takes_lists():
    assert QuantConfig(skip=["a"]).skip == ("a",)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer or None, got 0"),
        ({"batch_nums": 1.5}, TypeError, "batch_nums must be a positive integer or None, got 1.5"),
        ({"select": 1.5}, TypeError, "select must be a key or index"),
        ({"select": 3}, ValueError, "select=3 does not fit batch 0 of ds"),
    ],
)
def test_arguments_of_the_data_are_checked(kwargs, error, match):
    with pytest.raises(error, match=match):
        quant_post(apply_fn=never, **kwargs)


@pytest.mark.parametrize(
    ("ds", "match"),
    [
        ([], r"ds is empty: it gave no batch \(ds is a list\)"),
        (iter([]), "A generator or another iterator can be read only once"),
        (lambda: [], "The callable must return a fresh iterator"),
        (np.zeros((0, 4), np.float32), "ds is empty"),
        ([np.zeros((0, 4), np.float32)], r"batch 0 of ds is empty: .*float32\[0,4\]. Leave it out"),
    ],
    ids=["list", "iterator", "callable", "array", "batch"],
)
def test_empty_ds(ds, match):
    with pytest.raises(ValueError, match=match):
        jaxquant.calibrate(PARAMS, mlp, ds, progress=False)


def test_an_exhausted_generator():
    ds = (x for x in [X])
    next(ds)
    with pytest.raises(ValueError, match="if it has been read already, pass a callable"):
        jaxquant.calibrate(PARAMS, mlp, ds, progress=False)


def test_fewer_batches_than_asked_is_a_warning():
    with pytest.warns(UserWarning, match="ds ended after 1 of batch_nums=5 batches"):
        seen = jaxquant.calibrate(PARAMS, mlp, [X], batch_nums=5, progress=False)
    assert seen.batches == 1


def notes(error):
    return "\n".join(getattr(error, "__notes__", ()))


@pytest.mark.parametrize(
    ("ds", "guess"),
    [
        ([(X, jnp.zeros(3))], "select=0"),
        ([jnp.ones((3, 7))], "give batch_size="),
        ([{"image": X}], "select='image'"),
        ([jnp.ones((2, 3, 8, 8))], "x.transpose(0, 2, 3, 1)"),
    ],
    ids=["labels too", "another shape", "a dict", "channels first"],
)
def test_batches_that_do_not_fit_apply_fn_are_described(ds, guess):
    with pytest.raises((TypeError, ValueError)) as info:
        jaxquant.calibrate(PARAMS, mlp, ds, progress=False)
    assert "calibration called apply_fn(params, *inputs) with inputs of" in notes(info.value)
    assert "float32" in notes(info.value)
    assert guess in notes(info.value)


def test_no_guess_at_the_data_where_the_function_cannot_be_traced():
    with pytest.raises(jax.errors.TracerBoolConversionError) as info:
        jaxquant.calibrate(PARAMS, lambda p, x: mlp(p, x) if x.sum() else x, [X], progress=False)
    assert "batch_size" not in notes(info.value)


def test_batches_that_do_not_fit_each_other():
    with pytest.raises(TypeError) as info:
        jaxquant.calibrate(PARAMS, mlp, [X, jnp.ones((3, 5))], progress=False)
    said = notes(info.value)
    assert "with inputs of float32[3, 5]" in said
    assert (
        f"That is batch 1; batch 0, which the model took, has inputs of {shapes_text((X,))}" in said
    )


def test_a_batch_size_that_changes_the_graph_names_the_batch():
    def apply_fn(p, x):
        return mlp(p, x) if x.shape[0] > 1 else x @ p["head"]["w"]

    with pytest.raises(ValueError, match=r"batch 1 gives another graph than batch 0.* sites fc "):
        jaxquant.calibrate(PARAMS, apply_fn, [X, X[:1]], progress=False)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bad_weight_names_site_parameter_and_how_many(bad, dtype):
    params = PARAMS | {"head": {"w": jnp.ones((4, 2), dtype).at[1, 0].set(bad)}}
    apply_fn = lambda p, x: mlp(jax.tree.map(lambda w: w.astype(jnp.float32), p), x)  # noqa: E731
    match = r"weight of site 'head', params\['head/w'\], holds NaN or infinity in 1 of its 8"
    with pytest.raises(ValueError, match=match):
        quant_post(params, apply_fn)


def test_a_bad_weight_inside_control_flow():
    def apply_fn(p, x):
        return jax.lax.fori_loop(0, 2, lambda _, c: c @ p["loop"]["w"], x) @ p["fc"]["w"]

    params = PARAMS | {"loop": {"w": jnp.eye(4).at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"weight of site 'loop', params\['loop/w'\], holds NaN"):
        quant_post(params, apply_fn)


def test_a_bad_weight_in_a_constant():
    w = np.eye(4, dtype=np.float32)
    w[0, 0] = np.nan
    w = jnp.asarray(w)
    with pytest.raises(ValueError, match=r"params\['constant_0'\], holds NaN or infinity in 1"):
        quant_post(PARAMS, lambda p, x: mlp(p, x @ w))


def test_a_bad_bias_names_the_site():
    params = PARAMS | {"fc": {"w": jnp.eye(4), "b": jnp.array([0, 0, jnp.nan, 0])}}
    with pytest.raises(ValueError, match=r"params\['fc/b'\] holds NaN"):
        networks.quantize(params, lambda p, x: x @ p["fc"]["w"] + p["fc"]["b"], X)


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (1.0, r"params\['fc/b'\] is float, not an array"),
        ("text", r"params\['fc/b'\] is str, not an array"),
        (jax.ShapeDtypeStruct((4,), jnp.float32), "is ShapeDtypeStruct, not an array"),
        (np.array(["a"]), r"params\['fc/b'\] has dtype <U1, not numbers"),
        (np.array([None]), r"params\['fc/b'\] has dtype object, not numbers"),
    ],
)
def test_params_that_are_not_arrays_are_named(leaf, match):
    with pytest.raises(TypeError, match=match):
        quant_post({"fc": {"w": jnp.eye(4), "b": leaf}}, never)


@pytest.mark.parametrize("params", [{}, None, {"a": None}, ()])
def test_no_params(params):
    with pytest.raises(ValueError, match="params holds no array"):
        quant_post(params, never)


def test_an_nnx_module_that_is_no_pytree_says_what_to_pass():
    class Model(nnx.Module, pytree=False):
        def __init__(self):
            self.fc = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    with pytest.raises(TypeError, match=r"is Model, not an array; .* pass the state of nnx.split"):
        quant_post(Model(), never)


def test_params_that_are_traced():
    with pytest.raises(TypeError, match=r"params\['fc/w'\] is being traced: .* outside jit"):
        jax.jit(lambda p: quant_post(p, never)[0])(PARAMS)


def test_inputs_that_are_traced():
    with pytest.raises(TypeError, match=r"batch 0 .* is being traced: .* outside jit"):
        jax.jit(lambda x: quant_post(ds=[x])[0])(X)


def test_a_model_with_nothing_to_quantize_stops_before_the_data_is_read():
    read = []

    def ds():
        for index in range(3):
            read.append(index)
            yield X

    with pytest.raises(ValueError, match="nothing to quantize: apply_fn holds no convolution"):
        jaxquant.calibrate(jnp.ones(4), lambda p, x: x * p, ds, progress=False)
    assert read == [0]


def test_a_model_of_which_nothing_is_left_says_why():
    with pytest.raises(ValueError, match=r"no site is left to quantize.*skip='head'"):
        networks.quantize(PARAMS, mlp, X, skip=("fc", "head"))
    with pytest.raises(ValueError, match="'mul' is not in quantizable_op_type"):
        networks.quantize(PARAMS, mlp, X, quantizable_op_type=("conv2d",))


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("haed", "skip pattern 'haed' matches no site; nearest: head"),
        ("block*", r"skip pattern 'block\*' matches no site; valid: fc, head"),
    ],
)
def test_a_skip_pattern_that_matches_nothing(pattern, match):
    with pytest.raises(ValueError, match=match):
        networks.quantize(PARAMS, mlp, X, skip=("fc", pattern))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="fc")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name="fc")(x))


def test_apply_fn_that_needs_an_rng_says_what_to_pass():
    variables = Dropped().init(jax.random.key(0), X, False)
    with pytest.raises(ValueError, match=r"needs a PRNG key .* `deterministic=True`") as info:
        quant_post(variables, lambda p, x: Dropped().apply(p, x, True))
    assert "model.apply(p, x, train=False)" in str(info.value)


def test_apply_fn_that_updates_variables_says_what_to_pass():
    variables = Normed().init(jax.random.key(0), X, False)
    with pytest.raises(ValueError, match=r"updates variables .* use_running_average=True"):
        quant_post(variables, lambda p, x: Normed().apply(p, x, True))


def test_apply_fn_that_returns_updated_collections_says_what_to_pass():
    variables = Normed().init(jax.random.key(0), X, False)
    apply_fn = lambda p, x: Normed().apply(p, x, True, mutable=["batch_stats"])  # noqa: E731
    with pytest.raises(
        ValueError, match=r"returns updated variables \(batch_stats\) .* without `mutable="
    ):
        quant_post(variables, apply_fn)


def test_an_nnx_model_in_training_mode():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.fc(x))

    model = Model(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    with pytest.raises(ValueError, match=r"draws random numbers .*`model.eval\(\)`"):
        quant_post(state, lambda s, x: nnx.merge(graphdef, s)(x))


def test_an_nnx_model_in_inference_mode_keeps_its_keys_among_the_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.fc(x))

    model = Model(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    qparams, qapply = networks.quantize(state, lambda s, x: nnx.merge(graphdef, s)(x), X)
    np.testing.assert_allclose(qapply(qparams, X), model(X), atol=0.05)


def test_an_error_of_the_model_itself_passes_through():
    def apply_fn(p, x):
        raise KeyError("wrong key of the model")

    with pytest.raises(KeyError, match="wrong key of the model"):
        quant_post(apply_fn=apply_fn)


@pytest.fixture(scope="module")
def quantized():
    return networks.quantize(PARAMS, mlp, X)


@pytest.mark.parametrize(
    ("qparams", "match"),
    [
        (PARAMS, r"qparams that quant_post returned .* got a dict of \['fc', 'head'\]"),
        ({}, r"got a dict of \[\]"),
        (None, "got NoneType"),
        (X, "qparams that quant_post returned beside it"),
    ],
    ids=["params", "empty", "None", "an input"],
)
def test_qapply_refuses_what_is_no_qparams(quantized, qparams, match):
    with pytest.raises(ValueError, match=match):
        quantized[1](qparams, X)


def test_qapply_refuses_the_qparams_of_another_model(quantized):
    other, _ = networks.quantize({"w": jnp.eye(4)}, lambda p, x: x @ p["w"], X)
    with pytest.raises(ValueError, match=r"qparams.*fc"):
        quantized[1](other, X)


def test_qapply_with_inputs_that_do_not_fit_the_model(quantized):
    qparams, qapply = quantized
    with pytest.raises((TypeError, ValueError)):
        qapply(qparams, jnp.ones((3, 5)))
    with pytest.raises(TypeError):
        qapply(qparams, X, X)


def test_qapply_with_a_shape_that_changes_the_graph_names_the_sites():
    def apply_fn(p, x):
        return mlp(p, x) if x.shape[0] > 1 else x @ p["head"]["w"]

    qparams, qapply = networks.quantize(PARAMS, apply_fn, X)
    with pytest.raises(ValueError, match=r"another graph than the one .* sites fc differ"):
        qapply(qparams, X[:1])


def test_quantize_with_the_observations_of_another_model():
    observations = networks.observe({"w": jnp.eye(4)}, lambda p, x: x @ p["w"], X)
    with pytest.raises(ValueError, match="the observations hold nothing on 'fc/input'"):
        jaxquant.quantize(PARAMS, mlp, observations, algo="abs_max")


@pytest.mark.parametrize("change", ["params", "apply_fn"])
def test_quantize_with_other_parameters_than_those_calibrated(change):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    observations = jaxquant.calibrate(PARAMS, mlp, [x], progress=False)
    params, apply_fn, match = PARAMS, mlp, "apply_fn computes something else"
    if change == "params":
        params = PARAMS | {"head": {"w": jnp.zeros((4, 2))}}
        match = r"params\['head/w'\] is float32\[4,2\], in calibration .* with other values"
    else:
        apply_fn = lambda p, x: mlp(p, jnp.tanh(x))  # noqa: E731
    with pytest.raises(ValueError, match=match):
        jaxquant.quantize(params, apply_fn, observations, progress=False)


@pytest.mark.parametrize("error", [KeyError("the wrong rng"), ValueError("no PRNG here")])
def test_an_error_that_speaks_of_rng_is_not_a_missing_key(error):
    def apply_fn(p, x):
        raise error

    with pytest.raises(type(error), match=r"the wrong rng|no PRNG here"):
        quant_post(apply_fn=apply_fn)


@pytest.mark.parametrize("name", ["cache", "intermediates", "batch_stats"])
def test_a_plain_function_may_return_whatever_it_wants(name):
    qparams, qapply = networks.quantize(PARAMS, lambda p, x: (mlp(p, x), {name: x * 2}), X)
    logits, others = qapply(qparams, X)
    assert logits.shape == (3, 2)
    np.testing.assert_array_equal(others[name], 2 * X)


def test_progress_is_a_flag():
    with pytest.raises(ValueError, match="progress is True or False, got 'x'"):
        jaxquant.quant_post(PARAMS, never, [X], progress="x")


def test_bits_are_an_integer():
    with pytest.raises(ValueError, match=r"bits is 8 or 4, got 4\.0"):
        jaxquant.quant_weights(PARAMS, mlp, X, weight_bits=4.0)


def test_observations_that_are_none():
    with pytest.raises(TypeError, match=r"observations is what .*calibrate returned.*got NoneType"):
        jaxquant.quantize(PARAMS, mlp, None)


def test_swapped_arguments(quantized):
    qparams, qapply = quantized
    with pytest.raises(TypeError, match="params and apply_fn are swapped"):
        quant_post(mlp, PARAMS)
    with pytest.raises(TypeError, match="qparams and qapply are swapped"):
        jaxquant.analyze(PARAMS, mlp, qapply, qparams, [X])
    with pytest.raises(TypeError, match=r"is what jaxquant\.analyze returned; got str"):
        jaxquant.plots.histogram("fc/input", None)


@dataclasses.dataclass
class TrainState:
    params: dict
    opt_state: tuple = ()


@pytest.mark.parametrize(
    ("params", "apply_fn", "match"),
    [
        (TrainState(PARAMS), never, r"params is a TrainState, .* pass its `\.params`"),
        (PARAMS, Dropped(), r"apply_fn is a Dropped: .*model\.apply"),
        (Dropped(), never, r"is Dropped, not an array; pass the variables of `model\.init`"),
        (PARAMS, nnx.Linear(4, 2, rngs=nnx.Rngs(0)), r"apply_fn is a Linear: .*nnx\.split"),
        (PARAMS, 3, "apply_fn is a function .* got int"),
    ],
)
def test_a_whole_model_in_place_of_its_parts(params, apply_fn, match):
    with pytest.raises(TypeError, match=match):
        quant_post(params, apply_fn)


def test_deleted_parameters_are_named():
    params = {"fc": {"w": jnp.eye(4) * 2}, "head": PARAMS["head"]}
    params["fc"]["w"].delete()
    with pytest.raises(ValueError, match=r"params\['fc/w'\] has been deleted: it was donated"):
        quant_post(params)


@pytest.mark.parametrize("shape", [(4, 0), (0, 4)])
def test_a_weight_without_elements_is_named(shape):
    params = {"fc": {"w": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=rf"weight of site 'fc' has no element.*\[{shape[0]}, "):
        quant_post(params, lambda p, x: x @ p["fc"]["w"], [jnp.ones((8, shape[0]))])


@pytest.mark.parametrize(
    ("options", "match"),
    [({"batch_size": 2}, "batch_size=2 has stacked 2 items of ds"), ({}, "give batch_size=")],
)
def test_batches_and_samples_that_are_confused(options, match):
    def apply_fn(p, x):
        assert x.ndim == 2, "a batch of vectors"
        return mlp(p, x)

    ds = [X, X] if options else [X[0], X[1]]
    with pytest.raises(AssertionError) as info:
        jaxquant.calibrate(PARAMS, apply_fn, ds, progress=False, **options)
    assert match in notes(info.value)
