"""Reads NumPy archives (`.npz`), and of one that is cut short what is whole."""

import contextlib
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.weights.tree import CutShortError, WeightsError

HEADER = struct.Struct("<4s5H3I2H")  # of a file in a zip archive, before its name
SIGNATURE = b"PK\x03\x04"
STORED, DEFLATED = 0, 8
IN_EXTRA = 0xFFFFFFFF  # a size that stands in the extra field, which 64-bit sizes need


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive; pickled objects in it are refused.

    Raises:
      CutShortError: the directory at the end is missing; with the arrays that are whole.
      WeightsError: it is no such archive.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        contents = path.read_bytes()
        if contents.startswith(SIGNATURE) and not zipfile.is_zipfile(path):
            raise CutShortError(f"{path}: cut short", _whole_arrays(contents)) from error
        raise WeightsError(f"{path}: not an .npz archive, or damaged: {error}") from error


def _whole_arrays(contents: bytes) -> dict[str, np.ndarray]:
    arrays = {}
    with contextlib.suppress(ValueError, struct.error, zlib.error):  # what is there may be damaged
        for name, array in _walk(contents):
            arrays[name] = array
    return arrays


def _walk(contents: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Goes from header to header, as the directory that says where they are is lost."""
    position = 0
    while len(contents) >= position + HEADER.size:
        signature, _, _, method, _, _, _, stored, _, name_length, extra_length = HEADER.unpack_from(
            contents, position
        )
        start = position + HEADER.size + name_length + extra_length
        if signature != SIGNATURE or method not in (STORED, DEFLATED) or start > len(contents):
            return
        name = contents[position + HEADER.size :][:name_length].decode()
        if stored == IN_EXTRA:  # after an id, a length and the size before compression
            _, _, _, stored = struct.unpack_from("<2H2Q", contents, start - extra_length)
        position = start + stored
        data = contents[start:position]
        if len(data) < stored or not stored:
            return
        data = zlib.decompress(data, -zlib.MAX_WBITS) if method == DEFLATED else data
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        yield name.removesuffix(".npy"), array
