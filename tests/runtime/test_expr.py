"""Shape expressions in C against Python's integers, overflow included."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.rpc import abi
from support import native

INT64 = (-(1 << 63), (1 << 63) - 1)
SIGNS = {abi.EXPR_ADD: "+", abi.EXPR_SUB: "-", abi.EXPR_MUL: "*", abi.EXPR_FLOORDIV: "//", abi.EXPR_FLOORMOD: "%"}
Op = tuple[int, int]

values = st.one_of(st.integers(*INT64), st.integers(-5, 5), st.sampled_from([*INT64, INT64[1] - 1, INT64[0] + 1]))
leaves = st.one_of(
    st.tuples(st.just(abi.EXPR_CONST), values), st.tuples(st.just(abi.EXPR_SYMBOL), st.integers(0, 2))
).map(lambda op: [op])
programs = st.recursive(
    leaves,
    lambda inner: st.tuples(inner, inner, st.integers(abi.EXPR_ADD, abi.EXPR_MAX)).map(
        lambda parts: [*parts[0], *parts[1], (parts[2], 0)]
    ),
    max_leaves=16,
)


class Text(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char * 512), ("used", ctypes.c_size_t)]


@pytest.fixture(scope="session")
def lib() -> Any:
    flags = ("-shared", "-fPIC", "-DKEDGE_EXPOSE_INTERNALS")
    loaded = ctypes.CDLL(str(native.compile_c(native.library_sources(), *flags)))
    loaded.kedge_expr_check.restype = ctypes.c_char_p
    loaded.kedge_expr_eval.restype = ctypes.c_bool
    return loaded


def build(program: list[Op]) -> abi.Expr:
    ops = (abi.ExprOp * len(program))(*(abi.ExprOp(*op) for op in program))
    return abi.Expr(ops, len(program))


def evaluate(lib: Any, program: list[Op], symbols: list[int]) -> int | None:
    """The value, or None where C reports an overflow or a division by zero."""
    value = ctypes.c_int64()
    array = (ctypes.c_int64 * max(len(symbols), 1))(*symbols)
    return value.value if lib.kedge_expr_eval(ctypes.byref(build(program)), array, ctypes.byref(value)) else None


def reference(program: list[Op], symbols: list[int]) -> int | None:
    """The same by Python's integers, whose // and % are floored as well."""
    stack: list[int] = []
    for opcode, value in program:
        if opcode <= abi.EXPR_SYMBOL:
            stack.append(value if opcode == abi.EXPR_CONST else symbols[value])
            continue
        b, a = stack.pop(), stack.pop()
        if opcode in (abi.EXPR_FLOORDIV, abi.EXPR_FLOORMOD) and b == 0:
            return None
        functions = {abi.EXPR_ADD: a.__add__, abi.EXPR_SUB: a.__sub__, abi.EXPR_MUL: a.__mul__}
        functions |= {abi.EXPR_FLOORDIV: a.__floordiv__, abi.EXPR_FLOORMOD: a.__mod__}
        result = functions[opcode](b) if opcode in functions else (min if opcode == abi.EXPR_MIN else max)(a, b)
        if not INT64[0] <= result <= INT64[1]:
            return None
        stack.append(result)
    return stack[0]


@settings(max_examples=400, deadline=None)
@given(programs, st.lists(values, min_size=3, max_size=3))
def test_against_python(lib: Any, program: list[Op], symbols: list[int]) -> None:
    assert lib.kedge_expr_check(ctypes.byref(build(program)), 3) is None
    assert evaluate(lib, program, symbols) == reference(program, symbols)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 9), st.integers(-1, 3)), max_size=70))
def test_what_passes_the_check_can_be_evaluated(lib: Any, program: list[Op]) -> None:
    depth, sound = 0, 0 < len(program) <= 64
    for opcode, value in program:
        sound = sound and 0 <= opcode <= abi.EXPR_MAX and not (opcode == abi.EXPR_SYMBOL and not 0 <= value < 3)
        depth += 1 if opcode <= abi.EXPR_SYMBOL else -1
        sound = sound and 1 <= depth <= 32
    assert (lib.kedge_expr_check(ctypes.byref(build(program)), 3) is None) == (sound and depth == 1)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ([(0, 7)], b"7"),
        ([(1, 0), (0, 4), (abi.EXPR_MUL, 0)], b"N*4"),
        ([(1, 0), (1, 1), (abi.EXPR_ADD, 0), (0, 2), (abi.EXPR_FLOORDIV, 0)], b"(N + M)//2"),
        ([(1, 0), (0, 1), (1, 1), (abi.EXPR_SUB, 0), (abi.EXPR_MIN, 0)], b"min(N, 1 - M)"),
    ],
)
def test_printing(lib: Any, program: list[Op], text: bytes) -> None:
    symbols = (abi.Symbol * 2)(abi.Symbol(b"N"), abi.Symbol(b"M"))
    into = Text()
    lib.kedge_expr_print(ctypes.byref(build(program)), symbols, ctypes.byref(into))
    assert into.data == text


def test_a_long_text_is_cut(lib: Any) -> None:
    into = Text()
    for _ in range(100):
        lib.kedge_text_add(ctypes.byref(into), b"%s", b"0123456789")
    assert into.data == (b"0123456789" * 100)[:511]
