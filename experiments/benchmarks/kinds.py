"""Times one site of every kind and form in int8, by XLA and by the native kernels, against float32.

    python -m experiments.benchmarks.kinds

About five minutes.  What is timed is `qapply` of a model of that one site, so quantizing the input
is part of it.  A ratio above 1 is a form that is better left in float.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxquant
from experiments.benchmarks.interleave import time_in_turn

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")


def conv(layout: tuple[str, str, str] = NHWC, **options: Any) -> Callable[[Any, Any], jax.Array]:
    def apply(kernel: jax.Array, x: jax.Array) -> jax.Array:
        given = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME", **options}
        return lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **given)

    return apply


def attention(scale: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bhqd,bhkd->bhqk", x * scale, x)


# the model, the shape of its parameter, the shape of its input
CASES: dict[str, tuple[Callable[[Any, Any], jax.Array], tuple[int, ...], tuple[int, ...]]] = {
    "3x3": (conv(), (3, 3, 64, 64), (8, 56, 56, 64)),
    "3x3, channels first": (conv(NCHW), (64, 64, 3, 3), (8, 64, 56, 56)),
    "depthwise": (conv(feature_group_count=64), (3, 3, 1, 64), (8, 56, 56, 64)),
    "depthwise, channels first": (
        conv(NCHW, feature_group_count=64), (64, 1, 3, 3), (8, 64, 56, 56)),
    "depthwise, two outputs": (conv(feature_group_count=64), (3, 3, 1, 128), (8, 56, 56, 64)),
    "32 groups": (conv(feature_group_count=32), (3, 3, 4, 128), (8, 56, 56, 128)),
    "4 groups": (conv(feature_group_count=4), (3, 3, 64, 256), (8, 28, 28, 256)),
    "transposed": (
        conv(lhs_dilation=(2, 2), padding=((2, 1), (2, 1))), (4, 4, 64, 64), (8, 28, 28, 64)),
    "dilated": (conv(rhs_dilation=(2, 2)), (3, 3, 128, 128), (8, 28, 28, 128)),
    "one axis": (conv(("NHC", "HIO", "NHC")), (9, 256, 256), (8, 1000, 256)),
    "one axis, depthwise": (
        conv(("NHC", "HIO", "NHC"), feature_group_count=256), (31, 1, 256), (8, 1000, 256)),
    "three axes": (conv(("NDHWC", "DHWIO", "NDHWC")), (3, 3, 3, 32, 32), (2, 16, 28, 28, 32)),
    "one channel in": (conv(), (5, 5, 1, 6), (64, 28, 28, 1)),
    "one channel out": (conv(), (3, 3, 64, 1), (8, 56, 56, 64)),
    "dot": (lambda w, x: x @ w, (768, 3072), (8, 64, 768)),
    "dot, one row": (lambda w, x: x @ w, (768, 3072), (1, 768)),
    "dot of activations": (attention, (64,), (8, 12, 128, 64)),
}  # fmt: skip


def main(rounds: int) -> None:
    print(f"jax {jax.__version__}, {jax.default_backend()}, {rounds} rounds; ratios to float32")
    print(f"{'':28}{'float32 ms':>12}{'XLA':>8}{'native':>8}")
    rng = np.random.default_rng(0)
    for name, (apply_fn, *shapes) in CASES.items():
        params, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
        qparams, qapply = jaxquant.quant_post(
            params, apply_fn, [x], algo="abs_max", recover=(), progress=False,
            quantizable_op_type=("conv2d", "depthwise_conv2d", "conv2d_transpose", "mul", "matmul"),
        )  # fmt: skip
        programs = {
            "float32": functools.partial(jax.jit(apply_fn), params, x),
            "XLA": functools.partial(qapply.with_backend("xla"), qparams, x),
        }
        if qapply.backend.name == "native":
            programs["native"] = functools.partial(qapply, qapply.prepare(qparams), x)
        medians = time_in_turn(programs, rounds)
        base = medians.pop("float32")
        ratios = "".join(f"{median / base:8.2f}" for median in medians.values())
        print(f"{name:28}{base * 1e3:12.2f}{ratios}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
