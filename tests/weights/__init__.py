"""Tests of the quantization of weights."""
