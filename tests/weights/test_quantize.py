"""Weights on their way to int8: scales per channel and per tensor, transforms, sharing, dtypes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import reference

N, K, C = 4, 8, 6
WEIGHT_TYPES = ("channel_wise_abs_max", "abs_max")


def quantized(params: Any, apply_fn: Any, x: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
    return jaxquant.quant_post(params, apply_fn, [x], **reference.QUANTIZER, **kwargs)


def close(got: Any, want: np.ndarray) -> None:
    """Equal up to the rounding of a few float32 operations."""
    got = np.asarray(got)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=4e-6, atol=4e-6 * np.abs(want).max(initial=1e-30))


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_per_channel_and_per_tensor(kind, rng):
    x = np.float32(rng.normal(size=(N, K)))
    w = np.float32(rng.normal(size=(K, C)) * 2.0 ** np.arange(C))
    qparams, qapply = quantized({"w": w}, lambda p, x: x @ p["w"], x, weight_quantize_type=kind)
    axes = (1,) if kind == "channel_wise_abs_max" else ()
    int8, scale = reference.quantize_weight(w, axes)
    entry = qparams["params"]["w"]
    assert sorted(entry) == ["int8", "scale"]
    np.testing.assert_array_equal(entry["int8"], int8)
    np.testing.assert_allclose(entry["scale"], scale if axes else scale[0], rtol=1e-7)
    assert entry["scale"].shape == ((C,) if axes else ())
    assert qparams["sites"]["w"]["multiplier"].shape == (C,)
    close(qapply(qparams, x), reference.fake(x) @ reference.fake_weight(w, axes))


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize("zeros", ["one channel", "all"])
def test_zero_weights(kind, zeros, rng):
    """An all-zero channel has scale 1 and gives its bias alone."""
    x, b = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=C))
    w = np.float32(rng.normal(size=(K, C)))
    w[:, 2 if zeros == "one channel" else slice(None)] = 0
    qparams, qapply = quantized(
        {"w": w, "b": b}, lambda p, x: x @ p["w"] + p["b"], x, weight_quantize_type=kind
    )
    assert np.isfinite(qparams["params"]["w"]["scale"]).all()
    assert (np.asarray(qparams["params"]["w"]["scale"]) > 0).all()
    got = np.asarray(qapply(qparams, x))
    np.testing.assert_array_equal(got[:, 2], np.full(N, b[2]))
    axes = (1,) if kind == "channel_wise_abs_max" else ()
    bias = reference.whole_bias(np.float64(b), x, w, axes)
    close(got, reference.fake(x) @ reference.fake_weight(w, axes) + bias)


TRANSFORMS = {
    "transposed": lambda xp, p: p["w"].T,
    "reshaped": lambda xp, p: p["w"].reshape(K, C),
    "moved and reshaped": lambda xp, p: (
        p["w"].reshape(2, C, K // 2).transpose(0, 2, 1).reshape(K, C)
    ),
    "scaled": lambda xp, p: p["w"].T * p["scale"],
    "scaled by a literal": lambda xp, p: p["w"].T * 0.25,
    "scaled along the inputs": lambda xp, p: p["w"].T * p["rows"][:, None],
    "cast": lambda xp, p: p["w"].astype("float16").astype("float32").T,
    "joined": lambda xp, p: xp.concatenate([p["w"].T, -p["w"].T], axis=1),
    "cut": lambda xp, p: p["w"].T[:, 1:4],
    "tiled": lambda xp, p: xp.tile(p["w"].T, (1, 2)),
    "repeated": lambda xp, p: xp.broadcast_to(p["rows"][:, None], (K, C)),
    "repeated along the inputs": lambda xp, p: xp.broadcast_to(p["scale"], (K, C)),
    "outer product": lambda xp, p: p["rows"][:, None] * p["scale"],
}


@functools.cache
def quantized_transforms() -> Any:
    """One model with a site for every transform."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(N, K)))
    params = {
        name: {
            "w": np.float32(rng.normal(size=(C, K))),
            "scale": np.float32(rng.normal(size=C)),
            "rows": np.float32(rng.normal(size=K)),
        }
        for name in TRANSFORMS
    }

    def apply_fn(params, x):
        return {name: x @ f(jnp, params[name]) + 1.0 for name, f in TRANSFORMS.items()}

    qparams, qapply = quantized(params, apply_fn, x)
    return params, x, qparams, qapply(qparams, x)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformed_weights(name):
    """The int8 weight is that of the transformed one; the parameter itself is not kept."""
    params, x, qparams, got = quantized_transforms()
    weight = TRANSFORMS[name](np, params[name])
    bias = reference.whole_bias(1.0, x, weight, (1,))
    close(got[name], reference.fake(x) @ reference.fake_weight(weight, (1,)) + bias)
    (entry,) = qparams["params"][name].values()
    np.testing.assert_array_equal(entry["int8"], reference.quantize_weight(weight, (1,))[0])
    assert sorted(entry) == ["int8", "scale"]


def test_standardised_kernel(rng):
    """Weight standardisation is folded."""
    x = np.float32(rng.normal(size=(N, 5, 5, 3)))
    kernel = np.float32(rng.normal(size=(3, 3, 3, C)) + 1)

    def apply_fn(p, x):
        k = p["kernel"]
        k = (k - k.mean((0, 1, 2), keepdims=True)) / (k.std((0, 1, 2), keepdims=True) + 1e-5)
        return lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    qparams, qapply = quantized({"kernel": kernel}, apply_fn, x)
    k = np.float64(kernel)
    k = (k - k.mean((0, 1, 2))) / (k.std((0, 1, 2)) + 1e-5)
    int8, scale = reference.quantize_weight(k, (3,))
    entry = qparams["params"]["kernel"]
    assert np.abs(np.asarray(entry["int8"], np.int64) - int8).max() <= 1  # ties, in float32
    np.testing.assert_allclose(entry["scale"], scale, rtol=1e-5)
    want = np.asarray(apply_fn({"kernel": kernel}, x))
    error = np.asarray(qapply(qparams, x)) - want
    assert np.square(error).mean() < 1e-3 * np.square(want).mean()


@pytest.mark.parametrize("shape", [(3, 3, 1, 3), (3, 3, 3, 2)])
def test_repeated_kernel_of_a_convolution(shape, rng):
    """A blur kernel, one for all channels."""
    x = np.float32(rng.normal(size=(2, 5, 5, 3)))
    groups = 3 // shape[2]

    def apply_fn(p, x):
        kernel = jnp.broadcast_to(p["blur"][:, :, None, None], shape)
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    blur = np.float32(rng.normal(size=shape[:2]))
    qparams, qapply = quantized({"blur": blur}, apply_fn, x)
    assert qparams["params"]["blur"]["int8"].shape == shape
    numbers = lax.conv_dimension_numbers(x.shape, shape, ("NHWC", "HWIO", "NHWC"))
    int8, scale = reference.quantize_weight(np.broadcast_to(blur[:, :, None, None], shape), (3,))
    accumulator = reference.conv(
        reference.quantize(x, reference.inv_scale(x)),
        int8,
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        lhs_dilation=(1, 1),
        rhs_dilation=(1, 1),
        dimension_numbers=numbers,
        feature_group_count=groups,
    )
    close(qapply(qparams, x), accumulator * scale / np.float64(reference.inv_scale(x)))


def test_weight_that_is_no_parameter(rng):
    """An averaging kernel that the model makes itself: `jnp.full`, say."""
    x, w = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=(C, 5)))
    qparams, qapply = quantized({"w": w}, lambda p, x: x @ jnp.full((K, C), 1 / K) @ p["w"], x)
    assert [row["status"] for row in qapply.report().rows] == ["int8", "int8"]
    want = x @ np.full((K, C), 1 / K) @ w
    assert np.abs(qapply(qparams, x) - want).max() < 0.05 * np.abs(want).max()


def test_weight_in_the_closure(rng):
    """A constant that the function holds is quantized like a parameter."""
    x, w = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=(K, C)))
    qparams, qapply = quantized({"b": np.ones(C, np.float32)}, lambda p, x: x @ w + p["b"], x)
    assert qapply.report().rows[0]["status"] == "int8"
    bias = reference.whole_bias(1.0, x, w, (1,))
    close(qapply(qparams, x), reference.fake(x) @ reference.fake_weight(w, (1,)) + bias)


@pytest.mark.filterwarnings("ignore:columns of the quantized model's outputs are one value")
def test_channel_that_rounds_to_zero_keeps_its_multiplier(rng):
    """With one scale for all of the weight; learned rounding may still round it up."""
    x, w = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=(K, C)))
    w[:, 1], w[:, 2] = w[:, 1] * 1e-3, 0
    qparams, _ = quantized({"w": w}, lambda p, x: x @ p["w"], x, weight_quantize_type="abs_max")
    assert not np.asarray(qparams["params"]["w"]["int8"])[:, 1].any()
    multiplier = np.asarray(qparams["sites"]["w"]["multiplier"])
    assert multiplier[1] == multiplier[0] > multiplier[2] == 0


def test_biases_are_whole_units(rng):
    """As int32 holds them: after bias correction and learned rounding too."""
    x, w = np.float32(rng.normal(size=(64, K))), np.float32(rng.normal(size=(K, C)))
    params = {"w": w, "b": np.float32(rng.normal(size=C))}
    for recover in ((), ("bias_correction",), ("adaround", "bias_correction")):
        qparams, _ = jaxquant.quant_post(
            params, lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]), [x], recover=recover,
            progress=False,
        )  # fmt: skip
        arrays = {k: np.float64(v) for k, v in qparams["sites"]["w"].items()}
        steps = arrays["bias"] / arrays["multiplier"]
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-6 * np.abs(steps).max())
        assert np.abs(steps).max() > 10


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_parameters(dtype, rng):
    """Quantized from their own values; the scales stay float32, the output keeps its dtype."""
    x = jnp.asarray(rng.normal(size=(N, K)), dtype)
    params = {"w": jnp.asarray(rng.normal(size=(K, C)), dtype), "b": jnp.ones(C, dtype)}
    qparams, qapply = quantized(params, lambda p, x: x @ p["w"] + p["b"], x)
    int8, scale = reference.quantize_weight(params["w"], (1,))
    entry = qparams["params"]["w"]
    np.testing.assert_array_equal(entry["int8"], int8)
    np.testing.assert_allclose(entry["scale"], scale, rtol=1e-7)
    assert entry["scale"].dtype == jnp.float32
    got = qapply(qparams, x)
    assert got.dtype == dtype
    bias = reference.whole_bias(1.0, x, params["w"], (1,))
    want = reference.fake(x) @ reference.fake_weight(params["w"], (1,)) + bias
    np.testing.assert_allclose(
        np.float64(got), want, rtol=0.51 * float(jnp.finfo(dtype).eps), atol=1e-6
    )


def test_one_weight_at_two_sites(rng):
    """One int8 copy; each site has its own activation scale."""
    x, w = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=(K, K)))
    qparams, qapply = quantized({"w": w}, lambda p, x: (x @ p["w"], (5 * x**2) @ p["w"]), x)
    assert [row["status"] for row in qapply.report().rows] == ["int8", "int8"]
    assert len(qparams["sites"]) == len(qparams["tensors"]) == 2
    assert sorted(qparams["params"]["w"]) == ["int8", "scale"]
    for got, activation in zip(qapply(qparams, x), (x, np.float32(5) * x**2)):
        close(got, reference.fake(activation) @ reference.fake_weight(w, (1,)))


def test_one_weight_in_two_layouts(rng):
    """`x @ w` and `y @ w.T` sum over different axes: a view each, with its own scales."""
    x, w = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=(K, C)))
    y = np.float32(rng.normal(size=(N, C)))
    qparams, qapply = quantized(
        {"w": w}, lambda p, xy: (xy["x"] @ p["w"], xy["y"] @ p["w"].T), {"x": x, "y": y}
    )
    assert sorted(qparams["params"]["w"]) == ["int8", "int8_1", "scale", "scale_1"]
    first, second = qapply(qparams, {"x": x, "y": y})
    close(first, reference.fake(x) @ reference.fake_weight(w, (1,)))
    close(second, reference.fake(y) @ reference.fake_weight(w.T, (1,)))


def test_weight_that_is_read_in_float_too(rng):
    """Float reads the integers times their scales."""
    x, w = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=(K, C)))
    qparams, qapply = quantized({"w": w}, lambda p, x: (x @ p["w"], (p["w"] ** 2).sum()), x)
    assert sorted(qparams["params"]["w"]) == ["int8", "scale"]
    expected = (reference.fake_weight(w, (1,)) ** 2).sum()
    np.testing.assert_allclose(qapply(qparams, x)[1], expected, rtol=1e-5)


def test_parameters_that_nothing_reads_are_left_out(rng):
    x, w = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=(K, C)))
    params = {"w": w, "b": np.ones(C, np.float32), "unused": np.ones(3, np.float32)}
    qparams, _ = quantized(params, lambda p, x: x @ p["w"] + p["b"], x)
    assert sorted(qparams["params"]) == ["w"]


@pytest.mark.parametrize(
    ("step", "bad"), [("mul", np.nan), ("mul", np.inf), ("add", -np.inf), ("div", 0.0)]
)
def test_normalisation_that_is_not_finite(step, bad, rng):
    """Infinity or a division by zero names the site, NaN the parameter."""
    x, w = np.float32(rng.normal(size=(N, K))), np.float32(rng.normal(size=(K, C)))
    s = np.ones(C, np.float32)
    s[3] = bad

    def apply_fn(p, x):
        y, s = x @ p["layer"]["w"], p["layer"]["s"]
        return {"mul": lax.mul, "add": lax.add, "div": lax.div}[step](
            y, jnp.broadcast_to(s, y.shape)
        )

    named = r"params\['layer/s'\] holds NaN" if np.isnan(bad) else "site 'layer'.*NaN or infinity"
    with pytest.raises(ValueError, match=named):
        quantized({"layer": {"w": w, "s": s}}, apply_fn, x)


@pytest.mark.parametrize(("exponent", "error"), [(-100, 0.05), (-124, 0.5)])
def test_tiny_activations(exponent, error, rng):
    """Thresholds down to float32's smallest normal number keep zeros at zero and all finite.

    Below 127 times that number the step no longer shrinks with the threshold.
    """
    x = np.float32(rng.normal(size=(N, K)))
    x = np.float32(x / np.abs(x).max() * 2.0**exponent)
    x[0] = 0
    w = np.float32(rng.normal(size=(K, C)) * 2.0**20)
    qparams, qapply = quantized({"w": w}, lambda p, x: x @ p["w"], x)
    assert np.isfinite(qparams["tensors"]["w/input"]["inv_scale"])
    got = np.asarray(qapply(qparams, x))
    want = np.float64(x) @ np.float64(w)
    assert not got[0].any()
    assert np.abs(got - want).max() < error * np.abs(want).max()
