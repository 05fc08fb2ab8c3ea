"""The file of observations: round trips, and everything that is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.calibration import observations_file as of
from jaxquant.files import atomic, safetensors
from tests.calibration.test_sweep import same

PARAMS = {"w": jnp.eye(4)}


def apply_fn(p, inputs, scale):
    return (inputs["x"][0] * scale @ p["w"], inputs["x"][1])


@pytest.fixture(scope="module")
def observations():
    x = np.linspace(-1, 2, 24, dtype=np.float32).reshape(6, 4)
    item = ({"x": [x, np.arange(6, dtype=np.int32)], "none": None}, jnp.float32(2))
    return jaxquant.calibrate(PARAMS, apply_fn, [item, item], algo="avg", progress=False)


@pytest.fixture
def path(tmp_path, observations):
    path = tmp_path / "observations"
    jaxquant.save_observations(path, observations)
    return path


def test_what_is_loaded_is_what_was_saved(path, observations):
    loaded = jaxquant.load_observations(path, algo=observations.observer)
    same(loaded, observations)
    assert loaded.origin == observations.origin
    assert (loaded.batches, loaded.samples) == (2, 12)
    assert jax.tree.structure(loaded.examples) == jax.tree.structure(observations.examples)
    jax.tree.map(np.testing.assert_array_equal, loaded.examples, observations.examples)
    assert jax.tree.structure(loaded.states) == jax.tree.structure(dict(observations.states))
    jax.tree.map(np.testing.assert_array_equal, loaded.states, dict(observations.states))
    plan = jaxquant.quantize(PARAMS, apply_fn, loaded, algo="avg")[1].plan
    assert plan == jaxquant.quantize(PARAMS, apply_fn, observations, algo="avg")[1].plan


def test_inputs_of_unknown_containers_are_refused(tmp_path):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Box:
        x: jax.Array

    with pytest.raises(ValueError, match="this model takes a Box"):
        jaxquant.calibrate(
            PARAMS, lambda p, b: b.x @ p["w"], [(Box(jnp.ones((2, 4))),)], progress=False,
            calibration_file=tmp_path / "f",
        )  # fmt: skip


def test_every_damage_is_refused(path, rng):
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(jaxquant.FileError, match=path.name):
            jaxquant.load_observations(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(jaxquant.FileError, match="1 bytes follow"):
        jaxquant.load_observations(path)
    for place in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(jaxquant.FileError, match=path.name):
            jaxquant.load_observations(path)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (of.FORM._replace(version="2"), "format version '2'; this release of jaxquant reads '1'"),
        (of.FORM._replace(name="jaxquant"), "not a calibration file of jaxquant"),
    ],
)
def test_another_version_and_another_kind_are_refused(path, form, message):
    tensors, metadata, _ = safetensors.read(path, of.FORM)
    text = {"calibration": metadata["calibration"]}
    atomic.write_file(path, safetensors.chunks(_data(tensors), text, form))
    with pytest.raises(jaxquant.FileError, match=message):
        jaxquant.load_observations(path)


def _data(tensors):
    return {k: v for k, v in tensors.items() if k != safetensors.SEAL}


def _negative(tensors, record):
    tensors["counts"] = tensors["counts"].copy()
    tensors["counts"][0, 0] = -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_negative, "statistics of tensor 'w/input' do not fit"),
        (lambda t, r: t.update(bin_width=t["bin_width"] * 1.5), "do not fit together"),
        (lambda t, r: t.update(max=t["max"] + 1), "do not fit together"),
        (lambda t, r: t.pop("min"), "'min' is missing"),
        (lambda t, r: t.update(more=np.zeros(1)), r"unknown tensors \['more'\]"),
        (lambda t, r: t.pop("examples/0/1"), "damaged"),
        (lambda t, r: t.pop("states/0/1"), "not of this observer"),
        (lambda t, r: r.update(tensors=["a", "a"]), "not distinct"),
        (lambda t, r: r.update(batches="2"), "is no int"),
        (lambda t, r: r.pop("origin"), "origin"),
        (lambda t, r: r["origin"].update(more=1), "more"),
        (lambda t, r: r["origin"]["params"].update(w=3), "is no str"),
        (lambda t, r: r.update(inputs={"set": []}), "set"),
        (lambda t, r: r.update(done=False), "'batches' is missing"),
    ],
)
def test_a_sealed_file_whose_parts_do_not_fit_is_refused(path, observations, change, message):
    tensors, metadata, _ = safetensors.read(path, of.FORM)
    tensors, record = _data(tensors), json.loads(metadata["calibration"])
    change(tensors, record)
    text = {"calibration": json.dumps(record)}
    atomic.write_file(path, safetensors.chunks(tensors, text, of.FORM))
    with pytest.raises(jaxquant.FileError, match=message):
        jaxquant.load_observations(path, algo=observations.observer)
