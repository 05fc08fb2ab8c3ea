"""Bytes in a compressed tensor."""

from __future__ import annotations

import zlib

import numpy as np

from jaxquant.files.errors import FileError


def pack(contents: bytes) -> np.ndarray:
    """Bytes as a compressed tensor."""
    return np.frombuffer(zlib.compress(contents, 9), np.uint8)


def unpack(tensor: np.ndarray, part: str, at_most: int) -> bytes:
    """The bytes that `pack` was given.

    Args:
      tensor: as `pack` made it.
      part: names it in errors.
      at_most: the number of bytes that may come of it; a thousandth of that, packed, is enough to
        fill memory otherwise.

    Raises:
      FileError: the tensor is not of that form, or is too large when unpacked.
    """
    if tensor.dtype != np.uint8 or tensor.ndim != 1:
        raise FileError(f"the {part} is {tensor.dtype} {list(tensor.shape)}, not bytes")
    inflater = zlib.decompressobj()
    try:
        # At most so many bytes: a few kilobytes may unpack to gigabytes.
        contents = inflater.decompress(tensor.tobytes(), at_most)
    except zlib.error as error:
        raise FileError(f"the {part} cannot be unpacked: {error}") from None
    if inflater.unconsumed_tail:
        raise FileError(f"the {part} has more than {at_most} bytes when unpacked")
    if not inflater.eof or inflater.unused_data:
        raise FileError(f"the {part} is cut short or followed by other bytes")
    return contents
