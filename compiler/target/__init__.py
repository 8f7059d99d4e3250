"""Targets: which machine code is for, what it may use there, and the facts of its ABI."""

from kedge.compiler.target.arch import AARCH64, ARCHS, ARMV7, RISCV64, X86_64, Arch
from kedge.compiler.target.gpu import GpuTarget
from kedge.compiler.target.model import Target
from kedge.compiler.target.parse import AnyTarget, known_tags, parse, parse_all, parse_cpu

__all__ = [
    "AARCH64", "ARCHS", "ARMV7", "RISCV64", "X86_64", "AnyTarget", "Arch", "GpuTarget", "Target", "known_tags", "parse",
    "parse_all", "parse_cpu",
]  # fmt: skip
