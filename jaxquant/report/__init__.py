"""Reports on a quantized model."""
