"""Entries and the descriptor: read back through the ABI's Python mirror, and called with frames made by hand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen import shapes
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.errors import CodegenError
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.lower.program import Entry, Kernel, Port, Program, Slot, Step
from kedge.compiler.package import pack_weights
from kedge.compiler.pipeline import compile_kernels, compile_objects
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Binary, Dim, Expr, Var, as_expr, const
from kedge.compiler.toolchain import link_shared
from kedge.compiler.workers import Workers
from kedge.rpc import abi
from support import functions

LOOP = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
POOL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, LOOP, ctypes.c_void_p, ctypes.c_int64)
MARK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
DYNAMIC_POOL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, LOOP, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
OK, CANCELLED = 0, 7


def two_steps() -> Program:
    """t = x @ w with x [N, 4] and w a weight, then y = (t + 1) * 2 + t by way of a kernel with a workspace."""
    n = Var("N", lower=1, upper=1000)
    x, w = te.placeholder((n, 4), "float32", "x"), te.placeholder((4, 3), "float32", "w")
    k = te.reduce_axis(4, "k")
    product = te.create_prim_func(
        [x, w, te.compute((n, 3), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="t")], "product"
    )  # fmt: skip
    m = Var("M", lower=1)
    t = te.placeholder((m, 3), "float32", "t")
    a = te.compute((m, 3), lambda i, j: t[i, j] + 1.0, name="a")
    chain = te.create_prim_func([t, te.compute((m, 3), lambda i, j: a[i, j] * 2.0 + t[i, j], name="y")], "chain")
    sch = Schedule(product)
    sch.parallel(sch.get_loops(sch.get_block("t"))[0])
    x_type, t_type = TensorType((n, 4), "float32"), TensorType((n, 3), "float32")
    arena = Slot("arena", t_type, 0, 64)
    steps = (
        Step("product", (Slot("input", x_type), Slot("weight", TensorType((4, 3), "float32"), 1), arena), (n,)),
        Step("chain", (arena, Slot("output", t_type)), (n,)),
    )
    size = Binary("add", Binary("mul", n, const(64)), const(64))
    entry = Entry("twice", (Port("x", x_type),), (Port("y", t_type),), (n,), steps, size)
    weights = {"unused": np.zeros(3, np.float32), "w": np.arange(12, dtype=np.float32).reshape(4, 3)}
    kernels = {"product": Kernel(sch.func, "none", {}, ()), "chain": Kernel(chain, "none", {}, ())}
    return Program(kernels, (entry,), weights)


class Loaded:
    """A lib.so opened with nothing but dlopen, and frames for its first function."""

    def __init__(self, program: Program, folder: Path, cache: KernelCache) -> None:
        target = parse("native")
        self.weights = pack_weights(program.weights)
        path = folder / "lib.so"
        with Workers() as workers:
            made = compile_kernels(program, target, cache, workers)
        path.write_bytes(link_shared(compile_objects(program, target, self.weights, made, cache), target))
        self.library = ctypes.CDLL(str(path))
        self.module = abi.ModuleDesc.in_dll(self.library, "kedge_module")
        self.function = self.module.functions[0].contents
        self.cancel = ctypes.c_int32(0)
        self.marks: list[int] | None = None

    def call(
        self,
        x: np.ndarray[Any, Any],
        pool: Callable[..., int] | None = None,
        dynamic_pool: Callable[..., int] = lambda *_: 99,
    ) -> tuple[int, np.ndarray[Any, Any]]:
        out = np.full((len(x), 3), 77, np.float32)
        size = evaluate(self.function.arena_size, len(x))
        guard = 4096
        memory = np.full(size + 64 + guard, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64
        data = np.frombuffer(self.weights.data, np.uint8)[self.weights.data_offset :].copy()
        room = np.zeros(len(data) + 64, np.uint8)
        at = -room.ctypes.data % 64
        room[at : at + len(data)] = data
        symbols = (ctypes.c_int64 * 1)(len(x))
        inputs, outputs = (ctypes.c_void_p * 1)(x.ctypes.data), (ctypes.c_void_p * 1)(out.ctypes.data)
        entry = pool or (lambda frame, body, closure, extent: body(closure, 0, extent))
        keep = POOL(entry), DYNAMIC_POOL(dynamic_pool)
        functions = (ctypes.cast(each, ctypes.c_void_p).value for each in keep)
        api = abi.RuntimeApi(ctypes.sizeof(abi.RuntimeApi), *functions)
        mark = MARK(lambda frame, number: self.marks.append(number) if self.marks is not None else None)
        api.mark = ctypes.cast(mark, ctypes.c_void_p).value
        fields = (ctypes.c_uint64 * 10)(
            80, ctypes.addressof(api), 0, ctypes.addressof(inputs), ctypes.addressof(outputs),
            ctypes.addressof(symbols), memory.ctypes.data + start, room.ctypes.data + at, ctypes.addressof(self.cancel),
            0 if self.marks is None else ctypes.addressof(symbols),
        )  # fmt: skip
        address = ctypes.cast(self.function.entry, ctypes.c_void_p).value
        status = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(address)(ctypes.addressof(fields))
        assert (memory[start + size :] == 0xA5).all(), "written beyond the arena"
        return status, out


def evaluate(expr: Any, n: int) -> int:
    program = tuple((op.opcode, op.value) for op in expr.ops[: expr.n_ops])
    return int(functions.evaluate(as_expr(shapes.decode(program, [const(n)])), {}))


@pytest.fixture
def loaded(tmp_path: Path, kernels: KernelCache) -> Loaded:
    return Loaded(two_steps(), tmp_path, kernels)


def test_the_descriptor_says_what_is_inside(loaded: Loaded) -> None:
    module, function = loaded.module, loaded.function
    assert (module.magic, module.abi_version) == (0x4547444B, abi.ABI_VERSION)
    assert module.struct_size == ctypes.sizeof(abi.ModuleDesc)
    assert (module.device_type, module.n_kernels, bool(module.kernels)) == (abi.DEVICE_CPU, 0, False)
    assert function.struct_size == ctypes.sizeof(abi.FunctionDesc)
    assert module.target.decode() == str(parse("native"))
    assert module.features.decode().split(",") == list(parse("native").required_features)
    assert [module.weights[i].name.decode() for i in range(module.n_weights)] == ["unused", "w"]
    assert [(w.offset % 64, w.size) for w in module.weights[:2]] == [(0, 12), (0, 48)]
    assert module.weights_size == loaded.weights.data_size
    assert function.name == b"twice" and (function.n_inputs, function.n_outputs, function.n_symbols) == (1, 1, 1)
    assert function.n_steps == 2
    port, symbol = function.inputs[0], function.symbols[0]
    assert port.name == b"x" and port.ndim == 2 and (port.dtype.code, port.dtype.bits, port.dtype.lanes) == (2, 32, 1)
    assert [evaluate(port.shape[i], 9) for i in range(2)] == [9, 4]
    assert (symbol.name, symbol.lower, symbol.upper, symbol.input, symbol.dim) == (b"N", 0, 1000, 0, 0)


@pytest.mark.parametrize("n", [1, 5, 1000])
def test_steps_run_in_order_inside_the_arena_they_asked_for(loaded: Loaded, n: int) -> None:
    x = np.random.default_rng(n).integers(-4, 5, (n, 4)).astype(np.float32)
    status, y = loaded.call(x)
    t = x @ np.arange(12, dtype=np.float32).reshape(4, 3)
    assert status == OK
    np.testing.assert_array_equal(y, (t + 1) * 2 + t)


def test_a_workspace_that_an_empty_batch_makes_less_than_none_takes_nothing_of_the_arena(
    tmp_path: Path, kernels: KernelCache
) -> None:
    program = two_steps()
    (entry,) = program.entries
    (n,) = entry.symbols
    steps = (entry.steps[0], replace(entry.steps[1], symbols=((n - 1) * 10,)))
    loaded = Loaded(replace(program, entries=(replace(entry, steps=steps),)), tmp_path, kernels)
    assert loaded.function.symbols[0].lower == 0
    assert evaluate(loaded.function.arena_size, 0) == 64
    assert evaluate(loaded.function.arena_size, 3) == 256 + 256  # 10 * 2 rows of 3 floats, aligned


def test_marks_are_made_around_every_step_where_there_are_any(loaded: Loaded) -> None:
    x = np.ones((4, 4), np.float32)
    status, plain = loaded.call(x)
    loaded.marks = []
    status, y = loaded.call(x)
    assert (status, loaded.marks) == (OK, [0, 1, 2])
    np.testing.assert_array_equal(y, plain)
    loaded.marks = []
    loaded.cancel.value = 1
    assert (loaded.call(x)[0], loaded.marks) == (CANCELLED, [0])


def test_a_cancelled_call_ends_before_the_next_kernel(loaded: Loaded) -> None:
    x = np.ones((4, 4), np.float32)
    loaded.cancel.value = 1
    status, y = loaded.call(x)
    assert status == CANCELLED and (y == 77).all()
    loaded.cancel.value = 0

    def cancelling(frame: int, body: Any, closure: int, extent: int) -> int:
        loaded.cancel.value = 1
        return int(body(closure, 0, extent))

    status, y = loaded.call(x, cancelling)
    assert status == CANCELLED and (y == 77).all()


def test_a_failed_parallel_loop_is_the_entrys_status(loaded: Loaded) -> None:
    status, y = loaded.call(np.ones((4, 4), np.float32), lambda *_: 8)
    assert status == 8 and (y == 77).all()


def test_iterations_may_come_in_any_pieces_and_order(loaded: Loaded) -> None:
    x = np.random.default_rng(0).integers(-4, 5, (11, 4)).astype(np.float32)

    def backwards(frame: int, body: Any, closure: int, extent: int) -> int:
        return max(body(closure, i, i + 1) for i in reversed(range(extent)))

    np.testing.assert_array_equal(loaded.call(x, backwards)[1], loaded.call(x)[1])


def doubled_rows(parallel: Callable[[Schedule, LoopRef], None]) -> Program:
    """y = x * 2 for x [N, 3], with the loop over rows made parallel."""
    n = Var("N", lower=1)
    x = te.placeholder((n, 3), "float32", "x")
    sch = Schedule(te.create_prim_func([x, te.compute((n, 3), lambda i, j: x[i, j] * 2.0, name="y")], "f"))
    parallel(sch, sch.get_loops(sch.get_block("y"))[0])
    kind = TensorType((n, 3), "float32")
    step = Step("f", (Slot("input", kind), Slot("output", kind)), (n,))
    entry = Entry("f", (Port("x", kind),), (Port("y", kind),), (n,), (step,), 0)
    return Program({"f": Kernel(sch.func, "none", {}, ())}, (entry,))


def test_dynamic_chunks_are_asked_of_the_runtime(tmp_path: Path, kernels: KernelCache) -> None:
    loaded = Loaded(doubled_rows(lambda sch, loop: sch.parallel(loop, "dynamic", chunk=4)), tmp_path, kernels)
    calls: list[tuple[int, int]] = []

    def in_chunks(frame: int, body: Any, closure: int, extent: int, chunk: int) -> int:
        calls.append((extent, chunk))
        return max(body(closure, i, min(i + chunk, extent)) for i in reversed(range(0, extent, chunk)))

    status, y = loaded.call(np.ones((10, 3), np.float32), dynamic_pool=in_chunks)
    assert status == OK and (y == 2).all()
    assert calls == [(10, 4)]
    status, y = loaded.call(np.ones((10, 3), np.float32), dynamic_pool=lambda *_: CANCELLED)
    assert status == CANCELLED and (y == 77).all()


def test_a_loop_below_its_grain_stays_on_the_calling_thread(tmp_path: Path, kernels: KernelCache) -> None:
    def from_ten(sch: Schedule, loop: LoopRef) -> None:
        sch.parallel(loop)
        sch.annotate(loop, "grain", 10)

    loaded = Loaded(doubled_rows(from_ten), tmp_path, kernels)
    calls: list[int] = []

    def counting(frame: int, body: Any, closure: int, extent: int) -> int:
        calls.append(extent)
        return int(body(closure, 0, extent))

    for size in (1, 9, 10, 30):
        data = np.ones((size, 3), np.float32)
        status, y = loaded.call(data, counting)
        assert status == OK and (y == 2).all()
    assert calls == [10, 30]


# Size expressions -----------------------------------------------------------------------------------------------

N, M = Var("N", lower=0), Var("M", lower=0)


def dims() -> st.SearchStrategy[Expr]:
    leaves = st.one_of(st.sampled_from([N, M]), st.integers(0, 50).map(const))

    def extend(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        plain = st.builds(Binary, st.sampled_from(["add", "sub", "mul", "min", "max"]), inner, inner)
        divided = st.builds(Binary, st.sampled_from(["floordiv", "floormod"]), inner, st.integers(1, 9).map(const))
        return st.one_of(plain, divided)

    return st.recursive(leaves, extend, max_leaves=12)


@settings(max_examples=100, deadline=None)
@given(dims(), st.integers(0, 30), st.integers(0, 30))
def test_a_size_program_means_the_expression(dim: Expr, n: int, m: int) -> None:
    program = shapes.encode(dim, (N, M))
    again: Dim = shapes.decode(program, (N, M))
    env = {N: n, M: m}
    assert functions.evaluate(as_expr(again), env) == functions.evaluate(dim, env)


def test_a_size_that_the_abi_cannot_say_is_refused() -> None:
    with pytest.raises(CodegenError, match="may not depend"):
        shapes.encode(Var("other"), (N,))
    total: Expr = N
    for _ in range(shapes.MAX_OPS.bit_length()):
        total = Binary("add", total, total)
    with pytest.raises(CodegenError, match=f"allows {shapes.MAX_OPS}"):
        shapes.encode(total, (N, M))


# What is emitted ------------------------------------------------------------------------------------------------


def test_llvm_ir_of_a_small_kernel(golden: Callable[[str, str], None]) -> None:
    sch = Schedule(functions.dense(6, 5, 20, relu=False))
    block = sch.get_block("y")
    i, j, k = sch.get_loops(block)
    i0, i1 = sch.split(i, [None, 2])
    j0, j1 = sch.split(j, [None, 8])
    sch.reorder(i0, j0, k, i1, j1)
    sch.cache_write(block, j0)
    sch.decompose_reduction(block, k)
    for name in ("y_init", "y", "y_register"):
        loops = sch.get_loops(sch.get_block(name))
        sch.vectorize(loops[-1])
        sch.unroll(loops[-2])
    golden("dense_6_20_5.ll", emit_kernel(sch.func, parse("x86-64-v3"), "dense").ir)


def test_assembly_of_a_vector_loop_on_arm(golden: Callable[[str, str], None]) -> None:
    from kedge.compiler.codegen.machine import emit_assembly

    target = parse("raspberry-pi/4b")
    sch = Schedule(functions.chain(64))
    for name in ("a", "b"):
        sch.compute_inline(sch.get_block(name))
    sch.vectorize(sch.split(sch.get_loops(sch.get_block("c"))[0], [None, 4])[1])
    text = emit_assembly(emit_kernel(sch.func, target, "chain").ir, target)
    body = [line for line in text.splitlines() if line.startswith("\t") and not line.startswith("\t.")]
    golden("chain_cortex_a72.s", "\n".join(body))
