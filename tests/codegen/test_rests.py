"""What steps leave of a sum comes after the loop over them: the meaning stays, and the loop asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kedge.compiler import te
from kedge.compiler.codegen.alloc import statements_of
from kedge.compiler.codegen.prepare import lower_blocks, prepare
from kedge.compiler.codegen.rests import split_rests
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.expr import Dim, Var
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import simplify_stmt
from kedge.compiler.tir.stmt import For, If, PrimFunc, Stmt
from kedge.compiler.tir.visitor import free_vars
from support.prepared import assert_prepared

K = Var("k", lower=1)


def product(rows: int, depth: Dim, columns: int = 4) -> PrimFunc:
    """y = x @ w."""
    x, w = te.placeholder((rows, depth), "float32", "x"), te.placeholder((depth, columns), "float32", "w")
    axis = te.reduce_axis(depth, "d")
    y = te.compute((rows, columns), lambda i, j: te.sum(x[i, axis] * w[axis, j], axis), name="y")
    return te.create_prim_func([x, w, y], "product")


def tile(func: PrimFunc, rows: int, steps: int, *, unroll: bool = True) -> PrimFunc:
    """Tiles of rows in registers, some steps of the sum at once."""
    sch = Schedule(func)
    block = sch.get_block("y")
    i, j, k = sch.get_loops(block)
    i0, i1 = sch.split(i, [None, rows])
    k0, k1 = sch.split(k, [None, steps])
    sch.reorder(i0, k0, k1, i1, j)
    made = [block, sch.cache_write(block, i0, "register")]
    made.append(sch.decompose_reduction(block, k0))
    if unroll:
        sch.unroll(k1)
    for each in made:
        own, lanes = sch.get_loops(each)[-2:]
        sch.unroll(own)
        sch.vectorize(lanes)
    return sch.func


def named(stmt: Stmt, name: str) -> Iterator[For]:
    """The loops over variables of that name."""
    if isinstance(stmt, For) and stmt.var.name == name:
        yield stmt
    for child in statements_of(stmt):
        yield from named(child, name)


def asks(stmt: Stmt) -> set[str]:
    """The variables that conditions in a statement depend on."""
    own = {var.name for var in free_vars(stmt.condition)} if isinstance(stmt, If) else set()
    return own.union(*(asks(child) for child in statements_of(stmt)))


@pytest.mark.parametrize(
    ("depth", "left", "kind"), [(77, 5, "unrolled"), (12, 4, "unrolled"), (11, 3, "serial"), (33, 1, "serial")]
)
def test_the_rest_is_after_the_whole_steps(depth: int, left: int, kind: str) -> None:
    body = prepare(tile(product(8, depth), 4, 8))
    loops, steps = (list(named(body, name)) for name in ("d_0", "d_1"))
    assert [print_expr(loop.extent) for loop in loops] == [str(depth // 8)]
    assert [(step.kind, print_expr(step.extent)) for step in steps] == [("unrolled", "8"), (kind, str(left))]
    assert not asks(body)


def test_tiles_at_the_edge_have_versions_of_their_own() -> None:
    """Of 33 rows in tiles of 4 the last has one, which is known where rows are unrolled."""
    body = prepare(tile(product(33, 77), 4, 4))
    assert [asks(loop) for loop in named(body, "d_0")] == [set(), {"i_1"}]


def test_a_free_sum_has_a_loop_over_its_rest() -> None:
    body = prepare(tile(product(4, K), 4, 4))
    (loop,), (whole, rest) = (list(named(body, name)) for name in ("d_0", "d_1"))
    assert (print_expr(loop.extent), print_expr(rest.extent), rest.kind) == ("k // 4", "k % 4", "serial")
    assert whole.kind == "unrolled" and not asks(body)


@pytest.mark.parametrize("rows", [1, 8, 11])
@pytest.mark.parametrize("depth", [2, 3, 4, 9, 16, 23])
@pytest.mark.parametrize("free", [False, True])
def test_the_meaning_stays(rows: int, depth: int, free: bool) -> None:
    func = product(rows, K if free else depth)
    assert_prepared(tile(func, 4, 4), func, {"k": depth} if free else {})


def lowered(func: PrimFunc) -> Stmt:
    return simplify_stmt(lower_blocks(func.body))


def test_other_loops_stay() -> None:
    """Steps not unrolled, steps that divide, sums that may have less than none, stores that depend on the step."""
    for func in (
        tile(product(8, 10), 4, 4, unroll=False), tile(product(8, 12), 4, 4), tile(product(8, K - 2), 4, 4)
    ):  # fmt: skip
        body = lowered(func)
        assert split_rests(body) is body
    x = te.placeholder((10,), "float32", "x")
    sch = Schedule(te.create_prim_func([x, te.compute((10,), lambda i: x[i] + 1.0, name="y")], "map"))
    _, inner = sch.split(sch.get_loops(sch.get_block("y"))[0], [None, 4])
    sch.unroll(inner)
    body = lowered(sch.func)
    assert split_rests(body) is body


@pytest.mark.parametrize("depth", [77, 11])
def test_the_steps_of_a_rest_are_counted_by_a_variable_of_their_own(depth: int) -> None:
    """What is worked out for positions of 8 steps, and kept by their expressions, is not taken for those of 5."""
    loops = list(named(split_rests(lowered(tile(product(8, depth), 4, 8))), "d_1"))
    assert {loop.var: print_expr(loop.extent) for loop in loops} == {loops[0].var: "8", loops[1].var: str(depth % 8)}
    assert len(loops) == 2
