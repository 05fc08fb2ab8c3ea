"""Sites and what follows them run as one native call, with the bits of the XLA lowering."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant import native
from jaxquant.backends.platforms import PLATFORMS, XLA_ALONE
from jaxquant.graph import evaluate
from jaxquant.graph.model import trace_model
from jaxquant.graph.trace import trace
from jaxquant.plan.bind import bind
from jaxquant.run.program import Program
from jaxquant.run.qapply import QuantizedApply
from tests import networks
from tests.native.cases import needs_kernels

pytestmark = pytest.mark.optimized

NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, p, name, stride=1, groups=1):
    kernel = p[name]["kernel"]
    y = lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=NHWC, feature_group_count=groups
    )
    return y * p[name]["scale"] + p[name]["bias"]


def residual_net(p, x):
    x = jax.nn.relu6(conv(x, p, "stem", stride=2))
    y = jax.nn.relu(conv(x, p, "depthwise", groups=16))
    y = conv(y, p, "project")
    x = jax.nn.relu(x + y)
    y = jnp.clip(conv(x, p, "wide"), -1.0, 2.0)
    return jnp.mean(y, (1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


def make_params():
    shapes = {
        "stem": (3, 3, 3, 16), "depthwise": (3, 3, 1, 16), "project": (1, 1, 16, 16),
        "wide": (3, 3, 16, 40), "head": (40, 10),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[:-1])
        params[name] = {
            "kernel": jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), jnp.float32),
            "scale": jnp.asarray(rng.uniform(0.5, 1.5, shape[-1]), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
        }
    return params


X = networks.images(0, (4, 14, 14, 3))


@functools.cache
def quantized(is_full_quantize: bool = False):
    return jaxquant.quant_post(
        make_params(), residual_net, [np.asarray(X)], algo="abs_max", progress=False,
        is_full_quantize=is_full_quantize, recover=(),
    )  # fmt: skip


def chains(qapply: QuantizedApply, x: jax.Array = X):
    binding = qapply.with_backend("xla").program(x).binding
    program = Program(binding, qapply.source.params, PLATFORMS)
    return {name: each.chain for name, each in program.calls.items()}


def test_activations_and_outputs_of_chains():
    found = chains(quantized()[1])
    assert set(found) == {"stem", "depthwise", "project", "wide", "head"}
    assert found["stem"].clamps[0] == (0.0, 6.0)
    assert found["stem"].float_out  # the shortcut is float
    assert found["stem"].grid == found["stem"].output
    assert found["depthwise"].clamps[0] == (0.0, np.inf)
    assert not found["depthwise"].float_out
    assert found["depthwise"].grid == found["depthwise"].output
    assert found["project"].residual is not None
    assert found["project"].clamps[1] == (0.0, np.inf)
    assert not found["project"].float_out
    assert found["wide"].clamps[0] == (-1.0, 2.0)
    assert found["head"].float_out
    assert found["head"].grid is None


def test_int8_residual_in_full_quantization():
    found = chains(quantized(is_full_quantize=True)[1])
    assert found["project"].residual_int8
    assert not found["stem"].float_out


@needs_kernels
@pytest.mark.parametrize("is_full_quantize", [False, True])
def test_one_call_a_site_shows_the_results_of_the_xla_lowering(is_full_quantize: bool):
    qparams, qapply = quantized(is_full_quantize)
    binding = bind(trace_model(residual_net, make_params(), (X,)), qapply.plan)

    def run(has_kernels: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        table = PLATFORMS if has_kernels else XLA_ALONE
        program, seen = Program(binding, make_params(), table, by_site=True), {}

        def corrected(site, lowering):
            def correcting(state):
                seen[site.site.name] = lowering(state)[site.epilogue.output]
                return {site.epilogue.output: seen[site.site.name] + 0.25}  # before its activation

            return correcting

        env = program.hooked(corrected).run(qparams, [X])
        return evaluate.outputs(env), seen

    want, steps = jax.jit(run, static_argnums=0)(False)
    got, found = jax.jit(run, static_argnums=0)(True)
    assert {"stem", "depthwise", "project", "wide", "head"} <= set(found) == set(steps)
    for name in steps:  # XLA may join a product and a sum into one rounding
        np.testing.assert_allclose(found[name], steps[name], atol=2e-6, rtol=0, err_msg=name)
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=0)


def test_a_tensor_that_is_an_output_ends_a_chain():
    def two_outputs(p, x):
        y = conv(x, p, "stem")
        return y, jax.nn.relu(y)

    params = {"stem": make_params()["stem"]}
    _, qapply = jaxquant.quant_post(
        params, two_outputs, [np.asarray(X)], algo="abs_max", progress=False, recover=()
    )
    (chain,) = chains(qapply).values()
    assert chain.clamps[0] == (-np.inf, np.inf)
    assert chain.output in trace(two_outputs, params, (X,)).output_vars


@needs_kernels
@pytest.mark.parametrize("is_full_quantize", [False, True])
def test_bits_of_the_xla_lowering(is_full_quantize: bool):
    qparams, qapply = quantized(is_full_quantize)
    native, xla = qapply.with_backend("native"), qapply.with_backend("xla")
    expected = np.asarray(xla(qparams, X))
    np.testing.assert_array_equal(native(qparams, X), expected)
    prepared = native.prepare(qparams, X)
    np.testing.assert_array_equal(native(prepared, X), expected)
    np.testing.assert_array_equal(xla(prepared, X), expected)
    np.testing.assert_array_equal(native(prepared, X[:1]), xla(qparams, X[:1]))


@needs_kernels
def test_no_convolution_or_dot_is_left_to_xla():
    qparams, qapply = quantized()
    text = jax.jit(qapply.with_backend("native")).lower(qparams, X).compile().as_text()
    assert "convolution(" not in text
    assert " dot(" not in text


@needs_kernels
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_and_vmap(check_vma: bool):
    qparams, qapply = quantized()
    native = qapply.with_backend("native")
    x = jnp.concatenate([X, X])
    expected = np.asarray(native(qparams, x))
    mesh = jax.make_mesh((8,), ("batch",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    mapped = jax.shard_map(
        native, mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec("batch"),
        check_vma=check_vma,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(mapped)(qparams, x), expected, atol=1e-5)
    each = jax.vmap(native, (None, 0))(qparams, x[:, None])
    np.testing.assert_allclose(each[:, 0], expected, atol=1e-5)


@needs_kernels
def test_sharded_batch():
    qparams, qapply = quantized()
    native = qapply.with_backend("native")
    x = jnp.concatenate([X, X])
    mesh = jax.make_mesh((8,), ("batch",), (jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("batch")))
    got = native(native.prepare(qparams, X), sharded)
    np.testing.assert_allclose(got, native(qparams, x), atol=1e-5)


@needs_kernels
def test_export_has_no_custom_call():
    qparams, qapply = quantized()
    native = qapply.with_backend("native")
    exported = jax.export.export(jax.jit(native))(qparams, X)
    assert "stablehlo.custom_call" not in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(qparams, X), native(qparams, X))


def test_backends():
    qparams, qapply = quantized()
    xla = qapply.with_backend("xla")
    assert xla.backend.name == "xla"
    assert xla.prepare(qparams, X).keys() == qparams.keys()
    assert "xla (chosen)" in str(xla.report())
    assert qapply.report().summary["backend"] == str(qapply.backend)
    with pytest.raises(ValueError, match="backend 'onednn'; choose one of auto, native, xla"):
        qapply.with_backend("onednn")


def _dots(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


def _convs(p, x):
    y = jax.nn.relu(lax.conv_general_dilated(x, p["up"], (1, 1), "SAME", dimension_numbers=NHWC))
    return lax.conv_general_dilated(y, p["down"], (1, 1), "SAME", dimension_numbers=NHWC)


@pytest.mark.skipif(not native.int8_is_faster().available, reason=native.int8_is_faster().reason)
@pytest.mark.parametrize(
    ("apply_fn", "lead", "window", "kernel"),
    [(_dots, (1,), (), "jaxquant_dot"), (_dots, (2, 5), (), "jaxquant_dot"),
     (_convs, (3, 1, 1), (1, 1), "jaxquant_sequence")],
)  # fmt: skip
def test_a_weight_is_not_packed_for_a_few_rows(apply_fn, lead, window, kernel, rng):
    """That takes longer than XLA's product; packed beforehand, or for many rows, it does not."""
    shapes = {"up": (*window, 24, 40), "down": (*window, 40, 8)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(*lead, 24)), jnp.float32)
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], recover=(), progress=False)

    def is_native(qapply, qparams, x) -> bool:
        return kernel in jax.jit(qapply).lower(qparams, x).as_text()

    assert not is_native(qapply, qparams, x)
    assert is_native(qapply, qapply.prepare(qparams), x)
    assert is_native(qapply, qparams, jnp.tile(x, (32, *(1,) * len(lead))))
    assert is_native(qapply.with_backend("native"), qparams, x)
    natively = qapply(qapply.prepare(qparams), x)
    np.testing.assert_allclose(qapply(qparams, x), natively, rtol=1e-6)


def test_native_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch):
    from jaxquant.native import library

    unavailable = library.Availability(False, "no compiler")
    monkeypatch.setattr(library, "available", lambda: unavailable)
    with pytest.raises(RuntimeError, match="native kernels are not available: no compiler"):
        quantized()[1].with_backend("native")


FORMS = {
    "channels first": (("NCHW", "OIHW", "NCHW"), (2, 16, 9, 9), (24, 16, 3, 3), {}),
    "channels first, depthwise": (
        ("NCHW", "OIHW", "NCHW"), (2, 16, 9, 9), (16, 1, 3, 3), {"feature_group_count": 16}),
    "one axis": (("NHC", "HIO", "NHC"), (2, 21, 16), (5, 16, 24), {"window_strides": (2,)}),
    "one axis, channels first": (("NCH", "OIH", "NCH"), (2, 16, 21), (24, 16, 5), {}),
    "transposed": (
        NHWC, (2, 5, 5, 16), (4, 4, 16, 24), {"lhs_dilation": (2, 2), "padding": ((2, 1), (2, 1))}),
    "cropped": (NHWC, (2, 9, 9, 16), (3, 3, 16, 24), {"padding": ((-1, 0), (2, -2))}),
    "mixed layout": (("HWNC", "OHWI", "CHWN"), (9, 9, 2, 16), (24, 3, 3, 16), {}),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_other_layouts_and_axes_run_natively(form: str):
    """With a residual, in the layout of the model."""
    layout, shape, kernel_shape, options = FORMS[form]
    rng = np.random.default_rng(3)
    given = {"window_strides": (1,) * (len(shape) - 2), "padding": "SAME", **options}
    channel_axis = layout[2].index("C")

    def net(p, x):
        y = lax.conv_general_dilated(x, p["kernel"], dimension_numbers=layout, **given)
        spread = [1] * y.ndim
        spread[channel_axis] = -1
        y = jax.nn.relu(y * p["scale"].reshape(spread) + p["bias"].reshape(spread))
        return y + p["residual"] * jnp.ones_like(y) * jnp.sum(x)

    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    outputs = kernel_shape[layout[1].index("O")]
    params = {
        "kernel": jnp.asarray(rng.normal(size=kernel_shape) / 12, jnp.float32),
        "scale": jnp.asarray(rng.uniform(0.5, 1.5, outputs), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=outputs), jnp.float32),
        "residual": jnp.float32(0.01),
    }
    qparams, qapply = jaxquant.quant_post(
        params, net, [x], algo="abs_max", progress=False, recover=(),
        quantizable_op_type=("conv2d", "depthwise_conv2d", "conv2d_transpose"),
        allow_batch_dependence=True,
    )  # fmt: skip
    native, xla = qapply.with_backend("native"), qapply.with_backend("xla")
    assert len(chains(qapply, x)) == 1
    expected = np.asarray(xla(qparams, x))
    np.testing.assert_allclose(native(qparams, x), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(native(native.prepare(qparams), x), native(qparams, x))
    error = np.asarray(net(params, x)) - expected
    assert np.sum(error**2) < 1e-3 * np.sum(np.asarray(net(params, x)) ** 2)
