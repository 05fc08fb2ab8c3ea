"""IREE compiles exported programs of fixed sizes and gives the same bits, where it is installed.

pip install iree-base-compiler iree-base-runtime
"""

import jax
import numpy as np
import pytest

import jaxquant
from experiments.models.transformer import Transformer
from tests.deploy.models import SHAPE, small
from tests.networks import images, plain_net, plain_params

WHY = "IREE is not installed (iree-base-compiler, iree-base-runtime)"
compiler = pytest.importorskip("iree.compiler", reason=WHY)
runtime = pytest.importorskip("iree.runtime", reason=WHY)

TEXTS = np.arange(64, dtype=np.int32).reshape(4, 16) * 7 % 32


def run(path, qparams, qapply, x):
    """The output of an export for inputs of the shape of `x`, compiled for this processor."""
    jaxquant.export_stablehlo(
        path, qparams, qapply, shapes=", ".join(map(str, x.shape)), progress=False
    )
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
    platform = np.int32(exported.platforms.index("cpu"))
    given = [np.asarray(platform), *(leaves[i] for i in exported.module_kept_var_idx)]
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


def agree(folder, qparams, qapply, x):
    expected = np.asarray(jax.jit(qapply.with_backend("xla"))(qparams, x))
    found = run(folder / "m", qparams, qapply, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
