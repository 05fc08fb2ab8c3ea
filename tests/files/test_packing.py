"""Bytes in a compressed tensor."""

import numpy as np
import pytest

from jaxquant.files import packing
from jaxquant.files.errors import FileError


def test_packed_parts():
    packed = packing.pack(b"abc" * 100)
    assert packing.unpack(packed, "part", 1000) == b"abc" * 100
    with pytest.raises(FileError, match="cut short"):
        packing.unpack(packed[:-1], "part", 1000)
    with pytest.raises(FileError, match="followed by"):
        packing.unpack(np.append(packed, packed), "part", 1000)
    with pytest.raises(FileError, match="cannot be unpacked"):
        packing.unpack(packed[1:], "part", 1000)
    with pytest.raises(FileError, match="not bytes"):
        packing.unpack(packed.astype(np.int8), "part", 1000)


def test_a_part_that_unpacks_to_too_much_is_refused():
    with pytest.raises(FileError, match="more than 1000 bytes"):
        packing.unpack(packing.pack(b"\0" * 1001), "part", 1000)
    assert len(packing.unpack(packing.pack(b"\0" * 1000), "part", 1000)) == 1000
