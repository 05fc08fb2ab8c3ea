"""Times files in turn: ONNX by ONNX Runtime and by OpenVINO, `.tflite` by LiteRT.

    python -m experiments.benchmarks.onnx_files any.onnx vnni.onnx model.tflite

Of `jaxquant.export_onnx(..., processors=)`, for example.  Inputs are noise; a size with a name is
`--batch`.  What is printed is the least processor time, of all threads: other work on the cores
changes it little, where `taskset -c 0` leaves one thread.  To see what another x86 processor does
with the files, hide this one's features:

    gcc -shared -fPIC tests/hide_cpu_features.c -o hide.so
    HIDE_CPU_FEATURES=vnni,avx512 LD_PRELOAD=./hide.so python -m experiments.benchmarks.onnx_files …
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from experiments.litert_runtime import input_shape, interpreter
from experiments.onnx_runtimes import onnxruntime_session, openvino_model

Program = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    programs: dict[str, Program] = {}
    for runtime, load in RUNTIMES.items():
        files = [
            file for file in options.files if (file.suffix == ".tflite") == (runtime == LITERT)
        ]
        if files and importlib.util.find_spec(runtime) is None:
            print(f"{runtime}: not installed")
        elif files:
            programs |= {f"{runtime:14} {file}": load(file, options.batch) for file in files}
    for name, seconds in least_in_turn(programs, options.rounds).items():
        print(f"{name:55} {1e3 * seconds:8.2f} ms", flush=True)


def noise(file: Path, batch: int) -> dict[str, np.ndarray]:
    """An array for each input of a model."""
    rng, arrays = np.random.default_rng(0), {}
    for entry in onnx.load(file).graph.input:
        kind = entry.type.tensor_type
        shape = [size.dim_value or batch for size in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        arrays[entry.name] = rng.normal(size=shape).astype(dtype)
    return arrays


def onnxruntime(file: Path, batch: int) -> Program:
    session, inputs = onnxruntime_session(file), noise(file, batch)
    return lambda: session.run(None, inputs)


def openvino(file: Path, batch: int) -> Program:
    request, inputs = openvino_model(file).create_infer_request(), noise(file, batch)
    return lambda: request.infer(inputs)


def litert(file: Path, batch: int) -> Program:
    run, shape = interpreter(file), input_shape(file)
    x = np.random.default_rng(0).normal(size=(batch, *shape[1:])).astype(np.float32)
    return lambda: run(x)


LITERT = "ai_edge_litert"
RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino, LITERT: litert}


def least_in_turn(programs: dict[str, Program], rounds: int) -> dict[str, float]:
    """The least processor time of each program, in seconds."""
    least = dict.fromkeys(programs, np.inf)
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.process_time()
            program()
            least[name] = min(least[name], time.process_time() - start)
    return least


if __name__ == "__main__":
    main()
