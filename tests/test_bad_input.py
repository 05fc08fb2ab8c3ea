"""Each bad input is a clear error at the call: it names the site or the argument."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.plan.config import QuantConfig
from tests import networks
from tests.bad_input import PARAMS, X, mlp, never, quant_post


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
