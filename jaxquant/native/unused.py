"""Libraries that nobody has loaded for long are removed from the cache.

Each version of the sources, of the compiler and of jaxlib has libraries of its own (5 MB a set), so
that the folder grows with every update.  When something was loaded last is the modification time of
the library: loading it sets that, at most once a day, and no other meaning of it is relied on.

Other machines may share the folder.  So what is removed goes by what all of them loaded, not by
what this one has use for; and since a process elsewhere may still run what it loaded long ago, from
a file system on which a file that another machine removes is gone, it is a long time.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time

_DAY = 86400.0
UNUSED_SECONDS = 180 * _DAY
_LIBRARIES = ("kernels-", "processor-")


def mark_used(descriptor: int) -> None:
    """Note that a library is loaded, where that was not noted lately."""
    with contextlib.suppress(OSError):  # a file system that is read alone
        # Once a day is enough, and a file system that is shared is written to no more than that.
        if abs(time.time() - os.fstat(descriptor).st_mtime) > _DAY:
            os.utime(descriptor)


def remove_unused(folder: int, seal: str) -> None:
    """Remove the libraries of a folder that were last loaded long ago, and what stands beside them.

    Args:
      folder: its descriptor.
      seal: the suffix of the file beside each library.
    """
    for name in os.listdir(folder):
        if not (name.startswith(_LIBRARIES) and name.endswith(".so")):
            continue
        with contextlib.suppress(OSError):  # another process removes it too, or may and this not
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > UNUSED_SECONDS:
                os.unlink(name, dir_fd=folder)
                os.unlink(name + seal, dir_fd=folder)
