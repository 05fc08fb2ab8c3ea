"""StableHLO: portable, with a symbolic batch, the same bits."""

import jax
import pytest

import jaxquant
from tests.deploy.models import SHAPE, same_bits, small
from tests.networks import images


@pytest.mark.parametrize("full", [False, True])
def test_an_exported_program_gives_the_same_bits(full, tmp_path):
    qparams, qapply = small(full)
    jaxquant.export_stablehlo(tmp_path / "m", qparams, qapply)
    exported = jax.export.deserialize(bytearray((tmp_path / "m").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.in_avals[-1].str_short() == "float32[batch,8,8,3]"
    x = images(1, (3, *SHAPE[1:]))
    assert same_bits(exported.call(qparams, x), qapply(qparams, x))


def test_the_program_of_a_loaded_model_is_the_saved_one(tmp_path):
    jaxquant.save_quantized_model(tmp_path / "m", *small())
    jaxquant.export_stablehlo(tmp_path / "a", *small())
    jaxquant.export_stablehlo(tmp_path / "b", *jaxquant.load_quantized_model(tmp_path / "m"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_int8_operations_stay_int8_in_the_program(tmp_path):
    qparams, qapply = small()
    jaxquant.export_stablehlo(tmp_path / "m", qparams, qapply)
    exported = jax.export.deserialize(bytearray((tmp_path / "m").read_bytes()))
    lines = [line for line in exported.mlir_module().splitlines() if "stablehlo.dot" in line]
    assert lines
    assert all("xi8>" in line and "xi32>" in line for line in lines)


def test_one_platform_has_no_form_of_another(tmp_path):
    qparams, qapply = small()
    jaxquant.export_stablehlo(tmp_path / "all", qparams, qapply)
    jaxquant.export_stablehlo(tmp_path / "m", qparams, qapply, platforms="cpu")
    exported = jax.export.deserialize(bytearray((tmp_path / "m").read_bytes()))
    assert exported.platforms == ("cpu",)
    assert (tmp_path / "m").stat().st_size < (tmp_path / "all").stat().st_size
    x = images(1, (3, *SHAPE[1:]))
    assert same_bits(exported.call(qparams, x), qapply(qparams, x))


@pytest.mark.parametrize("platforms", [("gpu",), (), "metal"])
def test_platforms_that_are_none_are_refused(platforms, tmp_path):
    with pytest.raises(ValueError, match="give some of"):
        jaxquant.export_stablehlo(tmp_path / "m", *small(), platforms=platforms)
    assert not (tmp_path / "m").exists()
