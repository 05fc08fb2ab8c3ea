"""ONNX files on the CPU, by ONNX Runtime and by OpenVINO."""

from collections.abc import Sequence
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
