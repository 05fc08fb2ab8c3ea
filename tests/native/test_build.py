"""A compiler may hang, fail, crash, or be none; then XLA runs, and the reason is said."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
import time

import pytest

from jaxquant.native import build, cache, compiler, instructions, library
from jaxquant.native.errors import BuildError, CompilerTimeout
from jaxquant.native.processor import Processor
from tests.native.cases import needs_kernels
from tests.native.fake_compiler import FakeCompiler


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    path = tmp_path / "cache"
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(path))
    return path


def script(path: pathlib.Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has asked for yet."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_compiler_that_hangs_ends_with_its_children(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    pids = tmp_path / "pids"
    hanging = f"sleep 600 & echo $! $$ > {pids}; cat; wait"
    monkeypatch.setenv("CXX", script(tmp_path / "hangs", hanging))
    monkeypatch.setattr(compiler, "_SECONDS", 1.0)
    with pytest.raises(CompilerTimeout, match="did not end within 1 s"):
        build.build()
    deadline = time.monotonic() + 30
    left = [int(pid) for pid in pids.read_text().split()]
    while any(map(is_running, left)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, left))

    pids.unlink()
    with pytest.raises(BuildError, match=r"did not end within 1 s \(tried again in 60 min"):
        build.build()
    assert not pids.exists()  # it was not asked again
    (note,) = cache.cache_dir().glob("timeout-*")
    hour_ago = time.time() - 3601
    os.utime(note, (hour_ago, hour_ago))
    with pytest.raises(CompilerTimeout):
        build.build()
    assert pids.exists()


def test_a_compiler_reads_nothing(tmp_path: pathlib.Path):
    """`c++ -` would wait for somebody to type a program."""
    asking = script(tmp_path / "asks", "cat; exit 3")
    code = "from jaxquant import native; print(native.available())"
    environment = {**os.environ, "CXX": asking}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert b"exit status 3" in process.stdout.read()  # while its input is open


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("g++ 'oops", "no command: No closing quotation"),
        ("no-such-compiler -O2", "no-such-compiler -O2 --version does not run"),
        ("/", "does not run"),
        ("g++-\udcff", "does not run"),
    ],
)
def test_a_compiler_that_is_none(monkeypatch: pytest.MonkeyPatch, given: str, reason: str):
    monkeypatch.setenv("CXX", given)
    # As in a process that has loaded none: XLA takes the functions of one library a process.
    monkeypatch.setattr(build, "load", functools.cache(build.load.__wrapped__))
    ok, said = library.available.__wrapped__()
    assert not ok
    assert reason in said
    said.encode()  # it can be printed


def test_a_blank_compiler_is_the_machine_s(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        compiler.find_compiler()


x86 = pytest.mark.skipif(len(instructions.all_here()) < 3, reason="the sets are those of x86")


@needs_kernels
class TestProcessors:
    def test_what_a_processor_lacks_is_not_loaded(self, tmp_path, monkeypatch):
        """By flags, or by a compiler that runs on another machine."""
        monkeypatch.setenv("CXX", FakeCompiler(tmp_path).command)
        monkeypatch.setattr(build.processor, "needed", lambda _: frozenset({"AMX_COMPLEX"}))
        monkeypatch.setattr(build, "_load", lambda found: pytest.fail("it was loaded"))
        with pytest.raises(BuildError, match="uses AMX_COMPLEX, which this processor does not"):
            build.build()

    @pytest.fixture
    def on(self, monkeypatch):
        """Makes this processor one that has a set of instructions and no more."""
        ask = build.processor.ask
        features = {s.name: s.features for s in instructions.all_here()}

        def become(name: str) -> None:
            monkeypatch.setattr(
                build.processor,
                "ask",
                lambda library: ask(library)._replace(features=features[name]),
            )
            monkeypatch.setattr(build.processor, "needed", lambda _: features[name])

        return become

    @x86
    def test_one_for_a_lesser_processor_does_where_none_can_be_compiled(
        self, tmp_path, monkeypatch, on
    ):
        monkeypatch.setenv("CXX", FakeCompiler(tmp_path).command)
        paths = {}
        for name in ("AVX2", "AVX-512", "AMX"):
            on(name)
            paths[name] = build.build()
        assert len({*paths.values()}) == 3
        FakeCompiler(tmp_path, "exit 1")  # from now on
        on("AVX512-VNNI")
        assert build.build() == paths["AVX-512"]
        on("portable")
        with pytest.raises(BuildError, match="exit status 1"):
            build.build()

    @x86
    def test_machines_with_the_same_set_share_a_library(self, tmp_path, monkeypatch, on):
        """A home directory may serve several machines."""
        compiler = FakeCompiler(tmp_path)
        monkeypatch.setenv("CXX", compiler.command)
        on("AVX2")
        path, features = build.build(), build.processor.needed("")
        monkeypatch.setattr(build.processor, "ask", lambda _: Processor(features | {"AES"}))
        assert build.build() == path
        assert compiler.compilations == 1

    def test_of_two_processes_that_compile_one_library_stays(self, tmp_path, monkeypatch):
        """While one compiles, the other one is faster: a library that is loaded is not replaced."""
        code = "import os; from jaxquant.native import build; print(os.stat(build.build()).st_ino)"
        other = tmp_path / "other"
        meanwhile = f"[ -e {other} ] || {sys.executable} -c '{code}' > {other}; cp $made $output"
        monkeypatch.setenv("CXX", FakeCompiler(tmp_path, meanwhile).command)
        assert build.build().stat().st_ino == int(other.read_text())

    @x86
    def test_a_compiler_that_does_not_know_a_set(self, tmp_path, monkeypatch, on):
        on("AMX")
        old = f'case "$*" in *amx*) exit 1 ;; esac; exec {FakeCompiler(tmp_path).command} "$@"'
        monkeypatch.setenv("CXX", script(tmp_path / "old", old))
        assert "kernels-AVX512-VNNI-" in build.build().name

    def test_a_set_is_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CXX", FakeCompiler(tmp_path).command)
        monkeypatch.setenv(instructions.VARIABLE, "portable")
        assert build.build().name.startswith("kernels-portable-")
        monkeypatch.setenv(instructions.VARIABLE, "avx3")
        with pytest.raises(
            BuildError, match=r"JAXQUANT_INSTRUCTIONS is 'avx3'; what this .* portable"
        ):
            build.build()


WITHOUT_COMPILING = """
import jax, jaxquant
from jaxquant import native
import jax.numpy as jnp
params, apply_fn = {"w": jnp.eye(4)}, lambda p, x: x @ p["w"]
qparams, qapply = jaxquant.quant_post(params, apply_fn, [jnp.ones((2, 4))], progress=False)
qapply(qapply.prepare(qparams), jnp.ones((1, 4)))
print(qapply.backend)
"""


def test_switched_off_nothing_is_compiled(tmp_path: pathlib.Path):
    ran = tmp_path / "ran"
    environment = {**os.environ, "CXX": script(tmp_path / "tells", f"touch {ran}; exit 1")}
    environment[library.DISABLE_VARIABLE] = "0"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILING], env=environment, capture_output=True, text=True
    )
    assert "xla (JAXQUANT_NATIVE=0 in the environment)" in done.stdout, done.stderr
    assert not ran.exists()
    assert not (tmp_path / "cache").exists()
