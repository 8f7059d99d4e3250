"""Primitives on buffers: cache_read, set_scope, storage_align, transform_layout; and rfactor, which makes one."""

import numpy as np
import pytest
from schedule.test_blocks import loops_of, refused

from kedge.compiler import te
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Cast, Var, call, select
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import equal
from support.functions import assert_same, chain, conv, dense, mean, softmax

N, M = Var("n", lower=1), Var("m", lower=1)


def tiled(func: PrimFunc) -> tuple[Schedule, list]:
    """A matrix product in tiles of 4 x 8 x 4, and its loops, outermost first."""
    sch = Schedule(func)
    i, j, k = loops_of(sch, "y")
    i0, i1 = sch.split(i, [None, 4])
    j0, j1 = sch.split(j, [None, 8])
    k0, k1 = sch.split(k, [None, 4])
    sch.reorder(i0, j0, k0, i1, k1, j1)
    return sch, [i0, j0, k0, i1, k1, j1]


# cache_read -------------------------------------------------------------------------------------------------------


def test_cache_read_golden(golden):
    func = dense(N, 12, 10, relu=False)
    sch, (_, _, k0, *_) = tiled(func)
    y = sch.get_block("y")
    packed = sch.cache_read(y, "w", k0)
    sch.transform_layout(packed, lambda k, j: (j // 4, k, j % 4))
    sch.cache_read(y, "x", k0)
    golden("cache_read.txt", sch.show())
    for n in (1, 5, 8):
        assert_same(func, sch.func, {"n": n})


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("position", range(5))
def test_cache_read_of_overlapping_windows(position, stride):
    func = conv(N, 2, 7, 3, stride=stride)
    sch = Schedule(func)
    y = sch.get_block("conv")
    h0, _ = sch.split(sch.get_loops(y)[2], [None, 2])
    sch.cache_read(y, "pad", sch.get_loops(y)[position], "local")
    assert_same(func, sch.func, {"n": 2})
    assert h0.name == "h_0"


def test_cache_read_outside_of_the_buffer_stays_inside():
    """Padding that is computed on the fly reads nothing beyond the edge, and neither does the copy."""
    func = conv(1, 2, 5, 3)
    sch = Schedule(func)
    sch.compute_inline(sch.get_block("pad"))
    h = sch.get_loops(sch.get_block("conv"))[2]
    sch.cache_read(sch.get_block("conv"), "x", h)
    assert_same(func, sch.func)


def test_cache_read_for_parallel_loops():
    func = dense(8, 12, 8, relu=False)
    sch, (i0, j0, k0, *_) = tiled(func)
    sch.parallel(i0)
    sch.cache_read(sch.get_block("y"), "w", k0, "local")
    before = sch.func
    refused(
        lambda: sch.cache_read(sch.get_block("y"), "x", j0, "global"),
        "each iteration of parallel loop 'i_0' fills 'x_global' with other values; in global scope",
    )
    assert sch.func is before
    assert_same(func, sch.func)


def test_cache_read_refusals():
    sch, (_, _, k0, *_, j1) = tiled(dense(N, 12, 10))
    y, z = sch.get_block("y"), sch.get_block("z")
    refused(lambda: sch.cache_read(y, "v", k0), "cache_read(block 'y'): it does not read 'v'", "it reads 'x', 'w'")
    refused(lambda: sch.cache_read(y, "w", sch.get_loops(z)[0]), "is not around it")
    refused(
        lambda: sch.cache_read(y, "w", k0, "cache"),
        "cache_read(scope='cache')",
        "'global', 'shared', 'local', 'register'",
    )
    refused(lambda: sch.cache_read(y, "y", k0), "it writes 'y' itself")
    sch.vectorize(j1)
    refused(lambda: sch.cache_read(y, "w", j1), "loop 'j_1'", "it is vectorized")
    x, index = te.placeholder((4,), "float32", "x"), te.placeholder((3,), "int64", "index")
    gather = te.create_prim_func([x, index, te.compute((3,), lambda i: x[index[i]], name="y")], "gather")
    sch = Schedule(gather)
    refused(
        lambda: sch.cache_read(sch.get_block("y"), "x", loops_of(sch, "y")[0]), "at index[i], is not a contiguous range"
    )


# set_scope --------------------------------------------------------------------------------------------------------


def test_set_scope(golden):
    func = chain(N)
    sch = Schedule(func)
    (i,) = loops_of(sch, "c")
    i0, _ = sch.split(i, [None, 4])
    sch.compute_at(sch.get_block("b"), i0)
    sch.compute_at(sch.get_block("a"), i0)
    sch.set_scope(sch.get_block("a"), "local")
    sch.set_scope(sch.get_block("b"), "local")
    sch.parallel(i0)
    golden("set_scope.txt", sch.show())
    assert_same(func, sch.func, {"n": 7})


def test_set_scope_refusals():
    sch = Schedule(chain(N))
    refused(lambda: sch.set_scope(sch.get_block("c"), "local"), "'c' is an argument of the function")
    refused(
        lambda: sch.set_scope(sch.get_block("a"), "register"), "'a' in register scope has a dim of no constant size"
    )
    refused(lambda: sch.set_scope(sch.get_block("a"), "vmem"), "set_scope(scope='vmem'): it is not one of")
    sch = Schedule(chain(8))
    sch.parallel(loops_of(sch, "a")[0])
    before = sch.func
    refused(lambda: sch.set_scope(sch.get_block("a"), "local"), "'a' is used outside of parallel loop 'i'")
    assert sch.func is before
    sch = Schedule(chain(8))
    (i,) = loops_of(sch, "c")
    i0, _ = sch.split(i, [2, None])
    for name in ("b", "a"):
        sch.compute_at(sch.get_block(name), i0)
        sch.set_scope(sch.get_block(name), "shared")
    sch.bind(i0, "blockIdx.x")
    assert_same(chain(8), sch.func)


# storage_align ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "factor", "offset", "shape"), [
    (0, 8, 0, "8, 16"), (-2, 16, 1, "8, 17"), (0, 13, 0, "8, 13"), (0, 1, 0, "8, 13"), (0, 4, 3, "8, 15"),
])  # fmt: skip
def test_storage_align(axis, factor, offset, shape):
    func = softmax(8, 13)
    sch = Schedule(func)
    sch.storage_align(sch.get_block("e"), axis, factor, offset)
    assert f"e: float32[{shape}]" in sch.show()
    assert equal(Schedule.replay(func, sch.trace).func, sch.func)
    assert_same(func, sch.func)


def test_storage_align_refusals():
    sch = Schedule(softmax(8, M))
    refused(lambda: sch.storage_align(sch.get_block("e"), 0, 8), "after axis 0 are not all of constant size")
    refused(lambda: sch.storage_align(sch.get_block("e"), 1, 8), "axis 1 is the last")
    refused(lambda: sch.storage_align(sch.get_block("e"), 2, 8), "'e' has 2 dims")
    refused(lambda: sch.storage_align(sch.get_block("e"), 0, 8, 8), "it takes 0 <= offset < factor")
    refused(lambda: sch.storage_align(sch.get_block("y"), 0, 8), "'y' is an argument")
    sch = Schedule(conv(2, 2, 6, 2))
    refused(
        lambda: sch.storage_align(sch.get_block("pad"), 1, 16, 1), "whole rows of 8 elements never make such a stride"
    )


# transform_layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_map", [
    lambda b, c, h, w: (b, h, w, c),
    lambda b, c, h, w: (b, c // 2, h, w, c % 2),
    lambda b, c, h, w: (b * 2 + c, h * 7 + w),
    lambda b, c, h, w: (b, h // 4, w // 3, c, h % 4, w % 3),
    lambda b, c, h, w: (b, c, h, 2 * w + 1),
    lambda *i: tuple(reversed(i)),
])  # fmt: skip
def test_transform_layout(index_map):
    func = conv(N, 2, 5, 3)
    sch = Schedule(func)
    sch.transform_layout(sch.get_block("pad"), index_map)
    assert_same(func, sch.func, {"n": 2})
    assert equal(Schedule.replay(func, sch.trace).func, sch.func)


def test_transform_layout_golden(golden):
    func = chain(N)
    sch = Schedule(func)
    sch.transform_layout(sch.get_block("a"), lambda i: (i // 16, i % 16))
    golden("transform_layout.txt", sch.show())
    assert_same(func, sch.func, {"n": 21})


def test_transform_layout_refusals():
    sch = Schedule(conv(N, 2, 5, 3))
    pad = sch.get_block("pad")
    for index_map, reason in [
        (lambda b, c, h, w: (b, c, h, w // 2), "elements of 'pad' that differ in dim 3 to the same place"),
        (lambda b, c, h, w: (b, c, h, w % 4), "elements of 'pad' that differ in dim 3"),
        (lambda b, c, h, w: (b, c, w), "elements of 'pad' that differ in dim 2"),
        (lambda b, c, h, w: (b, c, h + w, w - h), "index 3 of index_map, i3 - i2, can be below 0"),
        (lambda b, c: (b, c), "index_map does not work on the 4 indices of 'pad'"),
        (lambda b, c, h, w: (Cast(b, "float32"), c, h, w), "of index_map is float32, not int64"),
    ]:
        refused(lambda m=index_map: sch.transform_layout(pad, m), "transform_layout(block 'pad')", reason)
    refused(lambda: sch.transform_layout(sch.get_block("relu"), lambda *i: i), "'relu' is an argument")


# rfactor ----------------------------------------------------------------------------------------------------------


def test_rfactor_golden(golden):
    func = dense(N, 12, 10, relu=False)
    sch = Schedule(func)
    y = sch.get_block("y")
    _, _, k = sch.get_loops(y)
    _, k1 = sch.split(k, [None, 8])
    partial = sch.rfactor(y, k1)
    assert (partial.name, y.name) == ("y_rf", "y")
    golden("rfactor.txt", sch.show())
    assert_same(func, sch.func, {"n": 3})
    sch.parallel(k1)
    assert_same(func, sch.func, {"n": 3})


@pytest.mark.parametrize(("extent", "inner"), [(3, True), (8, True), (9, True), (16, True), (9, False), (16, False)])
@pytest.mark.parametrize("reduce", [te.sum, te.max, te.min, te.prod])
def test_rfactor_of_every_combiner(reduce, inner, extent):
    """Partial results without a single valid term are the combiner's identity."""
    x, k = te.placeholder((4, extent), "int64", "x"), te.reduce_axis(extent, "k")
    func = te.create_prim_func([x, te.compute((4,), lambda i: reduce(x[i, k], k), name="y")], "f")
    sch = Schedule(func)
    _, axis = loops_of(sch, "y")
    loops = sch.split(axis, [None, 8])
    sch.rfactor(sch.get_block("y"), loops[inner])
    assert_same(func, sch.func)
    assert equal(Schedule.replay(func, sch.trace).func, sch.func)


def test_rfactor_of_a_nest_that_reduces_outside():
    func = mean(N, 3, 4)
    sch = Schedule(func)
    n, _, r, s = loops_of(sch, "total")
    sch.reorder(s, r, n)
    sch.rfactor(sch.get_block("total"), r)
    assert_same(func, sch.func, {"n": 2})


def test_rfactor_refusals():
    sch = Schedule(dense(N, 12, 10))
    y, z = sch.get_block("y"), sch.get_block("z")
    i, _, k = sch.get_loops(y)
    refused(lambda: sch.rfactor(z, sch.get_loops(z)[0]), "rfactor(block 'z'): it is no sum, product")
    refused(lambda: sch.rfactor(y, i), "loop 'i'", "block 'y' does not reduce over it")
    refused(lambda: sch.rfactor(y, sch.get_loops(z)[0]), "is not around it")
    sch.decompose_reduction(y, k)
    refused(lambda: sch.rfactor(y, k), "its initialisation was taken out already (block")
    x, axis = te.placeholder((4, 6), "float32", "x"), te.reduce_axis(6, "k")
    twice = te.compute((4,), lambda i: te.sum(select(x[i, axis] > 0.0, x[i, axis], 0.0), axis), name="y")
    sch = Schedule(te.create_prim_func([x, twice], "f"))
    i, k = loops_of(sch, "y")
    sch.cache_write(sch.get_block("y"), i, "local")
    partial = sch.rfactor(sch.get_block("y"), k)
    assert "y_local_rf: float32[1, 6] in local" in sch.show()
    assert partial.name == "y_rf"


# pad_einsum -------------------------------------------------------------------------------------------------------


def test_pad_einsum_golden(golden):
    func = dense(N, 13, 10, relu=False)
    sch = Schedule(func)
    y = sch.get_block("y")
    sch.pad_einsum(y, [4, 8, 8])
    golden("pad_einsum.txt", sch.show())
    i, j, k = sch.get_loops(y)
    _, j1 = sch.split(j, [None, 8])
    assert sch.extent(j1).value == 8 and "where" not in sch.show().partition("block y:")[2].partition("block")[0]
    for n in (1, 4, 5):
        assert_same(func, sch.func, {"n": n})
    assert equal(Schedule.replay(func, sch.trace).func, sch.func)
    assert i.name == "i" and k.name == "k"


@pytest.mark.parametrize("padding", [[1, 1, 1], [1, 1, 4], [4, 1, 1], [1, 3, 1], [2, 5, 13]])
def test_pad_einsum(padding):
    func = dense(N, 13, 10)
    sch = Schedule(func)
    sch.pad_einsum(sch.get_block("y"), padding)
    for n in (1, 3, 4):
        assert_same(func, sch.func, {"n": n})
    if padding in ([1, 1, 1], [1, 5, 13]):
        assert sch.func is func


def test_padding_adds_nothing_to_infinities():
    """Beyond the end all factors are zeros, so that an infinity elsewhere does not become NaN."""
    func = dense(2, 3, 3, relu=False)
    sch = Schedule(func)
    sch.pad_einsum(sch.get_block("y"), [2, 4, 4])
    x = np.array([[np.inf, 1, 1], [1, 1, 1]], np.float32)
    w = np.abs(np.random.default_rng(0).standard_normal((3, 3))).astype(np.float32) + 1
    got = interp.run(sch.func, [x, w])[0]
    np.testing.assert_allclose(got, [[np.inf] * 3, w.sum(axis=0)], rtol=1e-6)


def test_pad_einsum_refusals():
    sch = Schedule(dense(N, 12, 10))
    y, z = sch.get_block("y"), sch.get_block("z")
    refused(lambda: sch.pad_einsum(z, [1, 4]), "pad_einsum(block 'z'): it is no sum that begins at 0")
    refused(lambda: sch.pad_einsum(y, [4, 4]), "it takes one number from 1 on for each of vi, vj, vk")
    refused(lambda: sch.pad_einsum(y, [4, 0, 4]), "from 1 on")
    refused(lambda: Schedule(conv(1, 2, 5, 3)).pad_einsum(sch.get_block("y"), [4]), "belongs to another schedule")
    windows = Schedule(conv(1, 2, 5, 3))
    refused(
        lambda: windows.pad_einsum(windows.get_block("conv"), [1, 4, 1, 1, 4, 1, 1]),
        "it uses 'pad' at [0, vc, vh + vr, vw + vs]",
    )
    sch.split(sch.get_loops(y)[0], [None, 2])
    refused(lambda: sch.pad_einsum(y, [4, 4, 4]), "not one serial loop per iteration variable", "sch.pad_einsum before")
    x, s, k = te.placeholder((4, 6), "float32", "x"), te.placeholder((4,), "float32", "s"), te.reduce_axis(6, "k")
    scaled = te.compute((4,), lambda i: te.sum(x[i, k] * s[i], k), name="y")
    sch = Schedule(te.create_prim_func([x, s, scaled], "f"))
    refused(lambda: sch.pad_einsum(sch.get_block("y"), [1, 4]), "'s' does not depend on 'vk'", "infinities")
    extreme = te.create_prim_func([x, te.compute((4,), lambda i: te.max(x[i, k], k), name="y")], "f")
    sch = Schedule(extreme)
    refused(lambda: sch.pad_einsum(sch.get_block("y"), [1, 4]), "it is no sum that begins at 0")
    squares = te.create_prim_func([x, te.compute((4,), lambda i: te.sum(call("exp", x[i, k]), k), name="y")], "f")
    sch = Schedule(squares)
    refused(lambda: sch.pad_einsum(sch.get_block("y"), [1, 4]), "what it sums is no product of elements")
