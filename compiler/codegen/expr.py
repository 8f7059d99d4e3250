"""Expressions to LLVM values: addresses as linear forms, loads and stores of scalars or of all lanes at once.

Inside a vectorized loop every value has one lane per iteration, or is the same in all of them and stays scalar.
A condition that differs between lanes becomes a mask under which memory is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np

from kedge.compiler.codegen import arith, mathlib, power
from kedge.compiler.codegen.address import AddressEmitter, NotVectorizable, Pointer
from kedge.compiler.codegen.affine import Interval, Linear
from kedge.compiler.codegen.builder import FunctionBuilder, Value
from kedge.compiler.codegen.floats import any_lane
from kedge.compiler.codegen.together import Together
from kedge.compiler.codegen.turned import Turned, columns
from kedge.compiler.codegen.types import scalar_type
from kedge.compiler.dtypes import HALVES
from kedge.compiler.errors import CodegenError
from kedge.compiler.tir.expr import (
    COMPARISONS,
    INDEX_DTYPE,
    LOGICAL,
    Binary,
    Call,
    Cast,
    Const,
    Expr,
    Load,
    Select,
    Var,
)
from kedge.compiler.tir.stmt import Buffer
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import children, loads

_Emit: TypeAlias = Callable[[], Value]


class ExprEmitter(AddressEmitter):
    """Emits expressions into a function."""

    def __init__(self, builder: FunctionBuilder) -> None:
        super().__init__(builder)
        self.together: Mapping[Load, Together] = {}  # by the loads under the unrolled loops around
        self.turned: Mapping[Load, Turned] = {}  # by the loads under the unrolled loop around
        self.written_freely: set[Buffer] = set()  # those whose elements beyond masks nothing reads
        self._accumulates = False  # what is computed now goes to a register tile

    # Memory -----------------------------------------------------------------------------------------------------

    def load(self, load: Load) -> Value:
        """The element, or one element per lane."""
        position = self.offset(load.buffer, load.indices)
        pointer = self._pointer(load.buffer)
        kind = scalar_type(load.buffer.dtype)
        raw = self._load_raw(load, pointer, kind.memory, kind.size, position)
        return arith.from_memory(self.b, raw, load.buffer.dtype)

    def _pointer(self, buffer: Buffer) -> Pointer:
        try:
            return self.pointers[buffer]
        except KeyError:
            raise CodegenError(
                f"buffer {buffer.name!r} is neither a parameter nor an allocation of the function"
            ) from None

    def _load_raw(self, load: Load, pointer: Pointer, memory: str, size: int, position: Linear) -> Value:
        split = position.split_lane()
        if split is not None and split[1] == 0:
            return self._load_uniform(load, pointer, memory, size, position)
        mask = self.mask
        if mask is not None and ((pointer.private and self._fits(load.buffer, position)) or self._in_bounds(load)):
            mask = None
        if split is None or split[1] not in (1, 2) or (split[1] == 2 and mask is not None):
            column = self._column(load, pointer, memory, size, position, mask)
            return self._gather(pointer, memory, size, position, mask) if column is None else column
        base, stride = split
        if stride == 2:
            return self._load_every_second(pointer, memory, size, base)
        return self._load_lanes(pointer, memory, size, base, mask)

    def _load_lanes(self, pointer: Pointer, memory: str, size: int, base: Linear, mask: Value | None) -> Value:
        address = self._address(pointer, memory, base)
        align = self._alignment(pointer, base, size)
        full = f"<{self.lanes} x {memory}>"
        if mask is None:
            return self.b.result(f"load {full}, ptr {address}, align {align}", memory, self.lanes)
        name = f"llvm.masked.load.v{self.lanes}{_suffix(memory)}.p0"
        self.b.module.declare(name, f"{full} @(ptr, <{self.lanes} x i1>, {full})")
        return self.b.result(
            f"call {full} @{name}(ptr align {align} {address}, {mask.typed}, {full} zeroinitializer)",
            memory, self.lanes,
        )  # fmt: skip

    def _load_every_second(self, pointer: Pointer, memory: str, size: int, base: Linear) -> Value:
        """Elements 0, 2, 4, …: two whole vectors that together end exactly at the last one, then one shuffle."""
        lanes = self.lanes
        first = self._load_lanes(pointer, memory, size, base, None)
        second = self._load_lanes(pointer, memory, size, base + Linear.of(lanes - 1), None)
        picks = [2 * i if 2 * i < lanes else lanes + 2 * i - (lanes - 1) for i in range(lanes)]
        mask = ", ".join(f"i32 {pick}" for pick in picks)
        return self.b.result(
            f"shufflevector {first.typed}, {second.typed}, <{lanes} x i32> <{mask}>", memory, lanes
        )  # fmt: skip

    def _column(
        self, load: Load, pointer: Pointer, memory: str, size: int, position: Linear, mask: Value | None
    ) -> Value | None:
        """An element for each lane out of rows that other iterations of an unrolled loop read further elements of."""
        plan, lanes = self.turned.get(load), self.lanes
        number = None if plan is None else self.env[plan.var].value
        steps = position.lane_step()
        if plan is None or number is None or steps is None or lanes & (lanes - 1):
            return None
        base, step = steps
        part = plan.part(number, lanes)
        if part is None:
            return None
        first, count = part
        start = base + Linear.of(first - number)
        place = frozenset(start.terms.items()), frozenset(step.terms.items())
        key = ("columns", pointer.ref, memory, place, count, lanes, mask)
        found: list[Value] | None = self._cached(key)
        if found is None:
            found = columns(self.b, list(self._rows(pointer, memory, size, start, step, count, mask)))
            self._remember(key, found)
        return found[number - first]

    def _rows(
        self, pointer: Pointer, memory: str, size: int, start: Linear, step: Linear, count: int, mask: Value | None
    ) -> Iterator[Value]:
        """For each lane `count` elements that lie together; nothing is read for those that are off."""
        full = f"<{count} x {memory}>"
        for lane in range(self.lanes):
            position = start + step.scaled(lane)
            address = self._address(pointer, memory, position)
            align = self._alignment(pointer, position, size)
            if mask is None:
                yield self.b.result(f"load {full}, ptr {address}, align {align}", memory, count)
                continue
            on = self.b.broadcast(self.b.result(f"extractelement {mask.typed}, i64 {lane}", "i1"), count)
            name = f"llvm.masked.load.v{count}{_suffix(memory)}.p0"
            self.b.module.declare(name, f"{full} @(ptr, <{count} x i1>, {full})")
            yield self.b.result(
                f"call {full} @{name}(ptr align {align} {address}, {on.typed}, {full} zeroinitializer)", memory, count
            )

    def _load_uniform(self, load: Load, pointer: Pointer, memory: str, size: int, position: Linear) -> Value:
        def emit() -> Value:
            vector = self._element_of_vector(load, pointer, memory, size, position)
            if vector is not None:
                return vector
            address = self._address(pointer, memory, position)
            align = self._alignment(pointer, position, size)
            return self.b.result(f"load {memory}, ptr {address}, align {align}", memory)

        if self.mask is None or self._in_bounds(load) or (pointer.private and self._fits(load.buffer, position)):
            return emit()
        return self.guarded(any_lane(self.b, self.mask), emit, lambda: self.b.const(0, memory))

    def _element_of_vector(
        self, load: Load, pointer: Pointer, memory: str, size: int, position: Linear
    ) -> Value | None:
        """An element for all lanes, out of a vector that other iterations of unrolled loops load as well."""
        plan = self.together.get(load)
        if plan is None or self.lanes == 1:
            return None
        element = sum(step * (self.env[var].value or 0) for var, step in plan.steps.items())
        if element not in plan.vectors:
            return None
        first, count = plan.vectors[element]
        start = position + Linear.of(first - element)
        address = self._address(pointer, memory, start)
        align = self._alignment(pointer, start, size)
        vector = self.b.result(f"load <{count} x {memory}>, ptr {address}, align {align}", memory, count)
        if self.b.target.memory_operands:  # frozen, or LLVM makes a load for each element of it again
            vector = self.b.result(f"freeze {vector.typed}", memory, count)
        picks = ", ".join([f"i32 {element - first}"] * self.lanes)
        return self.b.result(
            f"shufflevector {vector.typed}, {vector.full} poison, <{self.lanes} x i32> <{picks}>", memory, self.lanes
        )  # fmt: skip

    def _fits(self, buffer: Buffer, position: Linear) -> bool:
        """Whether the access stays inside the buffer's memory in every lane."""
        low, high = position.bounds(self.known)
        size = 1
        for dim in buffer.shape:
            if not isinstance(dim, int):
                return False
            size *= dim
        return low is not None and high is not None and low >= 0 and high < size

    def _gather(self, pointer: Pointer, memory: str, size: int, position: Linear, mask: Value | None) -> Value:
        lanes = self.lanes
        if mask is not None:
            at = self.b.broadcast(self.materialize(position), lanes)
            addresses = self.b.result(
                f"getelementptr {memory}, ptr {pointer.ref}, {at.typed}", "ptr", lanes
            )  # fmt: skip
            full = f"<{lanes} x {memory}>"
            name = f"llvm.masked.gather.v{lanes}{_suffix(memory)}.v{lanes}p0"
            self.b.module.declare(name, f"{full} @(<{lanes} x ptr>, <{lanes} x i1>, {full})")
            return self.b.result(
                f"call {full} @{name}(<{lanes} x ptr> align {size} {addresses.ref}, {mask.typed}, "
                f"{full} zeroinitializer)", memory, lanes,
            )  # fmt: skip
        result = Value("poison", memory, lanes)
        for lane, element in enumerate(self._lane_positions(position)):
            address = self._address(pointer, memory, element)
            one = self.b.result(f"load {memory}, ptr {address}, align {size}", memory)
            result = self.b.result(f"insertelement {result.typed}, {one.typed}, i64 {lane}", memory, lanes)
        return result

    def _lane_positions(self, position: Linear) -> list[Linear]:
        """The position in each lane by itself."""
        split = position.split_lane()
        if split is not None:
            return [split[0] + Linear.of(split[1] * lane) for lane in range(self.lanes)]
        vector = self.b.broadcast(self.materialize(position), self.lanes)
        return [
            Linear.atom(self.b.result(f"extractelement {vector.typed}, i64 {lane}", self.b.index_type))
            for lane in range(self.lanes)
        ]

    def store(self, buffer: Buffer, indices: Sequence[Expr], expr: Expr) -> None:
        """`buffer[indices] = expr`, in every lane that is on."""
        position = self.offset(buffer, indices)
        self._accumulates = buffer.scope == "register"
        value = arith.to_memory(self.b, self.value(expr), buffer.dtype)
        self._accumulates = False
        pointer, kind = self._pointer(buffer), scalar_type(buffer.dtype)
        if self.lanes == 1:
            address = self._address(pointer, kind.memory, position)
            align = self._alignment(pointer, position, kind.size)
            self.b.emit(f"store {value.typed}, ptr {address}, align {align}")
            return
        split = position.split_lane()
        if split is None or split[1] == 0:
            uniform = split is not None and value.lanes == 1 and self.mask is None
            if not uniform or any(load.buffer is buffer for load in loads(expr)):
                # Lanes would meet in one element: only running them in order keeps the meaning.
                raise NotVectorizable
            address = self._address(pointer, kind.memory, position)
            self.b.emit(f"store {value.typed}, ptr {address}, align {kind.size}")
            return
        value = self.b.broadcast(value, self.lanes)
        mask = self.mask
        if mask is not None and pointer.private and self._fits(buffer, position):
            # Nobody else looks: writing back what the other lanes hold is cheaper than a masked store.
            if buffer not in self.written_freely:
                value = self.b.select(mask, value, self._load_unmasked(pointer, kind.memory, kind.size, position))
            mask = None
        if split[1] == 1:
            self._store_lanes(pointer, kind.memory, kind.size, split[0], value, mask)
        else:
            self._scatter(pointer, kind.memory, kind.size, position, value, mask)

    def _load_unmasked(self, pointer: Pointer, memory: str, size: int, position: Linear) -> Value:
        split = position.split_lane()
        if split is not None and split[1] == 1:
            return self._load_lanes(pointer, memory, size, split[0], None)
        return self._gather(pointer, memory, size, position, None)

    def _store_lanes(
        self, pointer: Pointer, memory: str, size: int, base: Linear, value: Value, mask: Value | None
    ) -> None:
        address = self._address(pointer, memory, base)
        align = self._alignment(pointer, base, size)
        if mask is None:
            self.b.emit(f"store {value.typed}, ptr {address}, align {align}")
            return
        if memory in ("i8", "i16", "i32") and self.b.target.has("avx512f"):
            mask = self._unknown(mask)
        name = f"llvm.masked.store.v{value.lanes}{_suffix(memory)}.p0"
        self.b.module.declare(name, f"void @({value.full}, ptr, <{value.lanes} x i1>)")
        self.b.emit(f"call void @{name}({value.typed}, ptr align {align} {address}, {mask.typed})")

    def _unknown(self, mask: Value) -> Value:
        """The mask, of which LLVM cannot tell that it is constant.

        Under a constant mask of one lane LLVM 22 stores an element as it was before it was made narrower, and so
        writes over what comes after it. That takes a store that narrows elements, which only AVX-512 has.
        """
        on = self.b.result('call i32 asm "", "=r,0"(i32 1)', "i32")
        return self.b.op("and", mask, self.b.convert("trunc", on, "i1"))

    def _scatter(
        self, pointer: Pointer, memory: str, size: int, position: Linear, value: Value, mask: Value | None
    ) -> None:
        if mask is not None:
            raise NotVectorizable
        for lane, element in enumerate(self._lane_positions(position)):
            address = self._address(pointer, memory, element)
            one = self.b.result(f"extractelement {value.typed}, i64 {lane}", memory)
            self.b.emit(f"store {one.typed}, ptr {address}, align {size}")

    # Values -----------------------------------------------------------------------------------------------------

    def value(self, expr: Expr) -> Value:
        """The value of an expression: scalar where it is the same in every lane."""
        match expr:
            case Const(value=value, dtype=dtype):
                if dtype in HALVES:
                    value = float(np.dtype(dtype).type(value))
                return self.b.const(value, arith.value_type(dtype))
            case Var():
                return self._widen(self.materialize(self.index(expr)))
            case Load():
                return self.load(expr)
            case Select():
                return self._select(expr)
            case Cast(value=inner, dtype=dtype):
                return arith.cast(self.b, self.value(inner), inner.dtype, dtype)
            case Call():
                return self._call(expr)
            case Binary():
                return self._binary(expr)
        raise CodegenError(f"no code for expression {expr!r}")

    def _widen(self, value: Value) -> Value:
        return self.b.convert("sext", value, "i64")

    def _binary(self, expr: Binary) -> Value:
        a, b = expr.a, expr.b
        dtype = a.dtype
        if dtype == INDEX_DTYPE and _is_index(expr):
            if expr.op in COMPARISONS:
                return self._compare_indices(expr)
            return self._widen(self.materialize(self.index(expr)))
        if expr.op in LOGICAL:
            return self._logic(expr)
        if expr.op in ("add", "sub") and dtype in ("float32", "float64"):
            fused = self._multiply_add(expr)
            if fused is not None:
                return fused
        return arith.binary(self.b, expr.op, dtype, self.value(a), self.value(b))

    def _logic(self, expr: Binary) -> Value:
        """`and` or `or`. What the right side reads need not exist where the left side decides."""
        a = self.value(expr.a)
        if a.ref in ("true", "false"):
            return self.value(expr.b) if (a.ref == "true") == (expr.op == "and") else a
        read = {expr_key(load) for load in _surely_read(expr.a)}
        if all(expr_key(load) in read or self._in_bounds(load) for load in loads(expr.b)):
            b = self.value(expr.b)
            if b.ref in ("true", "false"):
                return a if (b.ref == "true") == (expr.op == "and") else b
            return self.b.op(expr.op, a, b)
        undecided = a if expr.op == "and" else self.b.op("xor", a, self.b.const(True, "i1"))
        if a.lanes == 1:
            return self.guarded(undecided, lambda: self.value(expr.b), lambda: self.b.const(expr.op == "or", "i1"))
        with self.masked(undecided):
            b = self.value(expr.b)
        return self.b.op(expr.op, a, b)

    def _compare_indices(self, expr: Binary) -> Value:
        x, y = self.index(expr.a), self.index(expr.b)
        decided = _decide(expr.op, (x - y).bounds(self.known))
        if decided is not None:
            return Value("true" if decided else "false", "i1")
        key = (expr.op, self.lanes, frozenset(x.terms.items()), frozenset(y.terms.items()))
        known: Value | None = self._cached(key)
        if known is not None:
            return known
        dtype = f"int{self.b.target.arch.pointer_bits}"
        return self._remember(key, arith.binary(self.b, expr.op, dtype, self.materialize(x), self.materialize(y)))

    def _multiply_add(self, expr: Binary) -> Value | None:
        """`a * b ± c` with one rounding, where the machine has an instruction for it."""
        intrinsic = "llvm.fma" if self.b.target.fma else "llvm.fmuladd" if self.b.target.fma_by_element else None
        if intrinsic is None:
            return None
        for product, other in ((expr.a, expr.b), (expr.b, expr.a)):
            if isinstance(product, Binary) and product.op == "mul":
                x, y, z = self.value(product.a), self.value(product.b), self.value(other)
                if expr.op == "sub":
                    if product is expr.a:
                        z = self.b.negate(z)
                    else:
                        x = self.b.negate(x)
                # Where a sum begins with 0.0 in a register, the first product is it, but for the sign of a zero.
                by_element = self._accumulates and self.b.target.fma_by_element
                return self.b.intrinsic(intrinsic, x, y, z, flags="nsz " if by_element else "")
        return None

    def _call(self, expr: Call) -> Value:
        args = [self.value(arg) for arg in expr.args]
        dtype = expr.args[0].dtype
        kind = scalar_type(dtype)
        if expr.name == "not":
            return self.b.op("xor", args[0], self.b.const(True, args[0]))
        if expr.name == "isnan":
            if not kind.is_float:
                return self.b.const(False, "i1")
            return self.b.compare("fcmp uno", args[0], args[0])
        if kind.is_float:
            return arith.rounded(self.b, mathlib.apply(self.b, expr.name, args), dtype)
        if expr.name == "pow":
            return power.integer_power(self.b, args[0], args[1], signed=kind.signed)
        if expr.name == "abs":
            if not kind.signed:
                return args[0]
            zero = self.b.const(0, args[0])
            return self.b.select(self.b.compare("icmp slt", args[0], zero), self.b.op("sub", zero, args[0]), args[0])
        if expr.name in ("floor", "ceil", "round"):
            return args[0]
        raise CodegenError(f"intrinsic {expr.name!r} is not defined for {dtype}", hint="cast to float32 first")

    # Choices ----------------------------------------------------------------------------------------------------

    def _select(self, expr: Select) -> Value:
        condition = self.value(expr.condition)
        if condition.ref in ("true", "false"):
            return self.value(expr.a if condition.ref == "true" else expr.b)
        risky = self._risky(expr)
        if not risky:
            return self.b.select(condition, self.value(expr.a), self.value(expr.b))
        if condition.lanes == 1:
            return self.guarded(condition, lambda: self.value(expr.a), lambda: self.value(expr.b))
        inverse = self.b.op("xor", condition, self.b.const(True, "i1"))
        with self.masked(condition):
            a = self.value(expr.a)
        with self.masked(inverse):
            b = self.value(expr.b)
        return self.b.select(condition, a, b)

    def _risky(self, expr: Select) -> bool:
        """Whether evaluating both sides could read outside a buffer."""
        always, first, second = (
            {expr_key(load) for load in _surely_read(part)} for part in (expr.condition, expr.a, expr.b)
        )
        safe = always | (first & second)
        sides = (load for side in (expr.a, expr.b) for load in loads(side))
        return any(expr_key(load) not in safe and not self._in_bounds(load) for load in sides)

    @contextmanager
    def masked(self, mask: Value) -> Iterator[None]:
        """Memory is touched only in the lanes of `mask` (and of the mask around)."""
        outer = self.mask
        self.mask = mask if outer is None else self.b.op("and", outer, mask)
        try:
            with self.scope(straight=True):
                yield
        finally:
            self.mask = outer

    def guarded(self, condition: Value, then: _Emit, otherwise: _Emit) -> Value:
        """`then()` where the scalar `condition` holds, else `otherwise()`; only one of them runs."""
        b = self.b
        yes, no, join = b.fresh("then"), b.fresh("else"), b.fresh("join")
        b.branch(condition, yes, no)
        runs, self.runs = self.runs, {}  # none may begin in a branch
        ends = []
        for label, emit in ((yes, then), (no, otherwise)):
            b.label(label)
            with self.scope():
                value = emit()
                if self.lanes > 1:
                    value = b.broadcast(value, self.lanes)
            ends.append((value, b.block))
            b.jump(join)
        self.runs = runs
        b.label(join)
        first = ends[0][0]
        incoming = ", ".join(f"[ {value.ref}, %{block} ]" for value, block in ends)
        return b.result(f"phi {first.full} {incoming}", first.type, first.lanes)


def _surely_read(expr: Expr) -> Iterator[Load]:
    """The loads that happen whenever the expression is evaluated, whichever way its choices go."""
    match expr:
        case Select(condition=first) | Binary(op="and" | "or", a=first):
            yield from _surely_read(first)
            return
        case Load():
            yield expr
    for child in children(expr):
        yield from _surely_read(child)


def _suffix(memory: str) -> str:
    return {"float": "f32", "double": "f64"}.get(memory, memory)


def _is_index(expr: Expr) -> bool:
    """Whether an int64 expression is made of loop variables, symbols and literals only."""
    match expr:
        case Const(value=value):
            return abs(int(value)) < 2**31
        case Var():
            return True
        case Binary(op="add" | "sub" | "mul" | "floordiv" | "floormod" | "min" | "max", a=a, b=b):
            return _is_index(a) and _is_index(b)
        case Binary(op=op, a=a, b=b) if op in COMPARISONS:
            return a.dtype == INDEX_DTYPE and _is_index(a) and _is_index(b)
    return False


def _decide(op: str, difference: Interval) -> bool | None:
    """`x op y` from bounds of `x - y`, or None."""
    low, high = difference
    below = high is not None and high < 0
    above = low is not None and low > 0
    at_most = high is not None and high <= 0
    at_least = low is not None and low >= 0
    yes, no = {
        "lt": (below, at_least), "le": (at_most, above), "gt": (above, at_most), "ge": (at_least, below),
        "eq": (low == high == 0, below or above), "ne": (below or above, low == high == 0),
    }[op]  # fmt: skip
    return True if yes else False if no else None
