"""Writing LLVM IR as text: values that know their type and lanes, and the instructions that code generation uses.

LLVM parses text in a millisecond or two; building the same through objects costs more than optimising it.
Operands of different lane counts are broadcast, so that scalar and vector code is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from kedge.compiler.codegen.types import literal
from kedge.compiler.target.model import Target


class Value(NamedTuple):
    """An SSA value or a constant: `ref` as written, scalar type, number of lanes (1: not a vector)."""

    ref: str
    type: str
    lanes: int = 1

    @property
    def full(self) -> str:
        """The LLVM type, vectors included."""
        return self.type if self.lanes == 1 else f"<{self.lanes} x {self.type}>"

    @property
    def typed(self) -> str:
        """Type and reference, as an operand is written."""
        return f"{self.full} {self.ref}"

    @property
    def is_const(self) -> bool:
        """Whether this is a literal."""
        return not self.ref.startswith("%")


def const_value(value: int | float | bool, llvm: str, lanes: int = 1) -> Value:
    """A literal, splat over `lanes`."""
    text = literal(value, llvm)
    return Value(text if lanes == 1 else f"splat ({llvm} {text})", llvm, lanes)


#: What a loop is marked with that LLVM must not unroll.
_LOOP_AS_IT_IS = ("!2 = distinct !{!2, !3}", '!3 = !{!"llvm.loop.unroll.disable"}')
#: Where the code of a helper goes.
Placing: TypeAlias = Literal["alwaysinline", "noinline", "noinline cold optsize"]
Helper = Callable[["FunctionBuilder", Sequence[Value]], Value]


class ModuleBuilder:
    """One LLVM module: functions, the intrinsics they use, and helper functions made on demand."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.scalar_loops = False  # whether a function has innermost loops that LLVM could vectorize
        self._functions: list[str] = []
        self._declared: dict[str, str] = {}
        self._helpers: dict[str, None] = {}

    @property
    def index_type(self) -> str:
        """The integer type of addresses and loop counters: a pointer's width."""
        return f"i{self.target.arch.pointer_bits}"

    def declare(self, name: str, signature: str) -> None:
        """Declare an external function or intrinsic once: `signature` is "float (float, float)" split at the name."""
        self._declared.setdefault(name, signature)

    def add(self, text: str) -> None:
        """Add a finished function or global."""
        self._functions.append(text)

    def define_once(self, name: str, text: str) -> None:
        """Add the finished internal function `name` unless it exists."""
        if name not in self._helpers:
            self._helpers[name] = None
            self.add(text)

    def helper(
        self, name: str, result: Value, params: Sequence[Value], build: Helper, *, placing: Placing = "alwaysinline"
    ) -> None:
        """Define the internal function `name` unless it exists: inlined, called, or called where it is rare."""
        if name in self._helpers:
            return
        self._helpers[name] = None
        args = [Value(f"%a{i}", p.type, p.lanes) for i, p in enumerate(params)]
        function = FunctionBuilder(self)
        out = function.broadcast(build(function, args), result.lanes)
        function.emit(f"ret {out.typed}")
        head = f"define internal {result.full} @{name}({', '.join(a.typed for a in args)})"
        self.add(function.finish(f"{head} {placing} {self.attributes}"))

    @property
    def attributes(self) -> str:
        """The group of attributes that every function has."""
        return "#0"

    def _attribute_group(self) -> str:
        """No library calls out of nothing, and the CPU to schedule instructions for."""
        target = self.target
        tune = f' "tune-cpu"="{target.cpu}"' if target.arch.name != "armv7l" else ""
        width = f' "prefer-vector-width"="{target.vector_bits}" "min-legal-vector-width"="{target.vector_bits}"'
        return f'attributes #0 = {{ nounwind "no-builtins"{tune}{width if target.arch.name == "x86_64" else ""} }}'

    def text(self) -> str:
        """The whole module."""
        arch = self.target.arch
        head = [f'target datalayout = "{arch.data_layout}"', f'target triple = "{arch.triple}"', ""]
        declares = [f"declare {sig.replace('@', '@' + name, 1)}" for name, sig in sorted(self._declared.items())]
        flags = [
            "",
            self._attribute_group(),
            "",
            "!llvm.module.flags = !{!0, !1}",
            '!0 = !{i32 8, !"PIC Level", i32 2}',
        ]
        abi = f'i32 1, !"target-abi", !"{arch.abi_name}"' if arch.abi_name else 'i32 7, !"uwtable", i32 0'
        return "\n".join([*head, *self._functions, *declares, *flags, f"!1 = !{{{abi}}}", *_LOOP_AS_IT_IS, ""])


class FunctionBuilder:
    """One function's instructions. `block` is the label that instructions are being added to."""

    def __init__(self, module: ModuleBuilder) -> None:
        self.module = module
        self.target = module.target
        self.index_type = module.index_type
        self.lines: list[str] = []
        self.block = "entry"
        self._entry: list[str] = []
        self._counter = 0

    # Structure --------------------------------------------------------------------------------------------------

    def fresh(self, hint: str = "t") -> str:
        """A new name without its sigil."""
        self._counter += 1
        return f"{hint}{self._counter}"

    def emit(self, line: str) -> None:
        """Add one instruction."""
        self.lines.append("  " + line)

    def emit_entry(self, line: str) -> None:
        """Add one instruction to the start of the function (allocas)."""
        self._entry.append("  " + line)

    def label(self, name: str) -> None:
        """Start a basic block; the one before must have ended."""
        self.lines.append(f"{name}:")
        self.block = name

    def jump(self, label: str) -> None:
        """End the block."""
        self.emit(f"br label %{label}")

    def branch(self, condition: Value, then: str, otherwise: str, *, as_it_is: bool = False) -> None:
        """End the block by a condition. Of a branch back to a loop's start: whether the loop must not be unrolled."""
        mark = ", !llvm.loop !2" if as_it_is else ""
        self.emit(f"br {condition.typed}, label %{then}, label %{otherwise}{mark}")

    def finish(self, head: str) -> str:
        """The function's text under the line `head`."""
        return "\n".join([f"{head} {{", "entry:", *self._entry, *self.lines, "}", ""])

    # Values -----------------------------------------------------------------------------------------------------

    def result(self, instruction: str, type_: str, lanes: int = 1) -> Value:
        """The result of `instruction` as a new value."""
        name = f"%{self.fresh()}"
        self.lines.append(f"  {name} = {instruction}")
        return Value(name, type_, lanes)

    def const(self, value: int | float | bool, like: Value | str) -> Value:
        """A scalar literal of a type, or of the type of another value; it is broadcast where it is used."""
        return const_value(value, like if isinstance(like, str) else like.type)

    def index(self, value: int) -> Value:
        """A literal of the index type."""
        return Value(str(value), self.index_type)

    def broadcast(self, value: Value, lanes: int) -> Value:
        """`value` in every lane."""
        if value.lanes == lanes:
            return value
        if value.is_const:
            return Value(f"splat ({value.type} {value.ref})", value.type, lanes)
        full = f"<{lanes} x {value.type}>"
        one = self.result(f"insertelement {full} poison, {value.typed}, i64 0", value.type, lanes)
        return self.result(
            f"shufflevector {full} {one.ref}, {full} poison, <{lanes} x i32> zeroinitializer", value.type, lanes
        )

    def _match(self, *values: Value) -> tuple[Value, ...]:
        lanes = max(value.lanes for value in values)
        return tuple(self.broadcast(value, lanes) for value in values)

    def op(self, name: str, a: Value, b: Value) -> Value:
        """A binary instruction ("fadd", "add nsw", "and", …)."""
        a, b = self._match(a, b)
        return self.result(f"{name} {a.typed}, {b.ref}", a.type, a.lanes)

    def compare(self, predicate: str, a: Value, b: Value) -> Value:
        """ "fcmp olt", "icmp slt", … of two values: i1."""
        a, b = self._match(a, b)
        return self.result(f"{predicate} {a.typed}, {b.ref}", "i1", a.lanes)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """`a` where `condition`, else `b`; both are evaluated."""
        lanes = max(condition.lanes, a.lanes, b.lanes)
        a, b = self.broadcast(a, lanes), self.broadcast(b, lanes)
        return self.result(f"select {condition.typed}, {a.typed}, {b.typed}", a.type, lanes)

    def convert(self, name: str, value: Value, type_: str) -> Value:
        """A cast instruction ("sitofp", "bitcast", "sext", …) to a scalar type, lane by lane."""
        if value.type == type_:
            return value
        to = type_ if value.lanes == 1 else f"<{value.lanes} x {type_}>"
        return self.result(f"{name} {value.typed} to {to}", type_, value.lanes)

    def intrinsic(self, name: str, *args: Value, flags: str = "") -> Value:
        """An intrinsic whose arguments and result have one type: "llvm.fma", "llvm.sqrt", …; `flags` of fast math."""
        args = self._match(*args)
        first = args[0]
        kind = {"float": "f32", "double": "f64", "half": "f16"}.get(first.type, first.type)
        full = f"{name}.{kind if first.lanes == 1 else f'v{first.lanes}{kind}'}"
        self.module.declare(full, f"{first.full} @({', '.join(a.full for a in args)})")
        inside = ", ".join(a.typed for a in args)
        return self.result(f"call {flags}{first.full} @{full}({inside})", first.type, first.lanes)

    def call(self, name: str, result: Value, args: Sequence[Value]) -> Value:
        """Call a function of this module; `result` gives the type."""
        inside = ", ".join(a.typed for a in args)
        return self.result(f"call {result.full} @{name}({inside})", result.type, result.lanes)

    def mul_add(self, a: Value, b: Value, c: Value) -> Value:
        """`a * b + c`: rounded once where the machine can, else twice."""
        if self.target.fma or a.type == "half":
            return self.intrinsic("llvm.fma", a, b, c)
        return self.op("fadd", self.op("fmul", a, b), c)

    def negate(self, a: Value) -> Value:
        """`-a` of a float."""
        return self.result(f"fneg {a.typed}", a.type, a.lanes)
