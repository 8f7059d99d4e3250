"""Arithmetic of one element type in LLVM: what each operator means for floats, integers and bool, on any target.

What a target has no instruction for is spelled out here, because compiled code calls no library: division on 32-bit
ARM, conversions between 64-bit integers and floats there, half-precision conversions on old CPUs.
Each operation on float16 and bfloat16 is computed in float32 and its result rounded, to nearest even: every value in a
register is one that memory can hold. Since float32 has more than twice their digits, results of +, -, *, / and sqrt are
the nearest there are.
"""

from __future__ import annotations

from kedge.compiler.codegen import mathlib, modulus
from kedge.compiler.codegen.builder import FunctionBuilder, Value
from kedge.compiler.codegen.types import ScalarType, scalar_type
from kedge.compiler.dtypes import HALVES
from kedge.compiler.errors import CodegenError

_FLOAT_PREDICATES = {"eq": "oeq", "ne": "une", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge"}


def value_type(dtype: str) -> str:
    """The LLVM type in which values of `dtype` are computed."""
    return "float" if dtype in HALVES else scalar_type(dtype).llvm


def binary(b: FunctionBuilder, op: str, dtype: str, x: Value, y: Value) -> Value:
    """`x op y` of two values of `dtype`; comparisons and logic give i1."""
    kind = scalar_type(dtype)
    if op in ("and", "or"):
        return b.op(op, x, y)
    if op in _FLOAT_PREDICATES:
        return _compare(b, op, kind, x, y)
    if op in ("min", "max"):
        return _float_extreme(b, op, x, y) if kind.is_float else _int_extreme(b, op, kind, x, y)
    if kind.is_float:
        return rounded(b, _float(b, op, x, y), dtype)
    return _integer(b, op, kind, x, y)


def _compare(b: FunctionBuilder, op: str, kind: ScalarType, x: Value, y: Value) -> Value:
    if kind.is_float:
        return b.compare(f"fcmp {_FLOAT_PREDICATES[op]}", x, y)
    if op not in ("eq", "ne"):
        op = ("s" if kind.signed else "u") + op
    return b.compare(f"icmp {op}", x, y)


def _float(b: FunctionBuilder, op: str, x: Value, y: Value) -> Value:
    names = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
    if op in names:
        return b.op(names[op], x, y)
    if op in ("floordiv", "floormod", "truncmod"):
        rest = mathlib.apply(b, "fmod", [x, y])
        if op == "truncmod":
            return rest
        return modulus.floor_mod(b, y, rest) if op == "floormod" else modulus.floor_div(b, x, y, rest)
    raise CodegenError(f"operator {op!r} is not defined for floats")


def _float_extreme(b: FunctionBuilder, op: str, x: Value, y: Value) -> Value:
    """min or max in which NaN wins, as ONNX and numpy have it."""
    order = "fcmp ogt" if op == "max" else "fcmp olt"
    # LLVM 22 aborts on these intrinsics for doubles of 32-bit ARM.
    spelled_out = b.target.arch.name == "x86_64" or (b.target.arch.name == "armv7l" and x.type == "double")
    if not spelled_out:
        return b.intrinsic("llvm.maximum" if op == "max" else "llvm.minimum", x, y)
    # x86's own max(p, q) is `p > q ? p : q`: with a constant first, NaN in the other comes through by itself.
    for p, q in ((x, y), (y, x)):
        if p.is_const:
            return b.select(b.compare(order, p, q), p, q)
    if x.lanes > 1 and b.target.has("avx512f"):
        # Two selects of x would become one by two masks put together, which takes longer than max and one mask.
        return b.intrinsic("llvm.maximum" if op == "max" else "llvm.minimum", x, y, flags="nsz ")
    return b.select(b.compare("fcmp uno", x, x), x, b.select(b.compare(order, x, y), x, y))


def _int_extreme(b: FunctionBuilder, op: str, kind: ScalarType, x: Value, y: Value) -> Value:
    return b.select(_compare(b, "gt" if op == "max" else "lt", kind, x, y), x, y)


def _integer(b: FunctionBuilder, op: str, kind: ScalarType, x: Value, y: Value) -> Value:
    if kind.llvm == "i1":
        raise CodegenError(f"operator {op!r} is not defined for bool")
    if op in ("add", "sub", "mul"):
        return b.op(op, x, y)
    if op in ("floordiv", "floormod") and _power_of_two(y) and y.is_const:
        return _by_power_of_two(b, op, kind, x, y)
    if op in ("truncdiv", "floordiv", "floormod", "truncmod"):
        return _quotient_or_rest(b, op, kind, x, y)
    raise CodegenError(
        f"operator {op!r} is not defined for {kind.dtype}", hint="integers have floordiv and truncdiv"
    )  # fmt: skip


def _quotient_or_rest(b: FunctionBuilder, op: str, kind: ScalarType, x: Value, y: Value) -> Value:
    """Division for every divisor: by 0 both results are 0, and the least number over -1 wraps around.

    Processors trap there, even if it is a lane that nobody looks at: one beyond the end of a row, or on the other side
    of a select. So such lanes divide by 1.
    """
    zero, is_zero = b.const(0, x), None
    if not _is_positive(y):
        is_zero = bad = b.compare("icmp eq", y, b.const(0, y))
        if kind.signed:
            lowest = b.const(-(1 << (int(x.type[1:]) - 1)), x)
            wraps = b.op("and", b.compare("icmp eq", y, b.const(-1, y)), b.compare("icmp eq", x, lowest))
            bad = b.op("or", is_zero, wraps)
        y = b.select(bad, b.const(1, y), y)
    quotient = divide(b, x, y, signed=kind.signed)
    rest = b.op("sub", x, b.op("mul", quotient, y))
    off = b.const(0, x)
    if op.startswith("floor") and kind.signed:
        opposite = b.compare("icmp slt", b.op("xor", rest, y), zero)
        is_off = b.op("and", b.compare("icmp ne", rest, zero), opposite)
        off = b.select(is_off, y if op == "floormod" else b.const(1, x), zero)
    if op.endswith("mod"):
        return b.op("add", rest, off)
    floored = b.op("sub", quotient, off)
    return floored if is_zero is None else b.select(is_zero, zero, floored)


def _is_positive(y: Value) -> bool:
    """Whether y is a literal above 0, in all lanes."""
    digits = y.ref.removeprefix(f"splat ({y.type} ").removesuffix(")")
    return y.is_const and digits.isdigit() and int(digits) > 0


def _power_of_two(y: Value) -> int:
    """log2 of a literal power of two plus one; 0 for anything else."""
    if not y.is_const or not y.ref.isdigit():
        return 0
    number = int(y.ref)
    return number.bit_length() if number > 0 and number & (number - 1) == 0 else 0


def _by_power_of_two(b: FunctionBuilder, op: str, kind: ScalarType, x: Value, y: Value) -> Value:
    shift = _power_of_two(y) - 1
    if op == "floormod":
        return b.op("and", x, b.const((1 << shift) - 1, x))
    return b.op("ashr" if kind.signed else "lshr", x, b.const(shift, x))


def divide(b: FunctionBuilder, x: Value, y: Value, *, signed: bool) -> Value:
    """The quotient of integers rounded towards zero, without a library call on any target."""
    name = "sdiv" if signed else "udiv"
    if b.target.arch.name != "armv7l":
        return b.op(name, x, y)
    if x.type == "i64":
        return _divide64(b, x, y, signed=signed)
    if b.target.has("hwdiv") and b.target.has("hwdiv-arm") and x.type == "i32":
        return b.op(name, x, y)
    # Quotients of 32-bit integers are exact in double: two of them differ by more than its rounding.
    to, back = ("sitofp", "fptosi") if signed else ("uitofp", "fptoui")
    quotient = b.op("fdiv", b.convert(to, x, "double"), b.convert(to, y, "double"))
    return b.convert(back, quotient, x.type)


_UDIV64 = """define internal i64 @kedge.udiv64(i64 %n, i64 %d) noinline {attributes} {{
entry:
  br label %loop
loop:
  %i = phi i32 [ 0, %entry ], [ %i.next, %loop ]
  %q = phi i64 [ %n, %entry ], [ %q.next, %loop ]
  %r = phi i64 [ 0, %entry ], [ %r.next, %loop ]
  %top = lshr i64 %q, 63
  %r.shift = shl i64 %r, 1
  %r.in = or i64 %r.shift, %top
  %carry = icmp slt i64 %r, 0
  %fits = icmp uge i64 %r.in, %d
  %take = or i1 %carry, %fits
  %r.sub = sub i64 %r.in, %d
  %r.next = select i1 %take, i64 %r.sub, i64 %r.in
  %bit = zext i1 %take to i64
  %q.shift = shl i64 %q, 1
  %q.next = or i64 %q.shift, %bit
  %i.next = add i32 %i, 1
  %more = icmp ult i32 %i.next, 64
  br i1 %more, label %loop, label %exit
exit:
  ret i64 %q.next
}}
"""


def _divide64(b: FunctionBuilder, x: Value, y: Value, *, signed: bool) -> Value:
    """Shift and subtract, one bit at a time; lanes one after the other."""
    lanes = max(x.lanes, y.lanes)
    if lanes > 1:
        x, y = b.broadcast(x, lanes), b.broadcast(y, lanes)
        result = Value("poison", "i64", lanes)
        for lane in range(lanes):
            parts = [b.result(f"extractelement {v.typed}, i64 {lane}", "i64") for v in (x, y)]
            quotient = _divide64(b, parts[0], parts[1], signed=signed)
            result = b.result(f"insertelement {result.typed}, {quotient.typed}, i64 {lane}", "i64", lanes)
        return result
    b.module.define_once("kedge.udiv64", _UDIV64.format(attributes=b.module.attributes))
    if not signed:
        return b.call("kedge.udiv64", x, [x, y])
    zero = b.const(0, x)
    sizes = [b.select(b.compare("icmp slt", v, zero), b.op("sub", zero, v), v) for v in (x, y)]
    quotient = b.call("kedge.udiv64", x, sizes)
    negative = b.compare("icmp slt", b.op("xor", x, y), zero)
    return b.select(negative, b.op("sub", zero, quotient), quotient)


# Conversions ----------------------------------------------------------------------------------------------------


def cast(b: FunctionBuilder, value: Value, source: str, target: str) -> Value:
    """`value` of dtype `source` as dtype `target`."""
    if source == target:
        return value
    src, dst = scalar_type(source), scalar_type(target)
    if target == "bool":
        zero = b.const(0, value)
        return b.compare("fcmp une" if src.is_float else "icmp ne", value, zero)
    if src.is_float and dst.is_float:
        return _float_to_float(b, value, target)
    if src.is_float:
        return _float_to_int(b, value, dst)
    if dst.is_float:
        return rounded(b, _int_to_float(b, value, src, value_type(target)), target)
    if src.bits == dst.bits and src.llvm != "i1":
        return value
    if dst.bits < src.bits:
        return b.convert("trunc", value, dst.llvm)
    return b.convert("sext" if src.signed else "zext", value, dst.llvm)


def _float_to_float(b: FunctionBuilder, value: Value, target: str) -> Value:
    wanted = value_type(target)
    if value.type == "double" and wanted == "float":
        value = _round_to_odd(b, value) if target == "float16" else b.convert("fptrunc", value, "float")
    elif value.type == "float" and wanted == "double":
        value = b.convert("fpext", value, "double")
    return rounded(b, value, target)


def _round_to_odd(b: FunctionBuilder, value: Value) -> Value:
    """A double as the float towards 0 from it, the last bit set where digits were lost.

    Rounding that to fewer digits gives what rounding the double would: S. Boldo, G. Melquiond, "Emulation of a FMA and
    correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers 57 (2008).
    """
    near = b.convert("fptrunc", value, "float")
    back = b.convert("fpext", near, "double")
    bits = b.convert("bitcast", near, "i32")
    up = b.compare("fcmp ogt", b.intrinsic("llvm.fabs", back), b.intrinsic("llvm.fabs", value))
    lost = b.convert("zext", b.compare("fcmp one", back, value), "i32")
    return b.convert("bitcast", b.op("or", b.op("sub", bits, b.convert("zext", up, "i32")), lost), "float")


def rounded(b: FunctionBuilder, value: Value, dtype: str) -> Value:
    """A result in the type of computing, rounded to what memory can hold of `dtype`."""
    if dtype == "float16":
        return from_memory(b, to_memory(b, value, dtype), dtype)
    return _round_to_bfloat(b, value) if dtype == "bfloat16" else value


def _float_to_int(b: FunctionBuilder, value: Value, dst: ScalarType) -> Value:
    """The lowest bits of the value as int32, or as int64 where the type is one of 64 bits or uint32.

    uint64 has its upper half, too, by taking 2**63 off and setting the highest bit.
    """
    bits = 64 if dst.size == 8 or dst.dtype == "uint32" else 32
    if dst.dtype != "uint64":
        return b.convert("trunc", _float_to_signed(b, value, bits), dst.llvm)
    half = b.const(2.0**63, value)
    upper = b.compare("fcmp oge", value, half)
    low = _float_to_signed(b, b.select(upper, b.op("fsub", value, half), value), bits)
    return b.op("or", low, b.select(upper, b.const(-(2**63), low), b.const(0, low)))


def _float_to_signed(b: FunctionBuilder, value: Value, bits: int) -> Value:
    """Without its fraction; where it does not fit, or is NaN, the least number: LLVM leaves that open, x86 does so."""
    fits = b.compare("fcmp olt", b.intrinsic("llvm.fabs", value), b.const(2.0 ** (bits - 1), value))
    if bits == 64 and b.target.arch.name == "armv7l":
        whole = _float_to_int64_by_halves(b, value)
    else:
        whole = b.convert("fptosi", value, f"i{bits}")
    return b.select(fits, whole, b.const(-(2 ** (bits - 1)), whole))


def _float_to_int64_by_halves(b: FunctionBuilder, value: Value) -> Value:
    """Through two 32-bit conversions, since 32-bit ARM has no other."""
    wide = b.convert("fpext", value, "double")
    size = b.intrinsic("llvm.fabs", wide)
    high = b.convert("fptoui", b.op("fmul", size, b.const(2.0**-32, size)), "i32")
    low = b.op("fsub", size, b.op("fmul", b.convert("uitofp", high, "double"), b.const(2.0**32, size)))
    bits = b.op("shl", b.convert("zext", high, "i64"), b.const(32, "i64"))
    bits = b.op("or", bits, b.convert("zext", b.convert("fptoui", low, "i32"), "i64"))
    negative = b.compare("fcmp olt", wide, b.const(0.0, wide))
    return b.select(negative, b.op("sub", b.const(0, bits), bits), bits)


def _int_to_float(b: FunctionBuilder, value: Value, src: ScalarType, to: str) -> Value:
    if src.size == 8 and b.target.arch.name == "armv7l":
        high = b.convert("trunc", b.op("lshr", value, b.const(32, value)), "i32")
        wide = b.convert("sitofp" if src.signed else "uitofp", high, "double")
        low = b.convert("uitofp", b.convert("trunc", value, "i32"), "double")
        total = b.op("fadd", b.op("fmul", wide, b.const(2.0**32, wide)), low)
        return b.convert("fptrunc", total, to) if to == "float" else total
    return b.convert("sitofp" if src.signed else "uitofp", value, to)


def _has_half(b: FunctionBuilder) -> bool:
    needs = {"x86_64": "f16c", "aarch64": "neon", "armv7l": "fp16"}.get(b.target.arch.name)
    return needs is not None and b.target.has(needs)


def from_memory(b: FunctionBuilder, value: Value, dtype: str) -> Value:
    """A value as loaded (bool is i8, float16 and bfloat16 are i16) in the type in which it is computed."""
    if dtype == "bool":
        return b.compare("icmp ne", value, b.const(0, value))
    if dtype == "bfloat16":
        bits = b.convert("zext", value, "i32")
        return b.convert("bitcast", b.op("shl", bits, b.const(16, bits)), "float")
    if dtype != "float16":
        return value
    if _has_half(b):
        return b.convert("fpext", b.convert("bitcast", value, "half"), "float")
    return _half_to_float(b, value)


def to_memory(b: FunctionBuilder, value: Value, dtype: str) -> Value:
    """A value in the form in which it is stored; one of bfloat16 is rounded already."""
    if dtype == "bool":
        return b.convert("zext", value, "i8")
    if dtype == "bfloat16":
        bits = b.convert("bitcast", value, "i32")
        return b.convert("trunc", b.op("lshr", bits, b.const(16, bits)), "i16")
    if dtype != "float16":
        return value
    if _has_half(b):
        return b.convert("bitcast", b.convert("fptrunc", value, "half"), "i16")
    return _float_to_half(b, value)


def _round_to_bfloat(b: FunctionBuilder, value: Value) -> Value:
    """A float with the last 16 bits rounded away, to nearest even; NaN stays NaN, and becomes quiet.

    Arm's own conversion does the same. AVX-512's does not: it takes denormals for zeros. And on other targets LLVM
    would call a library.
    """
    if b.target.arch.name == "aarch64" and b.target.has("bf16"):
        narrow = b.convert("fptrunc", value, "bfloat")
        return from_memory(b, b.convert("bitcast", narrow, "i16"), "bfloat16")
    bits = b.convert("bitcast", value, "i32")
    odd = b.op("and", b.op("lshr", bits, b.const(16, bits)), b.const(1, bits))
    nearest = b.op("add", bits, b.op("add", odd, b.const(0x7FFF, bits)))
    quiet = b.op("or", bits, b.const(0x400000, bits))
    kept = b.select(b.compare("fcmp uno", value, value), quiet, nearest)
    return b.convert("bitcast", b.op("and", kept, b.const(-0x10000, bits)), "float")


def _half_to_float(b: FunctionBuilder, value: Value) -> Value:
    """Shift the fields into place and rescale by a multiplication, which also normalises denormals."""
    bits = b.convert("zext", value, "i32")
    magnitude = b.op("shl", b.op("and", bits, b.const(0x7FFF, bits)), b.const(13, bits))
    scaled = b.op("fmul", b.convert("bitcast", magnitude, "float"), b.const(2.0**112, "float"))
    special = b.compare("icmp uge", magnitude, b.const(0x7C00 << 13, bits))
    infinite = b.op("or", magnitude, b.const(0x7F800000, bits))
    magnitude = b.select(special, infinite, b.convert("bitcast", scaled, "i32"))
    sign = b.op("shl", b.op("and", bits, b.const(0x8000, bits)), b.const(16, bits))
    return b.convert("bitcast", b.op("or", magnitude, sign), "float")


def _float_to_half(b: FunctionBuilder, value: Value) -> Value:
    """Round to nearest even in integer arithmetic; denormals by adding a power of two that aligns the digits."""
    bits = b.convert("bitcast", value, "i32")
    sign = b.op("lshr", b.op("and", bits, b.const(-0x80000000, bits)), b.const(16, bits))
    size = b.op("and", bits, b.const(0x7FFFFFFF, bits))
    odd = b.op("and", b.op("lshr", size, b.const(13, bits)), b.const(1, bits))
    rounded = b.op("add", b.op("add", size, b.const(0xFFF - (112 << 23), bits)), odd)
    normal = b.op("lshr", rounded, b.const(13, bits))
    shifted = b.op("fadd", b.convert("bitcast", size, "float"), b.const(0.5, "float"))
    small = b.op("sub", b.convert("bitcast", shifted, "i32"), b.const(0x3F000000, bits))
    result = b.select(b.compare("icmp ult", size, b.const(113 << 23, bits)), small, normal)
    result = b.select(b.compare("icmp uge", size, b.const(0x477FF000, bits)), b.const(0x7C00, bits), result)
    result = b.select(b.compare("icmp ugt", size, b.const(0x7F800000, bits)), b.const(0x7E00, bits), result)
    return b.convert("trunc", b.op("or", result, sign), "i16")
