r"""Times what the native kernels do against XLA in turns, on this processor or a lesser one.

    python -m experiments.benchmarks.instruction_sets --networks=mobilenet_v1,resnet50 --batches=8,1

First the int8 networks, whole, by both and as `backend="auto"` runs them; then single operations;
then what the kernels do in calibration.  A ratio above 1 is one at which XLA is faster, and "auto"
should not take the native kernels.  Weights are random: no time depends on them.

Another processor is seen with `CPUMASK=avx2 LD_PRELOAD=cpumask.so`, a library that makes CPUID
fault and answers without some features.  A compiler may crash under it, so compile the kernels
beforehand without the mask:

    JAXQUANT_INSTRUCTIONS=AVX2 python -c "from jaxquant import native; print(native.available())"
    CPUMASK=avx2 LD_PRELOAD=cpumask.so python -m experiments.benchmarks.instruction_sets
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from experiments import zoo
from experiments.benchmarks.arguments import network_parser
from experiments.benchmarks.interleave import time_in_turn
from jaxquant import native
from jaxquant.calibration import counting, histogram, kl
from jaxquant.calibration.search import search
from jaxquant.graph.trace import trace
from jaxquant.recover.shift import shift_of
from jaxquant.run.float_forms import evaluate_float

NETWORKS = ("mobilenet_v1", "mobilenet_v2", "resnet50")
NATIVE, XLA, AUTO = "native", "XLA", "auto"
Timed = dict[str, Callable[[], Any]]


def backends(apply_fn: Callable[..., Any], params: Any, x: jax.Array, full: bool = False) -> Timed:
    """The int8 model by every backend, its weights packed where the kernels run."""
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [x[:2]], is_full_quantize=full, recover=(), progress=False
    )
    programs: Timed = {}
    for name, backend in ((NATIVE, "native"), (XLA, "xla"), (AUTO, "auto")):
        chosen = qapply.with_backend(backend)
        arrays = chosen.prepare(qparams)
        programs[name] = functools.partial(jax.jit(chosen), arrays, x)
    return programs


def network(name: str, batch: int) -> Timed:
    module, size = zoo.build(name), zoo.find(name).preprocessing.size
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x[:1])
    return backends(module.apply, variables, x)


def convolution(
    size: int, inputs: int, outputs: int, window: int, groups: int, batch: int
) -> Timed:
    """Two of them, so that one reads what the other gives in int8."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        for name in ("first", "second"):
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    feature_group_count=groups,
                )
            )  # fmt: skip
        return x

    rng = np.random.default_rng(0)
    shapes = {"first": (window, window, inputs // groups, outputs),
              "second": (window, window, outputs // groups, inputs)}  # fmt: skip
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(batch, size, size, inputs)), jnp.float32)
    return backends(apply_fn, params, x)


def dots(rows: int, width: int, hidden: int) -> Timed:
    """A transformer's two dots."""

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    rng = np.random.default_rng(0)
    params = {
        "up": jnp.asarray(rng.normal(size=(width, hidden)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(hidden, width)), jnp.float32),
    }
    return backends(apply_fn, params, jnp.asarray(rng.normal(size=(rows, width)), jnp.float32))


def histograms() -> Timed:
    x = jnp.maximum(jax.random.normal(jax.random.key(0), (8, 56, 56, 144)), 0)
    counts = {
        NATIVE: functools.partial(native.histogram, least_exponent=histogram.MIN_EXPONENT),
        XLA: counting.portable_counts,
    }
    return {name: functools.partial(jax.jit(count), x) for name, count in counts.items()}


def thresholds() -> Timed:
    counts = np.random.default_rng(0).poisson(30 * np.exp(-np.arange(2048) / 400), (100, 2048))
    by_xla = kl._SEARCHES["jaxquant"]
    return {
        NATIVE: lambda: kl.kl_threshold(counts, 1.0),
        XLA: lambda: search(by_xla, counts, 1.0, None),
    }


def comparing() -> Timed:
    y = jax.random.normal(jax.random.key(0), (8, 56, 56, 144))
    y_hat = y + 0.01 * jax.random.normal(jax.random.key(1), y.shape)

    def by_xla(y: jax.Array, y_hat: jax.Array) -> Any:
        off = y - y_hat
        return shift_of(off, jax.nn.relu6(y) - jax.nn.relu6(y_hat), _Last())

    by_native = functools.partial(native.differences, clamp=(0.0, 6.0))
    return {
        NATIVE: functools.partial(jax.jit(by_native), y, y_hat),
        XLA: functools.partial(jax.jit(by_xla), y, y_hat),
    }


def float_depthwise() -> Timed:
    x = jax.random.normal(jax.random.key(0), (8, 56, 56, 96))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 96))

    def model(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=96,
        )  # fmt: skip

    return in_float(model, kernel, x)


class _Last:
    """Channels along the last axis."""

    def sums(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=range(x.ndim - 1))


def float_network(name: str) -> Timed:
    module, size = zoo.build(name), zoo.find(name).preprocessing.size
    x = jnp.zeros((8, size, size, 3))
    return in_float(module.apply, jax.jit(module.init)(jax.random.key(0), x[:1]), x)


def in_float(apply_fn: Callable[..., Any], params: Any, x: jax.Array) -> Timed:
    """The float model as calibration runs it."""
    graph = trace(apply_fn, params, (x,))

    def run(natively: bool, params: Any, x: jax.Array) -> Any:
        env = evaluate_float(graph, params, [x], natively=natively)
        return [env.read(var) for var in graph.output_vars]

    return {
        name: functools.partial(jax.jit(functools.partial(run, natively)), params, x)
        for name, natively in ((NATIVE, True), (XLA, False))
    }


def show(title: str, programs: Timed, rounds: int) -> None:
    medians = time_in_turn(programs, rounds)
    auto = f"{medians[AUTO] / medians[XLA]:14.2f}" if AUTO in medians else ""
    print(f"{title:48}{medians[NATIVE] * 1e3:11.2f}{medians[XLA] * 1e3:11.2f}"
          f"{medians[NATIVE] / medians[XLA]:14.2f}{auto}", flush=True)  # fmt: skip


def main(networks: list[str], batches: list[int], rounds: int) -> None:
    print(f"{native.available().reason}, jax {jax.__version__}, {rounds} rounds")
    print(f"{'':48}{'native ms':>11}{'XLA ms':>11}{'native ÷ XLA':>14}{'auto ÷ XLA':>14}")
    for batch in batches:
        for name in networks:
            show(f"{name}, batch {batch}", network(name, batch), rounds)
        for size, inputs, outputs, window, groups in (
            (56, 64, 64, 3, 1), (14, 256, 1024, 1, 1), (56, 96, 96, 3, 96),
            (14, 512, 512, 3, 32), (28, 120, 120, 1, 3),
        ):  # fmt: skip
            title = f"conv {window}x{window}, {size}x{size}x{inputs}-{outputs}, {groups} groups"
            show(
                f"{title}, {batch}",
                convolution(size, inputs, outputs, window, groups, batch),
                rounds,
            )
        show(f"dots 384-1536-384, {64 * batch} rows", dots(64 * batch, 384, 1536), rounds)
    show("dots 384-1536-384, 1 row", dots(1, 384, 1536), rounds)
    show("histogram", histograms(), rounds)
    show("thresholds of 100 tensors", thresholds(), rounds)
    show("differences", comparing(), rounds)
    show("depthwise 3x3 in float, 56x56x96, batch 8", float_depthwise(), rounds)
    for name in networks:
        show(f"{name} in float, batch 8", float_network(name), rounds)


if __name__ == "__main__":
    parser = network_parser(__doc__, NETWORKS, rounds=9)
    parser.add_argument("--batches", default="8,1")
    given = parser.parse_args()
    main(given.networks, [int(batch) for batch in given.batches.split(",")], given.rounds)
