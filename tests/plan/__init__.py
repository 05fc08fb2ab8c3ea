"""Tests of the plan, and the quantized models that tests of full quantization share."""
