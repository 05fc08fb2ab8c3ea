"""The C++ and the Java example for ONNX Runtime: built, run, and compared with Python's.

PyPI's package has neither headers nor Java classes. Two others carry what ONNX Runtime's own
archives hold: one of npm's the headers with the library that they are for, one of PyPI's the
classes for Java.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxquant
from experiments.weights.fetch import Package, extract
from tests.deploy.models import small
from tests.examples.programs import EXAMPLES, answer, build, compile_cpp, image, refusal, tool

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(sys.platform != "linux", reason="the packages' libraries are Linux's"),
]

FOLDER = EXAMPLES / "onnxruntime"
HEADERS_AND_LIBRARY = Package(
    registry="npm",
    name="com.github.asus4.onnxruntime",
    version="0.4.9",
    archive="com.github.asus4.onnxruntime-0.4.9.tgz",
    sha256="e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d",
)
JAVA = Package(
    registry="pypi",
    name="pyserini",
    version="0.40.0",
    archive="pyserini-0.40.0-py3-none-any.whl",
    sha256="fbda53e84dbded1b120055a900976c37d6a53cc841d518f40e2a8b00e454377f",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    jaxquant.export_onnx(path, *small(), progress=False)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    tool("g++")  # before anything is fetched
    folder = tmp_path_factory.mktemp("program")
    headers = "*/ios-arm64/onnxruntime.framework/Headers/*.h"
    found = extract(HEADERS_AND_LIBRARY, (headers, "*/Linux/x64/libonnxruntime.so"))
    (carried,) = (path for path in found if path.suffix == ".so")
    include = next(path.parent for path in found if path.suffix == ".h")
    library = folder / "libonnxruntime.so"
    library.symlink_to(carried)
    (folder / "libonnxruntime.so.1").symlink_to(carried)  # the name that programs ask for
    compile_cpp(FOLDER / "classify.cc", folder / "classify", library, f"-I{include}")
    return folder / "classify"


def of_python(path: Path) -> np.ndarray:
    from tests.deploy.onnx.runtime import run

    return run(path, image())[0].ravel()


def test_the_cpp_example_gives_the_bits_of_python(tmp_path, program, model):
    np.testing.assert_array_equal(
        answer(tmp_path, [program], model, image()), of_python(model), strict=True
    )
    assert "5 values where the model takes 192" in refusal(
        tmp_path, [program], model, np.zeros(5, np.float32)
    )


def test_the_mobile_format_gives_the_same_bits(tmp_path, program, model):
    copy = tmp_path / "model.onnx"
    copy.write_bytes(model.read_bytes())
    tool_of_onnxruntime = "onnxruntime.tools.convert_onnx_models_to_ort"
    command = [sys.executable, "-m", tool_of_onnxruntime, copy, "--optimization_style", "Fixed"]
    subprocess.run(command, check=True, capture_output=True)
    np.testing.assert_array_equal(
        answer(tmp_path, [program], tmp_path / "model.ort", image()), of_python(model), strict=True
    )


def test_the_java_example_gives_the_bits_of_python(tmp_path, model):
    compiler, java = tool("javac"), tool("java")
    (jar,) = extract(JAVA, ("pyserini/resources/jars/*-fatjar.jar",))
    build(compiler, "-cp", jar, "-d", tmp_path, FOLDER / "Classifier.java")
    command = [java, "-cp", f"{jar}:{tmp_path}", "Classifier"]
    np.testing.assert_array_equal(
        answer(tmp_path, command, model, image()), of_python(model), strict=True
    )
