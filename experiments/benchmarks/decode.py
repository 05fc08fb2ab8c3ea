"""One step of a decoder of 57.5 M parameters, by weights in float32, in 8 bits and in 4.

    python -m experiments.benchmarks.decode --batch 1 4
    python -m experiments.benchmarks.decode --scanned     the layers a scan, of stacked weights
    python -m experiments.benchmarks.decode --xla         and by XLA without kernels
    python -m experiments.benchmarks.decode --batch 1 --llama-cpp FOLDER     and by llama.cpp
                                            (`llama_cpp.py` says where that is to be had)

Two minutes.  All forms run in turns.  With the time goes the memory of the compiled program: its
arguments (weights and cache among them) and what it needs beside them.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from experiments.accuracy.parallel import usable_cores
from experiments.benchmarks import llama_cpp
from experiments.benchmarks.interleave import print_table, time_in_turn

LAYERS, WIDTH, HIDDEN, VOCABULARY, HEAD = 8, 640, 2560, 8000, 64
MATRICES = {
    "query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "out": (WIDTH, WIDTH),
    "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
}  # fmt: skip
FORMS: dict[str, Callable[..., Any]] = {
    "8 bits": jaxquant.quant_weights,
    "4 bits in groups of 128": functools.partial(
        jaxquant.quant_weights, weight_bits=4, group_size=128
    ),
    "4 bits in groups of 32": functools.partial(
        jaxquant.quant_weights, weight_bits=4, group_size=32
    ),
    "dynamic": jaxquant.quant_dynamic,
}


def make_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], scale: float) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    layers = [
        {name: draw(shape, shape[0] ** -0.5) for name, shape in MATRICES.items()}
        for _ in range(LAYERS)
    ]
    return {"embedding": draw((VOCABULARY, WIDTH), WIDTH**-0.5), "layers": layers}


def normalize(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)


def mix(w: Any, x: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """One layer [B, 1, W] after the tokens whose keys and values [B, T, H, D] are given."""
    y = normalize(x)
    split = (-1, 1, WIDTH // HEAD, HEAD)
    query, key, value = (jnp.reshape(y @ w[n], split) for n in ("query", "key", "value"))
    seen = jnp.concatenate([keys, key], axis=1)
    scores = jnp.einsum("bthd,bshd->bhts", query, seen) / HEAD**0.5
    mixed = jnp.einsum(
        "bhts,bshd->bthd",
        jax.nn.softmax(scores, axis=-1),
        jnp.concatenate([values, value], axis=1),
    )
    x = x + jnp.reshape(mixed, (-1, WIDTH)) @ w["out"]
    y = normalize(x)
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def step(params: Any, ids: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Logits [B, V] of tokens [B] after those whose keys and values [L, B, T, H, D] are given."""
    x = params["embedding"][ids]
    if isinstance(params["layers"], dict):
        x, _ = jax.lax.scan(
            lambda x, layer: (mix(layer[0], x, *layer[1:]), None),
            x,
            (params["layers"], keys, values),
        )
    else:
        for layer, w in enumerate(params["layers"]):
            x = mix(w, x, keys[layer], values[layer])
    return normalize(x) @ params["embedding"].T


def llama_steps(params: Any, folder: Path, context: int) -> dict[str, Callable[[], Any]]:
    """The same by llama.cpp, for each type of its files."""
    library, found = llama_cpp.Library(folder, usable_cores()), {}
    with tempfile.TemporaryDirectory() as files:
        for of_type in llama_cpp.TYPES:
            path = Path(files) / f"{of_type}.gguf"
            llama_cpp.write(path, params, WIDTH // HEAD, of_type)
            found[f"llama.cpp {of_type}"] = library.step(path, context)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scanned", action="store_true", help="the layers are a scan")
    parser.add_argument("--xla", action="store_true", help="the forms without kernels too")
    parser.add_argument("--llama-cpp", type=Path, help="the folder of its library")
    args = parser.parse_args()
    params = make_params()
    others = {}
    if args.llama_cpp is not None:
        others = llama_steps(params, args.llama_cpp, args.context)
    if args.scanned:
        params["layers"] = jax.tree.map(lambda *layers: jnp.stack(layers), *params["layers"])
    for batch in args.batch:
        cache = jnp.full((LAYERS, batch, args.context, WIDTH // HEAD, HEAD), 0.1)
        inputs = (jnp.zeros((batch,), jnp.int32), cache, cache)
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
        models: dict[str, tuple[Any, Any]] = {"float32": (params, step)}
        for name, form in FORMS.items():
            qparams, qapply = models[name] = form(params, step, shapes, progress=False)
            if args.xla:
                models[f"{name}, XLA"] = qparams, qapply.with_backend("xla")
        programs = {}
        for name, (arrays, apply_fn) in models.items():
            compiled = jax.jit(apply_fn).lower(arrays, *inputs).compile()
            memory = compiled.memory_analysis()
            needs = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
            print(f"{name}: {needs[0] / 1e6:.1f} MB of arguments, {needs[1] / 1e6:.1f} MB beside")
            programs[name] = functools.partial(compiled, arrays, *inputs)
        if batch == 1:
            programs |= others
        print_table(f"batch {batch}", time_in_turn(programs, args.rounds))


if __name__ == "__main__":
    main()
