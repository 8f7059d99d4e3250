"""blockize: what it makes, and that whatever follows is right, or refused by the name of the outer block."""

import json
import random

import numpy as np
import pytest
from schedule.test_blocks import loops_of, refused
from schedule.test_random import check_compiled
from schedule.test_tensorize import check, data, product, tiled

from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.prepare import lower_blocks
from kedge.compiler.errors import ScheduleError
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.default import is_scheduled
from kedge.compiler.schedule.dependence import reduces_over
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, find_loop, loops_in
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.flatten import flattened
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.stmt import Block, If
from kedge.compiler.tir.structural import equal
from kedge.compiler.tir.visitor import walk_stmt
from support.compiled import opened
from support.functions import assert_same, chain, conv, dense
from support.races import race
from support.random_schedules import FUNCTIONS, MOST_INSTANCES, block_of, instances, random_step

N = Var("n", lower=1)


def tiles(func=None, factors=(4, 8, 5)) -> tuple[Schedule, BlockRef, list[LoopRef], list[LoopRef]]:
    """A product in tiles, as blocks of their own; the handles of that block and of the loops outside and inside."""
    sch = Schedule(dense(N, 12, 16) if func is None else func)
    y = sch.get_block("y")
    parts = [sch.split(loop, [None, size]) for loop, size in zip(sch.get_loops(y), factors, strict=True)]
    outer, inner = [part[0] for part in parts], [part[1] for part in parts]
    sch.reorder(*outer, *inner)
    return sch, sch.blockize(inner[0]), outer, inner


def block_called(sch: Schedule, name: str) -> Block:
    return next(block for block in blocks_in(sch.func.body) if block.name == name)


def test_golden_and_meaning(golden):
    func = dense(N, 12, 16)
    sch, block, *_ = tiles(func)
    golden("blockize.txt", sch.show())
    assert block.name == "y_o"
    for n in (1, 4, 7):
        assert_same(func, sch.func, {"n": n})
    assert equal(parse_func(sch.show()), sch.func)


def test_handles_stay_valid_and_traces_replay():
    func = dense(N, 12, 16)
    sch, block, outer, inner = tiles(func)
    y = sch.get_block("y")
    assert list(sch.get_loops(y)) == [*outer, *inner]
    assert list(sch.get_loops(block)) == outer
    sch.unroll(inner[0])
    sch.annotate(block, "cost", 3)
    again = Schedule.replay(func, json.loads(json.dumps(sch.trace)))
    assert equal(again.func, sch.func)


@pytest.mark.parametrize("seed", range(12))
def test_machine_code(seed, tmp_path):
    """Random functions, blockized early, under later primitives: the interpreter and machine code agree."""
    rng = random.Random(f"blockize {seed}")
    name = sorted(FUNCTIONS)[seed % len(FUNCTIONS)]
    func, symbols = FUNCTIONS[name]
    sch = Schedule(func)
    for step in range(14):
        if instances(sch.func, symbols) > MOST_INSTANCES:
            break
        try:
            if step in (2, 5):
                loops = [loop for each in blocks_in(sch.func.body) for loop in sch.get_loops(sch.get_block(each.name))]
                sch.blockize(rng.choice(loops))
            else:
                random_step(sch, rng)
        except ScheduleError:
            continue
    assert_same(func, sch.func, symbols)
    assert race(sch.func, symbols) is None
    check_compiled(name, sch, KernelCache(tmp_path))


# What it makes ----------------------------------------------------------------------------------------------------


def outer_iters(sch: Schedule, block: BlockRef) -> list[str]:
    """Lines of the text that bind the iteration variables of a block."""
    lines = sch.show().splitlines()
    at = next(number for number, line in enumerate(lines) if line.strip() == f"block {block.name}:")
    return [line.strip() for line in lines[at + 1 : at + 1 + len(block_of(sch, block).iters)]]


def test_variables_that_only_inner_loops_move_are_there_once():
    func = dense(4, 6, 8, relu=False)
    sch = Schedule(func)
    _, j, _ = loops_of(sch, "y")
    block = sch.blockize(j)
    assert outer_iters(sch, block) == ["vi_o = spatial(4, i)", "vj_o = spatial(1, 0)", "vk_o = reduce(1, 0)"]
    assert "vj = spatial(8, j)" in sch.show()
    assert_same(func, sch.func)


def test_windows_that_overlap_begin_anywhere():
    func = conv(1, 2, 5, 2)
    sch = Schedule(func)
    pad = sch.get_block("pad")
    h = sch.get_loops(sch.get_block("conv"))[2]
    sch.compute_at(pad, h)
    block = sch.blockize(sch.get_loops(pad)[4])
    assert outer_iters(sch, block)[2] == "vh_o = spatial(7, h)"
    assert "vh = spatial(7, vh_o + h_1)" in sch.show()
    assert_same(func, sch.func)


def test_a_window_may_begin_in_front_of_the_first_value():
    text = """func f(x: float32[8]) -> (y: float32[8]):
  for i in range(4):
    for j in range(4):
      block y:
        vi = spatial(8, i * 3 + j - 2)
        where i * 3 + j - 2 >= 0 and i * 3 + j - 2 < 8
        reads x[vi]
        writes y[vi]
        y[vi] = x[vi] + 1.0"""
    sch = Schedule(parse_func(text))
    block = sch.blockize(loops_of(sch, "y")[1])
    assert outer_iters(sch, block) == ["vi_o = spatial(10, i * 3)"]
    assert_same(parse_func(text), sch.func)


def test_tiles_that_lie_behind_the_end_do_not_run():
    func = dense(12, 4, 6, relu=False)
    sch = Schedule(func)
    outer, inner = sch.split(loops_of(sch, "y")[0], [5, 3])
    block = sch.blockize(inner)
    assert "where i_0 < 4" in sch.show()
    sch.parallel(outer)
    assert_same(func, sch.func)
    assert "vi_o = spatial(4, i_0)" in outer_iters(sch, block)


def test_blocks_around_blocks():
    func = dense(N, 12, 16)
    sch, block, outer, inner = tiles(func)
    around = sch.blockize(outer[1])
    within = sch.blockize(inner[1])
    assert [b.name for b in (around, block, within)] == ["y_o_o", "y_o", "y_o_1"]
    sch.parallel(outer[0])
    sch.reorder(outer[2], outer[1])
    sch.split(inner[0], [None, 3])
    for n in (1, 5, 8):
        assert_same(func, sch.func, {"n": n})


def test_regions_are_what_the_nest_touches():
    sch, *_ = tiles(dense(8, 12, 16, relu=False), (4, 8, 4))
    assert "reads y[vi_o * 4 +: 4, vj_o * 8 +: 8], x[vi_o * 4 +: 4, vk_o * 4 +: 4]" in sch.show()
    inner = sch.get_loops(sch.get_block("y"))[-1]
    sch.cache_read(sch.get_block("y"), "x", inner)
    (copied,) = (region for region in block_called(sch, "y_o").writes if region.buffer.name == "x_local")
    assert [print_expr(each.extent) for each in copied.ranges] == ["1", "1"]


def test_it_counts_as_scheduled():
    for position in range(3):
        sch = Schedule(dense(4, 6, 8, relu=False))
        sch.blockize(loops_of(sch, "y")[position])
        assert is_scheduled(sch.func)


# Later primitives -------------------------------------------------------------------------------------------------


def test_outer_loops_are_of_the_outputs_or_the_reduction():
    sch, _, (i, j, k), _ = tiles()
    refused(lambda: sch.parallel(k), "block 'y' reduces over it")
    refused(lambda: sch.bind(k, "blockIdx.x"), "block 'y' reduces over it")
    for ref, reduces in ((i, False), (j, False), (k, True)):
        node = find_loop(sch.func, sch._handles.var(ref))
        assert node is not None
        assert (reduces_over(node) is not None) == reduces
    sch.parallel(sch.fuse(i, j))
    for n in (1, 7):
        assert_same(dense(N, 12, 16), sch.func, {"n": n})
        assert race(sch.func, {"n": n}) is None


def test_loops_of_tiles_in_another_order():
    func = dense(N, 12, 16)
    sch, _, (i, j, k), (a, b, c) = tiles(func)
    sch.reorder(k, j, i)
    sch.reorder(c, a, b)
    sch.vectorize(b)
    for n in (1, 7):
        assert_same(func, sch.func, {"n": n})


def test_a_split_that_does_not_divide_holds_the_outer_block_back():
    func = dense(N, 12, 16)
    sch, block, (_, j, k), (a, *_) = tiles(func)
    sch.split(k, [None, 2])
    sch.split(j, [None, 3])
    sch.split(a, [None, 3])
    text = sch.show()
    assert text.count("where j_0_1 < 2 and k_0_0 * 2 + k_0_1 < 3") + text.count("where k_0_0 * 2 + k_0_1 < 3") == 1
    assert block.name == "y_o"
    for n in (1, 7):
        assert_same(func, sch.func, {"n": n})


def test_what_starts_with_a_tile_of_the_reduction_is_refused():
    """An initialisation, a copy or partial results for each tile would begin anew in each."""
    sch, _, _, (a, _, c) = tiles()
    y = sch.get_block("y")
    again = "before sch.blockize"
    refused(lambda: sch.decompose_reduction(y, c), "loop 'k_0', around 'k_1', takes part in the reduction", again)
    refused(lambda: sch.rfactor(y, c), "which holds block 'y_o'", again)
    refused(lambda: sch.cache_write(y, a), "loop 'k_0' around the copy takes part in the reduction", again)


def test_what_starts_with_a_tile_of_the_output_is_not():
    func = dense(6, 12, 16)
    for primitive in ("decompose_reduction", "rfactor", "cache_write"):
        sch = Schedule(func)
        y = sch.get_block("y")
        _, j, k = sch.get_loops(y)
        _, j1 = sch.split(j, [None, 5])
        sch.blockize(j1)
        getattr(sch, primitive)(y, k if primitive != "cache_write" else j1)
        assert_same(func, sch.func)
        assert equal(parse_func(sch.show()), sch.func)


def test_blocks_outside_move_to_loops_outside():
    x = chain(N)
    sch = Schedule(x)
    b, c = sch.get_block("b"), sch.get_block("c")
    outer, inner = sch.split(sch.get_loops(b)[0], [None, 4])
    sch.blockize(inner)
    sch.compute_at(sch.get_block("a"), outer)
    sch.reverse_compute_at(c, outer)
    sch.parallel(outer)
    for n in (1, 7):
        assert_same(x, sch.func, {"n": n})
        assert race(sch.func, {"n": n}) is None
    sch = Schedule(x)
    outer, inner = sch.split(loops_of(sch, "b")[0], [None, 4])
    sch.blockize(inner)
    sch.compute_inline(sch.get_block("a"))
    sch.reverse_compute_inline(sch.get_block("c"))
    assert [block.name for block in blocks_in(sch.func.body)] == ["b", "b_o"]
    assert_same(x, sch.func, {"n": 7})


def test_blocks_do_not_cross_its_border():
    sch, block, (i, _, k), (a, *_) = tiles()
    y, z = sch.get_block("y"), sch.get_block("z")
    for attempt in (
        lambda: sch.cache_read(y, "x", k),
        lambda: sch.cache_write(y, i),
        lambda: sch.decompose_reduction(y, k),
        lambda: sch.compute_at(y, sch.get_loops(z)[0]),
        lambda: sch.reverse_compute_at(z, a),
    ):
        refused(attempt, "block 'y_o'")
    for attempt in (lambda: sch.cache_read(block, "x", k), lambda: sch.rfactor(block, k)):
        refused(attempt, "block 'y_o'", "it holds block 'y'", "before sch.blockize")


def test_layouts_of_what_a_tile_writes():
    func = dense(6, 12, 16)
    sch, block, *_ = tiles(func)
    sch.transform_layout(block, lambda i, j: (j, i))
    sch.storage_align(sch.get_block("y"), -2, 8)
    assert_same(func, sch.func)
    assert equal(parse_func(sch.show()), sch.func)


def test_a_tile_may_have_buffers_and_a_pipeline_of_its_own():
    func = dense(8, 12, 16, relu=False)
    sch, _, _, (a, _, _) = tiles(func, (4, 8, 4))
    sch.cache_read(sch.get_block("y"), "x", a)
    sch.software_pipeline(a, [0, 1])
    assert_same(func, sch.func)
    assert equal(parse_func(sch.show()), sch.func)


@pytest.mark.parametrize("by_block", [False, True])
def test_an_instruction_computes_a_tile(by_block):
    sch, c, inner = tiled("x86.vnni.dot")
    block = sch.blockize(inner[0])
    before = interp.run(sch.func, data(sch.func))
    sch.tensorize(block if by_block else inner[0], "x86.vnni.dot")
    arrays = data(sch.func)
    check(interp.run(sch.func, arrays)[0], arrays)
    assert (interp.run(sch.func, arrays)[0] == before[0]).all()
    again = Schedule.replay(product(6, 32, 16, "uint8", "int8"), json.loads(json.dumps(sch.trace)))
    assert equal(again.func, sch.func)
    refused(lambda: sch.split(inner[0], [None, 4]), "already")
    assert c.name == "c"


# Outer blocks as loops see them -----------------------------------------------------------------------------------


def test_flattened_is_what_it_was_before():
    func = dense(N, 12, 16)
    sch, *_ = tiles(func)
    plain = flattened(sch.func.body)
    assert [block.name for block in blocks_in(plain)] == ["y", "z"]
    assert len(loops_in(plain)) == len(loops_in(sch.func.body))
    assert flattened(func.body) is func.body
    assert isinstance(block_path(sch.func, "y_o")[-1], Block)


WORKS = """func f(x: float32[4, 4]) -> (y: float32[4, 4]):
  alloc t: float32[4]
  for i in range(4):
    block o:
      vi = spatial(4, i)
      reads x[vi, :4], t[vi]
      writes t[vi], y[vi, :4]
      t[vi] = x[vi, 0] * 2.0
      for j in range(vi + 1):
        block y:
          vj = spatial(4, j)
          reads t[vi]
          writes y[vi, vj]
          y[vi, vj] = t[vi]"""


def test_outer_blocks_that_compute_themselves_stay():
    func = parse_func(WORKS)
    assert flattened(func.body) is func.body
    sch = Schedule(func)
    sch.parallel(loops_of(sch, "o")[0])
    assert_same(func, sch.func)
    assert block_called(sch, "o").body is not None


VARYING = """func f(x: float32[5]) -> (y: float32[5]):
  for i in range(5):
    block o:
      vi = spatial(5, i)
      reads x[:5]
      writes y[:5]
      for j in range(vi + 1):
        block y:
          vj = spatial(5, j)
          reads x[vj]
          writes y[vj]
          y[vj] = x[vj] + 1.0"""


def test_extents_that_an_outer_block_hides_are_seen():
    sch = Schedule(parse_func(VARYING))
    refused(lambda: sch.parallel(loops_of(sch, "o")[0]), "through buffer 'y'")


def test_what_moves_to_a_loop_outside_covers_loops_of_hidden_extents():
    text = """func f(x: float32[5]) -> (y: float32[5, 5]):
  alloc a: float32[5]
  for i in range(5):
    block a:
      vi = spatial(5, i)
      reads x[vi]
      writes a[vi]
      a[vi] = x[vi] + 1.0
  for i in range(5):
    block o:
      vi = spatial(5, i)
      reads a[:5]
      writes y[vi, :5]
      for j in range(vi + 1):
        block y:
          vj = spatial(5, j)
          reads a[vj]
          writes y[vi, vj]
          y[vi, vj] = a[vj] * 2.0"""
    func = parse_func(text)
    sch = Schedule(func)
    sch.compute_at(sch.get_block("a"), loops_of(sch, "o")[0])
    assert_same(func, sch.func)


UNTIL = """func f(x: float32[4]) -> (y: float32[4]):
  block begin:
    writes y[0]
    y[0] = 0.0
  for i in range(4):
    block o:
      vi = spatial(4, i)
      where y[0] < 1.0
      reads x[:4]
      writes y[:4]
      for j in range(4):
        block y:
          vj = spatial(4, j)
          reads x[vj]
          writes y[vj]
          y[vj] = x[vj] + 7.0"""


def test_a_condition_on_what_is_written_inside_is_asked_once(tmp_path):
    func = parse_func(UNTIL)
    assert flattened(func.body) is func.body
    artifact = compile_prim_func(Schedule(func), "native", cache=KernelCache(tmp_path))
    x = np.array([1, 2, 3, 4], "float32")
    with opened(artifact) as model:
        (got,) = model.run({"x": x}).values()
    assert (got == interp.run(func, [x])[0]).all()
    assert (got == x + 7).all()


def test_initialisations_move_in_front_of_loops_on_both_sides():
    """Machine code has no test of the first iteration where it had none without the block."""
    func = dense(8, 12, 16, relu=False)
    sch, *_ = tiles(func, (4, 8, 4))
    assert not any(isinstance(each, If) for each in walk_stmt(lower_blocks(sch.func.body)))
