"""The graph of a model: what `apply_fn` computes, flat, with its sites named.

This package knows JAX and nothing of quantization.
"""
