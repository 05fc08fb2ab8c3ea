"""IREE compiles exported programs of fixed sizes and gives the same bits, where it is installed.

pip install iree-base-compiler iree-base-runtime
"""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import lax

import jaxquant
from experiments.models.transformer import Transformer
from tests.deploy.models import SHAPE, small
from tests.networks import images, plain_net, plain_params

WHY = "IREE is not installed (iree-base-compiler, iree-base-runtime)"
compiler = pytest.importorskip("iree.compiler", reason=WHY)
runtime = pytest.importorskip("iree.runtime", reason=WHY)

# What is float at the end has the same bits where both compilers are free to fuse.
pytestmark = pytest.mark.optimized
TEXTS = np.arange(64, dtype=np.int32).reshape(4, 16) * 7 % 32


def run(path, qparams, qapply, x, **options):
    """The output of an export for inputs of the shape of `x`, compiled for this processor."""
    shapes = ", ".join(map(str, x.shape))
    jaxquant.export_stablehlo(path, qparams, qapply, shapes=shapes, progress=False, **options)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    binary = compiler.compile_str(
        exported.mlir_module_serialized,
        input_type="stablehlo",
        target_backends=["llvm-cpu"],
        extra_args=["--iree-llvmcpu-target-cpu=host"],
    )
    context = runtime.SystemContext(config=runtime.Config("local-sync"))
    module = runtime.VmModule.copy_buffer(context.instance, binary)
    context.add_vm_module(module)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((qparams, x))]
    given = [leaves[i] for i in exported.module_kept_var_idx]
    if len(exported.platforms) > 1:
        given.insert(0, np.asarray(exported.platforms.index("cpu"), np.int32))
    return np.asarray(context.modules[module.name]["main"](*given).to_host())


def transformer(quantize, **options):
    """`(qparams, qapply)` of a small transformer, its layers scanned, for `TEXTS`."""
    network = Transformer(32, layers=2, width=32, heads=2, hidden=64, length=16)
    params = network.init(jax.random.key(1), TEXTS)
    given = [TEXTS] if quantize is jaxquant.quant_post else TEXTS
    return quantize(params, network.apply, given, progress=False, **options)


@pytest.mark.parametrize("full", [False, True])
def test_convolutions_give_the_same_bits(full, tmp_path):
    qparams, qapply = small(full)
    x = images(1, (3, *SHAPE[1:]))
    np.testing.assert_array_equal(
        run(tmp_path / "m", qparams, qapply, x), qapply(qparams, x), strict=True
    )


def test_wide_depthwise_convolutions_by_the_form_of_cpus_alone(tmp_path):
    """The form of TPUs, of groups of channels, is more than IREE 3.13 compiles."""

    def apply_fn(p, x):
        y = nn.relu(x @ p["wide"])
        numbers = ("NHWC", "HWIO", "NHWC")
        settings = {"dimension_numbers": numbers, "feature_group_count": 256}
        y = lax.conv_general_dilated(y, p["depthwise"], (2, 2), "SAME", **settings)
        return nn.relu(y) @ p["narrow"]

    sizes = {"wide": (8, 256), "depthwise": (3, 3, 1, 256), "narrow": (256, 5)}
    params = {name: images(n, size) * 0.2 for n, (name, size) in enumerate(sizes.items())}
    x = images(4, (1, 14, 14, 8))
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], progress=False)
    agree(tmp_path, qparams, qapply, x, platforms=("cpu",))


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_transformer_gives_the_same_bits(full, tmp_path):
    qparams, qapply = transformer(jaxquant.quant_post, is_full_quantize=full)
    expected = jax.jit(qapply.with_backend("xla"))(qparams, TEXTS)
    np.testing.assert_array_equal(
        run(tmp_path / "m", qparams, qapply, TEXTS), expected, strict=True
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: jaxquant.quant_dynamic(plain_params(0), plain_net, images(0, SHAPE)),
        lambda: jaxquant.quant_weights(plain_params(0), plain_net, images(0, SHAPE)),
    ],
    ids=["dynamic", "weights"],
)
def test_convolutions_of_other_methods_agree_to_the_rounding_of_floats(make, tmp_path):
    agree(tmp_path, *make(), images(1, (3, *SHAPE[1:])))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "options"),
    [
        (jaxquant.quant_dynamic, {}),
        (jaxquant.quant_weights, {}),
        (jaxquant.quant_weights, {"weight_bits": 4, "group_size": 16}),
    ],
    ids=["dynamic", "weights", "4 bits"],
)
def test_transformers_of_other_methods_agree_to_the_rounding_of_floats(quantize, options, tmp_path):
    agree(tmp_path, *transformer(quantize, **options), TEXTS)


def agree(folder, qparams, qapply, x, **options):
    expected = np.asarray(jax.jit(qapply.with_backend("xla"))(qparams, x))
    found = run(folder / "m", qparams, qapply, x, **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
