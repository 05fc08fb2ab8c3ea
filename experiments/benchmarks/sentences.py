"""Times MiniLM-L6 in int8 by jaxquant, JAX, ONNX Runtime and OpenVINO, the systems in turn.

    pip install -e ".[experiments,text,onnx]" openvino nncf
    python -m experiments.benchmarks.sentences --shapes 1x16,8x128

Sentences x tokens, none padded.  ONNX Runtime and OpenVINO quantize the float32 network as we write
it to ONNX, by their own tools: dynamic with a scale a channel of the weights; static; NNCF's
transformer preset.  A system that is not installed or fails is left out, and said so.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxquant
from experiments.benchmarks.float_onnx import write_float
from experiments.benchmarks.interleave import print_table, time_in_turn
from experiments.onnx_runtimes import onnxruntime_session, quantize_static
from experiments.text import corpus, minilm
from experiments.text.similarity import batches

Run = Callable[[np.ndarray], Any]
SHAPES = "1x16,8x16,1x128,8x128"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="sentences x tokens, by commas")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    shapes = [tuple(map(int, text.split("x"))) for text in given.shapes.split(",")]
    module, host = minilm.load()
    variables = jax.device_put(host)  # or each call would copy them
    samples = batches(corpus.sentences()[:64], 16)
    with tempfile.TemporaryDirectory() as folder:
        systems = all_systems(module, variables, samples, Path(folder))
        for shape in shapes:
            # Words alone, and all of them different: no token is padding.
            ids = np.random.default_rng(0).integers(2000, 20000, shape).astype(np.int32)
            runs = {name: make(ids) for name, make in systems.items()}
            programs = {name: functools.partial(run, ids) for name, run in runs.items()}
            print_table("x".join(map(str, shape)), time_in_turn(programs, given.rounds))


def all_systems(
    module: Any, variables: Any, samples: Sequence[np.ndarray], folder: Path
) -> dict[str, Callable[[np.ndarray], Run]]:
    """Name -> what makes the system's program for ids of one shape."""
    float_run = jax.jit(functools.partial(module.apply, variables))
    systems: dict[str, Callable[[np.ndarray], Run]] = {"jax-f32": lambda _: float_run}
    for name, (qparams, qapply) in ours(module.apply, variables, samples).items():
        systems[name] = _prepared(qparams, qapply)
    float32 = folder / "float.onnx"
    write_float(_exported(module.apply, variables, samples, folder / "stored.onnx"), float32)
    for name, make in {
        "onnxruntime-f32": lambda: _onnxruntime(float32),
        "onnxruntime-dynamic": lambda: _onnxruntime(_dynamic(float32, folder)),
        "onnxruntime-static": lambda: _onnxruntime(_static(float32, folder, samples)),
        "openvino-int8": lambda: _openvino(float32, samples),
    }.items():
        try:
            run = make()
            run(samples[0])
        except Exception as error:  # whatever another system raises
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            continue
        systems[name] = lambda _, run=run: run
    return systems


def ours(
    apply_fn: Callable[..., jax.Array], params: Any, samples: Sequence[np.ndarray]
) -> dict[str, tuple[Any, jaxquant.QuantizedApply]]:
    """The modes that compute in int8, and the weights alone."""
    return {
        "jaxquant-static": jaxquant.quant_post(params, apply_fn, samples, progress=False),
        "jaxquant-dynamic": jaxquant.quant_dynamic(params, apply_fn, samples, progress=False),
        "jaxquant-weights": jaxquant.quant_weights(
            params, apply_fn, samples[:1], recover=(), progress=False
        ),
    }


def _prepared(qparams: Any, qapply: jaxquant.QuantizedApply) -> Callable[[np.ndarray], Run]:
    def make(ids: np.ndarray) -> Run:
        # Closed over, as the sessions of other runtimes hold theirs.
        return jax.jit(functools.partial(qapply, qapply.prepare(qparams, ids)))

    return make


def _exported(
    apply_fn: Callable[..., jax.Array], params: Any, samples: Sequence[np.ndarray], path: Path
) -> Path:
    """The network with its weights alone in int8, for any number of sentences and tokens."""
    stored = jaxquant.quant_weights(
        params, apply_fn, samples[:1], quantizable_op_type=("mul",), recover=(), progress=False
    )
    jaxquant.export_onnx(path, *stored, shapes="b, t", progress=False)
    return path


def _onnxruntime(path: Path) -> Run:
    session = onnxruntime_session(path)
    (given,) = session.get_inputs()
    return lambda ids: session.run(None, {given.name: ids})


def _dynamic(float32: Path, folder: Path) -> Path:
    from onnxruntime import quantization

    path = folder / "dynamic.onnx"
    quantization.quantize_dynamic(
        str(float32), str(path), per_channel=True, weight_type=quantization.QuantType.QInt8
    )
    return path


def _static(float32: Path, folder: Path, samples: Sequence[np.ndarray]) -> Path:
    path = folder / "static.onnx"
    quantize_static(float32, path, samples, op_types_to_quantize=["MatMul", "Gather"])
    return path


def _openvino(float32: Path, samples: Sequence[np.ndarray]) -> Run:
    import nncf
    import openvino as ov

    from experiments.accuracy.parallel import usable_cores

    core = ov.Core()
    model = nncf.quantize(
        core.read_model(float32), nncf.Dataset(list(samples)), model_type=nncf.ModelType.TRANSFORMER
    )
    config = {"INFERENCE_NUM_THREADS": usable_cores(), "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return lambda ids: request.infer([ids])


if __name__ == "__main__":
    main()
