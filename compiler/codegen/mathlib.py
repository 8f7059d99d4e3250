"""exp, log, tanh, erf, … as code for any number of lanes, straight-line but for rare cases; no library is called.

Each function is emitted once per module, type and width, and inlined where it is used, unless it is long. Polynomials
are minimax fits (Remez exchange in 60 digits, coefficients then rounded to the type); range reductions follow Cody and
Waite, "Software Manual for the Elementary Functions" (1980). docs/numerics.md has the errors measured on each
instruction set and the bounds that tests hold them to:

    function  float32  float64  largest error in ULP of the result; notes
    exp       1        1        gradual underflow, exact at the ends
    log       1        1        denormals, log(0) = -inf, log(x < 0) = NaN
    tanh      2        3
    sigmoid   3        3        relative accuracy also of tiny results; 0 where below the least normal number
    erf       3        3
    sin, cos  1        3        every finite argument
    pow       1        1        as C's pow; powers that the type holds exactly are exact
    rsqrt     2        2        1 / sqrt(x)
    floor, ceil, round, sqrt, abs, fmod are exact; round goes to even.

32-bit ARM's NEON flushes denormals to zero, so results there are zero where they would be denormal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kedge.compiler.codegen.builder import FunctionBuilder, Value
from kedge.compiler.codegen.floats import (
    EXP64,
    MAGIC32,
    MAGIC64,
    MAGIC_BITS32,
    MAGIC_BITS64,
    bits_of,
    clamp,
    hex_floats,
    is_single,
    polynomial,
    round_to,
    scale,
    suffix,
)
from kedge.compiler.codegen.modulus import fmod
from kedge.compiler.codegen.power import power_of_magnitude
from kedge.compiler.codegen.trig import sine
from kedge.compiler.errors import CodegenError

_LOG2E = 1 / math.log(2)
# The largest arguments whose exp(-x) is a normal number.
_NORMAL_EXP32, _NORMAL_EXP64 = float.fromhex("0x1.5d589ep+6"), float.fromhex("0x1.6232bdd7abcd2p+9")
# ln 2 in two parts; the first has so few bits that its product with any exponent is exact.
_LN2_HI32, _LN2_LO32 = 0.693359375, -2.1219444000546905827679e-4
_LN2_HI64, _LN2_LO64 = float.fromhex("0x1.62e42fee00000p-1"), float.fromhex("0x1.a39ef35793c76p-33")
# (exp(r) - 1 - r) / r**2 on |r| <= ln(2)/2
_EXP32 = (0.5, 0.1666666716337204, 0.041666269302368164, 0.008333263918757439, 0.0013946073595434427,
          0.0001991838653339073)  # fmt: skip
# (log(1 + f) - f) / f**2 on |f| <= 1/3
_LOG32 = (-0.5, 0.3333320915699005, -0.24999506771564484, 0.20010770857334137, -0.1668950468301773,
          0.14000825583934784, -0.12078144401311874, 0.14006225764751434, -0.13311763107776642)  # fmt: skip
# (log((1 + s) / (1 - s)) - 2 s) / s**3 in s**2 on s <= 0.2
_LOG64 = hex_floats(
    "0x1.555555555554fp-1", "0x1.999999999c0f7p-2", "0x1.24924921ec0cbp-2", "0x1.c71c7488d99a2p-3",
    "0x1.745c4c7ac0f5ap-3", "0x1.3b358bb3a3829p-3", "0x1.0dcf136727c05p-3", "0x1.1b69eebf6d341p-3",
)  # fmt: skip
# (tanh(x) - x) / x**3 in x**2 on |x| <= 0.625 and 0.3
_TANH32 = (-0.3333328366279602, 0.13331490755081177, -0.05374349653720856, 0.02065058797597885,
           -0.005717045161873102)  # fmt: skip
_TANH64 = hex_floats(
    "-0x1.5555555555555p-2", "0x1.1111111111090p-3", "-0x1.ba1ba1ba08479p-5", "0x1.664f487753467p-6",
    "-0x1.226e318bf7b26p-7", "0x1.d6d244ebd9469p-9", "-0x1.7d71df6d0830dp-10", "0x1.319658164e3bbp-11",
    "-0x1.a3718e2551d9ep-13",
)  # fmt: skip
# erf(x) / x in x**2 on |x| <= 1
_ERF32 = (1.1283791065216064, -0.3761262595653534, 0.11283600330352783, -0.026854444295167923, 0.005189535673707724,
          -0.0008020842215046287, 7.889122935011983e-05)  # fmt: skip
_ERF64 = hex_floats(
    "0x1.20dd750429b6dp+0", "-0x1.812746b0379e7p-2", "0x1.ce2f21a042bdep-4", "-0x1.b82ce312889c2p-6",
    "0x1.565bcd0e65195p-8", "-0x1.c02db3fef01d6p-11", "0x1.f9a326c2d9822p-14", "-0x1.f4d2562a1b010p-17",
    "0x1.b9e6518e61290p-20", "-0x1.5f6d9cc1c31e4p-23", "0x1.fc43f063b4a42p-27", "-0x1.4e635b40a397fp-30",
    "0x1.7f171f011fd79p-34", "-0x1.29e14842f8767p-38",
)  # fmt: skip
# log(erfc(x)) on 1 <= x <= 3.95, weighted by erfc
_ERFC32 = (0.00018803564307745546, -1.1295783519744873, -0.6332199573516846, -0.1084185391664505, 0.025208234786987305,
           -0.0042045540176332, 0.0004413348506204784, -2.1686726540792733e-05)  # fmt: skip
# log(erfc(x)) + x**2 in v = (24 / (1 + x/2) - 11) / 5 on 1 <= x <= 6, weighted by erfc
_ERFC64 = hex_floats(
    "-0x1.81f567d80cb72p+0", "0x1.76568bc9785a4p-1", "-0x1.7d77068c88c00p-4", "0x1.cdea5d48e8160p-6",
    "-0x1.6adbb8e26a1bfp-7", "0x1.0498230d9e1cep-8", "-0x1.7d23831869decp-10", "0x1.29e79436f4ce1p-11",
    "-0x1.df463660d6bf7p-13", "0x1.8446fe42c8d31p-14", "-0x1.3c0f423ef6fe6p-15", "0x1.f14edfc3d0aaep-17",
    "-0x1.515bfd1395292p-18", "0x1.452b5cbc6395fp-20", "-0x1.395318ec5c32dp-23",
)  # fmt: skip


def apply(b: FunctionBuilder, name: str, args: Sequence[Value]) -> Value:
    """The intrinsic `name` of float values, all "float" or all "double"; one result of the same type."""
    build = _FUNCTIONS.get(name)
    if build is None:
        raise CodegenError(f"intrinsic {name!r} has no code for {args[0].type}")
    if name in _INLINE:
        return build(b, args)
    lanes = max(arg.lanes for arg in args)
    params = [b.broadcast(arg, lanes) for arg in args]
    result = params[0]
    helper = f"kedge.{name}.{suffix(result)}"
    b.module.helper(helper, result, params, build, placing="noinline" if name in _CALLED else "alwaysinline")
    return b.call(helper, result, params)


def _abs(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    return b.intrinsic("llvm.fabs", args[0])


def _sqrt(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    return b.intrinsic("llvm.sqrt", args[0])


def _rsqrt(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    return b.op("fdiv", b.const(1.0, args[0]), _sqrt(b, args))


def _exp(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    """x = n ln 2 + r; exp(x) = 2**n (1 + r + r**2 q(r))."""
    x = args[0]
    single = is_single(x)
    low, high, magic = (-104.0, 89.0, MAGIC32) if single else (-746.0, 710.0, MAGIC64)
    hi, lo = (_LN2_HI32, _LN2_LO32) if single else (_LN2_HI64, _LN2_LO64)
    x = clamp(b, x, low, high)
    shifted = b.mul_add(x, b.const(_LOG2E, x), b.const(magic, x))
    n = b.op("fsub", shifted, b.const(magic, x))
    r = b.mul_add(n, b.const(-hi, x), x)
    r = b.mul_add(n, b.const(-lo, x), r)
    q = polynomial(b, r, _EXP32 if single else EXP64)
    p = b.op("fadd", b.mul_add(b.op("fmul", r, r), q, r), b.const(1.0, x))
    bits = bits_of(b, shifted)
    return scale(b, p, b.op("sub", bits, b.const(MAGIC_BITS32 if single else MAGIC_BITS64, bits)))


def _log(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    """x = 2**e (1 + f) with 1 + f in [2/3, 4/3); log(x) = e ln 2 + log(1 + f)."""
    x = args[0]
    single = is_single(x)
    smallest, up, digits = (2.0**-126, 2.0**23, 23) if single else (2.0**-1022, 2.0**52, 52)
    tiny = b.compare("fcmp olt", x, b.const(smallest, x))
    scaled = b.select(tiny, b.op("fmul", x, b.const(up, x)), x)
    bits = bits_of(b, scaled)
    two_thirds = 0x3F2AAAAB if single else 0x3FE5555555555555
    e = b.op("ashr", b.op("sub", bits, b.const(two_thirds, bits)), b.const(digits, bits))
    mantissa = b.op("sub", bits, b.op("shl", e, b.const(digits, bits)))
    f = b.op("fsub", b.convert("bitcast", mantissa, x.type), b.const(1.0, x))
    e = b.op("sub", e, b.select(tiny, b.const(digits, e), b.const(0, e)))
    # The exponent fits 32 bits; converting those is cheap everywhere.
    exponent = b.convert("sitofp", b.convert("trunc", e, "i32"), x.type)
    result = _log1p_reduced32(b, f, exponent) if single else _log1p_reduced64(b, f, exponent)
    infinity = b.const(math.inf, x)
    result = b.select(b.compare("fcmp oeq", x, infinity), infinity, result)
    result = b.select(b.compare("fcmp ult", x, b.const(0.0, x)), b.const(math.nan, x), result)
    return b.select(b.compare("fcmp oeq", x, b.const(0.0, x)), b.const(-math.inf, x), result)


def _log1p_reduced32(b: FunctionBuilder, f: Value, e: Value) -> Value:
    tail = b.op("fmul", b.op("fmul", f, f), polynomial(b, f, _LOG32))
    tail = b.mul_add(e, b.const(_LN2_LO32, f), tail)
    return b.mul_add(e, b.const(_LN2_HI32, f), b.op("fadd", f, tail))


def _log1p_reduced64(b: FunctionBuilder, f: Value, e: Value) -> Value:
    """log(1 + f) = f - (f**2/2 - s (f**2/2 + R)), s = f / (2 + f), R = s**2 P(s**2)."""
    s = b.op("fdiv", f, b.op("fadd", f, b.const(2.0, f)))
    z = b.op("fmul", s, s)
    half_square = b.op("fmul", b.op("fmul", f, f), b.const(0.5, f))
    tail = b.op("fmul", s, b.mul_add(z, polynomial(b, z, _LOG64), half_square))
    tail = b.mul_add(e, b.const(_LN2_LO64, f), tail)
    inner = b.op("fsub", f, b.op("fsub", half_square, tail))
    return b.mul_add(e, b.const(_LN2_HI64, f), inner)


def _tanh(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    """An odd polynomial near 0, else 1 - 2 / (exp(2 |x|) + 1)."""
    x = args[0]
    single = is_single(x)
    a = b.intrinsic("llvm.fabs", x)
    z = b.op("fmul", x, x)
    near = b.mul_add(b.op("fmul", z, x), polynomial(b, z, _TANH32 if single else _TANH64), x)
    power = apply(b, "exp", [b.op("fadd", a, a)])
    one = b.const(1.0, x)
    far = b.op("fsub", one, b.op("fdiv", b.const(2.0, x), b.op("fadd", power, one)))
    small = b.compare("fcmp olt", a, b.const(0.625 if single else 0.3, x))
    return b.intrinsic("llvm.copysign", b.select(small, near, far), x)  # also of zeros


def _sigmoid(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    """With e = exp(-|x|): 1 / (1 + e) for x >= 0, e / (1 + e) below, so that tiny results keep their digits.

    Results below the least normal number are 0. Intel's cores take some hundred cycles for each operation on a denormal
    one, and each that an activation gives is multiplied by all weights of the next layer.
    """
    x = args[0]
    a = b.intrinsic("llvm.fabs", x)
    limit = b.const(_NORMAL_EXP32 if is_single(x) else _NORMAL_EXP64, x)
    far = b.compare("fcmp ogt", a, limit)
    zero, one = b.const(0.0, x), b.const(1.0, x)
    e = b.select(far, zero, apply(b, "exp", [b.negate(b.select(far, limit, a))]))
    top = b.select(b.compare("fcmp olt", x, zero), e, one)
    return b.op("fdiv", top, b.op("fadd", one, e))


def _erf(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    """An odd polynomial for |x| < 1, else 1 - erfc(|x|), where erfc is the exponential of a polynomial."""
    x = args[0]
    single = is_single(x)
    a = b.intrinsic("llvm.fabs", x)
    z = b.op("fmul", x, x)
    near = b.op("fmul", x, polynomial(b, z, _ERF32 if single else _ERF64))
    one, limit = b.const(1.0, x), b.const(3.95 if single else 6.0, x)
    held = b.select(b.compare("fcmp ogt", a, limit), limit, a)
    if single:
        exponent = polynomial(b, held, _ERFC32)
    else:
        u = b.op("fdiv", b.const(48.0 / 5.0, x), b.op("fadd", held, b.const(2.0, x)))
        v = b.op("fsub", u, b.const(11.0 / 5.0, x))
        exponent = b.mul_add(b.negate(held), held, polynomial(b, v, _ERFC64))
    far = b.intrinsic("llvm.copysign", b.op("fsub", one, apply(b, "exp", [exponent])), x)
    return b.select(b.compare("fcmp olt", a, one), near, far)


def _sin(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    return sine(b, args[0], 0)


def _cos(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    return sine(b, args[0], 1)


def _pow(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    """The power of |x| in double, with the sign of an odd power and C's special cases."""
    x, y = args
    wide_x, wide_y = b.convert("fpext", x, "double"), b.convert("fpext", y, "double")
    zero, one = b.const(0.0, wide_x), b.const(1.0, wide_x)
    a = b.intrinsic("llvm.fabs", wide_x)
    if is_single(x):
        result = apply(b, "exp", [b.op("fmul", wide_y, apply(b, "log", [a]))])
    else:
        result = power_of_magnitude(b, a, wide_y)
    whole = b.compare("fcmp oeq", round_to(b, wide_y, "round"), wide_y)
    half = b.op("fmul", wide_y, b.const(0.5, wide_y))
    even = b.compare("fcmp oeq", round_to(b, half, "round"), half)
    odd = b.op("and", whole, b.op("xor", even, b.const(True, even)))
    bits = bits_of(b, wide_x)
    negative = b.compare("icmp slt", bits, b.const(0, bits))
    result = b.select(b.op("and", odd, negative), b.negate(result), result)
    undefined = b.op("and", b.compare("fcmp olt", wide_x, zero), b.op("xor", whole, b.const(True, whole)))
    finite_base = b.compare("fcmp olt", a, b.const(math.inf, a))
    finite_power = b.compare("fcmp olt", b.intrinsic("llvm.fabs", wide_y), b.const(math.inf, a))
    undefined = b.op("and", undefined, b.op("and", finite_base, finite_power))
    result = b.select(undefined, b.const(math.nan, result), result)
    # |x| = 1 with an infinite power, x = 1, and y = 0 give 1 whatever the other side is.
    unit = b.op("and", b.compare("fcmp oeq", a, one), b.compare("fcmp oeq", b.intrinsic("llvm.fabs", wide_y),
                                                                 b.const(math.inf, a)))  # fmt: skip
    unit = b.op("or", unit, b.compare("fcmp oeq", wide_x, one))
    unit = b.op("or", unit, b.compare("fcmp oeq", wide_y, zero))
    return b.convert("fptrunc", b.select(unit, one, result), x.type)


def _floor(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    return round_to(b, args[0], "floor")


def _ceil(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    return round_to(b, args[0], "ceil")


def _round(b: FunctionBuilder, args: Sequence[Value]) -> Value:
    return round_to(b, args[0], "round")


_FUNCTIONS: dict[str, Callable[[FunctionBuilder, Sequence[Value]], Value]] = {
    "abs": _abs, "sqrt": _sqrt, "rsqrt": _rsqrt, "exp": _exp, "log": _log, "tanh": _tanh, "sigmoid": _sigmoid,
    "erf": _erf, "sin": _sin, "cos": _cos, "pow": _pow, "floor": _floor, "ceil": _ceil, "round": _round,
    "fmod": lambda b, args: fmod(b, args[0], args[1]),
}  # fmt: skip
_INLINE = frozenset({"abs", "sqrt", "rsqrt", "floor", "ceil", "round"})
#: So long that copies of it would cost more than calls.
_CALLED = frozenset({"pow"})
