"""Kernels have symbols of their own for dims that are quotients, as long as nothing is lost by that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder, call
from kedge.compiler.graph.ir import Fused, Input, Module, TensorType
from kedge.compiler.graph.passes.fuse import make_group
from kedge.compiler.lower.interp import run_program
from kedge.compiler.lower.lower import draft, lower
from kedge.compiler.lower.own_symbols import with_own_symbols
from kedge.compiler.pipeline import pipeline
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Dim, Expr, Var
from kedge.compiler.tir.simplify import prove_equal

H = Var("h", lower=1)


def image(*shape: Dim) -> Input:
    return Input("x", TensorType(shape, "float32"))


def pools(count: int) -> Module:
    """An image of height h, halved again and again."""
    builder = Builder("main")
    value = builder.input("x", TensorType((1, 2, H, 8), "float32"))
    for _ in range(count):
        value = builder.call("max_pool", value, kernel=(2, 1), strides=(2, 1))
    return Module({"main": builder.finish({"y": value})})


def test_layers_that_differ_in_their_quotients_share_a_kernel() -> None:
    module = pools(4)
    program = draft(module)
    assert list(program.kernels) == ["max_pool", "max_pool_1"]  # of h, which is at least 1, and of what may be 0
    symbols = [step.symbols for step in program.entries[0].steps]
    assert [len(each) for each in symbols] == [1] * 4
    for (symbol,), size in zip(symbols, (1, 2, 4, 8), strict=True):
        assert prove_equal(symbol, H // size)
    given = {"x": np.random.default_rng(1).standard_normal((1, 2, 37, 8)).astype(np.float32)}
    wanted = interp.run(module, given)
    assert wanted["y"].shape == (1, 2, 2, 8)
    assert np.array_equal(run_program(program, given)["y"], wanted["y"])


def group(*values: object) -> Fused:
    return make_group(list(values))  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [H, 3, H * 2, H - 5])
def test_dims_that_are_no_quotients_and_those_that_may_be_negative_stay(dim: Dim) -> None:
    own = group(call("relu", image(dim, 4)))
    assert with_own_symbols(own, {}) == (own, {})


def test_what_is_known_of_multiples_stays_known() -> None:
    own, meanings = with_own_symbols(group(call("relu", image((H + 3) // 4 * 2, H))), {})
    ((symbol, meaning),) = meanings.items()
    assert (symbol.lower, prove_equal(meaning, (H + 3) // 4)) == (1, True)
    rows, columns = own.body.inputs[0].type.shape
    assert isinstance(rows, Expr)
    assert prove_equal(rows, symbol * 2)
    assert columns is H
    assert own.types[0].shape[1] is H


def test_what_callers_keep_of_a_symbol_counts() -> None:
    """A window of 5 over images that may be smaller by their own bounds: those are refused when called."""
    own = group(call("relu", image((H - 5) // 2 + 1, 4)))
    assert with_own_symbols(own, {}) == (own, {})
    _, meanings = with_own_symbols(own, {H: replace(H, lower=5)})
    ((symbol, meaning),) = meanings.items()
    assert (symbol.lower, prove_equal(meaning, (H - 5) // 2 + 1)) == (1, True)


def test_unpadded_strides_over_free_sizes_keep_their_rules() -> None:
    builder = Builder("main")
    x = builder.input("x", TensorType((1, 3, H, Var("w", lower=1)), "float32"))
    weight = builder.constant(np.ones((32, 3, 5, 5), np.float32))
    y = builder.call("relu", builder.call("conv", x, weight, strides=(2, 2)))
    target = parse("llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v3")
    module = pipeline().run(Module({"main": builder.finish({"y": y})}), target)
    kernels = lower(module, target).kernels.values()
    assert [kernel.rule for kernel in kernels] == ["contraction", "injective"]


def test_groups_that_need_to_know_how_their_dims_are_related_keep_the_symbols() -> None:
    x, y = image(H // 2, 4), image(H // 4, 4)
    half = call("max_pool", call("reshape", x, shape=(1, 1, H // 2, 4)), kernel=(2, 1), strides=(2, 1))
    own = group(half.inputs[0], half, call("add", half, call("reshape", y, shape=(1, 1, H // 4, 4))))  # type: ignore[attr-defined]
    assert with_own_symbols(own, {}) == (own, {})
