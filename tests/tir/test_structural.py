"""Equality and hashing by structure."""

import subprocess
import sys
from dataclasses import replace

import pytest

from kedge.compiler import te
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.expr import Var, const
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import canonical, equal, structural_hash
from support.functions import conv, dense, softmax

HASH = """
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.structural import structural_hash
from support.functions import conv
print(structural_hash(conv(Var("n", lower=1), 2, 8, 4)))
"""


def test_equal_up_to_names():
    def build(names: str) -> PrimFunc:
        n = Var(names[0], lower=1)
        x = te.placeholder((n, 4), "float32", names[1])
        k = te.reduce_axis(4, names[2])
        return te.create_prim_func([x, te.compute((n,), lambda i: te.sum(x[i, k], k), name=names[3])], names[4])

    a, b = build("nxkyf"), build("mwrzg")
    assert equal(a, b)
    assert structural_hash(a) == structural_hash(b)


@pytest.mark.parametrize(
    "other",
    [
        dense(Var("n", lower=1), 8, 4, relu=False),
        dense(Var("n", lower=1), 8, 5),
        dense(Var("n", lower=2), 8, 4),
        dense(4, 8, 4),
        softmax(4, 8),
    ],
)
def test_different(other):
    func = dense(Var("n", lower=1), 8, 4)
    assert not equal(func, other)
    assert structural_hash(func) != structural_hash(other)


def test_schedule_annotations_and_literals_count():
    func = dense(4, 8, 4)
    sch = Schedule(func)
    loop = sch.get_loops(sch.get_block("y"))[0]
    sch.annotate(loop, "key", 1)
    assert not equal(func, sch.func)
    zero, minus = (
        te.create_prim_func([te.compute((1,), lambda i, v=v: const(v, "float32"), name="y")], "f") for v in (0.0, -0.0)
    )
    assert not equal(zero, minus)


def test_attrs_do_not_count():
    func = dense(4, 8, 4)
    assert equal(func, replace(func, attrs={"origin": "x"}))


def test_hash_is_the_same_in_another_process():
    func = conv(Var("n", lower=1), 2, 8, 4)
    printed = subprocess.run(
        [sys.executable, "-c", HASH],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
    ).stdout
    assert printed.strip() == structural_hash(func)


def test_canonical_form_names_nothing():
    text = canonical(dense(Var("batch", lower=1), 8, 4))
    assert "batch" not in text
    assert "dense" not in text
