"""The float32 network behind an exported int8 one: its ONNX graph without the quantization."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

_NO_ZERO_POINT = np.zeros((), np.int8)


def write_float(quantized: Path, path: Path) -> None:
    """Write an ONNX QDQ model without its QuantizeLinear and DequantizeLinear nodes.

    Activations pass unrounded; what is dequantized of initialisers becomes a float32 initialiser.
    The weights are the rounded ones, which costs the same time as the network's own.
    """
    model = onnx.load(quantized)
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    through: dict[str, str] = {}  # an output -> what stands for it
    nodes = []
    for node in model.graph.node:
        inputs = [through.get(name, name) for name in node.input]
        if node.op_type == "QuantizeLinear":
            through[node.output[0]] = inputs[0]
        elif node.op_type == "DequantizeLinear" and inputs[0] in arrays:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            arrays[node.output[0]] = _dequantized(axis, *(arrays[name] for name in inputs))
        elif node.op_type == "DequantizeLinear":
            through[node.output[0]] = inputs[0]
        else:
            del node.input[:]
            node.input.extend(inputs)
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used
    )
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _dequantized(
    axis: int, integers: np.ndarray, scale: np.ndarray, zero_point: np.ndarray = _NO_ZERO_POINT
) -> np.ndarray:
    along = [-1 if a == axis else 1 for a in range(integers.ndim)]  # one scale, or one a channel
    offset = zero_point.astype(np.float32).reshape(along)
    return (integers.astype(np.float32) - offset) * scale.reshape(along)
