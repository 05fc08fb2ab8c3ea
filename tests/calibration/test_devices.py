"""Calibration and the int8 model over a mesh of eight devices, and over two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant
from tests import networks

DEVICES = 8
PROCESSES = 2
SAMPLES = np.random.default_rng(0).normal(size=(48, 8, 8, 3)).astype(np.float32)


def exact_net(params, x):
    """Sums of whole numbers are exact, whatever the order in which devices add them."""
    x = jax.lax.conv(x, params["conv"], (1, 1), "SAME")
    x = jax.nn.relu(x).reshape(len(x), -1)
    return jax.nn.relu(x @ params["hidden"]) @ params["head"]


def whole_numbers(shape, seed=0, most=3):
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.float32)


def test_what_comes_back_from_devices_is_statistics(monkeypatch):
    """Neither inputs nor activations: no array of as many values as one of them has."""
    fetched, kind = [], type(jnp.zeros(1))
    whole, value = kind.__array__, kind._value

    def noting(x, *args, **kwargs):
        fetched.append(x.shape)
        return whole(x, *args, **kwargs)

    monkeypatch.setattr(kind, "__array__", noting)
    monkeypatch.setattr(
        kind, "_value", property(lambda x: (fetched.append(x.shape), value.fget(x))[1])
    )
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    split, copied = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    params = {"conv": (4, 3, 3, 3), "head": (4, 5)}
    params = {name: jax.device_put(whole_numbers(shape), copied) for name, shape in params.items()}

    def apply_fn(params, x):
        x = jax.nn.relu(jax.lax.conv(x, params["conv"], (1, 1), "SAME"))
        return x.mean((2, 3)) @ params["head"]

    batch = jax.device_put(whole_numbers((16, 3, 16, 16), 1), split)
    jaxquant.quant_post(params, apply_fn, [batch, batch], progress=False)
    assert max(np.prod(shape) for shape in fetched) <= 2 * 2048 < batch.size  # histograms


def test_eight_devices_give_the_thresholds_and_the_results_of_one():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    split, copied = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    shapes = {"conv": (8, 3, 3, 3), "hidden": (8 * 4 * 4, 16), "head": (16, 5)}
    params = {name: whole_numbers(shape, most=2) for name, shape in shapes.items()}
    # Output channels of the convolution and rows of the dots, over which the sums then go.
    places = dict.fromkeys(shapes, split)
    spread = {name: jax.device_put(params[name], places[name]) for name in shapes}
    assert not any(x.is_fully_replicated for x in spread.values())
    whole = [whole_numbers((16, 3, 4, 4), 1), whole_numbers((32, 3, 4, 4), 2)]
    shards = [jax.device_put(batch, split) for batch in whole]
    seen = [
        jaxquant.calibrate(p, exact_net, ds, progress=False)
        for p, ds in ((params, whole), (spread, shards))
    ]
    for name, stats in seen[0].tensors.items():
        other = seen[1].tensors[name]
        assert np.array_equal(stats.counts, other.counts)
        assert (stats.bin_width, stats.min, stats.max) == (other.bin_width, other.min, other.max)
    (_, qapply), (qparams, other) = (
        jaxquant.quantize(p, exact_net, found) for p, found in zip((params, spread), seen)
    )
    assert qapply.plan == other.plan
    want = qapply(jax.device_get(qparams), whole[0])
    for place in (copied, split):  # the int8 weights on every device, or spread over them
        arrays = jax.tree.map(
            lambda x, to=place: jax.device_put(x, to if x.ndim > 1 and x.shape[0] % 8 == 0
                                               else copied), qparams
        )  # fmt: skip
        got = jax.jit(other)(arrays, shards[0])
        assert len(got.sharding.device_set) == DEVICES
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def scanned_net(params, x):
    """Layers that are scanned and a loop over one weight; of whole numbers, so that it is exact."""
    x = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["layers"])[0]
    start = jnp.zeros((), jnp.int32), x
    step = lambda carry: (carry[0] + 1, jax.nn.relu(carry[1] @ params["again"]))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0] < 2, step, start)[1]


def test_a_scanned_model_is_observed_alike_on_many_devices():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(2, -1), ("data", "model"))
    params = {"layers": whole_numbers((3, 8, 8), most=1), "again": whole_numbers((8, 8), most=1)}
    places = {"layers": PartitionSpec(None, None, "model"), "again": PartitionSpec("model")}
    spread = {
        name: jax.device_put(x, NamedSharding(mesh, places[name])) for name, x in params.items()
    }
    batch = whole_numbers((16, 8), 1)
    shards = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    alone, together = (
        jaxquant.calibrate(p, scanned_net, [x], progress=False).tensors
        for p, x in ((params, batch), (spread, shards))
    )
    assert sorted(alone) == ["again/input", *(f"layers/input[{n}]" for n in range(3))]
    for name, stats in alone.items():
        np.testing.assert_array_equal(stats.counts, together[name].counts)
        assert (stats.min, stats.max) == (together[name].min, together[name].max)


WORKER = """
import sys
import jax, numpy as np
port, count, index, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"localhost:{port}", count, index)
import jaxquant
from tests import networks
from tests.calibration.test_devices import SAMPLES, parts
observations = jaxquant.calibrate(
    networks.plain_params(), networks.plain_net, parts(index), progress=False)
qparams, qapply = jaxquant.quantize(networks.plain_params(), networks.plain_net, observations)
open(out, "w").write(f"{observations.samples} {observations.batches}\\n{qapply.plan.to_json()}")
np.save(out + ".npy", np.asarray(qapply(qparams, SAMPLES[:4])))
try:
    jaxquant.calibrate(
        networks.plain_params(), networks.plain_net, parts(index), algo="avg", progress=False)
except ValueError as error:
    assert "reduced across processes" in str(error)
else:
    raise AssertionError("avg was not refused")
"""


def parts(index: int) -> list[np.ndarray]:
    """The batches of one of two processes: of another number, the last of another size."""
    return [SAMPLES[:16], SAMPLES[16:32]] if index == 0 else [SAMPLES[32:44], SAMPLES[44:]]


def run_processes(code: str, arguments) -> None:
    """Run `code` in processes that find each other, each with an argument of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("XLA_FLAGS", None)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(len(arguments)), str(index), str(argument)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, argument in enumerate(arguments)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), errors


@pytest.mark.optimized  # as the other processes are
def test_two_processes_give_what_one_does(tmp_path):
    outputs = [tmp_path / f"plan{index}" for index in range(PROCESSES)]
    run_processes(WORKER, outputs)
    observations = jaxquant.calibrate(
        networks.plain_params(),
        networks.plain_net,
        [*parts(0), *parts(1)],
        progress=False,
    )
    qparams, qapply = jaxquant.quantize(networks.plain_params(), networks.plain_net, observations)
    for out in outputs:
        head, _, plan = out.read_text().partition("\n")
        assert head == "48 4"
        assert plan == qapply.plan.to_json()
    results = [np.load(f"{out}.npy") for out in outputs]
    assert np.array_equal(*results)
    assert jnp.isfinite(results[0]).all()
    # One process keeps examples of all the data, two those of the first alone.
    np.testing.assert_allclose(results[0], qapply(qparams, SAMPLES[:4]), atol=0.05)


DIFFERING = """
import os, sys, time
import jax, numpy as np
port, count, index, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"localhost:{port}", count, index)
import jaxquant
from jaxquant.calibration import processes
from tests import networks
from tests.calibration.test_devices import parts

def message(params, file=None):
    try:
        jaxquant.calibrate(
            params, networks.plain_net, parts(index), calibration_file=file, progress=False)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""

params = networks.plain_params()
others = jax.tree.map(lambda x: x * 2, params) if index else params
assert "] of process 1 is not that of process 0" in message(others)
assert message(params, file) == ""
if index:
    os.remove(file)
found = message(params, file)
assert "process 0 are complete, those of process 1 are missing" in found, found
if index == 0:
    processes._PATIENCE = 2.0
    found = message(params)
    assert "process 1 of 2 did not begin to calibrate within 2 seconds" in found, found
    open(file + ".done", "w").close()
while not os.path.exists(os.path.join(os.path.dirname(file), "seen0.done")):
    time.sleep(0.1)
os._exit(0)  # without the farewell that waits for the other
"""


def test_processes_that_differ_are_named(tmp_path):
    run_processes(DIFFERING, [tmp_path / f"seen{index}" for index in range(PROCESSES)])
