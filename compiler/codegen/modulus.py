"""The remainder of floats, exactly, as C's fmod, Python's `%` and numpy's floor_divide define it.

The quotient of two numbers is mostly short enough for a double, and then one product and one difference, both exact,
give the remainder. Where it is not, which is rare, it is worked out by long division, one binary digit at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kedge.compiler.codegen.builder import FunctionBuilder, Value
from kedge.compiler.codegen.floats import bits_of, exact_product, is_single, round_to, scale, unless_rare

#: Twice 2**51: adding and subtracting it rounds a number of at least 0 to a whole one.
_ROUNDER = 2.0**52


def fmod(b: FunctionBuilder, x: Value, y: Value) -> Value:
    """`x - trunc(x / y) * y`, exactly, with the sign of x; NaN where x is infinite or y is 0."""
    single = is_single(x)
    # A product of digits of a float and a quotient of as many as this has no more than a double.
    limit = 2.0**28 if single else 2.0**51
    a, c = (b.convert("fpext", b.intrinsic("llvm.fabs", v), "double") for v in (x, y))
    exact_product = single or b.target.fma

    def is_long(b: FunctionBuilder, args: Sequence[Value]) -> Value:
        a, c = args
        found = b.compare("fcmp oge", b.op("fdiv", a, c), b.const(limit, a))
        if not exact_product:  # it might overflow
            found = b.op("or", found, b.compare("fcmp oge", a, b.const(2.0**1020, a)))
        sound = b.op("and", b.compare("fcmp olt", a, b.const(math.inf, a)), b.compare("fcmp ogt", c, b.const(0.0, c)))
        larger = b.compare("fcmp oge", a, c)
        return b.op("and", b.op("and", found, larger), sound)

    rest = _short(b, a, c, plain=single)
    rest = unless_rare(b, f"long_rest{'' if single else '_wide'}", rest, [a, c], is_long, _long)
    return b.intrinsic("llvm.copysign", b.convert("fptrunc", rest, x.type), x)


def _short(b: FunctionBuilder, a: Value, c: Value, *, plain: bool) -> Value:
    """The rest of a / c, both at least 0: the nearest whole quotient is right, or one too large."""
    zero, rounder = b.const(0.0, a), b.const(_ROUNDER, a)
    n = b.op("fsub", b.op("fadd", b.op("fdiv", a, c), rounder), rounder)
    if b.target.fma:
        rest = b.intrinsic("llvm.fma", b.negate(n), c, a)
    elif plain:
        rest = b.op("fsub", a, b.op("fmul", n, c))
    else:
        product, error = exact_product(b, n, c)
        rest = b.op("fsub", b.op("fsub", a, product), error)
    rest = b.select(b.compare("fcmp olt", rest, zero), b.op("fadd", rest, c), rest)
    return b.select(b.compare("fcmp olt", a, c), a, rest)  # c may be infinite


def _long(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    """Of one finite a >= c > 0: shift and subtract whole numbers of 53 bits."""
    (m, exponent), (divisor, last) = (_parts(b, value) for value in args)
    one = b.const(1, m)
    head, body, done, before = b.fresh("loop"), b.fresh("digit"), b.fresh("done"), b.block
    rest, left = Value(f"%{b.fresh('rest')}", "i64"), Value(f"%{b.fresh('left')}", "i64")
    count = b.op("sub", exponent, last)
    b.jump(head)
    b.label(head)
    b.emit(f"{rest.ref} = phi i64 [ {m.ref}, %{before} ], [ {rest.ref}.next, %{body} ]")
    b.emit(f"{left.ref} = phi i64 [ {count.ref}, %{before} ], [ {left.ref}.next, %{body} ]")
    smaller = b.op("sub", rest, divisor)
    kept = b.select(b.compare("icmp ult", rest, divisor), rest, smaller)
    b.branch(b.compare("icmp sgt", left, b.const(0, left)), body, done)
    b.label(body)
    b.emit(f"{rest.ref}.next = shl {kept.typed}, {one.ref}")
    b.emit(f"{left.ref}.next = sub {left.typed}, {one.ref}")
    b.jump(head)
    b.label(done)
    high = b.convert("uitofp", b.convert("trunc", b.op("lshr", kept, b.const(32, kept)), "i32"), "double")
    low = b.convert("uitofp", b.convert("trunc", kept, "i32"), "double")
    whole = b.op("fadd", b.op("fmul", high, b.const(2.0**32, high)), low)
    return scale(b, whole, b.op("sub", last, b.const(1075, last)))


def _parts(b: FunctionBuilder, value: Value) -> tuple[Value, Value]:
    """A number above 0 as m * 2**(exponent - 1075), m of 53 bits."""
    bits = bits_of(b, value)
    field = b.op("lshr", bits, b.const(52, bits))
    digits = b.op("and", bits, b.const((1 << 52) - 1, bits))
    denormal = b.compare("icmp eq", field, b.const(0, field))
    digits = b.select(denormal, digits, b.op("or", digits, b.const(1 << 52, bits)))
    field = b.select(denormal, b.const(1, field), field)
    b.module.declare("llvm.ctlz.i64", "i64 @(i64, i1)")
    zeros = b.result(f"call i64 @llvm.ctlz.i64({digits.typed}, i1 true)", "i64")
    shift = b.op("sub", zeros, b.const(11, zeros))
    return b.op("shl", digits, shift), b.op("sub", field, shift)


# From it ---------------------------------------------------------------------------------------------------------


def floor_mod(b: FunctionBuilder, y: Value, rest: Value) -> Value:
    """The remainder with the sign of the divisor y, from fmod's."""
    moved = b.select(_is_opposite(b, y, rest), b.op("fadd", rest, y), rest)
    zero = b.const(0.0, rest)
    return b.select(b.compare("fcmp oeq", rest, zero), b.intrinsic("llvm.copysign", zero, y), moved)


def floor_div(b: FunctionBuilder, x: Value, y: Value, rest: Value) -> Value:
    """The largest whole number not above x / y, from fmod's remainder; x / y where y is 0.

    As numpy has it: where x is infinite, and 0 with the sign of x / y.
    """
    zero, one, quotient = b.const(0.0, x), b.const(1.0, x), b.op("fdiv", x, y)
    near = b.op("fdiv", b.op("fsub", x, rest), y)
    near = b.select(_is_opposite(b, y, rest), b.op("fsub", near, one), near)
    whole = round_to(b, near, "floor")
    short = b.compare("fcmp ogt", b.op("fsub", near, whole), b.const(0.5, near))
    whole = b.select(short, b.op("fadd", whole, one), whole)
    whole = b.select(b.compare("fcmp oeq", near, zero), b.intrinsic("llvm.copysign", zero, quotient), whole)
    return b.select(b.compare("fcmp oeq", y, zero), quotient, whole)


def _is_opposite(b: FunctionBuilder, y: Value, rest: Value) -> Value:
    zero = b.const(0.0, rest)
    differ = b.op("xor", b.compare("fcmp olt", rest, zero), b.compare("fcmp olt", y, zero))
    return b.op("and", differ, b.compare("fcmp une", rest, zero))
