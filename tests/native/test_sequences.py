"""Several convolutions in one call give the bits that they give one by one."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant import native
from jaxquant.native import library
from jaxquant.native.call import Static, call
from jaxquant.native.fields import Image, Places
from tests.native.cases import (
    Conv,
    int8_values,
    needs_kernels,
    resident_bytes,
    settings,
    with_variants,
)  # fmt: skip

pytestmark = needs_kernels


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution of a chain, with padding that keeps odd windows' images in size."""

    window: int
    outputs: int
    stride: int = 1
    depthwise: bool = False
    float_out: bool = False
    int8_out: bool = True
    residual: int | None = None  # the earlier layer whose result is added, in float if it is there


class Chain:
    """Layers, each of which reads the int8 result of the latest one that has such."""

    def __init__(self, layers: list[Layer], batch: int, size: int, channels: int):
        self.layers = layers
        self.x = int8_values(0, (batch, size, size, channels))
        self.convs: list[Conv] = []
        self.reads: list[int | None] = []
        shapes: list[tuple[int, int]] = []  # rows and channels of the results
        self.kernels = []
        for k, layer in enumerate(layers):
            given = [i for i in range(k) if layers[i].int8_out]
            self.reads.append(given[-1] if given else None)
            rows, inputs = (size, channels) if not given else shapes[given[-1]]
            pad = (layer.window // 2,) * 2
            groups = inputs if layer.depthwise else 1
            outputs = inputs if layer.depthwise else layer.outputs
            self.convs.append(
                Conv(batch, (rows, rows), (layer.window,) * 2, inputs // groups, outputs // groups,
                     groups, (layer.stride,) * 2, padding=(pad, pad))
            )  # fmt: skip
            shapes.append((-(-rows // layer.stride), outputs))
            kernel = int8_values(k + 1, self.convs[-1].kernel_shape, -127)
            self.kernels.append(native.pack_conv(jnp.asarray(kernel), groups))
        self.shapes = shapes

    def calls(self, x: Any, results: Any) -> Any:
        """The calls in order; `results(k, position)` stands for the result of an earlier one."""
        for k, (layer, conv) in enumerate(zip(self.layers, self.convs, strict=True)):
            at = self.reads[k]
            residual = None
            if layer.residual is not None:
                residual = native.Residual(results(layer.residual, 0), np.float32(0.05), 3)
            deviation = 75.0**2 * np.sqrt(np.prod(conv.kernel_shape[:3]))  # of the sums
            multiplier = np.linspace(0.5, 1.5, conv.kernel_shape[3]) / deviation
            yield native.conv_call(
                x if at is None else results(at, int(self.layers[at].float_out)),
                self.kernels[k],
                multiplier.astype(np.float32),
                np.linspace(-1, 1, conv.kernel_shape[3], dtype=np.float32) if k % 2 else None,
                kernel_shape=conv.kernel_shape, zero_point=-3 * k, activation=(-2.0, 6.0),
                activation_after=(-1.5, 5.0) if residual else (-np.inf, np.inf),
                residual=residual, float_out=layer.float_out,
                out=native.Requantize(np.float32(40.7), k - 9) if layer.int8_out else None,
                **conv.options,
            )  # fmt: skip

    def one_by_one(self, x: Any) -> dict[tuple[int, int], jax.Array]:
        found: dict[tuple[int, int], jax.Array] = {}
        for k, each in enumerate(self.calls(x, lambda k, position: found[k, position])):
            given = each.run()
            given = given if isinstance(given, tuple) else (given,)
            found.update({(k, position): value for position, value in enumerate(given)})
        return found

    def at_once(self, x: Any, wanted: list[tuple[int, int]]) -> tuple[jax.Array, ...]:
        made: list[native.Call] = []

        def link(k: int, position: int) -> native.Link:
            shape, dtype = made[k].static.outputs[position]
            return native.Link(k, position, (x.shape[0], *shape), jnp.dtype(dtype))

        for each in self.calls(x, link):
            made.append(each)
        return native.sequence(made, wanted)


# A network in little: a strided stem, float and int8 residual additions, depthwise windows.
LAYERS = [
    Layer(3, 32, stride=2),
    Layer(1, 64, float_out=True),
    Layer(3, 0, depthwise=True),
    Layer(1, 64, residual=1, float_out=True),
    Layer(5, 0, depthwise=True),
    Layer(1, 64, residual=3),
    Layer(3, 64, residual=5),
    Layer(1, 24),
    Layer(3, 0, depthwise=True, stride=2),
    Layer(1, 40, int8_out=False, float_out=True),
]  # fmt: skip
LAST = [(len(LAYERS) - 1, 0)]


def assert_same(chain: Chain, wanted: list[tuple[int, int]]) -> None:
    x = jnp.asarray(chain.x)
    expected = jax.jit(chain.one_by_one)(x)
    got = jax.jit(lambda x: chain.at_once(x, wanted))(x)
    assert len(got) == len(wanted)
    for key, value in zip(wanted, got, strict=True):
        assert value.dtype == expected[key].dtype
        np.testing.assert_array_equal(value, expected[key])


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 13])
def test_same_bits_for_any_batch(batch: int):
    """By samples, by all threads together, and what is left over of the division."""
    assert_same(Chain(LAYERS, batch, 33, 3), LAST)


@pytest.mark.parametrize("size", [5, 9, 42, 56])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("float_out", [False, True])
def test_residuals_that_results_replace(batch: int, size: int, float_out: bool):
    """Of whole tiles, where sums may go where the residual was, and where the last one overlaps.

    The first residual is added twice, so that it has to outlast the first addition.
    """
    layers = [
        Layer(1, 32, float_out=float_out),
        Layer(1, 32, residual=0, float_out=float_out),
        Layer(1, 32, residual=0, float_out=float_out),
        Layer(1, 32, residual=2, float_out=float_out),
        Layer(3, 32, residual=3, float_out=float_out),
        Layer(1, 8),
    ]
    assert_same(Chain(layers, batch, size, 8), [(len(layers) - 1, 0)])


def test_every_result_can_be_wanted():
    every = [
        (k, position)
        for k, layer in enumerate(LAYERS)
        for position in range(layer.float_out + layer.int8_out)
    ]
    assert_same(Chain(LAYERS, 4, 18, 8), [*every[::-1], *every[:2]])


def test_tensors_that_many_parts_share():
    """Weights that outweigh the images, and images that outweigh the caches, in turns."""
    layers = [
        Layer(1, 256, float_out=True),
        Layer(1, 16),
        Layer(3, 512, stride=2),
        Layer(3, 512),
        Layer(1, 512, residual=2, float_out=True),
        Layer(3, 512),
        Layer(1, 512, residual=4, float_out=True),
        Layer(1, 512, residual=6, float_out=True),
    ]
    assert_same(Chain(layers, 9, 30, 16), [(6, 0), (7, 1), (0, 0)])


def test_every_build_of_the_kernels():
    chain = Chain(LAYERS, 3, 21, 3)
    x = jnp.asarray(chain.x)
    expected = chain.one_by_one(x)[LAST[0]]
    for variant, value in with_variants(lambda: chain.at_once(x, LAST)[0]).items():
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6, err_msg=variant)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    layers: list[Layer] = []
    size, channels = draw(st.integers(1, 12)), draw(st.sampled_from((1, 3, 16, 40)))
    shape, shapes = (size, channels), []
    for k in range(draw(st.integers(1, 6))):
        layer = Layer(
            draw(st.sampled_from((1, 3, 5))), draw(st.sampled_from((1, 8, 17, 64))),
            draw(st.sampled_from((1, 1, 2))), draw(st.booleans()) and shape[1] > 1,
            *draw(st.sampled_from(((False, True), (True, True)))),
        )  # fmt: skip
        out = (-(-shape[0] // layer.stride), shape[1] if layer.depthwise else layer.outputs)
        alike = [i for i in range(k) if shapes[i] == out]
        if alike and draw(st.booleans()):
            layer = dataclasses.replace(layer, residual=draw(st.sampled_from(alike)))
        layers.append(layer)
        shapes.append(out)
        shape = out
    return Chain(layers, draw(st.integers(1, 7)), size, channels)


@settings
@hypothesis.given(chains())
def test_same_bits_for_any_chain(chain: Chain):
    assert_same(chain, [(len(chain.layers) - 1, 0)])


def test_a_residual_from_outside():
    first, second = Conv(4, (9, 9), (1, 1), 8, 16), Conv(4, (9, 9), (1, 1), 16, 16)
    kernels = [
        native.pack_conv(jnp.asarray(int8_values(1, c.kernel_shape))) for c in (first, second)
    ]
    out = native.Requantize(np.float32(0.01))

    def run(x: jax.Array, added: jax.Array, as_one: bool) -> jax.Array:
        def call_of(conv: Conv, kernel: jax.Array, x: Any, **options: Any) -> native.Call:
            shape = conv.kernel_shape
            return native.conv_call(
                x, kernel, np.float32(1), out=out, kernel_shape=shape, **options
            )

        one = call_of(first, kernels[0], x)
        link = native.Link(0, 0, (x.shape[0], 9, 9, 16), jnp.int8)
        residual = native.Residual(added, np.float32(0.5), 3)
        two = call_of(second, kernels[1], link if as_one else one.run(), residual=residual)
        return native.sequence([one, two], [(1, 0)])[0] if as_one else two.run()

    x, added = (jnp.asarray(int8_values(k, (4, 9, 9, c))) for k, c in ((0, 8), (9, 16)))
    expected = run(x, added, False)
    np.testing.assert_array_equal(run(x, added, True), expected)
    mapped = jax.vmap(lambda x, added: run(x, added, True))
    np.testing.assert_array_equal(mapped(x[:, None], added[:, None])[:, 0], expected)


def test_an_empty_batch():
    chain = Chain(LAYERS, 1, 9, 3)
    assert chain.at_once(jnp.zeros((0, 9, 9, 3), jnp.int8), LAST)[0].shape == (0, 3, 3, 40)


class TestTransformations:
    def test_vmap_of_samples_is_one_call(self):
        chain = Chain(LAYERS, 4, 12, 3)
        x = jnp.asarray(chain.x)
        run = lambda x: chain.at_once(x, LAST)[0]  # noqa: E731
        mapped = jax.vmap(run)
        np.testing.assert_array_equal(mapped(x[:, None])[:, 0], run(x))
        assert "while" not in str(jax.make_jaxpr(mapped)(x[:, None]))

    def test_sharded_batch_is_not_gathered(self):
        chain = Chain(LAYERS, 8, 12, 3)
        mesh = jax.make_mesh((len(jax.devices()),), ("n",), (jax.sharding.AxisType.Auto,))
        batched = NamedSharding(mesh, PartitionSpec("n"))
        x = jax.device_put(jnp.asarray(chain.x), batched)
        compiled = jax.jit(lambda x: chain.at_once(x, LAST)).lower(x).compile()
        (got,) = compiled(x)
        np.testing.assert_array_equal(got, chain.at_once(jnp.asarray(chain.x), LAST)[0])
        assert got.sharding.is_equivalent_to(batched, got.ndim)
        assert "all-gather" not in compiled.as_text()

    def test_many_threads_at_once(self):
        chain = Chain(LAYERS, 4, 12, 3)
        run = jax.jit(lambda x: chain.at_once(x, LAST)[0])
        inputs = [jnp.asarray(int8_values(seed, chain.x.shape)) for seed in range(4)]
        expected = [np.asarray(run(x)) for x in inputs]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = [pool.submit(run, inputs[k % 4]) for k in range(200)]
            for k, result in enumerate(results):
                np.testing.assert_array_equal(result.result(), expected[k % 4])


@pytest.mark.slow
def test_no_leak_in_ten_thousand_calls():
    chain = Chain(LAYERS, 5, 33, 3)
    x = jnp.asarray(chain.x)
    run = jax.jit(lambda x: chain.at_once(x, LAST)[0])

    def calls(count: int) -> int:
        for _ in range(count):
            result = run(x)
        result.block_until_ready()
        return resident_bytes()

    before = calls(500)
    assert calls(10_000) - before < 8 << 20


# Both in a process of its own: what is tried spoils it.
_ALONE = """
    import os, resource, sys
    import jax, jax.numpy as jnp
    from tests.native.test_sequences import Chain, Layer

    def forked():
        # No thread of the pool is left in the child, and what it is given to do piles up.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        chain = Chain([Layer(3, 64), Layer(3, 64)], 2, 12, 64)
        run = jax.jit(lambda x: chain.at_once(x, [(1, 0)])[0])
        x = jnp.asarray(chain.x)
        run(x).block_until_ready()
        child = os.fork()
        if child == 0:
            for _ in range(3000):
                run(x).block_until_ready()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    def out_of_memory():
        chain = Chain([Layer(1, 512), Layer(1, 512), Layer(1, 4)], 2, 512, 4)
        x = jnp.asarray(chain.x)
        run = jax.jit(lambda x: chain.at_once(x, [(2, 0)])[0]).lower(x).compile()
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
        try:
            run(x).block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            print(str(error).splitlines()[0])

    {"forked": forked, "out_of_memory": out_of_memory}[sys.argv[1]]()
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("forked", "7"), ("out_of_memory", "RESOURCE_EXHAUSTED: jaxquant: out of memory")],
)
def test_what_spoils_a_process(name: str, expected: str, tmp_path: pathlib.Path):
    script = tmp_path / "alone.py"
    script.write_text(textwrap.dedent(_ALONE))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), name],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == expected, done.stderr


class TestErrors:
    def test_only_convolutions_of_int8(self):
        conv = Conv(1, (4, 4), (1, 1), 8, 8)
        x, kernel = jnp.zeros(conv.x_shape, jnp.uint8), jnp.zeros(conv.kernel_shape, jnp.int8)
        with pytest.raises(ValueError, match="not uint8 ones"):
            native.sequence([native.conv_call(x, kernel, jnp.float32(1))], [(0, 0)])

    @pytest.mark.parametrize(
        ("record", "field"),
        [*(("places", name) for name in Places._fields), *(("images", n) for n in Image._fields)],
    )
    @pytest.mark.parametrize("value", [-2, 10**6])
    def test_steps_that_do_not_fit(
        self, record: str, field: str, value: int, monkeypatch: pytest.MonkeyPatch
    ):
        """A number that is wrong is an error, and nothing is read or written beside a tensor."""
        chain = Chain([Layer(3, 16), Layer(3, 16)], 2, 9, 8)
        made: list[Any] = []

        def keep(*given: Any) -> Any:
            made.append(given)
            return call(*given)

        monkeypatch.setattr("jaxquant.native.sequences.call", keep)
        chain.at_once(jnp.asarray(chain.x), [(1, 0)])
        ((static, operands),) = made
        attributes = dict(static.attributes)
        kind = {"places": Places, "images": Image}[record]
        first, second = np.reshape(attributes[record], (2, -1)).tolist()
        spoilt = kind(*second)._replace(**{field: value})
        attributes[record] = (*first, *spoilt)
        broken = Static(
            library.SEQUENCE, static.outputs, static.batched, tuple(attributes.items())
        )  # fmt: skip
        with pytest.raises(Exception, match="do not fit"):
            jax.block_until_ready(call(broken, operands))
