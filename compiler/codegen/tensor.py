"""Instructions on small tiles: what a tensorized nest becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kedge.compiler.codegen.builder import FunctionBuilder, Value

#: Emits the instruction, given the addresses of its operands by name.
Emit = Callable[[FunctionBuilder, Mapping[str, str]], None]


def _load(b: FunctionBuilder, address: str, type_: str, lanes: int = 1) -> Value:
    full = type_ if lanes == 1 else f"<{lanes} x {type_}>"
    return b.result(f"load {full}, ptr {address}, align 1", type_, lanes)


def _accumulate(b: FunctionBuilder, name: str, address: str, lanes: int, left: Value, right: Value) -> None:
    """`c = instruction(c, left, right)` for a `c` of int32 lanes, or of float32 where the operands are of floats."""
    c = _load(b, address, "i32" if left.type == "i8" else "float", lanes)
    b.module.declare(name, f"{c.full} @({c.full}, {left.full}, {right.full})")
    made = b.result(f"call {c.full} @{name}({c.typed}, {left.typed}, {right.typed})", c.type, lanes)
    b.emit(f"store {made.typed}, ptr {address}, align 4")


def _dot(name: str, lanes: int, element: str = "i8") -> Emit:
    """Four bytes of `a` against four bytes per lane of `b`."""
    count = lanes * (4 if element == "i8" else 2)

    def emit(b: FunctionBuilder, at: Mapping[str, str]) -> None:
        four = b.broadcast(_load(b, at["a"], "i32"), lanes)
        left = b.result(f"bitcast {four.typed} to <{count} x {element}>", element, count)
        _accumulate(b, name, at["c"], lanes, left, _load(b, at["b"], element, count))

    return emit


def _mmla(name: str, element: str = "i8") -> Emit:
    """Two rows of eight bytes against two rows of eight bytes."""
    count = 16 if element == "i8" else 8

    def emit(b: FunctionBuilder, at: Mapping[str, str]) -> None:
        _accumulate(b, name, at["c"], 4, _load(b, at["a"], element, count), _load(b, at["b"], element, count))

    return emit


#: By the names of `schedule.intrinsics`.
EMITTERS: Mapping[str, Emit] = {
    "x86.vnni.dot": _dot("llvm.x86.avx512.vpdpbusd.512", 16),
    "x86.bf16.dot": _dot("llvm.x86.avx512bf16.dpbf16ps.512", 16, "bfloat"),
    "arm.sdot": _dot("llvm.aarch64.neon.sdot.v4i32.v16i8", 4),
    "arm.udot": _dot("llvm.aarch64.neon.udot.v4i32.v16i8", 4),
    "arm.smmla": _mmla("llvm.aarch64.neon.smmla.v4i32.v16i8"),
    "arm.ummla": _mmla("llvm.aarch64.neon.ummla.v4i32.v16i8"),
    "arm.usmmla": _mmla("llvm.aarch64.neon.usmmla.v4i32.v16i8"),
    "arm.bfdot": _dot("llvm.aarch64.neon.bfdot.v4f32.v8bf16", 4, "bfloat"),
    "arm.bfmmla": _mmla("llvm.aarch64.neon.bfmmla", "bfloat"),
}
