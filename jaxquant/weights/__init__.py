"""Quantization of the parameters: int8 weights, scales and epilogues, from params and a plan."""
