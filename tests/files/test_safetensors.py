"""The sealed safetensors file."""

import hashlib
import json
import os
import struct
import sys
import zlib

import ml_dtypes
import numpy as np
import pytest

from jaxquant.files import safetensors as container
from jaxquant.files.errors import FileError

FORM = container.Format("jaxquant test", "1", "a file of this test")


def contents(tensors, metadata=None) -> bytes:
    return b"".join(bytes(c) for c in container.chunks(tensors, metadata or {}, FORM))


def write(path, tensors, metadata=None):
    path.write_bytes(contents(tensors, metadata))
    return path


def reseal(raw: bytes, header=None, data=None) -> bytes:
    """A file with another header or data, whose checksums are right: what tampering would give."""
    (length,) = struct.unpack_from("<Q", raw)
    old = json.loads(raw[8 : 8 + length])
    header = old if header is None else header
    body = raw[8 + length : -32] if data is None else data
    sums = []
    for name, entry in header.items():
        if name in ("__metadata__", container.SEAL):
            continue
        start, end = entry["data_offsets"]
        sums.append(f"{zlib.crc32(body[start:end]):08x}")
    header["__metadata__"]["crc32"] = " ".join(sums)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text + body
    return head + hashlib.sha256(head).digest()


def header_of(raw: bytes):
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length])


TENSORS = {
    "params/a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "params/b": np.array(-7, np.int8),
    "params/empty": np.zeros((0, 3), np.int32),
    "params/bool": np.array([True, False]),
    "params/bf16": np.array([1.5, -2], ml_dtypes.bfloat16),
    "params/wide": np.arange(3, dtype=">i8"),
    "params/wave": np.array([1 + 2j, -3j], np.complex64),
}


def test_arrays_come_back_to_the_bit(tmp_path):
    path = write(tmp_path / "f", TENSORS, {"jax": "1"})
    tensors, metadata, digest = container.read(path, FORM)
    assert set(tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].shape == array.shape
        assert tensors[name].dtype == array.dtype.newbyteorder("<")
        assert tensors[name].tolist() == array.tolist()
    assert metadata["jax"] == "1"
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_arrays_are_aligned():
    entries = header_of(contents(TENSORS))
    del entries["__metadata__"]
    for entry in entries.values():
        assert entry["data_offsets"][0] % container.DTYPES[entry["dtype"]].itemsize == 0


def test_the_safetensors_library_reads_it(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    path = write(tmp_path / "f", {k: v for k, v in TENSORS.items() if k != "params/bf16"})
    found = library.load_file(path)
    assert found["params/a"].tolist() == TENSORS["params/a"].tolist()


@pytest.mark.parametrize("dtype", ["complex128", "datetime64[s]", "U3", "object"])
def test_dtypes_without_a_form_are_refused(dtype):
    with pytest.raises(ValueError, match=r"params/x.*cannot hold"):
        contents({"params/x": np.zeros(2, dtype)})


def test_every_flipped_bit_is_refused(tmp_path):
    raw = contents({"params/a": np.arange(3, dtype=np.float32)})
    path = tmp_path / "f"
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(FileError):
            container.read(path, FORM)


def test_every_truncation_is_refused(tmp_path):
    raw = contents(TENSORS)
    path = tmp_path / "f"
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(FileError):
            container.read(path, FORM)


def test_damage_is_located(tmp_path):
    raw = bytearray(contents(TENSORS))
    start, _ = header_of(raw)["params/a"]["data_offsets"]
    raw[8 + struct.unpack_from("<Q", raw)[0] + start + 5] ^= 4
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(FileError, match=r"f: damaged: the checksum of 'params/a' does"):
        container.read(tmp_path / "f", FORM)


EDITS = {
    "version '2'": lambda h: h["__metadata__"].update(format_version="2"),
    "not a file of this test": lambda h: h["__metadata__"].update(format="pt"),
    "unknown dtype": lambda h: h["params/a"].update(dtype="F31"),
    "does not take 24 bytes": lambda h: h["params/a"].update(shape=[2, 4]),
    "shape or offsets": lambda h: h["params/a"].update(shape=[2, -3]),
    "header entry": lambda h: h["params/a"].update(path="/etc/passwd"),
    "starts at": lambda h: h["params/a"].update(data_offsets=[8, 32]),
    "name '/etc/passwd' is not valid": lambda h: h.update({"/etc/passwd": h.pop("params/a")}),
    "'../x' is not valid": lambda h: h.update({"../x": h.pop("params/a")}),
    "'params/../../x' is not valid": lambda h: h.update({"params/../../x": h["params/b"]}),
    "does not end with": lambda h: h.pop(container.SEAL),
    "'params/a': its shape": lambda h: h["params/a"].update(shape=[2**47, 2**47, 0]),
    "'params/empty': its shape": lambda h: h["params/empty"].update(shape=[2**31, 2**31, 0]),
    "too long or too deep": lambda h: h.update({"params" + "/a" * 3000: h.pop("params/a")}),
}


@pytest.mark.parametrize("message", EDITS)
def test_edited_headers_are_refused_with_right_checksums(message, tmp_path):
    raw = contents(TENSORS)
    header = header_of(raw)
    EDITS[message](header)
    (tmp_path / "f").write_bytes(reseal(raw, header))
    with pytest.raises(FileError, match=message):
        container.read(tmp_path / "f", FORM)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{}", "not a file of this test"),
        (b"[]", "no JSON object"),
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":NaN}', "NaN"),
        (b"[" * 100_000, "nested 100000 deep"),
        (b'{"a":[' + b"[]," * 3_000_000 + b"[]]}", "6000003 values"),
        (b'{"a":1e999}', "not finite"),
        (b'{"a":"\\ud800"}', "damaged"),
        (b"\xff\xfe", "damaged"),
        (b'{"a":' + b"9" * 10_000 + b"}", "damaged"),
    ],
)
def test_hostile_headers_are_refused(text, message, tmp_path):
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(FileError, match=message):
        container.read(tmp_path / "f", FORM)


@pytest.mark.parametrize("length", [2**62, 2**32, container.MAX_HEADER_BYTES + 1, 500])
def test_headers_longer_than_the_file_or_the_limit_are_refused(length, tmp_path):
    (tmp_path / "f").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(FileError, match="header"):
        container.read(tmp_path / "f", FORM)


def test_oversized_files_are_refused_unread(tmp_path, monkeypatch):
    path = write(tmp_path / "f", TENSORS)
    monkeypatch.setattr(container, "MAX_FILE_BYTES", 100)
    with pytest.raises(FileError, match="at most 100"):
        container.read(path, FORM)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space")
def test_a_file_that_is_larger_than_memory_is_refused(tmp_path):
    """A sparse file takes no room on the disk; its header says how much data is to come."""
    header = header_of(contents({"params/a": np.zeros(8, np.uint8)}))
    size = 2**36 - 2**20
    header["params/a"] = {"dtype": "U64", "shape": [2**17, 2**16 - 1], "data_offsets": [0, size]}
    header[container.SEAL]["data_offsets"] = [size, size + 32]
    text = json.dumps(header).encode()
    with open(tmp_path / "f", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size + 32)
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**35, limit[1]))
    try:
        with pytest.raises(FileError, match="does not fit into memory"):
            container.read(tmp_path / "f", FORM)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    with pytest.raises(FileError, match="not a plain file"):
        container.read(tmp_path, FORM)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileError, match="not a plain file"):
            container.read(tmp_path / "pipe", FORM)


def test_bools_other_than_0_and_1_are_refused(tmp_path):
    raw = contents({"params/b": np.array([True])})
    (tmp_path / "f").write_bytes(reseal(raw, data=b"\x02"))
    with pytest.raises(FileError, match="neither 0 nor 1"):
        container.read(tmp_path / "f", FORM)
