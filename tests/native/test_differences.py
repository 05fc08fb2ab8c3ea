"""The native comparison of two tensors sums what NumPy sums, and what XLA's form of it sums."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant import native
from jaxquant.graph.primitives import Channels
from jaxquant.graph.trace import trace
from jaxquant.plan.epilogue import Epilogue
from jaxquant.recover import shift
from jaxquant.recover.activation import find_activation
from tests.native.cases import needs_kernels

pytestmark = needs_kernels

CLAMPS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 0.5)]


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """y and ŷ a little off it, in places equal; many a value beyond the clamps."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=shape, scale=4).astype(np.float32)
    y_hat = y + rng.normal(size=shape, scale=0.2).astype(np.float32)
    return y, np.where(rng.random(shape) < 0.2, y, y_hat)


@np.errstate(invalid="ignore", over="ignore")
def reference(y, y_hat, gain) -> tuple[np.ndarray, np.ndarray]:
    """The sums in float64, a value at a time."""
    y, y_hat, gain = (x.astype(np.float64).reshape(-1, x.shape[-1]) for x in (y, y_hat, gain))
    sums, powers = np.zeros((3, y.shape[1])), np.zeros(2)
    for a_row, b_row, g_row in zip(y, y_hat, gain, strict=True):
        for c, (a, b, g) in enumerate(zip(a_row, b_row, g_row, strict=True)):
            d = a - b
            if d != 0 and math.isfinite(d) and math.isfinite(g / d):
                w = min(max(g / d, 0), 1)
                sums[:, c] += w * d, w * d * d, w
            if math.isfinite(a):
                powers += a * a, d * d
    return sums, np.where(np.isnan(powers), np.inf, powers)


@pytest.mark.parametrize(
    "shape", [(1,), (7,), (0, 5), (40, 1), (2, 3, 5, 17), (300, 64), (5, 3000)]
)
@pytest.mark.parametrize("clamp", CLAMPS)
def test_sums_are_those_of_numpy(shape: tuple[int, ...], clamp: tuple[float, float]):
    y, y_hat = pair(shape)
    gain = np.clip(y, *clamp) - np.clip(y_hat, *clamp)
    sums, mean, powers = jax.jit(lambda a, b: native.differences(a, b, clamp))(y, y_hat)
    given, _, _ = jax.jit(lambda a, b, g: native.differences(a, b, (0, 0), g))(y, y_hat, gain)
    want, want_powers = reference(y, y_hat, gain)
    scale = 1e-5 * max(1, math.prod(shape[:-1]))
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=scale)
    np.testing.assert_allclose(mean, shift.Shift(*want).mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(powers[:2], want_powers, rtol=1e-5)
    assert powers[2] == 1
    assert np.asarray(given).tobytes() == np.asarray(sums).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clamp", CLAMPS)
def test_values_that_are_not_finite_are_left_out(bad: float, clamp: tuple[float, float]):
    y, y_hat = pair((50, 33))
    y[3, 7] = y_hat[3, 7] = y[9, 20] = bad
    with np.errstate(invalid="ignore"):
        gain = np.clip(y, *clamp) - np.clip(y_hat, *clamp)
    sums, _, powers = native.differences(jnp.asarray(y), jnp.asarray(y_hat), clamp)
    want, want_powers = reference(y, y_hat, gain)
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(powers[:2], want_powers, rtol=1e-5)
    y_hat[30, 30] = bad  # the int8 model alone
    _, _, powers = native.differences(jnp.asarray(y), jnp.asarray(y_hat), clamp)
    assert powers[1] == np.inf


@pytest.mark.parametrize("shape", [(200_000, 1), (40_000, 10), (100, 3000), (65, 2048)])
def test_sums_of_several_tasks(shape: tuple[int, ...]):
    """In whole numbers, so that the sums are exact in any order."""
    rng = np.random.default_rng(1)
    y, y_hat = (rng.integers(-3, 4, shape).astype(np.float32) for _ in range(2))
    run = jax.jit(lambda a, b: native.differences(a, b, (-math.inf, math.inf)))
    sums, _, powers = run(y, y_hat)
    off = y.astype(np.float64) - y_hat
    want = [off.sum(0), (off**2).sum(0), (off != 0).sum(0)]
    np.testing.assert_array_equal(sums, want)
    np.testing.assert_array_equal(powers, [(y.astype(np.float64) ** 2).sum(), (off**2).sum(), 1])


@pytest.mark.parametrize("form", ["native", "portable"])
@pytest.mark.parametrize("activation", [lambda y: y, jax.nn.relu, jax.nn.leaky_relu])
@pytest.mark.parametrize("size", [1e-33, 1e-13, 1e13, 1e37])
def test_squares_beyond_float32(size: float, activation, form: str, monkeypatch):
    """The sums of tensors of any size are those of ordinary ones, in a unit."""
    if form == "portable":
        monkeypatch.setattr(native, "runs_here", lambda: False)
    y, y_hat = pair((500, 10))
    size = 2.0 ** round(math.log2(size))
    run = compare(activation)
    want_sums, want_mean, want_powers = run(y, y_hat)
    sums, mean, powers = run(y * np.float32(size), y_hat * np.float32(size))
    found = shift.Shift(*sums, unit=powers[2])
    want = shift.Shift(*want_sums).sums() * np.array([[size], [size**2], [1]])
    np.testing.assert_allclose(found.sums(), want, rtol=2e-4, atol=np.abs(want).max() * 1e-6)
    np.testing.assert_allclose(mean, np.float64(want_mean) * size, rtol=1e-3, atol=1.2e-38)
    np.testing.assert_allclose(
        shift.Powers.of(powers), np.float64(want_powers[:2]) * size**2, rtol=1e-5
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\), float32 \(4, 3\)"):
        native.differences(jnp.ones((3, 4)), jnp.ones((4, 3)), (0, 1))
    with pytest.raises(ValueError, match=r"bfloat16 \(3,\)"):
        native.differences(jnp.ones(3), jnp.ones(3), (0, 1), jnp.ones(3, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"\(\)"):
        native.differences(jnp.ones(()), jnp.ones(()), (0, 1))


def compare(activation):
    """`compare_outputs` of a site x @ w behind which `activation` follows, as a function."""
    params, x = {"w": np.ones((6, 10), np.float32)}, np.ones((4, 6), np.float32)
    graph = trace(lambda p, x: activation(x @ p["w"]), params, (x,))
    output = next(eqn for eqn in graph.equations if eqn.name == "dot_general").outputs[0]
    epilogue = Epilogue((), (), output, Channels((10,), (1,)), ())
    found = find_activation(graph, output)

    class Values:
        def __init__(self, y):
            self.graph, self._y = graph, y

        def read(self, var):
            return self._y

        wide = read

    return jax.jit(lambda y, y_hat: shift.compare_outputs(epilogue, found, Values(y), y_hat))


@pytest.mark.parametrize("activation", [lambda y: y, jax.nn.relu, jax.nn.relu6, jax.nn.silu])
def test_both_forms_give_the_same_sums(activation, monkeypatch):
    y, y_hat = pair((500, 10))
    run = compare(activation)
    assert "jaxquant_differences" in run.lower(y, y_hat).as_text()
    natively = run(y, y_hat)
    monkeypatch.setattr(native, "runs_here", lambda: False)
    run = compare(activation)
    assert "jaxquant_differences" not in run.lower(y, y_hat).as_text()
    for a, b in zip(jax.tree.leaves(natively), jax.tree.leaves(run(y, y_hat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (7, 1), (2, 9, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_powers_by_both_forms(shape, dtype, bad, monkeypatch):
    y, y_hat = (jnp.asarray(x, dtype) for x in pair(shape))
    y_hat = y_hat + bad
    natively = jax.jit(shift.powers)(y, y_hat)
    monkeypatch.setattr(native, "runs_here", lambda: False)
    portable = jax.jit(lambda *xs: shift.powers(*xs))(y, y_hat)
    both = (shift.Powers.of(x) for x in (natively, portable))
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_a_sharded_tensor_is_compared_where_its_parts_are():
    mesh = Mesh(np.array(jax.devices()), "d")
    y, y_hat = (
        jax.device_put(x, NamedSharding(mesh, PartitionSpec("d"))) for x in pair((8 * 50, 10))
    )
    run = compare(jax.nn.relu6)
    assert "jaxquant_differences" not in run.lower(y, y_hat).as_text()
    want = compare(jax.nn.relu6)(*map(np.asarray, (y, y_hat)))
    for a, b in zip(jax.tree.leaves(run(y, y_hat)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


def test_under_vmap():
    y, y_hat = pair((3, 40, 10))
    run = jax.jit(jax.vmap(lambda a, b: native.differences(a, b, (0.0, 6.0))))
    sums, _, powers = run(y, y_hat)
    for k in range(3):
        one = native.differences(jnp.asarray(y[k]), jnp.asarray(y_hat[k]), (0.0, 6.0))
        assert np.asarray(one.sums).tobytes() == np.asarray(sums[k]).tobytes()
        assert np.asarray(one.powers).tobytes() == np.asarray(powers[k]).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint8", "int32", "bool"])
def test_an_activation_that_ends_in_another_dtype(dtype):
    y, y_hat = pair((500, 10))
    run = compare(lambda y: jnp.minimum(jax.nn.relu(jnp.round(y)), 9.0).astype(dtype))
    sums, _, _ = run(y, y_hat)
    gain = [np.clip(np.round(x), 0, 9).astype(bool if dtype == "bool" else int) for x in (y, y_hat)]
    want, _ = reference(y, y_hat, np.subtract(*gain, dtype=np.float32))
    np.testing.assert_allclose(sums, want, rtol=1e-4, atol=1e-2)


def test_what_nobody_reads_bounds_nothing():
    def activation(y):
        jax.nn.relu(y)  # as `sow` does where nothing is collected
        return jnp.minimum(y, 6.0)

    y, y_hat = pair((500, 10))
    sums, _, _ = compare(activation)(y, y_hat)
    want, _ = reference(y, y_hat, np.minimum(y, 6) - np.minimum(y_hat, 6))
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-3)
