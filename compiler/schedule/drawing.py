"""Boxes of text inside one another, laid out and written as SVG. What they show is `visualize`'s business.

All text stands on a grid of characters of one size. `textLength` holds every run to its columns, whatever font the
viewer has, so that nothing can leave its box. Colours are classes with one rule for light and one for dark; viewers
that know no media queries show the light ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree

#: Sizes in px. A character is as wide as the widest common monospace fonts have it (0.602 of its height).
FONT, COLUMN, ROW = 12, 7.25, 18
PADDING, MARGIN, GAP, STRIPE, HEAD = 10, 6, 8, 4, 6
FONTS = "ui-monospace, 'SF Mono', SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"

#: Fills and lines of boxes by style: (fill, line) in light, then in dark.
BOXES: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "page": (("#ffffff", "#ffffff"), ("#0d1117", "#0d1117")),
    "serial": (("#f5f7f9", "#c6ced6"), ("#161b22", "#3d444d")),
    "parallel": (("#e9f2ff", "#85b4f2"), ("#0e213f", "#2f62a8")),
    "vectorized": (("#e7f6ec", "#7cc597"), ("#0f2819", "#2f7a4b")),
    "unrolled": (("#fff5e2", "#e5b964"), ("#2b2009", "#88661f")),
    "thread": (("#f4edfd", "#ba98ea"), ("#231738", "#6c48aa")),
    "tensorized": (("#ffedf1", "#eb93a8"), ("#34121c", "#9c3a55")),
    "branch": (("#ffffff", "#8c96a1"), ("#0d1117", "#6e7681")),
    "block": (("#ffffff", "#8c96a1"), ("#0d1117", "#6e7681")),
    "buffer": (("#ffffff", "#c6ced6"), ("#0d1117", "#3d444d")),
}
#: Colours of text by style: light, then dark.
INKS: Mapping[str, tuple[str, str]] = {
    "text": ("#1f2328", "#e6edf3"),
    "quiet": ("#59636e", "#9198a1"),
    "serial": ("#59636e", "#9198a1"),
    "parallel": ("#0a54bd", "#79b8ff"),
    "vectorized": ("#116a37", "#6fdd96"),
    "unrolled": ("#875200", "#f0b95a"),
    "thread": ("#6731b0", "#c9a3ff"),
    "tensorized": ("#a8123f", "#ff9db2"),
    "spatial": ("#0b6b75", "#5ccbd6"),
    "reduce": ("#b3202c", "#ff8f86"),
    "guard": ("#875200", "#f0b95a"),
    # Scopes: the nearer to the arithmetic, the stronger.
    "global": ("#59636e", "#9198a1"),
    "shared": ("#47659a", "#9fb8e8"),
    "local": ("#4a55b5", "#a5adff"),
    "register": ("#7d2a97", "#e79cfb"),
}


@dataclass(frozen=True, slots=True)
class Span:
    """A run of text. `pill` draws a frame around it, at least so many columns wide."""

    text: str
    ink: str = "text"
    strong: bool = False
    pill: int = 0

    @property
    def columns(self) -> int:
        """Its width in characters."""
        return max(len(self.text) + 1, self.pill) if self.pill else len(self.text)


@dataclass(frozen=True, slots=True)
class Line:
    """Runs of text from given columns on, and others that end where the box does, a column between them."""

    left: tuple[tuple[int, Span], ...] = ()
    right: tuple[Span, ...] = ()

    @property
    def columns(self) -> int:
        """The least width that keeps its two parts two columns apart."""
        left = max((column + span.columns for column, span in self.left), default=0)
        right = sum(span.columns + 1 for span in self.right)
        return left + (right + 1 if left and right else max(0, right - 1))


@dataclass(frozen=True, slots=True)
class Box:
    """Lines of text above further boxes.

    A `stripe` of that ink runs down its left side; a rule under the first line sets off what has a `head`. `title` is
    what pointing at it shows.
    """

    style: str
    lines: tuple[Line, ...]
    children: tuple[Box, ...] = ()
    stripe: str = ""
    head: bool = False
    title: str = ""

    @property
    def width(self) -> float:
        """The least width in px that holds all text."""
        own = max((line.columns for line in self.lines), default=0) * COLUMN
        return max([own, *(child.width for child in self.children)]) + 2 * PADDING + STRIPE

    @property
    def height(self) -> float:
        """The height in px."""
        below = sum(child.height + GAP for child in self.children)
        return self.text_height + below + (0 if self.children else MARGIN)

    @property
    def text_height(self) -> float:
        """The height of its lines and the space above and below them."""
        return MARGIN + len(self.lines) * ROW + (HEAD if self.head else 0) + (MARGIN / 2 if self.children else 0)


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG image. A notebook shows it; `save` writes it to a file."""

    svg: str

    def _repr_svg_(self) -> str:
        """What notebooks show."""
        return self.svg

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image to a file."""
        Path(path).write_text(self.svg, encoding="utf-8")


#: Boxes one above the other, under a heading.
Column: TypeAlias = tuple[tuple[Line, ...], tuple[Box, ...]]


def draw(title: str, columns: Sequence[Sequence[Column]], legend: Sequence[Sequence[Span]]) -> Picture:
    """The picture of columns side by side, each of headed stacks of boxes, and the legend under them."""
    sheet = _Sheet(title)
    x, bottom = float(2 * PADDING), 0.0
    for stacks in columns:
        width = max(map(_stack_width, stacks))
        y = float(2 * PADDING)
        for heading, boxes in stacks:
            sheet.lines(sheet.root, heading, x, y, width)
            y += len(heading) * ROW + (GAP / 2 if heading else 0)
            for box in boxes:
                sheet.box(sheet.root, box, x, y, width)
                y += box.height + GAP
            y += GAP
        x, bottom = x + width + 2 * PADDING, max(bottom, y)
    rows = list(_wrapped(legend, x - 4 * PADDING))
    sheet.lines(sheet.root, rows, 2 * PADDING, bottom, x - 4 * PADDING)
    return sheet.finish(max(x, *(row.columns * COLUMN + 4 * PADDING for row in rows)), bottom + len(rows) * ROW + GAP)


def _stack_width(column: Column) -> float:
    heading, boxes = column
    return max([*(line.columns * COLUMN for line in heading), *(box.width for box in boxes)], default=0.0)


def _wrapped(groups: Iterable[Sequence[Span]], width: float) -> Iterator[Line]:
    """Groups of runs in as few lines of `width` as hold them; none is torn apart."""
    line: list[tuple[int, Span]] = []
    column = 0
    for group in groups:
        columns = sum(span.columns + 1 for span in group) - 1
        if line and (column + columns) * COLUMN > width:
            yield Line(tuple(line))
            line, column = [], 0
        for span in group:
            line.append((column, span))
            column += span.columns + 1
        column += 3
    yield Line(tuple(line))


class _Sheet:
    """The SVG document under construction."""

    def __init__(self, title: str) -> None:
        self.root = ElementTree.Element(
            "svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "kedge-nest", "role": "img"}
        )
        ElementTree.SubElement(self.root, "title").text = title
        ElementTree.SubElement(self.root, "style").text = _rules()
        self._page = ElementTree.SubElement(self.root, "rect", {"class": "page"})

    def box(self, parent: ElementTree.Element, box: Box, x: float, y: float, width: float) -> None:
        """Draw `box` with its upper left corner at (x, y), as wide as `width`."""
        group = ElementTree.SubElement(parent, "g", {"class": f"box {box.style}"})
        if box.title:
            ElementTree.SubElement(group, "title").text = box.title
        self._rect(group, box.style, x, y, width, box.height, 6)
        if box.stripe:
            self._rect(group, f"{box.stripe}-ink", x, y + 6, STRIPE, box.height - 12, 2)
        left, inner, top = x + STRIPE + PADDING, width - STRIPE - 2 * PADDING, y + MARGIN
        if box.head:
            self.lines(group, box.lines[:1], left, top, inner)
            top += ROW + HEAD
            self._rect(group, "rule", x, top - HEAD / 2 - 0.5, width, 1, 0)
        self.lines(group, box.lines[1 if box.head else 0 :], left, top, inner)
        y += box.text_height
        for child in box.children:
            self.box(group, child, left, y, inner)
            y += child.height + GAP

    def lines(self, parent: ElementTree.Element, lines: Iterable[Line], x: float, y: float, width: float) -> None:
        """Write lines of text into the space `width` from (x, y) on."""
        for line in lines:
            for column, span in line.left:
                self._span(parent, span, x + column * COLUMN, y)
            end = x + width
            for span in reversed(line.right):
                end -= span.columns * COLUMN
                self._span(parent, span, end, y)
                end -= COLUMN
            y += ROW

    def _span(self, parent: ElementTree.Element, span: Span, x: float, y: float) -> None:
        if not span.text:
            return
        if span.pill:
            self._rect(parent, f"pill {span.ink}-ink", x, y + 1.5, span.columns * COLUMN, ROW - 3, 7)
            x += (span.columns - len(span.text)) / 2 * COLUMN
        place = {"x": _number(x), "y": _number(y + 13), "textLength": _number(len(span.text) * COLUMN)}
        weight = " strong" if span.strong else ""
        style = {"class": f"{span.ink}-ink{weight}", "lengthAdjust": "spacingAndGlyphs"}
        ElementTree.SubElement(parent, "text", {**style, **place}).text = span.text

    def _rect(
        self, parent: ElementTree.Element, style: str, x: float, y: float, width: float, height: float, round_: int
    ) -> None:
        size = {"x": x, "y": y, "width": width, "height": height, "rx": round_}
        ElementTree.SubElement(parent, "rect", {"class": style, **{key: _number(v) for key, v in size.items()}})

    def finish(self, width: float, height: float) -> Picture:
        """The document in its final size."""
        size = {"width": _number(width), "height": _number(height)}
        self._page.attrib.update(size)
        self.root.attrib.update({**size, "viewBox": f"0 0 {size['width']} {size['height']}"})
        ElementTree.indent(self.root)
        return Picture(ElementTree.tostring(self.root, encoding="unicode") + "\n")


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _rules() -> str:
    """The style sheet; all of it holds for kedge's pictures alone, since a notebook has one for the whole page."""
    fixed = [
        f".kedge-nest text {{ font: {FONT}px {FONTS}; white-space: pre }}",
        ".kedge-nest .strong { font-weight: bold }",
        ".kedge-nest .pill { fill-opacity: .13 }",
        ".kedge-nest rect.branch { stroke-dasharray: 5 3 }",
    ]
    dark = "\n".join("  " + line for line in _colours(1))
    return "\n".join(["", *_colours(0), *fixed, "@media (prefers-color-scheme: dark) {", dark, "}", ""])


def _colours(theme: int) -> Iterator[str]:
    for name, pair in BOXES.items():
        fill, line = pair[theme]
        yield f".kedge-nest rect.{name} {{ fill: {fill}; stroke: {line} }}"
        if name == "block":
            yield f".kedge-nest .rule {{ fill: {line}; fill-opacity: .5 }}"
    for name, inks in INKS.items():
        yield f".kedge-nest .{name}-ink {{ fill: {inks[theme]} }}"
