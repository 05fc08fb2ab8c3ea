"""Keywords that a public function does not take: what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jaxquant.errors import nearest

P = ParamSpec("P")
T = TypeVar("T")

_MODEL = "the model is `params` and `apply_fn(params, *inputs)`, no file"
_RUNTIME = "JAX needs none; leave it out"
_DATA = "the data is `ds`, the third argument: the same callable, or any iterable or array"
_SAVING = "call jaxquant.save_quantized_model(path, qparams, qapply) afterwards"
_CACHE = "activations are not stored; calibration_file=PATH keeps the statistics"
_TRAINING = "this library quantizes after training; it does not train"
_PRE = "write it into apply_fn"

# Every parameter of Paddle's PostTrainingQuantization and of PaddleSlim's quant_post_static,
# quant_post_dynamic, quant_post_only_weight, quant_embedding, quant_aware and convert that no
# function here takes under the same name, and what stands for it.
PADDLE: dict[str, str] = {
    "act_preprocess_func": _PRE,
    "act_quantize_func": "pass a jaxquant.Observer as algo",
    "activation_bits": "activations are int8",
    "batch_generator": _DATA + ", which yields batches where batch_size is None",
    "bias_correction": 'recover=("bias_correction",) is the default; recover=() leaves it out',
    "cache_dir": _CACHE,
    "calib_config": _TRAINING,
    "data_loader": _DATA + ", which yields batches where batch_size is None",
    "deploy_backend": "jaxquant.export_onnx(path, qparams, qapply, runtime=...) chooses it",
    "draw_graph": "qapply.report() lists every site",
    "executor": _RUNTIME,
    "feed_list": _MODEL,
    "fetch_list": _MODEL,
    "for_test": _TRAINING,
    "freeze_model": "always done: qparams holds int8 weights",
    "generate_test_model": "qapply is that model: it runs here",
    "is_use_cache_file": _CACHE,
    "learning_rate": 'recover=("adaround", "bias_correction") chooses its own',
    "model_dir": _MODEL,
    "model_filename": _MODEL,
    "model_type": _TRAINING,
    "onnx_format": "call jaxquant.export_onnx(path, qparams, qapply) afterwards",
    "optimize_model": "always done: BatchNorm and scalars are folded",
    "optimizer_func": _TRAINING,
    "params_filename": _MODEL,
    "pattern_ops": "skip=(...), rules=(...) and quantizable_op_type choose the sites",
    "place": _RUNTIME,
    "program": _MODEL,
    "quantize_model_path": _SAVING,
    "return_graph": "the result is (qparams, qapply)",
    "return_program": "the result is (qparams, qapply)",
    "return_scale_dict": "jaxquant.describe(qparams) and qapply.plan hold the scales",
    "round_type": 'recover=("adaround", "bias_correction") for "adaround"; else leave it out',
    "same_scale_tensor_list": "tensors that share a scale are found",
    "sample_generator": _DATA + ", with batch_size=n",
    "save_int8": _SAVING,
    "save_model_dir": _SAVING,
    "save_model_filename": _SAVING,
    "save_params_filename": _SAVING,
    "scale_dict": "calibration finds the scales; calibration_file=PATH keeps what they come from",
    "scope": _RUNTIME,
    "skip_tensor_list": 'skip=("layer/*", ...), by the names of sites or parameters',
    "weight_bits": "weights are int8 here; jaxquant.quant_weights(..., weight_bits=4) has 4 bits",
    "weight_preprocess_func": _PRE,
    "weight_quantize_func": _TRAINING,
}


def named(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which says of a keyword that it does not take what to write instead.

    >>> @named
    ... def quantize(params, *, algo="KL"):
    ...     return algo
    >>> quantize({}, executor=None)
    Traceback (most recent call last):
        ...
    TypeError: quantize() has no argument 'executor' (PaddlePaddle's): JAX needs none; leave it out
    >>> quantize({}, allgo="mse")
    Traceback (most recent call last):
        ...
    TypeError: quantize() has no argument 'allgo'; nearest: algo (of 2)
    """
    # The public signature, with the settings spelled out.
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name in known:
                continue
            told = f"{function.__name__}() has no argument {name!r}"
            # PaddlePaddle's keywords that have another name here, or no meaning.
            if name in PADDLE:
                raise TypeError(f"{told} (PaddlePaddle's): {PADDLE[name]}")
            raise TypeError(told + nearest(name, known, 1))
        return function(*args, **kwargs)

    return checked
