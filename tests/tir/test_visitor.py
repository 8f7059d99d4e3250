"""Maps keep what did not change; walks see everything once."""

from kedge.compiler.tir.expr import Const, Load, Var, const
from kedge.compiler.tir.stmt import Block, Buffer, For, Seq, Store
from kedge.compiler.tir.verify import verify
from kedge.compiler.tir.visitor import (
    free_vars,
    loads,
    map_expr,
    map_func,
    map_stmt,
    replace_buffers,
    seq,
    stores,
    substitute,
    substitute_expr,
    walk_expr,
    walk_stmt,
)  # fmt: skip
from support.functions import conv, dense


def test_unchanged_is_the_same_object():
    func = conv(Var("n", lower=1), 2, 8, 4)
    assert map_func(func, lambda s: s, expr=lambda e: map_expr(e, lambda node: node)) is func
    assert substitute(func.body, {Var("other"): const(1)}) is func.body
    assert replace_buffers(func.body, {Buffer("other", (), "int64"): func.params[0]}) is func.body


def test_substitute_all_at_once():
    a, b = Var("a"), Var("b")
    swapped = substitute_expr(a - b, {a: b, b: a})
    assert free_vars(swapped) == (b, a)


def test_walk_is_post_order():
    a, b = Var("a"), Var("b")
    inner = a + b
    outer = inner * 2
    assert list(walk_expr(outer))[:3] == [a, b, inner]
    assert list(walk_expr(outer))[-1] is outer
    func = dense(2, 3, 4)
    assert list(walk_stmt(func.body))[-1] is func.body


def test_map_reaches_extents_bindings_regions_and_values():
    func = dense(Var("n", lower=1), 3, 4, relu=False)
    n = func.symbols[0]
    fixed = map_stmt(func.body, expr=lambda e: substitute_expr(e, {n: const(7)}))
    assert not [e for s in walk_stmt(fixed) if isinstance(s, For) for e in walk_expr(s.extent) if e is n]
    blocks = [s for s in walk_stmt(fixed) if isinstance(s, Block)]
    assert all(isinstance(it.extent, Const) for it in blocks[0].iters)


def test_replace_buffers_renames_regions_too():
    func = dense(2, 3, 4, relu=False)
    x = func.params[0]
    other = Buffer("other", x.shape, x.dtype)
    body = replace_buffers(func.body, {x: other})
    assert x not in {load.buffer for load in loads(body)}
    (block,) = [s for s in walk_stmt(body) if isinstance(s, Block)]
    assert other in {region.buffer for region in block.reads}


def test_seq_flattens():
    y = Buffer("y", (1,), "int64")
    store = Store(y, (const(0),), const(1))
    assert seq(store) is store
    flat = seq(store, seq(store, store))
    assert isinstance(flat, Seq)
    assert len(flat.stmts) == 3
    assert len(list(stores(flat))) == 3


def test_changed_functions_stay_valid():
    func = dense(2, 3, 4)
    doubled = map_func(func, expr=lambda e: map_expr(e, lambda node: node + node if isinstance(node, Load) else node))
    assert verify(doubled) is not func
