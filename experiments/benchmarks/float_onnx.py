"""The float32 network behind an exported int8 one: its ONNX graph without the quantization."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


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
            integers, scale, *rest = (arrays[name] for name in inputs)
            arrays[node.output[0]] = _dequantized(integers, scale, rest, axis)
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
    integers: np.ndarray, scale: np.ndarray, zero_point: list[np.ndarray], axis: int
) -> np.ndarray:
    shape = [1] * integers.ndim
    if scale.ndim and scale.size > 1:
        shape[axis] = scale.size
    offset = zero_point[0].reshape(shape if zero_point[0].size > 1 else [1] * integers.ndim) \
        if zero_point else 0  # fmt: skip
    values = integers.astype(np.float32) - np.float32(offset)
    return values * scale.reshape(shape if scale.size > 1 else [1] * integers.ndim)
