"""Times the convolutions of networks by the native kernels, against XLA and the machine's peak.

    python -m experiments.benchmarks.kernels --networks=resnet50,mobilenet_v2

Every distinct layer shape of a network is timed alone, with its epilogue, int8 in and out, against
XLA's int8 and float32 convolutions; and beside them what the cores do at most, int8 products on
registers alone and a copy of memory (which small layers exceed, since caches hold them).  Each call
writes over the result of the one before: a network's memory is not new in each call either.
Results go to `--out` as JSON lines.
"""

import argparse
import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import zoo
from experiments.benchmarks.interleave import time_in_turn
from experiments.benchmarks.peak import Peak
from jaxquant import native

NETWORKS = ("resnet50", "mobilenet_v1", "mobilenet_v2", "efficientnet_lite0")
NHWC = ("NHWC", "HWIO", "NHWC")


class Layer(NamedTuple):
    """x [batch, *size, channels] by kernel; padding as JAX has it."""

    size: tuple[int, int]
    kernel: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    groups: int

    @property
    def channels(self) -> int:
        return self.kernel[2] * self.groups

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        window = f"{self.kernel[0]}x{self.kernel[1]}/{self.stride[0]}"
        return f"{self.size[0]}x{self.size[1]}x{self.channels} {window} to {self.kernel[3]}{groups}"


def layers(network: str) -> dict[Layer, int]:
    """The convolutions of a network, and how often each shape occurs."""
    entry = zoo.find(network)
    module, size = entry.module(), entry.preprocessing.size
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(module.apply)(variables, x)
    return collections.Counter(_convolutions(jaxpr.jaxpr))


def _convolutions(jaxpr: Any) -> list[Layer]:
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            x, kernel = (v.aval.shape for v in eqn.invars)
            params = eqn.params
            found.append(
                Layer(x[1:3], kernel, tuple(params["window_strides"]), tuple(params["padding"]),
                      params["feature_group_count"])
            )  # fmt: skip
        for value in eqn.params.values():
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns"):
                found += _convolutions(body)
    return found


class Work(NamedTuple):
    """The work of a run: multiplications and additions, and bytes read or written at least."""

    operations: float
    bytes: float


def reusing(function: Callable[..., jax.Array], *arguments: Any) -> Callable[[], jax.Array]:
    """The compiled call; each result takes the memory of the one before."""
    compiled = jax.jit(lambda result, *xs: function(*xs), donate_argnums=0, keep_unused=True)
    shape = jax.eval_shape(function, *arguments)
    results = [jnp.zeros(shape.shape, shape.dtype)]

    def run() -> jax.Array:
        results.append(compiled(results.pop(), *arguments))
        return results[0]

    return run


def programs(layer: Layer, batch: int) -> tuple[dict[str, Callable[[], Any]], Work]:
    """What is timed, by name, and the work of one run."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, (batch, *layer.size, layer.channels)), jnp.int8)
    kernel = jnp.asarray(rng.integers(-127, 128, layer.kernel), jnp.int8)
    multiplier = jnp.full(layer.kernel[3], 1e-4, jnp.float32)
    bias = jnp.zeros(layer.kernel[3], jnp.float32)

    def by_native(x: jax.Array, packed: jax.Array) -> jax.Array:
        return native.conv(
            x, packed, multiplier, bias, strides=layer.stride, padding=layer.padding,
            groups=layer.groups, activation=(0.0, 6.0),
            out=native.Requantize(42.5, -128), kernel_shape=layer.kernel,
        )  # fmt: skip

    def by_xla(x: jax.Array, kernel: jax.Array, sums: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, layer.stride, layer.padding, dimension_numbers=NHWC,
            feature_group_count=layer.groups, preferred_element_type=sums,
        )  # fmt: skip

    def xla_int8(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = by_xla(x, kernel, jnp.int32).astype(jnp.float32) * multiplier + bias
        return jnp.clip(jnp.round(jnp.clip(y, 0, 6) * 42.5) - 128, -128, 127).astype(jnp.int8)

    def xla_float(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.clip(by_xla(x, kernel, jnp.float32) * multiplier + bias, 0, 6)

    floats = x.astype(jnp.float32), kernel.astype(jnp.float32)
    packed = native.pack_conv(kernel, layer.groups)
    runs = {
        "XLA float32": reusing(xla_float, *floats),
        "XLA int8": reusing(xla_int8, x, kernel),
        "native int8": reusing(by_native, x, packed),
    }
    out = jax.eval_shape(xla_float, *floats)
    work = Work(2.0 * out.size * np.prod(layer.kernel[:3]), x.size + kernel.size + out.size)
    return runs, work


def main(networks: list[str], batch: int, rounds: int, out: Path | None) -> None:
    print(f"{native.available().reason}, jax {jax.__version__}, batch {batch}, {rounds} rounds")
    records = []
    peak = Peak()
    for network in networks:
        print(f"\n{network}\n{'layer':44}{'times':>6}{'native ms':>11}{'Gop/s':>7}"
              f"{'÷ XLA int8':>12}{'÷ float32':>11}{'of peak':>9}{'of copy':>9}")  # fmt: skip
        total: collections.Counter[str] = collections.Counter()
        for layer, count in layers(network).items():
            runs, work = programs(layer, batch)
            medians = time_in_turn(runs, rounds)
            limits = time_in_turn(peak.programs, rounds)  # apart: a copy empties the caches
            mine = medians["native int8"]
            share, copied = peak.shares(work.operations / mine, work.bytes / mine, limits)
            for name in runs:
                total[name] += medians[name] * count
            total["operations"] += work.operations * count
            total["peak"] += mine * share * count
            total["copied"] += mine * copied * count
            print(f"{layer!s:44}{count:6}{mine * 1e3:11.3f}{work.operations / mine / 1e9:7.0f}"
                  f"{mine / medians['XLA int8']:12.3f}{mine / medians['XLA float32']:11.3f}"
                  f"{share:9.3f}{copied:9.3f}", flush=True)  # fmt: skip
            records.append({"network": network, "layer": str(layer), "count": count,
                            "batch": batch, "seconds": medians | limits, **work._asdict(),
                            "peak_operations": peak.operations,
                            "copied_bytes": peak.bytes})  # fmt: skip
        mine = total["native int8"]
        print(f"{'all convolutions':50}{mine * 1e3:11.3f}{total['operations'] / mine / 1e9:7.0f}"
              f"{mine / total['XLA int8']:12.3f}{mine / total['XLA float32']:11.3f}"
              f"{total['peak'] / mine:9.3f}{total['copied'] / mine:9.3f}")  # fmt: skip
    if out:
        out.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    main(given.networks.split(","), given.batch, given.rounds, given.out)
