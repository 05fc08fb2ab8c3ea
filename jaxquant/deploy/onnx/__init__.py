"""Export to ONNX: the plain-data network becomes a graph of QuantizeLinear and DequantizeLinear."""
