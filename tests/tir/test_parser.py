"""Text that is read back: every function survives, and what is malformed is refused where it is."""

import functools
import re
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import ParseError, VerifyError
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.tir.expr import (
    BINARY_OPS,
    COMPARISONS,
    LOGICAL,
    Binary,
    Cast,
    Const,
    Expr,
    Lead,
    Load,
    Select,
    Var,
    call,
    const,
)
from kedge.compiler.tir.parser import parse_func, read_func
from kedge.compiler.tir.printer import print_func
from kedge.compiler.tir.stmt import Block, Buffer, For, If, IterKind, IterVar, PrimFunc, Range, Region, Seq, Store
from kedge.compiler.tir.structural import equal
from kedge.compiler.tir.verify import verify
from support.functions import SAMPLES, dense
from support.targets import TARGETS


def check(func: PrimFunc) -> None:
    """It reads back to an equal function, which prints the same."""
    again = parse_func(func.show())
    assert equal(again, func)
    assert again.show() == func.show()
    assert (again.name, again.n_outputs) == (func.name, func.n_outputs)


@pytest.mark.parametrize("name", SAMPLES)
def test_functions_and_their_schedules(name):
    check(SAMPLES[name])
    for target in TARGETS.values():
        check(schedule_func(SAMPLES[name], target).func)


def test_everything_a_function_can_have():
    n, m = Var("n", lower=1, upper=8), Var("m")
    y = Buffer("y", (m, n * 2 + 1), "float32")
    r, odd = Buffer("r", (1,), "float32", "register"), Buffer("block", (), "int8", "shared")
    i, j, vi = Var("i"), Var("i"), Var("layer/0.x")
    notes = MappingProxyType({"b": 1, "a": "x, y=2", "list": [1, None, True]})
    whole = (Region(r, (Range(const(0), const(1)),)),)
    body = Store(r, (const(0),), const(float("-inf"), "float32"))
    init = Store(r, (const(0),), const(float("nan"), "float32"))
    first = Block("first one", (iter_var(vi, 3, "reduce"),), (i,), (), whole, body, init, i < 2, notes)
    both = (Region(y, (Range(const(1), const(2)), Range(const(0), n))), Region(odd, ()))
    stored = Seq((Store(y, (const(0), const(-1)), Load(r, (const(0),))), Store(odd, (), const(-3, "int8"))))
    last = Block("last", (), (), whole, both, stored)
    nest = For(i, n, "thread", If(i < 2, first, Seq(())), "blockIdx.x", MappingProxyType({"a.b": 2, "if": "z"}))
    check(PrimFunc("f", (y,), 1, Seq((nest, For(j, m, "parallel", last))), (r, odd), (m, n)))


def iter_var(var: Var, extent: int, kind: IterKind) -> IterVar:
    return IterVar(var, const(extent), kind)


def test_a_lead_is_of_the_parameter_as_the_text_calls_it():
    n = Var("n", lower=1)
    x, y = Buffer("n", (n,), "float32"), Buffer("y", (n,), "float32")
    lead = Lead("n_lead", lower=0, upper=15, buffer="n")
    func = PrimFunc("f", (x, y), 1, Store(y, (const(0),), Load(x, (const(0),))), symbols=(n, lead))
    assert "n_lead <= 15 before n_1" in print_func(func)
    check(func)


def test_symbols_without_a_where_come_in_order_of_appearance():
    func = parse_func("func f(x: int8[b, a]) -> (y: int8[a + 1, min(a, b)]):\n  pass")
    assert [var.name for var in func.symbols] == ["b", "a"]


def test_comments_and_empty_lines_are_passed_over():
    text = dense(2, 3, 4).show()
    lines = text.splitlines()
    spaced = "\n".join([lines[0], "", "# what follows", "  # multiplies", *lines[1:]])
    assert equal(parse_func(spaced), parse_func(text))


X, ROW, COL, B = Buffer("x", (4,), "float32"), Var("i"), Var("j"), Buffer("flag", (4,), "bool")
DTYPES = ["int64", "int8", "uint8", "float32", "float64", "float16", "bfloat16"]


@st.composite
def expressions(draw: st.DrawFn, dtype: str, depth: int = 4) -> Expr:
    """A valid expression of a dtype."""
    floating = "float" in dtype
    leaf = depth == 0 or draw(st.booleans())
    if dtype == "bool":
        if leaf:
            return draw(st.sampled_from([const(True, "bool"), const(False, "bool"), Load(B, (ROW,))]))
        other = draw(st.sampled_from([*DTYPES]))
        of = lambda kind: expressions(kind, depth - 1)  # noqa: E731 - shorter than its name
        if draw(st.booleans()):
            return Binary(draw(st.sampled_from(sorted(LOGICAL))), draw(of("bool")), draw(of("bool")))
        return Binary(draw(st.sampled_from(sorted(COMPARISONS))), draw(of(other)), draw(of(other)))
    if leaf:
        value = st.floats(width=16) if floating else st.integers(0 if dtype == "uint8" else -100, 100)
        leaves: list[Expr] = [Const(draw(value), dtype)]
        leaves += [ROW, COL] if dtype == "int64" else []
        leaves += [Load(X, (ROW,))] if dtype == "float32" else []
        return draw(st.sampled_from(leaves))
    kind = draw(st.sampled_from(["binary", "cast", "select", "call"]))
    same = expressions(dtype, depth - 1)
    if kind == "binary":
        never = LOGICAL | COMPARISONS | {"truncdiv" if floating else "div"}
        return Binary(draw(st.sampled_from(sorted(BINARY_OPS - never))), draw(same), draw(same))
    if kind == "cast":
        return Cast(draw(expressions(draw(st.sampled_from([*DTYPES, "bool"])), depth - 1)), dtype)
    if kind == "select":
        return Select(draw(expressions("bool", depth - 1)), draw(same), draw(same))
    return call(draw(st.sampled_from(["exp", "abs", "floor"])), draw(same))


@given(st.sampled_from([*DTYPES, "bool"]).flatmap(expressions))
@settings(max_examples=300, deadline=None)
def test_expressions(value: Expr):
    out = Buffer("out", (), value.dtype)
    body = For(ROW, const(4), "serial", For(COL, const(4), "serial", Block("b", (), (), (), (), Store(out, (), value))))
    func = PrimFunc("f", (X, B, out), 1, body)
    assert equal(read_func(func.show()), func), func.show()


GOOD = """func f(x: float32[n]) -> (y: float32[n]) where n >= 1:
  for i in range(n):
    block y:
      vi = spatial(n, i)
      reads x[vi]
      writes y[vi]
      y[vi] = x[vi] + 1.0"""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("func", "function", "line 1, column 1: wanted 'func', not 'function'"),
        ("float32[n])", "float31[n])", "wanted a dtype, not 'float31'"),
        ("range", "raenge", "line 2, column 12: wanted a kind of loop: range, parallel"),
        ("range(n)", "range(m)", "a variable that is declared around this line, which m is not"),
        ("spatial(n, i)", "spatial(n)", "wanted ','"),
        ("reads x[vi]", "reads z[vi]", "a buffer that is declared, which z is not"),
        ("x[vi] + 1.0", "x[vi] + 1", "line 7.*operands of add to have one dtype, which float32 and int64 have not"),
        ("x[vi] + 1.0", "x[vi] +", "wanted an expression, not 'the end of the line'"),
        ("x[vi] + 1.0", "x[vi] < 1.0 < 2.0", "wanted the end of the line, not '<'"),
        ("x[vi] + 1.0", "expo(x[vi])", "a function that exists, which expo does not"),
        ("x[vi] + 1.0", "select(x[vi], x[vi])", "3 arguments of select, not 2"),
        ("x[vi] + 1.0", "y + 1.0", "a variable that is declared around this line, which y is not"),
        ("x[vi] + 1.0", "x[vi] ? 1.0", r"wanted a token, not '\?'"),
        ("      y[vi]", "        y[vi]", "line 7, column 9: wanted an indentation of 6 blanks"),
        ("  for i", "for i", "line 1: nothing is nested under it"),
        ("(y: float32[n])", "(x: float32[n])", "another name: x is declared twice"),
    ],
)
def test_malformed_text_is_refused_where_it_is(old, new, reason):
    assert old in GOOD
    with pytest.raises(ParseError, match=reason):
        parse_func(GOOD.replace(old, new, 1))


def test_text_of_an_invalid_function_is_refused():
    with pytest.raises(VerifyError, match="without saying so"):
        parse_func(GOOD.replace("      reads x[vi]\n", ""))
    with pytest.raises(ParseError, match="line 8, column 1: wanted the end of the text"):
        parse_func(GOOD + "\nfunc g() -> ():\n  pass")
    with pytest.raises(ParseError, match="wanted func"):
        parse_func("")


def test_the_good_text_is_good():
    assert verify(parse_func(GOOD)).show() == GOOD


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "x: float32[n]",
            "x: float32[4.9]",
            "line 1, column 19: wanted a dim, .*, not '4.9'",
        ),
        ("x: float32[n]", "x: float32[inf]", "wanted a dim, .*, not 'inf'"),
        ("x: float32[n]", "x: float32[nan]", "wanted a dim, .*, not 'nan'"),
        ("x: float32[n]", "x: float32[True]", "wanted a dim, .*, not 'True'"),
        ("x: float32[n]", "x: float32[-1]", "wanted a dim, .*, not '-'"),
        ("x: float32[n]", "x: float32[n < 2]", "wanted a dim, .*, not 'n'"),
        (
            "x: float32[n]",
            "x: float32[99999999999999999999]",
            "wanted a dim, .*, not '9+'",
        ),
        ("where n >= 1", "where n >= " + "9" * 5000, "wanted an integer"),
        ("range(n)", f"range({'9' * 5000})", "wanted a number of at most 20 digits"),
        ("x[vi] + 1.0", "int8(inf)", "wanted a value of int8"),
        ("x[vi] + 1.0", "int8(nan)", "wanted a value of int8"),
        ("x[vi] + 1.0", "int8(1.5)", "wanted a value of int8"),
        ("x[vi] + 1.0", "float32(" + "9" * 310 + ".0)", "wanted a number that float64 holds"),
        ("range(n):", "range(n):  # {1, 2}", "annotations: key=value"),
        ("range(n):", "range(n):  # key=f()", "annotations: key=value"),
        ("range(n):", "range(n):  # key={1}", "annotations: key=value"),
        ("range(n):", "range(n):  # key=" + "[" * 300 + "]" * 300, "annotations: key=value"),
        ("range(n):", "thread(n, '\\x'):", "escapes are those of Python"),
        ("block y", 'block "\\q"', "wanted a name"),
        ("x[vi] + 1.0", "(" * 3000 + "x[vi]" + ")" * 3000, "nested too deeply"),
    ],
)
def test_numbers_and_texts_that_nothing_can_hold(old, new, reason):
    assert old in GOOD
    with pytest.raises(ParseError, match=reason):
        parse_func(GOOD.replace(old, new, 1))


@functools.cache
def texts() -> list[str]:
    """Functions as text, plain and scheduled."""
    scheduled = [
        schedule_func(SAMPLES[name], target).func for name in ("dense", "softmax") for target in TARGETS.values()
    ]
    return [func.show() for func in (*SAMPLES.values(), *scheduled)]


PIECES = re.compile(r"\s+|\w+|.", re.DOTALL)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A good text in which some pieces are left out, repeated, swapped or replaced."""
    pieces = PIECES.findall(draw(st.sampled_from(texts())))
    words = st.one_of(
        st.sampled_from(pieces),
        st.sampled_from(
            ["-", "1.5", "inf", "nan", "True", "0", "1e400", "99999999999999999999", '"', "'", "#", "\n", "  "]
        ),
        st.text(max_size=3),
    )
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(pieces) - 1))
        other = draw(st.integers(0, len(pieces) - 1))
        match draw(st.sampled_from(["drop", "repeat", "swap", "replace", "cut"])):
            case "drop":
                pieces[at] = ""
            case "repeat":
                pieces[at] *= 2
            case "swap":
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case "replace":
                pieces[at] = draw(words)
            case "cut":
                pieces[at:] = [""]
                break
    return "".join(pieces)


@given(mutated())
@settings(max_examples=400, deadline=None)
def test_broken_texts_are_functions_or_refused(text):
    try:
        func = parse_func(text)
    except (ParseError, VerifyError):
        return
    assert equal(parse_func(func.show()), func)
