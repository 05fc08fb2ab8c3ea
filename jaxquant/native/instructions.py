"""The sets of instructions that the kernels are compiled for: a library each.

A library of one set is compiled by its own flags and never by what the compiler finds out of the
machine (`-march=native`), so that its name tells where it runs.  Which of them a process loads is
decided when it loads: the best of those that its processor has.  Libraries apart, rather than one
that holds all, since the functions of the standard library that they share would be compiled for
the last of the sets, and since the first use then waits for one of them to be compiled.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import NamedTuple

from jaxquant.native.errors import BuildError
from jaxquant.native.processor import Processor

VARIABLE = "JAXQUANT_INSTRUCTIONS"


class InstructionSet(NamedTuple):
    """What one library is compiled for.

    Attributes:
      name: as the environment variable and the kernels' own `kName` call it.
      flags: of the compiler.
      features: what a processor needs for it, by the names of `Processor.features`.
    """

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]


def _x86(name: str, tune: str, *features: str) -> InstructionSet:
    """The flag of a feature is its name, but for some letters."""
    # In `-m` flags underscores are hyphens, and AVX512VNNI is avx512vnni.
    flags = tuple(f"-m{feature.lower().replace('_', '-')}" for feature in features)
    tuned = (f"-mtune={tune}",) if tune else ()
    return InstructionSet(name, ("-march=x86-64", *flags, *tuned), frozenset(features))


_AVX2 = ("AVX2", "FMA", "F16C", "BMI", "BMI2", "LZCNT", "MOVBE", "POPCNT")
_AVX512 = (*_AVX2, "AVX512F", "AVX512BW", "AVX512CD", "AVX512DQ", "AVX512VL")
_VNNI = (*_AVX512, "AVX512VNNI")
# The best first.
_X86 = (
    _x86("AMX", "icelake-server", *_VNNI, "AMX_TILE", "AMX_INT8"),
    _x86("AVX512-VNNI", "icelake-server", *_VNNI),
    _x86("AVX-VNNI", "haswell", *_AVX2, "AVXVNNI"),
    _x86("AVX-512", "skylake-avx512", *_AVX512),
    _x86("AVX2", "haswell", *_AVX2),
    _x86("portable", ""),
)
ARM = (
    InstructionSet(
        "NEON-I8MM",
        ("-march=armv8.2-a+dotprod+i8mm",),
        frozenset({"ARM_FEATURE_DOTPROD", "ARM_FEATURE_MATMUL_INT8"}),
    ),
    InstructionSet("NEON", ("-march=armv8.2-a+dotprod",), frozenset({"ARM_FEATURE_DOTPROD"})),
    InstructionSet("portable", ("-march=armv8-a",), frozenset()),
)
_OTHER = (InstructionSet("portable", (), frozenset()),)
_BY_MACHINE = {"x86_64": _X86, "AMD64": _X86, "aarch64": ARM, "arm64": ARM}


def of_machine(machine: str) -> tuple[InstructionSet, ...]:
    """The sets of an architecture, as `platform.machine` calls it, the best first."""
    return _BY_MACHINE.get(machine, _OTHER)


def all_here() -> tuple[InstructionSet, ...]:
    """The sets of this architecture, the best first."""
    return of_machine(platform.machine())


def runnable(present: Processor) -> Sequence[InstructionSet]:
    """The sets that a processor has, the best first; from `$JAXQUANT_INSTRUCTIONS` on if given.

    Raises:
      BuildError: the variable names none, or none that this processor has.
    """
    # A set without features runs on any processor of the architecture.
    found = [s for s in all_here() if not s.features or present.runs(s.features)]
    names = [s.name for s in found]
    if (most := os.environ.get(VARIABLE)) is None:
        return found
    if most not in names:
        raise BuildError(f"{VARIABLE} is {most!r}; what this processor has is {', '.join(names)}")
    # From there on: what is asked for is the most, not the only one.
    return found[names.index(most) :]
