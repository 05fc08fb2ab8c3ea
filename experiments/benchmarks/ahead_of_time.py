"""Compiles int8 models with loops for a TPU and for an NVIDIA GPU, without having one.

    pip install libtpu==0.0.42.1    # the version that the installed jax asks for
    python -m experiments.benchmarks.ahead_of_time tpu
    pip install jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12 \
        nvidia-cuda-runtime-cu12 nvidia-nvjitlink-cu12
    python -m experiments.benchmarks.ahead_of_time cuda --target=h200.txtpb

XLA compiles for a device that is described to it: what comes of a program there, and whether it
compiles, is seen anywhere; nothing runs.  A TPU is described by its name; a GPU by XLA's
`GpuTargetConfig` in text form, of which XLA's sources hold some (`xla/backends/gpu/target_config`).
Each program is compiled in a process of its own, since a compiler that aborts takes it along.
Weights are random.  Prints, for every network and mode, whether it compiles, how many products of
int8 are in bodies of loops and how many are outside, and what products of floats there are.
"""

import argparse
import collections
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxquant
from experiments.benchmarks import experts
from experiments.models import decoder
from experiments.models.tagger import Tagger
from experiments.models.transformer import Transformer

VOCABULARY, BATCH, LENGTH = 96, 8, 64
NETWORKS = ("transformer", "lstm_tagger", "decoder", "experts")
MODES = ("static", "full", "dynamic", "8-bit weights", "4-bit weights")
TPU = "v5e:2x2"


def network(name: str) -> tuple[Callable[..., jax.Array], Any, np.ndarray]:
    """(apply_fn, params, ids) of a network with a loop in it, or of experts in a ragged dot."""
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


def device_of(platform: str, target: str) -> Any:
    """The described device."""
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=TPU).devices[0]
    import jax._src.xla_bridge as bridge  # it knows the platforms of devices that are there alone

    bridge._discover_and_register_pjrt_plugins()
    known = bridge.canonicalize_platform
    bridge.canonicalize_platform = lambda p: p if p == "cuda" else known(p)
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name="gpu",
        target_config=pathlib.Path(target).read_text(),
        topology="1x1x1",
    )
    return described.devices[0]


def compile_one(platform: str, target: str, name: str, mode: str) -> str:
    """What came of one program."""
    apply_fn, params, ids = network(name)
    qparams, qapply = quantized(mode, params, apply_fn, ids)
    place = SingleDeviceSharding(device_of(platform, target))

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.asarray(x).dtype, sharding=place)

    lowered = jax.jit(qapply).lower(jax.tree.map(placed, qparams), placed(ids))
    return tell(lowered.compile().as_text())


def tell(text: str) -> str:
    """How many products of a compiled program are of int8, inside of loops and outside."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", text, re.S | re.M))
    inside: set[str] = set()
    waiting = re.findall(r"body=%([\w.\-]+)", text)
    while waiting:
        body = waiting.pop()
        if body not in inside and body in bodies:
            inside.add(body)
            waiting += re.findall(r"(?:calls|to_apply|body)=%([\w.\-]+)", bodies[body])
    counts: collections.Counter[str] = collections.Counter()
    for body, lines in bodies.items():
        types = dict(re.findall(r"%(\S+) = \(?(\w+)\[", lines))
        for line in lines.splitlines():
            found = re.search(r" (dot|convolution)\(([^)]*)\)", line)
            is_call = "custom-call(" in line and re.search("gemm|matmul", line)
            if not found and not is_call:
                continue
            named = re.findall(
                r"%([\w.\-]+)", (found[2] if found else line.split("custom-call(")[1])
            )
            given = {types.get(n, "?") for n in named[:2]}
            kind = "int8" if given == {"s8"} else "/".join(sorted(given))
            counts[f"{kind} {'in loops' if body in inside else 'outside'}"] += 1
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "no products seen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("platform", choices=("tpu", "cuda"))
    parser.add_argument("--target", default="", help="a GpuTargetConfig in text form, for cuda")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "MODE"), help="in this process")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    given = parser.parse_args()
    if given.one:
        print(compile_one(given.platform, given.target, *given.one))
        return
    for name in given.networks:
        for mode in MODES:
            command = [sys.executable, "-m", "experiments.benchmarks.ahead_of_time"]
            command += [given.platform, f"--target={given.target}", "--one", name, mode]
            done = subprocess.run(command, capture_output=True, text=True, env=environment())
            lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
            told = lines[-1] if lines else f"exit status {done.returncode}"
            if done.returncode:
                told = f"DOES NOT COMPILE: {told}"
            print(f"{name:13} {mode:14} {told}", flush=True)


def environment() -> dict[str, str]:
    """What the plugins need on a machine without their devices."""
    found = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    found |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0"]
    if nvidia := importlib.util.find_spec("nvidia"):
        root = pathlib.Path(next(iter(nvidia.submodule_search_locations or ())))
        flags.append(f"--xla_gpu_cuda_data_dir={root / 'cuda_nvcc'}")
    found["XLA_FLAGS"] = " ".join(flags)
    return {**os.environ, **found}


if __name__ == "__main__":
    main()
