"""ONNX files on the CPU, by ONNX Runtime and by OpenVINO."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.accuracy.parallel import usable_cores


def onnxruntime_session(path: Path, *, optimized: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession`.

    Args:
      path: the ONNX file.
      optimized: where to write the graph that is run; None for nowhere.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3  # errors
    # Its idle threads would take the cores from the program that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def input_name(path: Path) -> str:
    """The name of a file's one input."""
    import onnx

    (given,) = onnx.load(path, load_external_data=False).graph.input
    return given.name


def quantize_static(float32: Path, path: Path, samples: Iterable[Any], **options: Any) -> None:
    """Write an int8 file as ONNX Runtime's own quantizer makes it of a float32 one.

    QDQ, uint8 activations, int8 weights with a scale for each channel.

    Args:
      float32: the file, of one input.
      path: where to write.
      samples: arrays to calibrate on.
      options: others of `onnxruntime.quantization.quantize_static`.
    """
    from onnxruntime import quantization

    name, left = input_name(float32), iter(samples)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(({name: x} for x in left), None)

    quantization.quantize_static(
        str(float32),
        str(path),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        **options,
    )


def openvino_model(path: Path, shape: Sequence[int] | None = None) -> Any:
    """An `openvino.CompiledModel`.

    Args:
      path: the ONNX file.
      shape: of the input; None to take any that the file allows.
    """
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    if shape is not None:
        model.reshape(list(shape))
    # On CPUs with bfloat16 the default is to compute in it, and with VNNI dots with uint8 weights
    # quantize their activations on the way, group by group: neither would be float32.
    config = {
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    return core.compile_model(model, "CPU", config)
