"""The C++ and the Java example for LiteRT: built, run, and compared with Python's LiteRT."""

from pathlib import Path

import numpy as np
import pytest

import jaxquant
from tests.deploy.models import small
from tests.examples.programs import EXAMPLES, answer, build, compile_cpp, image, refusal, tool

pytest.importorskip("tflite", reason="the schema of .tflite files is not installed (tflite)")
litert = pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed (ai-edge-litert)")

FOLDER = EXAMPLES / "litert"


@pytest.fixture(scope="module")
def library() -> Path:
    for name in ("libLiteRt.so", "libLiteRt.dylib"):
        path = Path(litert.__file__).parent / name
        if path.is_file():
            return path
    pytest.skip("this ai-edge-litert carries no library with LiteRT's C interface")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.tflite"
    jaxquant.export_litert(path, *small(), shapes="1, 8, 8, 3", progress=False)
    return path


def of_python(path: Path) -> np.ndarray:
    from tests.deploy.litert.runtime import run

    return run(path, image())[0].ravel()


def test_the_cpp_example_gives_the_bits_of_python(tmp_path, library, model):
    program = tmp_path / "classify"
    compile_cpp(FOLDER / "classify.cc", program, library)
    np.testing.assert_array_equal(
        answer(tmp_path, [program], model, image()), of_python(model), strict=True
    )
    assert "5 values where the model takes 192" in refusal(
        tmp_path, [program], model, np.zeros(5, np.float32)
    )
    assert "missing.tflite" in refusal(tmp_path, [program], tmp_path / "missing.tflite", image())


def test_a_size_that_varies_is_refused(tmp_path, library):
    path, program = tmp_path / "varies.tflite", tmp_path / "classify"
    jaxquant.export_litert(path, *small(), progress=False)
    compile_cpp(FOLDER / "classify.cc", program, library)
    assert "a size that varies" in refusal(tmp_path, [program], path, image())


def test_the_java_example_gives_the_bits_of_python(tmp_path, library, model):
    compiler = Path(tool("javac")).resolve()
    found = sorted((compiler.parents[1] / "include").rglob("jni*.h"))
    if not found:
        pytest.skip("the Java at hand has no jni.h")
    build(compiler, "-Xlint:all", "-Werror", "-d", tmp_path, FOLDER / "Classifier.java")
    headers = [f"-I{path.parent}" for path in found]
    glue, shared = FOLDER / "classifier_jni.cc", tmp_path / "libclassifier.so"
    compile_cpp(glue, shared, library, "-shared", "-fPIC", *headers)
    command = [tool("java"), f"-Djava.library.path={tmp_path}", "-cp", tmp_path, "Classifier"]
    np.testing.assert_array_equal(
        answer(tmp_path, command, model, image()), of_python(model), strict=True
    )
    assert "5 values where the model takes 192" in refusal(
        tmp_path, command, model, np.zeros(5, np.float32)
    )
