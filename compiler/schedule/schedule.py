"""`Schedule`: a function under transformation, with stable handles, and the trace of what was done to it.

    sch = Schedule(func)
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    outer, inner = sch.split(j, [None, 8])
    sch.reorder(i, outer, k, inner)
    sch.vectorize(inner)
    sch.parallel(i)
    print(sch.show())
    again = Schedule.replay(func, sch.trace)

The rewriting itself is in `primitives/`, as pure functions on a `PrimFunc`; `trace` has what all primitives share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from kedge.compiler.schedule.drawing import Picture
from kedge.compiler.schedule.handles import BlockRef, LoopRef, Ref
from kedge.compiler.schedule.primitives.align import align
from kedge.compiler.schedule.primitives.bind import bind
from kedge.compiler.schedule.primitives.blockize import blockize
from kedge.compiler.schedule.primitives.cache import cache_write
from kedge.compiler.schedule.primitives.cache_read import cache_read
from kedge.compiler.schedule.primitives.inline import compute_inline, reverse_compute_inline
from kedge.compiler.schedule.primitives.loops import annotate, fuse, parallel, reorder, set_kind, split
from kedge.compiler.schedule.primitives.motion import compute_at, reverse_compute_at
from kedge.compiler.schedule.primitives.pad import pad_einsum
from kedge.compiler.schedule.primitives.pipeline import software_pipeline
from kedge.compiler.schedule.primitives.prefetch import prefetch
from kedge.compiler.schedule.primitives.reduction import decompose_reduction, rfactor
from kedge.compiler.schedule.primitives.storage import IndexMap, set_scope, storage_align, transform_layout
from kedge.compiler.schedule.primitives.tensorize import tensorize
from kedge.compiler.schedule.trace import Step, Traced, no_function, primitive
from kedge.compiler.schedule.tree import block_path, blocks_in, find_loop, loops_on, refuse
from kedge.compiler.schedule.visualize import visualize
from kedge.compiler.tir.expr import Expr, ExprLike
from kedge.compiler.tir.stmt import LoopSchedule, PrimFunc, Scope

__all__ = ["BlockRef", "LoopRef", "Ref", "Schedule", "Step"]


class Schedule(Traced):
    """A function and the primitives applied to it so far.

    Every primitive either rewrites `func` into a function of the same meaning and adds a step to `trace`, or raises
    `ScheduleError` and leaves everything as it was. Float reductions may be summed in another order.
    """

    def __init__(self, func: PrimFunc) -> None:
        super().__init__(func)

    def show(self) -> str:
        """The function as text."""
        return self._func.show()

    def print(self) -> None:
        """Write the text of `show` to standard output, in colour where that is a terminal (NO_COLOR: nowhere)."""
        self._func.print()

    def visualize(self, path: str | os.PathLike[str] | None = None, *, before: PrimFunc | None = None) -> Picture:
        """A picture (SVG) of the loop nest, which notebooks show; written to `path` too if given.

        `before`, if given, stands to its left: the function that the schedule began with, or another stage of it.
        """
        if before is not None and not isinstance(before, PrimFunc):
            raise no_function("visualize(before)", before)
        return visualize(self._func, path, before=before)

    # Handles ----------------------------------------------------------------------------------------------------

    @primitive('sch.get_block("y")')
    def get_block(self, name: str) -> BlockRef:
        """The block called `name`."""
        if not block_path(self._func, name):
            known = [block.name for block in blocks_in(self._func.body)]
            buffers = {buffer.name for buffer in (*self._func.params, *self._func.allocs)}
            what = " (it is a buffer)" if name in buffers else ""
            reason = f"no block is called {name!r}{what}; the blocks are {', '.join(map(repr, known))}"
            close = get_close_matches(name.lower(), known, 1)
            hint = f"did you mean sch.get_block({close[0]!r})?" if close else f"sch.get_block({known[-1]!r})"
            raise refuse(self._func, "get_block", f"name={name!r}", reason, hint=hint)
        return self._handles.block(name)

    @primitive("sch.get_loops(block)")
    def get_loops(self, block: BlockRef) -> tuple[LoopRef, ...]:
        """The loops around `block`, outermost first."""
        path = block_path(self._func, self._handles.name(block))
        return tuple(self._handles.loop(loop.var) for loop in loops_on(path))

    # Loops ------------------------------------------------------------------------------------------------------

    @primitive("sch.split(i, [None, 8])")
    def split(self, loop: LoopRef, factors: Sequence[int | None]) -> tuple[LoopRef, ...]:
        """One loop per factor, outermost first. One factor may be None: it takes what the others leave.

        Where the product of the factors is not the extent, the blocks inside run under a predicate.

        Rewrite:
            for i in range(n):            for i_0 in range((n + 7) // 8):
              block: vi = i          ->     for i_1 in range(8):
                                              block: vi = i_0 * 8 + i_1, where i_0 * 8 + i_1 < n
        """
        func, variables = split(self._func, self._handles.var(loop), factors)
        self._commit("split", func)
        return tuple(self._handles.loop(var) for var in variables)

    @primitive('sch.align(i, "x")')
    def align(self, loop: LoopRef, buffer: str) -> LoopRef:
        """A loop whose iterations 0, 16, 32, … (of float32) read `buffer`, a parameter, where cache lines of it begin.

        For a loop whose neighbours read neighbours of the buffer, before it is split into vectors: these then lie in
        one line each, wherever a caller's array begins. The first tile and the last one are cut. Not for reductions.

        Rewrite:
            for i in range(n):            for i in range(n + x_lead):
              block: vi = i          ->     block: vi = i - x_lead, where i - x_lead >= 0
        """
        func, var = align(self._func, self._handles.var(loop), buffer)
        self._commit("align", func)
        return self._handles.loop(var)

    @primitive("sch.fuse(i, j)")
    def fuse(self, *loops: LoopRef) -> LoopRef:
        """One loop instead of perfectly nested ones, given outermost first.

        Rewrite:
            for i in range(n):            for i_j in range(n * m):
              for j in range(m):     ->     block: vi = i_j // m, vj = i_j % m
                block: vi = i, vj = j
        """
        func, var = fuse(self._func, [self._handles.var(ref) for ref in loops])
        self._commit("fuse", func)
        return self._handles.loop(var)

    @primitive("sch.reorder(j, i)")
    def reorder(self, *loops: LoopRef) -> None:
        """Loops of one perfectly nested chain in the order given; those between them that are not named stay put.

        Rewrite:
            for i in range(n):            for j in range(m):
              for j in range(m):     ->     for i in range(n):
                block                         block
        """
        self._commit("reorder", reorder(self._func, [self._handles.var(ref) for ref in loops]))

    @primitive('sch.parallel(i) or sch.parallel(i, "dynamic", chunk=4)')
    def parallel(self, loop: LoopRef, schedule: LoopSchedule = "static", chunk: int | None = None) -> None:
        """Iterations spread over threads. Refused for reductions and where iterations depend on one another.

        `schedule` is OpenMP's: "static" gives each thread one chunk of the same size, always the same iterations, so
        that it finds its data in its cache. "dynamic" gives `chunk` iterations (1 unless told) at a time to the thread
        that is free: for uneven work or uneven cores.

        Rewrite:
            for i in range(n): …     ->   for i in parallel(n): …
        Rewrite ("dynamic", chunk=4):
            for i in range(n): …     ->   for i in parallel(n):  # chunk=4, schedule='dynamic'
        """
        self._commit("parallel", parallel(self._func, self._handles.var(loop), schedule, chunk))

    @primitive("sch.vectorize(j)")
    def vectorize(self, loop: LoopRef) -> None:
        """All iterations at once in vector registers. For innermost loops of constant extent, as `parallel` else.

        Rewrite:
            for i in range(8): …     ->   for i in vectorized(8): …
        """
        self._commit("vectorize", set_kind(self._func, "vectorize", self._handles.var(loop), "vectorized"))

    @primitive("sch.unroll(j)")
    def unroll(self, loop: LoopRef) -> None:
        """The body once per iteration, without a loop. For loops of constant extent.

        Rewrite:
            for i in range(4): …     ->   for i in unrolled(4): …
        """
        self._commit("unroll", set_kind(self._func, "unroll", self._handles.var(loop), "unrolled"))

    @primitive('sch.bind(i, "blockIdx.x")')
    def bind(self, loop: LoopRef, thread: str) -> None:
        """Iterations spread over the threads of an axis: "blockIdx.x", "threadIdx.y", … Legal where `parallel` is.

        Rewrite:
            for i in range(n): …     ->   for i in thread(n, 'blockIdx.x'): …
        """
        self._commit("bind", bind(self._func, self._handles.var(loop), thread))

    @primitive("sch.software_pipeline(i, [0, 1])")
    def software_pipeline(self, loop: LoopRef, stages: Sequence[int]) -> None:
        """Statement `p` of the loop's body runs `stages[p]` iterations behind the first: its inputs are there already.

        Buffers between stages get a version for each iteration under way. For loops of constant extent.

        Rewrite ([0, 1]):
            for i in range(4):                 block a: t[0] = x[0]
              block a: t[0] = x[i]        ->   for i in range(3):
              block b: y[i] = t[0] * 2           block a: t[(i + 1) % 2] = x[i + 1]
                                                 block b: y[i] = t[i % 2] * 2
                                               block b_1: y[3] = t[1] * 2
        """
        self._commit("software_pipeline", software_pipeline(self._func, self._handles.var(loop), stages))

    @primitive('sch.tensorize(i, "x86.vnni.dot")')
    def tensorize(self, loop: Ref, intrin: str) -> None:
        """The nest at `loop` by one instruction of the target, which must compute just the same.

        A block stands for the nest that it holds, as `blockize` makes it.

        `kedge.compiler.schedule.intrinsics` describes the instructions. The nest is sealed: nothing may change it, or
        how its operands lie in memory.

        Rewrite:
            for i in range(16):           ->   for i in tensorized(16):  # intrin='x86.vnni.dot'
              for k in range(4): …                 for k in tensorized(4): …
        """
        subject = self._handles.var(loop) if isinstance(loop, LoopRef) else self._handles.name(loop)
        self._commit("tensorize", tensorize(self._func, subject, intrin))

    @primitive('sch.prefetch(block, "x", i, 4)')
    def prefetch(self, block: BlockRef, buffer: str, loop: LoopRef, offset: int, *, spread: bool = False) -> None:
        """Each iteration of `loop` first asks for what the `offset`-th after it reads of `buffer`, line by cache line.

        The loop is serial or unrolled and around `block`, which reads the buffer. Best is a loop each of whose
        iterations reads a few lines, at a distance that takes as long as memory does; lines come into the second cache,
        where there are places enough for them to wait. It changes no result: past the end of the buffer, too, no
        prefetch fails. Primitives that would take it away are refused afterwards.

        With `spread`, it is asked for bit by bit: each iteration of the serial loops inside of `loop`, whose numbers of
        iterations are known, asks for its part. That suits a serial or parallel loop whose iterations read much, and
        that again and again: the next iteration's part then comes while this one's is multiplied by row after row.

        Rewrite:
            for i in range(n):            ->   for i in range(n):  # prefetch={'x': 4}, or with spread # spread={'x': 4}
                block y: … x[vi, vk] …             block y: … x[vi, vk] …
        """
        made = prefetch(self._func, self._handles.name(block), buffer, self._handles.var(loop), offset, spread=spread)
        self._commit("prefetch", made)

    @primitive('sch.annotate(i, "pragma", 1)')
    def annotate(self, ref: Ref, key: str, value: Any) -> None:
        """A loop or block with an annotation (JSON-able) for code generation.

        Rewrite:
            for i in range(n): …     ->   for i in range(n):  # key=value
        """
        subject = self._handles.var(ref) if isinstance(ref, LoopRef) else self._handles.name(ref)
        self._commit("annotate", annotate(self._func, subject, key, value))

    @primitive("sch.extent(i)", recorded=False)
    def extent(self, loop: LoopRef) -> Expr:
        """The number of iterations of a loop."""
        found = find_loop(self._func, self._handles.var(loop))
        assert found is not None, "a live handle names a loop of the function"
        return found.extent

    # Blocks -----------------------------------------------------------------------------------------------------

    @primitive("sch.compute_inline(block)")
    def compute_inline(self, block: BlockRef) -> None:
        """The block disappears: its consumers compute what they read of it.

        Rewrite:
            block a: a[vi] = x[vi] + 1
            block b: b[vj] = a[vj] * 2    ->   block b: b[vj] = (x[vj] + 1) * 2
        """
        self._commit("compute_inline", compute_inline(self._func, self._handles.name(block)))

    @primitive("sch.reverse_compute_inline(block)")
    def reverse_compute_inline(self, block: BlockRef) -> None:
        """The block disappears: the producer of what it reads, which is no reduction, stores its result instead.

        Rewrite:
            block a: a[vi] = x[vi] + 1    ->   block a: b[vi] = (x[vi] + 1) * 2
            block b: b[vj] = a[vj] * 2
        """
        self._commit("reverse_compute_inline", reverse_compute_inline(self._func, self._handles.name(block)))

    @primitive("sch.decompose_reduction(block, k)")
    def decompose_reduction(self, block: BlockRef, loop: LoopRef) -> BlockRef:
        """The initialisation as a block of its own, in its own loops just before `loop`; returns that block.

        Rewrite:
            for i:                             for i: block y_init: y[vi] = 0
              for k:                      ->   for i:
                block y: init: y[vi] = 0         for k:
                  y[vi] = y[vi] + x[vi, vk]        block y: y[vi] = y[vi] + x[vi, vk]
        """
        func, init = decompose_reduction(self._func, self._handles.name(block), self._handles.var(loop))
        self._commit("decompose_reduction", func)
        return self._handles.block(init)

    @primitive("sch.rfactor(block, k)")
    def rfactor(self, block: BlockRef, loop: LoopRef) -> BlockRef:
        """The reduction in two steps: one partial result per iteration of `loop`, then these combined.

        The block keeps its handle and does the second step, in loops after the first; the block that is returned
        does the first, over which `loop` may run in parallel.

        Rewrite:
            for i:                             for i:
              for k0, k1:                 ->     for k0:
                block y: y[vi] += x[…]             for k1: block y_rf: y_rf[vi, vk0] += x[…]
                                                 for k0: block y: y[vi] += y_rf[vi, vk0]
        """
        func, partial = rfactor(self._func, self._handles.name(block), self._handles.var(loop))
        self._commit("rfactor", func)
        return self._handles.block(partial)

    @primitive("sch.compute_at(block, i)")
    def compute_at(self, block: BlockRef, loop: LoopRef) -> None:
        """The block at the start of the body of `loop`, around all its consumers, computing what they read there.

        Its own loops, which are serial before, are serial afterwards.

        Rewrite:
            for p: block a                     for i:
            for i:                        ->     for p in (what this i reads): block a
              for j: block b (reads a)           for j: block b
        """
        self._commit("compute_at", compute_at(self._func, self._handles.name(block), self._handles.var(loop)))

    @primitive("sch.reverse_compute_at(block, i)")
    def reverse_compute_at(self, block: BlockRef, loop: LoopRef) -> None:
        """The block at the end of the body of `loop`, around its producer, on what was made there.

        Its own loops, which are serial before, are serial afterwards.

        Rewrite:
            for i:                             for i:
              for j: block a              ->     for j: block a
            for p, q: block b (reads a)          for q in (what this i wrote): block b
        """
        func = reverse_compute_at(self._func, self._handles.name(block), self._handles.var(loop))
        self._commit("reverse_compute_at", func)

    @primitive("sch.pad_einsum(block, [1, 16, 4])")
    def pad_einsum(self, block: BlockRef, padding: Sequence[int]) -> None:
        """The extents of a sum of products rounded up to multiples of `padding`, one number per iteration variable.

        Operands are copied with zeros at their ends, the output is cut afterwards: all tiles are whole.

        Rewrite ([1, 8]):
            for i in range(n):                 for i in range(n):
              for k in range(13):         ->     for k in range(16): block x_pad: x_pad[vi, vk] = x[vi, vk], or 0
                block y: y[vi] += x[vi, vk]    for i in range(n):
                                                 for k in range(16): block y: y[vi] += x_pad[vi, vk]
        """
        self._commit("pad_einsum", pad_einsum(self._func, self._handles.name(block), padding))

    @primitive('sch.cache_write(block, i, "register")')
    def cache_write(self, block: BlockRef, loop: LoopRef, scope: Scope = "register") -> BlockRef:
        """The block writes a small buffer that holds one iteration of `loop`; returns the block that copies it out.

        Rewrite:
            for i:                             for i:
              for k:                      ->     for k:
                block y: y[vi] += x[vi, vk]        block y: y_register[0] += x[vi, vk]
                                                 block y_register: y[vi] = y_register[0]
        """
        func, copy = cache_write(self._func, self._handles.name(block), self._handles.var(loop), scope)
        self._commit("cache_write", func)
        return self._handles.block(copy)

    @primitive('sch.cache_read(block, "x", i, "local")')
    def cache_read(self, block: BlockRef, buffer: str, loop: LoopRef, scope: Scope = "local") -> BlockRef:
        """The block reads a copy of what it needs of `buffer` in one iteration of `loop`; returns the copying block.

        The copy is made at the start of the loop's body, in loops of its own, and holds only that part. Its layout
        can be changed (`transform_layout`): that packs.

        Rewrite:
            for i:                             for i:
              for j:                      ->     for p in range(4): block x_local: x_local[p] = x[i * 4 + p]
                block y: … x[i * 4 + j] …        for j: block y: … x_local[j] …
        """
        func, copy = cache_read(self._func, self._handles.name(block), buffer, self._handles.var(loop), scope)
        self._commit("cache_read", func)
        return self._handles.block(copy)

    @primitive("sch.blockize(i)")
    def blockize(self, loop: LoopRef) -> BlockRef:
        """The nest at `loop`, which is around one block alone, as one block; returns that block.

        It has an iteration variable for each of the block inside, of the same kind. Where the nest runs over whole
        tiles that one counts them, else it is where the nest begins; where loops inside alone move the inner one it is
        0, of extent 1. What holds the block inside back is asked of the outer one as far as loops inside have no part
        in it. The initialisation stays with the block inside: it runs where that one's reduction begins, as before.

        Loops around the outer block are changed as before, and those inside among themselves; blocks move, and are
        cached, only on one side of its border. Do what crosses it before.

        Rewrite:
            for i0 in range(4):           ->   for i0 in range(4):
              for i1 in range(8):                block y_o: vi_o = i0
                block y: vi = i0 * 8 + i1          for i1 in range(8):
                                                     block y: vi = vi_o * 8 + i1
        """
        func, outer = blockize(self._func, self._handles.var(loop))
        self._commit("blockize", func)
        return self._handles.block(outer)

    # Storage ----------------------------------------------------------------------------------------------------

    @primitive('sch.set_scope(block, "local")')
    def set_scope(self, block: BlockRef, scope: Scope) -> None:
        """The intermediate buffer that the block writes in another scope: "global", "shared", "local", "register".

        "local" and "register" give each iteration of a parallel or thread loop a buffer of its own, "shared" each
        iteration of a loop over blockIdx. Refused where iterations would lose what they share.

        Rewrite:
            alloc a: float32[16]          ->   alloc a: float32[16] in local
        """
        self._commit("set_scope", set_scope(self._func, self._handles.name(block), scope))

    @primitive("sch.storage_align(block, -2, 16)")
    def storage_align(self, block: BlockRef, axis: int, factor: int, offset: int = 0) -> None:
        """Rows of the buffer that the block writes so long that dim `axis` has a stride of `offset` modulo `factor`.

        In elements. It keeps rows on vector boundaries (offset 0), or off the same banks of a memory (offset 1).

        Rewrite (axis 0, factor 8):
            alloc a: float32[4, 13]       ->   alloc a: float32[4, 16]
        """
        self._commit("storage_align", storage_align(self._func, self._handles.name(block), axis, factor, offset))

    @primitive("sch.transform_layout(block, lambda i, j: (j, i))")
    def transform_layout(self, block: BlockRef, index_map: Callable[..., Sequence[ExprLike]] | IndexMap) -> None:
        """The elements of the intermediate buffer that the block writes at other indices, wherever they are used.

        `index_map` takes the indices and returns the new ones, different ones for different elements.

        Rewrite (lambda i, j: (j // 16, i, j % 16)):
            alloc a: float32[n, 32]       ->   alloc a: float32[2, n, 16]
            … a[vi, vj] …                      … a[vj // 16, vi, vj % 16] …
        """
        assert isinstance(index_map, IndexMap), "a function was taken as its map before"
        self._commit("transform_layout", transform_layout(self._func, self._handles.name(block), index_map))
