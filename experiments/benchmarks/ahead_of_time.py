"""Compiles int8 models for TPUs and for an NVIDIA GPU, without having one.

    .ci/accelerators                                        # makes an environment for it
    python -m experiments.benchmarks.ahead_of_time v5e      # or v6e, h200
    python -m experiments.benchmarks.ahead_of_time v5e --networks resnet50 --batch 32

XLA compiles for a device that is described to it (`experiments.benchmarks.described`): what comes
of a program there, and whether it compiles, is seen anywhere; nothing runs.  Each program is
compiled in a process of its own.  Weights are random.

Prints, for every network and mode, whether it compiles, how many products of int8 are in bodies of
loops and how many are outside, what products of floats there are, and outside of loops the kernels
of a GPU, or the thousands of a TPU's cycles by XLA's estimate (`--largest=20`: where they are).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from experiments import zoo
from experiments.benchmarks import described, experts
from experiments.models import decoder
from experiments.models.bert import Bert
from experiments.models.tagger import Tagger
from experiments.models.transformer import Transformer

VOCABULARY, BATCH, LENGTH = 96, 8, 64
LOOPS = ("transformer", "lstm_tagger", "decoder", "experts")
IMAGES = ("resnet50", "mobilenet_v1", "mobilenet_v2", "efficientnet_lite0", "googlenet")
NETWORKS = (*LOOPS, *IMAGES, "causal", "encoder", "minilm")
INT8_MODES = ("static", "full", "dynamic", "8-bit weights", "4-bit weights")
# The last two are of a model in bfloat16: quantized, and as it is.
MODES = (*INT8_MODES, "static of bfloat16", "bfloat16")
# A batch of the networks that are measured by their cycles, and how it is sampled in quantization.
IMAGE, SAMPLE = (224, 224, 3), (1, 64, 64, 3)
TOKENS = 128


def network(
    name: str, dtype: Any = jnp.float32
) -> tuple[Callable[..., jax.Array], Any, np.ndarray]:
    """(apply_fn, params, a sample of its inputs) of a network.

    Args:
      name: one of `NETWORKS`.
      dtype: of the arithmetic that a network has whatever its parameters' dtype, which is bfloat16
        in comparisons.
    """
    if name in IMAGES:
        classifier = zoo.build(name).clone(dtype=dtype)
        sample = np.random.default_rng(0).normal(size=SAMPLE).astype(np.float32)
        variables = jax.jit(classifier.init)(jax.random.key(0), sample)
        return classifier.apply, variables, sample
    if name == "causal":
        sizes = {"width": 1024, "heads": 8, "hidden": 4096, "layers": 2, "length": TOKENS}
        causal = Transformer(1000, scanned=False, dtype=dtype, **sizes)
        tokens = np.random.default_rng(0).integers(0, 1000, (1, TOKENS)).astype(np.int32)
        return causal.apply, jax.jit(causal.init)(jax.random.key(0), tokens), tokens
    if name in ("encoder", "minilm"):
        # All layers are of one kind, and each is compiled: two tell as much as six, or as twelve.
        few = {"layers": 2, "vocabulary": 1000}
        wide = {"width": 768, "hidden": 3072} if name == "encoder" else {}
        encoder = Bert(**few, **wide)
        tokens = np.random.default_rng(0).integers(1, 1000, (2, TOKENS)).astype(np.int32)
        return encoder.apply, jax.jit(encoder.init)(jax.random.key(0), tokens), tokens
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    if name == "experts":
        drawn = jax.eval_shape(
            experts.EVERY().init, jax.random.key(0), jnp.zeros((1, experts.WIDTH))
        )
        params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), drawn["params"])
        return lambda p, ids: experts.ragged(p, *_tokens(ids)), params, ids
    if name == "lstm_tagger":
        tagger = Tagger(VOCABULARY, 8, cell="optimized_lstm")
        params = jax.jit(tagger.init)(jax.random.key(0), ids)["params"]
        return lambda p, ids: tagger.apply({"params": p}, ids), params, ids
    model = Transformer(VOCABULARY, length=LENGTH)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    if name == "transformer":
        return lambda p, ids: model.apply({"params": p}, ids), params, ids
    decoding = model.clone(decode=True)
    return (
        lambda p, ids: decoder.generate(decoding, p, ids, LENGTH),
        params,
        ids[:, : LENGTH // 4],
    )


def _tokens(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [T, D] and the experts that they choose, of ids."""
    flat = ids.reshape(-1, 1)
    x = jnp.sin(flat * jnp.arange(1.0, experts.WIDTH + 1))
    return x, (flat + jnp.arange(experts.CHOSEN)) % experts.EXPERTS


def quantized(mode: str, params: Any, apply_fn: Any, ids: np.ndarray) -> tuple[Any, Any]:
    """(qparams, qapply) of a network in a mode."""
    if mode == "dynamic":
        return jaxquant.quant_dynamic(params, apply_fn, ids, progress=False)
    if "weights" in mode:
        bits = int(mode[0])
        group = 32 if bits == 4 else None
        return jaxquant.quant_weights(
            params, apply_fn, ids, weight_bits=bits, group_size=group, recover=(), progress=False
        )
    full = mode == "full"
    return jaxquant.quant_post(
        params, apply_fn, ids, is_full_quantize=full, recover=(), progress=False
    )


def compile_one(device: str, name: str, mode: str, batch: int, most: int = 0) -> dict[str, Any]:
    """What came of one program.

    Args:
      device: one of `described.DEVICES`.
      name, mode: of `NETWORKS` and `MODES`.
      batch: how many samples; 0: as many as it is quantized with.
      most: how many of a TPU's operations to tell, those with the most cycles.

    Returns:
      "products", see `described.products`; "kernels" of a GPU, "cycles" and "largest" of a TPU.
    """
    dtype = jnp.bfloat16 if "bfloat16" in mode else jnp.float32
    function, params, sample = network(name, dtype)
    arrays = jax.tree.map(lambda x: x.astype(dtype), params)
    if mode != "bfloat16":
        arrays, function = quantized(mode, arrays, function, sample)
    shape = (batch or len(sample), *(IMAGE if name in IMAGES else sample.shape[1:]))
    text = described.compiled(device, function, arrays, jax.ShapeDtypeStruct(shape, sample.dtype))
    found: dict[str, Any] = {"products": described.products(text)}
    if device == "h200":
        return {**found, "kernels": described.kernels(text)}
    cycles = sum(described.cycles(text).values())
    return {**found, "cycles": cycles, "largest": described.largest(text, most)}


def apart(device: str, name: str, mode: str, batch: int = 0, most: int = 0) -> dict[str, Any]:
    """`compile_one` in a process of its own; "error", its last line, where it does not compile."""
    command = [sys.executable, "-m", "experiments.benchmarks.ahead_of_time", device]
    command += [f"--batch={batch}", f"--largest={most}", "--one", name, mode]
    done = subprocess.run(command, capture_output=True, text=True, env=described.environment())
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode:
        return {"error": said[-1] if said else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(said[-1])
    return found


def told(found: dict[str, Any]) -> str:
    """What `apart` gives in words."""
    if "error" in found:
        return f"DOES NOT COMPILE: {found['error']}"
    counts = [f"{n} {kind}" for kind, n in found["products"].items()]
    if "kernels" in found:
        return ", ".join([*counts, f"{found['kernels']} kernels"])
    lines = [", ".join([*counts, f"{found['cycles'] / 1000:.0f} thousand cycles"])]
    lines += [f"{cycles:>12}  {shape:40} {scope}" for cycles, shape, scope in found["largest"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=described.DEVICES)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "MODE"), help="in this process")
    parser.add_argument("--networks", nargs="+", default=LOOPS, choices=NETWORKS)
    parser.add_argument("--modes", nargs="+", default=INT8_MODES, choices=MODES)
    parser.add_argument("--batch", type=int, default=0, help="0: as many as it is quantized with")
    parser.add_argument("--largest", type=int, default=0, help="so many of a TPU's operations too")
    given = parser.parse_args()
    if given.one:
        found = compile_one(given.device, *given.one, given.batch, given.largest)
        print(json.dumps(found))
        return
    if reason := described.missing(given.device):
        sys.exit(reason)
    for name in given.networks:
        for mode in given.modes:
            found = apart(given.device, name, mode, given.batch, given.largest)
            print(f"{name:13} {mode:14} {told(found)}", flush=True)


if __name__ == "__main__":
    main()
