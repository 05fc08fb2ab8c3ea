"""Times depthwise int8 convolution as XLA's convolution and as the taps that jaxquant runs.

    python -m experiments.benchmarks.depthwise

Under a minute.  Both give the same integers, which is checked.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.interleave import print_table, time_in_turn
from jaxquant.run import int8

CASES = (((8, 112, 112, 32), 3, 1), ((8, 56, 56, 144), 3, 2), ((8, 14, 14, 480), 5, 1))


def main(rounds: int) -> None:
    rng = np.random.default_rng(0)
    for shape, size, stride in CASES:
        channels = shape[-1]
        x = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        kernel = jnp.asarray(rng.integers(-127, 128, (size, size, 1, channels)), jnp.int8)

        def xla(
            x: jax.Array,
            kernel: jax.Array,
            stride: int = stride,
            channels: int = channels,
            accumulator: type = jnp.int32,
        ) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=channels,
                preferred_element_type=accumulator,
            )

        params = jax.make_jaxpr(xla)(x, kernel).eqns[0].params
        programs = {
            "XLA int8": jax.jit(xla).lower(x, kernel).compile(),
            "taps int8": jax.jit(lambda x, k, p=params: int8.conv(x, k, p))
            .lower(x, kernel)
            .compile(),
        }
        if not jnp.array_equal(*(f(x, kernel) for f in programs.values())):
            raise AssertionError("the forms differ")
        floats = x.astype(jnp.float32), kernel.astype(jnp.float32)
        f32 = jax.jit(lambda x, k, f=xla: f(x, k, accumulator=jnp.float32)).lower(*floats).compile()
        timed = {"XLA f32": lambda f=f32, a=floats: f(*a)}
        timed |= {name: lambda f=f, a=(x, kernel): f(*a) for name, f in programs.items()}
        title = f"{'x'.join(map(str, shape))}, {size}x{size}/{stride}, {rounds} rounds"
        print_table(title, time_in_turn(timed, rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
