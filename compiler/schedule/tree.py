"""Finding and replacing loops and blocks of a function; the refusal that every primitive raises."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from kedge.compiler.errors import ScheduleError
from kedge.compiler.tir.expr import Expr, Load, Var
from kedge.compiler.tir.printer import print_stmt
from kedge.compiler.tir.simplify import over
from kedge.compiler.tir.stmt import Block, Buffer, For, If, PrimFunc, Range, Seq, Stmt, Store
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import (
    loads,
    map_stmt_children,
    seq,
    stmt_children,
    stmt_exprs,
    stores,
    substitute_expr,
)

#: What sizes and indices can be.
LARGEST_INDEX = 2**63 - 1

#: What a primitive works on, as its error messages call it: a loop or a block, or a text.
Subject = Var | Block | str


def refuse(
    func: PrimFunc, primitive: str, subject: Subject, reason: str, *, at: Stmt | None = None, hint: str | None = None
) -> ScheduleError:
    """The error to raise: primitive, argument, reason, and the nest around it (the whole function where unknown)."""
    if isinstance(subject, Block):
        name, where = f"block {subject.name!r}", at or _outermost(func, subject)
    elif isinstance(subject, Var):
        node = find_loop(func, subject)
        name = f"loop {subject.name!r}" if node is None else which(func, node)
        where = at or _outermost(func, node)
    else:
        name, where = subject, at or func.body
    return ScheduleError(f"{primitive}({name}): {reason}\n{print_stmt(where, func)}", hint=hint)


def accepted(attempt: Callable[[], object]) -> bool:
    """Whether a primitive takes what `attempt` asks of it: hints name only what works."""
    try:
        attempt()
    except ScheduleError:
        return False
    return True


def path_to(root: Stmt, wanted: Callable[[Stmt], bool]) -> tuple[Stmt, ...]:
    """The statements from `root` down to the first one that is `wanted`, both included; empty if there is none."""
    if wanted(root):
        return (root,)
    for child in stmt_children(root):
        below = path_to(child, wanted)
        if below:
            return (root, *below)
    return ()


def find_loop(func: PrimFunc, var: Var) -> For | None:
    """The loop over `var`."""
    return next((loop for loop in loops_in(func.body) if loop.var is var), None)


def loop_path(func: PrimFunc, var: Var) -> tuple[Stmt, ...]:
    """The statements from the function's body down to the loop over `var`."""
    return path_to(func.body, lambda s: isinstance(s, For) and s.var is var)


def block_path(func: PrimFunc, name: str) -> tuple[Stmt, ...]:
    """The statements from the function's body down to the block `name`."""
    return path_to(func.body, lambda s: isinstance(s, Block) and s.name == name)


#: Statements of which each of the caches below keeps what is known. Primitives ask again and again, mostly of what none
#: of them has changed, and statements are immutable: it holds wherever one stands. It is more than a schedule of one
#: kernel has, so that what is asked again is there, and little enough to be no matter of memory in a long process.
_KNOWN_STATEMENTS = 4096


def blocks_in(stmt: Stmt) -> tuple[Block, ...]:
    """The blocks under `stmt`, in order of execution; one that holds others comes after them."""
    return () if isinstance(stmt, Store) else _blocks_in(stmt)


@lru_cache(maxsize=_KNOWN_STATEMENTS)
def _blocks_in(stmt: Stmt) -> tuple[Block, ...]:
    inside = [block for child in stmt_children(stmt) for block in blocks_in(child)]
    return (*inside, stmt) if isinstance(stmt, Block) else tuple(inside)


def loops_in(stmt: Stmt) -> tuple[For, ...]:
    """The loops under `stmt`, outer ones before inner ones."""
    return () if isinstance(stmt, Store) else _loops_in(stmt)


@lru_cache(maxsize=_KNOWN_STATEMENTS)
def _loops_in(stmt: Stmt) -> tuple[For, ...]:
    inside = [loop for child in stmt_children(stmt) for loop in loops_in(child)]
    return (stmt, *inside) if isinstance(stmt, For) else tuple(inside)


def loops_on(path: Iterable[Stmt]) -> tuple[For, ...]:
    """The loops among the statements of a path, outermost first."""
    return tuple(s for s in path if isinstance(s, For))


def named(things: Iterable[For | Block]) -> str:
    """Loops or blocks as messages name them: "loop 'i'", "loops 'i', 'j'"; "no loop" where there are none."""
    listed = list(things)
    kind = "block" if listed and isinstance(listed[0], Block) else "loop"
    names = [repr(each.name if isinstance(each, Block) else each.var.name) for each in listed]
    return f"{kind}{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else "no loop"


def placed(loop: For) -> str:
    """A loop as messages tell it from others of its name: "loop 'i' around block 'y'"."""
    return f"{named([loop])} around {named(blocks_in(loop))}"


def parts_of(loop: For) -> tuple[Stmt, ...]:
    """The statements that stand directly in a loop."""
    return loop.body.stmts if isinstance(loop.body, Seq) else (loop.body,)


def held_by(loop: For) -> str:
    """What stands directly in a loop, as messages name it: "loop 'j'", "block 'a', loop 'j'"."""
    return ", ".join(named([each]) if isinstance(each, (For, Block)) else "a condition" for each in parts_of(loop))


def enclosing(path: Sequence[Stmt], below: Stmt | None = None) -> Block | None:
    """A block among the statements of a path, of those after `below` if given: what is inside uses its variables."""
    inside = path if below is None else path[path.index(below) + 1 :]
    return next((s for s in inside if isinstance(s, Block)), None)


def before_blockize(primitive: str) -> str:
    """The hint where an outer block is in the way."""
    return f"in a new Schedule, sch.{primitive} before sch.blockize"


def condition_on(path: Iterable[Stmt]) -> If | None:
    """The innermost `if` among the statements of a path: it decides whether the last of them runs."""
    return next((s for s in reversed(tuple(path)) if isinstance(s, If)), None)


def which(func: PrimFunc, loop: For) -> str:
    """A loop as messages name it: by what is in it, too, where others have its name."""
    return named([loop]) if _is_unique(func, loop) else placed(loop)


def handle(func: PrimFunc, loop: For, near: For | None = None) -> str:
    """The handle of a loop as a call in a hint has it: `i`, or `sch.get_loops(y)[0]` where others are called so.

    Around and inside loop `near`, which the refusal is about, a name says enough where it is the only one there.
    """
    there = [] if near is None else [*loops_on(loop_path(func, near.var)), *loops_in(near)]
    alike = {each.var for each in there if each.var.name == loop.var.name}
    if _is_unique(func, loop) or alike == {loop.var}:
        return loop.var.name
    inside = blocks_in(loop)[0]
    around = loops_on(block_path(func, inside.name))
    return f"sch.get_loops({inside.name})[{around.index(loop)}]"


def _is_unique(func: PrimFunc, loop: For) -> bool:
    return sum(each.var.name == loop.var.name for each in loops_in(func.body)) == 1


def kind_of(loop: For) -> str:
    """How a loop runs, as messages say it: "parallel", "bound to blockIdx.x"."""
    return f"bound to {loop.thread}" if loop.kind == "thread" else loop.kind


def of_kind(func: PrimFunc, loop: For) -> str:
    """A loop with how it runs: "parallel loop 'i'", "loop 'i', bound to blockIdx.x"."""
    name = which(func, loop)
    return f"{name}, bound to {loop.thread}" if loop.kind == "thread" else f"{loop.kind} {name}"


def setter(loop: For) -> str:
    """The primitive that gave a loop its kind."""
    return {"parallel": "parallel", "vectorized": "vectorize", "unrolled": "unroll", "thread": "bind"}.get(
        loop.kind, "tensorize"
    )


def passing(loops: Sequence[For]) -> str:
    """The hint where a check leaves only some loops."""
    return f"loops that pass this check: {', '.join(repr(each.var.name) for each in loops)}" if loops else (
        "no loop around it passes this check"
    )  # fmt: skip


def position_around(
    func: PrimFunc, primitive: str, block: Block, loops: Sequence[For], loop: Var, legal: Sequence[For] | None = None
) -> int:
    """Which of the `loops` around `block` is the one over `loop`; refuses where none is, and names the `legal` ones."""
    for position, each in enumerate(loops):
        if each.var is loop:
            between = enclosing(block_path(func, block.name)[:-1], each)
            if between is not None:
                reason = f"block {between.name!r} stands between loop {loop.name!r} and it"
                hint = f"take a loop inside of block {between.name!r}; or, {before_blockize(primitive)}"
                raise refuse(func, primitive, block, reason, hint=hint)
            return position
    node = find_loop(func, loop)
    assert node is not None, "handles name loops of the function"
    reason = f"{placed(node)} is not around it"
    fitting = named(loops if legal is None else legal)
    hint = f"it takes {fitting} around block {block.name!r}: sch.get_loops({block.name})"
    raise refuse(func, primitive, block, reason, hint=hint)


def loop_ranges(loops: Iterable[For]) -> dict[Var, Range]:
    """What is known of the variables of `loops`."""
    return {loop.var: over(loop.extent) for loop in loops}


def swap(func: PrimFunc, old: Stmt, new: Stmt) -> PrimFunc:
    """`func` with the statement `old` (found by identity) replaced; an empty `new` takes emptied loops with it."""
    return replace(func, body=_swap(func.body, old, new))


def with_body(func: PrimFunc, body: Stmt) -> PrimFunc:
    """`func` with another body and without the allocations that it no longer uses."""
    used = {load.buffer for load in loads(body)} | {store.buffer for store in stores(body)}
    return replace(func, body=body, allocs=tuple(b for b in func.allocs if b in used))


def remove(func: PrimFunc, stmt: Stmt) -> PrimFunc:
    """`func` without `stmt`, the loops that only it kept alive, and the allocations that only it used."""
    return with_body(func, _swap(func.body, stmt, Seq(())))


def block_name(func: PrimFunc, name: str) -> str:
    """`name`, or `name` with a number if a block of `func` has it already."""
    return unique(name, {block.name for block in blocks_in(func.body)})


def buffer_name(func: PrimFunc, name: str) -> str:
    """`name`, or `name` with a number if a buffer of `func` has it already."""
    return unique(name, {buffer.name for buffer in (*func.params, *func.allocs)})


def writers(func: PrimFunc, buffer: Buffer) -> tuple[Block, ...]:
    """The blocks that write `buffer`, in order of execution; one that only holds such a block is none."""
    return tuple(b for b in blocks_in(func.body) if buffer in _touched_by(b).written)


def readers(func: PrimFunc, buffer: Buffer) -> tuple[Block, ...]:
    """The blocks that read `buffer`, in order of execution; a reduction reading its accumulator back is none."""
    written = writers(func, buffer)
    return tuple(b for b in blocks_in(func.body) if buffer in _touched_by(b).read_or_asked and b not in written)


def users(stmt: Stmt, buffer: Buffer) -> tuple[Block, ...]:
    """The blocks under `stmt` that read or write `buffer` themselves, in order of execution."""
    return tuple(b for b in blocks_in(stmt) if buffer in _touched_by(b).touched)


def check_only_writer(func: PrimFunc, primitive: str, block: Block, buffer: Buffer) -> None:
    """Refuse if other blocks than `block` write `buffer`."""
    others = [each for each in writers(func, buffer) if each is not block]
    if others:
        reason = f"{buffer.name!r}, which it writes, is written by {named(others)}, too"
        hint = f"in a new Schedule, sch.{primitive} before sch.decompose_reduction or sch.software_pipeline"
        raise refuse(func, primitive, block, reason, hint=hint)


def intermediate(func: PrimFunc, buffer: Buffer) -> bool:
    """Whether `buffer` lives only inside the function."""
    return buffer in func.allocs


@dataclass(frozen=True, slots=True)
class Access:
    """One load or store, with its indices in terms of the loops around the block."""

    buffer: Buffer
    indices: tuple[Expr, ...]
    is_write: bool
    block: Block


@lru_cache(maxsize=_KNOWN_STATEMENTS // 16)  # each holds many, and is asked for of whole functions and large parts
def accesses(stmt: Stmt) -> tuple[Access, ...]:
    """Every load and store under `stmt` in terms of loop variables: block variables are replaced by their bindings.

    What a statement loads several times is there once.
    """
    return tuple(_accesses(stmt, {}, None))


@dataclass(frozen=True, slots=True)
class _Touched:
    """The buffers that a block loads and stores itself, without those of the blocks inside."""

    written: frozenset[Buffer]
    touched: frozenset[Buffer]
    #: What it reads, to find out whether and where it runs, too.
    read_or_asked: frozenset[Buffer]


@lru_cache(maxsize=_KNOWN_STATEMENTS)
def _touched_by(block: Block) -> _Touched:
    written: set[Buffer] = set()
    read: set[Buffer] = set()
    todo = list(stmt_children(block))
    while todo:
        stmt = todo.pop()
        if isinstance(stmt, Store):
            written.add(stmt.buffer)
        if not isinstance(stmt, Block):
            # How often a loop inside of a block runs depends on no buffer.
            exprs = () if isinstance(stmt, For) else stmt_exprs(stmt)
            read.update(load.buffer for expr in exprs for load in loads(expr))
            todo += stmt_children(stmt)
    asked = {load.buffer for expr in stmt_exprs(block) for load in loads(expr)}
    return _Touched(frozenset(written), frozenset(written | read), frozenset(read | asked))


def _accesses(stmt: Stmt, env: Mapping[Var, Expr], block: Block | None) -> Iterable[Access]:
    if isinstance(stmt, Block):
        bindings = [substitute_expr(b, env) for b in stmt.bindings]
        env, block = {**env, **{it.var: b for it, b in zip(stmt.iters, bindings, strict=True)}}, stmt
    elif block is not None and not stmt_children(stmt):
        for place in _places(stmt):
            indices = tuple(substitute_expr(i, env) for i in place.indices)
            yield Access(place.buffer, indices, isinstance(place, Store), block)
    elif block is not None and isinstance(stmt, If):
        for load in loads(stmt.condition):
            yield Access(load.buffer, tuple(substitute_expr(i, env) for i in load.indices), False, block)
    for child in stmt_children(stmt):
        yield from _accesses(child, env, block)


@lru_cache(maxsize=_KNOWN_STATEMENTS)
def _places(stmt: Stmt) -> tuple[Store | Load, ...]:
    """What a statement without others inside stores and loads, each place once."""
    return (*stores(stmt), *{expr_key(load): load for load in loads(stmt)}.values())


def unique(name: str, used: Container[str]) -> str:
    """`name`, or `name` with the first number that makes it none of `used`."""
    candidate, count = name, 0
    while candidate in used:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _swap(stmt: Stmt, old: Stmt, new: Stmt) -> Stmt:
    if stmt is old:
        return new
    result = map_stmt_children(stmt, lambda child: _swap(child, old, new))
    if result is stmt:
        return stmt
    if isinstance(result, Seq):
        return seq(*(s for s in result.stmts if not _empty(s)))
    return Seq(()) if isinstance(result, For) and _empty(result.body) else result


def _empty(stmt: Stmt) -> bool:
    return isinstance(stmt, Seq) and not stmt.stmts


def _outermost(func: PrimFunc, stmt: Stmt | None) -> Stmt:
    """The top-level statement of the function around `stmt`."""
    path = path_to(func.body, lambda s: s is stmt)
    return next((s for s in path if not isinstance(s, Seq)), func.body)
