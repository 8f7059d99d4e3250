"""Powers: of integers exactly, of floats through the logarithm to base 2.

In double the logarithm has about 100 bits, as an unevaluated sum of two doubles (T. J. Dekker, "A floating-point
technique for extending the available precision", Numerische Mathematik 18, 1971), for the factor y makes of an error
of the logarithm one y times as large. In float the double-precision exp and log have bits enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from kedge.compiler.codegen.builder import FunctionBuilder, Value
from kedge.compiler.codegen.floats import (
    EXP64,
    MAGIC64,
    MAGIC_BITS64,
    any_lane,
    bits_of,
    clamp,
    exact_product,
    hex_floats,
    polynomial,
    scale,
    suffix,
)

#: The unevaluated sum of two numbers, the second below the last place of the first.
_Pair: TypeAlias = tuple[Value, Value]

# log2((1 + s) / (1 - s)) / s in z = s**2 for 1/sqrt(2) <= (1 + s) / (1 - s) <= sqrt(2): 2 / ln 2 * (1 + z/3 + z**2/5),
# each coefficient in two parts, and z**3 times a polynomial interpolated at Chebyshev's points.
_LOG2 = (
    hex_floats("0x1.71547652b82fep+1", "0x1.777d0ffda0d24p-55"),
    hex_floats("0x1.ec709dc3a03fdp-1", "0x1.d27f05548af0cp-55"),
    hex_floats("0x1.2776c50ef9bfep-1", "0x1.e4b29ccc535d4p-55"),
)
_LOG2_TAIL = hex_floats(
    "0x1.a61762a7aded9p-2", "0x1.484b13d7c0367p-2", "0x1.0c9a84991f1e6p-2", "0x1.c68f56d313d4ap-3",
    "0x1.89f38d24d616cp-3", "0x1.5ba4fc37bc298p-3", "0x1.356eeed52aee1p-3", "0x1.39bab67469dccp-3",
)  # fmt: skip
_LN2_HI, _LN2_LO = hex_floats("0x1.62e42fefa39efp-1", "0x1.abc9e3b39803fp-56")
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


# Integers -------------------------------------------------------------------------------------------------------


def integer_power(b: FunctionBuilder, x: Value, y: Value, *, signed: bool) -> Value:
    """`x ** y` of integers of one type, by squaring; it wraps around.

    A negative power is the reciprocal without its fraction, so 0 but for 1 and -1; of 0 it is 0, as division by 0
    gives 0.
    """
    if y.is_const and y.ref.isdigit():
        return _known_power(b, x, int(y.ref))
    lanes = max(x.lanes, y.lanes)
    params = [b.broadcast(x, lanes), b.broadcast(y, lanes)]
    name = f"kedge.ipow{'' if signed else 'u'}.{suffix(params[0])}"

    def build(b: FunctionBuilder, args: Sequence[Value]) -> Value:
        base, power = _reciprocal_as_power(b, *args) if signed else args
        return _power_by_squaring(b, base, power)

    b.module.helper(name, params[0], params, build)
    return b.call(name, params[0], params)


def _known_power(b: FunctionBuilder, x: Value, y: int) -> Value:
    result = None
    while y:
        if y & 1:
            result = x if result is None else b.op("mul", result, x)
        y >>= 1
        if y:
            x = b.op("mul", x, x)
    return b.const(1, x) if result is None else result


def _reciprocal_as_power(b: FunctionBuilder, x: Value, y: Value) -> tuple[Value, Value]:
    """A base and a power of at least 0 with the same result."""
    zero, one = b.const(0, x), b.const(1, x)
    negative = b.compare("icmp slt", y, zero)
    unit = b.op("or", b.compare("icmp eq", x, one), b.compare("icmp eq", x, b.const(-1, x)))
    base = b.select(b.op("and", negative, b.op("xor", unit, b.const(True, "i1"))), zero, x)
    power = b.select(unit, b.op("and", y, one), b.select(negative, one, y))
    return base, power


def _power_by_squaring(b: FunctionBuilder, x: Value, y: Value) -> Value:
    """For y of at least 0: a round per binary digit, until no lane has one left."""
    head, body, done, before = b.fresh("loop"), b.fresh("digit"), b.fresh("done"), b.block
    one, zero = b.const(1, x), b.const(0, x)
    result, base, power = (Value(f"%{b.fresh('p')}", x.type, x.lanes) for _ in range(3))
    start = b.broadcast(one, x.lanes)
    b.jump(head)
    b.label(head)
    for phi, first in ((result, start), (base, x), (power, y)):
        b.emit(f"{phi.ref} = phi {phi.full} [ {first.ref}, %{before} ], [ {phi.ref}.next, %{body} ]")
    b.branch(any_lane(b, b.compare("icmp ne", power, zero)), body, done)
    b.label(body)
    odd = b.compare("icmp ne", b.op("and", power, one), zero)
    times = b.op("mul", result, base)
    b.emit(f"{result.ref}.next = select {odd.typed}, {times.typed}, {result.typed}")
    b.emit(f"{base.ref}.next = mul {base.typed}, {base.ref}")
    b.emit(f"{power.ref}.next = lshr {power.typed}, {start.ref}")
    b.jump(head)
    b.label(done)
    return result


# Floats ---------------------------------------------------------------------------------------------------------


def power_of_magnitude(b: FunctionBuilder, a: Value, y: Value) -> Value:
    """`a ** y` of doubles, a >= 0 or NaN: 2**(y log2(a)), 0.8 ULP; NaN where both 0 * infinity and 1 would make sense.

    Powers that a double holds exactly come out exactly.
    """
    infinite = b.const(math.inf, a)
    high, low = _log2(b, a)
    odd = b.compare("fcmp ueq", a, infinite)  # or NaN
    high, low = b.select(odd, a, high), b.select(odd, b.const(0.0, a), low)
    empty = b.compare("fcmp oeq", a, b.const(0.0, a))
    high, low = b.select(empty, b.const(-math.inf, a), high), b.select(empty, b.const(0.0, a), low)
    # Enough for every base but 1 to overflow, and little enough for exact products.
    y = clamp(b, y, -(2.0**70), 2.0**70)
    whole, part = exact_product(b, y, high)
    part = b.mul_add(y, low, part)
    size = b.intrinsic("llvm.fabs", whole)
    part = b.select(b.compare("fcmp ogt", size, b.const(1100.0, size)), b.const(0.0, a), part)
    return _exp2(b, (clamp(b, whole, -1100.0, 1100.0), part))


def _log2(b: FunctionBuilder, a: Value) -> _Pair:
    """a = 2**k z with z in [sqrt(1/2), sqrt(2)), s = (z - 1) / (z + 1); k + s * (polynomial in s**2)."""
    tiny = b.compare("fcmp olt", a, b.const(2.0**-1022, a))
    bits = bits_of(b, b.select(tiny, b.op("fmul", a, b.const(2.0**52, a)), a))
    k = b.op("ashr", b.op("sub", bits, b.const(_SQRT_HALF_BITS, bits)), b.const(52, bits))
    z = b.convert("bitcast", b.op("sub", bits, b.op("shl", k, b.const(52, bits))), "double")
    k = b.op("sub", k, b.select(tiny, b.const(52, k), b.const(0, k)))
    exponent = b.convert("sitofp", b.convert("trunc", k, "i32"), "double")
    s = _quotient_of_difference_and_sum(b, z)
    square = _times(b, s, s)
    tail = b.op("fmul", square[0], polynomial(b, square[0], _LOG2_TAIL))
    total = _plus_small(b, _constant(b, _LOG2[2], a), (tail, b.const(0.0, a)))
    for coefficient in (_LOG2[1], _LOG2[0]):
        total = _plus_small(b, _constant(b, coefficient, a), _times(b, square, total))
    return _plus_small(b, (exponent, b.const(0.0, a)), _times(b, s, total))


def _quotient_of_difference_and_sum(b: FunctionBuilder, z: Value) -> _Pair:
    """(z - 1) / (z + 1), z in [1/2, 2]."""
    one = b.const(1.0, z)
    over = b.op("fsub", z, one)
    under = b.op("fadd", z, one)
    under_low = b.op("fsub", z, b.op("fsub", under, one))
    reciprocal = b.op("fdiv", one, under)
    s = b.op("fmul", over, reciprocal)
    near, error = exact_product(b, s, under)
    rest = b.op("fsub", b.op("fsub", over, near), error)
    rest = b.op("fsub", rest, b.op("fmul", s, under_low))
    return s, b.op("fmul", rest, reciprocal)


def _exp2(b: FunctionBuilder, w: _Pair) -> Value:
    """w = n + r; 2**n exp(r ln 2), where the largest terms are added exactly."""
    magic = b.const(MAGIC64, w[0])
    shifted = b.op("fadd", w[0], magic)
    zero = b.const(0.0, w[0])
    r, rest = _plus_small(b, (b.op("fsub", w[0], b.op("fsub", shifted, magic)), zero), (w[1], zero))
    t, error = exact_product(b, r, b.const(_LN2_HI, r))
    low = b.mul_add(r, b.const(_LN2_LO, r), b.mul_add(rest, b.const(_LN2_HI, r), error))
    curve = b.mul_add(b.op("fmul", t, t), polynomial(b, t, EXP64), low)
    high, rest = _plus_small(b, (b.const(1.0, r), curve), (t, b.const(0.0, r)))
    bits = bits_of(b, shifted)
    return scale(b, b.op("fadd", high, rest), b.op("sub", bits, b.const(MAGIC_BITS64, bits)))


# Pairs ----------------------------------------------------------------------------------------------------------


def _constant(b: FunctionBuilder, parts: Sequence[float], like: Value) -> _Pair:
    return b.const(parts[0], like), b.const(parts[1], like)


def _plus_small(b: FunctionBuilder, x: _Pair, y: _Pair) -> _Pair:
    """x + y for |x| >= |y|, or x = 0."""
    total = b.op("fadd", x[0], y[0])
    error = b.op("fsub", y[0], b.op("fsub", total, x[0]))
    return total, b.op("fadd", error, b.op("fadd", x[1], y[1]))


def _times(b: FunctionBuilder, x: _Pair, y: _Pair) -> _Pair:
    high, error = exact_product(b, x[0], y[0])
    return high, b.op("fadd", error, b.mul_add(x[0], y[1], b.op("fmul", x[1], y[0])))
