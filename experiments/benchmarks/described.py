"""Devices that are not here, described to XLA: it compiles for them, and nothing runs.

    v5e, v6e   by name; `pip install libtpu==0.0.42.1`, the version that jax 0.10.2 asks for
    h200       by a `GpuTargetConfig` in text form, `h200.txtpb` beside this file; `pip install
               jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12
               nvidia-cuda-runtime-cu12 nvidia-nvjitlink-cu12`

`.ci/accelerators` makes an environment with both.  A compiler that aborts takes its process along,
so each program is compiled in a process of its own, with `environment()`.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

_TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
_GPUS = {"h200": "h200.txtpb"}
DEVICES = (*_TPUS, *_GPUS)

# XLA writes a number beyond this where it has no estimate of an operation.
_MOST_CYCLES = 10**15


def missing(device: str) -> str | None:
    """What has to be installed to compile for a device; None where it is there."""
    package = "libtpu" if device in _TPUS else "jax_cuda12_plugin"
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package}, which compiles for {device}, is not installed (.ci/accelerators does)"


def compiled(device: str, function: Callable[..., Any], *args: Any) -> str:
    """The optimized program of a function for a device, in HLO's text form.

    Args:
      device: one of `DEVICES`.
      function: what is compiled.
      args: pytrees of arrays, or of shapes and dtypes.
    """
    place = SingleDeviceSharding(_described(device))

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    text: str = jax.jit(function).lower(*jax.tree.map(placed, args)).compile().as_text()
    return text


def cycles(text: str) -> dict[str, int]:
    """A TPU's cycles by XLA's estimate, by kind of operation, without what is inside loops."""
    bodies = {m[1]: m[0] for m in re.finditer(r"^%(\S+) \(.*?\n\}", text, re.S | re.M)}
    total: collections.Counter[str] = collections.Counter()
    for estimate, line in _estimates(text):
        found = re.match(r"\s+(?:ROOT )?%\S+ = (\(?[a-z0-9]+)\[.*? ([a-z\-]+)\(", line)
        if not found:
            continue
        kind = found[2]
        if kind == "fusion":
            called = re.search(r"calls=%(\S+?)[,\s]", line + " ")
            body = bodies.get(called[1], "") if called else ""
            core = "convolution" if " convolution(" in body else "loop"
            kind = f"{core} fusion to {found[1].strip('(')}"
        total[kind] += estimate
    return dict(total)


def largest(text: str, most: int) -> list[tuple[int, str, str]]:
    """The operations with the most of a TPU's cycles: these, types of the result, where it is."""
    found = []
    for estimate, line in _estimates(text):
        result = re.match(r"\s+(?:ROOT )?%\S+ = (.*?) [a-z\-]+\(", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        shapes = ", ".join(re.findall(r"[a-z]+[0-9]*\[[0-9,]*\]", result[1])) if result else ""
        found.append((estimate, shapes, scope[1] if scope else ""))
    return sorted(found, reverse=True)[:most]


def _estimates(text: str) -> Iterator[tuple[int, str]]:
    """(cycles, line) of the operations outside of loops that XLA has an estimate of."""
    for line in text[text.find("ENTRY") :].splitlines():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        if estimate and int(estimate[1]) <= _MOST_CYCLES:
            yield int(estimate[1]), line


def products(text: str) -> dict[str, int]:
    """How many dots and convolutions a compiled program has, by "TYPES in loops" or "outside".

    The types are those of the operands: "int8", or like "bf16/f32".
    """
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
            is_call = "custom-call(" in line and re.search(r"gemm|matmul|cudnn\$conv", line)
            if not found and not is_call:
                continue
            given = found[2] if found else line.split("custom-call(")[1]
            kinds = {types.get(name, "?") for name in re.findall(r"%([\w.\-]+)", given)[:2]}
            kind = "int8" if kinds == {"s8"} else "/".join(sorted(kinds))
            counts[f"{kind} {'in loops' if body in inside else 'outside'}"] += 1
    return dict(sorted(counts.items()))


def kernels(text: str) -> int:
    """How many kernels a GPU starts for a compiled program, without what is inside loops."""
    entry = text[text.find("ENTRY") :]
    started = r"= \S+ (?:fusion|custom-call|copy|transpose|pad|reduce|reduce-window|scatter|sort)\("
    return len(re.findall(started, entry))


def environment() -> dict[str, str]:
    """What the plugins need on a machine without their devices."""
    found = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    found |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    found |= {"CUDA_VISIBLE_DEVICES": "-1"}
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0"]
    if nvidia := importlib.util.find_spec("nvidia"):
        root = pathlib.Path(next(iter(nvidia.submodule_search_locations or ())))
        flags.append(f"--xla_gpu_cuda_data_dir={root / 'cuda_nvcc'}")
    found["XLA_FLAGS"] = " ".join(flags)
    return {**os.environ, **found}


def _described(device: str) -> Any:
    if device in _TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=_TPUS[device]).devices[0]
    import jax._src.xla_bridge as bridge  # it knows the platforms of devices that are there alone

    bridge._discover_and_register_pjrt_plugins()
    known = bridge.canonicalize_platform
    bridge.canonicalize_platform = lambda p: p if p in ("cuda", "tpu") else known(p)
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=device,
        target_config=(pathlib.Path(__file__).parent / _GPUS[device]).read_text(),
        topology="1x1x1",
    )
    return described.devices[0]
