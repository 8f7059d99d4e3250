"""Which private buffers may be written beyond the conditions of their lanes."""

import numpy as np
import pytest

from kedge.compiler.codegen.alloc import Alloc
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.unread import writes_freely
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.te import compute, create_prim_func, placeholder, reduce_axis
from kedge.compiler.te import sum as te_sum
from kedge.compiler.tir.expr import Expr, Load, Var, const
from kedge.compiler.tir.stmt import Buffer, For, If, Seq, Stmt, Store
from support.compiled import opened

J, K, N = (Var(name, "int64") for name in "jkn")
TILE = Buffer("t", (16,), "float32", scope="register")
Y = Buffer("y", (64,), "float32")


def lanes(body: Stmt, var: Var = J) -> For:
    return For(var, const(16), "vectorized", body)


def store(to: Buffer, index: Expr, value: Expr, when: Expr | None = None) -> Stmt:
    made = Store(to, (index,), value)
    return made if when is None else If(when, made)


def tile(written: Expr | None, read: Expr | None, reader: Expr = J) -> Alloc:
    """A tile that is set, stored to under one condition, and read under another."""
    body = (
        lanes(store(TILE, J, const(0.0, "float32"))),
        For(K, const(4), "serial", lanes(store(TILE, J, const(1.0, "float32"), written))),
        lanes(store(Y, J, Load(TILE, (reader,)), read)),
    )
    return Alloc(TILE, Seq(body))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (J < 10, J < 10),
        (J < N, J < N),
        (None, None),
        (None, J < 10),
        (K < 3, None),
        (const(10) > J, J < 10),
        (J + 1 < 10, J < 9),
        (N * 16 + J >= 3, J + N * 16 >= 3),  # as at the beginning of a row that begins within a tile
    ],
)
def test_stores_leave_out_what_nothing_reads(written, read):
    assert writes_freely(tile(written, read))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (J < 10, None),
        (J < 10, J < 12),
        (J < K, J < K),  # another bound at each access
        (J + K < 10, J + K < 10),
        (Load(Y, (J,)) < 0.5, J < 10),  # what data decides
        (J * 2 < 10, J < 10),
        (J < 10, N < 10),
    ],
)
def test_stores_keep_what_something_may_read(written, read):
    assert not writes_freely(tile(written, read))


def test_the_condition_is_on_the_element_that_is_read():
    assert not writes_freely(tile(J < 10, J < 10, reader=15 - J))


def test_what_the_other_branch_stores_is_kept():
    both = If(J < 10, store(TILE, J, const(1.0, "float32")), store(TILE, J, const(2.0, "float32")))
    body = Seq((lanes(both), lanes(store(Y, J, Load(TILE, (J,)), J < 10))))
    assert not writes_freely(Alloc(TILE, body))


@pytest.mark.parametrize("shape", [(8, 16, 40), (9, 7, 33), (3, 5, 17)])
def test_sums_of_the_last_columns_need_no_blend(shape):
    """And infinities beyond them harm nobody."""
    m, k, n = shape
    a, b, axis = placeholder((m, k), "float32", "a"), placeholder((k, n), "float32", "b"), reduce_axis(k, "k")
    func = create_prim_func(
        [a, b, compute((m, n), lambda i, j: te_sum(a[i, axis] * b[axis, j], axis), name="c")], "product"
    )
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    x[1, 2] = np.inf
    sch = Schedule(func)
    block = sch.get_block("c")
    i, j, kk = sch.get_loops(block)
    j_0, j_1 = sch.split(j, [None, 16])
    sch.reorder(i, j_0, kk, j_1)
    copy = sch.cache_write(block, j_0, "register")
    init = sch.decompose_reduction(block, kk)
    for each in (block, init, copy):
        sch.vectorize(sch.get_loops(each)[-1])

    text = emit_kernel(sch.func, parse("x86-64-v4"), "product").ir
    assert "masked.load" in text and " select <16 x i1>" not in text
    with np.errstate(invalid="ignore"):
        want = x @ w
    with opened(compile_prim_func(sch, "native"), threads=1) as model:
        np.testing.assert_allclose(model.run({"a": x, "b": w})["c"], want, rtol=1e-5)
