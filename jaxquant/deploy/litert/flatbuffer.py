"""The bytes of a `.tflite` file: a graph of tensors and operators as a FlatBuffer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np

from jaxquant._version import __version__
from jaxquant.deploy.litert.graph import Graph, Operator, Tensor
from jaxquant.extras import how_to_install

_IDENTIFIER = b"TFL3"
_VERSION = 3  # of the schema
_PLACEHOLDER = 127  # an operator's old 8-bit code, where its own does not fit
_MAX_BYTES = 2**31 - 1  # what the offsets of a FlatBuffer reach
SIGNATURE = "serving_default"  # the name that runtimes look for where none is given

Offset = int  # of a finished table or vector in the builder


def import_tflite() -> Any:
    """The schema's code, package `tflite`; raises ImportError that names the extra."""
    try:
        return importlib.import_module("tflite")
    except ImportError as error:
        raise ImportError(f"export_litert needs tflite: {how_to_install('litert')}") from error


class _Writer:
    """Writes the schema's tables by their names, the inner ones before those that hold them."""

    def __init__(self) -> None:
        self._schema = import_tflite()
        self.builder = flatbuffers.Builder(1 << 20)

    def number(self, enumeration: str, name: str) -> int:
        """What the schema has for a name, such as Padding's "SAME"."""
        return int(getattr(getattr(self._schema, enumeration), name))

    def table(self, name: str, fields: Mapping[str, Any]) -> Offset:
        """A table of numbers and of what is written before: strings, vectors and other tables."""
        getattr(self._schema, f"{name}Start")(self.builder)
        for field, value in fields.items():
            getattr(self._schema, f"{name}Add{field}")(self.builder, value)
        return int(getattr(self._schema, f"{name}End")(self.builder))

    def text(self, text: str) -> Offset:
        return int(self.builder.CreateString(text))

    def array(self, values: Any, dtype: str) -> Offset:
        """A vector of numbers."""
        return int(self.builder.CreateNumpyVector(np.ascontiguousarray(values, dtype).ravel()))

    def tables(self, offsets: Sequence[Offset]) -> Offset:
        """A vector of tables."""
        self.builder.StartVector(4, len(offsets), 4)
        # A FlatBuffer grows towards its start: the last is written first.
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return int(self.builder.EndVector())


def serialize(
    graph: Graph,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    metadata: Mapping[str, Any],
) -> bytes:
    """The file of a graph.

    Args:
      graph: what to write.
      inputs, outputs: name in the signature -> tensor.
      metadata: plain data that the file carries as JSON, under "jaxquant".

    Raises:
      ValueError: the model is larger than a FlatBuffer may be.
    """
    if sum(t.array.nbytes for t in graph.tensors.values() if t.array is not None) > _MAX_BYTES:
        raise ValueError("the model is larger than the 2 GiB of one .tflite file")
    # Tables refer to what lies behind them, so the file is written from its leaves up.
    writer = _Writer()

    # Operators refer to tensors by their place and not by name.
    places = {name: place for place, name in enumerate(graph.tensors)}
    data = [np.zeros(0, np.uint8)]  # the first buffer is that of tensors without any
    # Filled while operators are written, who share one entry for each operator and version.
    codes: dict[tuple[str, int], int] = {}
    tensors = [_tensor(writer, name, each, data) for name, each in graph.tensors.items()]
    operators = [_operator(writer, each, places, codes) for each in graph.operators]
    subgraph = {
        "Tensors": writer.tables(tensors),
        "Inputs": writer.array([places[name] for name in inputs.values()], "int32"),
        "Outputs": writer.array([places[name] for name in outputs.values()], "int32"),
        "Operators": writer.tables(operators),
        "Name": writer.text("main"),
    }
    signature = {
        "Inputs": _named(writer, inputs, places),
        "Outputs": _named(writer, outputs, places),
        "SignatureKey": writer.text(SIGNATURE),
        "SubgraphIndex": 0,
    }
    note = {"Name": writer.text("jaxquant"), "Buffer": len(data)}
    data.append(np.frombuffer(json.dumps(metadata, sort_keys=True).encode(), np.uint8))
    model = {
        "Version": _VERSION,
        "OperatorCodes": writer.tables([_code(writer, *each) for each in codes]),
        "Subgraphs": writer.tables([writer.table("SubGraph", subgraph)]),
        "Description": writer.text(f"jaxquant {__version__}"),
        "Buffers": writer.tables([_buffer(writer, each) for each in data]),
        "Metadata": writer.tables([writer.table("Metadata", note)]),
        "SignatureDefs": writer.tables([writer.table("SignatureDef", signature)]),
    }
    writer.builder.Finish(writer.table("Model", model), _IDENTIFIER)
    return bytes(writer.builder.Output())


def _tensor(writer: _Writer, name: str, tensor: Tensor, data: list[np.ndarray]) -> Offset:
    """A tensor; its array goes behind those in `data`."""
    fields: dict[str, Any] = {
        "Name": writer.text(name),
        "Type": writer.number("TensorType", tensor.dtype.upper()),
        # 1 for what varies: the interpreter has to begin with some size.
        "Shape": writer.array([d if isinstance(d, int) else 1 for d in tensor.shape], "int32"),
        "HasRank": True,
    }
    # "Shape" is what the interpreter allocates at first, the signature what may be resized.
    if any(isinstance(size, str) for size in tensor.shape):
        sizes = [d if isinstance(d, int) else -1 for d in tensor.shape]
        fields["ShapeSignature"] = writer.array(sizes, "int32")
    # A grid for each channel has as many zero points as scales.
    if tensor.grid is not None:
        grid = {
            "Scale": writer.array(tensor.grid.scale, "float32"),
            "ZeroPoint": writer.array(
                np.full(tensor.grid.scale.shape, tensor.grid.zero_point), "int64"
            ),
            "QuantizedDimension": tensor.grid.axis,
        }
        fields["Quantization"] = writer.table("QuantizationParameters", grid)
    if tensor.array is not None:
        fields["Buffer"] = len(data)
        # By bytes: a buffer has no dtype of its own.
        data.append(np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8))
    return writer.table("Tensor", fields)


def _buffer(writer: _Writer, data: np.ndarray) -> Offset:
    if not data.size:
        return writer.table("Buffer", {})
    # Kernels read weights in place, by words: they lie at multiples of 16 bytes.
    writer.builder.Prep(16, data.size + 4)
    return writer.table("Buffer", {"Data": writer.array(data, "uint8")})


def _operator(
    writer: _Writer,
    operator: Operator,
    places: Mapping[str, int],
    codes: dict[tuple[str, int], int],
) -> Offset:
    fields: dict[str, Any] = {
        "OpcodeIndex": codes.setdefault((operator.op, operator.version), len(codes)),
        "Inputs": writer.array([places[name] for name in operator.inputs], "int32"),
        "Outputs": writer.array([places[name] for name in operator.outputs], "int32"),
    }
    if operator.options:
        # Enumerations are numbers in the file, of one table for each kind of setting.
        numbers: Mapping[str, Callable[[str], int]] = {
            "Padding": lambda name: writer.number("Padding", name),
            "FusedActivationFunction": lambda name: writer.number("ActivationFunctionType", name),
            "InDataType": lambda name: writer.number("TensorType", name.upper()),
            "OutDataType": lambda name: writer.number("TensorType", name.upper()),
            "OutputType": lambda name: writer.number("TensorType", name.upper()),
        }
        options = {
            key: numbers[key](value) if isinstance(value, str) else value
            for key, value in operator.settings.items()
        }
        fields["BuiltinOptions"] = writer.table(operator.options, options)
        fields["BuiltinOptionsType"] = writer.number("BuiltinOptions", operator.options)
    return writer.table("Operator", fields)


def _code(writer: _Writer, op: str, version: int) -> Offset:
    code = writer.number("BuiltinOperator", op)
    # Old readers know this byte alone; new ones take the larger of the two.
    old = min(code, _PLACEHOLDER)
    fields = {"DeprecatedBuiltinCode": old, "BuiltinCode": code, "Version": version}
    return writer.table("OperatorCode", fields)


def _named(writer: _Writer, names: Mapping[str, str], places: Mapping[str, int]) -> Offset:
    """A part of a signature: the tensors by the names that callers use."""
    rows = [
        writer.table("TensorMap", {"Name": text, "TensorIndex": places[tensor]})
        for text, tensor in [(writer.text(name), tensor) for name, tensor in names.items()]
    ]
    return writer.tables(rows)
