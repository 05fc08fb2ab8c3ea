"""Which backend runs an int8 model, and what is said of it."""

from __future__ import annotations

import pytest

from jaxquant import native
from jaxquant.backends.choice import Choice, check_backend, choose_backend
from jaxquant.native import library
from tests.native.cases import needs_kernels


@pytest.fixture
def _undecided():
    """`int8_is_faster()` as in a new process."""
    library.int8_is_faster.cache_clear()
    yield
    library.int8_is_faster.cache_clear()


@needs_kernels
@pytest.mark.usefixtures("_undecided")
class TestAuto:
    @pytest.mark.parametrize("kernels", ["AMX", "AVX512-VNNI", "AVX2"])
    def test_kernels_that_beat_xla_run(self, monkeypatch: pytest.MonkeyPatch, kernels: str):
        monkeypatch.setattr(library, "instruction_set", lambda: kernels)
        assert choose_backend("auto", has_scales=True) == Choice(
            "native", native.available().reason
        )

    def test_xla_runs_where_the_kernels_are_slower(self, monkeypatch: pytest.MonkeyPatch):
        """Portable code took four to five times XLA's time."""
        monkeypatch.setattr(library, "instruction_set", lambda: "portable")
        name, reason = choose_backend("auto", has_scales=True)
        assert name == "xla"
        assert "faster" in reason
        assert "AVX2" in reason
        assert not native.runs_int8_here()
        assert native.runs_here()  # for the rest, which they are faster at

    def test_slower_kernels_run_where_they_are_chosen(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(library, "instruction_set", lambda: "portable")
        check_backend("native")
        assert choose_backend("native", has_scales=True).name == "native"

    @pytest.mark.parametrize("requested", ["auto", "native"])
    def test_dots_of_few_rows_are_faster_on_any_processor(
        self, monkeypatch: pytest.MonkeyPatch, requested: str
    ):
        monkeypatch.setattr(library, "instruction_set", lambda: "portable")
        name, reason = choose_backend(requested, has_scales=False)
        assert name == "native"
        assert "few rows" in reason


@pytest.mark.parametrize("requested", ["auto", "native"])
@pytest.mark.parametrize("has_scales", [True, False])
def test_nothing_is_compiled_where_no_kernel_can_run(
    monkeypatch: pytest.MonkeyPatch, requested: str, has_scales: bool
):
    def compile_or_load(*_: object) -> None:
        raise AssertionError("compiles")

    monkeypatch.setattr(library.build, "load", compile_or_load)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    library.available.cache_clear()
    library.int8_is_faster.cache_clear()
    name, reason = choose_backend(requested, has_scales)
    assert name == "xla"
    assert "gpu" in reason
    assert not native.runs_here()
    assert not native.runs_int8_here()


def test_xla_is_chosen():
    assert str(choose_backend("xla", has_scales=True)) == "xla (chosen)"


def test_there_are_three():
    with pytest.raises(ValueError, match="choose one of auto, native, xla"):
        check_backend("onednn")
