"""From a scheduled function to plain loops: what is done in the tensor IR before any LLVM.

blocks     a block's iteration variables are replaced by their bindings; its init moves in front of the loops
           that reduce, or is guarded by "first iteration"; its predicate becomes an `If`
rests      a sum in steps that do not divide it has what is left of it after its whole steps
versions   where the predicate of a tile provably holds, the tile runs without it; what a padding would add to sums is
           left out; where all of a tile takes one side of a choice, as inside of a padding, it runs without the choice
places     a buffer that lives only in a function gets the smallest scope that holds all its uses and that hands
           nothing from one iteration to the next, so that each version has registers of its own; one that is
           private to iterations of a parallel loop is always inside of it; outside of loops those of one shape that are
           not alive together are one
compact    there it shrinks to what is used of it, as after compute_at
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace

from kedge.compiler.codegen.alloc import Alloc as Alloc  # code generators find what they need here
from kedge.compiler.codegen.alloc import same_shape
from kedge.compiler.codegen.alloc import statements_of as statements_of
from kedge.compiler.codegen.compact import compact
from kedge.compiler.codegen.coverage import written_before_read
from kedge.compiler.codegen.padding import skip_padding
from kedge.compiler.codegen.rests import split_rests
from kedge.compiler.codegen.versions import version_choices, version_tiles
from kedge.compiler.tir.expr import Const, Expr, Var, eq, logical_and
from kedge.compiler.tir.flatten import flattened
from kedge.compiler.tir.simplify import conjuncts, over, simplify_stmt
from kedge.compiler.tir.stmt import Block, Buffer, For, If, PrimFunc, Range, Seq, Stmt
from kedge.compiler.tir.visitor import (
    free_vars,
    loads,
    map_stmt_children,
    replace_buffers,
    seq,
    stmt_children,
    stores,
    substitute,
    substitute_expr,
)


def prepare(func: PrimFunc) -> Stmt:
    """The body of `func` without blocks, simplified, versioned, with an `Alloc` around the uses of each buffer."""
    body = _clean(lower_blocks(func.body))
    for version in (split_rests, version_tiles, version_choices, skip_padding):
        versioned = version(body)
        body = body if versioned is body else _clean(versioned)
    return compact(place_allocs(body, func.allocs))


def _clean(stmt: Stmt) -> Stmt:
    return drop_empty(simplify_stmt(drop_empty(stmt)))


# Blocks ---------------------------------------------------------------------------------------------------------


def lower_blocks(stmt: Stmt) -> Stmt:
    """`stmt` without blocks."""
    return _lowered(flattened(stmt))  # loops on both sides of an outer block's border may reduce together


def _lowered(stmt: Stmt) -> Stmt:
    if isinstance(stmt, For):
        split = _split_init(stmt)
        if split is not None:
            init, rest = split
            return seq(_lowered(init), _lowered(rest))
    if isinstance(stmt, Block):
        return _lower_block(stmt)
    return map_stmt_children(stmt, _lowered)


def _lower_block(block: Block) -> Stmt:
    mapping: dict[Var, Expr] = {it.var: b for it, b in zip(block.iters, block.bindings, strict=True)}
    body = block.body
    if block.init is not None:
        first = [eq(it.var, 0) for it in block.iters if it.kind == "reduce"]
        guarded: Stmt = If(logical_and(*first), block.init) if first else block.init
        body = seq(guarded, body)
    # Inner blocks may use this block's variables, so they are lowered after the substitution.
    body = _lowered(substitute(body, mapping))
    predicate = block.predicate
    if isinstance(predicate, Const) and predicate.value:
        return body
    return If(substitute_expr(predicate, mapping), body)


def _split_init(loop: For) -> tuple[Stmt, Stmt] | None:
    """`loop`, the outermost of a perfect nest that reduces, as (nest that initialises, nest without init)."""
    chain, block = _perfect_nest(loop)
    if block is None or block.init is None:
        return None
    own = {one.var for one in chain}
    pairs = list(zip(block.iters, block.bindings, strict=True))
    reduce_vars = {v for it, b in pairs if it.kind == "reduce" for v in free_vars(b)}
    # A reduction loop outside this nest would initialise again in each of its iterations.
    if loop.var not in reduce_vars or not reduce_vars <= own:
        return None
    if any(v in reduce_vars for it, b in pairs if it.kind == "spatial" for v in free_vars(b)):
        return None
    spatial, mixed = _split_predicate(block.predicate, reduce_vars)
    if mixed:
        return None
    keep = [it for it in block.iters if it.kind == "spatial"]
    init: Stmt = Block(
        f"{block.name}_init", tuple(keep), tuple(b for it, b in pairs if it.kind == "spatial"), (), block.writes,
        block.init, None, logical_and(*spatial),
    )  # fmt: skip
    for one in reversed(chain):
        if one.var not in reduce_vars:
            fresh = replace(one.var)
            init = replace(one, var=fresh, body=substitute(init, {one.var: fresh}))
    rest: Stmt = replace(block, init=None)
    for one in reversed(chain):
        rest = replace(one, body=rest)
    return init, rest


def _perfect_nest(loop: For) -> tuple[list[For], Block | None]:
    chain: list[For] = []
    stmt: Stmt = loop
    while isinstance(stmt, For):
        chain.append(stmt)
        stmt = stmt.body
    return chain, stmt if isinstance(stmt, Block) else None


def _split_predicate(predicate: Expr, reduce_vars: set[Var]) -> tuple[list[Expr], bool]:
    """The conjuncts without reduction variables, and whether some conjunct mixes both kinds."""
    spatial, mixed = [], False
    for conjunct in conjuncts(predicate):
        used = set(free_vars(conjunct))
        if not used & reduce_vars:
            spatial.append(conjunct)
        elif used - reduce_vars:
            mixed = True
    return spatial, mixed


def drop_empty(stmt: Stmt) -> Stmt:
    """`stmt` without loops and branches that do nothing; `Seq(())` if nothing is left."""
    new = map_stmt_children(stmt, drop_empty)
    match new:
        case Seq(stmts=stmts):
            kept = tuple(s for s in stmts if not _is_empty(s))
            return new if len(kept) == len(stmts) else seq(*kept) if kept else Seq(())
        case For(body=body) if _is_empty(body):
            return Seq(())
        case If(then=then, orelse=orelse) if _is_empty(then) and (orelse is None or _is_empty(orelse)):
            return Seq(())
    return new


def _is_empty(stmt: Stmt) -> bool:
    return isinstance(stmt, Seq) and not stmt.stmts


# Places ---------------------------------------------------------------------------------------------------------


def place_allocs(stmt: Stmt, buffers: Iterable[Buffer]) -> Stmt:
    """`stmt` with an `Alloc` for each buffer that it uses, as far inside as the buffer's life allows."""
    return _place_used(stmt, buffers, {})


def _place_used(stmt: Stmt, buffers: Iterable[Buffer], outer: Mapping[Var, Range]) -> Stmt:
    used = set(_used_buffers(stmt))
    return _place(stmt, [buffer for buffer in buffers if buffer in used], outer)


def _used_buffers(stmt: Stmt) -> Iterator[Buffer]:
    for store in stores(stmt):
        yield store.buffer
    for load in loads(stmt):
        yield load.buffer


def _place(stmt: Stmt, buffers: list[Buffer], outer: Mapping[Var, Range]) -> Stmt:
    if not buffers:
        return stmt
    here: list[Buffer] = []
    match stmt:
        case Seq(stmts=stmts):
            uses = [set(_used_buffers(s)) for s in stmts]
            here = [b for b in buffers if sum(b in use for use in uses) > 1]
            taken = {} if outer else _taken_over(here, uses)
            new = tuple(
                _place(
                    replace_buffers(s, taken) if taken else s,
                    [b for b in buffers if b in use and b not in here],
                    outer,
                )
                for s, use in zip(stmts, uses, strict=True)
            )
            stmt, here = Seq(new), [b for b in here if b not in taken]
        case If(condition=condition, then=then, orelse=orelse):
            in_condition = {load.buffer for load in loads(condition)}
            here = [b for b in buffers if b in in_condition]
            rest = [b for b in buffers if b not in here]
            stmt = If(
                condition,
                _place_used(then, rest, outer),
                None if orelse is None else _place_used(orelse, rest, outer),
            )
        case For(var=var, extent=extent):
            inner = [b for b in buffers if _is_private(b, stmt) or _dies_in_iteration(b, stmt, outer)]
            here = [b for b in buffers if b not in inner]
            stmt = replace(stmt, body=_place(stmt.body, inner, {**outer, var: over(extent)}))
        case _:
            here = buffers
    for buffer in reversed(here):
        stmt = Alloc(buffer, stmt)
    return stmt


def _taken_over(buffers: Iterable[Buffer], uses: Sequence[Set[Buffer]]) -> dict[Buffer, Buffer]:
    """Buffers that take the place of one of their shape, after its last use: a chain of them is two in turn."""
    mapping: dict[Buffer, Buffer] = {}
    last: dict[Buffer, int] = {}  # by those that keep their memory: where it is used last
    spans = [(min(at), max(at), b) for b in buffers for at in ([i for i, use in enumerate(uses) if b in use],)]
    for first, end, buffer in sorted(spans, key=lambda span: span[:2]):
        alike = (other for other, until in last.items() if until < first and _interchangeable(other, buffer))
        place = next(alike, buffer)
        if place is not buffer:
            mapping[buffer] = place
        last[place] = end
    return mapping


def _interchangeable(a: Buffer, b: Buffer) -> bool:
    return a.dtype == b.dtype and a.scope == b.scope == "global" and same_shape(a, b)


def _is_private(buffer: Buffer, stmt: Stmt) -> bool:
    """Whether the buffer's scope gives each iteration of a parallel loop, which has all its uses, one of its own."""
    if buffer.scope not in ("local", "register"):
        return False
    if isinstance(stmt, For) and stmt.kind == "parallel":
        return True
    users = [child for child in stmt_children(stmt) if buffer in _used_buffers(child)]
    together = isinstance(stmt, Seq) and len(users) > 1
    return bool(users) and not together and all(_is_private(buffer, child) for child in users)


def _dies_in_iteration(buffer: Buffer, loop: For, outer: Mapping[Var, Range]) -> bool:
    """Whether each iteration may have a buffer of its own. Lanes of a vector or an instruction have none."""
    return loop.kind not in ("vectorized", "tensorized") and written_before_read(loop, buffer, outer)
