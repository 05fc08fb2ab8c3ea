"""A file is written whole or not at all."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxquant.files import atomic


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "f"
    atomic.write_file(path, [b"old"])
    path.chmod(0o640)
    atomic.write_file(path, [b"new", b"er"])
    assert path.read_bytes() == b"newer"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["f"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    def failing():
        yield b"new"
        raise KeyboardInterrupt

    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        atomic.write_file(path, failing())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_links_folders_and_missing_folders_are_refused(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for path, message in (
        (tmp_path / "link", "is a link"),
        (tmp_path, "not a plain file"),
        (tmp_path / "no" / "f", "there is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            atomic.write_file(path, [b"new"])
    assert (tmp_path / "real").read_bytes() == b"old"


_WRITER = """
import sys
from jaxquant.files import atomic
path, size = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
turn = 0
while True:
    turn = (turn + 1) % 256
    atomic.write_file(path, (bytes([turn]) * (size // 64) for _ in range(64)))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_whole_file(kills, tmp_path):
    size, delays = 1 << 20, random.Random(0)
    path, part_files = tmp_path / "f", 0
    path.write_bytes(b"\0" * size)
    for _ in range(kills):
        command = [sys.executable, "-c", _WRITER, str(path), str(size)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(delays.uniform(0.0, 0.1))
            writer.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == size
        assert len(set(content)) == 1
        part_files = len(os.listdir(tmp_path)) - 1
    assert kills < 60 or part_files > 0  # else no kill came in the middle of a write
