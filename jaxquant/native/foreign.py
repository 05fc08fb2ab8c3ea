"""The functions of the compiled library, declared once, before anybody has them.

ctypes keeps one object for each function of a library, which all threads share.  Setting its
argument types while another thread calls it gives that call half of both: it fails, or reads
arguments as what they are not.  So nothing but `declare` sets them, and `declare` runs before the
library is handed out.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CONV, DOT, PACK = "jaxquant_conv", "jaxquant_dot", "jaxquant_pack"
SEQUENCE, GROUPS, STORED = "jaxquant_sequence", "jaxquant_groups", "jaxquant_stored"
HISTOGRAM, DIFFERENCES = "jaxquant_histogram", "jaxquant_differences"
FLOAT_DEPTHWISE, ATTENTION = "jaxquant_float_depthwise", "jaxquant_attention"
GELU, LAYER_NORM = "jaxquant_gelu", "jaxquant_layer_norm"
QUANTIZE, QUANTIZE_ROWS = "jaxquant_quantize", "jaxquant_quantize_rows"

# What XLA calls, by its own interface.
HANDLERS = (
    CONV, DOT, GROUPS, SEQUENCE, STORED, PACK, HISTOGRAM, DIFFERENCES, FLOAT_DEPTHWISE,
    ATTENTION, GELU, LAYER_NORM, QUANTIZE, QUANTIZE_ROWS,
)  # fmt: skip

_DOUBLES = np.ctypeslib.ndpointer(np.float64, flags="C_CONTIGUOUS")
# What Python calls: the type of the result and those of the arguments.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "jaxquant_kernels": (ctypes.c_char_p, []),
    "jaxquant_kl_thresholds": (
        None,
        [_DOUBLES] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_double] * 4 + [_DOUBLES],
    ),
}


def declare(library: ctypes.CDLL) -> None:
    """Set the types of all functions of a library that nobody else has yet.

    Raises:
      AttributeError: the library lacks one of them.
    """
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    for name in HANDLERS:
        getattr(library, name)
