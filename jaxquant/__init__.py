"""INT8 post-training quantization of JAX models."""

from jaxquant._version import __version__

__all__ = ["__version__"]
