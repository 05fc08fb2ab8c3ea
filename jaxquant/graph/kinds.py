"""The kinds of operations, by PaddleSlim's names: what an equation is, not what becomes of it.

Which kinds have an int8 form, and how they meet int8 tensors, says `jaxquant.plan.behaviours`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxquant.graph import ir
from jaxquant.graph.contraction import Contraction, Window

# Convolutions and dots, which are always reported; the interpolations are dots with weights that no
# parameter is in.
WEIGHTED_KINDS = ("conv2d", "depthwise_conv2d", "conv2d_transpose", "mul")
DOT_KINDS = (*WEIGHTED_KINDS, "matmul")
LOOKUP_KIND = "lookup_table"

# Elementwise operations of two tensors, and the activation functions: they belong together, since
# an activation function is one or several elementwise primitives.
ELEMENTWISE_KINDS = ("elementwise_add", "elementwise_sub", "elementwise_mul", "elementwise_div")
ACTIVATION_KINDS = (
    "clip",
    "elu",
    "gelu",
    "hard_sigmoid",
    "hard_swish",
    "leaky_relu",
    "relu",
    "relu6",
    "sigmoid",
    "swish",
    "tanh",
)
# Comparisons of two tensors, which give truth values.
COMPARISON_KINDS = (
    "equal",
    "not_equal",
    "greater_equal",
    "greater_than",
    "less_equal",
    "less_than",
)
# What only rearranges, copies or picks values.
LAYOUT_KINDS = (
    "gather",
    "nearest_interp",
    "pad",
    "reshape",
    "reshape2",
    "slice",
    "squeeze",
    "transpose",
)

# What a kind is in JAX's words, where its name does not say it.
MEANINGS: Mapping[str, str] = {
    "mul": "a dot with a weight (a Dense or Linear layer)",
    "matmul": "a dot of two activations",
    "conv2d": "a convolution, of any number of axes",
    "depthwise_conv2d": "a convolution of each channel by itself",
    "conv2d_transpose": "a transposed convolution",
    "lookup_table": "an embedding",
    "pool2d": "pooling",
}

# What Paddle calls these kinds in its newer or more special operators.
PADDLE_NAMES: Mapping[str, str] = {
    "arg_max": "argmax",
    "arg_min": "argmax",
    "bilinear_interp_v2": "bilinear_interp",
    "conv3d": "conv2d",
    "conv3d_transpose": "conv2d_transpose",
    "depthwise_conv2d_transpose": "conv2d_transpose",
    "expand_v2": "reshape",
    "fc": "mul",
    "flatten": "reshape",
    "flatten2": "reshape",
    "flatten_contiguous_range": "reshape",
    "matmul_v2": "matmul",
    "nearest_interp_v2": "nearest_interp",
    "pad2d": "pad",
    "pad3d": "pad",
    "pool3d": "pool2d",
    "reduce_mean": "mean",
    "silu": "swish",
    "split": "slice",
    "squeeze2": "squeeze",
    "stack": "concat",
    "strided_slice": "slice",
    "transpose2": "transpose",
    "trilinear_interp_v2": "trilinear_interp",
    "unsqueeze": "reshape",
    "unsqueeze2": "reshape",
}

# What else multiplies, or may: primitives that are kinds of their own, and what each belongs to.
# They are reported as the convolutions and dots are, so that no multiplication is out of sight.
# What multiplies elementwise is not among them, nor what holds a body that is searched (scan,
# while, cond, shard_map, ...).
PRODUCTS: Mapping[str, str] = {
    **dict.fromkeys(
        ("bcoo_dot_general", "bcoo_dot_general_sampled", "bcoo_spdot_general", "bcsr_dot_general",
         "coo_matmat", "coo_matvec", "coo_spmm", "coo_spmv", "csr_matmat", "csr_matvec",
         "csr_spmm", "csr_spmv", "spsolve"),
        "sparse",
    ),
    **dict.fromkeys(
        ("cholesky", "cholesky_update", "eig", "eigh", "geqp3", "geqrf", "hessenberg",
         "householder_product", "lu", "ormqr", "qr", "schur", "svd", "symmetric_product",
         "triangular_solve", "tridiagonal", "tridiagonal_solve"),
        "linear algebra",
    ),
    **dict.fromkeys(
        ("buffer_callback", "call_exported", "call_hi_primitive", "call_hi_primitive_linearized",
         "cudnn_fusion", "ffi_call", "fused_call", "io_callback", "mosaic_gpu_p", "mpmd_map",
         "pallas_call", "core_map", "pure_callback", "tpu_custom_call"),
        "opaque",
    ),
    **dict.fromkeys(
        ("dot_product_attention_bwd", "dot_product_attention_bwd_wrapper",
         "dot_product_attention_fp8_bwd", "dot_product_attention_fp8_bwd_wrapper",
         "dot_product_attention_fp8_fwd", "dot_product_attention_fp8_fwd_wrapper",
         "dot_product_attention_fwd", "dot_product_attention_fwd_wrapper"),
        "fused attention",
    ),
    **dict.fromkeys(("rnn_fwd", "rnn_bwd"), "fused recurrence"),
    **dict.fromkeys(("scaled_dot", "scaled_matmul", "scaled_matmul_wrapper"), "scaled dot"),
    "fft": "Fourier transform",
    "ragged_dot_general": "ragged dot",
}  # fmt: skip

_BY_PRIMITIVE = {
    "add": "elementwise_add",
    "add_any": "elementwise_add",
    "sub": "elementwise_sub",
    "mul": "elementwise_mul",
    "div": "elementwise_div",
    "concatenate": "concat",
    "stack": "concat",
    "argmax": "argmax",
    "argmin": "argmax",
    "eq": "equal",
    "ne": "not_equal",
    "ge": "greater_equal",
    "gt": "greater_than",
    "le": "less_equal",
    "lt": "less_than",
    "reduce_window_max": "pool2d",
    "reduce_window_min": "pool2d",
    "reduce_window_sum": "pool2d",
    "reduce_max": "pool2d",
    "reduce_min": "pool2d",
    "transpose": "transpose",
    "reshape": "reshape",
    "expand_dims": "reshape",
    "broadcast_in_dim": "reshape",
    "tile": "reshape",
    "squeeze": "squeeze",
    "slice": "slice",
    "dynamic_slice": "slice",
    "split": "slice",
    "rev": "slice",
    "pad": "pad",
    "gather": "gather",
}


def by_primitive() -> frozenset[str]:
    """The primitives, by name, that have a kind whatever their operands are."""
    return frozenset((*_BY_PRIMITIVE, "reduce_sum"))


RESIZE_CALL = "_resize"  # the name of the call that jax.image.resize makes


def kind_of(graph: ir.Graph, eqn: ir.Equation) -> str:
    """The kind of one equation, "" where it has none; softmax is several equations."""
    if (contraction := graph.contractions.get(eqn.index)) is not None:
        if contraction.window is None:
            return _dot_kind(graph, eqn)
        return _conv_kind(contraction, contraction.window, graph.shape(eqn.inputs[1]))
    if eqn.name in PRODUCTS:
        return eqn.name
    # A sum over all but batch and channels is a global pooling; another one a mean.
    if eqn.name == "reduce_sum":
        rank, axes = len(graph.shape(eqn.inputs[0])), eqn.params["axes"]
        return "pool2d" if rank >= 4 and len(axes) == rank - 2 else "mean"
    if eqn.name == "gather" and RESIZE_CALL in eqn.calls:
        return "nearest_interp"
    return _BY_PRIMITIVE.get(eqn.name, "")


def is_join(eqn: ir.Equation) -> bool:
    """True for an equation that lays several tensors beside each other: their parts stay apart."""
    return eqn.name in ("concatenate", "stack")


def is_layout(kind: str) -> bool:
    """True for a kind that only rearranges, copies or picks values."""
    return kind in LAYOUT_KINDS


def is_lookup(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True where whole rows of a static float matrix are gathered by index: an embedding."""
    if eqn.name != "gather" or not graph.is_static(eqn.inputs[0]) or len(eqn.inputs) != 2:
        return False
    shape, rank = graph.shape(eqn.inputs[0]), len(graph.shape(eqn.outputs[0]))
    numbers, fill = eqn.params["dimension_numbers"], eqn.params["fill_value"]
    return (
        len(shape) == 2
        # NaN is JAX's default; another fill is a value that the table does not have.
        and (fill is None or fill != fill)  # NaN for an index out of range
        and jnp.issubdtype(graph.dtype(eqn.inputs[0]), jnp.floating)
        and tuple(eqn.params["slice_sizes"]) == (1, shape[1])
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.offset_dims) == (rank - 1,)
    )


def _dot_kind(graph: ir.Graph, eqn: ir.Equation) -> str:
    if not any(graph.is_static(x) for x in eqn.inputs[:2]):
        return "matmul"
    if RESIZE_CALL in eqn.calls:
        # `jax.image.resize` of three axes is three dots in one call.
        resized = [k for k in graph.contractions if graph.equations[k].calls == eqn.calls]
        spatial = len(graph.shape(eqn.outputs[0])) - 2
        return "trilinear_interp" if spatial == 3 or len(resized) == 3 else "bilinear_interp"
    return "mul"


def _conv_kind(contraction: Contraction, window: Window, kernel_shape: tuple[int, ...]) -> str:
    if any(d != 1 for d in window.input_dilation):
        return "conv2d_transpose"
    # A kernel with one input channel for each group.
    (inputs,) = contraction.operands[1].contracted
    if window.feature_groups > 1 and kernel_shape[inputs] == 1:
        return "depthwise_conv2d"
    return "conv2d"
