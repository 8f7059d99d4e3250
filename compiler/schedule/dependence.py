"""Which loops may run their iterations in any order, or at once.

Two iterations of a loop conflict if one writes an element that the other touches. Iterations are shown apart by
looking at one group of neighbouring dims of the buffer at a time: seen as a row-major address, the accesses of a later
iteration must all lie above (or all below) those of an earlier one. A fused loop is also looked at digit by digit.
That proves what `split` and `fuse` make of affine accesses; anything else counts as a conflict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kedge.compiler.schedule.tree import Access, accesses, blocks_in, loop_ranges, loops_in, users
from kedge.compiler.tir.expr import Binary, Const, Expr, Load, Var, as_expr, const
from kedge.compiler.tir.flatten import flattened
from kedge.compiler.tir.poly import Poly
from kedge.compiler.tir.simplify import Simplifier, over
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Range, Stmt
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import free_vars, map_children, stmt_children, stores, substitute_expr, walk_expr

#: Buffers in these scopes belong to one iteration of a parallel loop.
PRIVATE_SCOPES = frozenset({"local", "register"})


def conflict(func: PrimFunc, loop: For, outer: Sequence[For], buffers: Iterable[Buffer] | None = None) -> Buffer | None:
    """A buffer through which iterations of `loop` (under the loops `outer`) may depend on one another, or None.

    `buffers` limits the question to some; else it is about all that the loop writes, but those that are private to
    an iteration.
    """
    found = accesses(loop.body)
    written = dict.fromkeys(a.buffer for a in found if a.is_write)
    asked = [b for b in written if not is_private(func, loop, b)] if buffers is None else list(buffers)
    for buffer in asked:
        touching = [a for a in found if a.buffer is buffer]
        if any(a.is_write for a in touching) and not _apart(loop, outer, touching):
            return buffer
    return None


def own_per_iteration(loop: For, buffer: Buffer) -> bool:
    """Whether the buffer's scope gives each iteration of such a loop one of its own; lanes of a vector share all."""
    if loop.kind == "vectorized":
        return False
    blocks = loop.kind == "thread" and (loop.thread or "").startswith("blockIdx.")
    return buffer.scope in PRIVATE_SCOPES or (buffer.scope == "shared" and blocks)


def is_private(func: PrimFunc, loop: For, buffer: Buffer) -> bool:
    """Whether every iteration of `loop` has a `buffer` of its own, which is used only inside it."""
    if not own_per_iteration(loop, buffer):
        return False
    inside = {id(block) for block in blocks_in(loop)}
    return all(id(block) in inside for block in users(func.body, buffer))


def _placed(pairs: Sequence[tuple[IterVar, Expr]]) -> set[Var]:
    """The loops that the values of these iteration variables tell apart."""
    found: set[Var] = set()
    for var in dict.fromkeys(v for _, binding in pairs for v in free_vars(binding)):
        own = [(it, binding) for it, binding in pairs if var in free_vars(binding)]
        parts = any(isinstance(e, Binary) and e.op in ("floordiv", "floormod") for _, b in own for e in walk_expr(b))
        if not parts or len(own) > 1:
            found.add(var)
    return found


def crossing(func: PrimFunc, buffer: Buffer) -> For | None:
    """A loop that runs its iterations at once, and that `buffer` does not fit; None where all is well.

    Either the buffer is private to an iteration although it is used outside of the loop, too, or the iterations share
    it and one writes what another touches.
    """
    path: list[For] = []

    def visit(stmt: Stmt) -> For | None:
        if isinstance(stmt, For):
            at_once = stmt.kind in ("parallel", "thread", "vectorized")
            if at_once and users(stmt.body, buffer):
                own = own_per_iteration(stmt, buffer)
                together = stmt.kind == "thread" and (fetched_alike(stmt, buffer) or combines(stmt, buffer))
                if own:
                    wrong = not is_private(func, stmt, buffer)
                else:
                    wrong = not together and conflict(func, stmt, path, [buffer]) is not None
                if wrong:
                    return stmt
            path.append(stmt)
            found = visit(stmt.body)
            path.pop()
            return found
        return next((loop for child in stmt_children(stmt) if (loop := visit(child)) is not None), None)

    return visit(func.body)


def group_loops(loops: Iterable[For], scope: str) -> tuple[For, ...]:
    """Those of `loops` over threads that share a buffer in `scope`."""
    return tuple(loop for loop in loops if scope == "shared" and (loop.thread or "").startswith("threadIdx."))


def fetched_alike(loop: For, buffer: Buffer) -> bool:
    """Whether `buffer` is a tile in shared scope that all iterations of `loop`, over threads of one group, fill alike.

    Then one iteration's threads can fill it for all: nothing that is stored there, and no place, depends on the loop;
    within an iteration it is filled before it is read.
    """
    if buffer.scope != "shared" or not (loop.thread or "").startswith("threadIdx."):
        return False
    body = flattened(loop.body)
    blocks = users(body, buffer)
    written = {store.buffer for store in stores(body)}
    for number, block in enumerate(blocks):
        if not any(store.buffer is buffer for store in stores(block)):
            if number == 0:
                return False
            continue
        around = [each for each in loops_in(body) if any(one is block for one in blocks_in(each))]
        steering = (*block.bindings, block.predicate, *(each.extent for each in around))
        if any(loop.var in free_vars(expr) for expr in steering) or updates_in_place(block):
            return False
        if any(a.buffer in written and not a.is_write for a in accesses(block)):
            return False
    return bool(blocks)


def combines(loop: For, buffer: Buffer) -> bool:
    """Whether threads of one group combine their parts of a reduction over `loop` in `buffer`."""
    together = (loop.thread or "").startswith("threadIdx.") and buffer.scope not in PRIVATE_SCOPES
    blocks = reducing_blocks(loop)
    return together and len(blocks) == 1 and users(loop, buffer) == blocks


def tied_to(func: PrimFunc, block: Block) -> Buffer | None:
    """A buffer that ties the block to the loops around it: it holds only what the present iteration needs."""
    used = dict.fromkeys(a.buffer for a in accesses(block))
    return next((b for b in used if b.scope in PRIVATE_SCOPES or is_reused(func, b)), None)


def is_reused(func: PrimFunc, buffer: Buffer) -> bool:
    """Whether elements of `buffer` change their meaning while the function runs, as those of a tile do."""
    return reusing(func, buffer) is not None


def reusing(func: PrimFunc, buffer: Buffer) -> tuple[Block, Var] | None:
    """A block that gives elements of `buffer` another meaning, and the loop in whose iterations it does.

    A block that computes over loops which do not all tell where it writes puts one value after the other there.
    """
    for block in blocks_in(flattened(func.body)):
        for store in stores(block.body):
            if store.buffer is not buffer:
                continue
            used = {var for index in store.indices for var in free_vars(index)}
            pairs = list(zip(block.iters, block.bindings, strict=True))
            placed = _placed([(it, binding) for it, binding in pairs if it.var in used])
            for it, binding in pairs:
                again = [var for var in free_vars(binding) if var not in placed]
                if it.kind == "spatial" and again:
                    return block, again[0]
    return None


def reduces_over(loop: For) -> Block | None:
    """A block under `loop` whose reduction variables depend on the loop, or None."""
    return next(iter(reducing_blocks(loop)), None)


def reducing_blocks(loop: For) -> tuple[Block, ...]:
    """The blocks under `loop` whose reduction variables depend on the loop, be it through those of an outer block."""
    found = {
        block.name
        for block in blocks_in(flattened(loop))
        for it, binding in zip(block.iters, block.bindings, strict=True)
        if it.kind == "reduce" and loop.var in free_vars(binding)
    }
    return tuple(block for block in blocks_in(loop) if block.name in found)


def updates_in_place(block: Block) -> bool:
    """Whether the block reads back what it writes."""
    written = {store.buffer for store in stores(block.body)}
    return any(a.buffer in written and not a.is_write for a in accesses(block))


def _apart(loop: For, outer: Sequence[For], touching: Sequence[Access]) -> bool:
    """Whether different iterations touch different elements."""
    if isinstance(loop.extent, Const) and loop.extent.value <= 1:
        return True
    if any(isinstance(node, Load) for a in touching for index in a.indices for node in walk_expr(index)):
        return False
    inner = loops_in(flattened(loop.body))
    ranges = loop_ranges((*outer, loop, *inner))
    inside = {each.var: over(each.extent) for each in inner}
    if _separates(loop.var, inside, ranges, touching):
        return True
    digits = _digits(loop, touching, Simplifier(ranges))
    if digits is None:
        return False
    # Iterations of a fused loop differ in some digit: each digit alone must tell them apart, whatever the others are.
    # Where a digit is taken modulo its own extent, simplifying has made that the whole variable: `i % 7 * 16 % 7`.
    whole: Expr = const(0)
    for digit in digits:
        whole = whole + digit.var * digit.weight
    renamed = [
        Access(
            a.buffer,
            tuple(substitute_expr(_use_digits(i, digits), {loop.var: whole}) for i in a.indices),
            a.is_write,
            a.block,
        )
        for a in touching
    ]
    limits = {digit.var: over(digit.extent) for digit in digits}
    return all(
        _separates(
            digit.var,
            {**inside, **{var: limit for var, limit in limits.items() if var is not digit.var}},
            {**ranges, **limits},
            renamed,
        )
        for digit in digits
    )


class Place(Protocol):
    """An access, as far as it matters where it is."""

    @property
    def buffer(self) -> Buffer:
        """What is touched."""

    @property
    def indices(self) -> tuple[Expr, ...]:
        """Which element."""

    @property
    def is_write(self) -> bool:
        """Whether it stores."""


def keeps_apart(var: Var, inside: Mapping[Var, Range], ranges: Mapping[Var, Range], touching: Sequence[Place]) -> bool:
    """Whether accesses at different values of `var` touch different elements, whatever the variables `inside` are.

    `ranges` are those of `var` and of variables that are the same for both accesses.
    """
    if any(isinstance(node, Load) for a in touching for index in a.indices for node in walk_expr(index)):
        return False
    return _separates(var, inside, {**ranges, **inside}, touching)


def _separates(var: Var, inside: Mapping[Var, Range], ranges: Mapping[Var, Range], touching: Sequence[Place]) -> bool:
    """Whether accesses at different values of `var` touch different elements, whatever the variables `inside` are."""
    later, distance = Var(f"later_{var.name}"), Var("distance")
    renaming: dict[Var, Expr] = {each: Var(each.name) for each in inside}
    known = {**ranges, later: ranges[var], distance: ranges[var]}
    for each, limit in inside.items():
        copy = renaming[each]
        assert isinstance(copy, Var)
        known[copy] = Range(limit.start, substitute_expr(limit.extent, {**renaming, var: later}))
    simplifier = Simplifier(known)
    renaming[var] = later
    places = _distinct(touching)
    pairs = [(a, b) for a, first in enumerate(places) for b, second in enumerate(places) if _clash(first, second)]
    rank = len(touching[0].indices)
    for size in range(1, rank + 1):
        for first in range(rank - size + 1):
            lows = [address(place, first, first + size) for place in places]
            if not any(var in free_vars(lows[a]) for a, _ in pairs):
                continue
            highs = [substitute_expr(low, renaming) for low in lows]
            # Quotients and remainders are worked out while `later` is known to be in range like any other iteration.
            below, above = [simplifier.poly(low) for low in lows], [simplifier.poly(high) for high in highs]
            gaps = [above[b] - below[a] for a, b in pairs]
            after = {later: var + distance + 1}
            if all(simplifier.prove_positive(gap, after) for gap in gaps):
                return True
            if all(simplifier.prove_positive(gap.scaled(-1), after) for gap in gaps):
                return True
            steps = [substitute_expr(high, after) for high in highs]
            if all(_deals_out(var, distance, lows[a], steps[b], simplifier) for a, b in pairs):
                return True
    return False


def _distinct(touching: Sequence[Place]) -> list[Place]:
    """One of the accesses for each element, one that stores if any does."""
    found: dict[object, Place] = {}
    for place in touching:
        key = tuple(map(expr_key, place.indices))
        if key not in found or (place.is_write and not found[key].is_write):
            found[key] = place
    return list(found.values())


def _clash(a: Place, b: Place) -> bool:
    return a.is_write or b.is_write


def _deals_out(var: Var, distance: Var, low: Expr, high: Expr, simplifier: Simplifier) -> bool:
    """Whether addresses `distance + 1` iterations apart differ because they do so modulo some number.

    So they are where iterations take turns: in `j * 256 + t * 4 + i` with t below 64 and i below 4, for t, whatever i
    and j are. The gap is a multiple of the iterations' step, and what is added to it is smaller than the step or a
    multiple of more than all steps together.
    """
    gap, number = simplifier.poly(high) - simplifier.poly(low), simplifier.poly(distance).atoms()
    parts = gap.coefficient(number[0]) if len(number) == 1 else None
    most = simplifier.bounds(var)[1]
    step = None if parts is None else parts[0].value
    if parts is None or most is None or not step:
        return False
    size, others = abs(step), (parts[1] - Poly.of(step)).terms
    for turn in sorted({abs(weight) for mono, weight in others.items() if mono and abs(weight) > size * most}):
        near = Poly({mono: weight for mono, weight in others.items() if not mono or weight % turn})
        rooms = (Poly.of(size), Poly.of(turn - size * most))
        if all(simplifier.prove_positive(limit, {}) for room in rooms for limit in (room - near, room + near)):
            return True
    return False


@dataclass(frozen=True, slots=True)
class _Digit:
    """The part `loop // weight % extent` of a fused loop's variable, as a variable of its own."""

    expr: Expr
    var: Var
    weight: Expr
    extent: Expr


def _digits(loop: For, touching: Sequence[Access], simplifier: Simplifier) -> tuple[_Digit, ...] | None:
    """The digits of the loop's variable in which the indices are written, if they determine it."""
    found: dict[object, tuple[Expr, Expr, Expr | None]] = {}
    for access in touching:
        for index in access.indices:
            for node in walk_expr(index):
                parts = _as_digit(node, loop.var)
                if parts is not None:
                    found.setdefault(expr_key(node), (node, *parts))
    # `loop // w` occurs within `loop // w % e` too; it is a digit itself only as the topmost one.
    digits: list[_Digit] = []
    weight: Expr = const(1)
    while not simplifier.prove(weight >= loop.extent):
        fitting = [d for d in found.values() if simplifier.prove_equal(d[1], weight)]
        bounded = [d for d in fitting if d[2] is not None]
        if not fitting:
            return None
        expr, _, extent = (bounded or fitting)[0]
        last = extent is None
        size = (loop.extent + weight - 1) // weight if extent is None else extent
        digits.append(_Digit(expr, Var(f"digit{len(digits)}"), weight, simplifier.simplify(size)))
        if last:
            return tuple(digits)
        weight = weight * size
    return tuple(digits)


def _as_digit(node: Expr, var: Var) -> tuple[Expr, Expr | None] | None:
    """`(weight, extent)` of a digit of `var`; no extent where it is all that is above the weight."""
    match node:
        case Binary(op="floordiv", a=a, b=b) if a is var:
            return b, None
        case Binary(op="floormod", a=a, b=b) if a is var:
            return const(1), b
        case Binary(op="floormod", a=Binary(op="floordiv", a=a, b=weight), b=b) if a is var:
            return weight, b
    return None


def _use_digits(index: Expr, digits: Sequence[_Digit]) -> Expr:
    keys = {expr_key(digit.expr): digit.var for digit in digits}

    def go(node: Expr) -> Expr:
        known = keys.get(expr_key(node))
        return map_children(node, go) if known is None else known

    return go(index)


def address(access: Place, first: int, last: int) -> Expr:
    """The row-major address of an access among the dims `[first, last)` of its buffer."""
    result: Expr = const(0)
    for index, dim in zip(access.indices[first:last], access.buffer.shape[first:last], strict=True):
        result = result * as_expr(dim) + index
    return result
