"""The folder of compiled kernels: nothing is loaded from it that others may have written.

Loading a library runs its code as the user who loads it.  The cache may lie where others can write,
and the name of a library can be computed, so another user of the machine could put one there.  What
keeps him from it is ownership: the folder, and each file in it, must belong to the effective user
of this process and be writable by nobody else.  That holds for root too, who loads no user's file,
and for root's files, which no other user loads.  Folders above it need not be checked, since they
only decide which folder is found: one of somebody else's is refused, wherever it is.

What is checked is what is loaded.  The folder is held open and its files are opened through it,
without following links, once; owner, mode, digest and `dlopen` all go by that descriptor.

A digest beside each library finds damage: what a full disk or a crash left half written would end
every process that loads it.  It is no signature: whoever can write the library can write the digest
too, and this user and root can do anything anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import secrets
import shutil
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxquant.native.errors import BuildError
from jaxquant.native.unused import mark_used, remove_unused

CACHE_VARIABLE = "JAXQUANT_CACHE_DIR"
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_SEAL = ".sha256"
_MOST_TEXT = 1 << 16  # bytes of a seal or a note
_FAILURE_SECONDS = 3600.0
_BUILDING = ".building-"
_BUILDING_SECONDS = 86400.0  # longer than anything takes to be made
# Where the header of an ELF file says its table of sections is, which linkers put at the end.
_ELF_SECTIONS = struct.Struct("<40xQ10xHH")


def cache_dir() -> pathlib.Path:
    """Where compiled kernels are kept: `$JAXQUANT_CACHE_DIR`, else the user's cache directory.

    Raises:
      BuildError: neither is known.
    """
    # What the user names is taken as it is; only defaults are looked for.
    if given := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(_expanded(given)).absolute()
    # The XDG specification has relative paths ignored.
    if os.path.isabs(base := _expanded(os.environ.get("XDG_CACHE_HOME", ""))):
        return pathlib.Path(base, "jaxquant")
    home = _expanded("~")
    if not os.path.isabs(home):
        raise BuildError(f"HOME is {home!r}, not an absolute path; set it or {CACHE_VARIABLE}")
    return pathlib.Path(home, ".cache", "jaxquant")


def _expanded(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise BuildError(
            f"there is no cache folder: the home directory of {path!r} is not known; set HOME or "
            f"{CACHE_VARIABLE}"
        )
    return expanded


class Sealed(NamedTuple):
    """A library that is as it was written.

    Attributes:
      descriptor: of the open file.
      path: where it is, for messages.
      needs: the features of the processor that it was compiled for.
    """

    descriptor: int
    path: pathlib.Path
    needs: frozenset[str]


class _Note(NamedTuple):
    """A small file of text, and when it was written."""

    text: str
    written: float


class Folder:
    """The cache's folder, which is made where there is none, held open.

    Raises:
      BuildError: it cannot be had, or it is not this user's alone.
    """

    def __init__(self, path: pathlib.Path) -> None:
        if not hasattr(os, "geteuid"):
            raise BuildError(
                "kernels are compiled on Linux and macOS alone, where a folder tells who may write "
                "to it; on this system XLA runs the models"
            )
        self.path = path
        try:
            if not _is_there(path):
                os.makedirs(path, mode=0o700, exist_ok=True)
            # All that follows goes by the descriptor: the path may be another folder a moment
            # later.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, RecursionError) as error:  # makedirs goes up a level a call
            # Deep paths make `makedirs` recurse.
            raise BuildError(f"cannot write to {path}: {error}") from None
        if why := _not_ours(os.fstat(self._descriptor)):
            self.close()
            raise BuildError(
                f"the folder {path} {why}, so that compiled code in it may be another user's; "
                f"give {CACHE_VARIABLE} a folder of your own (chmod 700)"
            )

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)

    def names(self) -> list[str]:
        """The names of all files in the folder, sorted."""
        return sorted(os.listdir(self._descriptor))

    def find(self, name: str) -> Sealed | None:
        """A library that was stored; None where it or its seal is missing, damaged or not ours."""
        # The seal comes last when a library is stored: without it the library may be half there.
        seal = self._note(name + _SEAL)
        if seal is None:
            return None
        digest, _, needs = seal.text.partition("\n")
        try:
            descriptor = self._open(name)
        except OSError:
            return None
        # Of the open file: the one that is loaded is the one that was looked at.
        if digest != _digest(descriptor, needs):
            os.close(descriptor)
            return None
        mark_used(descriptor)
        return Sealed(descriptor, self.path / name, frozenset(needs.split()))

    @contextlib.contextmanager
    def workshop(self) -> Iterator[Workshop]:
        """A folder inside that nobody else can enter, for as long as something is made in it.

        A linker makes files as the umask says, which may let others write to them.
        """
        self._remove_leftovers()
        # Whoever makes something cleans up first, so that the folder does not grow without end.
        remove_unused(self._descriptor, _SEAL)
        name = f"{_BUILDING}{secrets.token_hex(8)}"
        os.mkdir(name, 0o700, dir_fd=self._descriptor)
        try:
            descriptor = os.open(name, _READ | os.O_DIRECTORY, dir_fd=self._descriptor)
            try:
                yield Workshop(self.path / name, descriptor, self._descriptor)
            finally:
                os.close(descriptor)
        finally:
            shutil.rmtree(name, ignore_errors=True, dir_fd=self._descriptor)

    def _remove_leftovers(self) -> None:
        """Remove what processes left that were ended while they made something."""
        for name in self.names():
            if name.startswith(_BUILDING):
                # Two processes may clean at once.
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
                    if time.time() - found.st_mtime > _BUILDING_SECONDS:
                        shutil.rmtree(name, ignore_errors=True, dir_fd=self._descriptor)

    def remember_failure(self, name: str, reason: str) -> None:
        """Note why something failed, for a while."""
        with contextlib.suppress(OSError), self.workshop() as workshop:
            workshop.write(name, reason)

    def failure(self, name: str) -> str | None:
        """Why something failed a short while ago; None where it is to be tried."""
        note = self._note(name)
        if note is None:
            return None
        left = note.written + _FAILURE_SECONDS - time.time()
        if not 0 < left <= _FAILURE_SECONDS:  # over, or of a clock that was set back
            return None
        return f"{note.text} (tried again in {left / 60:.0f} min, or without {self.path / name})"

    def _open(self, name: str) -> int:
        """A descriptor of a file of ours."""
        # Links are not followed, and a pipe does not wait: `_READ` says so.
        descriptor = os.open(name, _READ, dir_fd=self._descriptor)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or _not_ours(found):
            os.close(descriptor)
            raise PermissionError(f"{self.path / name} is no file of this user alone")
        return descriptor

    def _note(self, name: str) -> _Note | None:
        try:
            descriptor = self._open(name)
        except OSError:
            return None
        # Opened first: name and contents are then of one file, whoever replaces it.
        try:
            text = os.read(descriptor, _MOST_TEXT).decode("utf-8", "replace")
            return _Note(text, os.fstat(descriptor).st_mtime)
        finally:
            os.close(descriptor)


class Workshop:
    """A private folder inside the cache's.

    Attributes:
      path: for a compiler, which knows no descriptors.
    """

    def __init__(self, path: pathlib.Path, descriptor: int, cache: int) -> None:
        self.path = path
        self._descriptor, self._cache = descriptor, cache

    def sealed(self, name: str, needs: frozenset[str]) -> Sealed:
        """What a compiler wrote there, which only this user can write to from now on.

        Raises:
          BuildError: it wrote nothing.
        """
        # By the descriptor of the folder that nobody else can enter.
        try:
            descriptor = os.open(name, _READ, dir_fd=self._descriptor)
        except OSError as error:
            raise BuildError(f"the compiler left no library: {error}") from None
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            os.close(descriptor)
            raise BuildError("the compiler left an empty library, though it reported success")
        if not _is_whole(descriptor, found.st_size):
            os.close(descriptor)
            raise BuildError("the compiler left half a library, though it reported success")
        # From here on nobody but this user can change what was checked.
        os.fchmod(descriptor, 0o600)
        return Sealed(descriptor, self.path / name, needs)

    def store(self, library: Sealed, name: str) -> Sealed:
        """Move a library into the cache, with its digest beside it, both on the disk for good.

        Between the two moves the digest is of another library, or missing: who reads meanwhile
        compiles his own.
        """
        needs = " ".join(sorted(library.needs))

        # On the disk before it has its name: after a crash a name without bytes would be sealed.
        os.fsync(library.descriptor)
        os.rename(library.path.name, name, src_dir_fd=self._descriptor, dst_dir_fd=self._cache)
        self.write(name + _SEAL, f"{_digest(library.descriptor, needs)}\n{needs}")
        return library._replace(path=self.path.parent / name)

    def write(self, name: str, text: str) -> None:
        """Put a file of text into the cache."""
        # Exclusively: no file of another's is written to.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(name, flags, 0o600, dir_fd=self._descriptor)
        try:
            os.write(descriptor, text.encode("utf-8", "replace")[:_MOST_TEXT])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(name, name, src_dir_fd=self._descriptor, dst_dir_fd=self._cache)
        with contextlib.suppress(OSError):  # some file systems do not do that to folders
            os.fsync(self._cache)


def _is_there(path: pathlib.Path) -> bool:
    """Unlike `Path.exists`, tells where that cannot be told: a path too long, a closed folder."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _not_ours(found: os.stat_result) -> str | None:
    """What lets others write to a file or folder; None where nothing does."""
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to this process's user {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"is writable by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _is_whole(descriptor: int, size: int) -> bool:
    """False for an ELF file that was cut off: loading it would end the process."""
    header = os.pread(descriptor, _ELF_SECTIONS.size, 0)
    if not header.startswith(b"\x7fELF\x02\x01"):  # of 64 bits, little end first
        return True  # of another system; or none, which the loader refuses
    if len(header) < _ELF_SECTIONS.size:
        return False
    start, each, count = _ELF_SECTIONS.unpack(header)
    return size >= start + each * count


def _digest(descriptor: int, needs: str) -> str:
    """SHA-256 of a library and of what is known of it."""
    digest = hashlib.sha256(needs.encode() + b"\0")
    os.lseek(descriptor, 0, os.SEEK_SET)
    while block := os.read(descriptor, 1 << 20):
        digest.update(block)
    return digest.hexdigest()


def hashed(parts: Sequence[bytes], length: int) -> str:
    """So many hexadecimal digits that tell these parts, of any bytes, from others."""
    digest = hashlib.sha256()
    for part in parts:
        # With their lengths, so that parts that are cut elsewhere hash otherwise.
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:length]
