"""Simplifying index arithmetic and proving facts about it.

int64 expressions are brought into a normal form: an integer polynomial over *atoms* (variables, and quotients,
remainders, minima … that cannot be taken apart). `c * (x // d)` with `d | c` is kept as `c/d * (x - x % d)`, so that
what `split` and `fuse` take apart cancels again. Facts are proved by interval arithmetic, and where bounds are
symbolic by replacing one variable after the other by the end of its range that is worst for the claim
(Fourier-Motzkin elimination without its case splits). Conditions that are known to hold, those of the branches around,
are tried as lower bounds of the claim. A proof that fails proves nothing: `prove` is one-sided.

int64 is treated as unbounded: index arithmetic of real tensors does not overflow. That of a tensor's own numbers may,
so what depends on which sum is the larger (`x[i] + 1 > x[i]`, `max(x[i] + 1, x[i])`, quotients) is left alone where the
intervals do not say that it fits. Numbers of a tensor that a dim limits, as an index is clamped, count as indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np

from kedge.compiler.dtypes import FLOATS, INTEGERS
from kedge.compiler.tir.expr import (
    COMPARISONS,
    INDEX_DTYPE,
    Binary,
    BinaryOp,
    Call,
    Cast,
    Const,
    Dim,
    Expr,
    Load,
    Select,
    Var,
    as_expr,
    const,
    logical_and,
)
from kedge.compiler.tir.poly import Mono, Poly, divide_term
from kedge.compiler.tir.stmt import Block, For, If, Range, Seq, Stmt, Store
from kedge.compiler.tir.structural import Key, expr_equal, expr_key
from kedge.compiler.tir.visitor import free_vars, map_children, map_stmt_children, map_stmt_exprs, walk_expr

#: What is known of variables: each lies in its range. Variables not named here have their own `lower` and `upper`.
Ranges: TypeAlias = Mapping[Var, Range]
#: An inclusive interval; None is unbounded.
Interval: TypeAlias = tuple[int | None, int | None]

_ANYTHING: Final[Interval] = (None, None)
_LEAST: Final = -(2**63)
_MOST: Final = 2**63 - 1
#: Where any int64 of a tensor lies.
_INT64: Final[Interval] = (_LEAST, _MOST)
#: What an unbounded end, which is that of a dim, counts as beside others: beyond all numbers, but those of tensors.
_FAR: Final = 2**62
_DEPTH: Final = 8
Extreme: TypeAlias = Literal["min", "max"]
_MIRRORED: Final[Mapping[BinaryOp, BinaryOp]] = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def simplify(expr: Expr, ranges: Ranges | None = None) -> Expr:
    """An expression of the same value wherever variables lie in their ranges; the same object if nothing changed."""
    return Simplifier(ranges).simplify(expr)


def prove(condition: Expr, ranges: Ranges | None = None) -> bool:
    """Whether `condition` provably holds for all values of its variables. False means: not proved."""
    return Simplifier(ranges).prove(condition)


def prove_equal(a: Dim, b: Dim, ranges: Ranges | None = None) -> bool:
    """Whether two int64 values are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return Simplifier(ranges).prove_equal(as_expr(a), as_expr(b))


def bounds(expr: Expr, ranges: Ranges | None = None) -> Interval:
    """The inclusive interval in which an int64 expression lies; None where unknown."""
    return Simplifier(ranges).bounds(expr)


def over(extent: Dim) -> Range:
    """The range `[0, extent)`."""
    return Range(const(0), as_expr(extent))


def simplify_dim(dim: Dim, ranges: Ranges | None = None) -> Dim:
    """`dim` simplified, as a plain int where it is known."""
    if isinstance(dim, int):
        return dim
    simple = simplify(dim, ranges)
    return int(simple.value) if isinstance(simple, Const) else simple


def simplify_stmt(stmt: Stmt, ranges: Ranges | None = None) -> Stmt:
    """`stmt` with every expression simplified under the loops and iteration variables around it.

    Branches that are decided go away, and what is inside of the others is simplified under their conditions; a loop or
    a block stays, even if it runs once.
    """
    return _simplify_stmt(stmt, Simplifier(ranges))


def _simplify_stmt(stmt: Stmt, simplifier: Simplifier) -> Stmt:
    match stmt:
        case For(var=var, extent=extent):
            new = map_stmt_exprs(stmt, simplifier.simplify)
            inside = simplifier.within({var: over(extent)})
            return map_stmt_children(new, lambda s: _simplify_stmt(s, inside))
        case Block():
            return _simplify_block(stmt, simplifier)
        case If():
            return _simplify_if(stmt, simplifier)
    new = map_stmt_exprs(stmt, simplifier.simplify) if isinstance(stmt, Store) else stmt
    return map_stmt_children(new, lambda s: _simplify_stmt(s, simplifier))


def _simplify_if(stmt: If, simplifier: Simplifier) -> Stmt:
    known = simplifier.simplify(stmt.condition)
    if isinstance(known, Const):
        chosen = stmt.then if known.value else stmt.orelse
        return Seq(()) if chosen is None else _simplify_stmt(chosen, simplifier)
    then = _simplify_stmt(stmt.then, simplifier.assuming(lasting(known)))
    orelse = stmt.orelse
    if orelse is not None:
        opposite = negated(known)
        orelse = _simplify_stmt(orelse, simplifier.assuming(() if opposite is None else lasting(opposite)))
    unchanged = known is stmt.condition and then is stmt.then and orelse is stmt.orelse
    return stmt if unchanged else If(known, then, orelse)


def lasting(condition: Expr) -> tuple[Expr, ...]:
    """The terms of `condition` that hold all through a branch: what they depend on cannot be stored to there."""
    return tuple(term for term in conjuncts(condition) if not _reads_data(term))


def _about(term: Expr, facts: Iterable[Expr]) -> list[Expr]:
    """Those of `facts` that share a variable with `term`: the others say nothing of it."""
    used = set(free_vars(term))
    return [fact for fact in facts if not used.isdisjoint(free_vars(fact))]


def _reads_data(expr: Expr) -> bool:
    return any(isinstance(node, Load) for node in walk_expr(expr))


def _simplify_block(block: Block, outer: Simplifier) -> Block:
    inner = outer.within({it.var: over(it.extent) for it in block.iters})
    own = {id(e) for e in (*block.bindings, block.predicate, *(it.extent for it in block.iters))}
    new = map_stmt_exprs(block, lambda e: (outer if id(e) in own else inner).simplify(e))
    result = map_stmt_children(new, lambda s: _simplify_stmt(s, inner))
    assert isinstance(result, Block)
    return result


def conjuncts(condition: Expr) -> Iterator[Expr]:
    """The terms of a conjunction, without those that are literally true."""
    if isinstance(condition, Binary) and condition.op == "and":
        yield from conjuncts(condition.a)
        yield from conjuncts(condition.b)
    elif not (isinstance(condition, Const) and condition.value):
        yield condition


@dataclass(frozen=True, slots=True, eq=False)
class _Learned:
    """What a simplifier knows once it has learned its facts, before any question: where those that know more begin."""

    facts: tuple[Expr, ...]
    reached: Set[Var]  # whose ranges may matter to what the facts say
    numbers: Mapping[Key | Var, int]
    atoms: tuple[Expr, ...]
    parts: Mapping[int, tuple[str, Poly, Poly]]
    intervals: Mapping[int, Interval]
    extremes: Mapping[Key, int]
    floors: tuple[Poly, ...]
    limits: Mapping[int, Interval]


class _Memory:
    """What was worked out under the facts that are known: sizes repeat their parts, each of which is proved about.

    There is one more for the time while facts are tried, when proofs are weaker.
    """

    __slots__ = ("polys", "proved", "tried")

    def __init__(self) -> None:
        self.polys: dict[Expr, Poly] = {}
        self.proved: set[frozenset[tuple[Mono, int]]] = set()  # the terms of polynomials that are at least 0
        self.tried: dict[frozenset[tuple[Mono, int]], int] = {}  # how deep others were tried in vain


class Simplifier:
    """Simplifies and proves under fixed ranges of variables.

    Reuse one for many questions: it remembers the normal form of every expression and the outcome of every proof, for
    as long as it lives.

    `facts` are conditions that hold wherever the answers are used; what they say beyond comparisons of int64 is not
    made use of.
    """

    def __init__(self, ranges: Ranges | None = None, facts: Iterable[Expr] = ()) -> None:
        self.ranges: Ranges = ranges or {}
        self.facts: tuple[Expr, ...] = ()
        self._numbers: dict[Key | Var, int] = {}
        self._atoms: list[Expr] = []
        self._parts: dict[int, tuple[str, Poly, Poly]] = {}  # of atoms `x // d` and `x % d`
        self._intervals: dict[int, Interval] = {}
        self._sizes: dict[int, bool] = {}
        self._reading: dict[int, bool] = {}
        self._firsts: dict[int, int] = {}
        self._extremes: dict[Key, int] = {}  # the atom of a minimum or maximum, in whatever order its sides stand
        self._floors: list[Poly] = []  # what the facts say: each is at least 0
        self._limits: dict[int, Interval] = {}  # and of atoms alone
        self._trying_facts = False
        self._memories = (_Memory(), _Memory())
        self._learned: _Learned | None = None
        self._learn_all(facts)

    def within(self, ranges: Ranges) -> Simplifier:
        """One that knows the ranges of more variables."""
        inner = Simplifier({**self.ranges, **ranges})
        if self._learned is not None and self._learned.reached.isdisjoint(ranges):
            inner._take(self._learned)
        else:
            inner._learn_all(self.facts)
        return inner

    def assuming(self, facts: Iterable[Expr]) -> Simplifier:
        """One that knows more facts."""
        more = tuple(facts)
        if not more:
            return self
        inner = Simplifier(self.ranges)
        if self._learned is not None:
            inner._take(self._learned)
        inner._learn_all(more)
        return inner

    def _learn_all(self, facts: Iterable[Expr]) -> None:
        reached = set() if self._learned is None else set(self._learned.reached)
        for fact in (fact for each in facts for fact in conjuncts(each)):
            self._learn(fact)
            # Only now: a choice in the fact assumes its own condition and what else is known, of which it is no part.
            self.facts = (*self.facts, fact)
            self._reach(fact, reached)
            self._learned = _Learned(
                self.facts, set(reached), dict(self._numbers), tuple(self._atoms), dict(self._parts),
                dict(self._intervals), dict(self._extremes), tuple(self._floors), dict(self._limits),
            )  # fmt: skip

    def _take(self, learned: _Learned) -> None:
        """Know what another learned from its facts, without working it out again."""
        self.facts, self._learned = learned.facts, learned
        self._numbers, self._atoms, self._parts = dict(learned.numbers), list(learned.atoms), dict(learned.parts)
        self._intervals, self._extremes = dict(learned.intervals), dict(learned.extremes)
        self._floors, self._limits = list(learned.floors), dict(learned.limits)

    def _reach(self, expr: Expr, found: set[Var]) -> None:
        """Add the variables of `expr` to `found`, and those that their ranges depend on."""
        for var in free_vars(expr):
            if var not in found:
                found.add(var)
                known = self.ranges.get(var)
                for end in () if known is None else (known.start, known.extent):
                    self._reach(end, found)

    def _learn(self, fact: Expr) -> None:
        if not (isinstance(fact, Binary) and fact.op in COMPARISONS):
            return
        difference, one = self._difference(fact), Poly.of(1)
        if difference is None:
            return
        found = {
            "lt": [difference.scaled(-1) - one], "le": [difference.scaled(-1)],
            "gt": [difference - one], "ge": [difference],
            "eq": [difference.scaled(-1), difference], "ne": [],
        }[fact.op]  # fmt: skip
        for floor in map(self._normal, found):
            self._floors.append(floor)
            self._learn_limit(floor)
        self._memories = (_Memory(), _Memory())  # what was worked out may be simpler now

    def _learn_limit(self, floor: Poly) -> None:
        """`c * atom + constant >= 0` limits the atom itself."""
        moving = [(mono, c) for mono, c in floor.terms.items() if mono]
        if len(moving) != 1 or len(moving[0][0]) != 1:
            return
        ((atom,), c) = moving[0]
        limit = (-(floor.constant // c), None) if c > 0 else (None, floor.constant // -c)
        self._limits[atom] = _intersection(self._limits.get(atom, _ANYTHING), limit)
        self._intervals.clear()

    # Public questions -------------------------------------------------------------------------------------------

    def simplify(self, expr: Expr) -> Expr:
        """See the module's `simplify`."""
        if expr.dtype == INDEX_DTYPE:
            new = self.expr_of(self.poly(expr))
            return expr if expr_equal(new, expr) else new
        if isinstance(expr, Binary) and expr.op in COMPARISONS:
            return self._comparison(expr)
        if isinstance(expr, Select):
            return self._chosen(expr)
        if isinstance(expr, Binary) and expr.op == "and":
            return self._conjunction(expr)
        if isinstance(expr, Call) and expr.name == "not":
            return self._negation(expr)
        if isinstance(expr, Binary) and expr.op == "or":
            return self._disjunction(expr)
        expr = map_children(expr, self.simplify)
        return _cast(expr) if isinstance(expr, Cast) else expr

    def _chosen(self, expr: Select) -> Expr:
        """A choice, each side simplified where it is taken."""
        condition = self.simplify(expr.condition)
        if isinstance(condition, Const):
            return self.simplify(expr.a if condition.value else expr.b)
        opposite = negated(condition)
        a, b = expr.a, expr.b
        if not isinstance(a, Const):
            a = self.assuming((condition,)).simplify(a)
        if not isinstance(b, Const):
            b = (self if opposite is None else self.assuming((opposite,))).simplify(b)
        same = condition is expr.condition and a is expr.a and b is expr.b
        return expr if same else Select(condition, a, b)

    def _negation(self, expr: Call) -> Expr:
        inner = self.simplify(expr.args[0])
        if isinstance(inner, Const):
            return const(not inner.value, "bool")
        opposite = negated(inner)
        if opposite is not None:
            return self.simplify(opposite)
        return expr if inner is expr.args[0] else replace(expr, args=(inner,))

    def _disjunction(self, expr: Binary) -> Expr:
        """Two terms, the second simplified where the first does not hold, without one that implies the other."""
        a = self.simplify(expr.a)
        not_a = negated(a)
        b = (self if not_a is None or _reads_data(a) else self.assuming((not_a,))).simplify(expr.b)
        for side, other in ((a, b), (b, a)):
            if isinstance(side, Const):
                return side if side.value else other
            if not _reads_data(side) and self.assuming((side,)).prove(other):
                return other
        if expr_equal(a, b):
            return a
        return expr if a is expr.a and b is expr.b else Binary("or", a, b)

    def _conjunction(self, expr: Binary) -> Expr:
        """The terms, each simplified where those before it hold, without those that the others imply."""
        kept: list[Expr] = []
        for term in conjuncts(expr):
            simple = self.assuming(_about(term, kept)).simplify(term)
            if isinstance(simple, Const):
                if not simple.value:
                    return simple
                continue
            kept.extend(conjuncts(simple))
        for term in tuple(kept):
            others = [each for each in kept if each is not term]
            facts = [fact for fact in _about(term, others) if not _reads_data(fact)]
            if facts and self.assuming(facts).prove(term):
                kept = others
        new = logical_and(*kept)
        return expr if expr_equal(new, expr) else new

    def prove(self, condition: Expr) -> bool:
        """See the module's `prove`."""
        match condition:
            case Const(value=value):
                return bool(value)
            case Binary(op="and", a=a, b=b):
                return self.prove(a) and self.prove(b)
            case Binary(op="or", a=a, b=b):
                return self.prove(a) or self.prove(b)
            case Call(name="not", args=(inner,)):
                opposite = negated(inner)
                return opposite is not None and self.prove(opposite)
            case Binary(op=op) if op in COMPARISONS:
                difference = self._difference(condition)
                return difference is not None and self._prove_comparison(op, difference)
        return False

    def prove_equal(self, a: Expr, b: Expr) -> bool:
        """Whether two int64 expressions are provably equal."""
        return self._prove_comparison("eq", self.poly(a) - self.poly(b))

    def prove_positive(self, difference: Poly, given: Mapping[Var, Expr]) -> bool:
        """Whether a normal form is above 0 provably, where the variables in `given` have those values.

        Only their occurrences in the sum itself are replaced: in what could not be taken apart they stay variables of
        their ranges, which the values must lie in.
        """
        for var, value in given.items():
            difference = difference.replace(self._number(var), self.poly(value))
        return self._nonnegative(self._normal(difference) - Poly.of(1))

    def bounds(self, expr: Expr) -> Interval:
        """See the module's `bounds`."""
        return self._bounds(self.poly(expr))

    def prove_nonnegative(self, poly: Poly) -> bool:
        """Whether a normal form is provably at least 0."""
        return self._nonnegative(poly)

    def span(self, expr: Expr, inner: Sequence[Var]) -> tuple[Poly, Poly] | None:
        """Bounds of an int64 expression over all values of the variables `inner`, in terms of the others.

        `inner` stand from the outermost to the innermost: the range of each may depend on those before it. The bounds
        are reached where `expr` is affine in variables of independent ranges. None where none are known.
        """
        total = self.poly(expr)
        low, high = self._end(total, inner, highest=False), self._end(total, inner, highest=True)
        return None if low is None or high is None else (low, high)

    def _end(self, poly: Poly, inner: Sequence[Var], *, highest: bool) -> Poly | None:
        """A bound of `poly` without the variables `inner`."""
        for var in reversed(inner):
            moving = [atom for atom in poly.atoms() if var in free_vars(self._atoms[atom])]
            for atom in moving:
                parts, ends = poly.coefficient(atom), self._ends(atom)
                if parts is None or ends is None:
                    return None
                factor, rest = parts
                if self._nonnegative(factor):
                    poly = self._normal(rest + factor * ends[highest])
                elif self._nonnegative(factor.scaled(-1)):
                    poly = self._normal(rest + factor * ends[not highest])
                else:
                    return None
        return None if any(var in free_vars(self._atoms[atom]) for atom in poly.atoms() for var in inner) else poly

    def _ends(self, atom: int) -> tuple[Poly, Poly] | None:
        """The range of a variable, in symbols where it is known so, or the interval of any other atom."""
        if isinstance(self._atoms[atom], Var):
            ends = self._symbolic_ends(atom)
            if ends is not None:
                return ends[1:]
        low, high = self._interval(atom)
        return None if low is None or high is None else (Poly.of(low), Poly.of(high))

    # Normal form ------------------------------------------------------------------------------------------------

    def poly(self, expr: Expr) -> Poly:
        """The normal form of an int64 expression.

        Sums, products, minima and maxima may be nested as deep as memory lasts; quotients and remainders that stay
        inside of one another some hundred times end in a `RecursionError`.
        """
        polys = self._memory.polys
        waiting = [expr]  # no recursion is as deep as sums are long, on whichever side their sums stand
        while waiting:
            each = waiting[-1]
            sides = (each.b, each.a) if isinstance(each, Binary) and each not in polys else ()
            missing = [side for side in sides if side not in polys]
            if missing:
                waiting += missing
                continue
            if each not in polys:
                polys[each] = self._worked_out(each)
            waiting.pop()
        return polys[expr]

    @property
    def _memory(self) -> _Memory:
        return self._memories[self._trying_facts]

    def _worked_out(self, expr: Expr) -> Poly:
        match expr:
            case Const(value=value):
                return Poly.of(int(value))
            case Var():
                return self._var(expr)
            case Binary(op=op, a=a, b=b):
                return self._arithmetic(op, a, b, expr)
            case Select():
                return self._select(expr)
            case Cast(value=Const(value=value)) if abs(value) < 2**63:
                return Poly.of(int(value))
            case Cast(value=value) if value.dtype == INDEX_DTYPE:
                return self.poly(value)
        return self._atom(map_children(expr, self.simplify))

    def _arithmetic(self, op: str, a: Expr, b: Expr, expr: Expr) -> Poly:
        x, y = self.poly(a), self.poly(b)
        match op:
            case "add":
                return self._normal(x + y)
            case "sub":
                return self._normal(x - y)
            case "mul":
                return self._normal(x * y)
            case _ if self._may_wrap(x) or self._may_wrap(y) or (op not in ("min", "max") and not self._divides(y)):
                pass
            case "floordiv":
                return self._divide(x, y)
            case "floormod":
                return self._modulo(x, y)
            case "truncdiv" | "truncmod" if self._nonnegative(x) and self._nonnegative(y - Poly.of(1)):
                return self._divide(x, y) if op == "truncdiv" else self._modulo(x, y)
            case "min" | "max":
                small, large = (x, y) if op == "min" else (y, x)
                if self._nonnegative(large - small):
                    return x
                if self._nonnegative(small - large):
                    return y
                return self._extreme(op, x, y)
        return self._atom(Binary(expr.op, self.expr_of(x), self.expr_of(y)) if isinstance(expr, Binary) else expr)

    def _extreme(self, op: Extreme, x: Poly, y: Poly) -> Poly:
        """`min` or `max` without what both sides have in common: `min(4 * i + 4, 4 * j + 4)` as `4 * min(i, j) + 4`."""
        common = Poly({mono: c for mono, c in x.terms.items() if y.terms.get(mono) == c})
        x, y = x - common, y - common
        scale = max(1, math.gcd(*x.terms.values(), *y.terms.values()))
        a, b = (Poly({mono: c // scale for mono, c in side.terms.items()}) for side in (x, y))
        key = (op, frozenset((frozenset(a.terms.items()), frozenset(b.terms.items()))))
        if key not in self._extremes:
            self._extremes[key] = self._number(Binary(op, self.expr_of(a), self.expr_of(b)))
        return Poly.atom(self._extremes[key]).scaled(scale) + common

    def _select(self, expr: Select) -> Poly:
        condition = self.simplify(expr.condition)
        if isinstance(condition, Const):
            return self.poly(expr.a if condition.value else expr.b)
        chosen = self._chosen(expr)
        if not isinstance(chosen, Select):
            return self.poly(chosen)
        a, b = self.poly(chosen.a), self.poly(chosen.b)
        if a == b:
            return a
        return self._atom(Select(condition, self.expr_of(a), self.expr_of(b)))

    def _var(self, var: Var) -> Poly:
        known = self.ranges.get(var)
        if known is not None and isinstance(known.extent, Const) and known.extent.value == 1:
            return self.poly(known.start)
        if known is None and var.lower is not None and var.lower == var.upper:
            return Poly.of(var.lower)
        return self._atom(var)

    def _atom(self, expr: Expr) -> Poly:
        return Poly.atom(self._number(expr))

    def _number(self, expr: Expr) -> int:
        key = expr if isinstance(expr, Var) else expr_key(expr)
        number = self._numbers.get(key)
        if number is None:
            self._numbers[key] = number = len(self._atoms)
            self._atoms.append(expr)
        return number

    def _part(self, op: str, x: Poly, d: Poly) -> Poly:
        """The atom `x // d` or `x % d`."""
        number = self._number(Binary("floordiv" if op == "floordiv" else "floormod", self.expr_of(x), self.expr_of(d)))
        self._parts[number] = (op, x, d)
        return Poly.atom(number)

    def _normal(self, poly: Poly) -> Poly:
        """`poly` with every `c * (x // d)`, `d | c`, as `c/d * (x - x % d)`, and its like for `(x // a) % b`."""
        for mono, c in poly.terms.items():
            for atom in mono:
                if atom not in self._parts or self._is_size(atom):
                    continue
                rest = list(mono)
                rest.remove(atom)
                expanded = self._expanded(atom, tuple(rest), c)
                if expanded is not None:
                    return self._normal(poly - Poly({mono: c}) + expanded)
        return poly

    def _is_size(self, atom: int) -> bool:
        """Whether an atom is made of symbolic dims alone: variables with a least value, and not those of loops.

        Such quotients stay whole: there are no iterations to tell apart, and of a product of two of them (`8 * H * W`)
        either could be expanded, so that equal products would have different normal forms.
        """
        if atom not in self._sizes:
            own = free_vars(self._atoms[atom])
            self._sizes[atom] = all(var not in self.ranges and var.lower is not None for var in own)
        return self._sizes[atom]

    def _expanded(self, atom: int, rest: tuple[int, ...], c: int) -> Poly | None:
        """`c * rest * atom` without that quotient, where `c * rest` is a multiple of its divisor."""
        op, x, d = self._parts[atom]
        if op == "floordiv":
            factor = divide_term(rest, c, d)
            return None if factor is None else factor * (x - self._modulo(x, d))
        inner = self._single_part(x, "floordiv")
        if inner is None:
            return None
        y, a = inner
        factor = divide_term(rest, c, a)
        return None if factor is None else factor * (self._modulo(y, a * d) - self._modulo(y, a))

    def _single_part(self, poly: Poly, op: str) -> tuple[Poly, Poly] | None:
        """`(x, d)` where `poly` is exactly the atom `x op d`."""
        if len(poly.terms) != 1:
            return None
        ((mono, c),) = poly.terms.items()
        if c != 1 or len(mono) != 1:
            return None
        found = self._parts.get(mono[0])
        return None if found is None or found[0] != op else found[1:]

    # Quotients and remainders -----------------------------------------------------------------------------------

    def _divide(self, x: Poly, d: Poly) -> Poly:
        c = d.value
        if c is None:
            return self._divide_symbolic(x, d)
        if c <= 0:
            return self._part("floordiv", x, d)
        if c == 1:
            return x
        q, r = x.divmod_int(c)
        whole = self._same_quotient(r, c)
        if whole is not None:
            return q + Poly.of(whole)
        split = self._low_part(r, c)
        if split is not None:
            g, high, _ = split
            return self._normal(q + self._divide(high, Poly.of(c // g)))
        nested = self._single_part(r - Poly.of(r.constant), "floordiv")
        if nested is not None and self._positive(nested[1]):
            y, a = nested
            return self._normal(q + self._divide(y + a.scaled(r.constant), a.scaled(c)))
        inside = self._single_part(r, "floormod")
        if inside is not None and (m := inside[1].value) is not None and m > 0 and m % c == 0:
            return self._normal(q + self._modulo(self._divide(inside[0], d), Poly.of(m // c)))
        return self._normal(q + self._part("floordiv", r, d))

    def _modulo(self, x: Poly, d: Poly) -> Poly:
        c = d.value
        if c is None:
            return self._modulo_symbolic(x, d)
        if c <= 0:
            return self._part("floormod", x, d)
        r = Poly({mono: f % c for mono, f in x.terms.items() if f % c})
        whole = self._same_quotient(r, c)
        if whole is None:
            r = x.divmod_int(c)[1] if any(f < 0 for mono, f in x.terms.items() if mono) else r
            whole = self._same_quotient(r, c)
        if whole is not None:
            return r - Poly.of(whole * c)
        split = self._low_part(r, c)
        if split is not None:
            g, high, low = split
            return self._normal(self._modulo(high, Poly.of(c // g)).scaled(g) + low)
        for mono, factor in r.terms.items():
            inner = self._single_part(Poly({mono: 1}), "floormod")
            if inner is not None and (m := inner[1].value) is not None and m % c == 0:
                return self._modulo(r - Poly({mono: factor}) + inner[0].scaled(factor), d)
        return self._part("floormod", r, d)

    def _same_quotient(self, r: Poly, c: int) -> int | None:
        """`r // c`, where it is the same for all values."""
        low, high = self._bounds(r)
        if low is not None and high is not None and low // c == high // c:
            return low // c
        return None

    def _low_part(self, r: Poly, c: int) -> tuple[int, Poly, Poly] | None:
        """`(g, high, low)` with `r == g * high + low`, `g` dividing `c` and `low` in `[0, g)`."""
        factors = {math.gcd(f, c) for mono, f in r.terms.items() if mono}
        for g in sorted(factors - {1}, reverse=True):
            high, low = r.divmod_int(g)
            if self._same_quotient(low, g) == 0:
                return g, high, low
        return None

    def _divide_symbolic(self, x: Poly, d: Poly) -> Poly:
        q, r = x.divmod(d) if d.terms else (Poly(), x)
        if self._within(r, d):
            return self._normal(q)
        if not self._positive(d):
            return self._normal(q + self._part("floordiv", r, d))
        split = self._symbolic_low_part(r, d)
        if split is not None:
            factor, high, _ = split
            return self._normal(q + self._divide(high, d.divmod(factor)[0]))
        nested = self._single_part(r, "floordiv")
        if nested is not None and self._positive(nested[1]):
            return self._normal(q + self._divide(nested[0], nested[1] * d))
        inside = self._inside_multiple(r, d)
        if inside is not None:
            y, times = inside
            return self._normal(q + self._modulo(self._divide(y, d), times))
        return self._normal(q + self._part("floordiv", r, d))

    def _modulo_symbolic(self, x: Poly, d: Poly) -> Poly:
        r = x.divmod(d)[1] if d.terms else x
        if self._within(r, d):
            return self._normal(r)
        if not self._positive(d):
            return self._part("floormod", r, d)
        split = self._symbolic_low_part(r, d)
        if split is not None:
            factor, high, low = split
            return self._normal(self._modulo(high, d.divmod(factor)[0]) * factor + low)
        inside = self._inside_multiple(r, d)
        return self._part("floormod", r, d) if inside is None else self._modulo(inside[0], d)

    def _positive(self, poly: Poly) -> bool:
        return self._nonnegative(poly - Poly.of(1))

    def _within(self, r: Poly, d: Poly) -> bool:
        return self._nonnegative(r) and self._nonnegative(d - r - Poly.of(1))

    def _inside_multiple(self, r: Poly, d: Poly) -> tuple[Poly, Poly] | None:
        """`(y, times)` where `r` is `y % (times * d)`, of a positive divisor."""
        inside = self._single_part(r, "floormod")
        if inside is None:
            return None
        times, left = inside[1].divmod(d)
        return None if left.terms or not self._positive(times) else (inside[0], times)

    def _symbolic_low_part(self, r: Poly, d: Poly) -> tuple[Poly, Poly, Poly] | None:
        """`(factor, high, low)` with `r == factor * high + low`, a factor of `d`, and `low` in `[0, factor)`."""
        number = math.gcd(*d.terms.values())
        if number > 1:
            high, low = r.divmod_int(number)
            if high.terms and self._same_quotient(low, number) == 0:
                return Poly.of(number), high, low
        shared = set.intersection(*(set(mono) for mono in d.terms))
        for atom in sorted(shared) if d.terms != {tuple(shared): 1} else ():
            factor = Poly.atom(atom)
            high, low = r.divmod(factor)
            if high.terms and self._positive(factor) and self._within(low, factor):
                return factor, high, low
        return None

    # Intervals and proofs ---------------------------------------------------------------------------------------

    def _bounds(self, poly: Poly) -> Interval:
        """Where a polynomial lies, in machine arithmetic if it is one of data."""
        total = self._total(poly)
        return _INT64 if self._wraps(poly, total) else total

    def _difference(self, comparison: Binary) -> Poly | None:
        """What a comparison of int64 compares with 0; None where a side is a sum of data that may wrap around."""
        if comparison.a.dtype != INDEX_DTYPE:
            return None
        a, b = self.poly(comparison.a), self.poly(comparison.b)
        return None if self._may_wrap(a) or self._may_wrap(b) else a - b

    def _divides(self, divisor: Poly) -> bool:
        """Whether it is a divisor of indices: numbers above 0 and dims, not the numbers of a tensor, which may be 0."""
        value = divisor.value
        if value is not None:
            return value > 0
        return all(free_vars(self._atoms[atom]) and not self._reads(atom) for atom in divisor.atoms())

    def _may_wrap(self, poly: Poly) -> bool:
        """Whether the numbers of a tensor may make a sum or product leave int64."""
        return self._wraps(poly, self._total(poly))

    def _wraps(self, poly: Poly, total: Interval) -> bool:
        """Whether one that lies in `total` if nothing wraps around is arithmetic on data, and may leave int64."""
        low, high = total
        if low is not None and high is not None and low >= _LEAST and high <= _MOST:
            return False
        alone = len(poly.terms) == 1 and any(len(mono) == 1 and c == 1 for mono, c in poly.terms.items())
        return not alone and any(map(self._is_data, poly.atoms()))

    def _is_data(self, atom: int) -> bool:
        """Whether an atom is made of the numbers of a tensor, and these are not limited by dims."""
        low, high = self._interval(atom) if self._reads(atom) else _ANYTHING
        return low == _LEAST or high == _MOST or None not in (low, high)

    def _reads(self, atom: int) -> bool:
        """Whether an atom has a number of a tensor in it, as what it counts or what it depends on."""
        if atom not in self._reading:
            self._reading[atom] = _reads_data(self._atoms[atom])
        return self._reading[atom]

    def _total(self, poly: Poly) -> Interval:
        """Where a polynomial lies if nothing wraps around."""
        low: int | None = 0
        high: int | None = 0
        for mono, c in poly.terms.items():
            interval: Interval = self._interval(mono[0]) if mono else (1, 1)
            for atom in mono[1:]:
                interval = _times(interval, self._interval(atom))
            a, b = _scaled(interval, c)
            low = None if low is None or a is None else low + a
            high = None if high is None or b is None else high + b
        return low, high

    def _interval(self, atom: int) -> Interval:
        if atom not in self._intervals:
            self._intervals[atom] = _ANYTHING  # while it is being worked out
            known = self._atom_interval(atom)
            if known == _ANYTHING and self._reads(atom):
                known = _INT64
            self._intervals[atom] = _intersection(known, self._limits.get(atom, _ANYTHING))
        return self._intervals[atom]

    def _atom_interval(self, atom: int) -> Interval:
        if atom in self._parts:
            return self._part_interval(*self._parts[atom])
        match self._atoms[atom]:
            case Var() as var:
                known = self.ranges.get(var)
                if known is None:
                    return var.lower, var.upper
                low, high = self.bounds(known.start)[0], self.bounds(known.start + known.extent)[1]
                return low, None if high is None else high - 1
            case Binary(op=("min" | "max") as op, a=a, b=b):
                return _extreme(op, self.bounds(a), self.bounds(b))
            case Select(a=a, b=b):
                x, y = self.bounds(a), self.bounds(b)
                return _extreme("min", x, y)[0], _extreme("max", x, y)[1]
            case Cast(value=value):
                return _dtype_interval(value.dtype)
        return _ANYTHING

    def _part_interval(self, op: str, x: Poly, d: Poly) -> Interval:
        (low, high), (d_low, d_high) = self._bounds(x), self._bounds(d)
        if d_low is None or d_low <= 0:
            return _ANYTHING
        positive = low is not None and low >= 0
        if op == "floormod":
            ends = (None if d_high is None else d_high - 1, high if positive else None)
            known = [end for end in ends if end is not None]
            return 0, min(known) if known else None
        if d_low == d_high:
            return None if low is None else low // d_low, None if high is None else high // d_low
        return (0, None if high is None else high // d_low) if positive else _ANYTHING

    def _prove_comparison(self, op: str, difference: Poly) -> bool:
        one = Poly.of(1)
        match op:
            case "eq":
                return not difference.terms or self._bounds(difference) == (0, 0)
            case "ne":
                return self._nonnegative(difference - one) or self._nonnegative(difference.scaled(-1) - one)
            case "lt":
                return self._nonnegative(difference.scaled(-1) - one)
            case "le":
                return self._nonnegative(difference.scaled(-1))
            case "gt":
                return self._nonnegative(difference - one)
        return self._nonnegative(difference)

    def _nonnegative(self, poly: Poly) -> bool:
        """Whether `poly >= 0` provably holds."""
        if self._at_least_zero(poly, _DEPTH):
            return True
        if self._trying_facts:
            return False  # what a fact is tried for may need proofs itself, and those need not try facts again
        self._trying_facts = True
        try:
            return any(self._follows(poly, floor) for floor in self._floors)
        finally:
            self._trying_facts = False

    def _follows(self, poly: Poly, floor: Poly) -> bool:
        """Whether `poly >= 0` follows from `floor >= 0`: they share a term that cancels, and the rest is enough."""
        shared = any(c * floor.terms.get(mono, 0) > 0 for mono, c in poly.terms.items() if mono)
        return shared and self._at_least_zero(self._normal(poly - floor), _DEPTH)

    def _at_least_zero(self, poly: Poly, depth: int) -> bool:
        memory, key = self._memory, frozenset(poly.terms.items())
        if key not in memory.proved and memory.tried.get(key, -1) < depth:
            if self._ends_above(poly, depth):
                memory.proved.add(key)
            else:
                memory.tried[key] = depth
        return key in memory.proved

    def _ends_above(self, poly: Poly, depth: int) -> bool:
        """Whether `poly` is at least 0 at the worst ends of all ranges, of which `depth` are tried."""
        low, high = self._bounds(poly)
        if low is not None and low >= 0:
            return True
        if depth == 0 or (high is not None and high < 0):
            return False
        for atom in reversed(poly.atoms()):
            worst = self._worst(poly, atom)
            if worst is not None:
                cases, enough = worst
                return enough(self._at_least_zero(self._normal(case), depth - 1) for case in cases)
        return False

    def _worst(self, poly: Poly, atom: int) -> tuple[tuple[Poly, ...], Callable[[Iterable[bool]], bool]] | None:
        """Polynomials without `atom`, of which all (or any, as the second says) must be >= 0 for `poly` to be."""
        expr = self._atoms[atom]
        parts = poly.coefficient(atom)
        if parts is None:
            return None
        factor, rest = parts
        low, high = self._bounds(factor)
        rising, falling = low is not None and low >= 0, high is not None and high <= 0
        if isinstance(expr, (Binary, Select)) and not (isinstance(expr, Binary) and expr.op not in ("min", "max")):
            exact = [side for side in (self.poly(expr.a), self.poly(expr.b)) if not self._may_wrap(side)]
            sides = tuple(poly.replace(atom, side) for side in exact)
            # A maximum is at least each of its sides: one that suffices is enough where it counts positively.
            if isinstance(expr, Binary) and (rising if expr.op == "max" else falling):
                return sides, any
            return (sides, all) if len(sides) == 2 else None
        ends = self._symbolic_ends(atom)
        if ends is None or not (rising or falling):
            return None
        scale, first, last = ends
        # For integers and d > 0: p >= 0 exactly if d * (p + 1) - 1 >= 0, which leaves room for rounding.
        rest = scale * (rest + Poly.of(1)) - Poly.of(1)
        return (rest + factor * (first if rising else last),), all

    def _symbolic_ends(self, atom: int) -> tuple[Poly, Poly, Poly] | None:
        """`(s, a, b)` with `a <= s * atom <= b` and `s > 0`, for an atom of which a range is known."""
        if atom in self._parts:
            op, x, d = self._parts[atom]
            low = self._bounds(d)[0]
            if low is None or low <= 0:
                return None
            last = d - Poly.of(1)
            return (Poly.of(1), Poly(), last) if op == "floormod" else (d, x - last, x)
        var = self._atoms[atom]
        known = self.ranges.get(var) if isinstance(var, Var) else None
        if known is None:
            return None
        start = self.poly(known.start)
        return Poly.of(1), start, start + self.poly(known.extent) - Poly.of(1)

    # Back to expressions ----------------------------------------------------------------------------------------

    def _comparison(self, expr: Binary) -> Expr:
        difference = self._difference(expr)
        if difference is None:
            return map_children(expr, self.simplify)
        opposite = negated(expr)
        if self._prove_comparison(expr.op, difference):
            return const(True, "bool")
        if isinstance(opposite, Binary) and self._prove_comparison(opposite.op, difference):
            return const(False, "bool")
        op, difference = _reduced(expr.op, self._folded(difference))
        if isinstance(op, bool):
            return const(op, "bool")
        left = Poly({mono: c for mono, c in difference.terms.items() if c > 0})
        right = Poly({mono: -c for mono, c in difference.terms.items() if c < 0})
        if self._may_wrap(left) or self._may_wrap(right):
            return map_children(expr, self.simplify)
        new = Binary(op, self.expr_of(left), self.expr_of(right))
        if isinstance(new.a, Const):  # `i < 5`, not `5 > i`
            new = Binary(_MIRRORED.get(op, op), new.b, new.a)
        return expr if expr_equal(new, expr) else new

    def expr_of(self, poly: Poly) -> Expr:
        """An expression of `poly`: positive terms first, then negative ones, the constant last.

        Where all others are negative the constant stands first: `63 - i`.
        """
        poly = self._folded(poly)
        result: Expr | None = None
        rising = any(c > 0 for mono, c in poly.terms.items() if mono)
        for mono, c in sorted(
            poly.terms.items(), key=lambda item: ((item[0] == ()) == rising, item[1] < 0, self._order(item[0]))
        ):
            if result is None and c == -1 and mono:
                result = const(0)
            term = self._term(mono, abs(c) if result is not None else c)
            result = term if result is None else Binary("add" if c > 0 else "sub", result, term)
        return const(0) if result is None else result

    def _order(self, mono: Mono) -> tuple[tuple[int, int], ...]:
        """Products stand in the order in which the first of their variables appeared."""
        return tuple((self._first_variable(atom), atom) for atom in mono)

    def _first_variable(self, atom: int) -> int:
        if atom not in self._firsts:
            numbers = (self._numbers.get(var, atom) for var in free_vars(self._atoms[atom]))
            self._firsts[atom] = min(numbers, default=atom)
        return self._firsts[atom]

    def _term(self, mono: tuple[int, ...], c: int) -> Expr:
        if not mono:
            return const(c)
        result = self._atoms[mono[0]]
        for atom in mono[1:]:
            result = Binary("mul", result, self._atoms[atom])
        return result if c == 1 else Binary("mul", result, const(c))

    def _folded(self, poly: Poly) -> Poly:
        """`poly` in the fewest terms.

        `c * (x - x % d)` is `c * d * (x // d)`, `x % ab - x % a` is `a * ((x // a) % b)`, and what is added to a
        minimum may cancel inside: `min(i + 4, n) - i` is `min(4, n - i)`.
        """
        for mono, c in poly.terms.items():
            for candidate in self._folds(poly, mono, c) if mono else ():
                if len(candidate.terms) < len(poly.terms):
                    return self._folded(candidate)
        return poly

    def _folds(self, poly: Poly, mono: Mono, c: int) -> Iterator[Poly]:
        inner = self._single_part(Poly({mono: 1}), "floormod")
        if inner is not None:
            x, d = inner
            yield poly + Poly({mono: -c}) + self._part("floordiv", x, d) * d.scaled(-c) - x.scaled(-c)
            yield from self._nested_folds(poly, mono, c, x, d)
        extreme = self._atoms[mono[0]] if len(mono) == 1 and c == 1 else None
        if isinstance(extreme, Binary) and extreme.op in ("min", "max"):
            rest = Poly({other: factor for other, factor in poly.terms.items() if other not in (mono, ())})
            x, y = self.poly(extreme.a), self.poly(extreme.b)
            fewer = len((x + rest).terms) + len((y + rest).terms) <= len(x.terms) + len(y.terms)
            if rest.terms and fewer and not any(map(self._may_wrap, (x, y, x + rest, y + rest))):
                yield self._extreme(extreme.op, x + rest, y + rest) + Poly.of(poly.constant)

    def _nested_folds(self, poly: Poly, mono: tuple[int, ...], c: int, x: Poly, d: Poly) -> list[Poly]:
        a = d.value
        if a is None or a <= 0:
            return []
        found = []
        for other, factor in poly.terms.items():
            outer = self._single_part(Poly({other: 1}), "floormod") if other and factor == -c else None
            if outer is None or (m := outer[1].value) is None or m % a or m == a or outer[0] != x:
                continue
            digit = self._part("floormod", self._part("floordiv", x, d), Poly.of(m // a))
            found.append(poly - Poly({mono: c, other: factor}) + digit.scaled(-c * a))
        return found


def _reduced(op: BinaryOp, difference: Poly) -> tuple[BinaryOp | bool, Poly]:
    """`difference op 0` without a common factor of its terms: `4 * i < 10` as `i < 3`; a bool where that decides."""
    scale = math.gcd(*(c for mono, c in difference.terms.items() if mono))
    if scale <= 1:
        return op, difference
    rest = Poly({mono: c // scale for mono, c in difference.terms.items() if mono})
    constant = difference.constant
    match op:
        case "lt" | "ge":  # rest < -constant / scale, rounded up
            return op, rest + Poly.of(constant // scale)
        case "le" | "gt":
            return op, rest - Poly.of(-constant // scale)
    if constant % scale:
        return op == "ne", difference
    return op, rest + Poly.of(constant // scale)


def _scaled(x: Interval, factor: int) -> Interval:
    """The interval times a number that is not 0."""
    low, high = x if factor > 0 else (x[1], x[0])
    return None if low is None else low * factor, None if high is None else high * factor


def _times(x: Interval, y: Interval) -> Interval:
    """The interval of products; unbounded ends count as infinite."""
    if x == (0, 0) or y == (0, 0):
        return 0, 0
    xs = (-math.inf if x[0] is None else x[0], math.inf if x[1] is None else x[1])
    ys = (-math.inf if y[0] is None else y[0], math.inf if y[1] is None else y[1])
    # 0 times an infinite end is 0: the end is a limit, never a value.
    products = [0 if a == 0 or b == 0 else a * b for a in xs for b in ys]
    low, high = min(products), max(products)
    return None if low == -math.inf else int(low), None if high == math.inf else int(high)


def _intersection(x: Interval, y: Interval) -> Interval:
    low = max((end for end in (x[0], y[0]) if end is not None), default=None)
    return low, min((end for end in (x[1], y[1]) if end is not None), default=None)


def _extreme(op: str, x: Interval, y: Interval) -> Interval:
    pick = min if op == "min" else max

    def end(a: int | None, b: int | None, unbounded: int) -> int | None:
        found = pick(unbounded if a is None else a, unbounded if b is None else b)
        return None if found == unbounded else found

    return end(x[0], y[0], -_FAR), end(x[1], y[1], _FAR)


def _dtype_interval(dtype: str) -> Interval:
    if dtype == "bool":
        return 0, 1
    if dtype in (INDEX_DTYPE, "uint64") or dtype not in INTEGERS:
        return _INT64
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _cast(expr: Cast) -> Expr:
    if expr.value.dtype == expr.dtype:
        return expr.value
    if isinstance(expr.value, Const) and expr.value.dtype in (INDEX_DTYPE, "bool") and expr.dtype in FLOATS:
        return const(expr.value.value, expr.dtype)
    return expr


def negated(condition: Expr) -> Expr | None:
    """The opposite of a comparison of integers (floats have NaN), or None."""
    other = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}
    match condition:
        case Binary(op=op, a=a, b=b) if op in other and a.dtype == INDEX_DTYPE:
            return Binary(other[op], a, b)  # type: ignore[arg-type]
        case Call(name="not", args=(inner,)):
            return inner
    return None
