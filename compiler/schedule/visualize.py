"""A function's loop nest as a picture: loops as nested boxes, blocks as cards, buffers at the side.

    sch.visualize("nest.svg")                   # the schedule as it is
    sch.visualize("nest.svg", before=func)      # and beside it what it was made from

Names and expressions are those of `show()`. What stands higher runs earlier; a loop's colour says its kind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from kedge.compiler.schedule.drawing import Box, Column, Line, Picture, Span, draw
from kedge.compiler.tir.expr import Binary, Const, Dim, Expr, as_expr
from kedge.compiler.tir.flatten import holds_blocks
from kedge.compiler.tir.printer import Printer, attrs_text, word  # the names and words of the text
from kedge.compiler.tir.stmt import Block, Buffer, For, If, IterKind, LoopKind, PrimFunc, Region, Scope, Seq, Stmt
from kedge.compiler.tir.visitor import free_vars, walk_stmt

#: The widest that expressions and shapes get before they go on in the next line, in characters.
WIDE, NARROW = 76, 36
_GUTTER = 9  # columns of a block's card for what its lines are
_KIND_PILL, _SCOPE_PILL = 12, 10  # columns, so that those below one another are equally wide
_JOINTS = frozenset({"+", "-", "*", "/", "//", "%", "<", "<=", ">", ">=", "==", "!=", "=", "+:", "and", "or", "×"})


def visualize(func: PrimFunc, path: str | os.PathLike[str] | None = None, *, before: PrimFunc | None = None) -> Picture:
    """The picture of `func`, with `before` to its left where that is given; written to `path` (SVG) too if that is."""
    shown = [("before: ", before), ("after: ", func)] if before is not None else [("", func)]
    columns = [column for caption, each in shown for column in _Sketch(each).columns(caption)]
    picture = draw(f"Loop nest of {func.name!a}", columns, _legend([each for _, each in shown]))
    if path is not None:
        picture.save(path)
    return picture


class _Sketch:
    """What to draw of one function."""

    def __init__(self, func: PrimFunc) -> None:
        self._func = func
        self._names = Printer((*func.params, *func.allocs), func.symbols)

    def columns(self, caption: str) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
        """The nest, and the buffers beside it."""
        func = self._func
        heading = [_line(Span(f"{caption}func", "quiet"), Span(word(func.name), strong=True))]
        if func.symbols:
            where = f"where {', '.join(map(self._names.limits, func.symbols))}"
            heading += [_line(Span(part, "quiet")) for part in _wrap(where, WIDE)]
        cut = len(func.params) - func.n_outputs
        groups = (("inputs", func.params[:cut]), ("outputs", func.params[cut:]), ("allocations", func.allocs))
        sides = tuple(
            ((_line(Span(title, "quiet")),), tuple(map(self._buffer, buffers))) for title, buffers in groups if buffers
        )
        return ((tuple(heading), tuple(self._stmt(func.body, ()))),), sides

    # Statements: `around` are the extents of the loops, and the conditions, that a statement stands in. -------------

    def _stmt(self, stmt: Stmt, around: tuple[Expr, ...]) -> Iterator[Box]:
        match stmt:
            case Seq(stmts=stmts):
                for sub in stmts:
                    yield from self._stmt(sub, around)
            case For():
                yield self._loop(stmt, around)
            case Block():
                yield self._block(stmt, around)
            case If(condition=condition, then=then, orelse=orelse):
                words = _wrap(self._names.expr(condition), WIDE)
                inside = (*around, condition)
                yield Box("branch", tuple(_labelled("if", "guard", words, 3)), tuple(self._stmt(then, inside)), "guard")
                if orelse is not None:
                    lines = (_line(Span("else", "guard")),)
                    yield Box("branch", lines, tuple(self._stmt(orelse, inside)), "guard")
            case _:
                yield Box("block", tuple(_labelled("", "quiet", self._code(stmt), 0)))

    def _loop(self, loop: For, around: tuple[Expr, ...]) -> Box:
        extent = self._names.expr(loop.extent)
        serial = loop.kind == "serial"
        kind = Span(loop.thread or loop.kind, loop.kind, strong=not serial, pill=0 if serial else _KIND_PILL)
        with self._names.scope((loop.var,)):
            name = self._names.name(loop.var)
            first, *more = _wrap(f"× {extent}", WIDE)
            head = Line(((0, Span(name, strong=True)), (len(name) + 1, Span(first))), (kind,))
            rest = [_line(Span(text), column=len(name) + 3) for text in more]
            lines = (head, *rest, *self._notes(loop.annotations))
            title = f"{loop.kind} loop {name} × {extent}"
            inside = tuple(self._stmt(loop.body, (*around, loop.extent)))
            return Box(loop.kind, lines, inside, loop.kind, title=title)

    def _block(self, block: Block, around: tuple[Expr, ...]) -> Box:
        guarded = not (isinstance(block.predicate, Const) and block.predicate.value)
        runs = self._runs((*around, block.predicate) if guarded else around)
        head = Line(((0, Span(word(block.name), strong=True)),), (Span(runs, "quiet"),))
        bindings = [self._names.expr(binding) for binding in block.bindings]
        extents = [self._names.expr(it.extent) for it in block.iters]
        where = self._names.expr(block.predicate)
        lines = [head, *self._notes(block.annotations)]
        with self._names.scope(it.var for it in block.iters):
            ranges = [f"{self._names.name(it.var)} < {x}" for it, x in zip(block.iters, extents, strict=True)]
            indent = min(max(map(len, ranges), default=0), NARROW)
            for it, range_, binding in zip(block.iters, ranges, bindings, strict=True):
                lines += _binding(it.kind, range_, binding, indent)
            if guarded:
                lines += _labelled("where", "guard", _wrap(where, WIDE))
            for title, regions in (("reads", block.reads), ("writes", block.writes)):
                for index, region in enumerate(regions):
                    lines += self._region("" if index else title, region)
            if block.init is not None:
                lines += _labelled("init", "reduce", self._code(block.init))
            inside: tuple[Box, ...] = ()
            if holds_blocks(block):
                inside = tuple(self._stmt(block.body, (*around, block.predicate) if guarded else around))
            else:
                lines += _labelled("body", "quiet", self._code(block.body))
        return Box("block", tuple(lines), inside, head=True, title=f"block {word(block.name)}")

    def _region(self, title: str, region: Region) -> Iterator[Line]:
        first, *more = _wrap(self._names.region(region), WIDE)
        buffer = region.buffer
        tags = (Span(self._bytes(buffer), "quiet"), Span(buffer.scope, buffer.scope, pill=_SCOPE_PILL))
        yield Line(((0, Span(title, "quiet")), (_GUTTER, Span(first))), tags)
        for text in more:
            yield _line(Span(text), column=_GUTTER + 2)

    def _buffer(self, buffer: Buffer) -> Box:
        name = _wrap(self._names.name(buffer), NARROW)
        shape = _wrap(f"{buffer.dtype}[{self._names.shape(buffer.shape)}]", NARROW)
        scope, size = Span(buffer.scope, buffer.scope, pill=_SCOPE_PILL), Span(self._bytes(buffer), "quiet")
        lines = [Line(((0, Span(name[0], strong=True)),), (scope,))]
        lines += [_line(Span(text, strong=True)) for text in name[1:]]
        lines += [_line(Span(text)) for text in shape[:-1]]
        return Box("buffer", (*lines, Line(((0, Span(shape[-1])),), (size,))), stripe=buffer.scope)

    # Words ------------------------------------------------------------------------------------------------------

    def _code(self, stmt: Stmt) -> list[str]:
        return [part for line in self._names.stmt(stmt) for part in _wrap(line, WIDE)]

    def _notes(self, annotations: Mapping[str, Any]) -> list[Line]:
        return [_line(Span(text, "quiet")) for text in _wrap(attrs_text(annotations).strip(), WIDE) if text]

    def _runs(self, around: Sequence[Expr]) -> str:
        """How often a block runs, at most that often under a condition; nothing where inner extents vary."""
        extents = [each for each in around if each.dtype != "bool"]
        if any(var not in self._func.symbols for extent in extents for var in free_vars(extent)):
            return ""
        times = self._product(extents)
        return f"{'≤ ' if len(extents) < len(around) else ''}{times} {'run' if times == '1' else 'runs'}"

    def _product(self, factors: Iterable[Dim]) -> str:
        """A product of dims as text: what is known of it as one number, and the rest."""
        known, free = 1, []
        for factor in (part for each in factors for part in _factors(each)):
            if isinstance(factor, Const):
                known *= int(factor.value)
            else:
                text = self._names.expr(factor)
                free.append(text if text.isidentifier() else f"({text})")
        return " × ".join([f"{known:,}", *free] if known != 1 or not free else free)

    def _bytes(self, buffer: Buffer) -> str:
        factors = [part for dim in buffer.shape for part in _factors(dim)]
        known = [int(part.value) for part in factors if isinstance(part, Const)]
        size = _size(math.prod(known) * np.dtype(buffer.dtype).itemsize)
        free = [part for part in factors if not isinstance(part, Const)]
        return f"{size} × {self._product(free)}" if free else size


def _binding(kind: str, range_: str, binding: str, indent: int) -> Iterator[Line]:
    """The line of an iteration variable: its kind, its range and its value in terms of the loops."""
    ranges, values = _wrap(range_, NARROW), _wrap(f"= {binding}", WIDE - indent)
    for index in range(max(len(ranges), len(values))):
        left = [(0, Span(kind if index == 0 else "", kind))]
        if index < len(ranges):
            left.append((_GUTTER, Span(ranges[index], strong=index == 0)))
        if index < len(values):
            left.append((_GUTTER + indent + 2, Span(values[index])))
        yield Line(tuple(left))


def _factors(dim: Dim) -> Iterator[Expr]:
    """What a product is made of."""
    if isinstance(dim, Binary) and dim.op == "mul":
        yield from _factors(dim.a)
        yield from _factors(dim.b)
    else:
        yield as_expr(dim)


def _labelled(label: str, ink: str, texts: Sequence[str], column: int = _GUTTER) -> Iterator[Line]:
    """`texts` one under the other, their indentation kept, with a label before the first."""
    for index, text in enumerate(texts):
        bare = text.lstrip(" ")
        yield Line(((0, Span("" if index else label, ink)), (column + len(text) - len(bare), Span(bare))))


def _line(*spans: Span, column: int = 0) -> Line:
    """Runs of text with a space between them."""
    placed = []
    for span in spans:
        if span.text:
            placed.append((column, span))
            column += span.columns + 1
    return Line(tuple(placed))


def _wrap(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns, all but the first indented, broken where few brackets are open."""
    own = text[: len(text) - len(text.lstrip(" "))][: width // 4]
    lines: list[str] = []
    rest = text
    while len(rest) > width:
        cut = _break(rest, width // 2 + 2, width)
        lines.append(rest[:cut])
        rest = own + "  " + rest[cut:].lstrip(" ")
    return [*lines, rest]


def _break(text: str, least: int, most: int) -> int:
    """Where to go on in the next line: at a space that follows no operator, if there is one, in the given bounds."""
    depth, found = 0, (math.inf, most)
    for position, char in enumerate(text[: most + 1]):
        depth += (char in "([{") - (char in ")]}")
        before = text[:position].rpartition(" ")[2]
        if position >= least and char == " " and before not in _JOINTS and depth <= found[0]:
            found = (depth, position)
    return found[1]


def _size(n_bytes: int) -> str:
    """A byte count for people: "12.3 KiB"."""
    size, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f}".removesuffix(".0") + f" {unit}"


def _legend(funcs: Sequence[PrimFunc]) -> list[tuple[Span, ...]]:
    """What the colours say, of those that occur."""
    stmts = [stmt for func in funcs for stmt in walk_stmt(func.body)]
    kinds = {stmt.kind for stmt in stmts if isinstance(stmt, For)}
    iters = {it.kind for stmt in stmts if isinstance(stmt, Block) for it in stmt.iters}
    scopes = {buffer.scope for func in funcs for buffer in (*func.params, *func.allocs)}
    groups: Sequence[tuple[str, set[Any], tuple[str, ...], bool]] = (
        ("loops", kinds, get_args(LoopKind), True),
        ("iteration variables", iters, get_args(IterKind), False),
        ("memory", scopes, get_args(Scope), True),
    )
    return [
        (Span(title, "quiet"), *(Span(word, word, pill=int(pill)) for word in words if word in present))
        for title, present, words, pill in groups
        if present
    ]
