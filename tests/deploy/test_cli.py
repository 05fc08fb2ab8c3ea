"""The command line."""

import json
import subprocess
import sys

import jax
import pytest

import jaxquant
from jaxquant.deploy.cli import main
from tests.deploy.models import same_bits, small, small_file
from tests.networks import images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return small_file(tmp_path_factory.mktemp("model"))


def test_inspect_prints_the_report(saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert str(small()[1].with_backend("auto").report()) in text
    assert "float32[batch, 8, 8, 3]" in text
    assert f"jax {jax.__version__}" in text


def test_inspect_as_json(saved, capsys):
    assert main(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == saved.stat().st_size
    assert found["summary"]["sites_int8"] == 4
    assert {site["name"] for site in found["sites"]} == {"stem", "depthwise", "point", "head"}
    by_name = {array["name"]: array for array in found["arrays"]}
    assert by_name["params/head/kernel/int8"]["dtype"] == "int8"
    assert all({"scale", "zero_point"} <= set(tensor) for tensor in found["tensors"])


def test_compare(saved, tmp_path, capsys):
    assert main(["compare", str(saved), str(saved)]) == 0
    assert "the same" in capsys.readouterr().out
    other = small_file(tmp_path, seed=1)
    assert main(["compare", str(saved), str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False
    assert found["sites"] == found["settings"] == {}
    assert "elements, by" in found["arrays"]["params/stem/kernel/int8"]
    assert main(["compare", str(saved), str(other)]) == 1
    assert "scale" in capsys.readouterr().out


def test_convert_to_stablehlo(saved, tmp_path, capsys):
    output = tmp_path / "model.jaxexport"
    assert main(["convert", str(saved), str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == output.stat().st_size
    exported = jax.export.deserialize(bytearray(output.read_bytes()))
    x, (qparams, qapply) = images(3, (2, 8, 8, 3)), small()
    assert same_bits(exported.call(qparams, x), qapply(qparams, x))


def test_convert_to_onnx(saved, tmp_path):
    onnx = pytest.importorskip("onnx")
    output = tmp_path / "model.onnx"
    options = ["--channels-first", "--opset", "18", "--processors", "vnni"]
    assert main(["convert", str(saved), str(output), *options]) == 0
    model = onnx.load(output)
    assert model.opset_import[0].version == 18
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in sizes] == ["batch", 3, 8, 8]
    types = {array.data_type for array in model.graph.initializer if array.dims}
    assert onnx.TensorProto.INT8 in types
    assert onnx.TensorProto.UINT8 not in types


def test_convert_to_stablehlo_for_some_platforms(saved, tmp_path):
    output = tmp_path / "m.jaxexport"
    assert main(["convert", str(saved), str(output), "--platforms", "tpu", "cpu"]) == 0
    exported = jax.export.deserialize(bytearray(output.read_bytes()))
    assert exported.platforms == ("cpu", "tpu")


def test_convert_by_the_suffix_of_the_file(saved, tmp_path, capsys):
    pytest.importorskip("tflite")
    output = tmp_path / "m.tflite"
    assert main(["convert", str(saved), str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "litert"
    assert output.read_bytes()[4:8] == b"TFL3"
    assert main(["convert", str(saved), str(tmp_path / "m.txt")]) == 2
    assert "a suffix of .tflite, .onnx, .jaxexport" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "batch"), [("1, 8, 8, 3", 1), ("n, 8, 8, 3", "n")])
@pytest.mark.parametrize("to", ["onnx", "stablehlo"])
def test_convert_for_other_shapes_than_the_model_was_saved_for(to, shape, batch, saved, tmp_path):
    onnx = pytest.importorskip("onnx")
    output = tmp_path / "model"
    assert main(["convert", str(saved), str(output), "--to", to, "--shapes", shape]) == 0
    if to == "onnx":
        size = onnx.load(output).graph.input[0].type.tensor_type.shape.dim[0]
        assert (size.dim_param or size.dim_value) == batch
    else:
        exported = jax.export.deserialize(bytearray(output.read_bytes()))
        assert str(exported.in_avals[-1].shape[0]) == str(batch)


def test_shapes_that_the_model_does_not_take_are_refused(saved, tmp_path, capsys):
    convert = ["convert", str(saved), str(tmp_path / "m.jaxexport"), "--shapes"]
    assert main([*convert, "1, 8, 8"]) == 2
    assert "gives 3 sizes for an array of shape (4, 8, 8, 3)" in capsys.readouterr().err
    assert main([*convert, "1, 8, 8, 5"]) == 2
    assert "the size 5 is not 3" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_refused_files_give_exit_status_2(saved, tmp_path, capsys):
    (tmp_path / "bad").write_bytes(saved.read_bytes()[:-1])
    for arguments in (
        ["inspect", str(tmp_path / "bad")],
        ["inspect", str(tmp_path / "missing")],
        ["compare", str(saved), str(tmp_path / "bad")],
        ["convert", str(tmp_path / "bad"), "--to", "onnx"],
        ["convert", str(saved), str(saved), "--to", "stablehlo"],
        ["convert", str(saved), str(tmp_path / "no" / "folder.onnx")],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"jaxquant {arguments[0]}: ")
    jaxquant.load_quantized_model(saved)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "m.onnx", "SAVED"], "is it convert SAVED m.onnx?"),
        (["convert", "SAVED", "folder"], "give the file to write, such as folder"),
        (["convert", "SAVED", "SAVED"], "the format of SAVED is not known"),
        (["convert", "missing", "m.onnx"], "there is no file 'missing'"),
        pytest.param(
            ["convert", "SAVED", "/proc/m.ONNX"],
            "/proc/m.ONNX cannot be written",
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc"),
        ),
        (["inspect", "folder"], "give the file of a saved model, such as folder"),
        (["compare", "SAVED", "missing"], "there is no file 'missing'"),
    ],
)
def test_mixed_up_files_are_told(arguments, said, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "m.safetensors").touch()
    assert main([str(saved) if x == "SAVED" else x for x in arguments]) == 2
    assert said.replace("SAVED", str(saved)) in capsys.readouterr().err


def test_a_suffix_in_capitals(saved, tmp_path):
    assert main(["convert", str(saved), str(tmp_path / "M.ONNX")]) == 0
    assert (tmp_path / "M.ONNX").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m.tflite", "--opset", "17"], "--opset is an option of onnx, and this writes litert"),
        (["m.onnx", "--channels-last"], "--channels-last is an option of litert"),
        (["m.jaxexport", "--channels-first"], "--channels-first is an option of onnx"),
        (["m.onnx", "--platforms", "cpu"], "--platforms is an option of stablehlo"),
        (["m.onnx", "--to", "litert"], "has the suffix of onnx, and --to litert is another"),
    ],
)
def test_options_of_another_format_are_refused(arguments, said, saved, tmp_path, capsys):
    name, *options = arguments
    assert main(["convert", str(saved), str(tmp_path / name), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_help_teaches(capsys):
    for arguments in (["--help"], ["inspect", "--help"], ["compare", "--help"], ["convert", "-h"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "exit status" in (text := capsys.readouterr().out) or "examples" in text


def test_it_runs_as_a_module(saved):
    command = [sys.executable, "-m", "jaxquant", "inspect", str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4 sites int8" in done.stdout
