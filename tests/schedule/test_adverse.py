"""Combinations in which a primitive that looks only nearby would change the meaning: refused, or right."""

from __future__ import annotations

import numpy as np
import pytest
from schedule.test_blocks import loops_of, refused

from kedge.compiler import te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import blocks_in
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.structural import equal
from support.functions import assert_same, chain, conv, dense

N = Var("n", lower=1)


def sums(extent: int = 3):
    """`y` sums rows, and `z` uses each sum for all of a row."""
    x, k = te.placeholder((4, extent), "float32", "x"), te.reduce_axis(extent, "k")
    y = te.compute((4,), lambda i: te.sum(x[i, k], k), name="y")
    return te.create_prim_func([x, te.compute((4, 5), lambda i, j: y[i] * 2.0, name="z")], "sums")


def row_sums():
    x, k = te.placeholder((4, 3), "float32", "x"), te.reduce_axis(3, "k")
    return te.create_prim_func([x, te.compute((4,), lambda i: te.sum(x[i, k], k), name="y")], "row_sums")


def test_a_sum_that_is_computed_again_starts_again():
    for at in (0, 1):
        sch = Schedule(sums())
        y = sch.get_block("y")
        loops = loops_of(sch, "z")
        sch.compute_at(y, loops[1])
        refused(lambda at=at, sch=sch, y=y, loops=loops: sch.decompose_reduction(y, loops[at]), "one after the other")
        sch.decompose_reduction(y, sch.get_loops(y)[-1])
        assert_same(sums(), sch.func)
    sch = Schedule(sums())
    y = sch.get_block("y")
    i, j = loops_of(sch, "z")
    sch.compute_at(y, j)
    fused = sch.fuse(i, j)
    refused(lambda: sch.decompose_reduction(y, fused), "one after the other")


def test_an_accumulator_with_versions_starts_again():
    func = dense(8, 5, 6, relu=False)
    sch = Schedule(func)
    y = sch.get_block("y")
    i, *_ = sch.get_loops(y)
    sch.cache_write(y, i, "local")
    sch.software_pipeline(i, [0, 1])
    assert_same(func, sch.func)
    refused(lambda: sch.decompose_reduction(y, i), "one after the other")


def test_padding_begins_where_the_loop_ends_not_the_buffer():
    a, k = te.placeholder((9,), "float32", "a"), te.reduce_axis(5, "k")
    func = te.create_prim_func([a, te.compute((3,), lambda i: te.sum(a[k], k), name="y")], "f")
    sch = Schedule(func)
    sch.pad_einsum(sch.get_block("y"), [1, 4])
    assert_same(func, sch.func)


@pytest.mark.parametrize("padding", [[1, 4, 3], [1, 4, 1], [2, 1, 3]])
def test_padding_of_what_has_one_element_in_a_dim(padding):
    a, b, k = te.placeholder((1, 5, 7), "float32", "a"), te.placeholder((7,), "float32", "b"), te.reduce_axis(7, "k")
    y = te.compute((1, 5), lambda n, i: te.sum(a[0, i, k] * b[k], k), name="y")
    func = te.create_prim_func([a, b, y], "f")
    sch = Schedule(func)
    sch.pad_einsum(sch.get_block("y"), padding)
    assert sch.func is not func
    assert_same(func, sch.func)


@pytest.mark.parametrize("padding", [[3, 1, 4], [3, 4, 1], [4, 3, 2]])
def test_one_buffer_may_be_two_operands(padding):
    x, k = te.placeholder((5, 5), "float32", "x"), te.reduce_axis(5, "k")
    for element in (lambda i, j: te.sum(x[i, k] * x[k, j], k), lambda i, j: te.sum(x[i, k] * x[j, k], k)):
        func = te.create_prim_func([x, te.compute((5, 5), element, name="y")], "f")
        sch = Schedule(func)
        sch.pad_einsum(sch.get_block("y"), padding)
        assert_same(func, sch.func)


def test_loops_that_drive_output_and_reduction_are_refused():
    sch = Schedule(row_sums())
    fused = sch.fuse(*loops_of(sch, "y"))
    sch.cache_read(sch.get_block("y"), "x", fused)
    assert_same(row_sums(), sch.func)
    refused(lambda: sch.software_pipeline(fused, [0, 1]), "drives both the output and the reduction of block 'y'")
    x, b = te.placeholder((4, 3), "float32", "x"), te.placeholder((4,), "float32", "b")
    k = te.reduce_axis(3, "k")
    func = te.create_prim_func([x, b, te.compute((2, 4), lambda o, i: te.sum(x[i, k] * b[i], k), name="y")], "f")
    sch = Schedule(func)
    o, i, j = loops_of(sch, "y")
    sch.fuse(i, j)
    refused(
        lambda: sch.cache_read(sch.get_block("y"), "b", o),
        "loop 'i_k' drives both its output and its reduction",
        "before sch.fuse",
    )


def test_an_instruction_updates_where_it_reads():
    text = """func f(a: uint8[4], b: int8[16, 4]) -> (c: int32[32]):
  for i in range(16):
    for k in range(4):
      block c:
        vi = spatial(16, i)
        vk = reduce(4, k)
        reads c[vi], a[vk], b[vi, vk]
        writes c[vi + 16]
        c[vi + 16] = c[vi] + int32(a[vk]) * int32(b[vi, vk])"""
    sch = Schedule(parse_func(text))
    refused(lambda: sch.tensorize(loops_of(sch, "c")[0], "x86.vnni.dot"), "does not compute what x86.vnni.dot does")


CARRIED = """func f(x: float32[6]) -> (y: float32[6]):
  alloc t: float32[1]
  for i in range(6):
    block a:
      vi = reduce(6, i)
      reads x[vi]
      writes t[0]
      init:
        t[0] = 0.0
      t[0] = t[0] + x[vi]
    block b:
      vi = spatial(6, i)
      reads t[0]
      writes y[vi]
      y[vi] = t[0]"""
SOMETIMES = CARRIED.replace("vi = reduce(6, i)", "vi = spatial(6, i)\n      where i % 2 == 0").replace(
    "      init:\n        t[0] = 0.0\n      t[0] = t[0] + x[vi]", "      t[0] = x[vi]"
)


@pytest.mark.parametrize("text", [CARRIED, SOMETIMES], ids=["carried", "sometimes"])
def test_what_iterations_hand_on_cannot_be_pipelined(text):
    sch = Schedule(parse_func(text))
    refused(
        lambda: sch.software_pipeline(loops_of(sch, "a")[0], [0, 1]),
        "block 'a' does not fill all of buffer 't' in each iteration",
    )


def test_scopes_fit_loops_whatever_comes_first():
    for scope in ("global", "shared"):
        sch = Schedule(dense(N, 5, 6, relu=False))
        i, *_ = loops_of(sch, "y")
        sch.parallel(i)
        what = f"each iteration of parallel loop 'i' fills 'y_{scope}' with other values; in {scope} scope"
        refused(lambda sch=sch, i=i, scope=scope: sch.cache_write(sch.get_block("y"), i, scope), what, "local")
    sch = Schedule(dense(N, 5, 6, relu=False))
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    refused(lambda: sch.cache_write(y, i, "cache"), "cache_write(scope='cache'): it is not one of 'global', 'shared'")
    sch.reorder(j, i, k)
    refused(lambda: sch.cache_read(y, "x", j, "register"), "in register scope has a dim of no constant size")
    sch = Schedule(dense(8, 5, 6, relu=False))
    y = sch.get_block("y")
    i, _, k = sch.get_loops(y)
    sch.bind(i, "blockIdx.x")
    sch.cache_write(y, i, "shared")
    sch.rfactor(y, k)
    assert "y_shared_rf: float32[1, 6, 5] in shared" in sch.show()


def test_maps_over_free_dims_replay():
    func = dense(4, 5, N)
    sch = Schedule(func)
    sch.transform_layout(sch.get_block("y"), lambda i, j: (i * N + j,))
    assert_same(func, sch.func, {"n": 3})
    assert equal(Schedule.replay(func, sch.trace).func, sch.func)
    y = sch.get_block("y")
    for wrong in (lambda i: i, lambda i: ("a", i)):
        refused(lambda wrong=wrong: sch.transform_layout(y, wrong), "index_map returns", "lambda i, j: (j, i)")


def test_annotations_that_no_text_can_hold():
    sch = Schedule(chain(4))
    (i,) = loops_of(sch, "a")
    refused(lambda: sch.annotate(i, 3, 0), "annotate(key=3): it is an int, not a str")
    for key, value in [("p", float("inf")), ("intrin", "x86.vnni.dot")]:
        refused(lambda key=key, value=value: sch.annotate(i, key, value), "annotate(loop 'i' around block 'a')")
    assert equal(parse_func(sch.show()), sch.func)


UNKNOWN = """func f(a: uint8[4], b: int8[16, 4]) -> (c: int32[16]):
  for i in tensorized(16):  # intrin='nope'
    for k in tensorized(4):
      block c:
        vi = spatial(16, i)
        vk = reduce(4, k)
        reads c[vi], a[vk], b[vi, vk]
        writes c[vi]
        c[vi] = c[vi] + int32(a[vk]) * int32(b[vi, vk])"""


def test_what_would_break_an_instruction_is_refused_under_its_own_name():
    sch = Schedule(parse_func(UNKNOWN))
    with pytest.raises(ScheduleError, match=r"annotate\(loop 'i'\): nope computes .*there is no instruction 'nope'"):
        sch.annotate(sch.get_block("c"), "note", 1)
    values = [np.ones(p.shape, p.dtype) for p in sch.func.params[:2]]
    assert interp.run(parse_func(UNKNOWN.replace("tensorized", "range")), values)[0].shape == (16,)


@pytest.mark.parametrize("scope", ["global", "local", "register"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_tile_is_not_reset_where_its_loops_run_idle(scope, which):
    sch = Schedule(sums())
    y = sch.get_block("y")
    sch.set_scope(y, scope)
    whole, rest = sch.split(sch.get_loops(y)[which], [None, 4])
    idle, _ = sch.split(whole, [2, None])  # its second iteration has nothing to do
    if which == 1:
        sch.reorder(idle, sch.get_loops(y)[0])
    sch.decompose_reduction(y, rest)
    assert_same(sums(), sch.func)


HANDED_ON = """func f(x: float32[5, 3]) -> (y: float32[3, 2]):
  alloc t: float32[2] in local
  for i in range(3):
    for j in range(2):
      for k in range(3):
        block t:
          vi = spatial(5, i * 2 + j)
          vj = spatial(2, j)
          vk = reduce(3, k)
          where i * 2 + j < 5
          reads x[vi, vk]
          writes t[vj]
          init:
            t[vj] = 0.0
          t[vj] = t[vj] + x[vi, vk]
    for j in range(2):
      block y:
        vi = spatial(3, i)
        vj = spatial(2, j)
        reads t[vj]
        writes y[vi, vj]
        y[vi, vj] = t[vj]"""


def test_what_a_tile_hands_on_is_not_reset():
    guarded = HANDED_ON.replace("        reads t[vj]\n", "        where i * 2 + j < 5\n        reads t[vj]\n")
    crossed = guarded.replace("vj = spatial(2, j)\n        where", "vj = spatial(2, 1 - j)\n        where")
    for text, tested in ((HANDED_ON, True), (guarded, False), (crossed, True)):
        sch = Schedule(parse_func(text))
        t = sch.get_block("t")
        init = sch.decompose_reduction(t, sch.get_loops(t)[1])
        (block,) = [b for b in blocks_in(sch.func.body) if b.name == init.name]
        assert (print_expr(block.predicate) != "True") is tested
        assert_same(parse_func(text), sch.func)


def idle_and_reducing():
    """A schedule whose reduction has an idle loop, and another that is idle and reduces at once."""
    sch = Schedule(row_sums())
    y = sch.get_block("y")
    whole, rest = sch.split(sch.get_loops(y)[1], [None, 3])
    _, first, second = sch.split(whole, [None, 2, 2])
    sch.reorder(second, first)
    return sch, y, sch.fuse(first, rest)


def test_loops_that_are_idle_and_reduce_at_once_are_refused():
    reason = "mixes loops of its reduction with others"
    sch, y, fused = idle_and_reducing()
    refused(lambda: sch.decompose_reduction(y, fused), "decompose_reduction(block 'y')", reason)
    refused(lambda: sch.rfactor(y, fused), "rfactor(block 'y')", reason)
    refused(lambda: sch.cache_write(y, sch.get_loops(y)[0]), "cache_write(block 'y')", reason)
    sch = Schedule(row_sums())
    y = sch.get_block("y")
    outer, _ = sch.split(sch.fuse(*sch.get_loops(y)), [None, 5])
    refused(lambda: sch.decompose_reduction(y, outer), "decompose_reduction(block 'y')", reason)


def test_every_buffer_of_an_initialisation_counts():
    text = """func f(x: float32[4, 3]) -> (y: float32[4], z: float32[4]):
  alloc t: float32[1]
  for i in range(4):
    for k in range(3):
      block y:
        vi = spatial(4, i)
        vk = reduce(3, k)
        reads x[vi, vk]
        writes y[vi], t[0], z[vi]
        init:
          y[vi] = 0.0
          t[0] = 0.0
        y[vi] = y[vi] + x[vi, vk]
        t[0] = t[0] + x[vi, vk]
        z[vi] = t[0]"""
    sch = Schedule(parse_func(text))
    y = sch.get_block("y")
    i, k = sch.get_loops(y)
    refused(lambda: sch.decompose_reduction(y, i), "iterations of loop 'i' use elements of 't' one after the other")
    sch.decompose_reduction(y, k)
    assert_same(parse_func(text), sch.func)


def test_what_belongs_to_an_iteration_stays_in_its_loop():
    outside = "would have its own 'y_rf', which is in local scope and would be used outside of the loop"
    func = dense(4, 5, 6, relu=False)
    sch = Schedule(func)
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    partial = sch.rfactor(y, k)
    sch.reorder(i, j)
    sch.parallel(j)
    sch.set_scope(partial, "local")
    refused(lambda: sch.decompose_reduction(partial, i), "decompose_reduction(loop 'j')", outside)
    sch.decompose_reduction(partial, k)
    assert_same(func, sch.func)

    sch = Schedule(chain(8))
    a, b, c = (sch.get_block(name) for name in "abc")
    (i,) = sch.get_loops(b)
    sch.compute_at(a, i)
    sch.bind(i, "blockIdx.x")
    sch.set_scope(a, "shared")
    outside = "would have its own 'a', which is in shared scope and would be used outside of the loop"
    refused(lambda: sch.compute_inline(b), "compute_inline(loop 'i' around blocks 'a', 'b')", outside)
    refused(lambda: sch.compute_at(b, sch.get_loops(c)[0]), "compute_at(", "'a'")


def test_what_a_tile_hands_on_cannot_be_pipelined():
    guarded = HANDED_ON.replace("        reads t[vj]\n", "        where i * 2 + j < 5\n        reads t[vj]\n")
    sch = Schedule(parse_func(HANDED_ON))
    (i, *_) = loops_of(sch, "t")
    refused(lambda: sch.software_pipeline(i, [0, 1]), "block 't' does not fill all of buffer 't' in each iteration")
    sch = Schedule(parse_func(guarded))
    (i, *_) = loops_of(sch, "t")
    sch.software_pipeline(i, [0, 1])
    assert_same(parse_func(guarded), sch.func)


@pytest.mark.parametrize(
    ("func", "name", "buffer", "which"),
    [(dense(N, 11, 6), "y", "w", 2), (dense(N, 11, 6), "y", "x", 2), (conv(1, 2, 5, 2), "pad", "x", 2)],
    ids=["w", "x", "pad"],
)
def test_tiles_cut_off_at_an_end_are_pipelined(func, name, buffer, which):
    sch = Schedule(func)
    block = sch.get_block(name)
    outer, _ = sch.split(sch.get_loops(block)[which], [None, 4])
    copy = sch.cache_read(block, buffer, outer)
    if name == "y":
        sch.split(sch.get_loops(copy)[-1], [None, 2])
    sch.software_pipeline(outer, [0, 1])
    assert_same(func, sch.func, {"n": 3})


@pytest.mark.parametrize("scope", ["global", "shared", "local", "register"])
def test_lanes_do_not_share_a_tile(scope):
    func = dense(4, 5, 8)
    sch = Schedule(func)
    z = sch.get_block("z")
    i, j = sch.get_loops(z)
    outer, lanes = sch.split(j, [None, 4])
    sch.vectorize(lanes)
    refused(lambda: sch.cache_write(z, lanes, scope), "cache_write(", "vectorized", "share")
    refused(lambda: sch.reorder(lanes, i, outer), "reorder(loop 'j_1')", "it is vectorized, and would not be innermost")
    sch.reorder(outer, i)
    sch.cache_write(z, i, scope)
    assert_same(func, sch.func)
