"""Which instructions the processor has, and which a library needs."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from typing import NamedTuple

_TEXT = 1 << 12

# Where CPUID tells of what a compiler may use on its own: (leaf, register) -> feature -> bit.
# `__FEATURE__` is the macro that GCC and Clang define where they may use it, on ARM `__FEATURE`.
_LEAVES = {
    ("1.0", "ecx"): {
        "SSE3": 0, "PCLMUL": 1, "SSSE3": 9, "FMA": 12, "SSE4_1": 19, "SSE4_2": 20, "MOVBE": 22,
        "POPCNT": 23, "AES": 25, "AVX": 28, "F16C": 29,
    },
    ("7.0", "ebx"): {
        "BMI": 3, "AVX2": 5, "BMI2": 8, "AVX512F": 16, "AVX512DQ": 17, "ADX": 19, "AVX512IFMA": 21,
        "AVX512PF": 26, "AVX512ER": 27, "AVX512CD": 28, "SHA": 29, "AVX512BW": 30, "AVX512VL": 31,
    },
    ("7.0", "ecx"): {
        "AVX512VBMI": 1, "AVX512VBMI2": 6, "GFNI": 8, "VAES": 9, "VPCLMULQDQ": 10, "AVX512VNNI": 11,
        "AVX512BITALG": 12, "AVX512VPOPCNTDQ": 14,
    },
    ("7.0", "edx"): {
        "AVX512VP2INTERSECT": 8, "AMX_BF16": 22, "AVX512FP16": 23, "AMX_TILE": 24, "AMX_INT8": 25,
    },
    ("7.1", "eax"): {"AVXVNNI": 4, "AVX512BF16": 5, "AMX_FP16": 21, "AVXIFMA": 23},
    ("7.1", "edx"): {
        "AVXVNNIINT8": 4, "AVXNECONVERT": 5, "AMX_COMPLEX": 8, "AVXVNNIINT16": 10, "AVX10_1": 19,
        "APX_F": 21,
    },
    ("80000001.0", "ecx"): {
        "LAHF_SAHF": 0, "LZCNT": 5, "SSE4A": 6, "XOP": 11, "FMA4": 16, "TBM": 21,
    },
}  # fmt: skip
_REGISTERS = ("eax", "ebx", "ecx", "edx")
_ARM = ("ARM_FEATURE_DOTPROD", "ARM_FEATURE_MATMUL_INT8")
_FEATURES = frozenset(name for bits in _LEAVES.values() for name in bits).union(_ARM)
# The registers that the operating system must save for a feature, by the start of its name; the
# first that fits.
_SAVED = {
    "AVX512": 0xE6, "AVX10": 0xE6, "AMX": 0x60000, "APX": 0x80000, "AVX": 0x6, "FMA": 0x6,
    "F16C": 0x6, "VAES": 0x6, "VPCLMUL": 0x6, "XOP": 0x6,
}  # fmt: skip


class Processor(NamedTuple):
    """The processor that this process sees.

    Attributes:
      features: those that a library may need; None where that is not known,
        on other architectures than x86-64 and ARM64.
    """

    features: frozenset[str] | None

    def runs(self, needs: Collection[str]) -> bool:
        """True where it is known to have all that is needed."""
        return self.features is not None and self.features.issuperset(needs)


def ask(library: ctypes.CDLL) -> Processor:
    """The processor, of the library that `src/processor.cc` is compiled to.

    Raises:
      AttributeError: it is another library.
    """
    library.jaxquant_processor.restype = None
    library.jaxquant_processor.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    buffer = ctypes.create_string_buffer(_TEXT)
    library.jaxquant_processor(buffer, _TEXT)
    # In text, which has no layout that both sides would have to agree on.
    return Processor(_features(buffer.value.decode()))


def _features(text: str) -> frozenset[str] | None:
    lines = {name: values for name, *values in map(str.split, text.splitlines())}
    if "arm" in lines:
        return frozenset(name for name, has in zip(_ARM, lines["arm"], strict=True) if has == "1")
    # Neither x86 nor ARM: nothing is known of it.
    if "xcr0" not in lines:
        return None
    # What the processor has and the system does not save is not there for a program.
    saved = int(lines["xcr0"][0], 16)
    found = set()
    for (leaf, register), bits in _LEAVES.items():
        value = int(lines[leaf][_REGISTERS.index(register)], 16)
        found |= {name for name, bit in bits.items() if value >> bit & 1}
    return frozenset(name for name in found if saved & (mask := _registers(name)) == mask)


def _registers(feature: str) -> int:
    return next((mask for start, mask in _SAVED.items() if feature.startswith(start)), 0)


def needed(macros: str) -> frozenset[str]:
    """The features that a compiler may use which predefines these macros (`-dM -E`)."""
    # The macros say what the compiler may use, whatever its flags are called.
    defined = {words[1] for line in macros.splitlines() if len(words := line.split()) > 1}
    return frozenset(name for name in _FEATURES if {f"__{name}__", f"__{name}"} & defined)
