"""Counts the buffers between the operations of a compiled network, by element type.

    python -m experiments.benchmarks.int8_coverage mobilenet_v2 --batch 1

Of the float32 model, the int8 model by default, and the int8 model under full quantization: how
many s8, s32 and f32 intermediate buffers the compiled program writes and their bytes, at the
network's own image size with random weights.  What a fusion keeps inside is not written and not
counted; neither are parameters, constants and the program's outputs.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
# These write nothing of their own: they name, regroup or view other buffers.
_VIEWS = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast"})
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*?)(?:\s|\))([a-z][\w-]*)\(")
_SHAPE = re.compile(r"\b(" + "|".join(BYTES) + r")\[([0-9,]*)\]")
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array that an instruction of the entry computation writes.

    `source` is the path of the operation that it was compiled from.
    """

    name: str
    operation: str
    dtype: str
    shape: tuple[int, ...]
    source: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * BYTES[self.dtype]


def intermediate_buffers(compiled: str) -> list[Buffer]:
    """The buffers of a program, given as the text of its compiled HLO, that are not its outputs."""
    return list(_buffers(_follow(compiled.splitlines())))


def _follow(lines: Sequence[str]) -> list[str]:
    """The entry computation, and in the place of a call the computation that it calls."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if line.rstrip().endswith("{") and "->" in line:
            name = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
            bodies[name] = []
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies[name].append(line)

    def expand(body: str, top: bool) -> list[str]:
        found = []
        for line in bodies[body]:
            called = re.search(r"\bcall\(.*to_apply=%?([\w.-]+)", line)
            if called:
                found += expand(called[1], top and "ROOT " in line)
            else:
                found.append(line if top else line.replace("ROOT ", ""))
        return found

    return expand("ENTRY", True)


def _buffers(lines: Sequence[str]) -> Iterator[Buffer]:
    parsed = [(match, line) for line in lines if (match := _INSTRUCTION.match(line))]
    outputs = set()
    for match, line in parsed:
        if match[1]:
            outputs.add(match[2])
            if match[4] == "tuple":
                outputs.update(re.findall(r"%([\w.-]+)", line.partition("tuple(")[2]))
    for match, line in parsed:
        if match[2] in outputs or match[4] in _VIEWS:
            continue
        source = _SOURCE.search(line)
        for dtype, sizes in _SHAPE.findall(match[3]):
            shape = tuple(int(size) for size in sizes.split(",") if size)
            yield Buffer(match[2], match[4], dtype, shape, source[1] if source else "")


def compiled_text(function: Callable[..., Any], *args: Any) -> str:
    """The HLO of a function as it runs."""
    return str(jax.jit(function).lower(*args).compile().as_text())


def totals(buffers: Sequence[Buffer], at_least: int = 2) -> dict[str, tuple[int, int]]:
    """dtype -> (buffers, bytes), of the buffers with so many elements."""
    found: dict[str, tuple[int, int]] = dict.fromkeys(("s8", "s32", "f32"), (0, 0))
    for buffer in buffers:
        if buffer.size >= at_least:
            count, size = found.get(buffer.dtype, (0, 0))
            found[buffer.dtype] = count + 1, size + buffer.bytes
    return found


def main() -> None:
    import jaxquant
    from experiments import zoo

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=zoo.MODELS)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    entry = zoo.find(args.model)
    module, size = entry.module(), entry.preprocessing.size
    x = jax.random.normal(jax.random.key(0), (args.batch, size, size, 3))
    params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, size, size, 3)))
    observations = jaxquant.calibrate(params, module.apply, [x], is_full_quantize=True)
    models = {"float32": (module.apply, params)}
    for name, full in (("default", False), ("full", True)):
        qparams, qapply = jaxquant.quantize(
            params, module.apply, observations, algo="abs_max", is_full_quantize=full
        )
        models[name] = qapply.with_backend("xla"), qparams  # whose program can be read
    print(f"{args.model}, batch {args.batch}, {jax.default_backend()}: buffers and MB")
    for name, (function, arrays) in models.items():
        counted = totals(intermediate_buffers(compiled_text(function, arrays, x)))
        cells = (f"{dtype} {n:4} {size / 1e6:9.2f}" for dtype, (n, size) in counted.items())
        print(f"{name:8}", "  ".join(cells))


if __name__ == "__main__":
    main()
