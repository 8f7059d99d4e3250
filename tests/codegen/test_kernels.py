"""Compiled kernels compute what the tensor IR's interpreter computes, however they are scheduled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.machine import emit_object
from kedge.compiler.errors import CodegenError, ScheduleError
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.lower.program import Entry, Kernel, Port, Program, Slot, Step
from kedge.compiler.pipeline import compile_programs
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import (
    Binary,
    BinaryOp,
    Cast,
    Expr,
    Load,
    Var,
    binary,
    call,
    const,
    logical_and,
    select,
)  # fmt: skip
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import Buffer, For, PrimFunc, Seq, Store
from kedge.compiler.toolchain import link_shared
from kedge.rpc.artifact import Artifact
from support import functions
from support.compiled import opened

TARGETS = ("native", "x86-64", "x86-64-v3")
ELSEWHERE = (
    "raspberry-pi/4b", "raspberry-pi/2b", "beaglebone/black", "llvm -mtriple=armv7-linux-gnueabihf", "visionfive/2",
    "bananapi/f3", "aws/graviton3",
)  # fmt: skip
SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def as_scheduled(func: PrimFunc, target: str, cache: KernelCache) -> Artifact:
    """The artifact of a function exactly as it is, without any rule."""
    split = len(func.params) - func.n_outputs
    ports = [Port(b.name, TensorType(b.shape, b.dtype)) for b in func.params]
    slots = [Slot("input", p.type, i) for i, p in enumerate(ports[:split])]
    slots += [Slot("output", p.type, i) for i, p in enumerate(ports[split:])]
    step = Step("k", tuple(slots), func.symbols)
    entry = Entry("main", tuple(ports[:split]), tuple(ports[split:]), func.symbols, (step,), 0)
    program = Program({"k": Kernel(func, "none", {}, ())}, (entry,))
    return compile_programs(lambda _: program, target, "test", cache, None)


def check(
    func: PrimFunc, arrays: Sequence[np.ndarray[Any, Any]], target: str, cache: KernelCache, *,
    reference: PrimFunc | None = None, exact: bool = False, threads: int = 2,
) -> None:  # fmt: skip
    with np.errstate(all="ignore"):
        expected = interp.run(reference or func, arrays)
    artifact = as_scheduled(func, target, cache)
    names = [port.name for port in artifact.manifest.functions[0].inputs]
    with opened(artifact, threads) as module:
        got = module.run(dict(zip(names, arrays, strict=True)))
    for have, want in zip(got.values(), expected, strict=True):
        if exact or have.dtype.kind in "iub":
            np.testing.assert_array_equal(have, want)
        else:
            finite = np.abs(want[np.isfinite(want)].astype(np.float64))
            scale = max(1.0, float(finite.max(initial=0)))
            rough = 2e-3 if have.dtype == np.float16 else 2e-5
            np.testing.assert_allclose(have, want, rtol=rough, atol=rough * scale, equal_nan=True)


def compile_elsewhere(func: PrimFunc, data: st.DataObject) -> None:
    """Some other target's back end takes the function, too, and needs no library for it."""
    target = parse(data.draw(st.sampled_from(ELSEWHERE)))
    visible = emit_kernel(func, target, "k").ir.replace("define hidden", "define")  # else the linker drops it unseen
    link_shared([emit_object(visible, target)], target)


# Element-wise functions -----------------------------------------------------------------------------------------

_FLOAT_OPS: tuple[BinaryOp, ...] = ("add", "sub", "mul", "min", "max")
_INT_OPS: tuple[BinaryOp, ...] = ("add", "sub", "mul", "min", "max", "floordiv", "floormod", "truncdiv", "truncmod")
_COMPARE: tuple[BinaryOp, ...] = ("eq", "ne", "lt", "le", "gt", "ge")
_CALLS = ("exp", "tanh", "sigmoid", "abs", "floor", "ceil", "round", "erf", "sin", "cos", "sqrt", "log")


def float_exprs(leaves: st.SearchStrategy[Expr], ints: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def extend(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        compare = st.builds(Binary, st.sampled_from(_COMPARE), inner, inner)
        return st.one_of(
            st.builds(Binary, st.sampled_from(_FLOAT_OPS), inner, inner),
            st.builds(select, compare, inner, inner),
            st.builds(call, st.sampled_from(_CALLS), inner),
            st.builds(lambda a: Cast(a, "float32"), ints),
        )

    return st.recursive(leaves, extend, max_leaves=6)


@SETTINGS
@given(st.data(), st.sampled_from(TARGETS))
def test_elementwise(kernels: KernelCache, data: st.DataObject, target: str) -> None:
    m, n = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    free = data.draw(st.booleans())
    rows = Var("M", lower=1) if free else m
    x, b = te.placeholder((rows, n), "float32", "x"), te.placeholder((n,), "float32", "b")
    k = te.placeholder((rows, n), "int32", "k")

    def body(i: Expr, j: Expr) -> Expr:
        ints = st.sampled_from([k[i, j], Cast(j, "int32"), Cast(i * 3 + j, "int32")])
        leaves = st.one_of(
            st.sampled_from([x[i, j], b[j], x[i, n - 1 - j], x[i, j // 2]]),
            st.floats(-3, 3, width=32).map(lambda v: const(v, "float32")),
        )
        return data.draw(float_exprs(leaves, ints))

    func = te.create_prim_func([x, b, k, te.compute((rows, n), body, name="y")], "f")
    sch = Schedule(func)
    _random_schedule(sch, data)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = [rng.standard_normal((m, n)).astype("f"), rng.standard_normal(n).astype("f"),
              rng.integers(-9, 10, (m, n)).astype(np.int32)]  # fmt: skip
    special = data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30]), max_size=3))
    for value in special:
        arrays[0].flat[data.draw(st.integers(0, m * n - 1))] = value
    check(sch.func, arrays, target, kernels, reference=func)
    compile_elsewhere(sch.func, data)


def _random_schedule(sch: Schedule, data: st.DataObject) -> None:
    """Some legal splits and kinds of loops; what a primitive refuses is left out."""
    for block in ("y",):
        loops = list(sch.get_loops(sch.get_block(block)))
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(loops) - 1))
            action = data.draw(st.sampled_from(["split", "vectorize", "unroll", "parallel", "fuse", "reorder"]))
            try:
                if action == "split":
                    loops[at : at + 1] = sch.split(loops[at], [None, data.draw(st.sampled_from([2, 3, 4, 8, 16]))])
                elif action == "fuse" and at + 1 < len(loops):
                    loops[at : at + 2] = [sch.fuse(loops[at], loops[at + 1])]
                elif action == "reorder" and at + 1 < len(loops):
                    sch.reorder(loops[at + 1], loops[at])
                    loops[at], loops[at + 1] = loops[at + 1], loops[at]
                elif action in ("vectorize", "unroll", "parallel"):
                    getattr(sch, action)(loops[at])
            except ScheduleError:
                continue


@SETTINGS
@given(st.data(), st.sampled_from(TARGETS))
def test_integers(kernels: KernelCache, data: st.DataObject, target: str) -> None:
    dtype = data.draw(st.sampled_from(["int8", "uint8", "int16", "int32", "uint32", "int64"]))
    n = data.draw(st.integers(1, 35))
    x, y = te.placeholder((n,), dtype, "x"), te.placeholder((n,), dtype, "d")
    op = data.draw(st.sampled_from(_INT_OPS))
    literal = data.draw(st.sampled_from([1, 2, 3, 7, 8, 16]))
    by = data.draw(st.booleans())
    z = te.compute((n,), lambda i: Binary(op, x[i], const(literal, dtype) if by else y[i]), name="y")
    func = te.create_prim_func([x, y, z], "f")
    sch = Schedule(func)
    _random_schedule(sch, data)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    info = np.iinfo(dtype)
    low = info.min if op not in ("truncdiv", "truncmod", "floordiv", "floormod") else info.min + 1
    a = rng.integers(low, info.max, n, dtype=dtype, endpoint=True)
    d = rng.integers(1, 50, n).astype(dtype)
    if info.min < 0:
        d *= rng.choice(np.array([-1, 1], dtype), n)
    check(sch.func, [a, d], target, kernels, reference=func, exact=True)
    compile_elsewhere(sch.func, data)


@SETTINGS
@given(st.data(), st.sampled_from(TARGETS))
def test_casts(kernels: KernelCache, data: st.DataObject, target: str) -> None:
    dtypes = ["bool", "int8", "uint8", "int16", "int32", "int64", "uint32", "float16", "bfloat16", "float32", "float64"]
    source, to = data.draw(st.sampled_from(dtypes)), data.draw(st.sampled_from(dtypes))
    n = data.draw(st.integers(1, 33))
    x = te.placeholder((n,), source, "x")
    func = te.create_prim_func([x, te.compute((n,), lambda i: Cast(x[i], to), name="y")], "f")
    sch = Schedule(func)
    _random_schedule(sch, data)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    # C leaves the conversion of a float outside the integer's range open.
    low, high = (0, 100) if to.startswith("u") or source.startswith("u") else (-100, 100)
    values = rng.uniform(low, high, n) if "float" in source else rng.integers(low, high, n)
    check(sch.func, [values.astype(source)], target, kernels, reference=func, exact=to != "float16")
    compile_elsewhere(sch.func, data)


def test_float16_is_rounded_to_nearest_even_with_every_value_kept(kernels: KernelCache) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    x = te.placeholder((65536,), "float16", "x")
    wide = te.create_prim_func([x, te.compute((65536,), lambda i: Cast(x[i], "float32"), name="y")], "f")
    y = te.placeholder((65536,), "float32", "x")
    narrow = te.create_prim_func([y, te.compute((65536,), lambda i: Cast(y[i], "float16"), name="y")], "f")
    finite = every.astype(np.float32)
    rng = np.random.default_rng(0)
    between = (np.abs(rng.standard_normal(65536)) * np.exp2(rng.integers(-28, 18, 65536))).astype(np.float32)
    with np.errstate(invalid="ignore"):
        halves = np.where(np.isfinite(finite), finite * np.float32(1 + 2**-12), 0).astype(np.float32)
    for target in TARGETS:
        for func in (wide,):
            sch = Schedule(func)
            sch.vectorize(sch.split(sch.get_loops(sch.get_block("y"))[0], [None, 16])[1])
            check(sch.func, [every], target, kernels, exact=True)
        for data in (finite, between, halves):
            check(narrow, [data], target, kernels, exact=True)


# Reductions and tiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 10, 256), (250, 33, 17), (16, 64, 8), (5, 5, 5)])
def test_dense_by_the_default_rules(kernels: KernelCache, target: str, m: int, n: int, k: int) -> None:
    from kedge.compiler.pipeline import compile_prim_func

    for rows in (m, Var("M", lower=1)):
        func = functions.dense(rows, k, n)
        data = functions.inputs(functions.dense(m, k, n))
        expected = interp.run(func, data)
        artifact = compile_prim_func(func, target, cache=kernels)
        with opened(artifact, 2) as module:
            got = module.run(dict(zip(("x", "w", "b"), data, strict=True)))
        np.testing.assert_array_equal(got["z"], expected[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "func",
    [
        functions.conv(2, 3, 8, 5), functions.conv(1, 4, 9, 8, kernel=5, stride=2, pad=2), functions.pool(2, 3, 8),
        functions.mean(2, 5, 7), functions.transpose(13, 9), functions.chain(37), functions.bias_sigmoid(2, 3, 4, 5),
        functions.softmax(4, 10), functions.softmax(3, 100),
    ],
    ids=lambda func: func.name,
)  # fmt: skip
def test_kernels_with_and_without_a_schedule(kernels: KernelCache, target: str, func: PrimFunc) -> None:
    from kedge.compiler.schedule.default import schedule_func

    data = functions.inputs(func)
    check(func, data, target, kernels)
    check(schedule_func(func, parse(target)).func, data, target, kernels, reference=func)


def tiled_dense(
    m: int, n: int, k: int, rows: int, vectors: int, lanes: int, *, parallel: Mapping[str, Any] | None = None
) -> PrimFunc:
    """A register-tiled product, as a contraction rule makes it."""
    sch = Schedule(functions.dense(m, k, n, relu=False))
    block = sch.get_block("y")
    i, j, axis = sch.get_loops(block)
    i0, i1 = sch.split(i, [None, rows])
    j0, j1, j2 = sch.split(j, [None, vectors, lanes])
    sch.reorder(j0, i0, axis, i1, j1, j2)
    sch.cache_write(block, i0)
    sch.decompose_reduction(block, axis)
    for name in ("y_init", "y", "y_register"):
        loops = sch.get_loops(sch.get_block(name))
        sch.vectorize(loops[-1])
        sch.unroll(loops[-2])
        sch.unroll(loops[-3])
    if parallel is not None:
        sch.parallel(sch.get_loops(sch.get_block("y_register"))[0], **parallel)
    return sch.func


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(32, 64, 16), (33, 65, 17), (7, 5, 3), (250, 250, 64)])
@pytest.mark.parametrize("parallel", [None, {}, {"schedule": "dynamic", "chunk": 3}])
def test_register_tiles_with_tails(
    kernels: KernelCache, target: str, shape: tuple[int, int, int], parallel: Mapping[str, Any] | None
) -> None:
    m, n, k = shape
    func = tiled_dense(m, n, k, 4, 2, 8, parallel=parallel)
    check(func, functions.inputs(func), target, kernels, reference=functions.dense(m, k, n, relu=False), exact=True)


def test_the_inner_loop_of_a_tile_is_packed_fma_without_spills() -> None:
    from kedge.compiler.codegen.machine import emit_assembly

    target = parse("x86-64-v3")
    func = tiled_dense(252, 256, 256, 6, 2, 8)
    assembly = emit_assembly(emit_kernel(func, target, "k").ir, target)
    blocks = [block.split("\n\tj")[0].splitlines() for block in assembly.split("\n.L")]
    loop = max(blocks, key=lambda lines: sum("vfmadd" in line for line in lines))
    fused = [line for line in loop if "vfmadd" in line]
    assert len(fused) >= 12 and len(fused) % 12 == 0 and all("ymm" in line for line in fused)
    # Two vectors of w are loaded per step; nothing is stored, and nothing comes from the stack.
    moves = [line for line in loop if "vmov" in line]
    assert len(moves) <= len(fused) // 6 and all(line.split(",")[-1].strip().startswith("%ymm") for line in moves)
    assert not any("(%rsp" in line for line in loop)


# What the language promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", ["min", "max"])
def test_nan_wins_in_min_and_max(kernels: KernelCache, target: str, op: BinaryOp) -> None:
    n = 24
    x, y = te.placeholder((n,), "float32", "x"), te.placeholder((n,), "float32", "d")
    for other in (lambda i: y[i], lambda i: const(0.5, "float32")):
        z = te.compute((n,), lambda i, other=other: binary(op, x[i], other(i)), name="y")
        sch = Schedule(te.create_prim_func([x, y, z], "f"))
        sch.vectorize(sch.get_loops(sch.get_block("y"))[0])
        a, b = np.linspace(-1, 1, n).astype("f"), np.zeros(n, "f")
        a[3] = b[5] = a[9] = b[9] = np.nan
        check(sch.func, [a, b], target, kernels, exact=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("vectorize", [False, True])
def test_a_guarded_load_is_never_made(kernels: KernelCache, target: str, vectorize: bool) -> None:
    """The unguarded index is far outside the buffer: loading it would crash."""
    n = 40
    x = te.placeholder((n,), "float32", "x")
    far = const(1 << 34)
    y = te.compute((n,), lambda i: select(logical_and(i >= 3, i < 20), x[i], 1.0), name="y")
    z = te.compute((n,), lambda i: select(i < 7, x[i], select(i >= n, x[i + far], 2.0)), name="y")
    for tensor in (y, z):
        sch = Schedule(te.create_prim_func([x, tensor], "f"))
        if vectorize:
            sch.vectorize(sch.split(sch.get_loops(sch.get_block("y"))[0], [None, 16])[1])
        check(sch.func, [np.arange(n, dtype="f")], target, kernels, exact=True)


@pytest.mark.parametrize("extent", [100, 1000])
def test_a_long_vectorized_loop_is_cut_into_vectors(kernels: KernelCache, extent: int) -> None:
    free = Var("N", lower=1)
    for size in (extent, free):
        x = te.placeholder((size,), "float32", "x")
        sch = Schedule(te.create_prim_func([x, te.compute((size,), lambda i, x=x: x[i] * 2.0, name="y")], "f"))
        body = sch.func.body
        assert isinstance(body, For)
        # The primitive refuses symbolic extents; the back end takes them all the same.
        func = PrimFunc(
            "f", sch.func.params, 1, For(body.var, body.extent, "vectorized", body.body), (), sch.func.symbols
        )
        check(func, [np.arange(extent, dtype="f")], "native", kernels, exact=True)


def test_a_vectorized_loop_that_carries_a_value_runs_in_order(kernels: KernelCache) -> None:
    x, y = Buffer("x", (16,), "float32"), Buffer("y", (1,), "float32")
    i, zero = Var("i"), const(0)
    total = Store(y, (zero,), binary("add", Load(y, (zero,)), Load(x, (i,))))
    body = Seq((Store(y, (zero,), const(0.0, "float32")), For(i, const(16), "vectorized", total)))
    check(PrimFunc("f", (x, y), 1, body), [np.arange(16, dtype="f")], "native", kernels, exact=True)


def test_large_and_symbolic_buffers_come_from_the_workspace(kernels: KernelCache) -> None:
    n = Var("N", lower=1)
    for rows, count in ((300, 300), (n, 70)):
        x = te.placeholder((rows, 100), "float32", "x")
        t = te.compute((rows, 100), lambda i, j, x=x: x[i, j] + 1.0, name="t")
        y = te.compute((rows, 100), lambda i, j, t=t: t[i, 99 - j] * 2.0, name="y")
        func = te.create_prim_func([x, y], "f")
        assert emit_kernel(func, parse("native"), "k").needs_workspace
        data = np.arange(count * 100, dtype="f").reshape(count, 100)
        check(func, [data], "native", kernels, exact=True)


@pytest.mark.parametrize("columns", [4096, 9000])  # one of them fits on the stack, but not all; none does
def test_unrolled_iterations_use_the_same_memory_for_their_buffers(kernels: KernelCache, columns: int) -> None:
    x = te.placeholder((40, columns), "float32", "x")
    t = te.compute((40, columns), lambda i, j: x[i, j] + 1.0, name="t")
    y = te.compute((40, columns), lambda i, j: t[i, columns - 1 - j] * 2.0, name="y")
    func = te.create_prim_func([x, y], "f")
    sch = Schedule(func)
    rows, _ = sch.get_loops(sch.get_block("y"))
    sch.compute_at(sch.get_block("t"), rows)
    sch.unroll(rows)
    assert emit_kernel(sch.func, parse("native"), "k").workspace == (0 if columns == 4096 else 36032)
    data = np.arange(40 * columns, dtype="f").reshape(40, columns)
    with opened(as_scheduled(sch.func, "native", kernels)) as module:
        np.testing.assert_array_equal(module.run({"x": data})["y"], (data + 1)[:, ::-1] * 2)


def test_a_buffer_inside_a_parallel_loop_is_each_threads_own(kernels: KernelCache) -> None:
    rows, cols = 16, 9000  # more than the stack takes
    x, t, y = (
        Buffer("x", (rows, cols), "float32"),
        Buffer("t", (cols,), "float32"),
        Buffer("y", (rows, cols), "float32"),
    )
    i, j, k = Var("i"), Var("j"), Var("k")
    fill = For(j, const(cols), "serial", Store(t, (j,), Load(x, (i, j)) + 1.0))
    read = For(k, const(cols), "serial", Store(y, (i, k), Load(t, (const(cols - 1) - k,))))
    func = PrimFunc("f", (x, y), 1, For(i, const(rows), "parallel", Seq((fill, read))), (t,))
    data = np.arange(rows * cols, dtype="f").reshape(rows, cols)
    with opened(as_scheduled(func, "native", kernels), threads=2) as module:
        got = module.run({"x": data})["y"]
    np.testing.assert_array_equal(got, (data + 1)[:, ::-1])


def test_a_parallel_loop_whose_extent_depends_on_the_loops_around(kernels: KernelCache) -> None:
    func = parse_func("""func f(x: float32[4, n]) -> (y: float32[4, 4, n]) where n >= 1:
  alloc t: float32[n]
  for o in range(4):
    for i in parallel(4 - o):
      for j in range(n):
        t[j] = x[i, j] + 1.0
      for k in range(n):
        y[o, i, k] = t[n - 1 - k]
    for i in range(o):
      for k in range(n):
        y[o, 3 - i, k] = 0.0""")
    data = np.arange(4 * 70, dtype="f").reshape(4, 70)
    with opened(as_scheduled(func, "native", kernels), threads=2) as module:
        got = module.run({"x": data})["y"]
    np.testing.assert_array_equal(got, interp.run(func, [data])[0])
    unknown = func.show().replace("parallel(4 - o)", "parallel(min(4 * n - o * n, n * n - o * o * n))")
    with pytest.raises(CodegenError, match="no bound of that is known outside of the loops around"):
        emit_kernel(parse_func(unknown), parse("native"), "k")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("combine", [te.sum, te.prod, te.max, te.min], ids=lambda combine: combine.__name__)
def test_lanes_that_a_mask_leaves_out_keep_what_they_hold(kernels: KernelCache, target: str, combine: Any) -> None:
    """Partial results of a reduction, one in each lane: the last vector is not full, and all lanes are read after."""
    x, k = te.placeholder((4, 13), "float32", "x"), te.reduce_axis(13, "k")
    func = te.create_prim_func([x, te.compute((4,), lambda i: combine(x[i, k], k), name="y")], "f")
    for scope in ("global", "local", "register"):
        sch = Schedule(func)
        block = sch.get_block("y")
        _, lane = sch.split(sch.get_loops(block)[-1], [None, 8])
        parts = sch.rfactor(block, lane)
        sch.set_scope(parts, scope)
        sch.vectorize(sch.get_loops(parts)[-1])
        for sign in (-1.0, 1.0):
            data = [(sign * np.linspace(1, 3, 52)).astype("f").reshape(4, 13)]
            check(sch.func, data, target, kernels, reference=func)


def test_lanes_beyond_a_row_are_another_threads(kernels: KernelCache) -> None:
    """An array that parallel iterations fill together: a vector's idle lanes lie in the next row."""
    x = te.placeholder((64, 13), "float32", "x")
    y = te.compute((64, 13), lambda i, j: x[i, j] * 2.0, name="y")
    z = te.compute((64, 13), lambda i, j: y[i, j] + y[63 - i, 12 - j], name="z")
    sch = Schedule(te.create_prim_func([x, z], "f"))
    row, column = sch.get_loops(sch.get_block("y"))
    _, lane = sch.split(column, [None, 8])
    sch.vectorize(lane)
    sch.parallel(row)
    text = emit_kernel(sch.func, parse("native"), "f").ir
    body = text[text.index(".body(") :]
    assert "masked.store" in body or "masked.scatter" in body
    data = np.arange(64 * 13, dtype="f").reshape(64, 13)
    with opened(as_scheduled(sch.func, "native", kernels), threads=2) as module:
        got = module.run({"x": data})["z"]
    np.testing.assert_array_equal(got, (data + data[::-1, ::-1]) * 2)


def test_quotients_by_free_sizes_are_computed_once() -> None:
    """A load and a store of four elements of one fused loop: a row and a column for each."""
    h, w = Var("h", lower=1), Var("w", lower=1)
    x = te.placeholder((w, h), "float32", "x")
    sch = Schedule(te.create_prim_func([x, te.compute((h, w), lambda i, j: x[j, i], name="y")], "turned"))
    fused = sch.fuse(*sch.get_loops(sch.get_block("y")))
    sch.unroll(sch.split(fused, [None, 4])[1])
    ir = emit_kernel(sch.func, parse("native"), "k").ir
    assert ir.count("sdiv") == 2 * (2 * 4)  # in whole tiles, and in the last


def test_gather_by_data(kernels: KernelCache) -> None:
    x, k = te.placeholder((50, 8), "float32", "x"), te.placeholder((12,), "int64", "k")
    y = te.compute((12, 8), lambda i, j: x[k[i], j], name="y")
    z = te.compute((8, 12), lambda j, i: x[k[i], j], name="y")
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((50, 8)).astype("f"), rng.integers(0, 50, 12)]
    for tensor in (y, z):
        func = te.create_prim_func([x, k, tensor], "f")
        check(func, data, "native", kernels, exact=True)
        sch = Schedule(func)
        sch.vectorize(sch.get_loops(sch.get_block("y"))[1])
        check(sch.func, data, "native", kernels, exact=True)


def test_strided_loads_stay_inside_the_buffer(kernels: KernelCache) -> None:
    """Every second element, up to the very last one of the buffer, which ends a page."""
    import mmap

    lanes, page = 16, mmap.PAGESIZE
    n = page // 4
    x = te.placeholder((n,), "float32", "x")
    y = te.compute((n // 2,), lambda i: x[i * 2 + 1], name="y")
    sch = Schedule(te.create_prim_func([x, y], "f"))
    sch.vectorize(sch.split(sch.get_loops(sch.get_block("y"))[0], [None, lanes])[1])
    check(sch.func, [np.arange(n, dtype="f")], "native", kernels, exact=True)
    ir = emit_kernel(sch.func, parse("native"), "k").ir
    assert "shufflevector" in ir and "insertelement" not in ir


# Refusals -------------------------------------------------------------------------------------------------------


def test_a_loop_bound_to_a_gpu_axis_is_refused() -> None:
    x, y = Buffer("x", (4,), "float32"), Buffer("y", (4,), "float32")
    i = Var("i")
    func = PrimFunc("f", (x, y), 1, For(i, const(4), "thread", Store(y, (i,), Load(x, (i,))), "threadIdx.x"))
    with pytest.raises(CodegenError, match=r"threadIdx\.x"):
        emit_kernel(func, parse("native"), "k")


def test_an_unknown_dtype_is_refused() -> None:
    x, y = Buffer("x", (4,), "complex64"), Buffer("y", (4,), "complex64")
    func = PrimFunc("f", (x, y), 1, Seq(()))
    with pytest.raises(CodegenError, match="complex64"):
        emit_kernel(func, parse("native"), "k")
