"""How tensor element types look in LLVM: as values, in memory, and as literals."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kedge.compiler.errors import CodegenError


@dataclass(frozen=True, slots=True)
class ScalarType:
    """One element type: LLVM's name as a value and in memory, size in bytes, and how to read it."""

    dtype: str
    llvm: str
    memory: str
    size: int
    is_float: bool
    signed: bool

    @property
    def bits(self) -> int:
        """Bits in memory."""
        return self.size * 8


def _integer(dtype: str) -> ScalarType:
    signed = dtype.startswith("int")
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    return ScalarType(dtype, f"i{bits}", f"i{bits}", bits // 8, False, signed)


_TYPES: dict[str, ScalarType] = {
    name: _integer(name) for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
} | {
    "bool": ScalarType("bool", "i1", "i8", 1, False, False),
    "float16": ScalarType("float16", "half", "i16", 2, True, True),
    "bfloat16": ScalarType("bfloat16", "bfloat", "i16", 2, True, True),
    "float32": ScalarType("float32", "float", "float", 4, True, True),
    "float64": ScalarType("float64", "double", "double", 8, True, True),
}


def scalar_type(dtype: str) -> ScalarType:
    """The LLVM view of a dtype; raises CodegenError for one that this back end does not have."""
    try:
        return _TYPES[dtype]
    except KeyError:
        raise CodegenError(
            f"code generation for dtype {dtype!r} is not built yet", hint=f"cast to one of {', '.join(_TYPES)}"
        ) from None


def byte_size(dtype: str) -> int:
    """Bytes of one element in memory."""
    return scalar_type(dtype).size


def literal(value: int | float | bool, llvm: str) -> str:
    """A constant of LLVM type `llvm`, exact for floats."""
    if llvm == "i1":
        return "true" if value else "false"
    if llvm == "float":
        return f"0x{struct.unpack('<Q', struct.pack('<d', _to_float32(float(value))))[0]:016X}"
    if llvm == "double":
        return f"0x{struct.unpack('<Q', struct.pack('<d', float(value)))[0]:016X}"
    if llvm == "half":
        return f"0xH{struct.unpack('<H', struct.pack('<e', _to_float16(float(value))))[0]:04X}"
    return str(int(value))


def _to_float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _to_float16(value: float) -> float:
    try:
        return float(struct.unpack("<e", struct.pack("<e", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
