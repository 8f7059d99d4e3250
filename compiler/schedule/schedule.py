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

The rewriting itself is in `primitives/`, as pure functions on a `PrimFunc`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kedge.compiler.errors import ParseError, ScheduleError
from kedge.compiler.schedule.drawing import Picture
from kedge.compiler.schedule.primitives import cache, inline, loops, motion, reduction, storage
from kedge.compiler.schedule.primitives.cache_read import cache_read
from kedge.compiler.schedule.primitives.pad import pad_einsum
from kedge.compiler.schedule.primitives.pipeline import software_pipeline
from kedge.compiler.schedule.primitives.storage import IndexMap
from kedge.compiler.schedule.primitives.tensorize import check_tensorized, tensorize
from kedge.compiler.schedule.tree import block_path, blocks_in, find_loop, loops_in, loops_on, refuse
from kedge.compiler.schedule.visualize import visualize
from kedge.compiler.tir.expr import Expr, ExprLike, Var
from kedge.compiler.tir.stmt import PrimFunc, Scope

#: One step of a trace: the primitive, its arguments and the ids of the handles it made. Plain JSON.
Step: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class LoopRef:
    """A handle of a loop; it stays valid for as long as the loop exists, whatever happens around it."""

    id: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class BlockRef:
    """A handle of a block; it stays valid for as long as the block exists, wherever it moves."""

    id: str
    name: str


Ref: TypeAlias = LoopRef | BlockRef


class Schedule:
    """A function and the primitives applied to it so far.

    Every primitive either rewrites `func` into a function of the same meaning and adds a step to `trace`, or raises
    `ScheduleError` and leaves everything as it was. Float reductions may be summed in another order.
    """

    def __init__(self, func: PrimFunc) -> None:
        self._func = func
        self._trace: list[Step] = []
        self._refs: dict[str, Ref] = {}
        self._live: dict[str, Var | str] = {}  # handle id -> the loop's variable or the block's name
        self._gone: dict[str, str] = {}  # handle id -> the primitive that removed it

    @property
    def func(self) -> PrimFunc:
        """The function as it is now."""
        return self._func

    @property
    def trace(self) -> tuple[Step, ...]:
        """The steps so far, each a JSON-able mapping."""
        return tuple(self._trace)

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
        return visualize(self._func, path, before=before)

    # Handles ----------------------------------------------------------------------------------------------------

    def get_block(self, name: str) -> BlockRef:
        """The block called `name`."""
        if not block_path(self._func, name):
            known = ", ".join(block.name for block in blocks_in(self._func.body))
            raise refuse(self._func, "get_block", f"block {name!r}", f"there is none; the blocks are {known}")
        ref = self._block_ref(name)
        self._record("get_block", {"name": name}, [ref])
        return ref

    def get_loops(self, block: BlockRef) -> tuple[LoopRef, ...]:
        """The loops around `block`, outermost first."""
        path = block_path(self._func, self._block("get_loops", block))
        refs = [self._loop_ref(loop.var) for loop in loops_on(path)]
        self._record("get_loops", {"block": block.id}, refs)
        return tuple(refs)

    # Loops ------------------------------------------------------------------------------------------------------

    def split(self, loop: LoopRef, factors: Sequence[int | None]) -> tuple[LoopRef, ...]:
        """One loop per factor, outermost first. One factor may be None: it takes what the others leave.

        Where the product of the factors is not the extent, the blocks inside run under a predicate.

        Rewrite:
            for i in range(n):            for i_0 in range((n + 7) // 8):
              block: vi = i          ->     for i_1 in range(8):
                                              block: vi = i_0 * 8 + i_1, where i_0 * 8 + i_1 < n
        """
        func, variables = loops.split(self._func, self._loop("split", loop), factors)
        refs = [self._loop_ref(var) for var in variables]
        self._commit(func, "split", {"loop": loop.id, "factors": list(factors)}, refs)
        return tuple(refs)

    def fuse(self, *loop_refs: LoopRef) -> LoopRef:
        """One loop instead of perfectly nested ones, given outermost first.

        Rewrite:
            for i in range(n):            for i_j in range(n * m):
              for j in range(m):     ->     block: vi = i_j // m, vj = i_j % m
                block: vi = i, vj = j
        """
        func, var = loops.fuse(self._func, [self._loop("fuse", ref) for ref in loop_refs])
        ref = self._loop_ref(var)
        self._commit(func, "fuse", {"loops": [each.id for each in loop_refs]}, [ref])
        return ref

    def reorder(self, *loop_refs: LoopRef) -> None:
        """Loops of one perfectly nested chain in the order given; those between them that are not named stay put.

        Rewrite:
            for i in range(n):            for j in range(m):
              for j in range(m):     ->     for i in range(n):
                block                         block
        """
        func = loops.reorder(self._func, [self._loop("reorder", ref) for ref in loop_refs])
        self._commit(func, "reorder", {"loops": [each.id for each in loop_refs]})

    def parallel(self, loop: LoopRef) -> None:
        """Iterations spread over threads. Refused for reductions and where iterations depend on one another.

        Rewrite:
            for i in range(n): …     ->   for i in parallel(n): …
        """
        func = loops.set_kind(self._func, "parallel", self._loop("parallel", loop), "parallel")
        self._commit(func, "parallel", {"loop": loop.id})

    def vectorize(self, loop: LoopRef) -> None:
        """All iterations at once in vector registers. For innermost loops of constant extent, as `parallel` else.

        Rewrite:
            for i in range(8): …     ->   for i in vectorized(8): …
        """
        func = loops.set_kind(self._func, "vectorize", self._loop("vectorize", loop), "vectorized")
        self._commit(func, "vectorize", {"loop": loop.id})

    def unroll(self, loop: LoopRef) -> None:
        """The body once per iteration, without a loop. For loops of constant extent.

        Rewrite:
            for i in range(4): …     ->   for i in unrolled(4): …
        """
        func = loops.set_kind(self._func, "unroll", self._loop("unroll", loop), "unrolled")
        self._commit(func, "unroll", {"loop": loop.id})

    def bind(self, loop: LoopRef, thread: str) -> None:
        """Iterations spread over the threads of an axis: "blockIdx.x", "threadIdx.y", … Legal where `parallel` is.

        Rewrite:
            for i in range(n): …     ->   for i in thread(n, 'blockIdx.x'): …
        """
        func = loops.bind(self._func, self._loop("bind", loop), thread)
        self._commit(func, "bind", {"loop": loop.id, "thread": thread})

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
        func = software_pipeline(self._func, self._loop("software_pipeline", loop), stages)
        self._commit(func, "software_pipeline", {"loop": loop.id, "stages": list(stages)})

    def tensorize(self, loop: LoopRef, intrin: str) -> None:
        """The nest at `loop` by one instruction of the target, which must compute just the same.

        `kedge.compiler.schedule.intrinsics` describes the instructions. The nest is sealed: nothing may change it, or
        how its operands lie in memory.

        Rewrite:
            for i in range(16):           ->   for i in tensorized(16):  # intrin='x86.vnni.dot'
              for k in range(4): …                 for k in tensorized(4): …
        """
        func = tensorize(self._func, self._loop("tensorize", loop), intrin)
        self._commit(func, "tensorize", {"loop": loop.id, "intrin": intrin})

    def annotate(self, ref: Ref, key: str, value: Any) -> None:
        """A loop or block with an annotation (JSON-able) for code generation.

        Rewrite:
            for i in range(n): …     ->   for i in range(n):  # key=value
        """
        if not isinstance(key, str) or key == "intrin":
            raise refuse(self._func, "annotate", ref.name, f"key {key!r}: it takes a text, and intrin is tensorize's")
        if not _is_json(value):
            raise refuse(self._func, "annotate", ref.name, f"value {value!r} is not JSON-able")
        loop_or_block = self._loop("annotate", ref) if isinstance(ref, LoopRef) else self._block("annotate", ref)
        func = loops.annotate(self._func, loop_or_block, key, value)
        self._commit(func, "annotate", {"ref": ref.id, "key": key, "value": value})

    def extent(self, loop: LoopRef) -> Expr:
        """The number of iterations of a loop."""
        found = find_loop(self._func, self._loop("extent", loop))
        assert found is not None, "a live handle names a loop of the function"
        return found.extent

    # Blocks -----------------------------------------------------------------------------------------------------

    def compute_inline(self, block: BlockRef) -> None:
        """The block disappears: its consumers compute what they read of it.

        Rewrite:
            block a: a[vi] = x[vi] + 1
            block b: b[vj] = a[vj] * 2    ->   block b: b[vj] = (x[vj] + 1) * 2
        """
        func = inline.compute_inline(self._func, self._block("compute_inline", block))
        self._commit(func, "compute_inline", {"block": block.id})

    def reverse_compute_inline(self, block: BlockRef) -> None:
        """The block disappears: the producer of what it reads, which is no reduction, stores its result instead.

        Rewrite:
            block a: a[vi] = x[vi] + 1    ->   block a: b[vi] = (x[vi] + 1) * 2
            block b: b[vj] = a[vj] * 2
        """
        func = inline.reverse_compute_inline(self._func, self._block("reverse_compute_inline", block))
        self._commit(func, "reverse_compute_inline", {"block": block.id})

    def decompose_reduction(self, block: BlockRef, loop: LoopRef) -> BlockRef:
        """The initialisation as a block of its own, in its own loops just before `loop`; returns that block.

        Rewrite:
            for i:                             for i: block y_init: y[vi] = 0
              for k:                      ->   for i:
                block y: init: y[vi] = 0         for k:
                  y[vi] = y[vi] + x[vi, vk]        block y: y[vi] = y[vi] + x[vi, vk]
        """
        name = self._block("decompose_reduction", block)
        func, init = reduction.decompose_reduction(self._func, name, self._loop("decompose_reduction", loop))
        ref = self._block_ref(init)
        self._commit(func, "decompose_reduction", {"block": block.id, "loop": loop.id}, [ref])
        return ref

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
        name = self._block("rfactor", block)
        func, partial = reduction.rfactor(self._func, name, self._loop("rfactor", loop))
        ref = self._block_ref(partial)
        self._commit(func, "rfactor", {"block": block.id, "loop": loop.id}, [ref])
        return ref

    def compute_at(self, block: BlockRef, loop: LoopRef) -> None:
        """The block at the start of the body of `loop`, around all its consumers, computing what they read there.

        Rewrite:
            for p: block a                     for i:
            for i:                        ->     for p in (what this i reads): block a
              for j: block b (reads a)           for j: block b
        """
        name = self._block("compute_at", block)
        func = motion.compute_at(self._func, name, self._loop("compute_at", loop))
        self._commit(func, "compute_at", {"block": block.id, "loop": loop.id})

    def reverse_compute_at(self, block: BlockRef, loop: LoopRef) -> None:
        """The block at the end of the body of `loop`, around its producer, on what was made there.

        Rewrite:
            for i:                             for i:
              for j: block a              ->     for j: block a
            for p, q: block b (reads a)          for q in (what this i wrote): block b
        """
        name = self._block("reverse_compute_at", block)
        func = motion.reverse_compute_at(self._func, name, self._loop("reverse_compute_at", loop))
        self._commit(func, "reverse_compute_at", {"block": block.id, "loop": loop.id})

    def pad_einsum(self, block: BlockRef, padding: Sequence[int]) -> None:
        """The extents of a sum of products rounded up to multiples of `padding`, one number per iteration variable.

        Operands are copied with zeros at their ends, the output is cut afterwards: all tiles are whole.

        Rewrite ([1, 8]):
            for i in range(n):                 for i in range(n):
              for k in range(13):         ->     for k in range(16): block x_pad: x_pad[vi, vk] = x[vi, vk], or 0
                block y: y[vi] += x[vi, vk]    for i in range(n):
                                                 for k in range(16): block y: y[vi] += x_pad[vi, vk]
        """
        func = pad_einsum(self._func, self._block("pad_einsum", block), padding)
        self._commit(func, "pad_einsum", {"block": block.id, "padding": list(padding)})

    def cache_write(self, block: BlockRef, loop: LoopRef, scope: Scope = "register") -> BlockRef:
        """The block writes a small buffer that holds one iteration of `loop`; returns the block that copies it out.

        Rewrite:
            for i:                             for i:
              for k:                      ->     for k:
                block y: y[vi] += x[vi, vk]        block y: y_register[0] += x[vi, vk]
                                                 block y_register: y[vi] = y_register[0]
        """
        name = self._block("cache_write", block)
        func, copy = cache.cache_write(self._func, name, self._loop("cache_write", loop), scope)
        ref = self._block_ref(copy)
        self._commit(func, "cache_write", {"block": block.id, "loop": loop.id, "scope": scope}, [ref])
        return ref

    def cache_read(self, block: BlockRef, buffer: str, loop: LoopRef, scope: Scope = "local") -> BlockRef:
        """The block reads a copy of what it needs of `buffer` in one iteration of `loop`; returns the copying block.

        The copy is made at the start of the loop's body, in loops of its own, and holds only that part. Its layout
        can be changed (`transform_layout`): that packs.

        Rewrite:
            for i:                             for i:
              for j:                      ->     for p in range(4): block x_local: x_local[p] = x[i * 4 + p]
                block y: … x[i * 4 + j] …        for j: block y: … x_local[j] …
        """
        name = self._block("cache_read", block)
        func, copy = cache_read(self._func, name, buffer, self._loop("cache_read", loop), scope)
        ref = self._block_ref(copy)
        args = {"block": block.id, "buffer": buffer, "loop": loop.id, "scope": scope}
        self._commit(func, "cache_read", args, [ref])
        return ref

    # Storage ----------------------------------------------------------------------------------------------------

    def set_scope(self, block: BlockRef, scope: Scope) -> None:
        """The intermediate buffer that the block writes in another scope: "global", "shared", "local", "register".

        "local" and "register" give each iteration of a parallel or thread loop a buffer of its own, "shared" each
        iteration of a loop over blockIdx. Refused where iterations would lose what they share.

        Rewrite:
            alloc a: float32[16]          ->   alloc a: float32[16] in local
        """
        func = storage.set_scope(self._func, self._block("set_scope", block), scope)
        self._commit(func, "set_scope", {"block": block.id, "scope": scope})

    def storage_align(self, block: BlockRef, axis: int, factor: int, offset: int = 0) -> None:
        """Rows of the buffer that the block writes so long that dim `axis` has a stride of `offset` modulo `factor`.

        In elements. It keeps rows on vector boundaries (offset 0), or off the same banks of a memory (offset 1).

        Rewrite (axis 0, factor 8):
            alloc a: float32[4, 13]       ->   alloc a: float32[4, 16]
        """
        func = storage.storage_align(self._func, self._block("storage_align", block), axis, factor, offset)
        self._commit(func, "storage_align", {"block": block.id, "axis": axis, "factor": factor, "offset": offset})

    def transform_layout(self, block: BlockRef, index_map: Callable[..., Sequence[ExprLike]] | IndexMap) -> None:
        """The elements of the intermediate buffer that the block writes at other indices, wherever they are used.

        `index_map` takes the indices and returns the new ones, different ones for different elements.

        Rewrite (lambda i, j: (j // 16, i, j % 16)):
            alloc a: float32[n, 32]       ->   alloc a: float32[2, n, 16]
            … a[vi, vj] …                      … a[vj // 16, vi, vj % 16] …
        """
        name = self._block("transform_layout", block)
        known = index_map if isinstance(index_map, IndexMap) else storage.index_map(self._func, name, index_map)
        func = storage.transform_layout(self._func, name, known)
        self._commit(func, "transform_layout", {"block": block.id, "index_map": known.to_json()})

    # Traces -----------------------------------------------------------------------------------------------------

    @classmethod
    def replay(cls, func: PrimFunc, trace: Sequence[Step]) -> Schedule:
        """The schedule that `trace` describes, on a function built like the one it was recorded on.

        Raises:
            ScheduleError: a step does not apply, or is malformed.
        """
        sch = cls(func)
        made: dict[str, Ref] = {}
        for number, step in enumerate(trace):
            try:
                args = {key: _resolve(key, value, made) for key, value in step["args"].items()}
                result = _REPLAY[step["primitive"]](sch, args)
                refs = () if result is None else result if isinstance(result, tuple) else (result,)
                made.update(zip(step.get("result", ()), refs, strict=True))
            except (KeyError, TypeError, ValueError, AttributeError, ParseError) as error:
                raise ScheduleError(f"replay: step {number} is malformed ({error}): {dict(step)!r}") from error
        return sch

    # Internals --------------------------------------------------------------------------------------------------

    def _loop(self, primitive: str, ref: LoopRef) -> Var:
        found = self._resolve(primitive, ref)
        if not isinstance(found, Var):
            raise refuse(self._func, primitive, f"block {ref.name!r}", "it is a block, not a loop")
        return found

    def _block(self, primitive: str, ref: BlockRef) -> str:
        found = self._resolve(primitive, ref)
        if not isinstance(found, str):
            raise refuse(self._func, primitive, f"loop {ref.name!r}", "it is a loop, not a block")
        return found

    def _resolve(self, primitive: str, ref: Ref) -> Var | str:
        what = f"{'loop' if isinstance(ref, LoopRef) else 'block'} {ref.name!r}"
        if self._refs.get(ref.id) is not ref:
            raise refuse(self._func, primitive, what, "the handle belongs to another schedule")
        if ref.id in self._gone:
            raise refuse(self._func, primitive, what, f"it is gone: {self._gone[ref.id]} removed it")
        return self._live[ref.id]

    def _loop_ref(self, var: Var) -> LoopRef:
        for key, found in self._live.items():
            ref = self._refs[key]
            if found is var and isinstance(ref, LoopRef):
                return ref
        made = LoopRef(f"l{len(self._refs)}", var.name)
        self._refs[made.id], self._live[made.id] = made, var
        return made

    def _block_ref(self, name: str) -> BlockRef:
        for key, found in self._live.items():
            ref = self._refs[key]
            if found == name and isinstance(ref, BlockRef):
                return ref
        made = BlockRef(f"b{len(self._refs)}", name)
        self._refs[made.id], self._live[made.id] = made, name
        return made

    def _commit(self, func: PrimFunc, primitive: str, args: Mapping[str, Any], refs: Sequence[Ref] = ()) -> None:
        """Take over the new function, retire the handles of what it no longer has, and record the step."""
        check_tensorized(self._func, func, primitive)
        self._func = func
        existing: set[Var | str] = {loop.var for loop in loops_in(func.body)}
        existing |= {block.name for block in blocks_in(func.body)}
        for key in [key for key, found in self._live.items() if found not in existing]:
            del self._live[key]
            self._gone[key] = primitive
        self._record(primitive, args, refs)

    def _record(self, primitive: str, args: Mapping[str, Any], refs: Sequence[Ref] = ()) -> None:
        step: dict[str, Any] = {"primitive": primitive, "args": dict(args)}
        if refs:
            step["result"] = [ref.id for ref in refs]
        self._trace.append(step)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _resolve(key: str, value: Any, made: Mapping[str, Ref]) -> Any:
    """An argument of a recorded step, with handles in place of their ids."""
    if key in ("loop", "block", "ref"):
        return made[value]
    return [made[each] for each in value] if key == "loops" else value


_REPLAY = {
    "get_block": lambda s, a: s.get_block(a["name"]),
    "get_loops": lambda s, a: s.get_loops(a["block"]),
    "split": lambda s, a: s.split(a["loop"], a["factors"]),
    "fuse": lambda s, a: s.fuse(*a["loops"]),
    "reorder": lambda s, a: s.reorder(*a["loops"]),
    "parallel": lambda s, a: s.parallel(a["loop"]),
    "vectorize": lambda s, a: s.vectorize(a["loop"]),
    "unroll": lambda s, a: s.unroll(a["loop"]),
    "bind": lambda s, a: s.bind(a["loop"], a["thread"]),
    "software_pipeline": lambda s, a: s.software_pipeline(a["loop"], a["stages"]),
    "tensorize": lambda s, a: s.tensorize(a["loop"], a["intrin"]),
    "annotate": lambda s, a: s.annotate(a["ref"], a["key"], a["value"]),
    "compute_inline": lambda s, a: s.compute_inline(a["block"]),
    "reverse_compute_inline": lambda s, a: s.reverse_compute_inline(a["block"]),
    "decompose_reduction": lambda s, a: s.decompose_reduction(a["block"], a["loop"]),
    "compute_at": lambda s, a: s.compute_at(a["block"], a["loop"]),
    "reverse_compute_at": lambda s, a: s.reverse_compute_at(a["block"], a["loop"]),
    "cache_read": lambda s, a: s.cache_read(a["block"], a["buffer"], a["loop"], a["scope"]),
    "rfactor": lambda s, a: s.rfactor(a["block"], a["loop"]),
    "set_scope": lambda s, a: s.set_scope(a["block"], a["scope"]),
    "storage_align": lambda s, a: s.storage_align(a["block"], a["axis"], a["factor"], a["offset"]),
    "transform_layout": lambda s, a: s.transform_layout(a["block"], IndexMap.from_json(a["index_map"], s.func.symbols)),
    "pad_einsum": lambda s, a: s.pad_einsum(a["block"], a["padding"]),
    "cache_write": lambda s, a: s.cache_write(a["block"], a["loop"], a["scope"]),
}
