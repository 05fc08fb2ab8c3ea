"""What happens to a file: damage, and tampering by someone who can compute its checksums."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxquant.files import packing
from jaxquant.files import safetensors as container
from tests.files.test_safetensors import header_of, reseal

HOSTILE = ("/etc/passwd", "../../x", "params/../x", "C:\\x", "params//x", "~", "a\0b", "", ".")
HUGE = (2**31, 2**47, 2**60, 2**63 - 1, 10**30, -(2**63), 1e308)


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
    size = draw.randrange(1, min(200, len(raw) // 2))
    a, b = (draw.randrange(len(raw) - size) for _ in range(2))
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]


def repeat(raw: bytearray, draw: random.Random) -> None:
    """A piece is there many times: what makes containers deep, and lists long."""
    start = draw.randrange(len(raw))
    piece = raw[start : start + draw.choice((1, 1, 2, 3, 8))]
    raw[start:start] = piece * draw.choice((2, 100, 100_000))


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


RAW = (flip, overwrite, cut, extend, swap_pieces, repeat)
MUTATIONS = (*RAW, swap_tensors, edit_header)


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """A sealed file after damage."""
    found = bytearray(raw)
    draw.choice(MUTATIONS)(found, draw)
    return bytes(found)


def edit(value: Any, draw: random.Random) -> None:
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
    plain = (None, -1, 0, 1, 2, 1.5, "", "x", [], {}, True, [[]], "../x", "nan", "batch*9")
    new = draw.choice((*plain, *HUGE, [0] * 1000, {"size": "batch"}, {"body": 0}))
    action = draw.randrange(6)
    if action == 0:
        value[key] = new
    elif action == 1:
        del value[key]
    elif action == 2 and isinstance(value[key], int):
        value[key] += draw.choice((-1, 1, 7))
    elif action == 3 and isinstance(value, list):
        value[key], value[0] = value[0], value[key]
    elif isinstance(value, dict):
        value[draw.choice(HOSTILE)] = value.pop(key) if action == 4 else new
    else:
        value.append(new)


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


def tampered_model(raw: bytes, draw: random.Random) -> bytes:
    """A model whose header, plan or report is another one, with right checksums."""
    part = draw.choice(("header", "plan", "report"))
    if part != "header":
        return with_part(raw, part, lambda data: edit(data, draw))
    return _with_header(raw, lambda header: edit(header, draw), draw)


def tampered_graph(raw: bytes, draw: random.Random) -> bytes:
    """A model whose graph is another one, with right checksums."""

    def change(data: dict[str, Any]) -> None:
        for _ in range(draw.choice((1, 1, 2, 4))):
            equations = data.get("equations")
            inside = isinstance(equations, list) and draw.random() < 0.8
            edit(equations if inside else data, draw)

    return with_part(raw, "graph", change)


def tampered_record(raw: bytes, draw: random.Random) -> bytes:
    """A calibration file whose record or header is another one, with right checksums."""

    def change(header: dict[str, Any]) -> None:
        record = json.loads(header["__metadata__"]["calibration"])
        edit(record, draw)
        header["__metadata__"]["calibration"] = json.dumps(record)

    if draw.random() < 0.3:
        return _with_header(raw, lambda header: edit(header, draw), draw)
    return _with_header(raw, change, draw)


def _with_header(raw: bytes, change: Callable[[Any], None], draw: random.Random) -> bytes:
    header = header_of(raw)
    change(header)
    try:
        return reseal(raw, header)
    except (KeyError, TypeError, ValueError, AttributeError):
        return damaged(raw, draw)  # the header is too far gone to compute checksums for


def checkpoint(raw: bytes, draw: random.Random) -> bytes:
    """A checkpoint after damage; of one that is a zip archive, often of the pickle inside."""
    if not zipfile.is_zipfile(io.BytesIO(raw)) or draw.random() < 0.3:
        found = bytearray(raw)
        draw.choice(RAW)(found, draw)
        return bytes(found)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    chosen = draw.choice([name for name in members if name.endswith(".pkl")] * 5 + list(members))
    draw.choice(RAW)(members[chosen], draw)
    out, method = io.BytesIO(), draw.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, contents in members.items():
            archive.writestr(name, bytes(contents))
    return out.getvalue()
