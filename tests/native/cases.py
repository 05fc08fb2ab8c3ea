"""Convolutions to compare, their reference in NumPy, and every build of the kernels."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import native
from jaxquant.native import build, instructions, library
from jaxquant.weights.groups import pack, unpack

needs_kernels = pytest.mark.skipif(
    not native.available().available, reason=native.available().reason
)
settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=25)


@dataclasses.dataclass(frozen=True)
class Conv:
    """The geometry of one convolution: x [batch, *size, inputs * groups]."""

    batch: int
    size: tuple[int, int]
    window: tuple[int, int]
    inputs: int
    outputs: int  # of a group
    groups: int = 1
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, *self.size, self.inputs * self.groups)

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        return (*self.window, self.inputs, self.outputs * self.groups)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `native.conv`."""
        return {
            "strides": self.strides,
            "dilation": self.dilation,
            "padding": self.padding,
            "groups": self.groups,
        }

    def sums(self, x: np.ndarray, kernel: np.ndarray, zero_point: int = 0) -> np.ndarray:
        """Σ (x - zero_point) * kernel in int64; what is outside the input counts as zero."""
        x = np.pad(x.astype(np.int64) - zero_point, ((0, 0), *self.padding, (0, 0)))
        kernel = kernel.astype(np.int64)
        starts = [
            range(0, length - (taps - 1) * step, stride)
            for length, taps, step, stride in zip(
                x.shape[1:3], self.window, self.dilation, self.strides, strict=True
            )
        ]
        out = np.zeros((len(x), *map(len, starts), kernel.shape[3]), np.int64)
        for i, row in enumerate(starts[0]):
            for j, column in enumerate(starts[1]):
                rows = slice(row, row + (self.window[0] - 1) * self.dilation[0] + 1)
                columns = slice(column, column + (self.window[1] - 1) * self.dilation[1] + 1)
                patch = x[:, rows, columns][:, :: self.dilation[0], :: self.dilation[1]]
                for g in range(self.groups):
                    ins = slice(g * self.inputs, (g + 1) * self.inputs)
                    outs = slice(g * self.outputs, (g + 1) * self.outputs)
                    out[:, i, j, outs] = np.einsum(
                        "nhwc,hwco->no", patch[..., ins], kernel[..., outs]
                    )
        return out


@st.composite
def convolutions(draw: st.DrawFn, depthwise: bool = False, grouped: bool = False) -> Conv:
    """Small ones, with channel counts around the kernels' blocks."""

    def two(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    channels = st.sampled_from((1, 2, 3, 4, 5, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 100))
    inputs, outputs, groups = draw(channels), draw(channels), 1
    if depthwise:
        inputs, outputs, groups = 1, 1, max(2, draw(channels))
    elif grouped:
        inputs, outputs, groups = *two(1, 9), draw(st.integers(2, 4))
    window = draw(st.sampled_from(((1, 1), (3, 3), (5, 5), (1, 3), (4, 2), (7, 7))))
    dilation = two(1, 2)
    padding = (two(0, 3), two(0, 3))
    size = tuple(
        max(draw(st.integers(1, 18)), (taps - 1) * step + 1 - sum(pads))
        for taps, step, pads in zip(window, dilation, padding, strict=True)
    )
    return Conv(
        draw(st.integers(1, 3)), size, window, inputs, outputs, groups, two(1, 3), dilation, padding
    )


def int8_values(seed: int, shape: tuple[int, ...], low: int = -128) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 127, shape, np.int8, endpoint=True)


def fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """a * b + c rounded to float32 once (but for ties that float64 makes)."""
    a, b, c = (np.asarray(v).astype(np.float32).astype(np.float64) for v in (a, b, c))
    return (a * b + c).astype(np.float32)


def resident_bytes() -> int:
    """The memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def requantized(y: np.ndarray, out: native.Requantize) -> np.ndarray:
    scaled = np.rint(y.astype(np.float32) * np.float32(out.inv_scale))
    top = 127 if np.dtype(out.dtype) == np.int8 else 255
    return np.clip(scaled.astype(np.float64) + out.zero_point, top - 255, top).astype(out.dtype)


@functools.cache
def targets() -> dict[str, dict[str, str]]:
    """What the kernels of every set of instructions that this processor has are registered as, by
    the attribute of `library` that has the name."""
    found = {}
    for number, wanted in enumerate(instructions.all_here()):
        try:
            loaded = build.load(wanted.name)
        except build.BuildError:
            if wanted.name == "portable":
                raise
            continue
        variant = wanted.name
        found[variant] = {}
        for attribute in ("CONV", "DOT", "GROUPS", "SEQUENCE", "STORED"):
            symbol = getattr(library, attribute)
            found[variant][attribute] = f"{symbol}_{number}"
            capsule = jax.ffi.pycapsule(getattr(loaded, symbol))
            jax.ffi.register_ffi_target(f"{symbol}_{number}", capsule, platform="cpu")
    return found


def with_variants(run: Callable[[], jax.Array]) -> dict[str, jax.Array]:
    results = {}
    for variant, names in targets().items():
        with pytest.MonkeyPatch.context() as patch:
            for attribute, name in names.items():
                patch.setattr(library, attribute, name)
            results[variant] = run()
    return results


def stored(
    bits: int, length: int, columns: int, group_size: int, sums_last: bool, scales=jnp.float32
):
    """Integers and scales of a matrix, and the float64 matrix [K, N] that they stand for."""
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    integers = np.random.default_rng(1).integers(
        least, most, (length, columns), np.int8, endpoint=True
    )
    groups = -(-length // group_size)
    scale = np.random.default_rng(3).uniform(0.1, 1, (groups, columns)).astype(scales)
    scale[:, :: max(columns // 2, 1)] = 0  # channels of zeros
    weight = integers * np.repeat(scale.astype(np.float64), group_size, axis=0)[:length]
    kept = integers if bits == 8 else pack(integers, 0)
    if sums_last:
        kept = integers.T if bits == 8 else pack(integers.T, 1)
        assert bits == 8 or (unpack(kept, 1, length) == integers.T).all()
    return jnp.asarray(kept), jnp.asarray(scale.T if sums_last else scale), weight
