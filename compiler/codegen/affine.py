"""Addresses as sums: an index is an integer combination of run-time values, of the lane number, and a constant.

Keeping it in this form until the moment it is written makes unrolled code address `[base + constant]`, tells how a
vector access strides, and folds quotients of tiled loops that the lane number or a constant decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from kedge.compiler.codegen.builder import Value

#: The number of the lane, 0 … lanes-1, in vector code.
LANE = Value("lane", "lane")
#: A product of values, sorted by name; `()` is the constant term.
Product: TypeAlias = tuple[Value, ...]
#: Inclusive bounds; None is unknown.
Interval: TypeAlias = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Linear:
    """A sum of products of values with integer coefficients, none of them 0."""

    terms: Mapping[Product, int] = field(default_factory=dict)

    @staticmethod
    def of(value: int) -> Linear:
        """A constant."""
        return Linear({(): value}) if value else _ZERO

    @staticmethod
    def atom(value: Value) -> Linear:
        """One value."""
        return Linear({(value,): 1})

    @property
    def constant(self) -> int:
        """The constant term."""
        return self.terms.get((), 0)

    @property
    def value(self) -> int | None:
        """The whole as an int, if nothing else is in it."""
        if not self.terms:
            return 0
        return self.terms[()] if len(self.terms) == 1 and () in self.terms else None

    @property
    def single(self) -> Value | None:
        """The run-time value that the whole is, if it is one."""
        if len(self.terms) != 1:
            return None
        ((product, factor),) = self.terms.items()
        return product[0] if len(product) == factor == 1 else None

    def __add__(self, other: Linear) -> Linear:
        return _collect([*self.terms.items(), *other.terms.items()]) if other.terms else self

    def __sub__(self, other: Linear) -> Linear:
        return self + other.scaled(-1)

    def __mul__(self, other: Linear) -> Linear:
        for one, two in ((self, other), (other, self)):
            if (factor := one.value) is not None:
                return two.scaled(factor)
        return _collect(
            (tuple(sorted(a + b)), x * y) for a, x in self.terms.items() for b, y in other.terms.items()
        )  # fmt: skip

    def scaled(self, factor: int) -> Linear:
        """This times an integer."""
        if factor == 1:
            return self
        return Linear({term: factor * c for term, c in self.terms.items()}) if factor else _ZERO

    def split_constant(self) -> tuple[Linear, int]:
        """The sum without its constant, and the constant."""
        if () not in self.terms:
            return self, 0
        return Linear({term: c for term, c in self.terms.items() if term}), self.terms[()]

    def split_lane(self) -> tuple[Linear, int] | None:
        """`(base, stride)` with `self == base + stride * LANE`; None where the lane enters in another way."""
        stride, base = 0, {}
        for term, c in self.terms.items():
            if term == (LANE,):
                stride = c
            elif LANE in term or any(value.lanes > 1 for value in term):
                return None
            else:
                base[term] = c
        return Linear(base), stride

    def lane_step(self) -> tuple[Linear, Linear] | None:
        """`(base, step)` with `self == base + step * LANE`, both the same in every lane; None where there are none."""
        base: dict[Product, int] = {}
        step: dict[Product, int] = {}
        for term, c in self.terms.items():
            rest = tuple(value for value in term if value != LANE)
            if len(term) - len(rest) > 1 or any(value.lanes > 1 for value in rest):
                return None
            (base if len(rest) == len(term) else step)[rest] = c
        return Linear(base), Linear(step)

    @property
    def is_uniform(self) -> bool:
        """Whether the value is the same in every lane."""
        return all(value != LANE and value.lanes == 1 for term in self.terms for value in term)

    def divide(self, divisor: int) -> tuple[Linear, Linear]:
        """`(q, r)` with `self == q * divisor + r`, every multiple of the (positive) divisor in `q`."""
        quotient = {term: c // divisor for term, c in self.terms.items() if term and c % divisor == 0}
        rest = {term: c for term, c in self.terms.items() if term and c % divisor}
        whole, left = divmod(self.constant, divisor)
        return Linear(quotient) + Linear.of(whole), Linear(rest) + Linear.of(left)

    def reduced(self, divisor: int) -> tuple[Linear, Linear]:
        """`(q, r)` with `self == q * divisor + r`, no coefficient in `r` above the (positive) divisor."""
        quotient = {term: c // divisor for term, c in self.terms.items() if c > divisor}
        rest = {term: c % divisor if c > divisor else c for term, c in self.terms.items()}
        return Linear(quotient), Linear({term: c for term, c in rest.items() if c})

    def bounds(self, known: Mapping[Value, Interval]) -> Interval:
        """Bounds of the sum from bounds of the values in it."""
        low: int | None = 0
        high: int | None = 0
        for term, c in self.terms.items():
            a, b = 1, 1
            unknown_high = False
            for value in term:
                first, last = known.get(value, (None, None))
                if first is None or first < 0:
                    return None, None
                a *= first
                unknown_high |= last is None
                b *= 0 if last is None else last
            top = None if unknown_high else b
            if c >= 0:
                low = None if low is None else low + c * a
                high = None if high is None or top is None else high + c * top
            else:
                low = None if low is None or top is None else low + c * top
                high = None if high is None else high + c * a
        return low, high


_ZERO = Linear()


def _collect(items: Iterable[tuple[Product, int]]) -> Linear:
    terms: dict[Product, int] = {}
    for term, c in items:
        total = terms.get(term, 0) + c
        if total:
            terms[term] = total
        else:
            terms.pop(term, None)
    return Linear(terms)
