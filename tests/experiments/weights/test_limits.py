"""Weight files that ask for more than they hold, in every format."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest

from experiments.weights import limits
from experiments.weights.formats import read
from experiments.weights.tree import WeightsError


def npy(shape, dtype="<f4"):
    return (
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", 118)
        + (
            f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        ).encode()
    )


def npz(contents):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", contents)
    return out.getvalue()


def safetensors(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape, offsets=(0, 0), dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def manifest(shape, **more):
    weight = {"name": "a", "dtype": "float32", "shape": shape, **more}
    return json.dumps({"weightsManifest": [{"paths": [], "weights": [weight]}]}).encode()


BOMB = b"[" + b"[]," * limits.MAX_JSON_VALUES + b"[]]"
FILES = {
    "shape of terabytes.npz": npz(npy("(1099511627776,)")),
    "hidden by a zero.npz": npz(npy("(4611686018427387904, 4611686018427387904, 0)")),
    "negative.npz": npz(npy("(-1,)")),
    "objects.npz": npz(npy("(1,)", "|O")),
    "other version.npz": npz(b"\x93NUMPY\x09\x00"),
    "no numpy.npz": npz(b"x"),
    "hidden by a zero.safetensors": safetensors(entry([2**47, 2**47, 0])),
    "not numbers.safetensors": safetensors(entry(["x"])),
    "truth.safetensors": safetensors(entry([True], (0, 4))),
    "fraction.safetensors": safetensors(entry([0], (0.0, 0.5))),
    "deep.safetensors": struct.pack("<Q", 10**6) + b"[" * 10**6,
    "many.safetensors": struct.pack("<Q", len(BOMB)) + BOMB,
    "list.safetensors": safetensors([]),
    "negative.json": manifest([-1]),
    "no shape.json": manifest(None),
    "quantized by nothing.json": manifest([0], quantization={"dtype": "uint8", "scale": "x"}),
    "many.json": BOMB,
    "deep.json": b"[" * 10**6,
}


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_refused_and_named(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    with pytest.raises(WeightsError, match=name):
        read(path)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(10**6))
    assert read(tmp_path / "a.npz")["a"].size == 10**6
    monkeypatch.setattr(limits, "MAX_BYTES", 10**6)
    with pytest.raises(WeightsError, match="take more than 1000000 bytes"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth", "json", "h5"])
def test_a_file_that_is_too_large_is_not_read(suffix, tmp_path, monkeypatch):
    if suffix == "h5":
        pytest.importorskip("h5py")
    monkeypatch.setattr(limits, "MAX_BYTES", 100)
    (tmp_path / f"a.{suffix}").write_bytes(b"x" * 101)
    with pytest.raises(WeightsError, match=rf"a\.{suffix}"):
        read(tmp_path / f"a.{suffix}")


def test_hdf5_arrays_that_take_no_room_in_the_file_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("layer/kernel", (2**20, 2**20), "f4", chunks=(1, 1024))
    with pytest.raises(WeightsError, match="take more than"):
        read(tmp_path / "a.h5")
    (tmp_path / "secret").write_bytes(b"1234")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        outside = [(str(tmp_path / "secret"), 0, 4)]
        file.create_dataset("layer/kernel", (4,), "u1", external=outside)
    with pytest.raises(WeightsError, match="arrays of other files"):
        read(tmp_path / "b.h5")
