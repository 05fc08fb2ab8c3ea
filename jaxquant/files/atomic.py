"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_file(path: str | os.PathLike[str], chunks: Iterable[Any]) -> None:
    """Write `chunks` of bytes to a new file beside `path`, then rename it to `path`.

    Whoever reads `path` at any moment, or after a crash at any moment, sees the old file or the new
    one.  A crash may leave a file named `.NAME.*.part` behind, which can be deleted.

    Raises:
      ValueError: `path` is a folder, a link or another thing that is not a plain file.
      OSError: the file cannot be written; the old one is as it was.
    """
    file_path = check_writable(path)
    temporary = file_path.with_name(f".{file_path.name}.{secrets.token_hex(8)}.part")
    # Made by the system with the permissions of a new file: the process has one umask for all of
    # its threads, which could only be read by setting it.
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{file_path} cannot be written: no file can be made in {file_path.parent} "
            f"({error.strerror}); give a path in a folder that you may write to",
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            # A file that is there keeps its permissions.
            if file_path.exists():
                os.fchmod(file.fileno(), file_path.stat().st_mode & 0o777)
            # On the disk before the rename is, or a crash might leave an empty file under the name.
            os.fsync(file.fileno())
        os.replace(temporary, file_path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(file_path.parent)


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The path, once it is known that `write_file` may write there.

    Raises:
      ValueError: `path` is a folder, a link or another thing that is not a plain file.
    """
    file_path = Path(path)
    # A rename would put a file in the place of the link, and leave what it points to.
    if file_path.is_symlink():
        raise ValueError(f"{file_path} is a link; give the path of the file itself")
    if file_path.exists() and not file_path.is_file():
        raise ValueError(f"{file_path} exists and is not a plain file; give the path of a file")
    if not file_path.name or not file_path.parent.is_dir():
        raise ValueError(f"{file_path}: there is no folder {file_path.parent}; make it first")
    return file_path


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
