"""What a processor has, and what a library needs."""

from __future__ import annotations

import pytest

from jaxquant.native import processor

ICE_LAKE = """\
1.0 606a6 0 fffab223 1f8bfbff
7.0 2 f1bf0fbb 40415f5e fc000510
7.1 0 0 0 0
24.0 0 0 0 0
80000001.0 0 0 121 2c100800
xcr0 e7 0
"""


class _Library:
    """One that tells of a processor that is not here."""

    def __init__(self, text: str) -> None:
        self._text = text

    @property
    def jaxquant_processor(self):
        def tell(buffer, size: int) -> None:
            buffer.value = self._text.encode()

        return tell


def test_the_features_of_a_server():
    found = processor.ask(_Library(ICE_LAKE))
    assert found.runs({"AVX2", "FMA", "LZCNT", "AVX512F", "AVX512VNNI", "GFNI"})
    assert not found.runs({"AVX512VNNI", "AMX_TILE"})
    assert not found.runs({"AVXVNNI"})


@pytest.mark.parametrize(("saved", "runs"), [("e7", True), ("7", False), ("3", False)])
def test_registers_that_the_system_does_not_save(saved: str, runs: bool):
    """A virtual machine may show instructions that it does not let run."""
    found = processor.ask(_Library(ICE_LAKE.replace("xcr0 e7", f"xcr0 {saved}")))
    assert found.runs({"AVX512F"}) is runs
    assert found.runs({"AVX2"}) is (saved != "3")
    assert found.runs({"BMI2", "SSE4_2"})


def test_another_architecture():
    """Nothing is known of it: no library of another one runs."""
    found = processor.ask(_Library(""))
    assert found.features is None
    assert not found.runs(())


def test_the_features_of_arm():
    found = processor.ask(_Library("arm 1 0\n"))
    assert found.runs({"ARM_FEATURE_DOTPROD"})
    assert not found.runs({"ARM_FEATURE_MATMUL_INT8"})
    assert processor.needed("#define __ARM_FEATURE_DOTPROD 1\n") == {"ARM_FEATURE_DOTPROD"}


def test_what_macros_say():
    text = '#define __AVX512VNNI__ 1\n#define __BMI2__ 1\n#define __VERSION__ "12"\n#define X\n'
    assert processor.needed(text) == {"AVX512VNNI", "BMI2"}
    assert not processor.needed("")
