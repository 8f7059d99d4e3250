"""Tiles in versions: the same loops without conditions where these provably hold, and with them elsewhere.

    for i in (n + 15) // 16:                          for i in (n + 15) // 16:
      for j in vectorized(16):                          if n > i * 16 + 15:
        if i * 16 + j < n:                   ->           for j in vectorized(16):
          y[i * 16 + j] = x[i * 16 + j]                     y[i * 16 + j] = x[i * 16 + j]
                                                        else: … as before

One comparison per tile stands for one per element. What must hold for a tile is the condition in its worst case over
the lanes, unrolled loops and short loops of the tile.

Where a tile chooses between values, as at the border of an image, each step of its loops that takes one side has a
version, too: of the taps of a window most lie inside. The taps that add only zeros there are skipped (padding.py).

A tile at the end, where it holds for a part, is a smaller tile wherever its size is known while compiling: of 49 rows
in tiles of 8 the last has 1, and its condition is `r < 1`, which unrolled code decides. Where the number of rows is
free, so is the size of the last tile: a tile that does much work gets a version for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from kedge.compiler.codegen.padding import skip_iterations, skip_padding
from kedge.compiler.tir.expr import Binary, Const, Expr, Select, Var, const, eq, logical_and
from kedge.compiler.tir.simplify import Simplifier, conjuncts, negated, over, simplify
from kedge.compiler.tir.stmt import For, If, Range, Seq, Stmt, Store
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import (
    children,
    free_vars,
    loads,
    map_children,
    map_stmt_children,
    map_stmt_exprs,
    stmt_children,
    substitute_expr,
)

#: A serial loop is looked through for the worst case of a condition only if it is this short, and holds no more stores
#: than this beside register tiles: what comes in versions then is all that it holds.
_SHORT, _SHORT_STORES = 16, 8
#: A tile of more stores than this, unrolled loops counted out, is not copied for the sake of a choice.
_MOST_STORES = 256
#: Versions of a tile, for all that its conditions may leave of it: eight heights, each with whole rows and with the end
#: of one.
_MOST_VERSIONS = 16
#: Sizes of the last tile where its rows are free.
_MOST_SIZES = 8
_TRUE, _FALSE = const(True, "bool"), const(False, "bool")


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    """A condition of some statement below: where `sure` holds, every instance of `conjunct` does."""

    conjunct: Expr
    sure: Expr
    depth: int  # of the innermost loop that `sure` depends on; 0: none
    eliminated: tuple[Var, ...]  # what `sure` stands for all values of
    part: _Part | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What a condition leaves of a tile: of its values of `step`, which begin at 0, those below `count`."""

    step: Expr
    count: Expr  # the same all over the tile
    sizes: tuple[int, ...]  # what `count` may be where it cuts the tile
    always: bool  # whether it is one of these then
    pays: bool  # whether a version for each is worth its code


# Predicates -----------------------------------------------------------------------------------------------------


def version_tiles(stmt: Stmt) -> Stmt:
    """`stmt` with each tile once without its predicates, where they provably hold, and once with them."""
    return _versioned(stmt, ())


def _versioned(stmt: Stmt, path: tuple[For, ...]) -> Stmt:
    depth = max((claim.depth for claim in _claims(stmt, path)), default=-1)
    return stmt if depth < len(path) else _version(stmt, depth, len(path), path)


def _version(stmt: Stmt, depth: int, level: int, path: tuple[For, ...]) -> Stmt:
    """Put the choice between versions right under the loop at `depth`, in every nest that has one."""
    if level < depth:
        if isinstance(stmt, For):
            body = _version(stmt.body, depth, level + 1, (*path, stmt))
            return stmt if body is stmt.body else replace(stmt, body=body)
        return map_stmt_children(stmt, lambda child: _version(child, depth, level, path))
    groups: dict[tuple[Key, Key | None, tuple[int, ...]], list[_Claim]] = {}
    for claim in _claims(stmt, path):
        # What never holds for a whole tile stays in all versions, if nothing is known of its parts.
        possible = not _is_false(claim.sure) or (claim.part is not None and claim.depth > 0)
        if claim.depth <= depth and possible:
            # Several that no whole tile fulfils, say, are not alike for that: they leave different parts of it.
            count, sizes = (None, ()) if claim.part is None else (expr_key(claim.part.count), claim.part.sizes)
            groups.setdefault((expr_key(claim.sure), count, sizes), []).append(claim)
    if not groups:
        return stmt
    alike = [_Alike(group, group[0].sure) for group in groups.values()]
    cut = _affordable([group for group in alike if group.parts])
    rest = [group for group in alike if group not in cut]
    if rest:  # all of them hold, or nothing is known
        claims = [replace(claim, part=None) for group in rest for claim in group.claims]
        cut.append(_Alike(claims, logical_and(*(group.sure for group in rest))))
    return _in_parts(stmt, cut, {}, path)


class _Alike:
    """Claims that hold together."""

    def __init__(self, claims: Sequence[_Claim], sure: Expr) -> None:
        self.claims = tuple(claims)
        self.sure = sure
        parts = [claim.part for claim in claims]
        #: What they leave of the tile, where that is worth versions of its own.
        self.parts = tuple(part for part in parts if part is not None)
        if len(self.parts) < len(parts) or not any(part.pays for part in self.parts):
            self.parts = ()

    @property
    def versions(self) -> int:
        """In how many versions a tile comes because of these."""
        return 1 + len(self.parts[0].sizes)


def _affordable(groups: Sequence[_Alike]) -> list[_Alike]:
    """Those that come in versions for each part: the ones that leave the most parts, as far as code may grow by them.

    Without, a tile at the end asks for each of its rows in every step of a sum, which is an order of magnitude slower.
    """
    versions, found = 1, set()
    for number, group in sorted(enumerate(groups), key=lambda each: -each[1].versions):
        if versions * group.versions <= _MOST_VERSIONS:
            versions *= group.versions
            found.add(number)
    return [group for number, group in enumerate(groups) if number in found]


def _in_parts(
    stmt: Stmt, groups: Sequence[_Alike], known: Mapping[int, Expr], path: tuple[For, ...], *, smaller: bool = False
) -> Stmt:
    """`stmt` as whole tiles and as each of the smaller ones, with conjuncts (by identity) replaced by what is `known`.

    What stands in a smaller one, as tiles of blocks do, comes in versions of its own.
    """
    if not groups:
        replaced = _replaced(stmt, known)
        return _versioned(replaced, path) if smaller else replaced
    group, rest = groups[0], groups[1:]
    all_true = {**known, **{id(claim.conjunct): _TRUE for claim in group.claims}}
    whole = _in_parts(stmt, rest, all_true, path, smaller=smaller)
    if not group.parts:
        return If(group.sure, whole, _in_parts(stmt, rest, known, path, smaller=smaller))
    part = group.parts[0]
    cut: list[tuple[Expr, Stmt]] = []
    for size in part.sizes:
        limits = {id(c.conjunct): p.step < size for c, p in zip(group.claims, group.parts, strict=True)}
        cut.append((eq(part.count, size), _in_parts(stmt, rest, {**known, **limits}, path, smaller=True)))
    if part.always and not cut:
        return whole
    if part.always:
        other = cut.pop()[1]
    else:
        nothing = {**known, **{id(claim.conjunct): _FALSE for claim in group.claims}}
        other = _in_parts(stmt, rest, nothing, path, smaller=smaller)
    for condition, version in reversed(cut):
        other = If(condition, version, other)
    return If(group.sure, whole, other)


def _claims(stmt: Stmt, path: tuple[For, ...], tile: int | None = None) -> Iterator[_Claim]:
    """The conjuncts of every `If` below whose worst case depends on fewer loops than they do.

    `tile`: how many of the loops in `path` are around the tile, if not all of them.
    """
    tile = len(path) if tile is None else tile
    if isinstance(stmt, For):
        yield from _claims(stmt.body, (*path, stmt), tile)
        return
    if isinstance(stmt, If) and stmt.orelse is None:
        for conjunct in conjuncts(stmt.condition):
            claim = _claim(conjunct, path)
            if claim is not None:
                yield replace(claim, part=_part(claim, path, tile))
    for child in stmt_children(stmt):
        yield from _claims(child, path, tile)


def _claim(conjunct: Expr, path: Sequence[For], *, short: bool = True) -> _Claim | None:
    """What is known of a conjunct; `short`: in its worst case over short loops, too, not only over lanes and rows."""
    if not (isinstance(conjunct, Binary) and conjunct.op in ("lt", "le", "gt", "ge")) or conjunct.a.dtype != "int64":
        return None
    if any(True for _ in loads(conjunct)):
        return None  # what a tile finds in memory may be what it stored there
    used = set(free_vars(conjunct))
    inside = [loop for loop in path if loop.var in used]
    eliminated: list[Var] = []
    for loop in reversed(inside):
        if not isinstance(loop.extent, Const):
            break
        few = short and loop.extent.value <= _SHORT and len(eliminated) < len(inside) - 1
        light = few and _stores(loop.body, tiles=False) <= _SHORT_STORES
        if loop.kind not in ("vectorized", "unrolled") and not light:
            break
        eliminated.insert(0, loop.var)
    ranges = {loop.var: over(loop.extent) for loop in path}
    least = _least(conjunct, eliminated, ranges)
    if least is None:
        return None
    strict = conjunct.op in ("lt", "gt")
    sure = simplify(Binary("gt" if strict else "ge", least, const(0)), ranges)
    rest = set(free_vars(least))
    depth = max((i + 1 for i, loop in enumerate(path) if loop.var in rest), default=0)
    # Directly around the condition a version would save nothing over the condition itself.
    return _Claim(conjunct, sure, depth, tuple(eliminated)) if depth < len(path) else None


def _part(claim: _Claim, path: Sequence[For], tile: int) -> _Part | None:
    """What the condition leaves of a tile, if few sizes are possible.

    A version for each pays where a loop inside of the tile, the one under `tile` loops, comes to the condition again
    and again, as the sum of a product does. Once for each row, as where results are stored, it costs what it costs.
    """
    conjunct, eliminated = claim.conjunct, claim.eliminated
    assert isinstance(conjunct, Binary)  # as all claims are
    known = Simplifier({loop.var: over(loop.extent) for loop in path})
    distance = _distance(conjunct)
    count = known.simplify(substitute_expr(distance, dict.fromkeys(eliminated, const(0))))
    step = known.simplify(count - distance)
    low, high = known.bounds(step)
    if low != 0 or high is None or not set(free_vars(step)) <= set(eliminated):
        return None
    rest = known.simplify(count % (high + 1))
    always = known.prove(count >= 1)
    inner = path[max(claim.depth, tile) :]
    if isinstance(rest, Const):
        return _Part(step, count, (int(rest.value),) if rest.value else (), always, pays=True)
    rows = any(loop.var is step and loop.kind == "unrolled" for loop in inner)
    pays = any(loop.kind == "serial" for loop in inner)
    return _Part(step, count, tuple(range(1, high + 1)), always, pays) if rows and high < _MOST_SIZES else None


def _distance(conjunct: Binary) -> Expr:
    """What is above 0 where the condition holds."""
    small, large = (conjunct.a, conjunct.b) if conjunct.op in ("lt", "le") else (conjunct.b, conjunct.a)
    difference: Expr = Binary("sub", large, small)
    return difference if conjunct.op in ("lt", "gt") else difference + 1


def _least(conjunct: Binary, eliminated: Sequence[Var], ranges: Mapping[Var, Range]) -> Expr | None:
    """The least difference of the sides for all values of the eliminated variables, if it is known."""
    small, large = (conjunct.a, conjunct.b) if conjunct.op in ("lt", "le") else (conjunct.b, conjunct.a)
    simplifier = Simplifier(ranges)
    span = simplifier.span(Binary("sub", large, small), eliminated)
    return None if span is None else simplifier.expr_of(span[0])


def _is_false(condition: Expr) -> bool:
    return isinstance(condition, Const) and not condition.value


def _replaced(stmt: Stmt, known: Mapping[int, Expr]) -> Stmt:
    """`stmt` with those conjuncts (by identity) replaced."""
    if isinstance(stmt, If) and stmt.orelse is None:
        terms = list(conjuncts(stmt.condition))
        new = [known.get(id(term), term) for term in terms]
        then = _replaced(stmt.then, known)
        if then is stmt.then and all(a is b for a, b in zip(new, terms, strict=True)):
            return stmt
        left = [term for term in new if term is not _TRUE]
        return If(logical_and(*left), then) if left else then
    return map_stmt_children(stmt, lambda child: _replaced(child, known))


# Choices --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """A `select` between values of which one is read from memory, and where all of a tile takes one side of it."""

    condition: Expr
    first: Expr | None  # where this holds all of the tile takes the first side; None: nowhere, as far as is known
    left: Expr  # what decides there still, since no whole tile fulfils it: true if nothing does
    second: Expr | None
    depth: int


def version_choices(stmt: Stmt) -> Stmt:
    """`stmt` with each tile that chooses between values in up to three versions: all one, all the other, mixed."""
    return _choose(stmt, ())


#: The choices below a statement, by their conditions and by where one side of them is taken.
_Found: TypeAlias = Mapping[tuple[Key, Key | None], _Choice]


def _choose(stmt: Stmt, path: tuple[For, ...], found: _Found | None = None) -> Stmt:
    if isinstance(stmt, Seq):
        return map_stmt_children(stmt, lambda child: _choose(child, path))
    if isinstance(stmt, If) and stmt.orelse is not None:  # a tile in versions: the one that counts, and smaller ones
        then, orelse = _choose(stmt.then, path), _by_step(skip_padding(stmt.orelse), path)
        return stmt if then is stmt.then and orelse is stmt.orelse else replace(stmt, then=then, orelse=orelse)
    found = _found(stmt, path) if found is None else found
    if not found:
        return stmt
    if max(choice.depth for choice in found.values()) > len(path):
        skipping = skip_iterations(stmt)  # versions are inside of this loop: none of them decides this
        return _inside(stmt, path, found, _choose) if skipping is stmt else _choose(skipping, path)
    if _stores(stmt) > _MOST_STORES:
        return stmt
    skipping = skip_padding(stmt)  # a tile that is inside has nothing to skip, and asks in no iteration
    result = _by_step(stmt, path) if skipping is stmt else _choose(skipping, path)
    if len(found) == 1 and skipping is stmt:
        (choice,) = found.values()
        if choice.second is not None:
            result = If(choice.second, _choose(_taking(stmt, dict.fromkeys(_left(found), _FALSE)), path), result)
    firsts = [choice.first for choice in found.values() if choice.first is not None]
    if len(firsts) == len(found):
        inside = logical_and(*firsts)
        if isinstance(result, If) and result.orelse is not None and expr_key(result.condition) == expr_key(inside):
            result = result.orelse  # the tile is one step, which asks the same
        result = If(inside, _choose(_taking(stmt, _left(found)), path), result)
    return result


def _by_step(stmt: Stmt, path: tuple[For, ...], found: _Found | None = None) -> Stmt:
    """`stmt`, a tile that takes both sides of a choice, with each step of its loops that takes one in a version of it.

    Of a tile at the border of an image most taps of a window are inside. A step is all that stands in the innermost of
    the loops that the choice depends on: where that is another loop, one comparison stands for all its iterations.
    """
    if isinstance(stmt, Seq) or (isinstance(stmt, If) and stmt.orelse is not None):
        return map_stmt_children(stmt, lambda child: _by_step(child, path))
    found = _found(stmt, path, short=False) if found is None else found
    if not found:
        return stmt
    if max(choice.depth for choice in found.values()) > len(path):
        return _inside(stmt, path, found, _by_step)
    firsts = [choice.first for choice in found.values() if choice.first is not None]
    if len(firsts) < len(found) or not _repeats(stmt) or _stores(stmt) > _MOST_STORES:
        return stmt
    return If(logical_and(*firsts), _taking(stmt, _left(found)), stmt)


def _inside(
    stmt: Stmt, path: tuple[For, ...], found: _Found, go: Callable[[Stmt, tuple[For, ...], _Found], Stmt]
) -> Stmt:
    """`stmt` with what stands in it as `go` makes it, which is told what was found there."""
    if isinstance(stmt, For):
        body = go(stmt.body, (*path, stmt), found)
        return stmt if body is stmt.body else replace(stmt, body=body)
    return map_stmt_children(stmt, lambda child: go(child, path, found))


def _found(stmt: Stmt, path: tuple[For, ...], *, short: bool = True) -> _Found:
    choices = _choices(stmt, path, short=short)
    return {(expr_key(one.condition), None if one.first is None else expr_key(one.first)): one for one in choices}


def _left(found: _Found) -> Mapping[Key, Expr]:
    """What is left of each condition where the first sides are taken."""
    left: dict[Key, Expr] = {}
    for (condition, _), choice in found.items():
        left[condition] = logical_and(left[condition], choice.left) if condition in left else choice.left
    return left


def _repeats(stmt: Stmt) -> bool:
    """Whether `stmt` is a loop that runs in turn."""
    return isinstance(stmt, For) and stmt.kind == "serial"


def _choices(stmt: Stmt, path: tuple[For, ...], *, short: bool = True) -> Iterator[_Choice]:
    """The outermost choices of every store below that tiles may be spared; `short` as for `_claim`."""
    if isinstance(stmt, For):
        path = (*path, stmt)
    elif isinstance(stmt, If) and stmt.orelse is None:
        path = _narrowed(path, stmt.condition)
    elif isinstance(stmt, Store):
        for select in _outermost(stmt.value):
            choice = _choice(select, path, short=short)
            if choice is not None:
                yield choice
    for child in stmt_children(stmt):
        yield from _choices(child, path, short=short)


def _narrowed(path: tuple[For, ...], condition: Expr) -> tuple[For, ...]:
    """The loops with the extents that a condition such as `r < 3`, of a smaller tile's rows, leaves of them."""
    limits = {
        term.a: term.b
        for term in conjuncts(condition)
        if isinstance(term, Binary) and term.op == "lt" and isinstance(term.a, Var) and isinstance(term.b, Const)
    }
    return tuple(replace(loop, extent=limits[loop.var]) if loop.var in limits else loop for loop in path)


def _outermost(expr: Expr) -> Iterator[Select]:
    if isinstance(expr, Select):
        if any(True for side in (expr.a, expr.b) for _ in loads(side)):
            yield expr
        return
    for child in children(expr):
        yield from _outermost(child)


def _choice(select: Select, path: tuple[For, ...], *, short: bool) -> _Choice | None:
    terms = tuple(conjuncts(select.condition))
    claims = [_claim(term, path, short=short) for term in terms]
    sure = [claim for claim in claims if claim is not None and not _is_false(claim.sure)]
    left = [claim.conjunct for claim in claims if claim is not None and _is_false(claim.sure)]
    first = logical_and(*(claim.sure for claim in sure)) if sure and len(sure) + len(left) == len(terms) else None
    opposite = negated(terms[0]) if len(terms) == 1 else None
    other = None if opposite is None else _claim(opposite, path, short=short)
    if other is not None and _is_false(other.sure):
        other = None
    if first is None and other is None:
        return None
    depth = max(claim.depth for claim in (*(sure if first is not None else ()), *((other,) if other else ())))
    return _Choice(select.condition, first, logical_and(*left), None if other is None else other.sure, depth)


def _taking(stmt: Stmt, left: Mapping[Key, Expr]) -> Stmt:
    """`stmt` in which choices on those conditions are made by what is left of these."""

    def take(expr: Expr) -> Expr:
        new = map_children(expr, take)
        rest = left.get(expr_key(new.condition)) if isinstance(new, Select) else None
        if rest is None or not isinstance(new, Select):
            return new
        if isinstance(rest, Const):
            return new.a if rest.value else new.b
        return replace(new, condition=rest)

    if isinstance(stmt, Store):
        return map_stmt_exprs(stmt, take)
    return map_stmt_children(stmt, lambda child: _taking(child, left))


def _stores(stmt: Stmt, *, tiles: bool = True) -> int:
    """How many stores become code, unrolled loops counted out; `tiles`: with those to and from register tiles."""
    if isinstance(stmt, Store):
        buffers = (stmt.buffer, *(load.buffer for load in loads(stmt.value)))
        return int(tiles or all(buffer.scope != "register" for buffer in buffers))
    times = 1
    if isinstance(stmt, For) and stmt.kind == "unrolled" and isinstance(stmt.extent, Const):
        times = int(stmt.extent.value)
    return times * sum(_stores(child, tiles=tiles) for child in stmt_children(stmt))
