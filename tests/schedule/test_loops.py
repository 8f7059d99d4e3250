"""split, fuse, reorder and the kinds of loops: what they make, what they refuse, that the meaning stays."""

import json

import pytest

from kedge.compiler import te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.expr import Cast, Load, Var, const
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Store
from kedge.compiler.tir.structural import equal
from kedge.compiler.tir.verify import verify
from support.functions import assert_same, chain, conv, dense, softmax, transpose

N, M = Var("n", lower=1), Var("m", lower=1)


def refused(call, *words):
    """`call` raises `ScheduleError` with all `words` in its message."""
    with pytest.raises(ScheduleError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def loops_of(sch, name):
    return sch.get_loops(sch.get_block(name))


# split ------------------------------------------------------------------------------------------------------------


def test_split_golden(golden):
    sch = Schedule(dense(N, 12, 10, relu=False))
    i, j, _ = loops_of(sch, "y")
    sch.split(i, [None, 4])
    sch.split(j, [None, 2, 4])
    golden("split.txt", sch.show())
    for n in (1, 4, 7):
        assert_same(dense(N, 12, 10, relu=False), sch.func, {"n": n})


@pytest.mark.parametrize("factors", [[None, 4], [4, None], [2, 6], [2, None, 3], [12, 1], [None, 5], [5, 3]])
def test_split_keeps_the_meaning(factors):
    func = dense(3, 12, 2)
    sch = Schedule(func)
    new = sch.split(loops_of(sch, "y")[2], factors)
    assert len(new) == len(factors)
    assert_same(func, sch.func)


def test_split_of_a_split_comes_out_flat():
    sch = Schedule(chain(64))
    (i,) = loops_of(sch, "a")
    outer, _ = sch.split(i, [None, 8])
    sch.split(outer, [None, 4])
    assert "vi = spatial(64, i_0_0 * 32 + i_0_1 * 8 + i_1)" in sch.show()
    assert "where" not in sch.show()


def test_split_takes_what_the_others_leave_of_a_quotient():
    """ceil(ceil(n / 2) * 8 / 16) * 16 is enough, though no proof of it is found."""
    func = chain((N + 1) // 2 * 8)
    sch = Schedule(func)
    (i,) = loops_of(sch, "a")
    outer, inner = sch.split(i, [None, 16])
    sch.vectorize(inner)
    sch.parallel(outer)
    for n in (1, 2, 3, 8):
        assert_same(func, sch.func, {"n": n})


def test_split_refusals():
    sch = Schedule(dense(N, 12, 10))
    i, j, _k = loops_of(sch, "y")
    refused(lambda: sch.split(i, [None, None]), "split(loop 'i' around block 'y')", "at most one of them None")
    refused(lambda: sch.split(i, [4]), "it takes two or more")
    refused(lambda: sch.split(i, [None, 0]), "each is at least 1")
    refused(
        lambda: sch.split(j, [3, 3]),
        "split(loop 'j' around block 'y')",
        "make 9 iterations, and may be too few for 10",
        "for j in range(10)",
    )
    refused(lambda: sch.split(i, [2, 3]), "make 6 iterations, and may be too few for n")
    sch.parallel(i)
    refused(lambda: sch.split(i, [None, 2]), "it is parallel already")


# fuse -------------------------------------------------------------------------------------------------------------


def test_fuse_golden(golden):
    func = transpose(N, M)
    sch = Schedule(func)
    fused = sch.fuse(*loops_of(sch, "y"))
    sch.split(fused, [None, 8])
    golden("fuse.txt", sch.show())
    assert_same(func, sch.func, {"n": 3, "m": 5})


def test_parallel_where_a_digit_is_taken_modulo_its_own_extent():
    """105 elements in vectors of 16 are 7 steps, as many as the innermost dim has elements."""
    x = te.placeholder((N, 4, 5, 7), "float32", "x")
    y = te.compute((N, 3, 5, 7), lambda *i: te.maximum(x[i], 0.0), name="y")
    func = te.create_prim_func([x, y], "part")
    sch = Schedule(func)
    batch, *rest = loops_of(sch, "y")
    step, lane = sch.split(sch.fuse(*rest), [None, 16])
    sch.vectorize(lane)
    sch.parallel(sch.fuse(batch, step))
    assert_same(func, sch.func, {"n": 2})


def test_parallel_refuses_steps_that_overlap_in_digits():
    """Windows of 16 that begin 15 apart share an element, whatever digits they are written in."""
    func = parse_func(
        """
func overlap(x: float32[120]) -> (y: float32[2, 120]):
  for b_s in range(14):
    for l in range(16):
      block y:
        vb = spatial(2, b_s // 7)
        vi = spatial(120, b_s % 7 * 15 + l)
        reads x[vi]
        writes y[vb, vi]
        y[vb, vi] = x[vi]
"""
    )
    sch = Schedule(func)
    refused(lambda: sch.parallel(loops_of(sch, "y")[0]), "parallel", "may depend on one another")


def test_fuse_undoes_split():
    func = chain(24)
    sch = Schedule(func)
    (i,) = loops_of(sch, "a")
    sch.fuse(*sch.split(i, [None, 2, 4]))
    assert "vi = spatial(24, i_0_i_1_i_2)" in sch.show()
    assert_same(func, sch.func)


def test_fuse_reduction_loops():
    func = conv(1, 3, 4, 2)
    sch = Schedule(func)
    loops = loops_of(sch, "conv")
    sch.fuse(*loops[4:])
    sch.fuse(*loops[:4])
    assert_same(func, sch.func)


def test_fuse_refusals():
    sch = Schedule(dense(N, 12, 10))
    i, j, k = loops_of(sch, "y")
    refused(lambda: sch.fuse(i), "two loops or more")
    refused(
        lambda: sch.fuse(i, k),
        "fuse(loop 'i' around block 'y')",
        "loop 'j' stands between it and loop 'k'",
        "for i in range(n)",
    )
    refused(lambda: sch.fuse(j, i), "they are in the wrong order")
    refused(
        lambda: sch.fuse(i, loops_of(sch, "z")[0]), "loop 'i' around block 'z' is not inside loop 'i' around block 'y'"
    )


# reorder ----------------------------------------------------------------------------------------------------------


def test_reorder_golden(golden):
    func = dense(N, 12, 10, relu=False)
    sch = Schedule(func)
    i, _j, k = loops_of(sch, "y")
    sch.reorder(k, i)  # j stays where it is
    golden("reorder.txt", sch.show())
    assert_same(func, sch.func, {"n": 3})


def test_reorder_puts_parts_of_a_reduction_anywhere():
    func = dense(5, 12, 10)
    sch = Schedule(func)
    i, j, k = loops_of(sch, "y")
    k0, k1 = sch.split(k, [None, 4])
    sch.reorder(k1, j, k0, i)
    assert_same(func, sch.func)


def test_reorder_refusals():
    sch = Schedule(dense(N, 12, 10))
    i, j, k = loops_of(sch, "y")
    other = loops_of(sch, "z")[0]
    refused(lambda: sch.reorder(i), "two loops or more, each once")
    refused(lambda: sch.reorder(i, i), "two loops or more, each once")
    refused(lambda: sch.reorder(i, other), "reorder(loop", "are not inside one another")
    sch.decompose_reduction(sch.get_block("y"), k)
    refused(
        lambda: sch.reorder(k, j),
        "reorder(loop 'j' around blocks 'y_init', 'y')",
        "besides loop 'k' it holds block 'y_init'",
    )


def test_reorder_refuses_to_break_a_dependence():
    sch = Schedule(softmax(4, 6))
    i, k = loops_of(sch, "top")
    sch.reverse_compute_at(sch.get_block("e"), i)
    refused(lambda: sch.reorder(k, i), "besides loop 'k' it holds block 'e'")


def test_reorder_keeps_the_initialisation_first():
    # One loop over both the reduction and a spatial dim, cut across: its first value may come late.
    sch = Schedule(conv(1, 2, 4, 2, kernel=1, pad=0))
    n, o, h, w, c, r, s = loops_of(sch, "conv")
    sch.reorder(n, o, w, r, s, c, h)
    mixed, _ = sch.split(sch.fuse(c, h), [None, 3])
    refused(lambda: sch.reorder(mixed, w), "drives both the output and the reduction of block 'conv'")


# kinds ------------------------------------------------------------------------------------------------------------


def test_kinds_golden(golden):
    func = dense(N, 12, 16, relu=False)
    sch = Schedule(func)
    i, j, k = loops_of(sch, "y")
    j0, j1, j2 = sch.split(j, [None, 2, 4])
    sch.reorder(i, j0, k, j1, j2)
    sch.parallel(i)
    sch.unroll(j1)
    sch.vectorize(j2)
    golden("kinds.txt", sch.show())
    assert_same(func, sch.func, {"n": 3})


def test_bind():
    func = chain(N)
    sch = Schedule(func)
    outer, inner = sch.split(loops_of(sch, "a")[0], [None, 32])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")
    assert "for i_1 in thread(32, 'threadIdx.x'):" in sch.show()
    assert_same(func, sch.func, {"n": 40})
    refused(lambda: sch.bind(loops_of(sch, "b")[0], "warp"), "thread='warp' is no axis of threads", "threadIdx.x")


@pytest.mark.parametrize("primitive", ["parallel", "vectorize"])
def test_reduction_loops_do_not_run_at_once(primitive):
    sch = Schedule(dense(4, 8, 4))
    k = loops_of(sch, "y")[2]
    refused(lambda: getattr(sch, primitive)(k), f"{primitive}(loop 'k')", "block 'y' reduces over it")


def test_unroll_takes_reduction_loops():
    func = dense(4, 8, 4)
    sch = Schedule(func)
    sch.unroll(loops_of(sch, "y")[2])
    assert_same(func, sch.func)


def test_constant_extents():
    sch = Schedule(chain(N))
    (i,) = loops_of(sch, "a")
    refused(
        lambda: sch.vectorize(i),
        "its extent n is not constant",
        "outer, inner = sch.split(i, [None, 8]); sch.vectorize(inner)",
    )
    refused(lambda: sch.unroll(i), "its extent n is not constant")


def test_vectorize_only_innermost():
    sch = Schedule(transpose(4, 4))
    i, _ = loops_of(sch, "y")
    refused(lambda: sch.vectorize(i), "not innermost", "'j' is inside")


def test_parallel_does_not_nest():
    sch = Schedule(transpose(4, 4))
    i, j = loops_of(sch, "y")
    sch.parallel(i)
    refused(lambda: sch.parallel(j), "stands inside parallel loop 'i'")
    refused(lambda: sch.parallel(i), "it is parallel already")


def test_dynamic_chunks():
    func = transpose(4, 4)
    sch = Schedule(func)
    i, _ = loops_of(sch, "y")
    sch.parallel(i, schedule="dynamic", chunk=2)
    assert "for i in parallel(4):  # chunk=2, schedule='dynamic'\n" in sch.show()
    assert equal(parse_func(sch.show()), verify(sch.func))
    assert_same(func, sch.func)
    again = Schedule.replay(func, json.loads(json.dumps(sch.trace)))
    assert equal(again.func, sch.func)
    plain = Schedule(func)
    plain.parallel(loops_of(plain, "y")[0], "dynamic")
    assert "for i in parallel(4):  # chunk=1, schedule='dynamic'\n" in plain.show()


def test_a_parallel_step_without_a_schedule_is_static():
    """As traces were before there was a choice."""
    func = transpose(4, 4)
    sch = Schedule(func)
    sch.parallel(loops_of(sch, "y")[0])
    *steps, last = sch.trace
    again = Schedule.replay(func, [*steps, {**last, "args": {"loop": last["args"]["loop"]}}])
    assert equal(again.func, sch.func)


def test_chunks_that_are_none():
    sch = Schedule(transpose(4, 4))
    i, _ = loops_of(sch, "y")
    refused(lambda: sch.parallel(i, "guided"), "parallel(schedule='guided')", "not one of 'static', 'dynamic'")
    refused(lambda: sch.parallel(i, "dynamic", chunk=1.5), "parallel(chunk=1.5)", "not an int or None")
    for chunk in (0, -1, 2**63):
        refused(lambda chunk=chunk: sch.parallel(i, "dynamic", chunk), f"chunk={chunk} is not between 1 and 2**63 - 1")
    refused(lambda: sch.parallel(i, chunk=2), "static chunks are one for each thread", 'sch.parallel(i, "dynamic", 2)')
    for key in ("schedule", "chunk"):
        refused(
            lambda key=key: sch.annotate(i, key, 1), f"key='{key}' is what sch.parallel writes", "call sch.parallel"
        )
    assert "parallel" not in sch.show()


def test_dependences_are_found():
    # Rows write overlapping parts: y[i + j] for all i, j.
    x, y = Buffer("x", (4,), "float32"), Buffer("y", (7,), "float32")
    i, j = Var("i"), Var("j")
    vi, vj = Var("vi"), Var("vj")
    block = with_regions(
        Block(
            "y",
            (IterVar(vi, const(4), "spatial"), IterVar(vj, const(4), "spatial")),
            (i, j),
            (),
            (),
            Store(y, (vi + vj,), Load(x, (vi,))),
        )
    )
    func = PrimFunc("f", (x, y), 1, For(i, const(4), "serial", For(j, const(4), "serial", block)))
    sch = Schedule(func)
    outer, inner = loops_of(sch, "y")
    refused(lambda: sch.parallel(outer), "parallel(loop 'i')", "depend on one another through buffer 'y'")
    sch.vectorize(inner)  # within one i, every j writes an element of its own


def test_scatter_is_not_parallel():
    x, index = Buffer("x", (4,), "float32"), Buffer("index", (4,), "int32")
    y, i, vi = Buffer("y", (4,), "float32"), Var("i"), Var("vi")
    where = Cast(Load(index, (vi,)), "int64")
    block = Block("y", (IterVar(vi, const(4), "spatial"),), (i,), (), (), Store(y, (where,), Load(x, (vi,))))
    sch = Schedule(PrimFunc("f", (x, index, y), 1, For(i, const(4), "serial", with_regions(block))))
    refused(lambda: sch.parallel(loops_of(sch, "y")[0]), "depend on one another through buffer 'y'")


@pytest.mark.parametrize("shape", [(N, 10), (6, N), (N, M)])
def test_fused_loops_are_parallel(shape):
    func = transpose(*shape)
    sch = Schedule(func)
    sch.parallel(sch.fuse(*loops_of(sch, "y")))
    assert_same(func, sch.func, {"n": 4, "m": 5})


def test_fused_tiles_are_parallel():
    func = conv(N, 1, 8, 4, kernel=1, pad=0)
    sch = Schedule(func)
    n, o, h, w = loops_of(sch, "relu")
    o0, o1 = sch.split(o, [None, 2])
    w0, w1 = sch.split(w, [None, 4])
    sch.reorder(n, o0, h, w0, o1, w1)
    sch.parallel(sch.fuse(n, o0, h, w0))
    assert_same(func, sch.func, {"n": 2})


# annotate ---------------------------------------------------------------------------------------------------------


def test_annotate():
    func = chain(4)
    sch = Schedule(func)
    block = sch.get_block("a")
    sch.annotate(sch.get_loops(block)[0], "pragma", {"depth": 2})
    sch.annotate(block, "cost", 3)
    assert "for i in range(4):  # pragma={'depth': 2}" in sch.show()
    assert "block a:  # cost=3" in sch.show()
    refused(lambda: sch.annotate(block, "cost", object()), "annotate(block 'a')", "cannot be written as JSON")
    assert_same(func, sch.func)
