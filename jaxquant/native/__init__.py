"""Native kernels for CPU, called from XLA: int8 inference, and what calibration takes long at."""

from jaxquant.native.counting import histogram, histogram_types
from jaxquant.native.differences import difference_types, differences
from jaxquant.native.float_operations import (
    AttentionAxes,
    attention,
    gelu,
    is_few,
    layer_norm,
    quantize,
    quantize_rows,
)
from jaxquant.native.floats import float_depthwise
from jaxquant.native.fused import Call, Requantize, Residual
from jaxquant.native.library import (
    Availability,
    available,
    int8_is_faster,
    is_known,
    require,
    runs_here,
    runs_int8_here,
)
from jaxquant.native.ops import conv, conv_call, dot, dot_by_groups, dot_sums
from jaxquant.native.pack import pack_conv, pack_dot
from jaxquant.native.sequences import Link, sequence
from jaxquant.native.stored import GROUP_STEP, dot_stored
from jaxquant.native.thresholds import Weighing, kl_thresholds
from jaxquant.native.window import output_size

__all__ = [
    "GROUP_STEP",
    "AttentionAxes",
    "Availability",
    "Call",
    "Link",
    "Requantize",
    "Residual",
    "Weighing",
    "attention",
    "available",
    "conv",
    "conv_call",
    "difference_types",
    "differences",
    "dot",
    "dot_by_groups",
    "dot_stored",
    "dot_sums",
    "float_depthwise",
    "gelu",
    "histogram",
    "histogram_types",
    "int8_is_faster",
    "is_few",
    "is_known",
    "kl_thresholds",
    "layer_norm",
    "output_size",
    "pack_conv",
    "pack_dot",
    "quantize",
    "quantize_rows",
    "require",
    "runs_here",
    "runs_int8_here",
    "sequence",
]
