"""What has an int8 form, and how it meets int8 tensors.

A kind belongs to one behaviour:

    accumulate   int8 operands, int32 accumulator, one multiplier (convolution, dot, sum, average)
    select       the result holds values of the operands: same scale, no arithmetic
                 (max pooling, concatenation)
    layout       likewise, and int8 only where a neighbour is (reshape, transpose, slice, ...)
    compute      float32 arithmetic on dequantized operands, fused (softmax, additions, ...)
    decide       the result is an index or a truth value (argmax, comparisons)
    look up      rows of a weight, by index (embeddings): int8, and dequantized behind the lookup
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxquant.graph import ir, kinds
from jaxquant.graph.composites import PATTERNS

ACCUMULATE, PICK, LAYOUT, COMPUTE, DECIDE, LOOK_UP = (
    "accumulate",
    "pick",
    "layout",
    "compute",
    "decide",
    "look up",
)

# In the order in which the kinds are listed to users.
BY_KIND: Mapping[str, str] = {
    "conv2d": ACCUMULATE,
    "depthwise_conv2d": ACCUMULATE,
    "conv2d_transpose": ACCUMULATE,
    "mul": ACCUMULATE,
    "matmul": ACCUMULATE,
    "mean": ACCUMULATE,
    "bilinear_interp": ACCUMULATE,
    "trilinear_interp": ACCUMULATE,
    "pool2d": ACCUMULATE,  # average pooling; maximum pooling picks, see `behaviour_of`
    kinds.LOOKUP_KIND: LOOK_UP,
    "concat": PICK,
    **dict.fromkeys(kinds.LAYOUT_KINDS, LAYOUT),
    **dict.fromkeys(PATTERNS, COMPUTE),
    **dict.fromkeys(kinds.ELEMENTWISE_KINDS, COMPUTE),
    **dict.fromkeys(kinds.ACTIVATION_KINDS, COMPUTE),
    "argmax": DECIDE,
    **dict.fromkeys(kinds.COMPARISON_KINDS, DECIDE),
}

# Why what else multiplies stays float; the keys are what `jaxquant.graph.kinds.PRODUCTS` tells.
WITHOUT_INT8_FORM: Mapping[str, str] = {
    "sparse": "a product of sparse matrices has no int8 form",
    "linear algebra": "linear algebra has no int8 form",
    "opaque": "what it runs is not known here",
    "fused attention": "a fused attention of cuDNN has no int8 form",
    "fused recurrence": "a recurrent layer of cuDNN has no int8 form",
    "scaled dot": "a dot with scales of its own has no int8 form",
    "Fourier transform": "a Fourier transform has no int8 form",
    "ragged dot": "a ragged dot whose groups are of sums or of batches has no int8 form",
}


def behaviour_of(kind: str, eqn: ir.Equation) -> str:
    """How the equation of a site meets int8 tensors."""
    # One kind of PaddleSlim's, two operations here: only the average has sums.
    if kind == "pool2d" and not eqn.name.endswith("_sum"):
        return PICK
    return BY_KIND[kind]
