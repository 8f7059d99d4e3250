"""Tiles in versions: what is left in the loops that count, and that nothing changes its meaning."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.alloc import expressions_of, print_prepared, statements_of
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Dim, Expr, Select, Var, logical_and, select
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.stmt import For, If, PrimFunc, Stmt
from kedge.compiler.tir.visitor import free_vars, walk_expr
from support import functions
from support.prepared import assert_compiled, assert_prepared

N = Var("n", lower=1)


def concat(rows: Dim, *columns: int) -> PrimFunc:
    """Matrices side by side."""
    parts = [te.placeholder((rows, size), "float32", f"x{number}") for number, size in enumerate(columns)]

    def element(i: Expr, j: Expr) -> Expr:
        start, value = sum(columns[:-1]), parts[-1][i, j - sum(columns[:-1])]
        for part, size in zip(reversed(parts[:-1]), reversed(columns[:-1]), strict=True):
            start -= size
            value = select(j < start + size, part[i, j - start], value)
        return value

    return te.create_prim_func([*parts, te.compute((rows, sum(columns)), element, name="y")], "concat")


def pad(n: Dim, size: int) -> PrimFunc:
    """One row and column of zeros around an image."""
    x = te.placeholder((n, size, size), "float32", "x")

    def element(b: Expr, h: Expr, w: Expr) -> Expr:
        inside = logical_and(h >= 1, h < size + 1, w >= 1, w < size + 1)
        return select(inside, x[b, h - 1, w - 1], 0.0)

    return te.create_prim_func([x, te.compute((n, size + 2, size + 2), element, name="y")], "pad")


def slices(n: Dim, size: int) -> PrimFunc:
    """Every second column from the second on, every third row."""
    x = te.placeholder((n, size), "float32", "x")
    y = te.compute(((n + 2) // 3, size // 2), lambda i, j: x[i * 3, j * 2 + 1], name="y")
    return te.create_prim_func([x, y], "slices")


def scheduled(func: PrimFunc, target: str = "native") -> PrimFunc:
    return schedule_func(func, parse(target)).func


CASES: dict[str, tuple[PrimFunc, dict[str, int]]] = {
    "concat": (concat(N, 40, 50), {"n": 3}),
    "concat_three": (concat(2, 33, 20, 48), {}),
    "pad": (pad(N, 62), {"n": 1}),
    "slices": (slices(N, 70), {"n": 7}),
    "dense": (functions.dense(37, 5, 41), {}),
    "dense_free": (functions.dense(N, 13, 41), {"n": 11}),
    "dense_free_wide": (functions.dense(N, 13, 100), {"n": 11}),
    "conv": (functions.conv(1, 2, 11, 8, stride=2), {}),
    "pool": (functions.pool(N, 2, 26), {"n": 1}),
    "transpose": (functions.transpose(37, 41), {}),
}


@pytest.mark.parametrize("name", ["concat", "pad", "dense"])
def test_golden(golden: Callable[[str, str], None], name: str) -> None:
    func = scheduled(CASES[name][0], "aws/graviton3")
    golden(f"versions_{name}.txt", print_prepared(func, prepare(func)))


@pytest.mark.parametrize("name", CASES)
def test_versions_compute_the_same(kernels: KernelCache, name: str) -> None:
    func, symbols = CASES[name]
    assert_prepared(scheduled(func), func, symbols)
    assert_compiled(scheduled(func), func, symbols, kernels)


def below(stmt: Stmt) -> Iterator[Stmt]:
    """The statement and all in it."""
    yield stmt
    for child in statements_of(stmt):
        yield from below(child)


def fast(stmt: Stmt) -> Iterator[Stmt]:
    """The statements of the versions that most tiles take: the first of each choice."""
    yield stmt
    children = statements_of(stmt)
    for child in children[:1] if isinstance(stmt, If) and stmt.orelse is not None else children:
        yield from fast(child)


@pytest.mark.parametrize("name", ["concat", "concat_three", "pad", "dense_free"])
def test_no_condition_is_left_in_the_loops_that_count(name: str) -> None:
    """But the comparison between versions, and masks of a tail that all tiles have."""
    body = prepare(scheduled(CASES[name][0], "aws/graviton3"))
    inner = [stmt for stmt in fast(body) if isinstance(stmt, For) and stmt.kind == "vectorized"]
    assert inner
    for loop in inner:
        exprs = [expr for stmt in fast(loop) for expr in expressions_of(stmt)]
        nodes = [node for expr in exprs for node in walk_expr(expr)]
        assert not any(isinstance(node, Select) for node in nodes), print_prepared(CASES[name][0], loop)
        if name != "dense_free":
            assert not any(isinstance(stmt, If) for stmt in fast(loop))


def test_a_tail_of_columns_does_not_keep_rows_from_running_whole() -> None:
    """41 columns never fill three vectors, so that mask stays; 37 rows fill all tiles but the last."""
    sch = Schedule(functions.dense(37, 5, 41, relu=False))
    i, j, k = sch.get_loops(sch.get_block("y"))
    i0, i1 = sch.split(i, [None, 4])
    j0, j1, j2 = sch.split(j, [None, 3, 16])
    sch.reorder(i0, j0, k, i1, j1, j2)
    for loop in (i1, j1):
        sch.unroll(loop)
    sch.vectorize(j2)
    whole = print_prepared(sch.func, prepare(sch.func)).split("else:")[0]
    assert "< 41" in whole
    assert "< 37" not in whole


def test_a_tail_of_columns_does_not_keep_free_rows_from_versions_of_their_own() -> None:
    """Tiles of 6 x 64 of (n, 64) times (64, 100): neither tail asks for the number of rows in a step of the sum."""
    body = prepare(scheduled(functions.dense(N, 64, 100), "llvm -mtriple=x86_64-linux-gnu -mcpu=znver4"))
    sums = [stmt for stmt in below(body) if isinstance(stmt, For) and stmt.kind == "serial"]
    assert len(sums) == 6 * 2
    conditions = [each.condition for stmt in sums for each in below(stmt) if isinstance(each, If)]
    assert not any(N in free_vars(condition) for condition in conditions)


def test_large_tiles_are_not_copied_for_a_choice() -> None:
    x = te.placeholder((1024, 16), "float32", "x")
    y = te.compute((1024, 16), lambda i, j: select(i < 512, x[i, j], 0.0), name="y")
    sch = Schedule(te.create_prim_func([x, y], "f"))
    i, _ = sch.get_loops(sch.get_block("y"))
    sch.unroll(sch.split(i, [None, 512])[1])
    assert "if" not in print_prepared(sch.func, prepare(sch.func))


def test_versions_of_masked_loads_load_whole_vectors() -> None:
    """A core without masked loads would go lane by lane."""
    code = emit_kernel(scheduled(CASES["pad"][0], "raspberry-pi/4b"), parse("raspberry-pi/4b"), "k").ir
    assert "load <4 x float>" in code


@pytest.mark.parametrize("seed", range(12))
def test_random_choices(seed: int) -> None:
    """Conditions with various bounds, over split and fused loops."""
    rng = random.Random(seed)
    size = rng.randrange(20, 60)
    x = te.placeholder((3, size), "float32", "x")

    def element(i: Expr, j: Expr) -> Expr:
        bounds = [
            rng.choice([j < rng.randrange(size), j >= rng.randrange(size), i < rng.randrange(3)]) for _ in range(3)
        ]
        near = select(logical_and(*bounds[: rng.randrange(1, 3)]), x[i, j], x[i, size - 1 - j])
        return select(bounds[2], near, x[2 - i, j])

    func = te.create_prim_func([x, te.compute((3, size), element, name="y")], "f")
    sch = Schedule(func)
    i, j = sch.get_loops(sch.get_block("y"))
    if rng.random() < 0.5:
        j = sch.fuse(i, j)
    outer, inner = sch.split(j, [None, rng.choice([4, 8, 16])])
    if rng.random() < 0.5:
        sch.unroll(sch.split(outer, [None, 2])[1])
    if rng.random() < 0.7:
        sch.vectorize(inner)
    assert_prepared(sch.func, func, {})


def test_conditions_of_data_are_let_be() -> None:
    func = parse_func(
        "func f(x: int64[64]) -> (y: int64[64]):\n"
        "  for i in range(64):\n"
        "    for j in vectorized(1):\n"
        "      y[i] = select(x[i] < 5, x[i], x[63 - i])"
    )
    assert "if" not in print_prepared(func, prepare(func))
    assert_prepared(func, func, {})


def tiled(m: Dim, n: int, rows: int, lanes: int, *, block: int = 1) -> tuple[PrimFunc, PrimFunc]:
    """A product as it is, and in register tiles, by blocks of tiles of rows."""
    func = functions.dense(m, 5, n, relu=False)
    sch = Schedule(func)
    i, j, k = sch.get_loops(sch.get_block("y"))
    i0, i1, i2 = sch.split(i, [None, block, rows])
    j0, j1, j2 = sch.split(j, [None, 2, lanes])
    sch.reorder(i0, j0, i1, k, i2, j1, j2)
    sch.cache_write(sch.get_block("y"), i1, "register")
    sch.decompose_reduction(sch.get_block("y"), k)
    for block_name in ("y", "y_init", "y_register"):
        *_, i2, j1, j2 = sch.get_loops(sch.get_block(block_name))
        sch.unroll(i2)
        sch.unroll(j1)
        sch.vectorize(j2)
    return func, sch.func


def conditions(stmt: Stmt) -> list[str]:
    """What is asked inside of tiles."""
    found = [print_expr(stmt.condition)] if isinstance(stmt, If) and stmt.orelse is None else []
    return found + [each for child in statements_of(stmt) for each in conditions(child)]


def test_the_last_tile_is_a_smaller_one() -> None:
    """11 rows of tiles of 4 leave 3, 21 columns of 16 leave 5, and no loop variable around tiles is asked for."""
    _, func = tiled(11, 21, 4, 8)
    asked = conditions(prepare(func))
    assert {term for each in asked for term in each.split(" and ")} == {"i_2 < 3", "j_1 * 8 + j_2 < 5"}


def test_a_free_number_of_rows_has_a_version_for_each_rest() -> None:
    _, func = tiled(N, 16, 4, 8)
    assert set(conditions(prepare(func))) == {f"i_2 < {rows}" for rows in (1, 2, 3)}


@pytest.mark.parametrize("seed", range(20))
def test_random_tiles(kernels: KernelCache, seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1, 40)
    rows, lanes, block = rng.randrange(2, 9), rng.choice([4, 8]), rng.randrange(1, 4)
    reference, func = tiled(rng.choice([size, N]), rng.randrange(2, 40), rows, lanes, block=block)
    symbols = {"n": size} if func.symbols else {}
    assert_prepared(func, reference, symbols)
    if seed % 4 == 0:
        assert_compiled(func, reference, symbols, kernels)


def test_conditions_that_no_tile_fulfils_are_told_apart(kernels: KernelCache) -> None:
    x = te.placeholder((4, 1), "float32", "x")
    k = te.reduce_axis(1, "k")
    func = te.create_prim_func([x, te.compute((4,), lambda i: te.sum(x[i, k], k), name="y")], "sums")
    sch = Schedule(func)
    loop = sch.get_loops(sch.get_block("y"))[1]
    outer = sch.split(loop, [None, 2, 2])[0]  # three of four iterations are idle, of the inner ones and of the outer
    sch.split(outer, [None, 2, 2])
    assert_prepared(sch.func, func, {})
    assert_compiled(sch.func, func, {}, kernels)
