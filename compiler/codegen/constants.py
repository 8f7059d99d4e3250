"""Constants of an LLVM module: texts, arrays and numbers that descriptors and calls point to."""

from __future__ import annotations

from collections.abc import Sequence

from kedge.compiler.codegen.builder import ModuleBuilder
from kedge.compiler.codegen.shapes import encode
from kedge.compiler.codegen.types import literal
from kedge.compiler.tir.expr import Dim, Var

EXPR_OP = "{ i64, i64 }"


class Constants:
    """Private constants of the module, by name."""

    def __init__(self, module: ModuleBuilder) -> None:
        self.module = module
        self._count = 0

    def constant(self, type_: str, value: str) -> str:
        """A new private constant; gives its reference."""
        self._count += 1
        ref = f"@kedge.c{self._count}"
        self.module.add(f"{ref} = private unnamed_addr constant {type_} {value}")
        return ref

    def array(self, type_: str, values: Sequence[str]) -> str:
        """An array of constants; "null" when there is nothing in it."""
        if not values:
            return "null"
        inside = ", ".join(f"{type_} {value}" for value in values)
        return self.constant(f"[{len(values)} x {type_}]", f"[{inside}]")

    def text(self, text: str) -> str:
        """A C string."""
        type_, _, value = c_string(text).partition(" c")
        return self.constant(type_, f"c{value}")

    def numbers(self, values: Sequence[int | float]) -> str:
        """An array of i64, or of doubles where the first number is a float."""
        type_ = "double" if isinstance(values[0], float) else "i64"
        return self.array(type_, [literal(value, type_) for value in values])

    def expr(self, dim: Dim, symbols: Sequence[Var]) -> str:
        """A `kedge_expr`."""
        program = encode(dim, symbols)
        ops = self.array(EXPR_OP, [f"{{ i64 {code}, i64 {value} }}" for code, value in program])
        return f"{{ ptr {ops}, i64 {len(program)} }}"


def c_string(text: str) -> str:
    """A text that ends in NUL as an LLVM constant, its type in front."""
    data = text.encode() + b"\0"
    escaped = "".join(chr(c) if 32 <= c < 127 and c not in b'"\\' else f"\\{c:02X}" for c in data)
    return f'[{len(data)} x i8] c"{escaped}"'


def size_of(type_: str) -> str:
    """The bytes of an LLVM type, as a constant expression."""
    return f"ptrtoint (ptr getelementptr ({type_}, ptr null, i32 1) to i64)"
