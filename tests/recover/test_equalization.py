"""Equalization: exact integers with a scale per input channel, and what it gains and refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant import native
from jaxquant.graph.model import trace_model
from jaxquant.graph.trace import trace
from jaxquant.plan.inputs import along_weight, input_axes
from jaxquant.plan.plan import Plan
from tests import reference

EQUALIZE = ("equalization",)


def sqnr(reference: Any, got: Any) -> float:
    reference, got = np.float64(reference), np.float64(got)
    return 10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum())


def uneven(shape: tuple[int, ...], axis: int, seed: int = 0) -> np.ndarray:
    """Channels along `axis` whose ranges differ up to 100 times."""
    rng = np.random.default_rng(seed)
    ranges = np.logspace(-2, 0, shape[axis])
    x = rng.uniform(-1, 1, shape) * np.expand_dims(ranges, [a for a in range(len(shape))
                                                            if a != axis])  # fmt: skip
    return x.astype(np.float32)


def even_outputs(shape: tuple[int, ...], axis: int, seed: int = 1) -> jax.Array:
    """Weights that make up for the ranges of `uneven`, so that every channel matters."""
    ranges = np.logspace(-2, 0, shape[axis])
    w = np.random.default_rng(seed).normal(size=shape)
    w = w / np.expand_dims(ranges, [a for a in range(len(shape)) if a != axis])
    return jnp.asarray(w, jnp.float32)


def quantize(params: Any, apply_fn: Any, *inputs: Any, **options: Any) -> Any:
    options = {"algo": "abs_max", "recover": EQUALIZE, "progress": False, **options}
    return jaxquant.quant_post(params, apply_fn, [inputs], **options)


def conv(x: Any, w: Any, **options: Any) -> jax.Array:
    layout = options.pop("layout", ("NHWC", "HWIO", "NHWC"))
    return lax.conv_general_dilated(
        x, w, options.pop("strides", (1, 1)), options.pop("padding", "SAME"),
        dimension_numbers=layout, **options,
    )  # fmt: skip


CONVS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], dict[str, Any]]] = {
    "dense": ((12, 5, 5, 8), 3, (3, 3, 8, 4), {}),
    "channels first": ((12, 8, 5, 5), 1, (4, 8, 3, 3), {"layout": ("NCHW", "OIHW", "NCHW")}),
    "depthwise": ((12, 5, 5, 8), 3, (3, 3, 1, 8), {"feature_group_count": 8}),
    "multiplier": ((12, 5, 5, 4), 3, (3, 3, 1, 8), {"feature_group_count": 4}),
    "grouped": ((12, 5, 5, 8), 3, (3, 3, 4, 6), {"feature_group_count": 2}),
    "dilated": ((12, 7, 7, 8), 3, (3, 3, 8, 4), {"rhs_dilation": (2, 2), "strides": (2, 1)}),
    "transposed": ((12, 4, 4, 8), 3, (3, 3, 8, 4), {"lhs_dilation": (2, 2),
                                                   "padding": ((1, 2), (2, 1))}),
}  # fmt: skip


@pytest.mark.parametrize("never_negative", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_equals_numpy_exactly(name: str, never_negative: bool):
    shape, axis, kernel, options = CONVS[name]
    x = uneven(shape, axis)
    if never_negative:
        x = np.abs(x)
    w = np.random.default_rng(1).normal(size=kernel).astype(np.float32)
    params, groups = {"w": jnp.asarray(w)}, options.get("feature_group_count", 1)

    def apply_fn(p: Any, x: Any) -> Any:
        return conv(x, p["w"], **options)

    kinds = ("conv2d", "depthwise_conv2d", "conv2d_transpose")  # the last is not among the defaults
    qparams, qapply = quantize(params, apply_fn, x, quantizable_op_type=kinds)
    (tensor,) = qapply.plan.tensors
    assert tensor.channels == (axis,)
    assert tensor.zero_point == (-128 if never_negative else 0)
    entry = qparams["tensors"]["w/input"]
    laid = [1] * 4
    laid[axis] = shape[axis]
    factors = np.asarray(entry["scale"], np.float64).reshape(laid) / tensor.scale
    assert factors.max() > 2 * factors.min()

    # The weight: rows of the input channels, by the group of the output channel.
    eqn = next(e for e in trace(apply_fn, params, (x,)).equations if "conv" in e.name)
    spec = eqn.params["dimension_numbers"].rhs_spec
    ordered = w.astype(np.float64).transpose(spec)  # O I H W
    e = factors.reshape(groups, -1)
    for o in range(len(ordered)):
        ordered[o] *= e[o // (len(ordered) // groups)][:, None, None]
    folded = ordered.transpose(np.argsort(spec))
    want, scale = reference.quantize_weight(folded, (spec[0],))
    np.testing.assert_array_equal(qparams["params"]["w"]["int8"], want)

    # The integers of the input, the sum, the epilogue.
    product = x * np.asarray(entry["inv_scale"]).reshape(laid)
    zero = tensor.zero_point
    integers = np.clip(np.rint(product) + zero, -128, 127).astype(np.int64) - zero
    eqn_params = {k: eqn.params[k] for k in (
        "window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
        "feature_group_count",
    )}  # fmt: skip
    total = reference.conv(integers, want, **eqn_params).astype(np.float64)
    channels = eqn.params["dimension_numbers"].out_spec[1]
    total *= reference.along(scale * tensor.scale, [len(scale)], [channels], 4)
    got = np.asarray(qapply(qparams, x), np.float64)
    np.testing.assert_allclose(got, total, rtol=1e-5, atol=1e-5 * np.abs(total).max())


@pytest.mark.parametrize(
    ("spec", "shape", "weight", "axes"),
    [("nk,ko->no", (16, 8), (8, 4), (1,)), ("ok,nk->on", (16, 8), (4, 8), (1,)),
     ("nbhd,hdo->nbo", (4, 3, 2, 4), (2, 4, 5), (2, 3)),
     ("nbdh,hdo->nbo", (4, 3, 4, 2), (2, 4, 5), (2, 3))],
)  # fmt: skip
def test_a_dot_equals_numpy_exactly(spec, shape, weight, axes):
    rng = np.random.default_rng(0)
    n = int(np.prod([shape[a] for a in axes]))
    ranges = np.logspace(-2, 0, n).reshape([shape[a] for a in axes])
    swapped = spec.startswith("ok")
    terms = spec.split("->")[0].split(",")
    letters = terms[::-1] if swapped else terms  # of the input, of the weight
    kept = "".join(letters[0][a] for a in axes)
    x = np.einsum(f"{kept},{letters[0]}->{letters[0]}", ranges, rng.uniform(-1, 1, shape))
    w = np.einsum(f"{kept},{letters[1]}->{letters[1]}", 1 / ranges, rng.normal(size=weight))
    x, w = x.astype(np.float32), w.astype(np.float32)

    def apply_fn(p: Any, x: Any) -> Any:
        return jnp.einsum(spec, *((p["w"], x) if swapped else (x, p["w"])))

    qparams, qapply = quantize({"w": jnp.asarray(w)}, apply_fn, x)
    (tensor,) = qapply.plan.tensors
    assert tensor.channels == axes
    entry, zero = qparams["tensors"]["w/input"], tensor.zero_point
    integers = np.rint(x * np.asarray(entry["inv_scale"])) + zero
    integers = np.clip(integers, -128, 127) - zero
    sizes = [s if a in axes else 1 for a, s in enumerate(shape)]
    e = np.broadcast_to(np.asarray(entry["scale"], np.float64) / tensor.scale, sizes)
    e = e.reshape([shape[a] for a in axes])
    folded = np.einsum(f"{kept},{letters[1]}->{letters[1]}", e, w.astype(np.float64))
    output = next(i for i, c in enumerate(letters[1]) if c == "o")
    want, scale = reference.quantize_weight(folded, (output,))
    np.testing.assert_array_equal(qparams["params"]["w"]["int8"], want)
    laid = reference.along(scale, [len(scale)], [output], len(weight)) * tensor.scale
    total = np.einsum(spec, *((want * laid, integers) if swapped else (integers, want * laid)))
    got = np.asarray(qapply(qparams, x), np.float64)
    np.testing.assert_allclose(got, total, rtol=1e-5, atol=1e-5 * np.abs(total).max())


@pytest.mark.parametrize("step", ["equalization", "smoothquant"])
def test_channels_of_unlike_range_gain(step: str):
    x, w = uneven((256, 32), 1), even_outputs((32, 16), 0)
    found = {}
    for recover in ((), (step,)):
        qparams, qapply = quantize({"w": w}, lambda p, x: x @ p["w"], x[:128], recover=recover)
        found[recover] = sqnr(x[128:] @ np.asarray(w), qapply(qparams, x[128:]))
    assert found[(step,)] > found[()] + 10
    assert step in qapply.report().summary["recovery"]
    assert f"Recovery: {step}: 1 of 1 tensors." in str(qapply.report())


def test_the_gain_passes_any_activation_and_batch_norm():
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(8, 32)), jnp.float32),
        "gain": jnp.asarray(np.logspace(-2, 0, 32), jnp.float32),
        "b": even_outputs((32, 4), 0),
    }

    def apply_fn(p: Any, x: Any) -> Any:
        return jnp.clip(x @ p["a"] * p["gain"], 0, 6) @ p["b"]

    x = rng.normal(size=(128, 8)).astype(np.float32)
    want, found = np.asarray(apply_fn(params, x[64:])), {}
    for recover in ((), EQUALIZE, ("bias_correction",), ("bias_correction", *EQUALIZE)):
        qparams, qapply = quantize(params, apply_fn, x[:64], recover=recover)
        found[recover] = sqnr(want, qapply(qparams, x[64:]))
    assert found[EQUALIZE] > found[()] + 3
    assert found[("bias_correction", *EQUALIZE)] > found[("bias_correction",)] + 3


BEHIND = {
    "gelu": jax.nn.gelu,
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "leaky": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
}


@pytest.mark.parametrize(
    ("name", "outliers", "step"),
    [
        ("exact gelu", {7: 30.0}, "smoothquant"),
        ("gelu", {3: 30.0, 7: 200.0, 20: 1000.0, 50: -30.0}, "equalization"),
        ("elu", {7: 1000.0}, "equalization"),
        *(pytest.param(name, {7: 200.0}, "equalization", marks=pytest.mark.slow)
          for name in ("silu", "leaky", "mish")),
    ],
)  # fmt: skip
def test_outliers_behind_an_activation_cost_little(name, outliers, step):
    """Close to the network whose outliers are divided by hand, which is what a step each does."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(64, 128)) / 8, "b": rng.normal(size=(128, 32)) / 11}
    x = rng.normal(size=(256, 64)).astype(np.float32)
    function, found = BEHIND[name], []

    def apply_fn(p: Any, x: Any) -> Any:
        return function(x @ p["a"]) @ p["b"]

    for recover in ((), (step,)):
        arrays = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
        qparams, qapply = quantize(arrays, apply_fn, x[:128], recover=(*recover, "bias_correction"))
        found.append(sqnr(apply_fn(arrays, x[128:]), qapply(qparams, x[128:])))
        for channel, factor in outliers.items():
            params["a"][:, channel] *= factor
            params["b"][channel] /= factor
    by_hand, with_step = found
    assert with_step > by_hand - 4
    tensor = next(t for t in qapply.plan.tensors if t.name == "b/input")
    assert tensor.channels == (1,)
    # The grid ends at the threshold, but for the zero point, which is rounded to a step.
    ends = tensor.scale * max(128 + tensor.zero_point, 127 - tensor.zero_point)
    assert tensor.threshold == pytest.approx(ends, abs=tensor.scale / 2)


def test_outliers_behind_an_activation_of_a_convolution_cost_little():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 3, 4, 32)) / 6, "b": rng.normal(size=(3, 3, 32, 16)) / 17}
    params["a"][..., 7] *= 100
    params["b"][:, :, 7] /= 100
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    x = rng.normal(size=(16, 8, 8, 4)).astype(np.float32)

    def apply_fn(p: Any, x: Any) -> Any:
        return conv(jax.nn.silu(conv(x, p["a"])), p["b"])

    qparams, qapply = quantize(arrays, apply_fn, x[:8])
    assert sqnr(apply_fn(arrays, x[8:]), qapply(qparams, x[8:])) > 30


def test_values_beyond_those_of_calibration_are_kept():
    """A small channel that doubles is not clipped; one at the tensor's range is, as without."""
    x = uneven((64, 16), 1)
    qparams, qapply = quantize({"w": even_outputs((16, 8), 0)}, lambda p, x: x @ p["w"], x)
    (tensor,) = qapply.plan.tensors
    scale = np.broadcast_to(np.asarray(qparams["tensors"]["w/input"]["scale"]), 16)
    for ends, steps in ((x.max(axis=0), 127), (-x.min(axis=0), 128)):
        wanted = np.minimum(2 * ends, np.float32(tensor.threshold))
        assert (scale * steps >= wanted * (1 - 1e-5)).all()


def test_smoothquant_leaves_convolutions_alone():
    x = uneven((4, 5, 5, 8), 3)
    params = {"a": even_outputs((3, 3, 8, 8), 2), "b": even_outputs((8, 4), 0)}

    def apply_fn(p: Any, x: Any) -> Any:
        return conv(x, p["a"]) @ p["b"]

    plan = quantize(params, apply_fn, x, recover=("smoothquant",))[1].plan
    assert not next(t for t in plan.tensors if t.name == "a/input").channels
    plan = quantize(params, apply_fn, x, recover=("smoothquant", "equalization"))[1].plan
    assert next(t for t in plan.tensors if t.name == "a/input").channels == (3,)


def test_an_even_tensor_is_left_alone():
    x = np.tile(np.linspace(-1, 1, 64, dtype=np.float32)[:, None], (1, 8))
    w = np.tile(np.linspace(-1, 1, 4, dtype=np.float32), (8, 1))
    _, qapply = quantize({"w": jnp.asarray(w)}, lambda p, x: x @ p["w"], x)
    assert not qapply.plan.tensors[0].channels
    assert qapply.report().summary["recovery"] == {"equalization": "0 of 1 tensors"}


def _moved(p: Any, x: Any) -> Any:
    return x.reshape(-1, 4) @ p["w"][:4]


def _twice(p: Any, x: Any) -> Any:
    return x @ p["w"] + jnp.sin(x) @ p["w"]


def _other_axes(p: Any, x: Any) -> Any:
    return x @ p["w"], p["v"] @ x


def _tensors(p: Any, x: Any) -> Any:
    return x @ p["w"], x @ x.T


@pytest.mark.parametrize("apply_fn", [_moved, _twice, _other_axes, _tensors])
def test_tensors_that_cannot_be_equalized_are_left_alone(apply_fn: Any):
    x = uneven((8, 8), 1)
    params = {"w": even_outputs((8, 4), 0), "v": jnp.ones((4, 8))}
    _, qapply = quantize(params, apply_fn, x, is_full_quantize=True)
    assert not any(tensor.channels for tensor in qapply.plan.tensors)
    assert qapply.report().summary["recovery"] == {"equalization": "0 of 0 tensors"}


def test_sites_that_share_weight_and_input_are_equalized_together():
    x, w = uneven((64, 32), 1), even_outputs((32, 16), 0)

    def apply_fn(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p["w"]), x @ p["w"] * 2

    qparams, qapply = quantize({"w": w}, apply_fn, x)
    assert qapply.plan.tensors[0].channels == (1,)
    for got, want in zip(qapply(qparams, x), apply_fn({"w": w}, x)):
        assert sqnr(want, got) > 38


def test_other_batch_sizes_vmap_and_the_plans_json():
    x, w = uneven((64, 32), 1), even_outputs((32, 16), 0)
    qparams, qapply = quantize({"w": w}, lambda p, x: x @ p["w"], x)
    whole = np.asarray(qapply(qparams, x))
    np.testing.assert_allclose(qapply(qparams, x[:3]), whole[:3], rtol=1e-6)
    single = jax.vmap(lambda row: qapply(qparams, row[None])[0])(x)
    np.testing.assert_allclose(single, whole, rtol=1e-6)
    assert Plan.from_json(qapply.plan.to_json()) == qapply.plan


def _residual_net(p: Any, x: Any) -> Any:
    """A depthwise block with a residual: all that the native calls fuse."""
    y = jnp.clip(conv(x, p["expand"]), 0, 6)
    y = jnp.clip(conv(y, p["depthwise"], feature_group_count=16), 0, 6)
    return jax.nn.relu(conv(y, p["project"]) + x).mean((1, 2)) @ p["head"]


def _residual_params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    shapes = {"expand": (1, 1, 8, 16), "depthwise": (3, 3, 1, 16), "project": (1, 1, 16, 8)}
    params = {k: rng.normal(size=s) * np.logspace(-1, 0.5, s[-1]) for k, s in shapes.items()}
    params["head"] = rng.normal(size=(8, 4))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


@pytest.mark.parametrize("full", [False, True])
def test_native_kernels_agree_with_xla(full: bool):
    ok, reason = native.available()
    if not ok:
        pytest.skip(reason)
    x = uneven((8, 6, 6, 8), 3)
    qparams, qapply = quantize(_residual_params(), _residual_net, x, is_full_quantize=full)
    assert sum(bool(tensor.channels) for tensor in qapply.plan.tensors) >= 2
    qapply = qapply.with_backend("native")
    want = np.asarray(qapply.with_backend("xla")(qparams, x), np.float64)
    for arrays in (qparams, qapply.prepare(qparams)):
        off = want - np.asarray(qapply(arrays, x), np.float64)
        # A float that the kernels round otherwise in its last bit may be the next integer.
        assert (off**2).sum() < 1e-5 * (want**2).sum()


@pytest.mark.parametrize("recover", [EQUALIZE, ("smoothquant", "bias_correction")])
def test_a_saved_model_gives_the_same_bits(recover: Any, tmp_path):
    x = uneven((8, 6, 6, 8), 3)
    qparams, qapply = quantize(_residual_params(), _residual_net, x, recover=recover)
    qapply = qapply.with_backend("xla")  # as an exported program runs
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "model")
    assert apply.plan == qapply.plan
    jax.tree.map(np.testing.assert_array_equal, loaded, qparams)
    np.testing.assert_array_equal(apply(loaded, x[:3]), qapply(qparams, x[:3]))


def test_the_order_in_which_steps_are_named_does_not_matter():
    x, w = uneven((64, 32), 1), even_outputs((32, 16), 0)
    models = [
        quantize({"w": w}, lambda p, x: x @ p["w"], x, recover=recover)[0]
        for recover in (("equalization", "bias_correction"), ("bias_correction", "equalization"))
    ]
    jax.tree.map(np.testing.assert_array_equal, *models)


def test_one_value_per_input_channel_is_laid_along_a_grouped_weight():
    params = {"w": jnp.ones((3, 3, 4, 6))}

    def apply_fn(p: Any, x: Any) -> Any:
        return conv(x, p["w"], feature_group_count=2)

    model = trace_model(apply_fn, params, (np.ones((1, 5, 5, 8), np.float32),))
    (site,) = model.sites
    assert input_axes(site) == (3,)
    laid = along_weight(site, (3, 3, 4, 6), np.arange(8.0).reshape(1, 1, 1, 8))
    assert laid.shape == (1, 1, 4, 6)
    for output in range(6):
        assert laid[0, 0, :, output].tolist() == [4 * (output // 3) + k for k in range(4)]
