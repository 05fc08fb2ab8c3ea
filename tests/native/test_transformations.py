"""Native calls under JAX's transformations: vmap, sharding, donation, threads, processes."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant import native
from tests.native.cases import Conv, int8_values, needs_kernels, resident_bytes

pytestmark = needs_kernels

CONV = Conv(8, (9, 11), (3, 3), 16, 40, padding=((1, 1), (1, 1)))
OUT = native.Requantize(np.float32(21.7), 3)


def conv(x: jax.Array, packed: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    multiplier = jnp.linspace(1e-4, 2e-4, CONV.kernel_shape[3], dtype=jnp.float32)
    return native.conv(
        x, packed, multiplier, zero_point=-128, out=OUT, kernel_shape=CONV.kernel_shape,
        residual=None if residual is None else native.Residual(residual, 0.1, 2), **CONV.options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(int8_values(0, CONV.x_shape))


@pytest.fixture(scope="module")
def packed() -> jax.Array:
    return native.pack_conv(jnp.asarray(int8_values(1, CONV.kernel_shape)))


def test_vmap_of_samples_is_one_call(x: jax.Array, packed: jax.Array):
    mapped = jax.vmap(conv, (0, None))
    samples = x[:, None]
    np.testing.assert_array_equal(mapped(samples, packed)[:, 0], conv(x, packed))
    jaxpr = str(jax.make_jaxpr(mapped)(samples, packed))
    assert "while" not in jaxpr
    assert "scan" not in jaxpr


def test_vmap_with_a_residual(x: jax.Array, packed: jax.Array):
    residual = jnp.asarray(int8_values(2, (8, 9, 11, 40)))
    expected = conv(x, packed, residual)
    each = jax.vmap(conv, (0, None, 0))(x[:, None], packed, residual[:, None])
    np.testing.assert_array_equal(each[:, 0], expected)
    shared = jax.vmap(conv, (0, None, None))(x[:, None], packed, residual[:1])
    alone = conv(x, packed, jnp.broadcast_to(residual[:1], residual.shape))
    np.testing.assert_array_equal(shared[:, 0], alone)


def test_nested_vmap(x: jax.Array, packed: jax.Array):
    twice = jax.vmap(jax.vmap(conv, (0, None)), (0, None))
    got = twice(x.reshape(4, 2, 1, *x.shape[1:]), packed)
    np.testing.assert_array_equal(got.reshape(8, *got.shape[3:]), conv(x, packed))


def test_vmap_over_weights(x: jax.Array):
    kernels = jnp.asarray(int8_values(3, (3, *CONV.kernel_shape)))
    packs = jax.vmap(native.pack_conv)(kernels)
    got = jax.vmap(conv, (None, 0))(x, packs)
    for kernel, result in zip(kernels, got, strict=True):
        np.testing.assert_array_equal(result, conv(x, native.pack_conv(kernel)))


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((len(jax.devices()),), ("batch",), (jax.sharding.AxisType.Auto,))


def test_sharded_batch_is_not_gathered(x: jax.Array, packed: jax.Array):
    batched = NamedSharding(mesh(), PartitionSpec("batch"))
    replicated = NamedSharding(mesh(), PartitionSpec())
    residual = jnp.asarray(int8_values(2, (8, 9, 11, 40)))
    arguments = (
        jax.device_put(x, batched),
        jax.device_put(packed, replicated),
        jax.device_put(residual, batched),
    )
    compiled = jax.jit(conv).lower(*arguments).compile()
    got = compiled(*arguments)
    np.testing.assert_array_equal(got, conv(x, packed, residual))
    assert got.sharding.is_equivalent_to(batched, got.ndim)
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_sharded_channels_are_gathered(x: jax.Array, packed: jax.Array):
    channels = NamedSharding(mesh(), PartitionSpec(None, None, None, "batch"))
    got = jax.jit(conv)(jax.device_put(x, channels), packed)
    np.testing.assert_array_equal(got, conv(x, packed))


def test_shard_map(x: jax.Array, packed: jax.Array):
    mapped = jax.shard_map(
        conv, mesh=mesh(), in_specs=(PartitionSpec("batch"), PartitionSpec()),
        out_specs=PartitionSpec("batch"), check_vma=False,
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(mapped)(x, packed), conv(x, packed))


def test_donated_input(packed: jax.Array):
    same = Conv(2, (8, 8), (3, 3), 1, 1, 64, padding=((1, 1), (1, 1)))
    kernel = native.pack_conv(jnp.asarray(int8_values(1, same.kernel_shape)), 64)

    def depthwise(x: jax.Array) -> jax.Array:
        return native.conv(
            x, kernel, jnp.float32(0.01), out=OUT, kernel_shape=same.kernel_shape, **same.options
        )

    values = int8_values(0, same.x_shape)
    expected = depthwise(jnp.asarray(values))
    donating = jax.jit(lambda x: depthwise(depthwise(x)), donate_argnums=0)
    got = donating(jnp.asarray(values))
    np.testing.assert_array_equal(got, depthwise(expected))


def test_many_threads_at_once(x: jax.Array, packed: jax.Array):
    run = jax.jit(conv)
    inputs = [jnp.asarray(int8_values(seed, CONV.x_shape)) for seed in range(4)]
    expected = [np.asarray(run(value, packed)) for value in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = [pool.submit(run, inputs[k % 4], packed) for k in range(200)]
        for k, result in enumerate(results):
            np.testing.assert_array_equal(result.result(), expected[k % 4])


_PROCESSES = """
    import multiprocessing, sys, warnings
    warnings.simplefilter("ignore")  # of fork beside threads, which is what is tested

    def work(seed):
        import jax, jax.numpy as jnp, numpy as np
        from jaxquant import native
        x = jnp.asarray(np.random.default_rng(seed).integers(-9, 9, (4, 30, 30, 32)), jnp.int8)
        kernel = jnp.ones((3, 3, 32, 64), jnp.int8)
        one = native.conv_call(x, kernel, jnp.float32(0.1), out=native.Requantize(1.0))
        link = native.Link(0, 0, (4, 28, 28, 64), np.dtype(np.int8))
        two = native.conv_call(link, jnp.ones((1, 1, 64, 8), jnp.int8), jnp.float32(1))
        (both,) = native.sequence([one, two], [(1, 0)])
        alone = native.conv(x, kernel, jnp.float32(1))
        return int(np.asarray(both)[0, 0, 0, 0]), int(np.asarray(alone)[0, 0, 0, 0])

    if __name__ == "__main__":
        import jaxquant.native as native
        assert native.available().available  # loaded before the fork, run after it
        context = multiprocessing.get_context(sys.argv[1])
        with context.Pool(2) as pool:
            found = pool.map_async(work, range(4)).get(timeout=240)
        print("same" if found == [work(seed) for seed in range(4)] else "differ")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method: str, tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(textwrap.dedent(_PROCESSES))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script), method],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.slow
def test_no_leak_in_ten_thousand_calls(x: jax.Array, packed: jax.Array):
    run = jax.jit(conv)

    def calls(count: int) -> int:
        for _ in range(count):
            result = run(x, packed)
        result.block_until_ready()
        return resident_bytes()

    before = calls(500)
    assert calls(10_000) - before < 8 << 20


def test_weights_in_a_reused_buffer(x: jax.Array):
    """Nothing is remembered by address: other weights in the same memory give other results."""
    run = jax.jit(functools.partial(conv), donate_argnums=())
    for seed in range(5):
        kernel = jnp.asarray(int8_values(seed, CONV.kernel_shape))
        packed = native.pack_conv(kernel)
        expected = CONV.sums(np.asarray(x), np.asarray(kernel), -128)
        multiplier = np.linspace(1e-4, 2e-4, 40, dtype=np.float32)
        scaled = np.rint(expected * multiplier * np.float64(OUT.inv_scale)) + OUT.zero_point
        steps = np.abs(np.asarray(run(x, packed)).astype(int) - np.clip(scaled, -128, 127))
        assert steps.max() <= 1
        del packed
