"""The error of a file that is refused."""

from __future__ import annotations


class FileError(ValueError):
    """A file is refused; the message says which part of it, and why."""
