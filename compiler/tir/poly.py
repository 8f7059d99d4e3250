"""Integer polynomials over numbered atoms: the normal form in which the simplifier compares index expressions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

#: A product of atoms, by their numbers in ascending order; `()` is the constant term.
Mono: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Poly:
    """A sum of integer multiples of products of atoms. No coefficient is 0."""

    terms: Mapping[Mono, int] = field(default_factory=dict)

    @staticmethod
    def of(value: int) -> Poly:
        """The constant `value`."""
        return Poly({(): value}) if value else Poly()

    @staticmethod
    def atom(number: int) -> Poly:
        """One atom."""
        return Poly({(number,): 1})

    @property
    def constant(self) -> int:
        """The constant term."""
        return self.terms.get((), 0)

    @property
    def value(self) -> int | None:
        """The value, if the polynomial is a constant."""
        if len(self.terms) > 1:
            return None
        return self.constant if () in self.terms or not self.terms else None

    def __add__(self, other: Poly) -> Poly:
        if not other.terms or not self.terms:
            return self if self.terms else other
        return Poly(_added(self.terms, other.terms, 1))

    def __sub__(self, other: Poly) -> Poly:
        return Poly(_added(self.terms, other.terms, -1)) if other.terms else self

    def __mul__(self, other: Poly) -> Poly:
        number = other.value
        if number is not None:
            return self.scaled(number)
        terms: dict[Mono, int] = {}
        for a, x in self.terms.items():
            for b, y in other.terms.items():
                mono = tuple(sorted(a + b)) if a and b else a or b
                terms[mono] = terms.get(mono, 0) + x * y
        return Poly({mono: c for mono, c in terms.items() if c})

    def scaled(self, factor: int) -> Poly:
        """This times an integer."""
        if factor == 1:
            return self
        return Poly({mono: factor * c for mono, c in self.terms.items()}) if factor else Poly()

    def atoms(self) -> tuple[int, ...]:
        """The atoms that occur, in ascending order."""
        return tuple(sorted({atom for mono in self.terms for atom in mono}))

    def coefficient(self, atom: int) -> tuple[Poly, Poly] | None:
        """`(a, b)` with `self == a * atom + b`, or None where the atom occurs in a power."""
        a: dict[Mono, int] = {}
        b: dict[Mono, int] = {}
        for mono, c in self.terms.items():
            if mono.count(atom) > 1:
                return None
            if atom in mono:
                a[_without(mono, (atom,)) or ()] = c
            else:
                b[mono] = c
        return Poly(a), Poly(b)

    def divmod_int(self, divisor: int) -> tuple[Poly, Poly]:
        """`(q, r)` with `self == q * divisor + r`: terms that `divisor` divides go to `q`; 0 <= r's constant."""
        quotient = {mono: c // divisor for mono, c in self.terms.items() if mono and c % divisor == 0}
        rest = {mono: c for mono, c in self.terms.items() if mono and c % divisor}
        q, r = divmod(self.constant, divisor)
        return Poly(quotient) + Poly.of(q), Poly(rest) + Poly.of(r)

    def divmod(self, divisor: Poly) -> tuple[Poly, Poly]:
        """`(q, r)` with `self == q * divisor + r`, by long division on the divisor's leading term."""
        lead = max(divisor.terms, key=lambda mono: (len(mono), mono))
        scale = divisor.terms[lead]
        quotient, rest, stuck = Poly(), self, Poly()
        while rest.terms:
            mono = max(rest.terms, key=lambda m: (len(m), m))
            c = rest.terms[mono]
            left = _without(mono, lead)
            if left is None or c % scale:
                term = Poly({mono: c})
                stuck, rest = stuck + term, rest - term
                continue
            step = Poly({left: c // scale})
            quotient, rest = quotient + step, rest - step * divisor
        return quotient, stuck

    def replace(self, atom: int, value: Poly) -> Poly:
        """This with an atom replaced by a polynomial."""
        result = Poly()
        for mono, c in self.terms.items():
            term = Poly({tuple(a for a in mono if a != atom): c})
            for _ in range(mono.count(atom)):
                term = term * value
            result = result + term
        return result


def _added(terms: Mapping[Mono, int], more: Mapping[Mono, int], factor: int) -> dict[Mono, int]:
    """The sum of `terms` and `factor` times `more`."""
    result = dict(terms)
    for mono, c in more.items():
        total = result.get(mono, 0) + factor * c
        if total:
            result[mono] = total
        else:
            del result[mono]
    return result


def _without(mono: Mono, part: Mono) -> Mono | None:
    """`mono / part`, or None where it does not divide."""
    rest = list(mono)
    for atom in part:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def divide_term(mono: Mono, coefficient: int, divisor: Poly) -> Poly | None:
    """`coefficient * mono / divisor` for a divisor of one term, or None where that is no polynomial."""
    if len(divisor.terms) != 1:
        return None
    ((part, scale),) = divisor.terms.items()
    left = _without(mono, part)
    return None if left is None or coefficient % scale else Poly({left: coefficient // scale})
