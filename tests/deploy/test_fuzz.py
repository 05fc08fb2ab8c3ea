"""Mutated files: each is refused with a clear error, or gives what was saved.

The readers run in processes of their own, with limits of memory and time, see `tests.fuzzing`.
"""

import sys

import pytest

import jaxquant
from jaxquant.deploy.saved import FORMAT
from jaxquant.files import safetensors as container
from jaxquant.files.errors import FileError
from tests.deploy.models import SHAPE, small_file
from tests.experiments.weights import test_torch_pth as checkpoints
from tests.files.test_safetensors import header_of, reseal
from tests.fuzzing import GOOD, survey
from tests.mutations import with_part
from tests.networks import images, plain_net, plain_params

FEW, MANY = 60, 3000
needs_limits = pytest.mark.skipif(
    sys.platform != "linux", reason="other systems do not limit address space"
)
fake_torch = checkpoints.fake_torch
arrays = checkpoints.arrays


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    return small_file(tmp_path_factory.mktemp("model")).read_bytes()


@pytest.fixture
def bases(tmp_path, fake_torch, arrays):
    """A good file of every kind."""
    observed = jaxquant.calibrate(plain_params(), plain_net, [images(0, SHAPE)], progress=False)
    jaxquant.save_observations(tmp_path / "observations", observed)
    checkpoints.write_zip(tmp_path / "zip", *checkpoints.fake(arrays))
    checkpoints.write_stream(tmp_path / "stream", *checkpoints.fake(arrays))
    model, calibration = small_file(tmp_path), tmp_path / "observations"
    return {
        "models": model,
        "tampered": model,
        "graphs": model,
        "observations": calibration,
        "records": calibration,
        "pth": tmp_path / "zip",
        "stream": tmp_path / "stream",
    }


@needs_limits
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_read_as_they_were(bases, count):
    for kind, found in survey(bases, count).items():
        print(kind, dict(found))
        assert set(found) <= GOOD, (kind, found)
        assert found["refused"] > count / 5, (kind, found)
        if kind in ("models", "observations"):  # what is sealed is damaged or whole
            assert found["same"] < count / 10, (kind, found)


def test_a_mode_that_is_not_known_is_refused(saved, tmp_path):
    raw = with_part(saved, "plan", lambda plan: plan.update(mode="ternary"))
    with pytest.raises(FileError, match="mode is 'ternary', not one of static"):
        jaxquant.load_quantized_model(_written(tmp_path / "model", raw))


def test_a_known_sha256_stops_tampering(saved, tmp_path):
    known = container.read(_written(tmp_path / "a", saved), FORMAT)[2]
    jaxquant.load_quantized_model(tmp_path / "a", sha256=known.upper())
    header = header_of(saved)
    header["__metadata__"]["jax"] = "0.0"
    path = _written(tmp_path / "b", reseal(saved, header))
    jaxquant.load_quantized_model(path)
    with pytest.raises(FileError, match="SHA-256 is"):
        jaxquant.load_quantized_model(path, sha256=known)


def _written(path, raw):
    path.write_bytes(raw)
    return path
