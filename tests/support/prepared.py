"""What code generation makes of a function before any LLVM, run in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.alloc import Alloc, map_statements, statements_of
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Var, as_expr, const
from kedge.compiler.tir.stmt import Buffer, For, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import seq
from support import functions
from support.compiled import opened


def interpretable(func: PrimFunc, body: Stmt) -> PrimFunc:
    """Prepared loops as a function for the interpreter; a buffer holds NaN whenever its life begins."""
    allocs: dict[Buffer, None] = {}

    def fresh(stmt: Stmt) -> Stmt:
        if not isinstance(stmt, Alloc):
            return map_statements(stmt, fresh)
        allocs[stmt.buffer] = None
        axes = tuple(Var(f"a{axis}") for axis in range(len(stmt.buffer.shape)))
        wipe: Stmt = Store(stmt.buffer, axes, const(math.nan, stmt.buffer.dtype))
        for axis, dim in zip(reversed(axes), reversed(stmt.buffer.shape), strict=True):
            wipe = For(axis, as_expr(dim), "serial", wipe)
        return seq(wipe, fresh(stmt.body))

    plain = fresh(body)
    return PrimFunc(func.name, func.params, func.n_outputs, plain, tuple(allocs), func.symbols)


def assert_prepared(func: PrimFunc, reference: PrimFunc, symbols: Mapping[str, int]) -> None:
    """The prepared loops compute in the interpreter what the unscheduled function does."""
    data = functions.inputs(reference, symbols)
    ran = interp.run(interpretable(func, prepare(func)), data, symbols)
    for got, want in zip(ran, interp.run(reference, data, symbols), strict=True):
        np.testing.assert_array_equal(got, want)


def assert_compiled(func: PrimFunc, reference: PrimFunc, symbols: Mapping[str, int], cache: KernelCache) -> None:
    """Machine code computes what the unscheduled function does."""
    data = functions.inputs(reference, symbols)
    with opened(compile_prim_func(func, "native", cache=cache), threads=2) as model:
        got = model.run({buffer.name: array for buffer, array in zip(func.params, data, strict=False)})
    for have, want in zip(got.values(), interp.run(reference, data, symbols), strict=True):
        np.testing.assert_array_equal(have, want)


def allocs(stmt: Stmt) -> Iterator[Buffer]:
    """Every buffer that lives in `stmt`, once for each place."""
    if isinstance(stmt, Alloc):
        yield stmt.buffer
    for child in statements_of(stmt):
        yield from allocs(child)
