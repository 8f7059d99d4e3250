"""Primitives on blocks: inlining, moving, decomposing, caching."""

import pytest

from kedge.compiler import te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import blocks_in
from kedge.compiler.tir.expr import Var, maximum
from kedge.compiler.tir.stmt import PrimFunc
from support.functions import assert_same, bias_sigmoid, chain, conv, dense, mean, softmax, transpose

N = Var("n", lower=1)


def refused(call, *words):
    """`call` raises `ScheduleError` with all `words` in its message."""
    with pytest.raises(ScheduleError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def loops_of(sch, name):
    return sch.get_loops(sch.get_block(name))


# compute_inline ---------------------------------------------------------------------------------------------------


def test_compute_inline_golden(golden):
    func = chain(N)
    sch = Schedule(func)
    sch.compute_inline(sch.get_block("a"))
    sch.compute_inline(sch.get_block("b"))
    golden("compute_inline.txt", sch.show())
    assert sch.func.allocs == ()
    assert_same(func, sch.func, {"n": 5})


def test_inline_padding_into_a_convolution():
    func = conv(N, 2, 4, 2)
    sch = Schedule(func)
    sch.compute_inline(sch.get_block("pad"))
    assert "vh + vr >= 1" in sch.show() or "1 <= vh + vr" in sch.show()
    assert_same(func, sch.func, {"n": 2})


def test_inline_into_split_consumers():
    func = chain(10)
    sch = Schedule(func)
    sch.split(loops_of(sch, "c")[0], [None, 4])
    sch.split(loops_of(sch, "a")[0], [None, 4])
    sch.compute_inline(sch.get_block("a"))
    sch.compute_inline(sch.get_block("b"))
    assert_same(func, sch.func)


def test_inlining_a_copy_of_one_element_leaves_none_of_its_variables():
    func = dense(4, 1, 1, relu=False)
    sch = Schedule(func)
    sch.compute_inline(sch.cache_read(sch.get_block("y"), "w", loops_of(sch, "y")[-1], "global"))
    assert_same(func, sch.func)


def test_compute_inline_refusals():
    sch = Schedule(dense(4, 8, 4))
    refused(lambda: sch.compute_inline(sch.get_block("y")), "compute_inline(block 'y')", "it is a reduction")
    refused(lambda: sch.compute_inline(sch.get_block("z")), "'z', which it computes, is an output")
    x = te.placeholder((4, 4), "float32", "x")
    diagonal = te.compute((4, 4), lambda i, j: x[i, j] + x[j, i], name="a")
    y = te.compute((4,), lambda i: diagonal[i, i], name="y")
    func = te.create_prim_func([x, y], "f")
    sch = Schedule(func)
    sch.compute_inline(sch.get_block("a"))
    assert_same(func, sch.func)


# reverse_compute_inline -------------------------------------------------------------------------------------------


def test_reverse_compute_inline_golden(golden):
    func = bias_sigmoid(N, 3, 2, 2)
    sch = Schedule(func)
    sch.reverse_compute_inline(sch.get_block("z"))
    golden("reverse_compute_inline.txt", sch.show())
    x, b = te.placeholder((3,), "float32", "x"), te.placeholder((3,), "float32", "b")
    y = te.compute((3,), lambda i: x[i] * b[i], name="y")
    both = te.create_prim_func([x, b, te.compute((3,), lambda i: y[i] * y[i], name="z")], "f")
    sch = Schedule(both)
    sch.reverse_compute_inline(sch.get_block("z"))
    assert_same(both, sch.func)


def test_reverse_compute_inline_of_a_transpose():
    x = te.placeholder((3, 4), "float32", "x")
    a = te.compute((3, 4), lambda i, j: x[i, j] + 1.0, name="a")
    func = te.create_prim_func([x, te.compute((4, 3), lambda i, j: a[j, i], name="y")], "f")
    sch = Schedule(func)
    sch.reverse_compute_inline(sch.get_block("y"))
    assert "y[vj, vi] = x[vi, vj] + 1.0" in sch.show()
    assert_same(func, sch.func)


def test_reverse_compute_inline_refusals():
    sch = Schedule(dense(4, 8, 4))
    refused(lambda: sch.reverse_compute_inline(sch.get_block("z")), "its producer 'y' is a reduction", "cache_write")
    sch = Schedule(chain(4))
    refused(lambda: sch.reverse_compute_inline(sch.get_block("a")), "reads no intermediate buffer")
    x = te.placeholder((4,), "float32", "x")
    a = te.compute((4,), lambda i: x[i] + 1.0, name="a")
    half = te.create_prim_func([x, te.compute((2,), lambda i: a[i], name="y")], "f")
    sch = Schedule(half)
    refused(lambda: sch.reverse_compute_inline(sch.get_block("y")), "it does not read all of 'a'")
    twice = te.create_prim_func([x, te.compute((4, 2), lambda i, j: a[i], name="y")], "f")
    sch = Schedule(twice)
    refused(lambda: sch.reverse_compute_inline(sch.get_block("y")), "the same for all values of 'vj'")


# decompose_reduction ----------------------------------------------------------------------------------------------


def test_decompose_reduction_golden(golden):
    func = dense(N, 12, 10, relu=False)
    sch = Schedule(func)
    i, j, k = loops_of(sch, "y")
    j0, j1 = sch.split(j, [None, 4])
    sch.reorder(i, j0, k, j1)
    init = sch.decompose_reduction(sch.get_block("y"), k)
    assert init.name == "y_init"
    golden("decompose_reduction.txt", sch.show())
    assert_same(func, sch.func, {"n": 3})


@pytest.mark.parametrize("position", [0, 1, 2])
def test_decompose_reduction_anywhere_outside(position):
    func = dense(3, 4, 5)
    sch = Schedule(func)
    sch.decompose_reduction(sch.get_block("y"), loops_of(sch, "y")[position])
    assert_same(func, sch.func)


def test_decompose_reduction_with_a_tail_in_the_reduction():
    func = dense(3, 10, 5)
    sch = Schedule(func)
    k0, _ = sch.split(loops_of(sch, "y")[2], [None, 4])
    sch.decompose_reduction(sch.get_block("y"), k0)
    assert_same(func, sch.func)


def test_decompose_reduction_keeps_an_accumulator_in_its_iteration():
    sch = Schedule(dense(3, 4, 5))
    y = sch.get_block("y")
    i, j, _ = sch.get_loops(y)
    sch.cache_write(y, i, "local")
    refused(
        lambda: sch.decompose_reduction(y, i), "iterations of loop 'i' use elements of 'y_local' one after the other"
    )
    sch.decompose_reduction(y, j)
    assert_same(dense(3, 4, 5), sch.func)


def test_decompose_reduction_refusals():
    sch = Schedule(dense(3, 12, 5))
    block = sch.get_block("y")
    i, j, k = sch.get_loops(block)
    k0, k1 = sch.split(k, [None, 4])
    refused(lambda: sch.decompose_reduction(block, k1), "decompose_reduction(block 'y')", "takes part in the reduction")
    refused(lambda: sch.decompose_reduction(block, loops_of(sch, "z")[0]), "is not around it")
    refused(lambda: sch.decompose_reduction(sch.get_block("z"), i), "no initialisation")
    sch.reorder(k0, j)
    refused(lambda: sch.decompose_reduction(block, j), "loop 'k_0', around 'j', takes part in the reduction")


# compute_at -------------------------------------------------------------------------------------------------------


def test_compute_at_golden(golden):
    func = conv(N, 2, 4, 2)
    sch = Schedule(func)
    loops = loops_of(sch, "conv")
    sch.compute_at(sch.get_block("pad"), loops[2])
    golden("compute_at.txt", sch.show())
    assert_same(func, sch.func, {"n": 1})


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("stride", [1, 2])
def test_compute_at_any_loop(position, stride):
    func = conv(2, 2, 4, 2, stride=stride)
    sch = Schedule(func)
    sch.compute_at(sch.get_block("pad"), loops_of(sch, "conv")[position])
    assert_same(func, sch.func)


def test_compute_at_tiles_with_tails():
    func = chain(N)
    sch = Schedule(func)
    outer, _ = sch.split(loops_of(sch, "c")[0], [None, 4])
    sch.compute_at(sch.get_block("b"), outer)
    sch.compute_at(sch.get_block("a"), outer)
    for n in (1, 4, 6):
        assert_same(func, sch.func, {"n": n})


def test_compute_at_a_whole_reduction():
    func = dense(N, 8, 6)
    sch = Schedule(func)
    i, _ = loops_of(sch, "z")
    sch.compute_at(sch.get_block("y"), i)
    assert_same(func, sch.func, {"n": 3})


def test_compute_at_refusals():
    sch = Schedule(chain(8))
    (i,) = loops_of(sch, "b")
    refused(lambda: sch.compute_at(sch.get_block("c"), i), "compute_at(block 'c')", "it computes the output 'c'")
    refused(lambda: sch.compute_at(sch.get_block("b"), i), "it is under loop 'i' already")
    (j,) = loops_of(sch, "a")
    refused(lambda: sch.compute_at(sch.get_block("b"), j), "its consumer 'c' is not under loop 'i' around block 'a'")
    sch = Schedule(softmax(4, 6))
    refused(lambda: sch.compute_at(sch.get_block("e"), loops_of(sch, "y")[0]), "'total' is not under loop")
    sch = Schedule(conv(1, 2, 6, 3))
    loops = loops_of(sch, "conv")
    sch.parallel(loops[2])
    refused(lambda: sch.compute_at(sch.get_block("pad"), loops[2]), "would write the same parts of 'pad'")


# reverse_compute_at -----------------------------------------------------------------------------------------------


def test_reverse_compute_at_golden(golden):
    func = softmax(N, 10)
    sch = Schedule(func)
    row = loops_of(sch, "top")[0]
    for name in ("e", "total", "y"):
        sch.reverse_compute_at(sch.get_block(name), row)
    sch.parallel(row)
    golden("reverse_compute_at.txt", sch.show())


def test_reverse_compute_at_tiles_with_tails():
    func = dense(N, 4, 10)
    sch = Schedule(func)
    i, j, k = loops_of(sch, "y")
    i0, i1 = sch.split(i, [None, 4])
    j0, j1 = sch.split(j, [None, 4])
    sch.reorder(i0, j0, k, i1, j1)
    sch.reverse_compute_at(sch.get_block("z"), j0)
    for n in (1, 4, 6):
        assert_same(func, sch.func, {"n": n})


def test_reverse_compute_at_refusals():
    sch = Schedule(dense(4, 8, 4))
    z = sch.get_block("z")
    i, _j, k = loops_of(sch, "y")
    refused(lambda: sch.reverse_compute_at(z, k), "reverse_compute_at(block 'z')", "complete only after loop 'k'")
    refused(lambda: sch.reverse_compute_at(sch.get_block("y"), loops_of(sch, "z")[0]), "nothing it reads is written")
    sch.vectorize(loops_of(sch, "z")[1])
    sch = Schedule(softmax(4, 6))
    row = loops_of(sch, "top")[0]
    refused(lambda: sch.reverse_compute_at(sch.get_block("y"), row), "it reads 'e', which block 'e' computes")
    e_row = loops_of(sch, "e")[0]
    reason = "it reads 'total', which block 'total' computes only after loop 'i'"
    refused(lambda: sch.reverse_compute_at(sch.get_block("y"), e_row), reason)
    sch = Schedule(dense(4, 8, 4))
    sch.unroll(loops_of(sch, "y")[0])
    refused(lambda: sch.reverse_compute_at(sch.get_block("z"), loops_of(sch, "y")[0]), "it is unrolled")
    assert i is not None


def test_reverse_compute_at_refuses_reads_of_neighbours():
    x = te.placeholder((8,), "float32", "x")
    a = te.compute((8,), lambda i: x[i] + 1.0, name="a")
    func = te.create_prim_func([x, te.compute((7,), lambda i: a[i] + a[i + 1], name="y")], "f")
    sch = Schedule(func)
    refused(
        lambda: sch.reverse_compute_at(sch.get_block("y"), loops_of(sch, "a")[0]),
        "by vi + 1, which is none of its iteration variables",
    )


# cache_write ------------------------------------------------------------------------------------------------------


def tiled(func: PrimFunc, n_tile: int = 4) -> Schedule:
    sch = Schedule(func)
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    i0, i1 = sch.split(i, [None, 2])
    j0, j1 = sch.split(j, [None, n_tile])
    sch.reorder(i0, j0, k, i1, j1)
    sch.cache_write(y, j0, "register")
    return sch


def test_cache_write_golden(golden):
    func = dense(N, 12, 10)
    sch = tiled(func)
    sch.reverse_compute_inline(sch.get_block("z"))
    sch.decompose_reduction(sch.get_block("y"), loops_of(sch, "y")[2])
    golden("cache_write.txt", sch.show())
    for n in (1, 2, 5):
        assert_same(func, sch.func, {"n": n})


def test_cache_write_of_single_elements():
    func = mean(N, 3, 4)
    sch = Schedule(func)
    sch.cache_write(sch.get_block("total"), loops_of(sch, "total")[1], "local")
    assert "alloc total_local: float32[1, 1] in local" in sch.show()
    assert_same(func, sch.func, {"n": 2})


def test_cache_write_stays_before_what_reads_it():
    func = softmax(3, 6)
    sch = Schedule(func)
    row = loops_of(sch, "top")[0]
    for name in ("e", "total", "y"):
        sch.reverse_compute_at(sch.get_block(name), row)
    for name in ("top", "total"):
        sch.cache_write(sch.get_block(name), row, "register")
    sch.parallel(row)
    assert_same(func, sch.func)


def test_cache_is_private_to_parallel_iterations():
    func = dense(8, 12, 8)
    sch = tiled(func)
    sch.parallel(loops_of(sch, "y")[0])
    assert_same(func, sch.func)


def test_cache_write_refusals():
    sch = Schedule(dense(N, 12, 10))
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    refused(lambda: sch.cache_write(y, k, "register"), "cache_write(block 'y')", "loop 'k'", "takes part in")
    refused(lambda: sch.cache_write(y, loops_of(sch, "z")[0], "register"), "is not around it")
    i0, i1 = sch.split(i, [4, None])
    refused(lambda: sch.cache_write(y, i0, "register"), "constant number of values", "sch.split(i_1, [None, 16])")
    sch.decompose_reduction(y, k)
    refused(lambda: sch.cache_write(y, j, "register"), "'y', which it writes, is written by block 'y_init', too")
    sch = Schedule(chain(4))
    assert i1 is not None
    (loop,) = loops_of(sch, "a")
    sch.cache_write(sch.get_block("a"), loop, "local")
    assert_same(chain(4), sch.func)


def test_blocks_on_private_buffers_stay_where_they_are():
    sch = Schedule(chain(8))
    (i,) = loops_of(sch, "b")
    copy = sch.cache_write(sch.get_block("b"), i, "register")
    (j,) = loops_of(sch, "a")
    tied = "is filled again in each iteration of loop"
    refused(lambda: sch.reverse_compute_at(sch.get_block("b"), j), tied)
    refused(lambda: sch.reverse_compute_inline(sch.get_block("b")), tied)
    refused(lambda: sch.compute_inline(copy), tied)
    refused(lambda: sch.vectorize(i), "depend on one another through buffer 'b_register'")


def test_reverse_compute_inline_waits_for_other_inputs():
    x = te.placeholder((4,), "float32", "x")
    a = te.compute((4,), lambda i: x[i] + 1.0, name="a")
    b = te.compute((4,), lambda i: x[i] * 2.0, name="b")
    func = te.create_prim_func([x, te.compute((4,), lambda i: a[i] + b[i], name="y"), b], "f")
    sch = Schedule(func)
    assert [block.name for block in blocks_in(func.body)] == ["a", "b", "y"]
    refused(lambda: sch.reverse_compute_inline(sch.get_block("y")), "which block 'b' computes after 'a'")


def test_relu_after_transposed_product_stays_apart():
    x, w = te.placeholder((4, 6), "float32", "x"), te.placeholder((6, 8), "float32", "w")
    k = te.reduce_axis(6, "k")
    y = te.compute((4, 8), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="y")
    z = te.compute((8, 4), lambda i, j: maximum(y[j, i], 0.0), name="z")
    func = te.create_prim_func([x, w, z], "f")
    sch = tiled(func)
    sch.reverse_compute_inline(sch.get_block("z"))
    assert_same(func, sch.func)
    assert_same(transpose(3, 4), transpose(3, 4))


def test_cache_write_under_a_fused_loop_of_free_dims():
    x = te.placeholder((N, 8), "float32", "x")
    y = te.compute((N, N, 8), lambda i, j, k: x[i, k] + x[j, k], name="y")
    func = te.create_prim_func([x, y], "pairs")
    for inside in (False, True):
        sch = Schedule(func)
        i, j, k = loops_of(sch, "y")
        pairs = sch.fuse(i, j)
        sch.cache_write(sch.get_block("y"), k if inside else pairs, "local")
        assert sch.func.allocs[0].shape == (1, 1, 1 if inside else 8)
        assert_same(func, sch.func, {"n": 3})
