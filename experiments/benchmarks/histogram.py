"""Times ways to count values into 2048 bins, and the streaming histogram that uses one of them.

    python -m experiments.benchmarks.histogram

About two minutes.  All forms run in turn within each round, so that their ratios hold on a busy
machine.  On two CPU cores with jax 0.10.2 one scatter-add takes 3 ns a value when the machine is
quiet; private histograms in the rows of one scatter take 3 times as long, a sort 26 times, one-hot
products 50 (f32) to 150 times (int8).  Four scatters gain at most a fifth, and compile longer.  The
native kernel (extremes and counts, 1.3 ns a value) takes a third of the time of XLA's form.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.interleave import time_in_turn
from jaxquant.backends import operations
from jaxquant.calibration import counting, histogram

BINS = histogram.BINS
SHAPES = ((8, 112, 112, 32), (8, 56, 56, 144))
_BLOCK = 7168  # divides both sizes


def bins_of(x: jax.Array) -> jax.Array:
    return (jnp.abs(x).reshape(-1) * 256.0).astype(jnp.int32)


def scatter(i: jax.Array) -> jax.Array:
    return jnp.zeros(BINS, jnp.uint32).at[i].add(jnp.uint32(1), mode="promise_in_bounds")


def scatter_checked(i: jax.Array) -> jax.Array:
    return jnp.zeros(BINS, jnp.uint32).at[i].add(jnp.uint32(1))


def bincount(i: jax.Array) -> jax.Array:
    return jnp.bincount(i, length=BINS)


def rows(i: jax.Array) -> jax.Array:
    """Eight private histograms in one scatter."""
    row = jnp.arange(8, dtype=jnp.int32)[:, None]
    private = jnp.zeros((8, BINS), jnp.uint32)
    return private.at[row, i.reshape(8, -1)].add(jnp.uint32(1), mode="promise_in_bounds").sum(0)


def parts(i: jax.Array) -> jax.Array:
    """Four private histograms in four scatters."""
    return jnp.stack([scatter(part) for part in jnp.split(i, 4)]).sum(0)


def sort(i: jax.Array) -> jax.Array:
    edges = jnp.arange(BINS + 1, dtype=jnp.int32)
    return jnp.diff(jnp.searchsorted(jnp.sort(i), edges))


def one_hot(dtype: type, accumulator: type) -> Callable[[jax.Array], jax.Array]:
    """A product of one-hot codes of the upper five and the lower six bits of the bin."""

    def count(i: jax.Array) -> jax.Array:
        def block(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            high = (i[:, None] >> 6 == jnp.arange(32, dtype=jnp.int32)).astype(dtype)
            low = (i[:, None] & 63 == jnp.arange(64, dtype=jnp.int32)).astype(dtype)
            product = lax.dot_general(
                high, low, (((0,), (0,)), ((), ())), preferred_element_type=accumulator
            )
            return total + product.astype(jnp.int32), None

        start = jnp.zeros((32, 64), jnp.int32)
        return lax.scan(block, start, i.reshape(-1, _BLOCK))[0].reshape(-1)

    return count


FORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "scatter": scatter,
    "scatter, checked": scatter_checked,
    "bincount": bincount,
    "8 rows, one scatter": rows,
    "4 parts, four scatters": parts,
    "sort": sort,
    "one-hot int8": one_hot(jnp.int8, jnp.int32),
    "one-hot bf16": one_hot(jnp.bfloat16, jnp.float32),
    "one-hot f32": one_hot(jnp.float32, jnp.float32),
}


def main(rounds: int) -> None:
    for shape in SHAPES:
        x = jnp.maximum(jax.random.normal(jax.random.key(0), shape), 0.0)
        programs = {"range only": lambda x: (jnp.min(x), jnp.max(x))}
        programs |= {name: lambda x, f=f: f(bins_of(x)) for name, f in FORMS.items()}
        programs["observe"] = counting.observe
        count = operations.counter(counting.portable_counts, histogram.MIN_EXPONENT)
        programs["observe, natively"] = functools.partial(counting.observe, count=count)
        compiled, compile_s = {}, {}
        for name, f in programs.items():
            start = time.perf_counter()
            compiled[name] = jax.jit(f).lower(x).compile()
            compile_s[name] = time.perf_counter() - start
        counts = {name: compiled[name](x) for name in FORMS}
        for name, got in counts.items():
            if not jnp.array_equal(got.astype(jnp.uint32), counts["scatter"]):
                raise AssertionError(f"{name} counts differently")
        timed = {name: lambda f=f, x=x: f(x) for name, f in compiled.items()}
        medians = time_in_turn(timed, rounds)
        print(f"{'x'.join(map(str, shape))}, {rounds} rounds, {jax.devices()[0].platform}")
        print(f"{'':24}{'ms':>9}{'ns/value':>10}{'ratio':>8}{'compile s':>11}")
        for name, median in medians.items():
            print(
                f"{name:24}{median * 1e3:9.2f}{median / x.size * 1e9:10.2f}"
                f"{median / medians['scatter']:8.2f}{compile_s[name]:11.2f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
