"""Every function gets a schedule that is right, replays, and keeps what code generation relies on."""

import json
from dataclasses import replace

import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.default import RULES, schedule_func
from kedge.compiler.schedule.rules.analysis import fitting_lanes
from kedge.compiler.schedule.rules.gpu import GpuThreads
from kedge.compiler.schedule.rules.tile import tile_by_model
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import accesses, block_path, blocks_in, loops_in, loops_on
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Binary, Cast, Const, Dim, Expr, Var, call, select
from kedge.compiler.tir.stmt import Block, PrimFunc, Store
from kedge.compiler.tir.structural import equal
from kedge.compiler.tir.visitor import free_vars, loads, map_stmt, seq, walk_stmt
from support.functions import assert_same, bias_sigmoid, chain, conv, dense, mean, pool, softmax, transpose
from support.prepared import assert_compiled, assert_prepared
from support.targets import AVX2, AVX512, NEON, SCALAR, TARGETS, Model

N, M = Var("n", lower=1), Var("m", lower=1)


def gather() -> PrimFunc:
    x, index = te.placeholder((4, 6), "float32", "x"), te.placeholder((3,), "int64", "index")
    # Negative indices count from the end.
    y = te.compute((3, 6), lambda i, j: x[select(index[i] < 0, index[i] + 4, index[i]), j], name="y")
    return te.create_prim_func([x, index, y], "gather")


def two_outputs() -> PrimFunc:
    x = te.placeholder((3, 40), "float32", "x")
    a = te.compute((3, 40), lambda i, j: x[i, j] + 1.0, name="a")
    b = te.compute((3, 40), lambda i, j: a[i, j] * 2.0, name="b")
    return te.create_prim_func([x, a, b], "two_outputs")


def scalar_sum() -> PrimFunc:
    x, k = te.placeholder((50,), "float32", "x"), te.reduce_axis(50, "k")
    return te.create_prim_func([x, te.compute((), lambda: te.sum(x[k], k), name="y")], "scalar_sum")


def scalar_add() -> PrimFunc:
    x = te.placeholder((), "float32", "x")
    return te.create_prim_func([x, te.compute((), lambda: x.at(()) + 1.0, name="y")], "scalar_add")


def cast_sum() -> PrimFunc:
    x, k = te.placeholder((N, 20), "int8", "x"), te.reduce_axis(20, "k")
    y = te.compute((N,), lambda i: te.sum(Cast(x[i, k], "int32"), k), name="y")
    return te.create_prim_func([x, y], "cast_sum")


def centred(m: Dim, n: Dim, *, dtype: str = "float32", squares: bool = False) -> PrimFunc:
    """Rows below their largest element, with the sum of these differences (or of their squares) and the least one."""
    x, k, j, i = te.placeholder((m, n), dtype, "x"), *(te.reduce_axis(n, name) for name in "kji")
    top = te.compute((m,), lambda r: te.max(x[r, k], k), name="top")
    d = te.compute((m, n), lambda r, c: x[r, c] - top[r], name="d")
    total = te.compute((m,), lambda r: te.sum(d[r, j] * d[r, j] if squares else d[r, j], j), name="total")
    least = te.compute((m,), lambda r: te.min(d[r, i] + total[r], i), name="least")
    return te.create_prim_func([x, te.compute((m, n), lambda r, c: d[r, c] * least[r], name="y")], "centred")


def depthwise() -> PrimFunc:
    x, w = te.placeholder((N, 4, 10, 10), "float32", "x"), te.placeholder((4, 3, 3), "float32", "w")
    r, s = te.reduce_axis(3, "r"), te.reduce_axis(3, "s")
    y = te.compute((N, 4, 8, 8), lambda b, c, h, v: te.sum(x[b, c, h + r, v + s] * w[c, r, s], (r, s)), name="y")
    return te.create_prim_func([x, w, y], "depthwise")


def blocked(n: Dim, c: int, h: Dim, v: int, o: int, kernel: int = 1) -> PrimFunc:
    """A convolution over channels in blocks of 16: `c` blocks of them, `o` blocks of filters."""
    x = te.placeholder((n, c, h, v, 16), "float32", "x")
    w = te.placeholder((o, c, kernel, kernel, 16, 16), "float32", "w")
    a, r, s, b = (te.reduce_axis(size, name) for size, name in ((c, "a"), (kernel, "r"), (kernel, "s"), (16, "b")))

    def element(i: Expr, f: Expr, y: Expr, z: Expr, lane: Expr) -> Expr:
        return te.sum(x[i, a, y + r, z + s, b] * w[f, a, r, s, b, lane], (a, r, s, b))

    y = te.compute((n, o, h - (kernel - 1), v - (kernel - 1), 16), element, name="y")
    return te.create_prim_func([x, w, y], "blocked")


def batched() -> PrimFunc:
    x, y = te.placeholder((2, N, 6), "float32", "x"), te.placeholder((2, 6, M), "float32", "y")
    k = te.reduce_axis(6, "k")
    z = te.compute((2, N, M), lambda b, i, j: te.sum(x[b, i, k] * y[b, k, j], k), name="z")
    return te.create_prim_func([x, y, z], "batched")


def transposed_epilogue() -> PrimFunc:
    x, w, k = te.placeholder((6, 8), "float32", "x"), te.placeholder((8, 16), "float32", "w"), te.reduce_axis(8, "k")
    y = te.compute((6, 16), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="y")
    return te.create_prim_func([x, w, te.compute((16, 6), lambda i, j: y[j, i] + 1.0, name="z")], "transposed")


def reshaped_epilogue() -> PrimFunc:
    x, w, k = te.placeholder((6, 8), "float32", "x"), te.placeholder((8, 16), "float32", "w"), te.reduce_axis(8, "k")
    y = te.compute((6, 16), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="y")
    return te.create_prim_func([x, w, te.compute((96,), lambda i: y[i // 16, i % 16] + 1.0, name="z")], "reshaped")


def contraction_with_two_outputs() -> PrimFunc:
    x, w, k = te.placeholder((6, 8), "float32", "x"), te.placeholder((8, 16), "float32", "w"), te.reduce_axis(8, "k")
    y = te.compute((6, 16), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="y")
    z = te.compute((6, 16), lambda i, j: y[i, j] * 2.0, name="z")
    return te.create_prim_func([x, w, y, z], "both")


def no_elements() -> PrimFunc:
    x = te.placeholder((0, 4), "float32", "x")
    return te.create_prim_func([x, te.compute((0, 4), lambda i, j: x[i, j] + 1.0, name="y")], "no_elements")


def channel_softmax() -> PrimFunc:
    x = te.placeholder((2, 3, 8), "float32", "x")
    c, d = te.reduce_axis(3, "c"), te.reduce_axis(3, "d")
    top = te.compute((2, 8), lambda n, w: te.max(x[n, c, w], c), name="top")
    e = te.compute((2, 3, 8), lambda n, f, w: x[n, f, w] - top[n, w], name="e")
    total = te.compute((2, 8), lambda n, w: te.sum(e[n, d, w], d), name="total")
    return te.create_prim_func([x, te.compute((2, 3, 8), lambda n, f, w: e[n, f, w] - total[n, w], name="y")], "cs")


def part_of_a_block(channels: int) -> PrimFunc:
    """A row of an image whose channels, in blocks of 4, do not fill the last one; 3 taps and 12 filters."""
    blocks = -(-channels // 4)
    x, w = te.placeholder((blocks, 19, 4), "float32", "x"), te.placeholder((blocks, 3, 4, 12), "float32", "w")
    s, c = te.reduce_axis(3, "s"), te.reduce_axis(channels, "c")
    y = te.compute((17, 12), lambda v, o: te.sum(x[c // 4, v + s, c % 4] * w[c // 4, s, c % 4, o], (s, c)), name="y")
    return te.create_prim_func([x, w, y], "part_of_a_block")


CASES = {
    "dense": (dense(N, 20, 12), {"n": 3}, "matmul"),
    "dense_odd": (dense(5, 7, 9), {}, "matmul"),
    "dense_tall": (dense(24, 4, 16), {}, "matmul"),
    "dense_big": (dense(N, 64, 1040), {"n": 1}, "matmul"),
    "vector_matrix": (dense(1, 30, 10, relu=False), {}, "matmul"),
    "conv": (conv(N, 2, 8, 2), {"n": 1}, "contraction"),
    "conv_14": (conv(1, 1, 14, 3), {}, "contraction"),
    "conv_stride": (conv(N, 2, 7, 3, stride=2), {"n": 1}, "contraction"),
    "conv_1x1": (conv(1, 4, 4, 6, kernel=1, pad=0), {}, "contraction"),
    "part_of_a_block": (part_of_a_block(10), {}, "contraction"),
    "depthwise": (depthwise(), {"n": 1}, "contraction"),
    "batched": (batched(), {"n": 3, "m": 11}, "matmul"),
    "transposed_epilogue": (transposed_epilogue(), {}, "matmul"),
    "reshaped_epilogue": (reshaped_epilogue(), {}, "matmul"),
    "contraction_with_two_outputs": (contraction_with_two_outputs(), {}, "matmul"),
    "pool": (pool(N, 2, 8), {"n": 2}, "reduction"),
    "mean": (mean(N, 5, 4), {"n": 2}, "reduction"),
    "softmax": (softmax(N, 10), {"n": 3}, "reduction"),
    "softmax_free": (softmax(N, M), {"n": 3, "m": 11}, "reduction"),
    "channel_softmax": (channel_softmax(), {}, "reduction"),
    "long_softmax": (softmax(N, 53), {"n": 2}, "reduction"),
    **{f"rows_{n}": (centred(3, n), {}, "reduction") for n in (32, 33, 64, 96, 133)},
    "rows_free": (centred(N, M), {"n": 3, "m": 37}, "reduction"),
    "rows_of_squares": (centred(2, 40, squares=True), {}, "reduction"),
    "rows_of_doubles": (centred(N, 35, dtype="float64"), {"n": 2}, "reduction"),
    "rows_of_integers": (centred(2, 67, dtype="int32"), {}, "reduction"),
    "scalar_sum": (scalar_sum(), {}, "reduction"),
    "cast_sum": (cast_sum(), {"n": 5}, "reduction"),
    "chain": (chain(N), {"n": 19}, "injective"),
    "chain_long": (chain(100_000), {}, "injective"),
    "bias": (bias_sigmoid(N, 2, 4, 8), {"n": 2}, "injective"),
    "bias_odd": (bias_sigmoid(2, 3, 5, 7), {}, "injective"),
    "bias_free": (bias_sigmoid(N, 3, 5, 1), {"n": 4}, "injective"),
    "transpose": (transpose(7, 9), {}, "injective"),
    "transpose_free": (transpose(N, M), {"n": 3, "m": 10}, "injective"),
    "gather": (gather(), {}, "injective"),
    "two_outputs": (two_outputs(), {}, "injective"),
    "scalar_add": (scalar_add(), {}, "injective"),
    "no_elements": (no_elements(), {}, "fallback"),
    "softmax_one_element": (softmax(1, 1), {}, "reduction"),
    "softmax_one_row": (softmax(1, 9), {}, "reduction"),
    "softmax_one_column": (softmax(N, 1), {"n": 5}, "reduction"),
}
BIG = {"chain_long", "dense_big"}


def assert_contract(func: PrimFunc) -> None:
    """What code generation relies on."""
    for loop in loops_in(func.body):
        if loop.kind in ("vectorized", "unrolled"):
            assert isinstance(loop.extent, Const)
        if loop.kind == "vectorized":
            assert loop.extent.value & (loop.extent.value - 1) == 0
            assert not loops_in(loop.body)
        if loop.kind == "parallel":
            path = loops_on(block_path(func, next(b.name for b in walk_stmt(loop) if isinstance(b, Block))))
            assert all(outer.kind == "serial" for outer in path[: path.index(loop)])
    fixed = {loop.var for loop in loops_in(func.body) if loop.kind in ("vectorized", "unrolled")}
    for access in accesses(func.body):
        if access.buffer.scope == "register":
            assert all(var in fixed for index in access.indices for var in free_vars(index)), func.show()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [name for name in CASES if name not in BIG])
def test_right_on_every_target(name, target):
    func, symbols, rule = CASES[name]
    kernel = schedule_func(func, TARGETS[target], origin=("node",))
    assert kernel.rule == ("contraction" if rule == "matmul" and target == "scalar" else rule)
    assert "refused" not in kernel.decisions
    assert kernel.origin == ("node",)
    assert_contract(kernel.func)
    # Exponentials are no whole numbers: their sum depends on the order.
    assert_same(func, kernel.func, symbols, rtol=1e-6 if "softmax" in name else 0.0)
    again = Schedule.replay(func, json.loads(json.dumps(kernel.trace)))
    assert equal(again.func, kernel.func)
    assert json.loads(json.dumps(kernel.decisions)) == kernel.decisions


@pytest.mark.parametrize("name", ["dense_big", "chain_long", "conv", "softmax", "pool", "bias"])
def test_golden(name, golden):
    golden(f"rule_{name}.txt", schedule_func(CASES[name][0], AVX2).func.show())


@pytest.mark.parametrize("name", sorted(BIG))
def test_big_ones_are_parallel(name):
    kinds = {loop.kind for loop in loops_in(schedule_func(CASES[name][0], AVX2).func.body)}
    assert "parallel" in kinds
    kinds = {loop.kind for loop in loops_in(schedule_func(CASES[name][0], SCALAR).func.body)}
    assert "parallel" not in kinds


def test_contractions_accumulate_in_registers():
    for name in ("dense", "conv", "depthwise", "batched"):
        func = schedule_func(CASES[name][0], AVX2).func
        update = next(b for b in walk_stmt(func.body) if isinstance(b, Block) and b.name in ("y", "conv", "z"))
        assert isinstance(update.body, Store)
        assert update.body.buffer.scope == "register"
        assert any(loop.kind == "vectorized" for loop in loops_on(block_path(func, update.name)))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    """A cache of this module's own, so that no other test's kernels are used."""
    return KernelCache(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rows_") and "integers" not in name])
def test_rows_whose_elements_lie_together_are_reduced_in_vectors(name, kernels: KernelCache):
    func, symbols, _ = CASES[name]
    kernel = schedule_func(func, AVX512)
    partial = [block.name for block in blocks_in(kernel.func.body) if block.name == "total_rf"]
    assert partial
    assert all(loops_on(block_path(kernel.func, each))[-1].kind == "vectorized" for each in partial)
    assert_prepared(kernel.func, func, symbols)
    assert_compiled(kernel.func, func, symbols, kernels)


def test_given_decisions_are_carried_out_or_refused():
    func = dense(8, 12, 16)
    (rule,) = [rule for rule in RULES if rule.name == "contraction"]
    default = dict(rule.default(func, SCALAR))
    for rows in (1, 2, 3, 8):
        kernel = schedule_func(func, SCALAR, decisions={**default, "vector": 1, "width": 8, "row": 0, "rows": rows})
        assert kernel.decisions["rows"] == rows
        assert_same(func, kernel.func)
    for wrong in ({"row": 0, "rows": 0}, {"vector": 1, "row": 1}, {"row": 7}, {"vector": 2}, {"width": 3}):
        with pytest.raises(ScheduleError, match="tile"):
            schedule_func(func, SCALAR, decisions={**default, **wrong})


@pytest.mark.parametrize("name", ["dense", "conv", "softmax", "bias", "gather"])
def test_decisions_that_lack_one_are_refused_by_its_name(name):
    func, *_ = CASES[name]
    taken = schedule_func(func, AVX2)
    for key in taken.decisions:
        saved = {each: value for each, value in taken.decisions.items() if each != key}
        with pytest.raises(ScheduleError) as refused:
            schedule_func(func, AVX2, decisions=saved)
        assert refused.value.message == f"{func.name}: decisions of rule {taken.rule!r} without {key}"
        assert refused.value.hint == f"tune again, or add what the rule itself takes: {key}={taken.decisions[key]}"
    assert equal(schedule_func(func, AVX2, decisions=taken.decisions).func, taken.func)


def test_defaults_come_from_the_space():
    for func, _, name in CASES.values():
        (rule,) = [rule for rule in RULES if rule.name == name]
        space, chosen = rule.space(func, AVX2), rule.default(func, AVX2)
        assert set(chosen) == set(space)
        for key, value in chosen.items():
            assert value in space[key], (func.name, key, value)


def test_a_body_of_two_stores_falls_back():
    func = chain(8)
    block = next(b for b in walk_stmt(func.body) if isinstance(b, Block) and b.name == "c")
    assert isinstance(block.body, Store)
    body = seq(block.body, block.body)
    twice = replace(func, body=map_stmt(func.body, lambda s: replace(s, body=body) if s is block else s))
    kernel = schedule_func(twice, AVX2)
    assert kernel.rule == "fallback"
    assert_same(twice, kernel.func)


@pytest.mark.parametrize(("dtype", "width"), [("int8", 16), ("uint8", 16), ("float64", 4)])
def test_vectors_are_as_wide_as_the_dtype_allows(dtype, width):
    x, r = te.placeholder((1, 2, 8, 16), dtype, "x"), te.reduce_axis(2, "r")
    y = te.compute((1, 2, 4, 16), lambda n, c, h, w: te.max(x[n, c, h * 2 + r, w], r), name="y")
    kernel = schedule_func(te.create_prim_func([x, y], "f"), AVX2)
    widths = [loop.extent.value for loop in loops_in(kernel.func.body) if loop.kind == "vectorized"]
    assert set(widths) == {width}


@pytest.mark.parametrize(
    ("limit", "extent", "width"),
    [
        (8, None, 8),
        (8, 64, 8),
        (8, 8, 8),
        (8, 7, 4),
        (8, 10, 8),
        (8, 4, 4),
        (8, 3, 2),
        (8, 1, 1),
        (16, 28, 16),
        (1, 9, 1),
    ],
)
def test_vector_lengths(limit, extent, width):
    assert fitting_lanes(limit, extent) == width


def test_costly_producers_are_not_computed_again():
    x = te.placeholder((8,), "float32", "x")
    e = te.compute((8,), lambda i: call("exp", x[i]), name="e")
    func = te.create_prim_func([x, te.compute((32, 8), lambda i, j: e[j] * 2.0, name="y")], "f")
    kernel = schedule_func(func, AVX2)
    assert [b.name for b in walk_stmt(kernel.func.body) if isinstance(b, Block)] == ["e", "y"]
    one = te.create_prim_func([x, te.compute((8,), lambda i: Binary("mul", e[i], x[i]), name="y")], "f")
    kernel = schedule_func(one, AVX2)
    assert [b.name for b in walk_stmt(kernel.func.body) if isinstance(b, Block)] == ["y"]


def pad_rows() -> PrimFunc:
    """Rows of 15 elements, so that vectors of 16 run across the ends of rows."""
    x = te.placeholder((N, 3, 14, 15), "float32", "x")
    y = te.compute(
        (N, 3, 16, 15),
        lambda n, c, i, j: select(Binary("and", i >= 1, i < 15), x[n, c, i - 1, j], 0.0),
        name="y",
    )
    return te.create_prim_func([x, y], "pad_rows")


def conv_of_rounded_dims() -> PrimFunc:
    """Over dims like those behind three layers of stride 2: (h + 7) // 8."""
    height, width = ((N + 7) // 8, (M + 7) // 8)
    x, w = te.placeholder((4, 3, height, width), "float32", "x"), te.placeholder((16, 3), "float32", "w")
    rows, columns = te.placeholder((N, M), "float32", "size"), te.reduce_axis(3, "c")
    y = te.compute(
        (4, 16, height, width), lambda n, o, i, j: te.sum(x[n, columns, i, j] * w[o, columns], columns), name="y"
    )
    return te.create_prim_func([rows, x, w, y], "conv_of_rounded_dims")


@pytest.mark.parametrize("make", [pad_rows, conv_of_rounded_dims])
@pytest.mark.parametrize("target", TARGETS)
def test_no_rule_is_refused(make, target):
    func = make()
    kernel = schedule_func(func, TARGETS[target])
    assert "refused" not in kernel.decisions
    assert_same(func, kernel.func, {"n": 5, "m": 9} if len(func.symbols) == 2 else {"n": 1})


def test_reading_twice_does_not_double_without_end():
    tensors = [te.placeholder((N,), "float32", "x")]
    for link in range(40):
        before = tensors[-1]
        tensors.append(te.compute((N,), lambda i, t=before: t[i] + t[i] * 0.5, name=f"y{link}"))
    func = te.create_prim_func([tensors[0], tensors[-1]], "links")
    kernel = schedule_func(func, AVX2)
    assert max(sum(1 for _ in loads(block.body)) for block in blocks_in(kernel.func.body)) <= 64
    assert len(blocks_in(kernel.func.body)) <= 20
    assert_same(func, kernel.func, {"n": 3})


@pytest.mark.parametrize("target", [AVX2, AVX512, NEON, Model(vector_bits=128, vector_registers=8)])
def test_a_free_batch_shares_what_is_loaded_of_the_weights(target):
    """Several rows in a tile, and vectors enough that one row alone keeps the processor busy."""
    func = dense(N, 2, 64)
    kernel = schedule_func(func, target)
    assert kernel.decisions["row"] == 0
    assert kernel.decisions["rows"] >= (2 if target.vector_registers > 8 else 1)
    assert kernel.decisions["vectors"] >= (4 if target.vector_registers > 8 else 3)
    for n in (1, 5):
        assert_same(func, kernel.func, {"n": n})


@pytest.mark.parametrize(("taps", "width", "unrolled"), [(3, M, True), (7, M, False), (7, 6, True)])
def test_taps_are_written_out_where_that_makes_no_long_code(taps, width, unrolled):
    """Code for rows of unknown size is repeated for borders and ends: 49 taps each time took half a minute."""
    x, w = te.placeholder((9, width + taps - 1, 16), "float32", "x"), te.placeholder((taps, taps, 16), "float32", "w")
    r, s = te.reduce_axis(taps, "r"), te.reduce_axis(taps, "s")
    y = te.compute((3, width, 16), lambda h, v, c: te.sum(x[h + r, v + s, c] * w[r, s, c], (r, s)), name="y")
    func = te.create_prim_func([x, w, y], "depthwise")
    kernel = schedule_func(func, AVX512)
    assert kernel.decisions["rows"] > 1
    assert all(loop.kind != "serial" for loop in loops_in(kernel.func.body) if loop.var.name in "rs") == unrolled
    assert_same(func, kernel.func, {"m": 5} if width is M else {})


@pytest.mark.parametrize(
    ("target", "group"),
    [("opencl", 256), ("cuda", 256), ("opencl -max-threads=16", 16), ("opencl -warp=64 -max-threads=100", 64),
     ("opencl -warp=512 -max-threads=1024", 512)],
)  # fmt: skip
def test_groups_of_a_gpu_are_whole_warps(target, group):
    gpu = parse(target)
    rule = GpuThreads()
    assert rule.default(dense(4, 5, 6), gpu)["group"] == group
    assert group in rule.space(dense(4, 5, 6), gpu)["group"]


def pointwise(channels: int) -> PrimFunc:
    """A 1x1 convolution of one block of filters over blocks of channels, 28x28."""
    x, w = te.placeholder((channels // 16, 28, 28, 16), "float32", "x"), te.placeholder((channels, 16), "float32", "w")
    c, i = te.reduce_axis(channels // 16, "c"), te.reduce_axis(16, "i")
    y = te.compute((28, 28, 16), lambda h, v, o: te.sum(x[c, h, v, i] * w[c * 16 + i, o], (c, i)), name="y")
    return te.create_prim_func([x, w, y], "pointwise")


def pointwise_blocks(filters: int, width: int, block: int = 16) -> PrimFunc:
    """A 1x1 convolution of `filters` blocks of filters over two blocks of channels, with rows of `width`."""
    x = te.placeholder((2, 4, width, block), "float32", "x")
    w = te.placeholder((filters, 2 * block, block), "float32", "w")
    c, i = te.reduce_axis(2, "c"), te.reduce_axis(block, "i")
    y = te.compute(
        (filters, 4, width, block), lambda f, h, v, o: te.sum(x[c, h, v, i] * w[f, c * block + i, o], (c, i)), name="y"
    )
    return te.create_prim_func([x, w, y], "pointwise")


@pytest.mark.parametrize(
    ("width", "filters", "rows", "vectors"), [(14, 8, 14, 2), (28, 8, 14, 2), (7, 6, 7, 3), (14, 1, 14, 1)]
)
def test_cores_that_multiply_as_often_as_they_load_elements_share_these(width, filters, rows, vectors):
    func = pointwise_blocks(filters, width)
    fast = replace(AVX512, fma_per_cycle=2.0, loads_per_cycle=2.0)
    kernel = schedule_func(func, fast)
    assert (kernel.decisions["rows"], kernel.decisions["vectors"]) == (rows, vectors)
    slow = schedule_func(func, replace(AVX512, fma_per_cycle=1.0, loads_per_cycle=1.0))
    assert (slow.decisions["rows"], slow.decisions["vectors"]) == (min(width, 14), 1)


@pytest.mark.parametrize(
    ("width", "filters", "rows", "vectors"), [(14, 8, 5, 2), (28, 8, 6, 2), (7, 6, 4, 3), (14, 1, 14, 1)]
)
def test_tiles_of_blocks_fit_the_registers_of_avx2(width, filters, rows, vectors):
    kernel = schedule_func(pointwise_blocks(filters, width, block=8), AVX2)
    assert (kernel.decisions["rows"], kernel.decisions["vectors"]) == (rows, vectors)


def taps(kernel: int) -> PrimFunc:
    """A depthwise convolution of one block of channels, 28x28, without padding."""
    size = 27 + kernel
    x, w = te.placeholder((size, size, 16), "float32", "x"), te.placeholder((kernel, kernel, 16), "float32", "w")
    r, s = te.reduce_axis(kernel, "r"), te.reduce_axis(kernel, "s")
    y = te.compute((28, 28, 16), lambda h, v, o: te.sum(x[h + r, v + s, o] * w[r, s, o], (r, s)), name="y")
    return te.create_prim_func([x, w, y], "taps")


@pytest.mark.parametrize(
    ("func", "unrolled"), [(pointwise(16), True), (pointwise(32), False), (pointwise(64), False), (taps(5), True)]
)
def test_long_sums_of_elements_times_vectors_stay_loops(func, unrolled):
    kernel = schedule_func(func, AVX512)
    assert kernel.decisions["rows"] == 14
    inner = [loop for loop in loops_in(kernel.func.body) if loop.var.name.split("_")[0] in ("c", "i", "r", "s")]
    assert inner
    assert all(loop.kind == "unrolled" for loop in inner if loop.extent.value > 1) is unrolled


@pytest.mark.parametrize(
    ("target", "channels", "expected"),
    [
        (NEON, 10, [("c_0", "serial", 3), ("s", "serial", 3), ("c_1", "unrolled", 4)]),
        (NEON, 7, [("s", "serial", 3), ("c", "unrolled", 7)]),  # as short as two blocks
        (AVX2, 10, [("s", "serial", 3), ("c", "serial", 10)]),
    ],
)
def test_where_code_multiplies_by_element_a_sum_goes_by_blocks(target, channels, expected):
    sums = [
        loop
        for loop in loops_in(schedule_func(part_of_a_block(channels), target).func.body)
        if loop.var.name[0] in "sc"
    ]
    assert [(loop.var.name, loop.kind, loop.extent.value) for loop in sums] == expected


@pytest.mark.parametrize(
    ("func", "asks"),
    [
        (blocked(1, 32, 7, 7, 128), True),
        (blocked(1, 16, 9, 9, 64, 3), True),
        (blocked(N, 32, 7, 7, 128), True),  # each image has all filters come
        (blocked(1, 4, 56, 56, 16), False),  # all filters stay in the second cache
        (blocked(1, 256, 1, 7, 128), False),  # there is one tile, which would have to ask for all
        (blocked(1, 32, M, 7, 128), False),  # what a tile's part is, is not known
        (blocked(1, 256, 7, 7, 7), False),  # too few panels for two cores: rows of images are dealt out, too
    ],
)
def test_the_next_filters_are_asked_for_by_the_fastest_cores_while_rows_of_images_take_these(func, asks):
    fast = replace(AVX512, num_cores=2)
    for target in (AVX2, NEON, replace(fast, fma_per_cycle=1.0)):
        assert schedule_func(func, target).decisions["next"] is False
    kernel = schedule_func(func, fast)
    assert (kernel.rule, kernel.decisions["next"]) == ("contraction", asks)
    found = [loop for loop in loops_in(kernel.func.body) if "spread" in loop.annotations]
    assert [dict(loop.annotations["spread"]) for loop in found] == ([{"w": 1}] if asks else [])
    assert len([loop for loop in loops_in(kernel.func.body) if loop.kind == "parallel"]) == 1


@pytest.mark.parametrize(
    ("func", "units", "asking"),
    [(blocked(1, 64, 14, 14, 64), (32, 32, 448), (2, 8)), (blocked(1, 32, 7, 7, 128), (43, 301, 301), (2,))],
)
def test_filters_are_shared_where_there_are_too_few_for_many_cores(func, units, asking):
    for cores, count in zip((2, 8, 64), units, strict=True):
        kernel = schedule_func(func, replace(AVX512, num_cores=cores, l2_bytes=2 << 20))
        spread = [loop.extent.value for loop in loops_in(kernel.func.body) if loop.kind == "parallel"]
        assert (spread, kernel.decisions["next"]) == ([count], cores in asking), cores


def test_vectors_outside_of_filters_are_counted_as_vectors():
    """Of 64 columns by 16 lanes 4 are no work for 8 cores, however many columns they are."""
    x, w = te.placeholder((48, 1024), "float32", "x"), te.placeholder((1024, 2, 64), "float32", "w")
    k = te.reduce_axis(1024)
    y = te.compute((64, 2, 48), lambda j, f, i: te.sum(x[i, k] * w[k, f, j], k), name="y")
    block = blocks_in(te.create_prim_func([x, w, y], "turned").body)[0]
    tile = tile_by_model(block, replace(AVX512, num_cores=8))
    assert (tile.vector, tile.row, tile.parallel, tile.next) == (0, 2, True, False)
    assert tile_by_model(block, replace(AVX512, num_cores=1)).next is True


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("n", [2, N])
def test_filters_that_are_asked_for_change_no_result(n, kernel, tmp_path):
    func, symbols = blocked(n, 1, 4, 6, 4, kernel), {} if n == 2 else {"n": 2}
    decisions = {**schedule_func(func, AVX512).decisions, "next": True}
    made = schedule_func(func, AVX512, decisions=decisions)
    assert any("spread" in loop.annotations for loop in loops_in(made.func.body))
    assert_same(func, made.func, symbols)
    assert_prepared(made.func, func, symbols)
    assert_compiled(made.func, func, symbols, KernelCache(tmp_path))
