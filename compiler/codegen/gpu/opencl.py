"""OpenCL C (1.2) of launches: one `__kernel` each, as a person would write it.

A buffer is two parameters, `__global uchar *x_base, ulong x_offset`, since memory objects of OpenCL 1.2 have no
addresses that a host could compute with; the dims that are free come after them as `long`. float16 and bfloat16 are
16 bits in memory and float32 in arithmetic, as on CPUs. Denormals may be flushed, and functions are as exact as the
device's library (exp within 3 ULP, tanh 5, erf and pow 16, by the standard); everything else is as on CPUs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kedge.compiler.codegen.gpu.ir import AXES, Barrier, Launch, exprs, walk
from kedge.compiler.dtypes import INTEGERS
from kedge.compiler.errors import CodegenError
from kedge.compiler.tir.expr import COMPARISONS, Binary, Call, Cast, Const, Expr, Load, Select, Var, as_expr, const
from kedge.compiler.tir.simplify import Simplifier, over
from kedge.compiler.tir.stmt import Buffer, For, If, Range, Seq, Stmt, Store
from kedge.compiler.tir.visitor import walk_expr

#: Element types in memory.
_MEMORY = {
    "bool": "uchar", "int8": "char", "int16": "short", "int32": "int", "int64": "long", "uint8": "uchar",
    "uint16": "ushort", "uint32": "uint", "uint64": "ulong", "float16": "half", "bfloat16": "ushort",
    "float32": "float", "float64": "double",
}  # fmt: skip
#: Types of values where they differ from those in memory.
_VALUES = {"bool": "int", "float16": "float", "bfloat16": "float"}
_HALVES = frozenset({"float16", "bfloat16"})
_FLOATS = frozenset({"float32", "float64"}) | _HALVES
_UNSIGNED = {"int32": "uint", "int64": "ulong"}
_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&&", "or": "||"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_FUNCTIONS = {
    "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt", "tanh": "tanh", "erf": "erf", "abs": "fabs",
    "floor": "floor", "ceil": "ceil", "round": "rint", "sin": "sin", "cos": "cos", "pow": "pow",
}  # fmt: skip
#: How tightly operators bind, as far as parentheses are left out.
_TIGHTNESS = {"or": 1, "and": 2, "add": 4, "sub": 4, "mul": 5, "div": 5, "floordiv": 5, "floormod": 5}
_COMPARISON, _UNARY, _ATOM = 3, 6, 7
#: Names that a buffer or variable cannot have.
_WORDS = frozenset(_FUNCTIONS.values()) | {
    "asm", "auto", "bool", "break", "case", "char", "const", "constant", "continue", "default", "do", "double", "else",
    "enum", "event_t", "extern", "false", "float", "for", "generic", "global", "goto", "half", "if", "image1d_t",
    "image2d_t", "image3d_t", "inline", "int", "kernel", "local", "long", "main", "NULL", "pipe", "private", "quad",
    "register", "restrict", "return", "sampler_t", "short", "signed", "size_t", "sizeof", "static", "struct",
    "switch", "true", "typedef", "typeof", "uchar", "uint", "ulong", "union", "unsigned", "ushort", "void", "volatile",
    "while", "read_only", "write_only", "read_write", "M_PI", "INFINITY", "NAN", "MAXFLOAT", "HUGE_VAL", "as_float",
    "as_uint", "barrier", "copysign", "fma", "fmod", "isnan", "max", "min", "vload_half", "vstore_half_rte",
    "INT_MIN", "LONG_MIN",
}  # fmt: skip

#: Beginnings of names that the language or this file keeps for itself, and its vector types.
_RESERVED = re.compile(
    r"$|[^A-Za-z]|(get|kedge|as|convert|cl|CL|HAVE)_|vload|vstore|M_|__|(u?(char|short|int|long)|float|double|half)\d+$"
)

_HELPERS = {
    "kedge_max": "{v} kedge_max_{s}({v} a, {v} b) {{ return isnan(a) ? a : a > b ? a : b; }}",
    "kedge_min": "{v} kedge_min_{s}({v} a, {v} b) {{ return isnan(a) ? a : a < b ? a : b; }}",
    "kedge_truncdiv": "{v} kedge_truncdiv_{s}({v} a, {v} b) {{ return b == 0 ? 0 : {wrap}a / b; }}",
    "kedge_truncmod": "{v} kedge_truncmod_{s}({v} a, {v} b) {{ return b == 0 ? 0 : {wrap0}a % b; }}",
    "kedge_floordiv": (
        "{v} kedge_floordiv_{s}({v} a, {v} b) {{\n"
        "  if (b == 0) return 0;\n"
        "  {v} q = {wrap}a / b, r = {wrap0}a % b;\n"
        "  return r != 0 && (r < 0) != (b < 0) ? q - 1 : q;\n}}"
    ),
    "kedge_floormod": (
        "{v} kedge_floormod_{s}({v} a, {v} b) {{\n"
        "  if (b == 0) return 0;\n"
        "  {v} r = {wrap0}a % b;\n"
        "  return r != 0 && (r < 0) != (b < 0) ? r + b : r;\n}}"
    ),
    "kedge_floor_div": (
        "{v} kedge_floor_div_{s}({v} a, {v} b) {{\n"
        "  if (b == 0) return a / b;\n"
        "  {v} r = fmod(a, b), q = (a - r) / b;\n"
        "  if (r != 0 && (r < 0) != (b < 0)) q -= 1;\n"
        "  if (q == 0) return copysign(({v})0, a / b);\n"
        "  {v} whole = floor(q);\n"
        "  return q - whole > ({v})0.5f ? whole + 1 : whole;\n}}"
    ),
    "kedge_floor_mod": (
        "{v} kedge_floor_mod_{s}({v} a, {v} b) {{\n"
        "  {v} r = fmod(a, b);\n"
        "  if (r == 0) return copysign(({v})0, b);\n"
        "  return (r < 0) != (b < 0) ? r + b : r;\n}}"
    ),
    "kedge_pow": (
        "{v} kedge_pow_{s}({v} a, {v} b) {{\n"
        "  if (b < 0) return a == 1 || a == -1 ? (b & 1 ? a : 1) : 0;\n"
        "  {u} power = 1, square = a, left = b;\n"
        "  for (; left != 0; left >>= 1, square *= square)\n"
        "    if (left & 1) power *= square;\n"
        "  return power;\n}}"
    ),
    "kedge_sigmoid": (  # as on CPUs, no denormal results
        "{v} kedge_sigmoid_{s}({v} x) {{\n  {v} y = 1 / (1 + exp(-x));\n  return y < {normal} ? 0 : y;\n}}"
    ),
    "kedge_to_int": "int kedge_to_int_{s}({v} x) {{ return fabs(x) < 0x1p31f ? (int)x : INT_MIN; }}",
    "kedge_to_long": "long kedge_to_long_{s}({v} x) {{ return fabs(x) < 0x1p63f ? (long)x : LONG_MIN; }}",
    "kedge_to_ulong": (
        "ulong kedge_to_ulong_{s}({v} x) {{\n"
        "  return x >= 0x1p63f ? (ulong)kedge_to_long_{s}(x - 0x1p63f) | 1ul << 63 : (ulong)kedge_to_long_{s}(x);\n}}"
    ),
    "kedge_to_half": (
        "float kedge_to_half(float x) {{\n"
        "  ushort bits;\n  vstore_half_rte(x, 0, (half *)&bits);\n  return vload_half(0, (const half *)&bits);\n}}"
    ),
    "kedge_double_to_half": (  # not through float, which would round twice
        "float kedge_double_to_half(double x) {{\n"
        "  ushort bits;\n  vstore_half_rte(x, 0, (half *)&bits);\n  return vload_half(0, (const half *)&bits);\n}}"
    ),
    "kedge_to_bf16": (
        "ushort kedge_to_bf16(float x) {{\n"
        "  uint bits = as_uint(x);\n"
        "  return isnan(x) ? (ushort)((bits >> 16) | 64) : (ushort)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);\n}}"
    ),
    "kedge_from_bf16": "float kedge_from_bf16(ushort x) {{ return as_float((uint)x << 16); }}",
}


def opencl_source(launches: Sequence[Launch]) -> str:
    """The text of all kernels of a function, with the helpers that they use.

    Several texts may be compiled as one program: helpers are defined only once.
    """
    helpers: dict[str, str] = {}
    kernels = [_Kernel(launch, helpers).text() for launch in launches]
    defined = [f"#ifndef HAVE_{name}\n#define HAVE_{name}\n{text}\n#endif" for name, text in helpers.items()]
    double = "#pragma OPENCL EXTENSION cl_khr_fp64 : enable" if "fp64" in features_of(launches) else None
    return "\n\n".join(part for part in (double, *defined, *kernels) if part) + "\n"


def features_of(launches: Sequence[Launch]) -> tuple[str, ...]:
    """What a device must have to run these: "fp64"."""
    return ("fp64",) if any(node.dtype == "float64" for one in launches for node in _nodes(one.body)) else ()


def _nodes(stmt: Stmt) -> Iterable[Expr]:
    for each in walk(stmt):
        yield from exprs(each)
        if isinstance(each, Store):
            yield Load(each.buffer, each.indices)


@dataclass(slots=True)
class _Kernel:
    """The text of one kernel."""

    launch: Launch
    helpers: dict[str, str]
    names: dict[object, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=lambda: set(_WORDS))
    ranges: dict[Var, Range] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    index: str = "long"

    def text(self) -> str:
        """The whole kernel."""
        launch = self.launch
        sizes = dict(zip([f"blockIdx.{a}" for a in AXES], launch.grid, strict=True))
        sizes |= {f"threadIdx.{a}": const(n) for a, n in zip(AXES, launch.block, strict=True)}
        self.ranges = {var: over(sizes[axis]) for axis, var in launch.axes.items() if axis in sizes}
        for each in walk(launch.body):
            if isinstance(each, For):
                self.ranges[each.var] = over(each.extent)
        self.index = "int" if self.fits_int() else "long"
        written = {each.buffer for each in walk(launch.body) if isinstance(each, Store)}
        parameters, prologue = [], []
        for buffer in launch.buffers:
            name, kind = self.name(buffer, buffer.name), _MEMORY[_known(buffer)]
            constant = "" if buffer in written else "const "
            parameters.append(f"__global uchar *{name}_base, ulong {name}_offset")
            pointer = f"__global {constant}{kind} *"
            prologue.append(f"{pointer}restrict {name} = ({pointer})({name}_base + {name}_offset);")
        parameters.extend(f"long {self.name(var, var.name)}" for var in launch.scalars)
        for axis, var in launch.axes.items():
            if axis in sizes:
                call = "get_group_id" if axis.startswith("blockIdx") else "get_local_id"
                prologue.append(
                    f"const {self.index} {self.name(var, var.name)} = ({self.index}){call}({AXES.index(axis[-1])});"
                )
        prologue += [self.array("__local ", buffer) for buffer in launch.shared]
        prologue += [self.array("", buffer) for buffer in launch.private]
        self.stmt(launch.body, 1)
        group = ", ".join(map(str, launch.block))
        head = f"__kernel __attribute__((reqd_work_group_size({group})))\nvoid {launch.name}("
        inside = [f"  {line}" for line in prologue]
        return "\n".join([head + ",\n    ".join(parameters) + ") {", *inside, *self.lines, "}"])

    def array(self, space: str, buffer: Buffer) -> str:
        """The declaration of an array on the device."""
        count = max(1, math.prod(dim for dim in buffer.shape if isinstance(dim, int)))
        kind = _MEMORY[_known(buffer)]
        kind = "ushort" if kind == "half" else kind  # there are no arrays of half without an extension
        return f"{space}{kind} {self.name(buffer, buffer.name)}[{count}];"

    def fits_int(self) -> bool:
        """Whether every index, bound and step towards them is surely below 2**31."""
        simplifier = Simplifier(self.ranges)
        for each in walk(self.launch.body):
            if isinstance(each, For) and not self.narrow(each.extent, simplifier):
                return False
            for node in _nodes(each) if not isinstance(each, (Seq, For, If)) else exprs(each):
                found = node
                if isinstance(node, Load):
                    found = _flat(node.buffer, node.indices)
                if found.dtype == "int64" and _is_index(found) and not self.narrow(found, simplifier):
                    return False
        return True

    def narrow(self, expr: Expr, simplifier: Simplifier) -> bool:
        for node in walk_expr(expr):
            if node.dtype != "int64":
                continue
            low, high = simplifier.bounds(node)
            if low is None or high is None or low < -(2**31) or high >= 2**31:
                return False
        return True

    def name(self, what: object, wanted: str) -> str:
        """A name of its own for a buffer or variable."""
        if what not in self.names:
            base = re.sub(r"\W", "_", wanted, flags=re.ASCII)
            base = f"v_{base}" if _RESERVED.match(base) else base
            name, count = base, 0
            while not self.taken.isdisjoint(parts := {name, f"{name}_base", f"{name}_offset"}):
                count += 1
                name = f"{base}_{count}"
            self.taken |= parts
            self.names[what] = name
        return self.names[what]

    # Statements -------------------------------------------------------------------------------------------------

    def emit(self, depth: int, line: str) -> None:
        self.lines.append("  " * depth + line)

    def stmt(self, stmt: Stmt, depth: int) -> None:
        """Write a statement at an indentation of `depth`."""
        match stmt:
            case Seq(stmts=stmts):
                for one in stmts:
                    self.stmt(one, depth)
            case Barrier():
                self.emit(depth, "barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);")
            case Store():
                self.store(stmt, depth)
            case If():
                self.emit(depth, f"if ({self.expr(stmt.condition)}) {{")
                self.stmt(stmt.then, depth + 1)
                if stmt.orelse is not None:
                    self.emit(depth, "} else {")
                    self.stmt(stmt.orelse, depth + 1)
                self.emit(depth, "}")
            case For():
                name = self.name(stmt.var, stmt.var.name)
                if stmt.kind in ("unrolled", "vectorized"):
                    self.emit(depth, "#pragma unroll")
                extent = self.expr(stmt.extent)
                self.emit(depth, f"for ({self.index} {name} = 0; {name} < {extent}; ++{name}) {{")
                self.stmt(stmt.body, depth + 1)
                self.emit(depth, "}")
            case _:
                raise CodegenError(f"internal error: {type(stmt).__name__} in a kernel for OpenCL")

    def store(self, stmt: Store, depth: int) -> None:
        buffer, place = stmt.buffer, self.expr(_flat(stmt.buffer, stmt.indices))
        name, value = self.name(buffer, buffer.name), self.expr(stmt.value, data=True)
        match buffer.dtype:
            case "float16":
                space = {"global": "__global ", "shared": "__local "}.get(buffer.scope, "")
                self.emit(depth, f"vstore_half_rte({value}, {place}, ({space}half *){name});")
            case "bfloat16":
                self.emit(depth, f"{name}[{place}] = {self.helper('kedge_to_bf16')}({value});")
            case _:
                self.emit(depth, f"{name}[{place}] = {value};")

    # Expressions ------------------------------------------------------------------------------------------------

    def helper(self, name: str, dtype: str | None = None) -> str:
        """The name of a helper function, which is defined by being asked for."""
        if dtype is None:
            full, text = name, _HELPERS[name].format()
        else:
            kind = _value(dtype)
            signed = dtype.startswith("int")
            wrap = f"b == -1 ? ({kind})(0 - ({_UNSIGNED.get(dtype, kind)})a) : " if signed else ""
            full = f"{name}_{kind}"
            wide = "ulong" if kind.endswith("long") else "uint"  # products of smaller types could overflow int
            wrap0 = "b == -1 ? 0 : " if signed else ""
            normal = "DBL_MIN" if kind == "double" else "FLT_MIN"
            text = _HELPERS[name].format(v=kind, s=kind, u=wide, wrap=wrap, wrap0=wrap0, normal=normal)
        self.helpers.setdefault(full, text)
        return full

    def expr(self, expr: Expr, *, data: bool = False) -> str:
        """`expr` as text; where it is `data`, loop variables count as 64-bit values."""
        return self.write(expr, data)[0]

    def operand(self, expr: Expr, data: bool, tightness: int) -> str:
        text, own = self.write(expr, data)
        return text if own >= tightness else f"({text})"

    def write(self, expr: Expr, data: bool) -> tuple[str, int]:
        """The text, and how tightly its outermost operator binds."""
        match expr:
            case Const():
                return _literal(expr)
            case Var():
                name = self.name(expr, expr.name)
                return (f"(long){name}", _UNARY) if data and self.index == "int" else (name, _ATOM)
            case Load():
                return self.load(expr), _ATOM
            case Select(condition=condition, a=a, b=b):
                chosen = (
                    f"{self.operand(condition, False, 1)} ? {self.operand(a, data, 1)} : {self.operand(b, data, 0)}"
                )
                return chosen, 0
            case Cast(value=value, dtype=dtype):
                return self.cast(value, dtype)
            case Call():
                return self.call(expr), _ATOM
            case Binary():
                return self.binary(expr, data)
        raise CodegenError(f"no OpenCL C for expression {expr!r}")

    def load(self, load: Load) -> str:
        buffer = load.buffer
        name, place = self.name(buffer, buffer.name), self.expr(_flat(buffer, load.indices))
        match buffer.dtype:
            case "float16":
                space = {"global": "__global ", "shared": "__local "}.get(buffer.scope, "")
                return f"vload_half({place}, ({space}const half *){name})"
            case "bfloat16":
                return f"{self.helper('kedge_from_bf16')}({name}[{place}])"
            case "bool":
                return f"({name}[{place}] != 0)"
        return f"{name}[{place}]"

    def binary(self, expr: Binary, data: bool) -> tuple[str, int]:
        op, dtype = expr.op, expr.a.dtype
        if op in COMPARISONS:
            inner = data and not _is_index(expr)
            a, b = self.operand(expr.a, inner, _COMPARISON + 1), self.operand(expr.b, inner, _COMPARISON + 1)
            return f"{a} {_COMPARE[op]} {b}", _COMPARISON
        if op in ("and", "or"):
            return self.infix(expr, _OPERATORS[op], data)
        if dtype in _FLOATS:
            return self.floats(expr)
        if dtype == "int64" and _is_index(expr) and not data:
            return self.indices(expr)
        return self.integers(expr)

    def infix(self, expr: Binary, sign: str, data: bool) -> tuple[str, int]:
        tightness = _TIGHTNESS[expr.op]
        right = tightness + (0 if expr.op in ("and", "or") else 1)
        return f"{self.operand(expr.a, data, tightness)} {sign} {self.operand(expr.b, data, right)}", tightness

    def floats(self, expr: Binary) -> tuple[str, int]:
        op, dtype = expr.op, expr.dtype
        wide = "float32" if dtype in _HALVES else dtype
        if op in ("min", "max"):
            return (
                f"{self.helper(f'kedge_{op}', wide)}({self.expr(expr.a, data=True)}, {self.expr(expr.b, data=True)})",
                _ATOM,
            )
        if op in ("floordiv", "floormod"):
            name = self.helper("kedge_floor_div" if op == "floordiv" else "kedge_floor_mod", wide)
            return f"{name}({self.expr(expr.a, data=True)}, {self.expr(expr.b, data=True)})", _ATOM
        if op == "truncmod":
            return f"fmod({self.expr(expr.a, data=True)}, {self.expr(expr.b, data=True)})", _ATOM
        if op in ("add", "sub"):
            fused = self.multiply_add(expr)
            if fused is not None:
                return fused, _ATOM
        return self.infix(expr, _OPERATORS[op], True)

    def multiply_add(self, expr: Binary) -> str | None:
        """`a * b ± c` with one rounding, as on CPUs."""
        for product, other in ((expr.a, expr.b), (expr.b, expr.a)):
            if isinstance(product, Binary) and product.op == "mul":
                x, y, z = self.expr(product.a, data=True), self.expr(product.b, data=True), self.expr(other, data=True)
                if expr.op == "sub" and product is expr.a:
                    z = f"-({z})"
                elif expr.op == "sub":
                    x = f"-({x})"
                return f"fma({x}, {y}, {z})"
        return None

    def indices(self, expr: Binary) -> tuple[str, int]:
        """Index arithmetic: it does not overflow."""
        if expr.op in ("add", "sub", "mul"):
            return self.infix(expr, _OPERATORS[expr.op], False)
        if expr.op in ("min", "max"):
            a, b = self.expr(expr.a), self.expr(expr.b)
            return f"{expr.op}(({self.index})({a}), ({self.index})({b}))", _ATOM
        simplifier = Simplifier(self.ranges)
        low, least = simplifier.bounds(expr.a)[0], simplifier.bounds(expr.b)[0]
        if low is not None and low >= 0 and least is not None and least > 0:
            return self.infix(expr, "/" if expr.op.endswith("div") else "%", False)
        return f"{self.helper(f'kedge_{expr.op}', 'int64')}({self.expr(expr.a)}, {self.expr(expr.b)})", _ATOM

    def integers(self, expr: Binary) -> tuple[str, int]:
        """Arithmetic on data, which wraps around."""
        op, dtype, kind = expr.op, expr.dtype, _value(expr.dtype)
        a, b = self.operand(expr.a, True, _UNARY), self.operand(expr.b, True, _UNARY)
        if op in ("min", "max"):
            return f"{op}(({kind})({a}), ({kind})({b}))", _ATOM
        if op not in ("add", "sub", "mul"):
            return (
                f"{self.helper(f'kedge_{op}', dtype)}({self.expr(expr.a, data=True)}, {self.expr(expr.b, data=True)})",
                _ATOM,
            )
        sign = _OPERATORS[op]
        if dtype in ("uint32", "uint64"):
            return self.infix(expr, sign, True)
        through = _UNSIGNED.get(dtype, "uint")  # of small types, int products could overflow
        return f"({kind})(({through}){a} {sign} ({through}){b})", _UNARY

    def cast(self, value: Expr, dtype: str) -> tuple[str, int]:
        source = value.dtype
        if source == dtype:
            return self.write(value, True)
        inner = self.operand(value, True, _UNARY)
        if dtype == "bool":
            return f"{inner} != 0", _COMPARISON
        if dtype == "float16" and source == "float64":
            return f"{self.helper('kedge_double_to_half')}({self.expr(value, data=True)})", _ATOM
        if dtype == "float16":
            return f"{self.helper('kedge_to_half')}((float){inner})", _ATOM
        if dtype == "bfloat16":
            rounded = f"{self.helper('kedge_to_bf16')}((float){inner})"
            return f"{self.helper('kedge_from_bf16')}({rounded})", _ATOM
        if source in _HALVES and dtype == "float32":
            return self.write(value, True)
        if source in _FLOATS and dtype in INTEGERS:
            return f"({_value(dtype)}){self.cut(value, dtype)}", _UNARY
        return f"({_value(dtype)}){inner}", _UNARY

    def cut(self, value: Expr, dtype: str) -> str:
        """A float without its fraction, as the wide integer whose lowest bits count; C alone says nothing of most."""
        name = self.helper("kedge_to_long" if dtype in ("int64", "uint64", "uint32") else "kedge_to_int", value.dtype)
        if dtype == "uint64":
            name = self.helper("kedge_to_ulong", value.dtype)
        return f"{name}({self.expr(value, data=True)})"

    def call(self, expr: Call) -> str:
        args = [self.expr(arg, data=True) for arg in expr.args]
        dtype = expr.args[0].dtype
        if expr.name == "not":
            return f"!({self.expr(expr.args[0])})"
        if expr.name == "isnan":
            return f"isnan({args[0]})" if dtype in _FLOATS else "0"
        if dtype not in _FLOATS:
            return self.integer_call(expr, args)
        if expr.name == "sigmoid":
            return self.rounded(f"{self.helper('kedge_sigmoid', dtype)}({args[0]})", dtype)
        if expr.name not in _FUNCTIONS:
            raise CodegenError(f"intrinsic {expr.name!r} is not there for OpenCL", hint="write it with others")
        return self.rounded(f"{_FUNCTIONS[expr.name]}({', '.join(args)})", dtype)

    def rounded(self, text: str, dtype: str) -> str:
        if dtype == "float16":
            return f"{self.helper('kedge_to_half')}({text})"
        if dtype == "bfloat16":
            return f"{self.helper('kedge_from_bf16')}({self.helper('kedge_to_bf16')}({text}))"
        return text

    def integer_call(self, expr: Call, args: Sequence[str]) -> str:
        dtype, arg = expr.args[0].dtype, args[0]
        if expr.name == "pow":
            return f"{self.helper('kedge_pow', dtype)}({', '.join(args)})"
        if expr.name == "abs":
            return f"({_value(dtype)})abs({arg})"
        if expr.name in ("floor", "ceil", "round"):
            return f"({arg})"
        raise CodegenError(f"intrinsic {expr.name!r} is not defined for {dtype}", hint="cast to float32 first")


def _known(buffer: Buffer) -> str:
    if buffer.dtype not in _MEMORY:
        raise CodegenError(
            f"code generation for dtype {buffer.dtype!r} is not built yet", hint=f"cast to one of {', '.join(_MEMORY)}"
        )
    return buffer.dtype


def _value(dtype: str) -> str:
    return _VALUES.get(dtype, _MEMORY[dtype])


def _is_index(expr: Expr) -> bool:
    """Whether an expression is made of loop variables and numbers alone."""
    return all(isinstance(node, (Binary, Var, Const)) for node in walk_expr(expr))


def _flat(buffer: Buffer, indices: Sequence[Expr]) -> Expr:
    """The row-major position of an element."""
    place: Expr | None = None
    for index, dim in zip(indices, buffer.shape, strict=True):
        if place is None or (isinstance(place, Const) and place.value == 0):
            place = index
        else:
            place = place * as_expr(dim) + index
    return const(0) if place is None else Simplifier().simplify(place)


def _literal(value: Const) -> tuple[str, int]:
    number, dtype = value.value, value.dtype
    if dtype == "bool":
        return str(int(number)), _ATOM
    if dtype in _FLOATS:
        return _float_literal(float(np.float16(number)) if dtype == "float16" else float(number), dtype)
    suffix = {"int64": "L", "uint64": "UL", "uint32": "U"}.get(dtype, "")
    if dtype == "int64" and -(2**31) < number < 2**31:
        suffix = ""
    if number == -(2**63):
        return "(-0x7fffffffffffffffL - 1)", _ATOM
    if number == -(2**31):
        return f"(-0x7fffffff{suffix} - 1)", _ATOM
    return f"{int(number)}{suffix}", _ATOM if number >= 0 else _UNARY


def _float_literal(number: float, dtype: str) -> tuple[str, int]:
    if math.isnan(number):
        return ("NAN" if dtype != "float64" else "(double)NAN"), _ATOM
    sign = "-" if math.copysign(1, number) < 0 else ""
    size = abs(number)
    if dtype != "float64" and math.isfinite(size):
        size = float(np.float32(size))
    if math.isinf(size):
        text = "INFINITY" if dtype != "float64" else "(double)INFINITY"
    else:
        text = repr(size) if float(np.float32(size)) == size and len(repr(size)) < 12 else size.hex()
        text += "" if dtype == "float64" else "f"
    return (text, _ATOM) if not sign else (f"-{text}", _UNARY)
