"""Calibration files: interrupted and resumed sweeps, reuse without data, refusals."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.calibration import resume
from tests.calibration.test_sweep import same

PARAMS = {"w": jnp.eye(4), "v": {"kernel": jnp.full((4, 2), 0.5)}}


def apply_fn(p, x):
    return jax.nn.relu(jax.nn.softmax(x @ p["w"]) + x) @ p["v"]["kernel"]


def batches(count=5):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(3, 4)).astype(np.float32) * (k + 1) for k in range(count)]


class Untouchable:
    """A data set that must not be read."""

    def __iter__(self):
        raise AssertionError("ds was read")


def interrupted(items, at, error=KeyboardInterrupt):
    """The items before `at`, then an interruption."""
    yield from items[:at]
    raise error


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calibration.safetensors"


calibrate = functools.partial(jaxquant.calibrate, progress=False)


def stop_after(path, count, **options):
    with pytest.raises(KeyboardInterrupt):
        calibrate(PARAMS, apply_fn, lambda: interrupted(batches(), count),
                  calibration_file=path, **options)  # fmt: skip


def assert_equal(a, b):
    same(a, b)
    assert (a.batches, a.samples, a.observer) == (b.batches, b.samples, b.observer)
    jax.tree.map(np.testing.assert_array_equal, a.examples, b.examples)
    jax.tree.map(np.testing.assert_array_equal, a.states, b.states)


@pytest.mark.parametrize("algo", ["KL", "avg"])
def test_a_resumed_sweep_gives_the_same_bits(path, algo, monkeypatch):
    whole = calibrate(PARAMS, apply_fn, batches(), algo=algo)
    stop_after(path, 2, algo=algo)
    stop_after(path, 4, algo=algo)
    ran = []
    add = resume.Sweep.add
    monkeypatch.setattr(resume.Sweep, "add", lambda self, x: (ran.append(1), add(self, x)))
    resumed = calibrate(PARAMS, apply_fn, batches(), algo=algo, calibration_file=path)
    assert len(ran) == 1  # the other four were read, not run
    assert_equal(resumed, whole)
    reused = calibrate(PARAMS, apply_fn, Untouchable(), algo=algo, calibration_file=path)
    assert_equal(reused, whole)


def test_another_algo_takes_the_file_and_leaves_ds_alone(path):
    options = {"progress": False, "calibration_file": path}
    jaxquant.quant_post(PARAMS, apply_fn, batches(), **options)
    for algo in ("mse", "abs_max"):
        reused = jaxquant.quant_post(PARAMS, apply_fn, Untouchable(), algo=algo, **options)
        by_path = jaxquant.quantize(PARAMS, apply_fn, path, algo=algo)
        direct = jaxquant.quant_post(PARAMS, apply_fn, batches(), algo=algo, progress=False)
        for qparams, qapply in (reused, by_path):
            assert qapply.plan == direct[1].plan
            jax.tree.map(np.testing.assert_array_equal, qparams, direct[0])


def test_an_observer_of_ones_own_comes_back(path):
    def make(factor):
        return jaxquant.Observer(
            init=lambda: {"largest": jnp.zeros(())},
            update=lambda state, x: {
                "largest": jnp.maximum(state["largest"], factor * jnp.max(jnp.abs(x)))
            },
            threshold=lambda states, levels: [s["largest"] for s in states],
        )

    whole = calibrate(PARAMS, apply_fn, batches(), algo=make(0.5), calibration_file=path)
    again = make(0.5)  # other functions that compute the same
    reused = calibrate(PARAMS, apply_fn, Untouchable(), algo=again, calibration_file=path)
    assert reused.observer is again
    jax.tree.map(np.testing.assert_array_equal, reused.states, whole.states)
    with pytest.raises(jaxquant.FileError, match=r"algo is 'custom'.*statistics of its own"):
        calibrate(PARAMS, apply_fn, batches(), algo=make(0.25), calibration_file=path)
    assert jaxquant.load_observations(path).states == {}
    loaded = jaxquant.load_observations(path, algo=again)
    assert float(loaded.states["w/input"]["largest"]) == float(whole.states["w/input"]["largest"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of the files of a sweep that is done and of one that was interrupted."""
    folder = tmp_path_factory.mktemp("files")
    calibrate(PARAMS, apply_fn, batches(3), calibration_file=folder / "done")
    stop_after(folder / "interrupted", 3)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def other_function(p, x):
    return jax.nn.gelu(x @ p["w"]) @ p["v"]["kernel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": PARAMS | {"w": 2 * jnp.eye(4)}}, r"params\['w'\].*with other values"),
        (
            {"params": PARAMS | {"v": {"kernel": jnp.ones((4, 3))}}},
            r"params\['v/kernel'\] is float32\[4,3\], in the file float32\[4,2\]",
        ),
        ({"params": PARAMS | {"b": jnp.ones(2)}}, r"params\['b'\] .*in the file missing"),
        ({"apply_fn": other_function}, "apply_fn computes something else"),
        ({"algo": "avg"}, "algo is 'avg', in the file 'KL', which keeps statistics of its own"),
        ({"is_full_quantize": True}, "holds nothing on.*is_full_quantize is True, in the file F"),
        ({"batch_nums": 2}, "batch_nums is 2, in the file None"),
        ({"select": 0}, "select is '0', in the file 'None'"),
    ],
)
@pytest.mark.parametrize("state", ["done", "interrupted"])
def test_a_file_of_something_else_is_refused_and_left_alone(path, files, change, message, state):
    path.write_bytes(files[state])
    arguments = {"params": PARAMS, "apply_fn": apply_fn} | change
    with pytest.raises(jaxquant.FileError, match=rf"calibration\.safetensors.*{message}"):
        calibrate(ds=batches(), calibration_file=path, **arguments)
    assert path.read_bytes() == files[state]


def test_quantize_refuses_a_path_of_another_model(path, files):
    path.write_bytes(files["done"])
    with pytest.raises(jaxquant.FileError, match=r"params\['w'\].*with other values"):
        jaxquant.quantize(PARAMS | {"w": 2 * jnp.eye(4)}, apply_fn, path)


def test_fewer_tensors_than_the_file_holds_are_served(path):
    full = calibrate(PARAMS, apply_fn, batches(2), is_full_quantize=True, calibration_file=path)
    seen = calibrate(PARAMS, apply_fn, Untouchable(), calibration_file=path)
    assert list(seen.tensors) == list(full.tensors)


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        (batches()[::-1], "batch 0 of ds is not the one"),
        ([*batches()[:2], *batches()[3:]], "batch 2 of ds is not the one"),
        (batches(1), "ds ended after 1 batches; .* has seen 3"),
    ],
    ids=["shuffled", "one left out", "cut short"],
)
def test_other_data_are_refused_on_resuming(path, files, ds, message):
    path.write_bytes(files["interrupted"])
    with pytest.raises(jaxquant.FileError, match=message):
        calibrate(PARAMS, apply_fn, ds, calibration_file=path)
    assert path.read_bytes() == files["interrupted"]


def test_a_generator_that_was_read_in_part_is_refused(path):
    items = iter(batches())
    with pytest.raises(ZeroDivisionError):
        calibrate(PARAMS, apply_fn, (x if k < 2 else 1 / 0 for k, x in enumerate(items)),
                  calibration_file=path)  # fmt: skip
    with pytest.raises(jaxquant.FileError, match="instead of a generator that was read"):
        calibrate(PARAMS, apply_fn, items, calibration_file=path)


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_batch_that_is_not_finite_stays_out_of_the_file(path, bad):
    broken = batches()
    broken[bad] = broken[bad] * np.nan
    with pytest.raises(ValueError, match=f"NaN or infinity in batch {bad}"):
        calibrate(PARAMS, apply_fn, broken, calibration_file=path)
    mended = calibrate(PARAMS, apply_fn, batches(), calibration_file=path)
    assert_equal(mended, calibrate(PARAMS, apply_fn, batches()))


def test_the_file_is_written_now_and_then_without_an_interruption(path, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(resume.time, "monotonic", lambda: next(clock))
    written = []
    write = resume.observations_file.write
    monkeypatch.setattr(
        resume.observations_file, "write", lambda *a: (written.append(a[1].batches), write(*a))
    )
    calibrate(PARAMS, apply_fn, batches(), calibration_file=path)
    assert written == [1, 3, 5, 5]  # the last one is of the finished sweep


def test_a_path_that_cannot_be_written_is_an_error_before_the_sweep(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        calibrate(PARAMS, apply_fn, Untouchable(), calibration_file=tmp_path / "no" / "file")


def test_a_file_of_an_interrupted_sweep_is_not_taken_for_a_whole_one(path, files):
    path.write_bytes(files["interrupted"])
    for use in (
        lambda: jaxquant.load_observations(path),
        lambda: jaxquant.quantize(PARAMS, apply_fn, path),
    ):
        with pytest.raises(jaxquant.FileError, match="interrupted after 3 batches"):
            use()


@pytest.mark.slow
def test_another_process_makes_the_same_fingerprint(path, tmp_path):
    code = (
        "import sys; from tests.calibration import test_resume as t\n"
        "t.calibrate(t.PARAMS, t.apply_fn, t.batches(), calibration_file=sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    calibrate(PARAMS, apply_fn, Untouchable(), calibration_file=path)
