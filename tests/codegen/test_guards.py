"""What conditions hold back is not read: elements that do not exist, or that other threads write."""

from collections.abc import Callable

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.address import Pointer
from kedge.compiler.codegen.builder import ModuleBuilder, Value
from kedge.compiler.codegen.kernel import KernelEmitter, emit_kernel
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Expr, Load, Var, select
from kedge.compiler.tir.stmt import Buffer, If, Store
from support.compiled import opened

#: An element so far away that reading it ends the process.
FAR = 2_000_000_000

Guard = Callable[[Load, Expr], Expr]
#: The value of an element from `m` (above 0 only in element 0) and the element at `FAR * i`, there only for `i == 0`.
GUARDED: dict[str, Guard] = {
    "and": lambda m, far: select(te.logical_and(m > 0.0, far > -9.0), 1.0, 0.0),
    "or": lambda m, far: select(te.logical_or(m <= 0.0, far > -9.0), 1.0, 0.0),
    "second and": lambda m, far: select(te.logical_and(m < 9.0, m > 0.0, far > -9.0), 1.0, 0.0),
    "and of an or": lambda m, far: select(te.logical_and(te.logical_or(m <= 0.0, far > 5.0), m < 2.0), 1.0, 0.0),
    "one side only under a condition": lambda m, far: select(m <= 0.0, select(m > 1.0, far, 3.0), far),
    "choice only under a condition": lambda m, far: select(select(m > 0.0, far, 3.0) > 2.0, 5.0, far),
}


@pytest.mark.parametrize(("target", "vectorize"), [("native", False), ("native", True), ("x86-64", True)])
@pytest.mark.parametrize("what", GUARDED)
def test_what_a_condition_keeps_from_being_read_is_not_read(what, target, vectorize, tmp_path):
    x, m = te.placeholder((4,), "float32", "x"), te.placeholder((16,), "float32", "m")
    y = te.compute((16,), lambda i: GUARDED[what](m[i], x[i * FAR]), name="y")
    func = te.create_prim_func([x, m, y], "guarded")
    sch = Schedule(func)
    if vectorize:
        sch.vectorize(sch.get_loops(sch.get_block("y"))[0])
    data = [np.ones(4, "float32"), np.eye(1, 16, dtype="float32")[0]]
    (want,) = interp.run(func, data)
    with opened(compile_prim_func(sch, target, cache=KernelCache(tmp_path))) as model:
        got = model.run({"x": data[0], "m": data[1]})
    np.testing.assert_array_equal(got["y"], want)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_guarded_neighbour_in_a_buffer_of_the_compilers_own(vectorize, tmp_path):
    """LLVM knows how long that is, and takes code that surely reads in front of it for code that never runs."""
    x = te.placeholder((2,), "float32", "x")
    t = te.compute((2,), lambda i: x[i] + 1.0, name="t")
    y = te.compute((2,), lambda i: select(te.logical_and(i >= 1, t[i - 1] > 0.0), t[i - 1], t[i]), name="y")
    func = te.create_prim_func([x, y], "neighbour")
    sch = Schedule(func)
    if vectorize:
        sch.vectorize(sch.get_loops(sch.get_block("y"))[0])
    data = np.array([3, 5], "float32")
    with opened(compile_prim_func(sch, "x86-64", cache=KernelCache(tmp_path))) as model:
        np.testing.assert_array_equal(model.run({"x": data})["y"], [4, 4])


def test_addresses_outside_of_a_buffer_make_no_promise():
    """`x + i` is beyond the end of `x` where only `x + i - 4` is read."""
    x = te.placeholder((8,), "float32", "x")
    y = te.compute((12,), lambda i: select(i >= 4, x[i - 4], 0.0), name="y")
    code = emit_kernel(te.create_prim_func([x, y], "late"), parse("x86-64"), "k").ir
    assert "getelementptr float, ptr %arg0, i64 %i" in code
    assert "getelementptr inbounds float" not in code


@pytest.mark.parametrize(
    ("wide", "narrow"), [("int16", "uint8"), ("int32", "int8"), ("int32", "int16"), ("int64", "int32")]
)
def test_a_tail_of_one_narrow_element_leaves_its_neighbours_alone(wide, narrow, tmp_path):
    """Rows of 9 elements in vectors of 8; what comes first of the next row was written before."""
    x = te.placeholder((9, 6), wide, "x")
    y = te.compute((6, 9), lambda i, j: te.cast(x[j, i], narrow), name="y")
    sch = Schedule(te.create_prim_func([x, y], "narrow"))
    rows, columns = sch.get_loops(sch.get_block("y"))
    tiles, lanes = sch.split(columns, [None, 8])
    sch.reorder(tiles, rows, lanes)
    sch.vectorize(lanes)
    sch.unroll(tiles)
    data = -np.arange(1, 55, dtype=wide).reshape(9, 6)
    with opened(compile_prim_func(sch, "native", cache=KernelCache(tmp_path))) as model:
        np.testing.assert_array_equal(model.run({"x": data})["y"], data.T.astype(narrow))


def test_what_holds_under_a_condition_is_not_known_after_it():
    """Under `n < 32` the quotient `n // 16` is at most 1: the value is used again after that, where it may be 5."""
    n = Var("n", lower=0, upper=95)
    out = Buffer("out", (6,), "int64")
    emitter = KernelEmitter(ModuleBuilder(parse("x86-64")), "limits")
    emitter.bind_symbol(n, Value("%arg.s0", "i64"))
    emitter.pointers[out] = Pointer("%arg0", 8)
    quotient = emitter.index(n // 16)
    assert quotient.bounds(emitter.known) == (0, 5)
    emitter.stmt(If(n < 32, Store(out, (n // 16,), n)))
    assert quotient.bounds(emitter.known) == (0, 5)
