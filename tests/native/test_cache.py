"""What is in the cache is this user's own, whole, and loaded as it was checked."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import time

import pytest

from jaxquant.native import build, cache
from jaxquant.native.errors import BuildError
from tests.native.cases import needs_kernels
from tests.native.fake_compiler import FakeCompiler

OTHER_USER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to another user")


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    path = tmp_path / "cache"
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(path))
    return path


@pytest.fixture
def compiler(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    made = FakeCompiler(folder.parent)
    monkeypatch.setenv("CXX", made.command)
    return made


class TestFolder:
    def test_is_made_for_this_user_alone(self, folder: pathlib.Path):
        before = os.umask(0)
        try:
            cache.Folder(folder / "deep" / "down").close()
        finally:
            os.umask(before)
        assert stat.S_IMODE((folder / "deep" / "down").stat().st_mode) == 0o700

    @pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o702])
    def test_that_others_can_write_to_is_refused(self, folder: pathlib.Path, mode: int):
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(BuildError, match=rf"mode {mode:o}.*JAXQUANT_CACHE_DIR.*chmod 700"):
            cache.Folder(folder)

    @as_root
    def test_of_another_user_is_refused(self, folder: pathlib.Path):
        folder.mkdir()
        os.chown(folder, OTHER_USER, -1)
        with pytest.raises(BuildError, match=f"belongs to user {OTHER_USER}"):
            cache.Folder(folder)

    @as_root
    def test_behind_a_link_is_what_counts(self, folder: pathlib.Path, tmp_path: pathlib.Path):
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", OTHER_USER, -1)
        folder.symlink_to(tmp_path / "theirs")
        with pytest.raises(BuildError, match=f"belongs to user {OTHER_USER}"):
            cache.Folder(folder)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [("x" * 300, "too long"), ("/x" * 4000, "too long"), ("/x" * 1500, "recursion")],
    )
    def test_with_a_path_that_is_too_long(self, tmp_path: pathlib.Path, name: str, reason: str):
        with pytest.raises(BuildError, match=f"cannot write to.*{reason}"):
            cache.Folder(tmp_path / name.lstrip("/"))


def is_loaded_again(path: pathlib.Path, compiler: FakeCompiler) -> bool:
    """Whether the library in the cache is taken as it is; it is compiled anew where not."""
    before = compiler.compilations
    assert build.build() == path
    assert path.is_file()
    assert path.stat().st_uid == os.geteuid()
    after = compiler.compilations
    assert build.build() == path
    assert compiler.compilations == after  # what was written now is whole
    return after == before


def truncated(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: pathlib.Path) -> None:
    os.truncate(path, 0)


def flipped(path: pathlib.Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def lengthened(path: pathlib.Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def removed(path: pathlib.Path) -> None:
    path.unlink()


def made_a_fifo(path: pathlib.Path) -> None:
    path.unlink()
    os.mkfifo(path)


def made_a_link(path: pathlib.Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def opened_to_others(path: pathlib.Path) -> None:
    path.chmod(0o666)


def given_away(path: pathlib.Path) -> None:
    os.chown(path, OTHER_USER, -1)


CHANGES = [
    truncated,
    emptied,
    flipped,
    lengthened,
    removed,
    made_a_fifo,
    made_a_link,
    opened_to_others,
    pytest.param(given_away, marks=as_root),
]


@needs_kernels
class TestLibrary:
    def test_is_compiled_once(self, compiler: FakeCompiler):
        assert is_loaded_again(build.build(), compiler)
        assert compiler.compilations == 1

    @pytest.mark.parametrize("suffix", ["", ".sha256"], ids=["library", "seal"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_that_was_changed_is_compiled_anew(self, compiler: FakeCompiler, change, suffix: str):
        path = build.build()
        change(pathlib.Path(f"{path}{suffix}"))
        assert not is_loaded_again(path, compiler)

    def test_is_this_user_s_alone(self, compiler: FakeCompiler, folder: pathlib.Path):
        before = os.umask(0)
        try:
            build.build()
        finally:
            os.umask(before)
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}

    def test_that_is_replaced_after_the_check_is_not_loaded(
        self, compiler: FakeCompiler, folder: pathlib.Path, tmp_path: pathlib.Path
    ):
        path = build.build()
        with cache.Folder(folder) as opened:
            found = opened.find(path.name)
        planted = tmp_path / "planted"
        planted.write_bytes(b"no library")
        os.replace(planted, path)
        assert ctypes.CDLL(str(build._file(found))).jaxquant_kernels is not None


@pytest.mark.parametrize(
    ("instead", "reason"),
    [
        ("true", "left no library"),
        (': > "$output"', "empty library"),
        ('mkfifo "$output"', "empty library"),
        ('head -c 100000 "$made" > "$output"', "half a library"),
        ('head -c 40 "$made" > "$output"', "half a library"),
        ('echo junk > "$output"', "does not load"),
        ('c++ -shared -fPIC -x c++ /dev/null -o "$output"', "does not load.*jaxquant_"),
        ("printf '\\377\\376' >&2; exit 1", "failed"),
        ("kill -9 $$", "exit status -9"),
    ],
)
@needs_kernels
def test_a_compiler_that_gives_nothing_of_use(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, instead: str, reason: str
):
    monkeypatch.setenv("CXX", FakeCompiler(folder.parent, instead).command)
    with pytest.raises(BuildError, match=reason):
        build.build()
    assert not [path for path in folder.iterdir() if not path.name.startswith("processor-")]


def test_what_ended_processes_left_is_removed(folder: pathlib.Path):
    with cache.Folder(folder) as opened:
        for name, age in ((".building-old", 2 * 86400), (".building-new", 60)):
            (folder / name).mkdir()
            (folder / name / "library.so").write_bytes(b"half")
            os.utime(folder / name, (time.time() - age,) * 2)
        with opened.workshop():
            pass
    assert [path.name for path in folder.iterdir()] == [".building-new"]


class TestUnused:
    """Whatever machine of those that share a folder loaded a library, it stays."""

    @pytest.fixture
    def stored(self, folder: pathlib.Path) -> pathlib.Path:
        with cache.Folder(folder) as opened, opened.workshop() as workshop:
            for name in ("kernels-AVX2-1.so", "processor-2.so"):
                (workshop.path / "library.so").write_bytes(b"code")
                workshop.store(workshop.sealed("library.so", frozenset()), name)
            workshop.write("timeout-3", "a note")
        (folder / "model.safetensors").write_bytes(b"not ours to remove")
        return folder

    def make_something(self, folder: pathlib.Path) -> None:
        with cache.Folder(folder) as opened, opened.workshop():
            pass

    def grow_old(self, folder: pathlib.Path, days: float) -> None:
        for path in folder.iterdir():
            os.utime(path, (time.time() - days * 86400,) * 2)

    def test_what_was_loaded_long_ago_is_removed(self, stored: pathlib.Path):
        self.grow_old(stored, 181)
        self.make_something(stored)
        assert {path.name for path in stored.iterdir()} == {"timeout-3", "model.safetensors"}

    def test_what_was_loaded_lately_stays(self, stored: pathlib.Path):
        self.grow_old(stored, 179)
        before = sorted(stored.iterdir())
        self.make_something(stored)
        assert sorted(stored.iterdir()) == before

    def test_to_load_is_to_use(self, stored: pathlib.Path):
        self.grow_old(stored, 181)
        with cache.Folder(stored) as opened:
            found = opened.find("kernels-AVX2-1.so")
            assert found is not None
            os.close(found.descriptor)
        self.make_something(stored)
        names = {path.name for path in stored.iterdir()}
        assert {"kernels-AVX2-1.so", "kernels-AVX2-1.so.sha256"} <= names
        assert not {"processor-2.so", "processor-2.so.sha256"} & names

    def test_a_link_is_not_followed(self, stored: pathlib.Path, tmp_path: pathlib.Path):
        self.grow_old(stored, 181)
        elsewhere = tmp_path / "kernels-elsewhere.so"
        elsewhere.write_bytes(b"code")
        os.utime(elsewhere, (0, 0))
        (stored / "kernels-link.so").symlink_to(elsewhere)
        self.make_something(stored)
        assert elsewhere.exists()


class TestWhere:
    def test_the_home_directory_is_put_in(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", "/home/someone")
        for given, path in {"~": "/home/someone", "~/kernels": "/home/someone/kernels"}.items():
            monkeypatch.setenv(cache.CACHE_VARIABLE, given)
            assert str(cache.cache_dir()) == path
        monkeypatch.delenv(cache.CACHE_VARIABLE)
        for base, path in {
            "~/xdg": "/home/someone/xdg/jaxquant",
            "/xdg": "/xdg/jaxquant",
            "relative": "/home/someone/.cache/jaxquant",
            "": "/home/someone/.cache/jaxquant",
        }.items():
            monkeypatch.setenv("XDG_CACHE_HOME", base)
            assert str(cache.cache_dir()) == path

    def test_a_home_that_is_no_place(self, monkeypatch: pytest.MonkeyPatch):
        for name in (cache.CACHE_VARIABLE, "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "here")
        with pytest.raises(BuildError, match="'here', not an absolute path"):
            cache.cache_dir()
        monkeypatch.setenv(cache.CACHE_VARIABLE, "~nobody-has-this-name/cache")
        with pytest.raises(BuildError, match="not known; set HOME or JAXQUANT_CACHE_DIR"):
            cache.cache_dir()


@needs_kernels
@pytest.mark.parametrize("is_planted", [pytest.param(True, marks=as_root), False])
def test_planted_code_does_not_run(
    compiler: FakeCompiler, folder: pathlib.Path, tmp_path: pathlib.Path, is_planted: bool
):
    """Another user knows the name, and how a library is sealed."""
    path, mark = build.build(), tmp_path / "ran"
    code = f"""
        #include <cstdio>
        __attribute__((constructor)) static void run() {{ fclose(fopen("{mark}", "w")); }}
        """
    c_plus_plus = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(c_plus_plus, input=code, text=True, check=True)
    path.chmod(0o600)
    with path.open("rb") as file:
        pathlib.Path(f"{path}.sha256").write_text(cache._digest(file.fileno(), "") + "\n")
    if is_planted:
        os.chown(path, OTHER_USER, -1)
        assert build.build() == path
        assert compiler.compilations == 2
    else:
        with pytest.raises(BuildError, match=r"does not load.*jaxquant_kernels"):
            build.build()
    assert mark.exists() is not is_planted


# Everything is imported before: the other user may not be able to read this Python.
AS_ANOTHER_USER = """
import json, os, pwd, sys, jax
from jaxquant import native
from jaxquant.native import build, library
os.setgroups([]); os.setgid(12345); os.setuid(12345)
for variables in json.loads(sys.argv[1]):
    for name in ("HOME", "XDG_CACHE_HOME", "JAXQUANT_CACHE_DIR"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    library.available.cache_clear(); library.int8_is_faster.cache_clear()
    print(native.runs_here(), native.runs_int8_here(), native.available().reason)
"""


@as_root
def test_a_user_without_a_name():
    """As in a container that runs as any user number: XLA runs the model, and it is said why."""
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        os.chmod(root, 0o755)
        pathlib.Path(root, "closed").mkdir(mode=0o700)
        pathlib.Path(root, "shared").mkdir(mode=0o755)
        cases = [
            ({}, "the home directory of '~' is not known"),
            ({"HOME": "/"}, "cannot write to /.cache/jaxquant: [Errno 13] Permission denied"),
            ({"HOME": f"{root}/closed/home"}, f"cannot write to {root}/closed/home/.cache"),
            ({cache.CACHE_VARIABLE: f"{root}/closed/cache"}, "Permission denied"),
            ({cache.CACHE_VARIABLE: "~/cache"}, "the home directory of '~/cache' is not known"),
            ({cache.CACHE_VARIABLE: f"{root}/shared"}, "belongs to user 0, not to this process's"),
        ]
        variables = json.dumps([environment for environment, _ in cases])
        command = [sys.executable, "-c", AS_ANOTHER_USER, variables]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, (environment, reason) in zip(done.stdout.splitlines(), cases, strict=True):
        assert line.startswith("False False "), environment
        assert reason in line
