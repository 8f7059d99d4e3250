"""What functions of floats are built from: polynomials, powers of two, whole numbers, and rare cases lane by lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kedge.compiler.codegen.builder import FunctionBuilder, Value

Build: TypeAlias = Callable[[FunctionBuilder, Sequence[Value]], Value]

#: 1.5 * 2**(mantissa bits): adding it leaves the nearest integer in the low bits, on top of the bits of the number.
MAGIC32, MAGIC64 = 12582912.0, 6755399441055744.0
MAGIC_BITS32, MAGIC_BITS64 = 0x4B400000, 0x4338000000000000


def hex_floats(*texts: str) -> tuple[float, ...]:
    """Coefficients from their hexadecimal digits."""
    return tuple(float.fromhex(text) for text in texts)


# (exp(r) - 1 - r) / r**2 on |r| <= ln(2)/2
EXP64 = hex_floats(
    "0x1.0000000000000p-1", "0x1.555555555555cp-3", "0x1.555555555555ep-5", "0x1.111111110ebb3p-7",
    "0x1.6c16c16c1356dp-10", "0x1.a01a01b3bb28bp-13", "0x1.a01a01b45b681p-16", "0x1.71ddef93c07bap-19",
    "0x1.27e4bf27a0c4dp-22", "0x1.af6ccce62bc25p-26", "0x1.1f9df968f2d70p-29",
)  # fmt: skip


def is_single(x: Value) -> bool:
    """Whether x is a float, not a double."""
    return x.type == "float"


def bits_of(b: FunctionBuilder, x: Value) -> Value:
    """The representation of floats as integers of their size."""
    return b.convert("bitcast", x, "i32" if is_single(x) else "i64")


def suffix(x: Value) -> str:
    """How names of helper functions end for arguments of a type."""
    return f"{'' if x.lanes == 1 else f'v{x.lanes}'}{ {'float': 'f32', 'double': 'f64'}.get(x.type, x.type) }"


def polynomial(b: FunctionBuilder, x: Value, coefficients: Sequence[float]) -> Value:
    """The polynomial with `coefficients` (constant first) at `x`, by Horner's rule."""
    result = b.const(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        result = b.mul_add(result, x, b.const(c, x))
    return result


def clamp(b: FunctionBuilder, x: Value, low: float, high: float) -> Value:
    """`x` held in [low, high]; NaN passes."""
    x = b.select(b.compare("fcmp ogt", x, b.const(high, x)), b.const(high, x), x)
    return b.select(b.compare("fcmp olt", x, b.const(low, x)), b.const(low, x), x)


def scale(b: FunctionBuilder, p: Value, k: Value) -> Value:
    """`p * 2**k` for |k| up to twice the exponent range: in two steps, so that only the last one rounds.

    AVX-512 has one instruction for it, which rounds alike.
    """
    if p.lanes == (16 if is_single(p) else 8) and b.target.has("avx512dq"):  # which converts 64-bit integers, too
        return _scalef(b, p, b.convert("sitofp", k, p.type))
    bias, shift = (127, 23) if is_single(p) else (1023, 52)
    half = b.op("ashr", k, b.const(1, k))
    for part in (half, b.op("sub", k, half)):
        power = b.op("shl", b.op("add", part, b.const(bias, k)), b.const(shift, k))
        p = b.op("fmul", p, b.convert("bitcast", power, p.type))
    return p


def _scalef(b: FunctionBuilder, p: Value, k: Value) -> Value:
    """`p * 2**k` of a vector of 512 bits, all lanes, in the rounding mode that is set (4)."""
    name, mask = ("ps", "i16") if is_single(p) else ("pd", "i8")
    full = f"llvm.x86.avx512.mask.scalef.{name}.512"
    b.module.declare(full, f"{p.full} @({p.full}, {p.full}, {p.full}, {mask}, i32)")
    inside = f"{p.typed}, {k.typed}, {p.full} zeroinitializer, {mask} -1, i32 4"
    return b.result(f"call {p.full} @{full}({inside})", p.type, p.lanes)


def _rounds_natively(b: FunctionBuilder) -> bool:
    name = b.target.arch.name
    needs = {"x86_64": "sse4.1", "aarch64": "neon"}.get(name)
    return needs is not None and b.target.has(needs)


def round_to(b: FunctionBuilder, x: Value, name: str) -> Value:
    """floor, ceil or round half to even. Without an instruction for it LLVM would call the C library."""
    if _rounds_natively(b):
        return b.intrinsic({"floor": "llvm.floor", "ceil": "llvm.ceil", "round": "llvm.roundeven"}[name], x)
    whole = 2.0**23 if is_single(x) else 2.0**52  # from here on every value is an integer
    shift = b.intrinsic("llvm.copysign", b.const(whole, x), x)
    near = b.op("fsub", b.op("fadd", x, shift), shift)
    if name != "round":
        over, step = ("fcmp ogt", -1.0) if name == "floor" else ("fcmp olt", 1.0)
        near = b.op("fadd", near, b.select(b.compare(over, near, x), b.const(step, x), b.const(0.0, x)))
    near = b.intrinsic("llvm.copysign", near, x)
    return b.select(b.compare("fcmp olt", b.intrinsic("llvm.fabs", x), b.const(whole, x)), near, x)


def exact_product(b: FunctionBuilder, x: Value, y: Value) -> tuple[Value, Value]:
    """x * y of doubles and its rounding error, which is exact: by FMA, or from products of halves of the numbers."""
    high = b.op("fmul", x, y)
    if b.target.fma:
        return high, b.intrinsic("llvm.fma", x, y, b.negate(high))
    (x1, x0), (y1, y0) = _halves(b, x), _halves(b, y)
    error = b.op("fsub", b.op("fmul", x1, y1), high)
    error = b.op("fadd", b.op("fadd", error, b.op("fmul", x1, y0)), b.op("fmul", x0, y1))
    return high, b.op("fadd", error, b.op("fmul", x0, y0))


def _halves(b: FunctionBuilder, x: Value) -> tuple[Value, Value]:
    """A double as the sum of two of at most 27 digits each, whose products are exact."""
    bits = bits_of(b, x)
    high = b.convert("bitcast", b.op("and", bits, b.const(-(1 << 27), bits)), "double")
    return high, b.op("fsub", x, high)


# Rare cases -----------------------------------------------------------------------------------------------------


def any_lane(b: FunctionBuilder, mask: Value) -> Value:
    """Whether some lane of a mask is on."""
    if mask.lanes == 1:
        return mask
    name = f"llvm.vector.reduce.or.v{mask.lanes}i1"
    b.module.declare(name, f"i1 @({mask.full})")
    return b.result(f"call i1 @{name}({mask.typed})", "i1")


def unless_rare(
    b: FunctionBuilder, name: str, usual: Value, args: Sequence[Value], is_rare: Build, build: Build
) -> Value:
    """`usual`, but `build(args)` in the lanes where `is_rare(args)` holds.

    The rare lanes are worked out one by one in a function of their own, so that where there are none, all they cost
    is a test. `name` names that function: one name, one `is_rare` and `build`.
    """
    single = f"kedge.{name}.{suffix(Value('', args[0].type))}"
    b.module.helper(
        single, Value("", usual.type), [Value("", a.type) for a in args], build, placing="noinline cold optsize"
    )
    helper = single
    if usual.lanes > 1:
        helper = f"kedge.{name}.{suffix(args[0])}"

        def lane_by_lane(b: FunctionBuilder, params: Sequence[Value]) -> Value:
            return _lane_by_lane(b, single, params[0], params[1:], is_rare)

        b.module.helper(helper, usual, [usual, *args], lane_by_lane, placing="noinline cold optsize")
    yes, join = b.fresh("rare"), b.fresh("join")
    condition = any_lane(b, is_rare(b, args))
    before = b.block
    b.branch(condition, yes, join)
    b.label(yes)
    found = b.call(helper, usual, args if usual.lanes == 1 else [usual, *args])
    b.jump(join)
    b.label(join)
    return b.result(f"phi {usual.full} [ {usual.ref}, %{before} ], [ {found.ref}, %{yes} ]", usual.type, usual.lanes)


def _lane_by_lane(b: FunctionBuilder, helper: str, usual: Value, args: Sequence[Value], is_rare: Build) -> Value:
    """The body of the function that works out rare lanes: a loop over all of them."""
    places = []
    for value in (usual, *args):
        place = f"%{b.fresh('lanes')}"
        b.emit_entry(f"{place} = alloca {value.full}")
        b.emit(f"store {value.typed}, ptr {place}")
        places.append(place)
    head, rare, step, done = b.fresh("loop"), b.fresh("rare"), b.fresh("next"), b.fresh("done")
    before, lane = b.block, Value(f"%{b.fresh('lane')}", b.index_type)
    following = f"{lane.ref}.next"
    b.jump(head)
    b.label(head)
    b.emit(f"{lane.ref} = phi {lane.type} [ 0, %{before} ], [ {following}, %{step} ]")
    at = [b.result(f"getelementptr {usual.type}, ptr {places[0]}, {lane.typed}", "ptr")]
    at += [
        b.result(f"getelementptr {arg.type}, ptr {place}, {lane.typed}", "ptr")
        for arg, place in zip(args, places[1:], strict=True)
    ]
    one = [b.result(f"load {arg.type}, {p.typed}", arg.type) for arg, p in zip(args, at[1:], strict=True)]
    b.branch(is_rare(b, one), rare, step)
    b.label(rare)
    b.emit(f"store {b.call(helper, Value('', usual.type), one).typed}, {at[0].typed}")
    b.jump(step)
    b.label(step)
    b.emit(f"{following} = add {lane.typed}, 1")
    b.branch(b.compare("icmp ult", Value(following, lane.type), b.const(usual.lanes, lane)), head, done)
    b.label(done)
    return b.result(f"load {usual.full}, ptr {places[0]}", usual.type, usual.lanes)
