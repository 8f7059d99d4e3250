"""What people write in te by mistake is refused where they wrote it, with its remedy."""

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.errors import CompileError
from kedge.compiler.tir.interp import run

X, K = te.placeholder((3, 4), "float32", "x"), te.reduce_axis(4, "k")
IX, B = te.placeholder((3,), "int32", "i"), te.placeholder((3,), "bool", "b")
SYMBOL = te.Var("n", lower=1)
S = te.placeholder((SYMBOL, SYMBOL * 2), "float32", "s")


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (lambda i: X[-1, i], r"y: index -1 of x reaches -1, outside of its dim 0 of 3"),
        (lambda i: X[i, i], r"y: index i of x reaches 3, outside of its dim 0 of 3"),
        (lambda i: X[0, i + 1] * 2, r"index i \+ 1 of x reaches 4, outside of its dim 1 of 4"),
        (lambda i: X[0, 3 - i * 2], r"x reaches -3, outside of its dim 1"),
        (lambda i: te.select(X[0, i + 1] > 0, 1.0, 0.0), "reaches 4"),
        (lambda i: te.sum(X[0, i + K], K), r"index i \+ k of x reaches 6"),
        (lambda i: X[te.cast(IX[i], "int64"), 0], "index i of i reaches 3, outside of its dim 0 of 3"),
        (lambda i: S[SYMBOL, i], "index n of s reaches n, outside of its dim 0 of n"),
        (lambda i: S[SYMBOL - 1, SYMBOL * 2 + i], r"outside of its dim 1 of n \* 2"),
    ],
)
def test_a_read_that_is_certain_to_leave_its_tensor_is_refused(element, message):
    with pytest.raises(CompileError, match=message):
        te.compute((4,), element, name="y")


@pytest.mark.parametrize(
    "element",
    [
        lambda i: te.select(i < 3, X[0, i + 1], 0.0),
        lambda i: te.select(te.logical_and(i < 3, X[0, i + 1] > 0), 1.0, 0.0),
        lambda i: X[i % 3, 3 - i],
        lambda i: X[te.minimum(i, 2), te.maximum(i - 1, 0)],
        lambda i: X[0, i - i % 2],
        lambda i: X[i // 2 + te.cast(IX[0], "int64"), i],
        lambda i: S[SYMBOL - 1, SYMBOL + SYMBOL - 1],
        lambda i: S[i, i],
    ],
)
def test_reads_that_stay_inside_are_not_refused(element):
    assert te.compute((4,), element, name="y").shape == (4,)


def test_a_tensor_without_elements_reads_nothing():
    empty = te.placeholder((0,), "float32", "empty")
    assert te.compute((0,), lambda i: empty[i], name="y").shape == (0,)
    assert te.compute((3, 0), lambda i, j: empty[i], name="y").shape == (3, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: te.compute((4,), lambda i: X[0, i] == 0, name="y"),
        lambda: te.compute((4,), lambda i: te.select(X[0, i] == 0, 1.0, 0.0), name="y"),
        lambda: te.compute((4,), lambda i: te.select(i != 0, X[0, i], 0.0), name="y"),
        lambda: te.logical_and(X[0, 0] > 0, X[0, 0] == 1),
        lambda: te.logical_not(X[0, 0] != np.float32(1)),
        lambda: te.any(X[0, K] == 0, K),
    ],
)
def test_an_equals_sign_that_compared_the_expressions_is_refused(make):
    with pytest.raises(TypeError, match=r"(True|False), a value of Python: == and != compare the .* te.eq or te.ne"):
        make()


def test_a_truth_value_may_be_written_as_a_literal():
    y = te.compute((3,), lambda i: te.select(te.const(True), B[i], te.const(False)), name="y")
    assert y.dtype == "bool"
    bools = np.array([True, False, True])
    np.testing.assert_array_equal(run(te.create_prim_func([B, y], "f"), [bools])[0], bools)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: te.max(X[0, 0], 0.0), TypeError, r"max over float, which is no reduce axis; .* or te.maximum\(a, b\)"),
        (lambda: te.min(X[0, 0], 0), TypeError, r"min over int, .* or te.minimum\(a, b\)"),
        (lambda: te.all(X[0, 0] > 0, X[0, 1] > 0), TypeError, r"all over Binary.* or te.logical_and\(a, b\)"),
        (lambda: te.sum(X[0, K], None), TypeError, r"sum over NoneType, which is no reduce axis; .*extent\)$"),
        (lambda: te.const("1", "float32"), TypeError, "a literal is of type str"),
        (lambda: te.const(None, "float32"), TypeError, "a literal is of type NoneType"),
        (lambda: te.placeholder((3,), "float32", 3), TypeError, "a name is 3, a int; give a text"),
        (lambda: te.compute((3,), lambda i: B[i], name="a\0b"), CompileError, r"the name 'a\\x00b' has a null"),
        (lambda: te.create_prim_func(X, "f"), TypeError, "f: the parameters are a Tensor; give a list of te tensors"),
        (lambda: te.create_prim_func([X], 3), TypeError, "a name is 3"),
    ],
)
def test_what_is_taken_for_something_else_is_named_with_its_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("terms", [600, 900, 3000])
def test_an_expression_that_is_too_deep_to_follow_is_refused(terms):
    def element(i):
        total = X[0, i]
        for _ in range(terms):
            total = total + X[0, i]
        return total

    with pytest.raises(CompileError, match="y: its element is nested too deeply") as refused:
        te.create_prim_func([X, te.compute((4,), element, name="y")], "f")
    assert "te.sum" in str(refused.value.hint)
