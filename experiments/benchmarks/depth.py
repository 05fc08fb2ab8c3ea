"""What depth costs: compiling a scanned transformer, and quantizing one in a Python loop.

    python -m experiments.benchmarks.depth

CPU seconds of this process, of its compiler's threads too; about ten minutes on two cores.
`quantize` is given observations, and does the rest of `quant_post` but for calibration.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxquant
from experiments.models.transformer import Transformer
from experiments.text.quantize import quantized

VOCABULARY, BATCH, LENGTH = 96, 4, 32


def network(layers: int, scanned: bool) -> tuple[Callable[..., jax.Array], Any, np.ndarray]:
    """(apply_fn, params, ids) of a transformer of so many layers with random weights."""
    model = Transformer(VOCABULARY, layers=layers, length=LENGTH, scanned=scanned)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * x.shape[-1] ** -0.5).astype(x.dtype), shapes
    )
    return lambda p, ids: model.apply({"params": p}, ids), params, ids


def cpu_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """To trace and compile it anew."""
    jax.clear_caches()
    start = time.process_time()
    jax.jit(function).lower(*arguments).compile()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 12, 48])
    parser.add_argument("--unrolled", type=int, default=24, help="layers in a Python loop")
    given = parser.parse_args()
    for layers in given.layers:
        apply_fn, params, ids = network(layers, scanned=True)
        found = {"float32": cpu_seconds(apply_fn, params, ids)}
        for mode, qparams, qapply in quantized(apply_fn, params, ids):
            found[mode] = cpu_seconds(qapply, qapply.prepare(qparams), ids)
        print(f"{layers} layers scanned, to compile: ", end="")
        print(", ".join(f"{mode} {seconds:.1f} s" for mode, seconds in found.items()), flush=True)
    apply_fn, params, ids = network(given.unrolled, scanned=False)
    observations = jaxquant.calibrate(params, apply_fn, ids, progress=False)
    start = time.process_time()
    jaxquant.quantize(params, apply_fn, observations, progress=False)
    each = (time.process_time() - start) / given.unrolled
    print(f"quantize, {given.unrolled} layers in a Python loop: {each:.2f} CPU s a layer")


if __name__ == "__main__":
    main()
