"""Times ONNX files in turn, by ONNX Runtime and by OpenVINO.

    python -m experiments.benchmarks.onnx_files any.onnx vnni.onnx

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

from experiments.onnx_runtimes import onnxruntime_session, openvino_model

Program = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    for runtime, load in RUNTIMES.items():
        if importlib.util.find_spec(runtime) is None:
            print(f"{runtime}: not installed")
            continue
        programs = {str(file): load(file, noise(file, options.batch)) for file in options.files}
        for name, seconds in least_in_turn(programs, options.rounds).items():
            print(f"{runtime:12} {name:40} {1e3 * seconds:8.2f} ms", flush=True)


def noise(file: Path, batch: int) -> dict[str, np.ndarray]:
    """An array for each input of a model."""
    rng, arrays = np.random.default_rng(0), {}
    for entry in onnx.load(file).graph.input:
        kind = entry.type.tensor_type
        shape = [size.dim_value or batch for size in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        arrays[entry.name] = rng.normal(size=shape).astype(dtype)
    return arrays


def onnxruntime(file: Path, inputs: dict[str, np.ndarray]) -> Program:
    session = onnxruntime_session(file)
    return lambda: session.run(None, inputs)


def openvino(file: Path, inputs: dict[str, np.ndarray]) -> Program:
    request = openvino_model(file).create_infer_request()
    return lambda: request.infer(inputs)


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino}


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
