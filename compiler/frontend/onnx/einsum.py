"""The converter of Einsum: transposes and reshapes around matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from kedge.compiler.frontend.onnx.node import Node, converter
from kedge.compiler.graph.dims import product
from kedge.compiler.graph.ir import Value
from kedge.compiler.ops.common import is_one

#: Labels of the dims that "…" stands for; letters are the equation's own.
_ELLIPSIS = tuple("0123456789")


@converter("Einsum")
def _einsum(node: Node) -> Value:
    values = node.values()
    terms, wanted = _labels(node, values)
    left, labels = values[0], terms[0]
    for index in range(1, len(values)):
        later = {label for term in terms[index + 1 :] for label in term} | set(wanted)
        left, labels = _contract(node, (left, labels), (values[index], terms[index]), later)
    left, labels = _summed(node, left, labels, set(wanted))
    perm = tuple(labels.index(label) for label in wanted)
    return node.emit("transpose", left, perm=perm) if perm != tuple(range(len(perm))) else left


def _labels(node: Node, values: Sequence[Value]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The labels of the dims of each operand, and of the result."""
    equation = "".join(node.attr("equation").split())
    inputs, arrow, result = equation.partition("->")
    texts = inputs.split(",")
    if len(texts) != len(values):
        raise node.error(f"equation {equation!r} has {len(texts)} terms for {len(values)} inputs")
    terms = []
    for text, value in zip(texts, values, strict=True):
        letters = text.replace("...", "")
        hidden = value.type.rank - len(letters)
        fits = hidden >= 0 if "..." in text else hidden == 0
        if not fits or not all(letter.isalpha() for letter in letters) or hidden > len(_ELLIPSIS):
            raise node.error(f"the term {text!r} of equation {equation!r} does not fit rank {value.type.rank}")
        term = _expanded(text, hidden)
        if len(set(term)) < len(term):
            raise node.error(f"the term {text!r} of equation {equation!r} takes a diagonal")
        terms.append(term)
    used = [label for term in terms for label in term]
    hidden = max(len([label for label in term if label in _ELLIPSIS]) for term in terms)
    if arrow:
        wanted = _expanded(result, hidden if "..." in result else 0)
    else:
        single = sorted(label for label in set(used) if label.isalpha() and used.count(label) == 1)
        wanted = (*_expanded("...", hidden), *single)
    if len(set(wanted)) < len(wanted) or not set(wanted) <= set(used):
        raise node.error(f"the result {result!r} of equation {equation!r} repeats a label, or has one of its own")
    return terms, wanted


def _expanded(text: str, hidden: int) -> tuple[str, ...]:
    """The labels of a term whose "…" stands for `hidden` dims, aligned at the last of them."""
    before, dots, after = text.partition("...")
    return (*before, *(_ELLIPSIS[len(_ELLIPSIS) - hidden :] if dots else ()), *after)


def _summed(node: Node, value: Value, labels: tuple[str, ...], kept: set[str]) -> tuple[Value, tuple[str, ...]]:
    """Without the labels that nothing else has."""
    gone = tuple(axis for axis, label in enumerate(labels) if label not in kept)
    if not gone:
        return value, labels
    rest = tuple(label for label in labels if label in kept)
    return node.emit("reduce_sum", value, axes=gone, keepdims=False), rest


def _without_ones(
    node: Node, a: tuple[Value, tuple[str, ...]], b: tuple[Value, tuple[str, ...]], later: set[str]
) -> tuple[Value, tuple[str, ...]]:
    """`a` without the dims of 1 that it repeats along a sum over those of `b`, which is then a sum of `b` alone."""
    (value, labels), sizes = a, dict(zip(b[1], b[0].type.shape, strict=True))
    gone = tuple(
        axis for axis, (label, size) in enumerate(zip(labels, value.type.shape, strict=True))
        if label not in later and is_one(size) and not is_one(sizes.get(label, 1))
    )  # fmt: skip
    if not gone:
        return a
    return node.emit("squeeze", value, axes=gone), tuple(label for axis, label in enumerate(labels) if axis not in gone)


def _contract(
    node: Node, a: tuple[Value, tuple[str, ...]], b: tuple[Value, tuple[str, ...]], later: set[str]
) -> tuple[Value, tuple[str, ...]]:
    """The product of two operands, summed over the labels that only they have."""
    a, b = _without_ones(node, a, b, later), _without_ones(node, b, a, later)
    a = _summed(node, *a, later | set(b[1]))
    b = _summed(node, *b, later | set(a[1]))
    shared = [label for label in a[1] if label in b[1]]
    batch = [label for label in shared if label in later]
    summed = [label for label in shared if label not in later]
    rows = [label for label in a[1] if label not in shared]
    columns = [label for label in b[1] if label not in shared]
    left = _as_matrix(node, *a, batch, rows, summed)
    right = _as_matrix(node, *b, batch, summed, columns)
    result = node.emit("matmul", left, right)
    sizes = [dict(zip(labels, value.type.shape, strict=True)) for value, labels in (a, b)]
    shape = (
        *result.type.shape[: len(batch)],
        *(sizes[0][label] for label in rows),
        *(sizes[1][label] for label in columns),
    )
    return node.emit("reshape", result, shape=shape), (*batch, *rows, *columns)


def _as_matrix(
    node: Node, value: Value, labels: tuple[str, ...], batch: list[str], rows: list[str], columns: list[str]
) -> Value:
    """The dims in this order, rows and columns each merged into one."""
    perm = tuple(labels.index(label) for label in (*batch, *rows, *columns))
    value = node.emit("transpose", value, perm=perm)
    shape, first, second = value.type.shape, len(batch), len(batch) + len(rows)
    return node.emit("reshape", value, shape=(*shape[:first], product(shape[first:second]), product(shape[second:])))
