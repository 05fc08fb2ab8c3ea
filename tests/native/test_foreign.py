"""Foreign functions called by several threads at once, which take turns as often as they can."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import native
from jaxquant.native import build, foreign, library
from tests.native.cases import int8_values, needs_kernels

pytestmark = needs_kernels

THREADS = 4


@pytest.fixture
def _threads_take_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def functions() -> dict[str, Callable[[], object]]:
    """A call of every foreign function."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(int8_values(0, (2, 9, 9, 20)))
    kernel = jnp.asarray(int8_values(1, (3, 3, 20, 24), -127))
    square = jnp.asarray(int8_values(2, (1, 1, 24, 24), -127))
    weight, multiplier = jnp.asarray(int8_values(3, (20, 24), -127)), jnp.full(24, 1e-3)
    y = jnp.asarray(rng.normal(size=(2, 9, 9, 20)), jnp.float32)
    window = jnp.asarray(rng.normal(size=(3, 3, 1, 20)), jnp.float32)
    out = native.Requantize(8.0, 3)
    counts = rng.poisson(3, (2, 100)).astype(np.float64)
    limit, levels = np.full(2, 100.0), np.full(2, 127.0)
    weighing = native.Weighing(16.0, 1e-9, 1e-9, 1e-12)

    @jax.jit
    def sequence(x: jax.Array) -> tuple[jax.Array, ...]:
        first = native.conv_call(x, kernel, multiplier, out=out)
        link = native.Link(0, 0, (2, 7, 7, 24), jnp.int8)
        return native.sequence([first, native.conv_call(link, square, multiplier)], [(1, 0)])

    conv = jax.jit(lambda x: native.conv(x, kernel, multiplier, out=out))
    dot = jax.jit(lambda x: native.dot(x, weight, multiplier))
    weights = jax.vmap(jax.vmap(native.pack_dot))(kernel[:1])  # [1, 3, bytes]
    multipliers, ends = jnp.full((1, 3, 24), 1e-3), jnp.array([[2, 2, 9]] * 18, jnp.int32)
    groups = jax.jit(
        lambda x: native.dot_by_groups(x.reshape(18, 9, 20), weights, multipliers, None, ends)
    )
    stored = jax.jit(
        lambda y: native.dot_stored(
            y.reshape(162, 20), [(weight, multipliers[0, :1])], sums_last=False, group_size=20
        )
    )
    differences = jax.jit(lambda y: native.differences(y, y * y, (0.0, 6.0)))
    depthwise = jax.jit(lambda y: native.float_depthwise(y, window))
    axes = native.AttentionAxes(*[(0, 2, 1, 3)] * 4)
    attention = jax.jit(lambda y: native.attention(y, y, y, axes=axes))
    gelu = jax.jit(lambda y: native.gelu(y, approximate=False))
    rows = jax.jit(lambda y: native.quantize_rows(y, is_asymmetric=True, smallest_scale=1e-20))
    quantize = jax.jit(lambda y: native.quantize(y, jnp.float32(20.0), 3))
    layer_norm = jax.jit(lambda y: native.layer_norm(y, None, None, epsilon=1e-6))
    return {
        foreign.CONV: lambda: conv(x),
        foreign.DOT: lambda: dot(x),
        foreign.GROUPS: lambda: groups(x),
        foreign.STORED: lambda: stored(y),
        foreign.PACK: lambda: jax.jit(native.pack_conv)(kernel),
        foreign.SEQUENCE: lambda: sequence(x),
        foreign.HISTOGRAM: lambda: jax.jit(native.histogram, static_argnums=1)(y, -20),
        foreign.DIFFERENCES: lambda: differences(y),
        foreign.FLOAT_DEPTHWISE: lambda: depthwise(y),
        foreign.ATTENTION: lambda: attention(y),
        foreign.GELU: lambda: gelu(y),
        foreign.LAYER_NORM: lambda: layer_norm(y),
        foreign.QUANTIZE: lambda: quantize(y),
        foreign.QUANTIZE_ROWS: lambda: rows(y),
        "jaxquant_kernels": lambda: library.instruction_set(),
        "jaxquant_kl_thresholds": lambda: native.kl_thresholds(counts, limit, levels, weighing),
    }


def call_in_threads(called: Mapping[str, Callable[[], object]], calls: int) -> None:
    """So many calls in all, whose results are compared."""
    expected = {name: jax.device_get(call()) for name, call in called.items()}

    def work(seed: int) -> None:
        for name in random.Random(seed).choices(list(called), k=calls // THREADS):
            found = jax.device_get(called[name]())
            jax.tree.map(np.testing.assert_array_equal, found, expected[name])

    with futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


@pytest.mark.usefixtures("_threads_take_turns")
@pytest.mark.parametrize("calls", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_threads_call_every_function_at_once(calls: int):
    called = functions()
    assert set(called) == {*foreign.HANDLERS, *foreign.SIGNATURES}
    call_in_threads(called, calls)


@pytest.mark.usefixtures("_threads_take_turns")
@pytest.mark.parametrize("name", foreign.SIGNATURES)
@pytest.mark.parametrize("calls", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_threads_call_one_function_at_once(name: str, calls: int):
    """Where they do nothing else they meet in it more often."""
    call_in_threads({name: functions()[name]}, calls)


@pytest.mark.usefixtures("_threads_take_turns")
def test_threads_load_the_library_at_once():
    """What comes first in a process may be calls of several threads."""
    for cached in (library.available, build.load):
        cached.cache_clear()
    with futures.ThreadPoolExecutor(THREADS) as pool:
        found = set(pool.map(lambda _: native.available(), range(THREADS)))
    assert len(found) == 1
    assert found.pop().available


def test_a_library_without_a_function_is_no_library(tmp_path):
    """Another library's symbols are not taken for ours."""

    class Empty:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(f"undefined symbol: {name}")

    with pytest.raises(AttributeError, match="jaxquant_kernels"):
        foreign.declare(Empty())
