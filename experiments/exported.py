r"""Compares an exported INT8 network with the one in JAX: saved file, ONNX, LiteRT.

  python experiments/exported.py --config=configs/mobilenet_v1.py --config.data_dir=IMAGES

Quantizes the network, saves it and loads it in a fresh process that may import neither Flax nor the
model's code, exports it as ONNX and for LiteRT and runs that.  Prints the file's size against the
float32 parameters, how often each is right, its agreement with `qapply` on the images, the SQNR of
its logits against `qapply`'s, how many of its operations ran on integers by the runtime's own
account, and its time beside `qapply`'s; and first, as a yardstick, how far `qapply` is from itself
where the input differs by a hair.  A runtime that is not installed is left out.  --help lists the
settings; `--processors` is passed on to `jaxquant.export_onnx`.  For LiteRT in int8 throughout:

  --config.target=litert --config.is_full_quantize
"""

import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a clone

import jaxquant
from configs import common
from experiments import program
from experiments.benchmarks.interleave import times_in_turn
from experiments.evaluate import agreement, sqnr_db
from experiments.loader import batches
from experiments.onnx_runtimes import onnxruntime_session, openvino_model
from experiments.settings import Setup, prepare

_LOAD = """
import sys
import numpy as np
for name in ("flax", "experiments"):
    sys.modules[name] = None  # an import of it fails
import jaxquant
qparams, qapply = jaxquant.load_quantized_model(sys.argv[1])
np.save(sys.argv[3], np.asarray(qapply(qparams, np.load(sys.argv[2]))))
"""


class Runtime(NamedTuple):
    """A runtime with the network.

    Attributes:
      run: images to logits.
      integers: how many convolutions and dots it runs on integers, and on floats.
    """

    run: Callable[[np.ndarray], np.ndarray]
    integers: tuple[int, int]


def onnxruntime(path: Path, folder: Path) -> Runtime:
    import onnx

    optimized = folder / "optimized.onnx"
    session = onnxruntime_session(path, optimized=optimized)
    name = session.get_inputs()[0].name
    kinds = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    integers = sum(kinds[kind] for kind in _ORT_INTEGER)
    floats = sum(kinds[kind] for kind in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"))
    return Runtime(lambda x: session.run(None, {name: x})[0], (integers, floats))


def openvino(path: Path, folder: Path) -> Runtime:
    compiled = openvino_model(path)
    precisions: Counter[bool] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
        if info.get("layerType") in ("Convolution", "FullyConnected", "MatMul"):
            precisions[info.get("runtimePrecision") in ("i8", "u8")] += 1
    request = compiled.create_infer_request()
    return Runtime(
        lambda x: np.array(next(iter(request.infer([x]).values()))),
        (precisions[True], precisions[False]),
    )


def litert(path: Path, folder: Path) -> Runtime:
    from experiments.litert_runtime import interpreter, operators

    found = operators(path)
    active = interpreter(path)
    kinds = Counter((op, dtype) for op, dtype in found if op in _LITERT)
    integers = sum(count for (_, dtype), count in kinds.items() if dtype == np.int8)
    return Runtime(active, (integers, sum(kinds.values()) - integers))


_LITERT = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL", "TRANSPOSE_CONV")
_ORT_INTEGER = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat")
RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino, "ai_edge_litert": litert}
OPTIONS = {"onnxruntime": "onnxruntime", "openvino": "any"}


def run(config: ConfigDict, processors: str = "any") -> None:
    setup = prepare(config)
    qparams, qapply = jaxquant.quant_post(
        setup.variables,
        setup.module.apply,
        setup.calibration_batches,
        algo=config.algo,
        is_full_quantize=config.is_full_quantize,
        target=config.target,
        recover=tuple(config.recover),
        progress=config.progress,
    )
    items = list(batches(setup.evaluation, setup.preprocessing, config.batch_size, 2))
    images, labels = [x for x, _ in items], np.concatenate([y for _, y in items])
    prepared = qapply.prepare(qparams)
    model = jax.jit(qapply)
    expected = [np.asarray(model(prepared, x)) for x in images]
    print(f"{config.model}: {len(labels)} images, batch {config.batch_size}")
    print(f"qapply: top-1 {top1(expected, labels):.2f} %")
    nudged = [np.asarray(model(prepared, x)) for x in one_step_off(images, qapply)]
    print(f"qapply where one value of each image is one step off: {compared(expected, nudged)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(saved(folder, qparams, qapply, setup, images[0]))
        programs: dict[str, Callable[[], Any]] = {"qapply": lambda: model(prepared, images[0])}
        for runtime, make in RUNTIMES.items():
            if importlib.util.find_spec(runtime) is None:
                print(f"{runtime}: not installed")
                continue
            path = folder / f"{runtime}.model"
            given = images
            if runtime in OPTIONS:
                form = {"runtime": OPTIONS[runtime], "processors": processors}
                form["progress"] = config.progress
                jaxquant.export_onnx(path, qparams, qapply, channels_first=True, **form)
                given = [_channels_first(x) for x in images]
            else:
                jaxquant.export_litert(path, qparams, qapply, progress=config.progress)
            found = make(path, folder)
            got, first = [found.run(x) for x in given], given[0]
            programs[runtime] = lambda found=found, first=first: found.run(first)
            integers, floats = found.integers
            print(
                f"{runtime}: top-1 {top1(got, labels):.2f} %, {compared(expected, got)}; "
                f"convolutions and dots on integers {integers}, on floats {floats}"
            )
        times = {k: statistics.median(v) for k, v in times_in_turn(programs, 9).items()}
    print(", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items()))


def one_step_off(images: list[np.ndarray], qapply: Any) -> list[np.ndarray]:
    """The images with one value of each a step of the first tensor's grid nearer to 0 (or above).

    What it does to the logits is a yardstick: a difference in rounding anywhere spreads as far.
    """
    rng, step = np.random.default_rng(0), qapply.plan.tensors[0].scale
    changed = [x.copy() for x in images]
    for batch in changed:
        for x in batch:
            values, k = x.reshape(-1), rng.integers(x.size)
            values[k] += -np.sign(values[k]) * step if values[k] else step
    return changed


def saved(folder: Path, qparams: Any, qapply: Any, setup: Setup, images: np.ndarray) -> str:
    """Whether a fresh process gives the same bits, and the size of the file."""
    path, given, result = folder / "model.safetensors", folder / "x.npy", folder / "y.npy"
    jaxquant.save_quantized_model(path, qparams, qapply, progress=setup.progress)
    np.save(given, images)
    subprocess.run([sys.executable, "-c", _LOAD, path, given, result], check=True)
    here = np.asarray(qapply.with_backend("xla")(qparams, images))  # as the saved program runs
    same = np.array_equal(np.load(result), here)
    size = path.stat().st_size / sum(leaf.nbytes for leaf in jax.tree.leaves(setup.variables))
    bits = "the same bits" if same else "OTHER LOGITS"
    return (
        f"saved and loaded in a fresh process: {bits}; the file is {size:.3f} of the float32 bytes"
    )


def compared(expected: list[np.ndarray], got: list[np.ndarray]) -> str:
    logits = np.concatenate(expected), np.concatenate(got)
    return f"agreement with qapply {agreement(*logits):.2f} %, SQNR {sqnr_db(*logits):.1f} dB"


def top1(logits: list[np.ndarray], labels: np.ndarray) -> float:
    """The share of images, in percent, whose label is the largest logit's."""
    return float(100 * np.mean(np.concatenate(logits).argmax(axis=1) == labels))


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


if __name__ == "__main__":
    program.define_config(common.SETTINGS)
    flags.DEFINE_string("processors", "any", "Those that the ONNX files are written for.")
    program.start(lambda: run(program.config(), flags.FLAGS.processors))
