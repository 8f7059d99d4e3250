"""Addresses: index arithmetic as linear forms, made into LLVM values as late as possible.

Sums are built from the values that were defined first, and remembered, so that what is the same in a loop is computed
outside it and what unrolled code shares is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from kedge.compiler.codegen import arith
from kedge.compiler.codegen.affine import LANE, Interval, Linear, Product
from kedge.compiler.codegen.builder import FunctionBuilder, Value
from kedge.compiler.errors import CodegenError
from kedge.compiler.schedule.rules.analysis import address_of
from kedge.compiler.tir.expr import Binary, Const, Expr, Load, Var, as_expr
from kedge.compiler.tir.simplify import Simplifier
from kedge.compiler.tir.stmt import Buffer, Range
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import loads, walk_expr

_T = TypeVar("_T")


class NotVectorizable(Exception):
    """This loop cannot run all lanes at once; it runs one iteration after the other instead."""


class Pointer(NamedTuple):
    """Where a buffer's first element is: an LLVM pointer, its known alignment in bytes, and whether it is ours.

    Of a private buffer, elements beyond those that a mask selects may be read and written back: no other thread is
    using them.
    """

    ref: str
    align: int
    private: bool = False


class AddressEmitter:
    """Emits index arithmetic into a function. `env` holds the loop variables and symbols that are in scope."""

    def __init__(self, builder: FunctionBuilder) -> None:
        self.b = builder
        self.env: dict[Var, Linear] = {}
        self.ranges: dict[Var, Range] = {}  # of the loops around, from the outermost on
        self._numbers: dict[tuple[Buffer, tuple[Expr, ...]], Expr | None] = {}  # of elements, see `_in_order`
        self.known: dict[Value, Interval] = {}
        self.pointers: dict[Buffer, Pointer] = {}
        self.lanes = 1
        self.mask: Value | None = None
        self._caches: list[dict[object, Any]] = [{}]
        self._shifted: dict[tuple[str, str], tuple[int, str]] = {}
        self._remainders: dict[Value, tuple[Linear, Linear, int]] = {}  # x % d: x, x // d and d
        #: By pointers to buffers that are read in runs now: the address of the run's first vector, and the constant in
        #: its position. All of a run differ in that only.
        self.runs: dict[str, tuple[str, int] | None] = {}
        self._divided: set[Value] = set()  # quotients and remainders

    def bind_symbol(self, var: Var, value: Value) -> None:
        """Make a free dim known under its LLVM value (i64)."""
        index = self.b.convert("trunc", value, self.b.index_type) if self.b.index_type != "i64" else value
        self.env[var] = Linear.atom(index)
        self.known[index] = (var.lower or 0, var.upper)

    # Scopes -----------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, *, straight: bool = False) -> Iterator[None]:
        """Values computed inside do not dominate what comes after, unless the code runs `straight` through."""
        self._caches.append({})
        try:
            yield
        except NotVectorizable:
            straight = False  # what was emitted is taken back
            raise
        finally:
            inner = self._caches.pop()
            if straight:
                self._caches[-1].update(inner)

    def _cached(self, key: object) -> Any:
        for cache in reversed(self._caches):
            if key in cache:
                return cache[key]
        return None

    def _remember(self, key: object, value: _T) -> _T:
        self._caches[-1][key] = value
        return value

    # Addresses --------------------------------------------------------------------------------------------------

    def index(self, expr: Expr) -> Linear:
        """An int64 expression as a linear form."""
        match expr:
            case Const(value=value):
                return Linear.of(int(value))
            case Var():
                try:
                    return self.env[expr]
                except KeyError:
                    raise CodegenError(f"variable {expr.name!r} is used outside its loop") from None
            case Binary(op="add", a=a, b=b):
                return self.index(a) + self.index(b)
            case Binary(op="sub", a=a, b=b):
                return self.index(a) - self.index(b)
            case Binary(op="mul", a=a, b=b):
                return self._product(self.index(a), self.index(b))
            case Binary(op="floormod", a=Binary(op="floordiv", a=a, b=Const(value=inner)), b=Const(value=outer)):
                return self._digit(expr, a, int(inner), int(outer))
            case Binary(op="floordiv" | "floormod", a=a, b=b):
                return self._divide(expr.op, self.index(a), self.index(b))
            case Binary(op="min" | "max", a=a, b=b):
                return self._extreme(expr.op, self.index(a), self.index(b))
        return Linear.atom(self.b.convert("trunc", self.value(expr), self.b.index_type))

    def _product(self, x: Linear, y: Linear) -> Linear:
        steps = (x.is_uniform and y.lane_step() is not None) or (y.is_uniform and x.lane_step() is not None)
        if x.value is not None or y.value is not None or steps:
            return x * y
        key = ("mul", *self._operands(x, y))
        known: Value | None = self._cached(key)
        if known is None:
            known = self._remember(key, self.b.op("mul", self.materialize(x), self.materialize(y)))
        return Linear.atom(known)

    def _operands(self, x: Linear, y: Linear) -> tuple[object, ...]:
        """What two linear forms are known by where the same is computed from them again."""
        return self.lanes, frozenset(x.terms.items()), frozenset(y.terms.items())

    def _divide(self, op: str, x: Linear, d: Linear) -> Linear:
        divisor = d.value
        if divisor is None or divisor <= 0:
            key = (op, *self._operands(x, d))
            known: Value | None = self._cached(key)
            if known is None:
                dtype = f"int{self.b.target.arch.pointer_bits}"
                known = arith.binary(self.b, op, dtype, self.materialize(x), self.materialize(d))
                self._remember(key, known)
            return self._opaque(known, (None, None))
        quotient, rest = x.divide(divisor)
        low, high = rest.bounds(self.known)
        if low is not None and high is not None and low // divisor == high // divisor:
            whole_part = low // divisor
            if op == "floordiv":
                return quotient + Linear.of(whole_part)
            return rest - Linear.of(whole_part * divisor)
        more, rest = rest.reduced(divisor)  # as the simplifier has remainders: both are of one number then
        quotient = quotient + more
        coarse = self._in_steps(rest, divisor)
        if coarse is not None:
            steps, step, fine = coarse
            part = self._divide(op, steps, Linear.of(divisor // step))
            return quotient + part if op == "floordiv" else part.scaled(step) + fine
        low, high = rest.bounds(self.known)
        bounds = (None if low is None else low // divisor, None if high is None else high // divisor)
        times = self._opaque(self._divided_by("floordiv", rest, divisor), bounds)
        if op == "floordiv":
            return quotient + times
        remainder = self._divided_by("floormod", rest, divisor)
        self._remainders[remainder] = (rest, times, divisor)
        return self._opaque(remainder, (0, divisor - 1))

    def _in_steps(self, x: Linear, divisor: int) -> tuple[Linear, int, Linear] | None:
        """`(n, step, r)` with `x == n * step + r`, 0 <= r < step, and a step above 1 that divides the divisor.

        Then `x // divisor` is `n // (divisor // step)`: of 16 lanes in rows of 784, whole vectors are counted.
        """
        for step in sorted({math.gcd(c, divisor) for c in x.terms.values()} - {1}, reverse=True):
            whole = {term: c // step for term, c in x.terms.items() if term and c % step == 0}
            fine = Linear({term: c for term, c in x.terms.items() if term and c % step}) + Linear.of(x.constant % step)
            low, high = fine.bounds(self.known)
            if whole and low is not None and high is not None and low >= 0 and high < step:
                return Linear(whole) + Linear.of(x.constant // step), step, fine
        return None

    def _digit(self, expr: Binary, x: Expr, inner: int, outer: int) -> Linear:
        """`x // inner % outer`, whose quotient is `x // (inner * outer)`, as the digit before has it."""
        digit = self._divide("floormod", self.index(expr.a), Linear.of(outer))
        if inner > 0 and outer > 0 and len(digit.terms) == 1:
            (term,) = digit.terms
            if len(term) == 1 and term[0] in self._remainders:
                number = self._remainders[term[0]][0]
                whole = self._divide("floordiv", self.index(x), Linear.of(inner * outer))
                left = self.index(expr.a) - number  # what of the number was known to be whole
                self._remainders[term[0]] = (number, whole - self._divide("floordiv", left, Linear.of(outer)), outer)
        return digit

    def _divided_by(self, op: str, x: Linear, divisor: int) -> Value:
        """`x // divisor` or `x % divisor`; the same value where it is asked for again."""
        key = (op, divisor, self.lanes, frozenset(x.terms.items()))
        known: Value | None = self._cached(key)
        if known is not None:
            return known
        value, by = self.materialize(x), self.b.index(divisor)
        low = x.bounds(self.known)[0]
        if low is not None and low >= 0:
            result = self.b.op("udiv" if op == "floordiv" else "urem", value, by)
        else:
            result = self._floor_divide(op, value, by)
        self._divided.add(result)
        return self._remember(key, result)

    def _put_together(self, position: Linear) -> Linear:
        """`x // d * d + x % d` as `x`: the dims of a tensor whose loops were fused, in the order of its elements.

        A remainder is what a quotient leaves. That is put in its place, for one or for all of them, where it leaves
        fewer of either: of those that differ between lanes, then of all.
        """

        def divided(form: Linear) -> tuple[int, int]:
            found = [{value.lanes for value in term if value in self._divided} for term in form.terms]
            return sum(max(lanes) > 1 for lanes in found if lanes), sum(bool(lanes) for lanes in found)

        while True:
            changes = []
            for term, c in position.terms.items():
                if len(term) == 1 and term[0] in self._remainders:
                    x, whole, divisor = self._remainders[term[0]]
                    changes.append((x - whole.scaled(divisor) - Linear.atom(term[0])).scaled(c))
            forms = [position, *(position + change for change in changes), sum(changes, position)]
            best = min(forms, key=divided)
            if divided(best) == divided(position):
                return position
            position = best

    def _floor_divide(self, op: str, value: Value, by: Value) -> Value:
        b = self.b
        rest = b.op("srem", value, by)
        negative = b.compare("icmp slt", rest, b.index(0))
        if op == "floormod":
            return b.op("add", rest, b.select(negative, by, b.index(0)))
        return b.op("sub", b.op("sdiv", value, by), b.select(negative, b.index(1), b.index(0)))

    def _extreme(self, op: str, x: Linear, y: Linear) -> Linear:
        low, high = (x - y).bounds(self.known)
        if low is not None and low >= 0:
            return x if op == "max" else y
        if high is not None and high <= 0:
            return y if op == "max" else x
        key = (op, *self._operands(x, y))
        value: Value | None = self._cached(key)
        if value is None:
            p, q = self.materialize(x), self.materialize(y)
            greater = self.b.compare("icmp sgt", p, q)
            value = self._remember(key, self.b.select(greater, p, q) if op == "max" else self.b.select(greater, q, p))
        return self._opaque(value, _extreme_bounds(op, x.bounds(self.known), y.bounds(self.known)))

    def _opaque(self, value: Value, bounds: Interval) -> Linear:
        self.known[value] = bounds
        return Linear.atom(value)

    def materialize(self, linear: Linear) -> Value:
        """The value of a linear form, of the index type."""
        if linear.is_uniform:
            return self._uniform_sum(linear)
        split = linear.split_lane()
        if split is not None:
            base, stride = split
            steps = self._lane_numbers(stride)
            return self.b.op("add", self._uniform_sum(base), steps) if base.terms else steps
        total = self.b.index(linear.constant)
        for term, c in linear.terms.items():
            if term:
                total = self.b.op("add", total, self._term(term, c))
        return total

    def _lane_numbers(self, stride: int) -> Value:
        numbers = ", ".join(f"{self.b.index_type} {lane * stride}" for lane in range(self.lanes))
        return Value(f"<{numbers}>", self.b.index_type, self.lanes)

    def _term(self, term: Product, c: int) -> Value:
        parts = [self._lane_numbers(1) if value == LANE else value for value in term]
        result = parts[0]
        for part in parts[1:]:
            result = self.b.op("mul", result, part)
        return result if c == 1 else self.b.op("mul", result, self.b.index(c))

    def _uniform_sum(self, linear: Linear) -> Value:
        """Values that were defined first are added first, so that what is the same in a loop is computed outside."""
        if linear.value is not None:
            return self.b.index(linear.value)
        rest, constant = linear.split_constant()
        total: Value | None = None
        prefix: tuple[object, ...] = ()
        for term, c in sorted(rest.terms.items(), key=_definition_order):
            prefix = (*prefix, term, c)
            known = self._cached(prefix)
            if known is None:
                product = self._scaled_term(term, c)
                known = product if total is None else self.b.op("add nsw", total, product)
                self._remember(prefix, known)
            total = known
        assert total is not None
        return self.b.op("add nsw", total, self.b.index(constant)) if constant else total

    def _scaled_term(self, term: Product, c: int) -> Value:
        result = term[0]
        for count, value in enumerate(term[1:], 2):
            key = ("mul nsw", term[:count])
            known: Value | None = self._cached(key)
            result = self._remember(key, self.b.op("mul nsw", result, value)) if known is None else known
        return result if c == 1 else self.b.op("mul nsw", result, self.b.index(c))

    def strides(self, buffer: Buffer) -> tuple[Linear, ...]:
        """Elements between neighbours along each dim."""
        known: tuple[Linear, ...] | None = self._cached(buffer)
        if known is not None:
            return known
        steps, step = [], Linear.of(1)
        for dim in reversed(buffer.shape):
            steps.append(step)
            step = self._product(step, self.index(as_expr(dim)))
        return self._remember(buffer, tuple(reversed(steps)))

    def offset(self, buffer: Buffer, indices: Sequence[Expr]) -> Linear:
        """The position of an element, in elements from the start of `buffer`."""
        number = self._in_order(buffer, tuple(indices))
        if number is not None:
            return self._put_together(self.index(number))
        total = Linear()
        for index, stride in zip(indices, self.strides(buffer), strict=True):
            total = total + self._product(self.index(index), stride)
        return self._put_together(total)

    def _in_order(self, buffer: Buffer, indices: tuple[Expr, ...]) -> Expr | None:
        """The number of an element in the order of its buffer, where that needs fewer quotients by free sizes.

        So it is where dims of free sizes are counted by one loop: `x // w * w + x % w` is x.
        """
        quotients = _free_quotients(indices)
        if not quotients:
            return None
        key = (buffer, indices)
        if key not in self._numbers:
            number = Simplifier(self.ranges).simplify(address_of(indices, buffer.shape))
            self._numbers[key] = number if _free_quotients((number,)) < quotients else None
        return self._numbers[key]

    def _address(self, pointer: Pointer, memory: str, position: Linear) -> str:
        """The address of an element.

        It is no `inbounds` one: that of a lane that is off, and the sum without its constant, which neighbours share,
        may be outside of the buffer.
        """
        if pointer.ref not in self.runs:
            return self._sum(pointer.ref, memory, position)
        start, constant = self.runs[pointer.ref], position.split_constant()[1]
        if start is None:  # LLVM steps from here to the next, whatever else is at the same address
            first = self._sum(pointer.ref, memory, position)
            start = self.b.result(f'call ptr asm "", "=r,0"(ptr {first})', "ptr").ref, constant
            self.runs[pointer.ref] = start
        address, before = start
        return self._sum(address, memory, Linear.of(constant - before))

    def _sum(self, ref: str, memory: str, position: Linear) -> str:
        rest, constant = position.split_constant()
        if constant < 0 and self.b.target.arch.name == "armv7l" and ref.startswith("%arg"):
            ref, constant = self._ahead(ref, memory, constant)
        if rest.terms:
            key = (ref, memory, tuple(sorted(rest.terms.items(), key=_definition_order)))
            known = self._cached(key)
            if known is None:
                at = self._uniform_sum(rest)
                known = self.b.result(f"getelementptr {memory}, ptr {ref}, {at.typed}", "ptr")
                self._remember(key, known)
            ref = known.ref
        if constant:
            ref = self.b.result(f"getelementptr {memory}, ptr {ref}, {self.b.index_type} {constant}", "ptr").ref
        return ref

    def _ahead(self, ref: str, memory: str, constant: int) -> tuple[str, int]:
        """The address of a parameter with a negative constant in it, and what of the constant is left.

        Without that LLVM computes each address of a run of vectors by itself, where every load could step to the next:
        it does not see that one negative offset follows another.
        """
        shift, name = self._shifted.get((ref, memory), (0, ref))
        if constant < shift:
            shift = constant
            name = f"%{self.b.fresh('ahead')}"
            self.b.emit_entry(f"{name}.at = getelementptr {memory}, ptr {ref}, {self.b.index_type} {shift}")
            self.b.emit_entry(f'{name} = call ptr asm "", "=r,0"(ptr {name}.at)')
            self._shifted[ref, memory] = shift, name
        return name, constant - shift

    def _alignment(self, pointer: Pointer, position: Linear, size: int) -> int:
        steps = [abs(c) * size for c in position.terms.values()]
        return max(size, math.gcd(pointer.align, *steps))

    def _in_bounds(self, load: Load) -> bool:
        """Whether every lane surely reads inside the buffer, whatever guards the load."""
        for index, dim in zip(load.indices, load.buffer.shape, strict=True):
            if not isinstance(dim, int) or any(True for _ in loads(index)):
                return False
            low, high = self.index(index).bounds(self.known)
            if low is None or high is None or low < 0 or high >= dim:
                return False
        return True

    def value(self, expr: Expr) -> Value:
        """The value of any expression; what an index may need of data."""
        raise NotImplementedError


def _free_quotients(indices: Sequence[Expr]) -> int:
    """How many different quotients and remainders there are by what is not known while compiling."""
    nodes = (node for index in indices for node in walk_expr(index))
    divided = (node for node in nodes if isinstance(node, Binary) and node.op in ("floordiv", "floormod"))
    return len({expr_key(node) for node in divided if not isinstance(node.b, Const)})


def _definition_order(item: tuple[Product, int]) -> tuple[int, ...]:
    """Names end in a number that grows as values are defined; parameters come first."""
    return tuple(_number(value) for value in item[0])


def _number(value: Value) -> int:
    digits = value.ref[len(value.ref.rstrip("0123456789")) :]
    return int(digits) if digits and not value.ref.startswith("%arg") else -1


def _extreme_bounds(op: str, x: Interval, y: Interval) -> Interval:
    lows, highs = (x[0], y[0]), (x[1], y[1])
    if op == "max":
        low = max((v for v in lows if v is not None), default=None)
        return low, None if None in highs else max(v for v in highs if v is not None)
    high = min((v for v in highs if v is not None), default=None)
    return None if None in lows else min(v for v in lows if v is not None), high
