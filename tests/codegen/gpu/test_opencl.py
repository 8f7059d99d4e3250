"""Functions on an OpenCL device, scheduled by hand and by the rule: each computes what the interpreter does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse_cpu
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Expr, Var, const, maximum, select
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.toolchain import build_runtime
from kedge.rpc.client.inprocess import open_in_process
from support import opencl
from support.functions import chain, conv, dense

Check = Callable[..., None]
N = Var("n", lower=0)


@pytest.fixture
def check(kernels: KernelCache) -> Check:
    """`check(schedule, before, inputs…)`: one program, run for each of the inputs and compared."""
    opencl.require()

    def run(source: PrimFunc | Schedule, before: PrimFunc, *runs: Mapping[str, Any], rtol: float = 1e-5) -> None:
        artifact = compile_prim_func(source, "opencl", cache=kernels)
        names = [buffer.name for buffer in before.params]
        with open_in_process(artifact, build_runtime(parse_cpu("native")).lib, device="opencl") as model:
            for inputs in runs:
                got = model.run(inputs)
                want = interp.run(before, list(inputs.values()))
                for name, expected in zip(names[len(names) - before.n_outputs :], want, strict=True):
                    np.testing.assert_allclose(got[name], expected, rtol=rtol, atol=1e-5, err_msg=name)

    return run


def loops(sch: Schedule, block: str) -> Any:
    return sch.get_loops(sch.get_block(block))


def whole(*shape: int, dtype: str = "float32") -> Any:
    """Whole numbers, whose sums are exact."""
    return np.random.default_rng(0).integers(-4, 5, shape).astype(dtype)


def test_the_example_of_tvm(check: Check) -> None:
    a = te.placeholder((N,), "float32", "A")
    sch = Schedule(te.create_prim_func([a, te.compute((N,), lambda i: a[i] * 2.0, name="B")], "main"))
    before = sch.func
    outer, inner = sch.split(loops(sch, "B")[0], factors=[None, 64])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")
    check(sch, before, *({"A": whole(n)} for n in (0, 1, 63, 64, 65, 1000)))


#: No powers of two, and some, below and above the number of threads.
LENGTHS = (1, 2, 3, 5, 31, 32, 33, 100, 255, 256, 257, 511, 777, 1000)


def reductions(dtype: str) -> Schedule:
    """Each row's sum, smallest and largest value (and product, of signs), by 64 threads in turns."""
    x = te.placeholder((3, N), dtype, "x")
    low, high = const(-1, dtype) if signed(dtype) else const(1, dtype), const(1, dtype)

    def of(name: str, combine: Callable[..., Expr]) -> Any:
        k = te.reduce_axis(N, "k")

        def value(i: Expr) -> Expr:
            return select(x[i, k] < const(0, dtype), low, high) if name == "product" else x[i, k]

        return te.compute((3,), lambda i: combine(value(i), k), name=name)

    outputs = [of("total", te.sum), of("least", te.min), of("most", te.max), of("product", te.prod)]
    sch = Schedule(te.create_prim_func([x, *outputs], f"reductions_{dtype}"))
    for output in outputs:
        row, k = loops(sch, output.name)
        turn, thread = sch.split(k, [None, 64])
        sch.reorder(thread, turn)
        sch.bind(row, "blockIdx.x")
        sch.bind(thread, "threadIdx.x")
    return sch


def signed(dtype: str) -> bool:
    return not dtype.startswith("u")


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "float16"])
def test_reductions_by_threads(dtype: str, check: Check) -> None:
    sch = reductions(dtype)
    values = {n: whole(3, n) for n in LENGTHS}
    check(sch, sch.func, *({"x": (x if signed(dtype) else abs(x)).astype(dtype)} for x in values.values()))


def test_rows_side_by_side(check: Check) -> None:
    """Several thread axes: sixteen rows of a group, each by eight threads; tails in both directions."""
    x, k = te.placeholder((N, 37), "float32", "x"), te.reduce_axis(37, "k")
    sch = Schedule(te.create_prim_func([x, te.compute((N,), lambda i: te.sum(x[i, k], k), name="y")], "rows"))
    before = sch.func
    row, k = loops(sch, "y")
    group, inner = sch.split(row, [None, 16])
    turn, thread = sch.split(k, [None, 8])
    sch.reorder(group, inner, thread, turn)
    sch.bind(group, "blockIdx.x")
    sch.bind(inner, "threadIdx.y")
    sch.bind(thread, "threadIdx.x")
    check(sch, before, *({"x": whole(n, 37)} for n in (0, 1, 15, 16, 17, 100)))


@pytest.mark.parametrize("columns", [2, 7, 256, 1000])
def test_softmax(columns: int, tutorial: dict[str, Any], check: Check) -> None:
    sch = tutorial["softmax"](5, columns)
    check(sch, sch.func, {"x": np.random.default_rng(1).standard_normal((5, columns), np.float32)})


def test_tiles_with_tails(tutorial: dict[str, Any], check: Check) -> None:
    """A size that is no multiple of the tile of 128 x 128; OpenCL compiles the kernel for seven seconds."""
    check(tutorial["tiles"](200), tutorial["product"](200), {"a": whole(200, 200), "b": whole(200, 200)})


def test_parts_of_a_sum(tutorial: dict[str, Any], check: Check) -> None:
    sch = tutorial["row_sums_by_parts"](3, 512)
    check(sch, sch.func, {"x": whole(3, 512)})


def test_several_kernels_hand_on_through_the_workspace(check: Check) -> None:
    sch = Schedule(chain(N))
    before = sch.func
    for name in ("a", "b", "c"):
        outer, inner = sch.split(loops(sch, name)[0], [None, 32])
        sch.bind(outer, "blockIdx.x")
        sch.bind(inner, "threadIdx.x")
    check(sch, before, *({"x": whole(n)} for n in (0, 1, 33, 500)))


def test_a_loop_of_the_host_starts_a_kernel_in_each_iteration(check: Check) -> None:
    """A running sum over rows: each launch needs the one before."""
    text = """func f(x: float32[n, 8]) -> (y: float32[8]) where n >= 0:
  for j in thread(8, 'threadIdx.x'):
    block clear:
      vj = spatial(8, j)
      writes y[vj]
      y[vj] = 0.0
  for i in range(n):
    for j in thread(8, 'threadIdx.x'):
      block add:
        vi = reduce(n, i)
        vj = spatial(8, j)
        reads x[vi, vj], y[vj]
        writes y[vj]
        y[vj] = y[vj] * 0.5 + x[vi, vj]"""
    func = parse_func(text)
    check(func, func, *({"x": whole(n, 8)} for n in (0, 1, 6)))


def test_virtual_threads_and_conditions(check: Check) -> None:
    x = te.placeholder((50,), "float32", "x")
    y = te.compute((60,), lambda i: select(i < 50, maximum(x[i], 0.0), -1.0), name="y")
    sch = Schedule(te.create_prim_func([x, y], "padded"))
    before = sch.func
    group, virtual, thread = sch.split(loops(sch, "y")[0], [None, 2, 8])
    sch.bind(group, "blockIdx.z")
    sch.bind(virtual, "vthread.x")
    sch.bind(thread, "threadIdx.z")
    check(sch, before, {"x": whole(50)})


@pytest.mark.parametrize("name", ["dense", "conv", "argument", "single", "none"])
def test_the_rule_schedules_every_function(name: str, check: Check) -> None:
    """Also one whose block is no update, one of no loops, and one over nothing."""
    argument = parse_func(
        """func argmax(x: float32[n, m]) -> (best: float32[n], at: int64[n]) where n >= 1, m >= 1:
  for i in range(n):
    for k in range(m):
      block both:
        vi = spatial(n, i)
        vk = reduce(m, k)
        reads x[vi, vk], best[vi]
        writes best[vi], at[vi]
        init:
          best[vi] = -inf
          at[vi] = 0
        if x[vi, vk] > best[vi]:
          best[vi] = x[vi, vk]
          at[vi] = vk"""
    )
    rng = np.random.default_rng(0)
    scalar = te.placeholder((), "float32", "x")
    single = te.create_prim_func([scalar, te.compute((), lambda: scalar[()] + 1.0, name="y")], "single")
    nothing = te.placeholder((0, 3), "float32", "x")
    none = te.create_prim_func([nothing, te.compute((0, 3), lambda i, j: nothing[i, j] + 1.0, name="y")], "none")
    cases: dict[str, tuple[PrimFunc, list[dict[str, Any]]]] = {
        "dense": (dense(N, 5, 6), [{"x": whole(n, 5), "w": whole(5, 6), "b": whole(6)} for n in (1, 50)]),
        "conv": (conv(2, 3, 5, 4), [{"x": whole(2, 3, 5, 5), "w": whole(4, 3, 3, 3), "b": whole(4)}]),
        "argument": (argument, [{"x": rng.standard_normal(shape, np.float32)} for shape in ((1, 1), (9, 20))]),
        "single": (single, [{"x": np.float32(2).reshape(())}]),
        "none": (none, [{"x": np.zeros((0, 3), np.float32)}]),
    }  # fmt: skip
    func, runs = cases[name]
    check(func, func, *runs)
