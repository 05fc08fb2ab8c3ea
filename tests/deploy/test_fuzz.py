"""Mutated files: each is refused with a clear error, or loads to exactly the saved bits."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import jaxquant
from jaxquant.deploy.saved import FORMAT
from jaxquant.files import packing
from jaxquant.files import safetensors as container
from jaxquant.files.errors import FileError
from tests.deploy.models import same_bits, small, small_file
from tests.files.test_safetensors import header_of, reseal

FEW, MANY = 300, 10_000
HOSTILE = ("/etc/passwd", "../../x", "params/../x", "C:\\x", "params//x", "~", "a\0b", "", ".")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    return small_file(tmp_path_factory.mktemp("model")).read_bytes()


def flip(raw: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 2, 8))):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)


def overwrite(raw: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(raw))
    raw[start : start + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(64))


def cut(raw: bytearray, draw: random.Random) -> None:
    del raw[draw.randrange(len(raw)) :]


def extend(raw: bytearray, draw: random.Random) -> None:
    raw += draw.randbytes(draw.randrange(1, 100))


def swap_pieces(raw: bytearray, draw: random.Random) -> None:
    size = draw.randrange(1, 200)
    a, b = (draw.randrange(len(raw) - size) for _ in range(2))
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]


def swap_tensors(raw: bytearray, draw: random.Random) -> None:
    """Two tensors change places in the data; the header stays."""
    header, start = header_of(raw), 8 + struct.unpack_from("<Q", raw)[0]
    names = [n for n in header if n != "__metadata__"]
    (a, b), (c, d) = sorted(header[n]["data_offsets"] for n in draw.sample(names, 2))
    first, second = raw[start + a : start + b], raw[start + c : start + d]
    raw[start + c : start + d] = first
    raw[start + a : start + b] = second


def edit_header(raw: bytearray, draw: random.Random) -> None:
    """The header says something else; the checksums are the old ones."""
    header, length = header_of(raw), struct.unpack_from("<Q", raw)[0]
    edit(header, draw)
    text = json.dumps(header).encode()
    raw[: 8 + length] = struct.pack("<Q", len(text)) + text


def edit(value, draw: random.Random) -> None:
    """Change one thing, anywhere in a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and draw.random() < 0.8:
            value = value[key]
            continue
        break
    new = draw.choice((None, -1, 0, 2**60, 1.5, "", "x", [], {}, True, [[]], "../x", 2**31))
    action = draw.randrange(4)
    if action == 0:
        value[key] = new
    elif action == 1:
        del value[key]
    elif isinstance(value, dict):
        value[draw.choice(HOSTILE)] = value.pop(key) if action == 2 else new
    else:
        value.append(new)


def load_or_refuse(path):
    """The loaded model; None where it is refused with an error that names the file."""
    try:
        return jaxquant.load_quantized_model(path)
    except FileError as error:
        if str(path) not in str(error):
            raise
    return None


MUTATIONS = (flip, overwrite, cut, extend, swap_pieces, swap_tensors, edit_header)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_load_to_the_saved_bits(saved, count, tmp_path):
    draw, path = random.Random(1), tmp_path / "mutated"
    same = 0
    for number in range(count):
        raw = bytearray(saved)
        MUTATIONS[number % len(MUTATIONS)](raw, draw)
        path.write_bytes(raw)
        loaded = load_or_refuse(path)
        if loaded is not None:
            assert same_bits(loaded[0], small()[0])
            same += 1
    assert same < count / 10


def tampered(raw: bytes, draw: random.Random) -> bytes:
    """Another file whose checksums are right."""
    part = draw.choice(["header", "plan", "report", "graph"])
    if part != "header":
        return with_part(raw, part, lambda data: edit(data, draw))
    header = header_of(raw)
    edit(header, draw)
    return reseal(raw, header)


def with_part(raw: bytes, part: str, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with one of its JSON parts changed in place, and right checksums."""
    header, length = header_of(raw), struct.unpack_from("<Q", raw)[0]
    pieces = {
        name: raw[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]]
        for name, entry in header.items()
        if name not in ("__metadata__", container.SEAL)
    }
    name = f"jaxquant/{part}.json"
    data = json.loads(packing.unpack(np.frombuffer(pieces[name], np.uint8), name, 2**28))
    change(data)
    pieces[name] = packing.pack(json.dumps(data).encode()).tobytes()
    offset, body = 0, b""
    for key, piece in pieces.items():
        header[key]["data_offsets"] = [offset, offset + len(piece)]
        if key == name:
            header[key]["shape"] = [len(piece)]
        body += piece
        offset += len(piece)
    header[container.SEAL]["data_offsets"] = [offset, offset + 32]
    return reseal(raw, header, body)


def test_a_mode_that_is_not_known_is_refused(saved, tmp_path):
    raw = with_part(saved, "plan", lambda plan: plan.update(mode="ternary"))
    with pytest.raises(FileError, match="mode is 'ternary', not one of static"):
        jaxquant.load_quantized_model(_written(tmp_path / "model", raw))


@pytest.mark.parametrize("count", [FEW // 3, pytest.param(MANY // 5, marks=pytest.mark.slow)])
def test_tampering_with_right_checksums_is_refused_or_harmless(saved, count, tmp_path):
    """Checksums do not stop who can compute them; the structure is checked all the same."""
    draw, path = random.Random(2), tmp_path / "tampered"
    loaded = 0
    for _ in range(count):
        try:
            raw = tampered(saved, draw)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # the header is too far gone to compute checksums for
        path.write_bytes(raw)
        found = load_or_refuse(path)
        if found is not None:
            loaded += 1
            str(found[1].report()), found[1].plan.to_json()
            assert same_bits(found[0], small()[0])  # the arrays were not touched
    assert loaded < count * 0.75


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
