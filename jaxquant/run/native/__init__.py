"""Native int8 kernels for CPU, called from XLA: convolution and dot with a fused epilogue."""

from jaxquant.run.native.library import Availability, available, require
from jaxquant.run.native.ops import Requantize, Residual, conv, dot
from jaxquant.run.native.pack import pack_conv, pack_dot

__all__ = [
    "Availability",
    "Requantize",
    "Residual",
    "available",
    "conv",
    "dot",
    "pack_conv",
    "pack_dot",
    "require",
]
