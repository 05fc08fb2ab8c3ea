"""The kernels are compiled once, into a cache, and their absence has a reason."""

from __future__ import annotations

import pathlib

import pytest

from jaxquant import native
from jaxquant.native import build, library
from tests.native.cases import needs_kernels


@pytest.fixture
def _unloaded():
    """`available()` as in a new process."""
    library.available.cache_clear()
    yield
    library.available.cache_clear()


@pytest.mark.usefixtures("_unloaded")
class TestAvailable:
    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        build.load.cache_clear()
        ok, reason = native.available()
        assert not ok
        assert "no C++ compiler" in reason

    def test_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
        monkeypatch.setenv("CXX", "false")
        monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
        build.load.cache_clear()
        ok, reason = native.available()
        assert not ok
        assert "failed" in reason
        assert not list(tmp_path.iterdir())  # nothing half made is left

    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv(library.DISABLE_VARIABLE, "0")
        assert native.available() == (False, "JAXQUANT_NATIVE=0 in the environment")
        with pytest.raises(RuntimeError, match="not available: JAXQUANT_NATIVE=0"):
            native.require()

    def test_a_cache_that_cannot_be_written(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
    ):
        file = tmp_path / "file"
        file.write_text("")
        monkeypatch.setenv(build.CACHE_VARIABLE, str(file))
        build.load.cache_clear()
        ok, reason = native.available()
        assert not ok
        assert "cannot write" in reason


@needs_kernels
def test_names_the_kernels():
    assert native.available().reason.split()[0] in (
        "AMX",
        "AVX512-VNNI",
        "AVX-512",
        "AVX-VNNI",
        "AVX2",
        "NEON-I8MM",
        "NEON",
        "portable",
    )
