"""Float convolutions in the forms that run fastest on CPU.

XLA's depthwise convolution is ten times slower there than a sum of shifted products, its 1x1
convolution slower than a dot (`experiments/benchmarks/latency.py` times whole networks so).  Where
the native kernels run, they take the depthwise convolutions: faster still, and the shifted products
are the longest of a model to compile.  The calibration sweep and the comparison of the float with
the int8 model run the float model this way: the same values but for the order in which a sum is
rounded.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends import operations
from jaxquant.graph import evaluate, ir
from jaxquant.graph.contraction import Axes, Result, Window

_NHWC = (
    Axes(free=(0,), contracted=(3,), window=(1, 2)),
    Axes(free=(3,), contracted=(2,), window=(0, 1)),
    Result(batch=(), free=((0,), (3,)), window=(1, 2)),
)
# A depthwise window of at most this many taps runs as shifted products.
_MAX_TAPS = 64


_Form: TypeAlias = Callable[[evaluate.Environment, ir.Equation], jax.Array]


def fast_convolutions(
    graph: ir.Graph, *, natively: bool = True
) -> dict[int, evaluate.Lowering[evaluate.Environment]]:
    """The convolutions of a graph that have a faster form here, by index; none but on CPU.

    Args:
      graph: the traced model.
      natively: by the native kernels, where they run.
    """
    # Measured on CPU, where XLA's own form of these convolutions is slow.
    if jax.default_backend() != "cpu":
        return {}
    return {
        eqn.index: _lowering(form, eqn)
        for eqn in graph.equations
        if (form := _faster_form(graph, eqn, natively)) is not None
    }


def _lowering(form: _Form, eqn: ir.Equation) -> evaluate.Lowering[evaluate.Environment]:
    return lambda env: {eqn.outputs[0]: form(env, eqn)}


def evaluate_float(
    graph: ir.Graph,
    params: Any,
    inputs: Sequence[Any],
    *,
    known: Mapping[ir.Var, Any] | None = None,
    natively: bool = True,
) -> evaluate.Environment:
    """The values of a float model, with its convolutions in their faster forms.

    Args:
      graph, params, inputs, known: as of `jaxquant.graph.evaluate.evaluate_model`.
      natively: by the native kernels too, where they run.
    """
    forms = fast_convolutions(graph, natively=natively)
    return evaluate.evaluate_model(graph, params, inputs, known=known, forms=forms)


def _faster_form(graph: ir.Graph, eqn: ir.Equation, natively: bool) -> _Form | None:
    contraction = graph.contractions.get(eqn.index)
    # Other layouts would need transposes first; Flax's convolutions have this one.
    if contraction is None or contraction.axes != _NHWC or contraction.window is None:
        return None
    window, kernel, groups = (
        contraction.window,
        graph.shape(eqn.inputs[1]),
        contraction.feature_groups,
    )
    if (
        window.batch_groups != 1
        or {*window.input_dilation} != {1}
        # float32 alone: of bfloat16 the sum would be rounded after each tap.
        or any(graph.dtype(atom) != jnp.float32 for atom in (*eqn.inputs, *eqn.outputs))
    ):
        return None
    # A 1x1 convolution is a dot of pixels, and a small depthwise one a few shifted products: XLA's
    # own convolution on CPU takes several times as long for both.
    unpadded = all(pads == (0, 0) for pads in window.padding)
    if kernel[:2] == (1, 1) and groups == 1 and unpadded:
        return functools.partial(_pointwise, window)
    # A window that is larger than its padded input has no output, and no slices.
    taps, fits = kernel[0] * kernel[1], min(graph.shape(eqn.outputs[0])[1:3]) > 0
    if kernel[2:] == (1, groups) and groups > 1 and taps <= _MAX_TAPS and fits:
        return functools.partial(_native_depthwise if natively else _depthwise, window)
    return None


def _pointwise(window: Window, env: evaluate.Environment, eqn: ir.Equation) -> jax.Array:
    x, kernel = (env.read(atom) for atom in eqn.inputs)
    rows, columns = window.strides
    # A window of one element with strides skips pixels: those that are left make a product.
    contract = (((3,), (0,)), ((), ()))
    precision = eqn.params["precision"]
    return lax.dot_general(x[:, ::rows, ::columns], kernel[0, 0], contract, precision=precision)


def _depthwise(window: Window, env: evaluate.Environment, eqn: ir.Equation) -> jax.Array:
    x, kernel = (env.read(atom) for atom in eqn.inputs)
    return _shifted_products(x, kernel, window)


def _native_depthwise(window: Window, env: evaluate.Environment, eqn: ir.Equation) -> jax.Array:
    operands = [env.read(atom) for atom in eqn.inputs]
    # The batch is that of the arrays: the trace had another one.
    shape = (operands[0].shape[0], *env.graph.shape(eqn.outputs[0])[1:])

    def portable(x: jax.Array, kernel: jax.Array) -> Sequence[jax.Array]:
        return [_shifted_products(x, kernel, window)]

    return operations.depthwise(portable, window, shape, operands)


def _shifted_products(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    config = [(0, 0, 0), *((*pads, 0) for pads in window.padding), (0, 0, 0)]
    # Padded once, so that each tap is a slice without borders.
    x = lax.pad(x, jnp.float32(0), config)
    rows, columns = window.strides
    down, right = window.dilation
    height = x.shape[1] - (kernel.shape[0] - 1) * down
    width = x.shape[2] - (kernel.shape[1] - 1) * right
    # One product for each tap of the window, each of a shifted view of the input.
    terms = [
        x[:, i : i + height : rows, j : j + width : columns] * kernel[i // down, j // right, 0]
        for i in range(0, kernel.shape[0] * down, down)
        for j in range(0, kernel.shape[1] * right, right)
    ]
    return functools.reduce(operator.add, terms)
