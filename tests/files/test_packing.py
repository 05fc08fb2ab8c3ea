"""Bytes in a compressed tensor."""

import numpy as np
import pytest

from jaxquant.files import packing
from jaxquant.files.errors import FileError


def test_packed_parts():
    packed = packing.pack(b"abc" * 100)
    assert packing.unpack(packed, "part") == b"abc" * 100
    with pytest.raises(FileError, match="cut short"):
        packing.unpack(packed[:-1], "part")
    with pytest.raises(FileError, match="followed by"):
        packing.unpack(np.append(packed, packed), "part")
    with pytest.raises(FileError, match="cannot be unpacked"):
        packing.unpack(packed[1:], "part")
    with pytest.raises(FileError, match="not bytes"):
        packing.unpack(packed.astype(np.int8), "part")


def test_a_part_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(packing, "MAX_PART_BYTES", 1000)
    with pytest.raises(FileError, match="more than 1000 bytes"):
        packing.unpack(packing.pack(b"\0" * 1001), "part")
    assert len(packing.unpack(packing.pack(b"\0" * 1000), "part")) == 1000
