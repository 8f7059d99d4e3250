"""Computing a small nest of loops by one instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.dependence import address
from kedge.compiler.schedule.intrinsics import INTRINSICS, TensorIntrin, nest_of
from kedge.compiler.schedule.nest import loop_vars, resolved
from kedge.compiler.schedule.tree import (
    Access,
    accesses,
    before_blockize,
    block_path,
    enclosing,
    find_loop,
    handle,
    kind_of,
    loop_path,
    loop_ranges,
    loops_in,
    loops_on,
    refuse,
    setter,
    swap,
)
from kedge.compiler.tir.expr import Const, Expr, Var, const
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Simplifier
from kedge.compiler.tir.stmt import Block, Buffer, For, LoopKind, PrimFunc, Stmt, Store
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import loads, stores, substitute_expr


def tensorize(func: PrimFunc, subject: Var | str, name: str) -> PrimFunc:
    """`func` with a nest computed by the instruction `name`, which computes just the same.

    It is the nest at a loop, or that which the block of that name holds.
    """
    loop = subject if isinstance(subject, Var) else _held_nest(func, subject)
    intrin = INTRINSICS.get(name)
    if intrin is None:
        close = get_close_matches(name, INTRINSICS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(INTRINSICS)}"
        raise refuse(func, "tensorize", loop, f"there is no instruction {name!r}", hint=hint)
    node = find_loop(func, loop)
    assert node is not None
    loops, block = _fitting_nest(func, node, intrin, "serial")
    new: Stmt = block
    for each in reversed(loops):
        new = replace(each, kind="tensorized", body=new)
    assert isinstance(new, For)
    return swap(func, node, replace(new, annotations=MappingProxyType({**node.annotations, "intrin": name})))


def _held_nest(func: PrimFunc, name: str) -> Var:
    """The outermost loop of the nest that a block holds."""
    path = block_path(func, name)
    block = path[-1]
    assert isinstance(block, Block)
    if not isinstance(block.body, For):
        hint = f"take a loop around it: {', '.join(repr(each.var.name) for each in loops_on(path))}"
        raise refuse(func, "tensorize", block, "it holds no nest of loops", hint=hint)
    return block.body.var


def check_tensorized(before: PrimFunc, func: PrimFunc, primitive: str) -> None:
    """Refuse what `primitive` made of `before` if a nest in it is no longer what its instruction computes."""
    for node in loops_in(func.body):
        name = node.annotations.get("intrin") if node.kind == "tensorized" else None
        if name is None:
            continue
        try:
            if name not in INTRINSICS:
                hint = f"there are {', '.join(INTRINSICS)}"
                raise refuse(func, primitive, node.var, f"there is no instruction {name!r}", hint=hint)
            _fitting_nest(func, node, INTRINSICS[name], "tensorized")
        except ScheduleError as error:
            why = error.message.splitlines()[0].partition(": ")[2]
            reason = f"{name} computes the nest of this loop, and would not fit any more: {why}"
            raise refuse(
                before, primitive, node.var, reason, hint=f"in a new Schedule, sch.{primitive} before sch.tensorize"
            ) from error


def _fitting_nest(func: PrimFunc, node: For, intrin: TensorIntrin, kind: LoopKind) -> tuple[tuple[For, ...], Block]:
    """The loops, all of one kind, and the block of a nest that computes what the instruction does."""
    loops, block = _nest(func, node, intrin, kind)
    _check_value(func, node, block, intrin)
    _check_strides(func, node, loops, block, intrin)
    return loops, block


def _nest(func: PrimFunc, node: For, intrin: TensorIntrin, kind: LoopKind) -> tuple[tuple[For, ...], Block]:
    """The loops and the block of the nest, which are those of the instruction."""
    loops, block = nest_of(node)
    wanted = [each.extent for each in intrin.loops]
    shown = " x ".join(map(print_expr, wanted))
    kinds = next((each for each in loops if each.kind != kind), None)
    if kinds is not None:
        reason = f"it is {kind_of(kinds)} already, and {intrin.name} computes loops that are {kind}"
        hint = f"in a new Schedule, sch.tensorize without sch.{setter(kinds)} of that loop"
        raise refuse(func, "tensorize", kinds.var, reason, at=node, hint=hint)
    if not isinstance(block, Block) or [expr_key(each.extent) for each in loops] != list(map(expr_key, wanted)):
        found = " x ".join(print_expr(each.extent) for each in loops)
        reason = f"{intrin.name} computes loops of {shown} around one block; here are loops of {found}"
        hint = f"sch.split and sch.reorder until just loops of {shown} are innermost"
        raise refuse(func, "tensorize", node.var, reason, at=node, hint=hint)
    _check_dtypes(func, node, block, intrin)
    if block.init is not None:
        reason = f"block {block.name!r} initialises its output, and the instruction only updates it"
        path = block_path(func, block.name)[:-1]
        reducing, outer = loop_vars(resolved(func, block), "reduce"), enclosing(path)
        if outer is not None and any(each.var in reducing for each in loops_on(path[: path.index(outer)])):
            raise refuse(func, "tensorize", node.var, reason, at=node, hint=before_blockize("decompose_reduction"))
        outside = handle(func, node, node)
        for each in reversed(loops_on(loop_path(func, node.var)[:-1])):
            if each.var not in reducing:
                break
            outside = handle(func, each, node)
        hint = f"sch.decompose_reduction({block.name}, {outside}) takes that out"
        raise refuse(func, "tensorize", node.var, reason, at=node, hint=hint)
    if not (isinstance(block.predicate, Const) and block.predicate.value):
        reason = f"block {block.name!r} runs only where {print_expr(block.predicate)}"
        tiles = ", ".join(print_expr(each.extent) for each in loops)
        hint = (
            f"in a new Schedule, sch.pad_einsum before sch.split and sch.reorder, to multiples of {tiles} in the "
            "loops that are split, makes all tiles whole"
        )
        raise refuse(func, "tensorize", node.var, reason, at=node, hint=hint)
    return loops, block


def _check_dtypes(func: PrimFunc, node: For, block: Block, intrin: TensorIntrin) -> None:
    """Refuse operands of other dtypes than those of the instruction."""
    wanted = [load.dtype for load in loads(intrin.store.value) if load.buffer is not intrin.store.buffer]
    written = {store.buffer for store in stores(block)}
    given = [load.dtype for load in loads(block.body) if load.buffer not in written]
    if sorted(given) == sorted(wanted):
        return
    names = ", ".join(load.buffer.name for load in loads(block.body) if load.buffer not in written)
    read = f"{names} of {' and '.join(given)}" if given else "nothing"
    reason = f"block {block.name!r} reads {read}; {intrin.name} takes {' and '.join(wanted)}"
    fitting = [
        name
        for name, each in INTRINSICS.items()
        if sorted(load.dtype for load in loads(each.store.value) if load.buffer is not each.store.buffer)
        == sorted(given)
    ]
    hint = (
        f"for these there is {', '.join(fitting)}" if fitting else "no instruction takes these: sch.vectorize the loop"
    )
    raise refuse(func, "tensorize", node.var, reason, at=node, hint=hint)


def _check_value(func: PrimFunc, node: For, block: Block, intrin: TensorIntrin) -> None:
    if not isinstance(block.body, Store) or intrin.operands(block.body) is None:
        reason = f"block {block.name!r} does not compute what {intrin.name} does:"
        hint = f"write the block as {intrin.name} computes it, or take another instruction"
        raise refuse(func, "tensorize", node.var, f"{reason}\n{intrin.func.show()}\nbut", at=node, hint=hint)


def _check_strides(func: PrimFunc, node: For, loops: Sequence[For], block: Block, intrin: TensorIntrin) -> None:
    """Refuse unless every access moves through memory as that of the instruction does."""
    outer = loops_on(loop_path(func, node.var)[:-1])
    simplifier = Simplifier(loop_ranges((*outer, *loops)))
    given = _addresses(block, intrin, {it.var: b for it, b in zip(block.iters, block.bindings, strict=True)})
    wanted = {a.buffer: address(a, 0, len(a.indices)) for a in accesses(intrin.func.body)}
    for buffer, unsimplified in given.items():
        place = simplifier.simplify(unsimplified)  # one step on may be out of range: quotients go before it is taken
        for loop, theirs in zip(loops, intrin.loops, strict=True):
            step = _step(place, loop.var)
            right = _step(wanted[buffer], theirs.var)
            stride = Simplifier(loop_ranges(intrin.loops)).simplify(right)
            if not simplifier.prove_equal(step, stride):
                moves = print_expr(simplifier.simplify(step))
                reason = (
                    f"operand {buffer.name!r} of {intrin.name} moves by {print_expr(stride)} elements, here by {moves}"
                )
                hint = "sch.transform_layout and sch.cache_read bring operands into that order"
                raise refuse(func, "tensorize", loop.var, reason, at=node, hint=hint)


def _addresses(block: Block, intrin: TensorIntrin, env: dict[Var, Expr]) -> dict[Buffer, Expr]:
    """For each operand, its address within its buffer in terms of loops."""
    assert isinstance(block.body, Store)
    operands = intrin.operands(block.body)
    assert operands is not None
    found = {}
    for buffer, load in operands.items():
        indices = tuple(substitute_expr(index, env) for index in load.indices)
        found[buffer] = address(Access(load.buffer, indices, False, block), 0, len(indices))
    return found


def _step(place: Expr, var: Var) -> Expr:
    return substitute_expr(place, {var: var + const(1)}) - place
