"""Software pipelining: the statements of a loop's body work on different iterations at the same time.

After Lam, "Software Pipelining: An Effective Scheduling Technique for VLIW Machines", PLDI 1988, between statements
instead of instructions; its modulo variable expansion gives the buffers between two stages as many versions as
iterations are under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from kedge.compiler.schedule.lifetime import is_kept_from_none
from kedge.compiler.schedule.nest import fresh, fresh_names, index_ends, is_only_bounded, loop_vars
from kedge.compiler.schedule.primitives.loops import before_fusing, simplify_bindings
from kedge.compiler.schedule.redirect import Place, redirected
from kedge.compiler.schedule.remedies import copied_by
from kedge.compiler.schedule.tree import (
    accepted,
    accesses,
    before_blockize,
    blocks_in,
    find_loop,
    held_by,
    intermediate,
    kind_of,
    loop_path,
    loop_ranges,
    loops_in,
    loops_on,
    refuse,
    setter,
    swap,
)
from kedge.compiler.schedule.tree import users as users_of
from kedge.compiler.tir.expr import Const, Expr, Var, as_expr, const
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import prove, prove_equal
from kedge.compiler.tir.stmt import Block, Buffer, For, IterKind, IterVar, PrimFunc, Seq, Stmt
from kedge.compiler.tir.visitor import (
    free_vars,
    loads,
    map_stmt,
    seq,
    stores,
    substitute,
)


def software_pipeline(func: PrimFunc, loop: Var, stages: Sequence[int]) -> PrimFunc:
    """`func` with statement `p` of the loop's body `stages[p]` iterations behind the first.

    What fills the pipeline stands before the loop, what drains it after it.
    """
    node = find_loop(func, loop)
    assert node is not None
    body = node.body.stmts if isinstance(node.body, Seq) else (node.body,)
    behind, extent = _check_stages(func, node, body, stages)
    outer = loops_on(loop_path(func, loop))
    between = _between(func, node, body, stages, outer)
    versions = {buffer: replace(buffer, shape=(count + 1, *buffer.shape)) for buffer, count in between.items()}
    statements = [_versioned(stmt, loop, versions) for stmt in body]
    allocs = tuple(versions.get(buffer, buffer) for buffer in func.allocs)
    steady: Stmt = replace(
        node,
        extent=const(extent - behind),
        body=seq(*(substitute(s, {loop: loop + (behind - d)}) for s, d in zip(statements, stages, strict=True))),
    )
    func = replace(swap(func, node, steady), allocs=allocs)
    fill = [(s, t - d) for t in range(behind) for s, d in zip(statements, stages, strict=True) if d <= t]
    drain = [(s, extent + t - d) for t in range(behind) for s, d in zip(statements, stages, strict=True) if d > t]
    names = fresh_names(func)
    first = [fresh(stmt, {loop: const(i)}, names) for stmt, i in fill]
    last = [fresh(stmt, {loop: const(i)}, names) for stmt, i in drain]
    whole = simplify_bindings(seq(*first, steady, *last), loop_ranges(outer[:-1]))
    return swap(func, steady, whole)


def _check_stages(func: PrimFunc, node: For, body: Sequence[Stmt], stages: Sequence[int]) -> tuple[int, int]:
    """The number of iterations between the first stage and the last, and the loop's extent."""
    primitive = "software_pipeline"
    if node.kind != "serial":
        again = (
            f"nothing takes that back: in a new Schedule, sch.software_pipeline before sch.{setter(node)}, or without"
        )
        raise refuse(func, primitive, node.var, f"it is {kind_of(node)} already", at=node, hint=again)
    call = f"sch.software_pipeline({node.var.name}, {[*[0] * (len(body) - 1), 1]})"
    hint = f"{call}: the last statement one iteration behind"
    plain = [*[0] * (len(body) - 1), 1]
    if len(body) > 1 and list(stages) != plain and not accepted(lambda: software_pipeline(func, node.var, plain)):
        hint = f"stages such as {plain}: the last statement one iteration behind"
    if len(body) < 2:
        reason = f"its body is one statement ({held_by(node)}): there is nothing to run ahead of it"
        raise refuse(func, primitive, node.var, reason, at=node, hint=_cached_first(func, node))
    if len(stages) != len(body):
        reason = f"stages {list(stages)}: its body has {len(body)} statements ({held_by(node)}), and each takes one"
        raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
    if any(b < a for a, b in pairwise(stages)) or stages[0] != 0 or stages[-1] == 0:
        reason = f"stages {list(stages)}: they must begin with 0, never fall, and end above 0"
        raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
    if not isinstance(node.extent, Const):
        hint = _constant_part(func, node, body, stages)
        reason = f"its extent {print_expr(node.extent)} is not constant"
        raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
    if node.extent.value <= stages[-1]:
        reason = f"stages {list(stages)}: it has {node.extent.value} iterations, too few for {stages[-1] + 1} stages"
        raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
    return stages[-1], int(node.extent.value)


def _cached_first(func: PrimFunc, node: For) -> str:
    """The hint where a loop has nothing to run ahead."""
    block = blocks_in(node)[-1]
    written = {store.buffer for store in stores(node)}
    source = next((load.buffer for load in loads(block) if load.buffer not in written), None)
    if source is None:
        return "it takes loops of two statements or more"
    name = node.var.name
    return f'sch.cache_read({block.name}, "{source.name}", {name}); sch.software_pipeline({name}, [0, 1])'


def _constant_part(func: PrimFunc, node: For, body: Sequence[Stmt], stages: Sequence[int]) -> str:
    """The hint where the extent is not constant: pipeline a part of it, into which the same is cached."""
    name = node.var.name
    if not isinstance(node.extent, Var):
        name = name.removesuffix("_0")  # the outer part of a split: the inner one has a constant extent
    calls = [f"outer, inner = sch.split({name}, [None, {max(8, stages[-1] + 1)}])"]
    last = blocks_in(body[-1])[-1]
    for stmt in body[:-1]:
        source = copied_by(func, blocks_in(stmt)[-1])
        if source is None or len(blocks_in(stmt)) > 1:
            return f"in a new Schedule: {calls[0]}; then move or cache into inner, and pipeline that"
        scope = next(iter(stores(stmt))).buffer.scope
        calls.insert(1, f'sch.cache_read({last.name}, "{source.name}", inner, "{scope}")')
    calls.append(f"sch.software_pipeline(inner, {list(stages)})")
    return f"in a new Schedule: {'; '.join(calls)}"


def _ahead_of(func: PrimFunc, node: For, writer: Block, size: int) -> str:
    """The hint where a buffer cannot have versions: let what fills it be read ahead instead."""
    inside = {store.buffer for store in stores(node)}
    source = next((load.buffer for load in loads(writer.body) if load.buffer not in inside), None)
    if source is None:
        return "it takes buffers that are filled anew in every iteration, as sch.cache_read has it"
    name = node.var.name
    call = f'sch.cache_read({writer.name}, "{source.name}", {name}); sch.software_pipeline({name}, {[0, *[1] * size]})'
    return f"let what block {writer.name!r} reads run ahead: {call}"


def _between(
    func: PrimFunc, node: For, body: Sequence[Stmt], stages: Sequence[int], outer: Sequence[For]
) -> dict[Buffer, int]:
    """The buffers that hand something from one stage to a later one, and how many iterations lie between.

    Refuses where stages share anything else that one of them writes: its order would change.
    """
    primitive = "software_pipeline"
    mixed = next((b for b in blocks_in(node) if node.var in loop_vars(b, "reduce") & loop_vars(b, "spatial")), None)
    if mixed is not None:
        reason = f"it drives both the output and the reduction of block {mixed.name!r}"
        raise refuse(func, primitive, node.var, reason, at=node, hint=before_fusing(primitive))
    nested = next((block for block in blocks_in(node) if len(blocks_in(block)) > 1), None)
    if nested is not None:
        reason = f"block {nested.name!r} has blocks inside, which see nothing of the loop"
        hint = f"it takes blocks without blocks inside: {before_blockize(primitive)}"
        raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
    touched = [accesses(stmt) for stmt in body]
    found: dict[Buffer, int] = {}
    for buffer in dict.fromkeys(a.buffer for part in touched for a in part if a.is_write):
        users = [p for p, part in enumerate(touched) if any(a.buffer is buffer for a in part)]
        if stages[users[0]] == stages[users[-1]]:
            continue
        writers = [p for p in users if any(a.buffer is buffer and a.is_write for a in touched[p])]
        if len(writers) > 1 or writers[0] != users[0]:
            reason = f"statements in different stages write {buffer.name!r}, or one touches it before another writes it"
            hint = f"give all statements that touch {buffer.name!r} one stage"
            raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
        inside = {id(block) for block in blocks_in(node)}
        elsewhere = [block.name for block in users_of(func.body, buffer) if id(block) not in inside]
        if elsewhere or not intermediate(func, buffer):
            user = f"block {elsewhere[0]!r}" if elsewhere else "the caller"
            reason = f"{user} uses {buffer.name!r}, too, outside of the loop: there it could have no versions"
            hint = f"give all statements that touch {buffer.name!r} one stage"
            raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
        if not _fills(func, node, body[writers[0]], buffer, outer):
            writer = blocks_in(body[writers[0]])[-1]
            reason = (
                f"block {writer.name!r} does not fill all of buffer {buffer.name!r} in each iteration, and so gets "
                "no versions"
            )
            hint = _ahead_of(func, node, writer, len(body))
            raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
        found[buffer] = stages[users[-1]] - stages[users[0]]
    return found


def _fills(func: PrimFunc, node: For, stmt: Stmt, buffer: Buffer, outer: Sequence[For]) -> bool:
    """Whether one block under `stmt` stores every element that is read in that iteration, whatever was there before."""
    return any(
        _fills_alone(block, stmt, buffer, node.var, outer) and is_kept_from_none(func, node, block, buffer)
        for block in blocks_in(stmt)
    )


def _fills_alone(block: Block, stmt: Stmt, buffer: Buffer, loop: Var, outer: Sequence[For]) -> bool:
    """Whether the block stores every element of the buffer, but for those outside the bounds of what it copies."""
    written = [access for access in accesses(stmt) if access.block is block and access.buffer is buffer]
    stored = next((access for access in written if access.is_write), None)
    if stored is None or loop in loop_vars(block, "reduce") or not is_only_bounded(block):
        return False
    if block.init is None and any(not access.is_write for access in written):
        return False
    inner = loops_in(stmt)
    ranges = loop_ranges((*outer, *inner))
    for index, dim in zip(stored.indices, buffer.shape, strict=True):
        ends = index_ends(index, inner, ranges)
        steps: Expr = const(1)
        for each in inner:
            steps = steps * each.extent if each.var in free_vars(index) else steps
        # From the first to the last, in enough steps to meet each.
        if ends is None or not prove_equal(ends[0], 0, ranges) or not prove_equal(ends[1] + 1, as_expr(dim), ranges):
            return False
        if not prove(steps >= as_expr(dim), ranges):
            return False
    return True


def _versioned(stmt: Stmt, loop: Var, versions: Mapping[Buffer, Buffer]) -> Stmt:
    """`stmt` on the version of each buffer that belongs to its iteration."""

    def visit(node: Stmt) -> Stmt:
        if not isinstance(node, Block):
            return node
        used = dict.fromkeys(a.buffer for a in accesses(node) if a.buffer in versions)
        if not used:
            return node
        kind: IterKind = "reduce" if loop in loop_vars(node, "reduce") else "spatial"  # never both: see _between
        numbers: dict[Buffer, IterVar] = {}
        for buffer in used:
            count = versions[buffer].shape[0]
            numbers[buffer] = IterVar(Var(f"{buffer.name}_version"), as_expr(count), kind)

        def move(buffer: Buffer, indices: tuple[Expr, ...]) -> Place | None:
            return (versions[buffer], (numbers[buffer].var, *indices)) if buffer in numbers else None

        bindings = (*node.bindings, *(loop % it.extent for it in numbers.values()))
        return redirected(replace(node, iters=(*node.iters, *numbers.values()), bindings=bindings), move)

    return map_stmt(stmt, visit)
