"""The systems that the latency table compares: each makes a program that runs one network."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from experiments import zoo
from experiments.benchmarks.tuned_float import tuned
from experiments.litert_runtime import interpreter
from experiments.onnx_runtimes import onnxruntime_session, openvino_model, quantize_static

Program = Callable[[], Any]


class Case:
    """One network at one batch size, quantized when a system asks for it.

    Args:
      network: a key of `experiments.zoo.MODELS`.
      batch: the batch size.
      folder: for the files of systems that read such.
      weights: a weight file, or None for the package that carries them.
    """

    def __init__(self, network: str, batch: int, folder: Path, weights: str | None = None):
        self.folder = folder
        self.module, self.variables = zoo.load(network, weights)
        size = zoo.find(network).preprocessing.size
        rng = np.random.default_rng(0)
        self.images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
        self.channels_first = np.ascontiguousarray(self.images.transpose(0, 3, 1, 2))
        self.x = jnp.asarray(self.images)

    @functools.cache  # noqa: B019 - a case lives as long as the process
    def int8(self, is_full_quantize: bool = False) -> tuple[Any, Any]:
        return self._quantized(is_full_quantize=is_full_quantize)

    def _quantized(self, **options: Any) -> tuple[Any, Any]:
        samples = np.random.default_rng(1).normal(size=(4, *self.images.shape[1:]))
        return jaxquant.quant_post(
            self.variables,
            self.module.apply,
            [samples.astype(np.float32)],
            recover=(),
            progress=False,
            **options,
        )

    @functools.cache  # noqa: B019
    def onnx(self, processors: str = "vnni") -> Path:
        """The fully quantized network as we export it, channels first.

        By default with int8 weights, as the other systems quantize them and as OpenVINO needs them
        to run in int8; with "any" so that products do not saturate on processors without VNNI.
        """
        path = self.folder / f"int8-{processors}.onnx"
        jaxquant.export_onnx(
            path, *self.int8(True), channels_first=True, processors=processors, progress=False
        )
        return path

    @functools.cache  # noqa: B019
    def litert(self) -> Path:
        """The network as we export it for LiteRT, in int8 throughout."""
        path = self.folder / "int8.tflite"
        quantized = self._quantized(is_full_quantize=True, target="litert")
        jaxquant.export_litert(path, *quantized, progress=False)
        return path

    @functools.cache  # noqa: B019
    def float_onnx(self) -> Path:
        from experiments.benchmarks.float_onnx import write_float

        path = self.folder / "float.onnx"
        write_float(self.onnx(), path)
        return path

    @functools.cache  # noqa: B019
    def quantized_by_onnxruntime(self) -> Path:
        """The float network as ONNX Runtime's own quantizer makes it int8."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared, path = self.folder / "prepared.onnx", self.folder / "onnxruntime.onnx"
        quant_pre_process(str(self.float_onnx()), str(prepared), skip_symbolic_shape=True)
        quantize_static(prepared, path, [self.channels_first[:1]])
        return path


def jax_float(case: Case) -> Program:
    run = jax.jit(case.module.apply)
    return lambda: run(case.variables, case.x)


def jax_bfloat16(case: Case) -> Program:
    cast = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.bfloat16))
    variables, x = cast(case.variables), case.x.astype(jnp.bfloat16)
    run = jax.jit(case.module.apply)
    return lambda: run(variables, x)


def jax_tuned(case: Case) -> Program:
    run = jax.jit(tuned(case.module.apply, case.variables, case.x))
    return lambda: run(case.variables, case.x)


def ours(
    case: Case, backend: str, prepares: bool = False, is_full: bool = False, closes: bool = False
) -> Program:
    """Our int8 network; it `closes` over its weights as the sessions of other runtimes do."""
    qparams, qapply = case.int8(is_full)
    qapply = qapply.with_backend(backend)
    arrays = qapply.prepare(qparams) if prepares else qparams
    if closes:
        within = jax.jit(functools.partial(qapply, arrays))
        return lambda: within(case.x)
    run = jax.jit(qapply)
    return lambda: run(arrays, case.x)


def onnxruntime(case: Case, path: Path) -> Program:
    session = onnxruntime_session(path)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: case.channels_first})


def openvino(case: Case, path: Path) -> Program:
    request = openvino_model(path, case.channels_first.shape).create_infer_request()
    return lambda: request.infer([case.channels_first])


def litert(case: Case) -> Program:
    run = interpreter(case.litert())
    return lambda: run(case.images)


def qwix(case: Case) -> Program:
    """Post-training int8 with activation scales made in every call, its default."""
    import qwix as peer

    rule = peer.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    module = peer.quantize_model(case.module, peer.PtqProvider([rule]))
    shapes = jax.eval_shape(module.init, jax.random.key(0), case.x)
    given = jax.tree.map(jnp.asarray, case.variables["params"])
    params = peer.quantize_params(given, shapes["params"])
    variables = {**case.variables, "params": params}
    run = jax.jit(module.apply)
    return lambda: run(variables, case.x)


SYSTEMS: dict[str, Callable[[Case], Program]] = {
    "jax-f32": jax_float,
    "jax-bf16": jax_bfloat16,
    "jax-f32-tuned": jax_tuned,
    "jaxquant-xla": functools.partial(ours, backend="xla"),
    "jaxquant-native": functools.partial(ours, backend="native"),
    "jaxquant-prepared": functools.partial(ours, backend="native", prepares=True),
    "jaxquant-prepared-full": functools.partial(
        ours, backend="native", prepares=True, is_full=True
    ),
    "jaxquant-closed": functools.partial(ours, backend="native", prepares=True, closes=True),
    "jaxquant-closed-full": functools.partial(
        ours, backend="native", prepares=True, closes=True, is_full=True
    ),
    "onnxruntime-f32": lambda case: onnxruntime(case, case.float_onnx()),
    "onnxruntime-int8": lambda case: onnxruntime(case, case.quantized_by_onnxruntime()),
    "onnxruntime-exact": lambda case: onnxruntime(case, case.onnx("any")),
    "openvino-f32": lambda case: openvino(case, case.float_onnx()),
    "openvino-int8": lambda case: openvino(case, case.onnx()),
    "litert-int8": litert,
    "qwix-int8": qwix,
}
