"""One step of a decoder of 57.5 M parameters, by weights in float32, in 8 bits and in 4.

    python -m experiments.benchmarks.decode --batch 1 4
    python -m experiments.benchmarks.decode --scanned     the layers a scan, of stacked weights
    python -m experiments.benchmarks.decode --xla         and by XLA without kernels
    python -m experiments.benchmarks.decode --batch 1 --llama-cpp FOLDER     and by llama.cpp
                                            (`llama_cpp.py` says where that is to be had)
    python -m experiments.benchmarks.decode --batch 1 --generate 32     32 tokens in a loop, whose
                                            cache has room for `--context`

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


def static(params: Any, decode: Callable[..., Any], shapes: Any, **options: Any) -> tuple[Any, Any]:
    """The form with planned scales, of drawn caches."""
    rng = np.random.default_rng(0)

    def draw(like: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(like.dtype, jnp.integer):
            return rng.integers(VOCABULARY, size=like.shape).astype(like.dtype)
        return rng.standard_normal(like.shape).astype(like.dtype)

    samples = [tuple(draw(each) for each in shapes) for _ in range(4)]
    return jaxquant.quant_post(params, decode, samples, **options)


FORMS: dict[str, Callable[..., Any]] = {
    "8 bits": jaxquant.quant_weights,
    "4 bits in groups of 128": functools.partial(
        jaxquant.quant_weights, weight_bits=4, group_size=128
    ),
    "4 bits in groups of 32": functools.partial(
        jaxquant.quant_weights, weight_bits=4, group_size=32
    ),
    "dynamic": jaxquant.quant_dynamic,
    "static": static,
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


def mix(w: Any, x: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
    """One layer [B, W]; `attend` gives what a query [B, 1, H, D] sees, and takes key and value."""
    y = normalize(x)
    split = (-1, 1, WIDTH // HEAD, HEAD)
    mixed = attend(*(jnp.reshape(y @ w[n], split) for n in ("query", "key", "value")))
    x = x + jnp.reshape(mixed, (-1, WIDTH)) @ w["out"]
    y = normalize(x)
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, shown: jax.Array | None = None
) -> jax.Array:
    scores = jnp.einsum("bthd,bshd->bhts", query, keys) / HEAD**0.5
    scores = scores if shown is None else jnp.where(shown, scores, -1e9)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), values)


def step(params: Any, ids: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Logits [B, V] of tokens [B] after those whose keys and values [L, B, T, H, D] are given."""

    def one(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        w, *before = layer

        def attend(query: jax.Array, *new: jax.Array) -> jax.Array:
            both = zip(before, new, strict=True)
            return attention(query, *(jnp.concatenate(pair, axis=1) for pair in both))

        return mix(w, x, attend), None

    x = params["embedding"][ids]
    if isinstance(params["layers"], dict):
        x, _ = jax.lax.scan(one, x, (params["layers"], keys, values))
    else:
        for layer in zip(params["layers"], keys, values, strict=True):
            x, _ = one(x, layer)
    return normalize(x) @ params["embedding"].T


def generate(params: Any, ids: jax.Array, count: int, room: int) -> jax.Array:
    """The likeliest tokens [count, B] behind tokens [B], in a loop with a cache of so many."""
    empty = jnp.zeros((len(ids), room, WIDTH // HEAD, HEAD))

    def one(place: jax.Array, state: Any) -> Any:
        ids, caches, found = state
        x, after = params["embedding"][ids], []
        for w, cache in zip(params["layers"], caches, strict=True):

            def attend(query: jax.Array, *new: jax.Array, cache: Any = cache) -> jax.Array:
                both = zip(cache, new, strict=True)
                put = jax.lax.dynamic_update_slice_in_dim
                after.append(tuple(put(old, each, place, axis=1) for old, each in both))
                return attention(query, *after[-1], jnp.arange(room) <= place)

            x = mix(w, x, attend)
        ids = jnp.argmax(normalize(x) @ params["embedding"].T, axis=-1)
        return ids, after, found.at[place].set(ids)

    start = ids, [(empty, empty)] * LAYERS, jnp.zeros((count, len(ids)), ids.dtype)
    found: jax.Array = jax.lax.fori_loop(0, count, one, start)[2]
    return found


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
    parser.add_argument("--generate", type=int, default=0, help="tokens, in place of a step")
    parser.add_argument("--xla", action="store_true", help="the forms without kernels too")
    parser.add_argument("--llama-cpp", type=Path, help="the folder of its library")
    args = parser.parse_args()
    if args.generate and (args.scanned or args.llama_cpp is not None):
        parser.error("--generate is for layers that are no scan, and not for llama.cpp")
    params = make_params()
    others = {}
    if args.llama_cpp is not None:
        others = llama_steps(params, args.llama_cpp, args.context)
    if args.scanned:
        params["layers"] = jax.tree.map(lambda *layers: jnp.stack(layers), *params["layers"])
    for batch in args.batch:
        cache = jnp.full((LAYERS, batch, args.context, WIDTH // HEAD, HEAD), 0.1)
        inputs: tuple[jax.Array, ...] = (jnp.zeros((batch,), jnp.int32), cache, cache)
        decode: Callable[..., jax.Array] = step
        if args.generate:
            inputs = inputs[:1]
            decode = functools.partial(generate, count=args.generate, room=args.context)
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
        models: dict[str, tuple[Any, Any]] = {"float32": (params, decode)}
        for name, form in FORMS.items():
            qparams, qapply = models[name] = form(params, decode, shapes, progress=False)
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
