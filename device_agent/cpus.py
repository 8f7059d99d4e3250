"""Tables of facts about CPUs: how the kernel names them, what the compiler calls them, what each is sure to have.

The names are LLVM's. A test holds the targets made from these tables against the compiler's own table.
"""

from __future__ import annotations

from typing import Dict, FrozenSet, Optional, Tuple

#: (implementer, part) as /proc/cpuinfo prints them -> LLVM's name of the CPU.
ARM_PARTS: Dict[Tuple[str, str], str] = {
    **{
        ("0x41", part): name
        for part, name in {
            "0xc05": "cortex-a5", "0xc07": "cortex-a7", "0xc08": "cortex-a8", "0xc09": "cortex-a9",
            "0xc0d": "cortex-a12", "0xc0e": "cortex-a17", "0xc0f": "cortex-a15",
            "0xd01": "cortex-a32", "0xd02": "cortex-a34", "0xd03": "cortex-a53", "0xd04": "cortex-a35",
            "0xd05": "cortex-a55", "0xd07": "cortex-a57", "0xd08": "cortex-a72", "0xd09": "cortex-a73",
            "0xd0a": "cortex-a75", "0xd0b": "cortex-a76", "0xd0c": "neoverse-n1", "0xd0d": "cortex-a77",
            "0xd0e": "cortex-a76ae", "0xd40": "neoverse-v1", "0xd41": "cortex-a78", "0xd42": "cortex-a78ae",
            "0xd44": "cortex-x1", "0xd46": "cortex-a510", "0xd47": "cortex-a710", "0xd48": "cortex-x2",
            "0xd49": "neoverse-n2", "0xd4a": "neoverse-e1", "0xd4b": "cortex-a78c", "0xd4c": "cortex-x1c",
            "0xd4d": "cortex-a715", "0xd4e": "cortex-x3", "0xd4f": "neoverse-v2", "0xd80": "cortex-a520",
            "0xd81": "cortex-a720", "0xd82": "cortex-x4", "0xd84": "neoverse-v3", "0xd8e": "neoverse-n3",
        }.items()
    },
    ("0x43", "0x0af"): "thunderx2t99",
    ("0x46", "0x001"): "a64fx",
    ("0x48", "0xd01"): "tsv110",
    ("0x4e", "0x004"): "carmel",
    ("0xc0", "0xac3"): "ampere1",
    ("0xc0", "0xac4"): "ampere1a",
}  # fmt: skip

#: Intel's family 6 by model number.
INTEL_MODELS: Dict[int, str] = {
    **dict.fromkeys((0x1A, 0x1E, 0x1F, 0x2E), "nehalem"),
    **dict.fromkeys((0x2A, 0x2D), "sandybridge"),
    **dict.fromkeys((0x3C, 0x3F, 0x45, 0x46), "haswell"),
    **dict.fromkeys((0x3D, 0x47, 0x4F, 0x56), "broadwell"),
    **dict.fromkeys((0x4E, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6), "skylake"),
    0x55: "skylake-avx512",
    **dict.fromkeys((0x6A, 0x6C), "icelake-server"),
    **dict.fromkeys((0x7D, 0x7E), "icelake-client"),
    0xA7: "rocketlake",
    **dict.fromkeys((0x8C, 0x8D), "tigerlake"),
    **dict.fromkeys((0x97, 0x9A, 0xBE), "alderlake"),
    **dict.fromkeys((0xB7, 0xBA, 0xBF), "raptorlake"),
    **dict.fromkeys((0xAA, 0xAC), "meteorlake"),
    **dict.fromkeys((0xB5, 0xC5), "arrowlake"),
    0xC6: "arrowlake-s",
    0xBD: "lunarlake",
    0x8F: "sapphirerapids",
    0xCF: "emeraldrapids",
    0xAD: "graniterapids",
    0xAE: "graniterapids-d",
}


def amd_cpu(family: int, model: int) -> Optional[str]:
    """AMD's Zen generations from the second on."""
    if family == 0x17:
        return "znver2" if model >= 0x30 else None
    if family == 0x19:
        return "znver4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0x7F or 0xA0 <= model <= 0xAF else "znver3"
    return "znver5" if family == 0x1A else None


TRIPLES: Dict[str, str] = {
    "x86_64": "x86_64-linux-gnu",
    "aarch64": "aarch64-linux-gnu",
    "armv7l": "armv7l-linux-gnueabihf",
    "riscv64": "riscv64-linux-gnu",
}

#: What is tuned for where nothing better is known.
GENERIC: Dict[str, str] = {
    "x86_64": "x86-64",
    "aarch64": "generic",
    "armv7l": "generic",
    "riscv64": "generic-rv64",
}

_V2 = frozenset({"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"})
_AVX = _V2 | {"avx"}
_V3 = _AVX | {"avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _V4 | {"avx512vnni"}
_ARM82 = frozenset({"dotprod", "fullfp16", "rdm"})
_ARM86 = _ARM82 | {"fp16fml", "i8mm", "bf16"}
_V7 = frozenset({"neon", "vfp4", "fp16", "hwdiv", "hwdiv-arm"})
_V8_32 = _V7 | {"crc"}
_NONE: FrozenSet[str] = frozenset()

#: x86-64 levels of the psABI, lowest first, with all that each promises.
X86_LEVELS: Tuple[Tuple[str, FrozenSet[str]], ...] = (
    ("x86-64-v2", _V2),
    ("x86-64-v3", _V3),
    ("x86-64-v4", _V4),
)

#: Per architecture, the CPUs that the compiler tunes for, with the features that naming one promises.
TUNED: Dict[str, Dict[str, FrozenSet[str]]] = {
    "x86_64": {
        **dict(X86_LEVELS),
        "nehalem": _V2, "sandybridge": _AVX, "haswell": _V3, "broadwell": _V3, "skylake": _V3,
        **dict.fromkeys(("alderlake", "raptorlake", "meteorlake"), _V3 | {"avxvnni"}),
        **dict.fromkeys(("arrowlake", "arrowlake-s", "lunarlake"), _V3 | {"avxvnni"}),
        "skylake-avx512": _V4,
        **dict.fromkeys(("icelake-client", "icelake-server", "rocketlake", "tigerlake"), _VNNI),
        **dict.fromkeys(
            ("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d"),
            _VNNI | {"avx512bf16", "avxvnni"},
        ),
        "znver2": _V3, "znver3": _V3,
        "znver4": _VNNI | {"avx512bf16"}, "znver5": _VNNI | {"avx512bf16", "avxvnni"},
    },
    "aarch64": {
        **dict.fromkeys(("cortex-a35", "cortex-a53", "cortex-a57", "cortex-a72", "cortex-a73"), _NONE),
        **dict.fromkeys(("cortex-a55", "cortex-a75", "cortex-a76", "cortex-a78", "cortex-a78ae"), _ARM82),
        **dict.fromkeys(("cortex-x1", "neoverse-n1"), _ARM82),
        **dict.fromkeys(("neoverse-v1", "neoverse-n2", "neoverse-v2"), _ARM86),
    },
    "armv7l": {
        "cortex-a7": _V7, "cortex-a8": frozenset({"neon"}), "cortex-a9": frozenset({"neon", "fp16"}),
        "cortex-a15": _V7, "cortex-a53": _V8_32, "cortex-a72": _V8_32,
    },
    "riscv64": {},
}  # fmt: skip

#: CPUs that the compiler does not tune for -> the nearest relative that it does.
RELATIVES: Dict[str, str] = {
    "cortex-a5": "cortex-a7", "cortex-a12": "cortex-a15", "cortex-a17": "cortex-a15",
    "cortex-a32": "cortex-a53", "cortex-a34": "cortex-a35",
    "cortex-a77": "cortex-a76", "cortex-a76ae": "cortex-a76", "cortex-a78c": "cortex-a78", "cortex-x1c": "cortex-x1",
    "cortex-a510": "cortex-a55", "cortex-a520": "cortex-a55",
    "cortex-a710": "cortex-a78", "cortex-a715": "cortex-a78", "cortex-a720": "cortex-a78",
    "cortex-x2": "neoverse-n2", "cortex-x3": "neoverse-v2", "cortex-x4": "neoverse-v2",
    "neoverse-v3": "neoverse-v2", "neoverse-n3": "neoverse-n2", "neoverse-e1": "neoverse-n1",
    "thunderx2t99": "cortex-a72", "tsv110": "cortex-a76", "carmel": "cortex-a75",
    "ampere1": "neoverse-n1", "ampere1a": "neoverse-n1", "a64fx": "cortex-a72",
}  # fmt: skip

#: Features that code may use beyond what a CPU's name promises; a target names those that are there.
OPTIONAL: Dict[str, Tuple[str, ...]] = {
    "x86_64": (
        *sorted(_V4), "avx512vnni", "avx512bf16", "avx512fp16", "avxvnni", "amx-tile", "amx-int8", "amx-bf16",
    ),
    "aarch64": ("crc", "lse", "rdm", "fullfp16", "fp16fml", "dotprod", "i8mm", "bf16", "sve", "sve2"),
    "armv7l": ("neon", "fp16", "vfp4", "hwdiv", "hwdiv-arm", "crc", "dotprod"),
    "riscv64": ("v",),
}  # fmt: skip
