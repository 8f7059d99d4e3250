"""Size expressions as postfix programs: what kedge.h calls `kedge_expr`, and what the kernel cache stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from kedge.compiler.errors import CodegenError
from kedge.compiler.tir.expr import Binary, BinaryOp, Const, Dim, Expr, Var, as_expr, const

#: (opcode, value) pairs in kedge.h's numbering.
Program: TypeAlias = tuple[tuple[int, int], ...]
CONST: Final = 0
SYMBOL: Final = 1
_OPCODES: Final[Mapping[str, int]] = {"add": 2, "sub": 3, "mul": 4, "floordiv": 5, "floormod": 6, "min": 7, "max": 8}
_NAMES: Final[Mapping[int, BinaryOp]] = {code: name for name, code in _OPCODES.items()}  # type: ignore[misc]
MAX_OPS: Final = 4096
MAX_DEPTH: Final = 32


def encode(dim: Dim, symbols: Sequence[Var]) -> Program:
    """The program of a size over `symbols`.

    Raises:
        CodegenError: the expression uses another variable or operator, or is longer than the ABI allows.
    """
    numbers = {var: number for number, var in enumerate(symbols)}
    ops: list[tuple[int, int]] = []
    deepest = _encode(as_expr(dim), numbers, ops)
    if len(ops) > MAX_OPS or deepest > MAX_DEPTH:
        raise CodegenError(
            f"a size expression over free dims has {len(ops)} operations; the ABI allows {MAX_OPS}",
            hint="fix some dims of the inputs: shapes={...} or --shape NAME=1,3,224,224",
        )
    return tuple(ops)


def _encode(expr: Expr, numbers: Mapping[Var, int], ops: list[tuple[int, int]]) -> int:
    """Append the operations of `expr`; gives the depth of stack they need."""
    match expr:
        case Const(value=value):
            ops.append((CONST, int(value)))
            return 1
        case Var() if expr in numbers:
            ops.append((SYMBOL, numbers[expr]))
            return 1
        case Binary(op=op, a=a, b=b) if op in _OPCODES:
            left = _encode(a, numbers, ops)
            right = _encode(b, numbers, ops)
            ops.append((_OPCODES[op], 0))
            return max(left, right + 1)
    raise CodegenError(f"a size may not depend on {expr!r}", hint="sizes are sums, products, quotients of input dims")


def decode(program: Program, symbols: Sequence[Expr]) -> Dim:
    """The size that `program` computes, over other expressions for its symbols."""
    stack: list[Expr] = []
    for opcode, value in program:
        if opcode == CONST:
            stack.append(const(value))
        elif opcode == SYMBOL:
            stack.append(symbols[value])
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(Binary(_NAMES[opcode], left, right))
    (result,) = stack
    return int(result.value) if isinstance(result, Const) else result
