"""Loops whose tiles begin where cache lines do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kedge.compiler.schedule.dependence import reduces_over
from kedge.compiler.schedule.primitives.loops import rebind, serial_loop, simplify_bindings
from kedge.compiler.schedule.tree import loop_path, loop_ranges, loops_on, refuse, swap
from kedge.compiler.target.costs import LINE_BYTES
from kedge.compiler.tir.expr import Lead, Var
from kedge.compiler.tir.stmt import For, PrimFunc


def align(func: PrimFunc, loop: Var, buffer: str) -> tuple[PrimFunc, Var]:
    """`func` with `loop` beginning before its first iteration, by as many as there are elements in front of `buffer` in
    a cache line; returns the new loop's variable."""
    node = serial_loop(func, "align", loop)
    found = next((each for each in func.params if each.name == buffer), None)
    if found is None:
        names = ", ".join(repr(each.name) for each in func.params)
        reason = f"{buffer!r} is no parameter: where others begin is known"
        raise refuse(func, "align", loop, reason, hint=f"take one of {names}")
    block = reduces_over(node)
    if block is not None:  # its first iteration initialises, and would be none that runs
        reason = f"block {block.name!r} reduces over it, and would not begin with its first value"
        raise refuse(func, "align", loop, reason, at=node, hint="take a loop over outputs")
    elements = LINE_BYTES // np.dtype(found.dtype).itemsize
    lead = next((each for each in func.symbols if isinstance(each, Lead) and each.buffer == buffer), None)
    if lead is None:
        lead = Lead(f"{buffer}_lead", lower=0, upper=elements - 1, buffer=buffer)
        func = replace(func, symbols=(*func.symbols, lead))
    var = Var(loop.name)
    body = rebind(node.body, loop, var - lead, var - lead >= 0)
    ranges = loop_ranges(loops_on(loop_path(func, loop)[:-1]))
    shifted = simplify_bindings(For(var, node.extent + lead, "serial", body, None, node.annotations), ranges)
    return swap(func, node, shifted), var
