"""Prefetching: no result changes, and the instruction stands there once for each cache line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from schedule.test_blocks import refused

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.alloc import Prefetch, statements_of
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.machine import emit_assembly
from kedge.compiler.codegen.prefetch import prefetches, spread
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.errors import VerifyError
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Expr, Var, const
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.simplify import simplify
from kedge.compiler.tir.stmt import For, PrimFunc, Stmt
from kedge.compiler.tir.structural import equal
from kedge.compiler.tir.verify import verify
from kedge.compiler.tir.visitor import free_vars, substitute_expr
from support.compiled import opened
from support.functions import chain, dense, inputs


def product() -> tuple[Schedule, BlockRef, tuple[LoopRef, ...]]:
    """A product that walks down the rows of `w`, 32 columns at a time, and its loops."""
    sch = Schedule(dense(Var("m", lower=1), 24, 64))
    z = sch.get_block("y")
    i, j, k = sch.get_loops(z)
    outer, inner = sch.split(j, [None, 32])
    sch.reorder(i, outer, k, inner)
    sch.vectorize(inner)
    return sch, z, (i, outer, k, inner)


def scaled(n: int, dtype: str = "float32") -> Schedule:
    x = te.placeholder((n,), dtype, "x")
    return Schedule(te.create_prim_func([x, te.compute((n,), lambda i: x[i] * 2, name="y")], "f"))


def calls(func: PrimFunc, target: str) -> int:
    """How often the code of a kernel prefetches."""
    return emit_kernel(func, parse(target), "k").ir.count("call void @llvm.prefetch")


def test_golden(golden) -> None:
    sch, z, (_, _, k, _) = product()
    sch.prefetch(z, "w", k, 6)
    golden("prefetch.txt", sch.show())


def test_replays_and_reads_back() -> None:
    sch, z, (i, _, k, _) = product()
    sch.prefetch(z, "w", k, 6)
    sch.prefetch(z, "x", i, 1)
    sch.prefetch(z, "w", k, 4)  # the last one counts
    assert sch.show().count("# prefetch={'w': 4}") == 1
    assert equal(Schedule.replay(dense(Var("m", lower=1), 24, 64), sch.trace).func, sch.func)
    assert equal(parse_func(sch.show()), sch.func)


@pytest.mark.parametrize(
    ("target", "mnemonic"),
    [("x86-64", "prefetcht1"), ("raspberry-pi/4b", "prfm\tpldl2keep"), ("raspberry-pi/2b", "pld\t")],
)
def test_the_instruction_is_there(target: str, mnemonic: str) -> None:
    sch, z, (_, _, k, _) = product()
    assert mnemonic not in emit_assembly(emit_kernel(sch.func, parse(target), "k").ir, parse(target))
    sch.prefetch(z, "w", k, 6)
    assert mnemonic in emit_assembly(emit_kernel(sch.func, parse(target), "k").ir, parse(target))


def test_one_for_each_line() -> None:
    """32 floats of a row are two lines, or three where they begin within one; rows of `x` follow one another."""
    sch, z, (i, _, k, _) = product()
    sch.prefetch(z, "w", k, 6)
    assert calls(sch.func, "x86-64-v3") == 3
    sch.prefetch(z, "x", i, 2)
    assert calls(sch.func, "x86-64-v3") == 5


def test_every_line_is_asked_for_wherever_a_row_begins() -> None:
    """A row of 48 columns in three vectors is in three lines or four: these and no others, four times at most."""
    sch = Schedule(dense(5, 24, 96))
    z = sch.get_block("y")
    i, j, k = sch.get_loops(z)
    outer, vectors, inner = sch.split(j, [None, 3, 16])
    sch.reorder(i, outer, k, vectors, inner)
    sch.prefetch(z, "w", k, 6)
    (asked,) = (ahead for loop in loops(prepare(sch.func)) for ahead in prefetches(loop))
    columns = [column for row, column in places(asked, {}) if row == 6]
    assert len(columns) == len(list(places(asked, {}))) == 4
    for begin in range(16):
        assert {(begin + column) // 16 for column in columns} == {(begin + column) // 16 for column in range(48)}


def loops(stmt: Stmt) -> Iterator[For]:
    if isinstance(stmt, For):
        yield stmt
    for child in statements_of(stmt):
        yield from loops(child)


def places(stmt: Stmt, at: dict[Var, Expr]) -> Iterator[tuple[int, ...]]:
    """The elements that prefetches name, other loops being at their first iteration."""
    match stmt:
        case For():
            for value in range(int(simplify(stmt.extent).value)):
                yield from places(stmt.body, {**at, stmt.var: const(value)})
        case Prefetch():
            indices = [substitute_expr(index, at) for index in stmt.indices]
            first = [substitute_expr(index, dict.fromkeys(free_vars(index), const(0))) for index in indices]
            yield tuple(int(simplify(index).value) for index in first)
        case _:
            for child in statements_of(stmt):
                yield from places(child, at)


@pytest.mark.parametrize(("dtype", "line"), [("float32", 16), ("float64", 8), ("bfloat16", 32)])
def test_a_loop_within_a_line_prefetches_where_one_begins(dtype: str, line: int) -> None:
    sch = scaled(256, dtype)
    y = sch.get_block("y")
    inner = sch.split(sch.get_loops(y)[0], [None, 64])[1]
    sch.unroll(inner)
    sch.prefetch(y, "x", inner, 128)
    assert calls(sch.func, "x86-64-v3") == 64 // line


def test_long_rows_are_a_loop_over_lines() -> None:
    x = te.placeholder((8, 4096), "float32", "x")
    sch = Schedule(te.create_prim_func([x, te.compute((8, 4096), lambda i, j: x[i, j] * 2, name="y")], "f"))
    y = sch.get_block("y")
    sch.prefetch(y, "x", sch.get_loops(y)[0], 1)
    assert calls(sch.func, "x86-64") == 1


@pytest.mark.parametrize("offset", [1, 7, 2**31 - 1])
def test_results_stay_the_same(offset: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Far past the end, too."""
    sch, z, (i, outer, k, _) = product()
    func, data = sch.func, inputs(dense(5, 24, 64))
    for loop in (i, outer, k):
        for buffer in ("x", "w"):
            sch.prefetch(z, buffer, loop, offset)
    for one in (sch.func, func):
        np.testing.assert_array_equal(interp.run(one, data)[0], interp.run(dense(5, 24, 64), data)[0])
    results = []
    for one in (sch, Schedule(func)):
        artifact = compile_prim_func(one, parse("native"), cache=KernelCache(tmp_path))
        with opened(artifact, 1) as module:
            results.append(module.run(dict(zip(("x", "w", "b"), data, strict=True)))["z"])
    np.testing.assert_array_equal(*results)


def test_what_an_iteration_has_for_itself_is_not_asked_for(tmp_path: Path) -> None:
    func = chain(64)
    sch = Schedule(func)
    a, b, c = (sch.get_block(name) for name in "abc")
    (i,) = sch.get_loops(c)
    outer, _ = sch.split(i, [None, 16])
    sch.compute_at(b, outer)
    sch.compute_at(a, outer)
    sch.prefetch(c, "b", outer, 1)
    assert calls(sch.func, "x86-64") == 0
    sch.prefetch(c, "x", outer, 1)
    assert calls(sch.func, "x86-64") > 0
    (x,) = inputs(func)
    with opened(compile_prim_func(sch, "native", cache=KernelCache(tmp_path))) as module:
        np.testing.assert_array_equal(module.run({"x": x})["c"], interp.run(func, [x])[0])


def test_refusals() -> None:
    sch, z, (_, _, k, inner) = product()
    other = sch.get_loops(sch.get_block("z"))[0]
    before = sch.func
    for call, *words in [
        (lambda: sch.prefetch(z, "v", k, 4), "block 'y' does not read 'v'", "it reads"),
        (lambda: sch.prefetch(z, "w", other, 4), "it is not around block 'y'", "it takes one of"),
        (lambda: sch.prefetch(z, "w", k, 0), "offset=0 is not between 1"),
        (lambda: sch.prefetch(z, "w", inner, 4), "it is vectorized", "serial or unrolled"),
        (
            lambda: sch.annotate(k, "prefetch", {"w": 4}),
            "key='prefetch' is what sch.prefetch writes",
            "call sch.prefetch",
        ),
    ]:
        refused(call, "", *words)
        assert sch.func is before
    cached = Schedule(dense(4, 24, 64))
    y = cached.get_block("y")
    cached.cache_read(y, "w", cached.get_loops(y)[1], "local")
    k = cached.get_loops(y)[2]
    refused(lambda: cached.prefetch(y, "w_local", k, 1), "prefetch", "'w_local' is local", "what it is filled from")


def test_places_that_depend_on_data_are_refused() -> None:
    x, at = te.placeholder((64,), "float32", "x"), te.placeholder((64,), "int64", "at")
    sch = Schedule(te.create_prim_func([x, at, te.compute((64,), lambda i: x[at[i]], name="y")], "f"))
    y = sch.get_block("y")
    (i,) = sch.get_loops(y)
    refused(lambda: sch.prefetch(y, "x", i, 8), "prefetch", "depends on data")
    sch.prefetch(y, "at", i, 8)
    assert calls(sch.func, "x86-64") == 1


def test_what_would_take_a_prefetch_away_is_refused() -> None:
    sch, z, (_, _, k, _) = product()
    sch.prefetch(z, "w", k, 6)
    before = sch.func
    i, outer = sch.get_loops(z)[:2]
    for call, *words in [
        (
            lambda: sch.split(k, [None, 2]),
            "split(loop 'k'",
            "it prefetches 'w', and would be gone",
            "split before sch.pre",
        ),
        (lambda: sch.cache_read(z, "w", i, "local"), "cache_read(loop 'k'", "nothing in it reads 'w'"),
    ]:
        refused(call, *words)
        assert sch.func is before
    sch.decompose_reduction(z, outer)
    sch.unroll(k)
    assert "prefetch={'w': 6}" in sch.show()


@pytest.mark.parametrize("ahead", ["{'v': 4}", "{'x': 0}", "{'x': True}", "4"])
def test_text_that_cannot_be_is_refused(ahead: str) -> None:
    text = scaled(16).show().replace("range(16):", f"range(16):  # prefetch={ahead}")
    with pytest.raises(VerifyError, match="prefetch"):
        verify(parse_func(text))


def panels(
    rows: int = 6, depth: int = 12, width: int = 48, dtype: str = "float32"
) -> tuple[Schedule, BlockRef, LoopRef]:
    """A product whose panels all rows go over, one after the other, and the loop over panels."""
    x, w = te.placeholder((rows, depth), dtype, "x"), te.placeholder((3, depth, width), dtype, "w")
    k = te.reduce_axis(depth, "k")
    y = te.compute((rows, 3 * width), lambda i, j: te.sum(x[i, k] * w[j // width, k, j % width], k), name="y")
    sch = Schedule(te.create_prim_func([x, w, y], "f"))
    ref = sch.get_block("y")
    i, j, k = sch.get_loops(ref)
    panel, lane = sch.split(j, [None, width])
    sch.reorder(panel, i, k, lane)
    sch.vectorize(lane)
    return sch, ref, panel


def asked(stmt: Stmt, at: dict[Var, Expr]) -> Iterator[tuple[int, ...]]:
    """The elements that prefetches name, in all iterations of all loops."""
    match stmt:
        case For(kind="vectorized"):
            return
        case For():
            for value in range(int(simplify(stmt.extent).value)):
                yield from asked(stmt.body, {**at, stmt.var: const(value)})
        case Prefetch():
            yield tuple(int(simplify(substitute_expr(index, at)).value) for index in stmt.indices)
        case _:
            for child in statements_of(stmt):
                yield from asked(child, at)


@pytest.mark.parametrize(
    ("rows", "depth", "width", "dtype", "line", "most"),
    [
        (6, 12, 48, "float32", 16, 72),  # half a line in each of 72 iterations
        (1, 12, 48, "float32", 16, 36),  # no rows share: three lines in each
        (2, 12, 48, "float32", 16, 48),  # one and a half: two, and the end is reached early
        (50, 3, 16, "float32", 16, 150),  # less than an element in each
        (5, 7, 24, "float64", 8, 35),
    ],
)
def test_the_iterations_inside_share_out_what_the_next_one_reads(rows, depth, width, dtype, line, most) -> None:
    """All of its lines, and no others; none asks for much at once."""
    sch, y, panel = panels(rows, depth, width, dtype)
    sch.prefetch(y, "w", panel, 1, spread=True)
    (loop,) = (loop for loop in loops(prepare(sch.func)) if "spread" in loop.annotations)
    found = list(asked(spread(loop), {loop.var: const(0)}))
    assert {number for number, _, _ in found} == {1}
    places = [row * width + column for _, row, column in found]
    assert {place // line for place in places} == set(range(depth * width // line))
    assert len(places) <= most
    assert calls(sch.func, "x86-64-v4") == -(-depth * width // line // (rows * depth))


def test_what_does_not_lie_together_is_shared_out_row_by_row() -> None:
    sch = Schedule(dense(5, 24, 64))
    z = sch.get_block("y")
    i, j, k = sch.get_loops(z)
    outer, inner = sch.split(j, [None, 32])
    sch.reorder(outer, i, k, inner)
    sch.vectorize(inner)
    sch.prefetch(z, "w", outer, 1, spread=True)
    (loop,) = (loop for loop in loops(prepare(sch.func)) if "spread" in loop.annotations)
    found = list(asked(spread(loop), {loop.var: const(0)}))
    assert {(row, column // 16) for row, column in found} == {(row, line) for row in range(24) for line in (2, 3)}
    assert {column % 16 for _, column in found} == {15}  # a row may begin within a line, and ends in one more then


def test_golden_of_a_share(golden) -> None:
    sch, y, panel = panels()
    sch.parallel(panel)
    sch.prefetch(y, "w", panel, 1, spread=True)
    golden("prefetch_spread.txt", sch.show())
    assert equal(parse_func(sch.show()), sch.func)


@pytest.mark.parametrize("parallel", [False, True])
def test_shares_change_no_result(parallel, tmp_path: Path) -> None:
    sch, y, panel = panels()
    plain = sch.func
    if parallel:
        sch.parallel(panel)
    sch.prefetch(y, "w", panel, 2**31 - 1, spread=True)
    sch.prefetch(y, "w", panel, 1, spread=True)  # the last one counts
    assert sch.show().count("spread={'w': 1}") == 1
    assert calls(sch.func, "x86-64") == 1
    data = inputs(plain)
    results = []
    for one in (sch, Schedule(plain)):
        with opened(compile_prim_func(one, parse("native"), cache=KernelCache(tmp_path)), 2) as module:
            results.append(module.run(dict(zip(("x", "w"), data, strict=True)))["y"])
    np.testing.assert_array_equal(*results)


def test_what_cannot_be_shared_out_is_refused() -> None:
    sch, y, panel = panels()
    i, k, lane = sch.get_loops(y)[1:]
    sch.prefetch(y, "w", panel, 1, spread=True)
    for call, *words in [
        (lambda: sch.prefetch(y, "w", lane, 1, spread=True), "it is vectorized", "serial or parallel"),
        (lambda: sch.prefetch(y, "w", k, 1, spread=True), "no serial loop is inside of it", "without spread=True"),
        (lambda: sch.annotate(i, "spread", {"w": 1}), "what sch.prefetch writes", "call sch.prefetch"),
        (lambda: sch.split(panel, [None, 2]), "it prefetches 'w', and would be gone", "before sch.prefetch"),
    ]:
        refused(call, "", *words)
    free = Schedule(dense(Var("m", lower=1), 24, 64))
    z = free.get_block("y")
    i, j, _ = free.get_loops(z)
    free.reorder(j, i)
    refused(lambda: free.prefetch(z, "w", j, 1, spread=True), "prefetch", "no known number of iterations")
    text = sch.show().replace("spread={'w': 1}", "spread={'v': 1}")
    with pytest.raises(VerifyError, match="nothing in it reads"):
        verify(parse_func(text))
