"""Sine and cosine for every argument, in double.

Up to 2**20 the argument is reduced by Cody and Waite's method, in all lanes at once. Beyond, which is rare, by that of
Payne and Hanek ("Radian reduction for trigonometric functions", SIGNUM Newsletter 18, 1983): of x * 2/pi only the bits
that matter modulo 4 are worked out, from a table of the bits of 2/pi and in integer arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from kedge.compiler.codegen.builder import FunctionBuilder, Value
from kedge.compiler.codegen.floats import MAGIC64, bits_of, hex_floats, polynomial, unless_rare

# (sin(x) - x) / x**3 and (cos(x) - 1 + x**2/2) / x**4 in x**2 on |x| <= pi/4
_SIN = hex_floats(
    "-0x1.5555555555549p-3", "0x1.111111110f87ap-7", "-0x1.a01a019c1198fp-13", "0x1.71de3577b64acp-19",
    "-0x1.ae5e663a5660cp-26", "0x1.5d9300ecbf8a2p-33",
)  # fmt: skip
_COS = hex_floats(
    "0x1.555555555554cp-5", "-0x1.6c16c16c1517ep-10", "0x1.a01a019cb1bd9p-16", "-0x1.27e4f809f08abp-22",
    "0x1.1ee9ebe91f19fp-29", "-0x1.8fae9c6fbdaddp-37",
)  # fmt: skip
# pi/2 in three parts: two of 33 bits, whose products with the quadrant are exact, and the rest.
_PIO2 = hex_floats("0x1.921fb54400000p+0", "0x1.0b4611a600000p-34", "0x1.3198a2e037073p-69")
# pi/2 in two parts.
_PIO2_HI, _PIO2_LO = hex_floats("0x1.921fb54442d18p+0", "0x1.1a62633145c07p-54")
#: Quadrants of arguments up to here have 20 bits, which is what the first parts of pi/2 leave room for.
_NEAR = 2.0**20
#: The bits of 2/pi, the first first, after 64 zeros.
TWO_OVER_PI = (
    0x00000000, 0x00000000, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041,
    0xFE5163AB, 0xDEBBC561, 0xB7246E3A, 0x424DD2E0, 0x06492EEA, 0x09D1921C, 0xFE1DEB1C, 0xB129A73E,
    0xE88235F5, 0x2EBB4484, 0xE99C7026, 0xB45F7E41, 0x3991D639, 0x835339F4, 0x9C845F8B, 0xBDF9283B,
    0x1FF897FF, 0xDE05980F, 0xEF2F118B, 0x5A0A6D1F, 0x6D367ECF, 0x27CB09B7, 0x4F463F66, 0x9E5FEA2D,
    0x7527BAC7, 0xEBE5F17B, 0x3D0739F7, 0x8A5292EA, 0x6BFB5FB1, 0x1F8D5D08, 0x56033046,
)  # fmt: skip
_TABLE = "kedge.two_over_pi"
#: Words of 32 bits in the window on 2/pi: 53 are for the digits of x, 62 for how close x comes to a multiple of pi/2.
_WINDOW = 6


def sine(b: FunctionBuilder, x: Value, quarter_turns: int) -> Value:
    """sin(x + quarter_turns * pi/2) of floats or doubles; NaN of infinities."""
    usual = b.convert("fptrunc", _near(b, b.convert("fpext", x, "double"), quarter_turns), x.type)

    def is_far(b: FunctionBuilder, args: Sequence[Value]) -> Value:
        size = b.intrinsic("llvm.fabs", args[0])
        return b.compare("fcmp ogt", size, b.const(_NEAR, size))

    def far(b: FunctionBuilder, args: Sequence[Value]) -> Value:
        return b.convert("fptrunc", _far(b, b.convert("fpext", args[0], "double"), quarter_turns), args[0].type)

    return unless_rare(b, f"far_{('sin', 'cos')[quarter_turns]}", usual, [x], is_far, far)


def _near(b: FunctionBuilder, x: Value, quarter_turns: int) -> Value:
    """x = n pi/2 + r, |r| <= pi/4."""
    shifted = b.mul_add(x, b.const(2 / math.pi, x), b.const(MAGIC64, x))
    n = b.op("fsub", shifted, b.const(MAGIC64, x))
    r = x
    for part in _PIO2:
        r = b.mul_add(n, b.const(-part, x), r)
    result = _turned(b, r, b.convert("trunc", bits_of(b, shifted), "i32"), quarter_turns)
    # sin(-0.0) is -0.0: the sum in the last step of the reduction would lose the sign.
    if quarter_turns == 0:
        result = b.select(b.compare("fcmp oeq", x, b.const(0.0, x)), x, result)
    return result


def _turned(b: FunctionBuilder, r: Value, quadrant: Value, quarter_turns: int) -> Value:
    """sin(r + (quadrant + quarter_turns) * pi/2)."""
    z = b.op("fmul", r, r)
    sine = b.mul_add(b.op("fmul", z, r), polynomial(b, z, _SIN), r)
    half = b.mul_add(z, b.const(-0.5, z), b.const(1.0, z))
    cosine = b.mul_add(b.op("fmul", z, z), polynomial(b, z, _COS), half)
    quadrant = b.op("add", quadrant, b.const(quarter_turns, quadrant))
    odd = b.compare("icmp ne", b.op("and", quadrant, b.const(1, quadrant)), b.const(0, quadrant))
    flip = b.compare("icmp ne", b.op("and", quadrant, b.const(2, quadrant)), b.const(0, quadrant))
    result = b.select(odd, cosine, sine)
    return b.select(flip, b.negate(result), result)


def _far(b: FunctionBuilder, x: Value, quarter_turns: int) -> Value:
    """Of one number: |x| = m 2**e, with m whole, is as many quarter turns as m times the window on 2/pi says."""
    words = _times_two_over_pi(b, x)
    turns = b.op("lshr", b.op("add", words[0], b.const(1 << 29, "i64")), b.const(30, "i64"))
    rest = b.op("sub", words[0], b.op("shl", turns, b.const(30, "i64")))
    # Less than half a quarter turn in either direction; where it is negative, the complement is its size.
    sign = b.op("ashr", rest, b.const(63, "i64"))
    r = b.const(0.0, x)
    for word in (words[3], words[2], words[1], rest):
        digits = b.convert("uitofp", b.convert("trunc", b.op("xor", word, sign), "i32"), "double")
        r = b.mul_add(r, b.const(2.0**-32, r), digits)
    r = b.op("fmul", r, b.const(2.0**-30, r))
    r = b.mul_add(r, b.const(_PIO2_HI, r), b.op("fmul", r, b.const(_PIO2_LO, r)))
    negative = b.compare("fcmp olt", x, b.const(0.0, x))
    down = b.compare("icmp ne", sign, b.const(0, sign))
    r = b.select(b.op("xor", down, negative), b.negate(r), r)
    turns = b.convert("trunc", turns, "i32")
    turns = b.select(negative, b.op("sub", b.const(0, turns), turns), turns)
    return b.op("fadd", _turned(b, r, turns, quarter_turns), b.op("fsub", x, x))  # NaN of infinities


def _times_two_over_pi(b: FunctionBuilder, x: Value) -> list[Value]:
    """|x| * 2/pi modulo 4 in words of 32 bits (as i64), the first first: two bits of it are whole."""
    bits, low = bits_of(b, x), b.const(0xFFFFFFFF, "i64")
    field = b.op("and", b.op("lshr", bits, b.const(52, bits)), b.const(0x7FF, bits))
    digits = b.op("or", b.op("and", bits, b.const((1 << 52) - 1, bits)), b.const(1 << 52, bits))
    # The window starts where a bit of 2/pi times the last bit of x is 2: 64 zeros come first in the table.
    start = b.op("sub", b.convert("trunc", field, "i32"), b.const(1075 - 62, "i32"))
    window = _window(b, start)
    product = [b.const(0, "i64")] * _WINDOW
    for shift, factor in enumerate((b.op("and", digits, low), b.op("lshr", digits, b.const(32, digits)))):
        carry = b.const(0, "i64")
        for at in reversed(range(_WINDOW - shift)):
            total = b.op("add", b.op("mul", window[at + shift], factor), b.op("add", product[at], carry))
            product[at], carry = b.op("and", total, low), b.op("lshr", total, b.const(32, total))
    return product


def _window(b: FunctionBuilder, start: Value) -> list[Value]:
    """Words of the table (as i64) from a bit on."""
    table = f"[{len(TWO_OVER_PI)} x i32]"
    words = ", ".join(f"i32 {word}" for word in TWO_OVER_PI)
    b.module.define_once(_TABLE, f"@{_TABLE} = internal unnamed_addr constant {table} [{words}]\n")
    shift = b.convert("zext", b.op("and", start, b.const(31, start)), "i64")
    first = b.op("lshr", start, b.const(5, start))
    loaded = []
    for at in range(_WINDOW + 1):
        place = b.op("add", first, b.const(at, first))
        address = b.result(f"getelementptr i32, ptr @{_TABLE}, {place.typed}", "ptr")
        loaded.append(b.convert("zext", b.result(f"load i32, {address.typed}, align 4", "i32"), "i64"))
    window = []
    for word, following in itertools.pairwise(loaded):
        both = b.op("or", b.op("shl", word, b.const(32, word)), following)
        window.append(b.op("lshr", b.op("shl", both, shift), b.const(32, both)))
    return window
