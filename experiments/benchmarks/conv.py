"""Times int8 convolutions as XLA runs them and in the form that jaxquant chooses, against float32.

    python -m experiments.benchmarks.conv

About a minute.  All forms give the same integers, which is checked.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.interleave import print_table, time_in_turn
from jaxquant.backends.conv import conv as int8_conv
from jaxquant.graph.contraction import build

# batch, height and width, input channels, window, output channels, stride, groups
CASES = {
    "depthwise": (8, 112, 32, 3, 32, 1, 32),
    "depthwise, strided": (8, 56, 144, 3, 144, 2, 144),
    "depthwise 5x5": (8, 14, 480, 5, 480, 1, 480),
    "1x1": (8, 56, 64, 1, 256, 1, 1),
    "1x1, small": (8, 14, 480, 1, 112, 1, 1),
    "1x1, strided": (8, 56, 256, 1, 512, 2, 1),
    "stem 3x3/2": (8, 224, 3, 3, 32, 2, 1),
    "stem 7x7/2": (8, 224, 3, 7, 64, 2, 1),
    "few channels": (32, 32, 16, 3, 16, 1, 1),
    "3x3": (8, 28, 128, 3, 128, 1, 1),
}


def convolution(
    x: jax.Array, kernel: jax.Array, *, stride: int, groups: int, accumulator: type
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        preferred_element_type=accumulator,
    )


def main(rounds: int) -> None:
    rng = np.random.default_rng(0)
    for name, (batch, size, inputs, window, outputs, stride, groups) in CASES.items():
        x = jnp.asarray(rng.integers(-127, 128, (batch, size, size, inputs)), jnp.int8)
        kernel_shape = (window, window, inputs // groups, outputs)
        kernel = jnp.asarray(rng.integers(-127, 128, kernel_shape), jnp.int8)
        xla = functools.partial(convolution, stride=stride, groups=groups, accumulator=jnp.int32)
        f32 = functools.partial(xla, accumulator=jnp.float32)
        (eqn,) = jax.make_jaxpr(xla)(x, kernel).eqns
        contraction = build(eqn.primitive.name, eqn.params, (x.ndim, kernel.ndim))
        chosen = functools.partial(int8_conv, contraction=contraction)
        floats = x.astype(jnp.float32), kernel.astype(jnp.float32)
        programs = {
            "XLA float32": functools.partial(jax.jit(f32).lower(*floats).compile(), *floats),
            "XLA int8": functools.partial(jax.jit(xla).lower(x, kernel).compile(), x, kernel),
            "jaxquant int8": functools.partial(
                jax.jit(chosen).lower(x, kernel).compile(), x, kernel
            ),
        }
        if not jnp.array_equal(programs["XLA int8"](), programs["jaxquant int8"]()):
            raise AssertionError("the forms differ")
        shape = f"{batch}x{size}x{size}x{inputs}, {window}x{window}/{stride} to {outputs}"
        print_table(f"{name}: {shape}, {rounds} rounds", time_in_turn(programs, rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
