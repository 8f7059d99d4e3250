"""Pictures of loop nests: what they say, and that nothing in them overlaps or sticks out, whatever the function."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from types import MappingProxyType
from typing import NamedTuple, get_args
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kedge.compiler import te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.schedule.drawing import BOXES, COLUMN, FONT, INKS, Picture
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import blocks_in, loops_in
from kedge.compiler.schedule.visualize import visualize
from kedge.compiler.tir.expr import Expr, Load, Var, const
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import (
    Block,
    Buffer,
    For,
    If,
    IterKind,
    IterVar,
    LoopKind,
    PrimFunc,
    Range,
    Region,
    Scope,
    Seq,
    Stmt,
    Store,
)
from support.functions import SAMPLES, dense
from support.random_schedules import random_step
from support.targets import TARGETS

SVG = "{http://www.w3.org/2000/svg}"
N, M = Var("n", lower=1), Var("m", lower=2, upper=9)


class Rect(NamedTuple):
    """A rectangle in px."""

    left: float
    top: float
    right: float
    bottom: float

    def holds(self, other: Rect) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )

    def meets(self, other: Rect) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def rect_of(element: ElementTree.Element) -> Rect:
    x, y, width, height = (float(element.get(key, "0")) for key in ("x", "y", "width", "height"))
    return Rect(x, y, x + width, y + height)


def text_rect(element: ElementTree.Element) -> Rect:
    """What a run of text covers: ascenders and descenders of the font, and the width that it is held to."""
    assert COLUMN >= 0.602 * FONT, "the widest common monospace fonts"
    x, y, length = (float(element.get(key, "nan")) for key in ("x", "y", "textLength"))
    assert length == pytest.approx(len(element.text or "") * COLUMN)
    return Rect(x, y - FONT, x + length, y + FONT * 0.25)


def groups(element: ElementTree.Element) -> list[ElementTree.Element]:
    return element.findall(f"{SVG}g")


def root_of(picture: Picture) -> ElementTree.Element:
    return ElementTree.fromstring(picture.svg)


def check_layout(picture: Picture) -> None:
    """Every box holds its texts and boxes, and none of them overlap."""
    root = root_of(picture)
    page = Rect(0, 0, *map(float, root.get("viewBox", "").split()[2:]))
    check_box(root, page)
    for element in root.iter(f"{SVG}rect"):
        assert page.holds(rect_of(element))


def check_box(group: ElementTree.Element, own: Rect) -> None:
    texts = [(text_rect(text), text.text) for text in group.findall(f"{SVG}text")]
    inner = [(rect_of(child.find(f"{SVG}rect")), child.get("class")) for child in groups(group)]
    for rect, what in [*texts, *inner]:
        assert own.holds(rect), f"{what!r} at {rect} sticks out of {own}"
    for (a, what), (b, other) in combinations([*texts, *inner], 2):
        assert not a.meets(b), f"{what!r} at {a} covers {other!r} at {b}"
    for pill in group.findall(f"{SVG}rect[@rx='7']"):
        inside = [rect for rect, _ in texts if rect.meets(rect_of(pill))]
        assert len(inside) == 1 and rect_of(pill).left <= inside[0].left and inside[0].right <= rect_of(pill).right
        assert own.holds(rect_of(pill))
    for child, (rect, _) in zip(groups(group), inner, strict=True):
        check_box(child, rect)


def texts(picture: Picture) -> list[str]:
    return [element.text or "" for element in root_of(picture).iter(f"{SVG}text")]


def nested(element: ElementTree.Element) -> Iterator[tuple[str, list[str]]]:
    """The boxes of loops and blocks, outer ones first: what they are, and their texts."""
    for group in groups(element):
        style = (group.get("class") or "").removeprefix("box ")
        if style != "buffer":
            yield style, [text.text or "" for text in group.findall(f"{SVG}text")]
            yield from nested(group)


def check_content(func: PrimFunc, picture: Picture) -> None:
    """Each loop and block has its box, in the order of the text."""
    boxes = [(style, words[0]) for style, words in nested(root_of(picture)) if style != "branch"]
    lines = [line.strip() for line in func.show().splitlines()]
    headers = [re.match(r'(for|block) ("(?:[^"\\]|\\.)*"|\w+)', line) for line in lines]
    assert [name for _, name in boxes] == [match[2] for match in headers if match]
    assert [style for style, _ in boxes if style != "block"] == [loop.kind for loop in loops_in(func.body)]
    shown = texts(picture)
    for buffer in func.allocs:
        assert buffer.scope in shown
    for block in blocks_in(func.body):
        assert shown.count("init") >= (block.init is not None)


@pytest.mark.parametrize("name", SAMPLES)
def test_functions_and_their_schedules(name):
    before = SAMPLES[name]
    for func in (before, *(schedule_func(before, target).func for target in TARGETS.values())):
        check_layout(func.visualize())
        check_content(func, func.visualize())
        check_layout(visualize(func, before=before))


def dress(sch: Schedule, rng: random.Random) -> None:
    """A thread axis or an annotation somewhere; it may be refused."""
    block = sch.get_block(rng.choice(blocks_in(sch.func.body)).name)
    loops = sch.get_loops(block)
    if not loops:
        return
    loop = rng.choice(loops)
    if rng.random() < 0.5:
        sch.bind(loop, rng.choice(["blockIdx.x", "threadIdx.y"]))
    else:
        sch.annotate(rng.choice([loop, block]), rng.choice(["grain", "a key <&>"]), rng.choice([1, "x < y & 'z'"]))


@pytest.mark.parametrize("name", SAMPLES)
def test_random_schedules(name):
    drawn = set()
    for seed in range(6):
        rng = random.Random(f"{name} {seed}")
        sch = Schedule(SAMPLES[name])
        for _ in range(14):
            try:
                rng.choice([random_step, random_step, dress])(sch, rng)
            except ScheduleError:
                continue
        picture = sch.visualize()
        check_layout(picture)
        check_content(sch.func, picture)
        drawn.add(picture.svg)
    assert len(drawn) > 3


NAMES = st.one_of(st.sampled_from(["i", "j", "x", "a_long_name_that_says_everything_there_is_to_say" * 3]), st.text())
NOTES = st.dictionaries(NAMES, st.one_of(st.integers(), NAMES, st.lists(NAMES, max_size=3)), max_size=2)


@st.composite
def indices(draw: st.DrawFn, variables: tuple[Var, ...]) -> Expr:
    """An index expression, at times a long one."""
    result: Expr = const(draw(st.integers(0, 10**12)))
    for _ in range(draw(st.integers(0, draw(st.sampled_from([1, 2, 30]))))):
        other = draw(st.sampled_from([*variables, const(7)]))
        result = draw(st.sampled_from([result + other, result * other, (result + 1) // 16, result % 8 - other]))
    return result


@st.composite
def nests(draw: st.DrawFn, variables: tuple[Var, ...], buffers: tuple[Buffer, ...], depth: int) -> Stmt:
    """Statements of any form; valid or not is no matter to a picture."""
    below = nests(variables, buffers, depth - 1)
    kinds = ["block", "store", "loop", "loop", "loop", "seq", "if"] if depth else ["block", "store"]
    index = indices(variables)
    match draw(st.sampled_from(kinds)):
        case "loop":
            var = Var(draw(NAMES))
            kind = draw(st.sampled_from(["serial", "parallel", "vectorized", "unrolled", "thread", "tensorized"]))
            body = draw(nests((*variables, var), buffers, depth - 1))
            thread = draw(st.sampled_from(["blockIdx.x", "threadIdx.z"])) if kind == "thread" else None
            return For(var, draw(index), kind, body, thread, MappingProxyType(draw(NOTES)))
        case "seq":
            return Seq(tuple(draw(st.lists(below, max_size=4))))
        case "if":
            return If(draw(index) < draw(index), draw(below), draw(st.none() | below))
    target = draw(st.sampled_from(buffers))
    store = Store(
        target, tuple(draw(index) for _ in target.shape), Load(target, tuple(draw(index) for _ in target.shape))
    )
    if draw(st.booleans()):
        return store
    axes = tuple(
        IterVar(Var(draw(NAMES)), draw(index), draw(st.sampled_from(["spatial", "reduce"])))
        for _ in range(draw(st.integers(0, 3)))
    )
    region = Region(target, tuple(Range(draw(index), draw(index)) for _ in target.shape))
    init = draw(st.none() | st.just(store))
    body = draw(st.sampled_from([store, Seq((store, If(const(1) < 2, store)))]))
    guard = draw(st.sampled_from([const(True, "bool"), draw(index) < 5]))
    bindings = tuple(draw(index) for _ in axes)
    name, notes = draw(NAMES), MappingProxyType(draw(NOTES))
    return Block(name, axes, bindings, (region,), (region, region), body, init, guard, notes)


@st.composite
def functions(draw: st.DrawFn) -> PrimFunc:
    """Functions with names, shapes and nests of any kind."""
    scopes = st.sampled_from(["global", "shared", "local", "register"])
    dims = st.lists(st.one_of(st.integers(0, 10**6), indices((N, M))), max_size=3).map(tuple)
    dtypes = st.sampled_from(["float32", "int8", "bool"])
    buffers = tuple(draw(st.lists(st.builds(Buffer, NAMES, dims, dtypes, scopes), min_size=2, max_size=6)))
    return PrimFunc(draw(NAMES), buffers[:2], 1, draw(nests((N, M), buffers, 6)), buffers[2:], (N, M))


@given(functions())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_function(func: PrimFunc):
    check_layout(func.visualize())


def test_deep_nests_many_siblings_and_long_names():
    long = "a_name_of_many_words_" * 12
    x = Buffer(long, (N * 3 + M // 2, 7), "float32", "shared")
    leaf: Stmt = Block(long, (), (), (), (), Store(x, (const(0), const(1)), const(0.0, "float32")))
    for level in range(40):
        leaf = For(Var(f"i{level}"), (N + level) // 2, "serial", leaf)
    siblings = Seq(tuple(For(Var(long), const(2), "vectorized", Seq(())) for _ in range(50)))
    func = PrimFunc(long, (x,), 1, Seq((leaf, siblings)), (), (N, M))
    check_layout(func.visualize())


def matmul() -> PrimFunc:
    a, b = te.placeholder((512, 512), "float32", "a"), te.placeholder((512, 512), "float32", "b")
    k = te.reduce_axis(512, "k")
    c = te.compute((512, 512), lambda i, j: te.sum(a[i, k] * b[k, j], k), name="c")
    return te.create_prim_func([a, b, c], "main")


def tiled() -> Schedule:
    """A product with a tile in registers."""
    sch = Schedule(matmul())
    c = sch.get_block("c")
    i, j, k = sch.get_loops(c)
    i_outer, row = sch.split(i, [None, 8])
    j_outer, vector, lane = sch.split(j, [None, 2, 16])
    sch.reorder(i_outer, j_outer, k, row, vector, lane)
    copy = sch.cache_write(c, j_outer, "register")
    clear = sch.decompose_reduction(c, k)
    for block in (c, clear, copy):
        row, vector, lane = sch.get_loops(block)[-3:]
        sch.unroll(row)
        sch.unroll(vector)
        sch.vectorize(lane)
    return sch


def test_the_picture_of_the_manual(golden):
    golden("../../../docs/images/matmul-registers.svg", tiled().visualize().svg)


EVERYTHING = """func pick(x: float32[n, 100], "a <b>": int64[n]) -> (y: float32[n, 100]) where n >= 1 and n <= 64:
  alloc t: float32[n, 100] in local
  alloc r: float16[4] in register
  for i in thread(n, 'blockIdx.x'):  # grain=3
    if i < 3 and "a <b>"[i] >= 0:
      for j in vectorized(100):
        y[i, j] = x[i, j]
    else:
      block copy:  # note='x < y & z'
        vi = spatial(n, i)
        vk = reduce(1, 0)
        where i < n - 1
        reads x[vi, :100]
        writes t[vi, 0]
        init:
          t[vi, 0] = -inf
        t[vi, 0] = max(t[vi, 0], x[vi, vk])
        if vi < 2:
          t[vi, 0] = 1.0"""


def test_the_picture_of_everything_a_function_can_have(golden):
    func = parse_func(EVERYTHING)
    check_layout(func.visualize())
    golden("visualize.svg", func.visualize().svg)


def test_what_a_picture_says():
    shown = texts(tiled().visualize())
    for expected in [
        "func", "main", "i_0", "× 64", "serial", "unrolled", "vectorized", "c", "134,217,728 runs", "spatial",
        "vi < 512", "= i_0 * 8 + i_1", "reduce", "reads", "a[vi, vk]", "1 MiB", "writes", "c_register[r0, r1]",
        "register", "1 KiB", "float32[8, 32]", "body", "c[vi, vj] = c_register[r0, r1]", "inputs", "outputs",
        "allocations", "loops", "iteration variables", "memory",
    ]:  # fmt: skip
        assert expected in shown, expected
    assert "init" in texts(matmul().visualize())
    assert "parallel" not in shown  # the legend holds what occurs


def test_guards_notes_threads_and_sizes_of_symbolic_shape():
    sch = Schedule(dense(N, 5, 6, relu=False))
    block = sch.get_block("y")
    i, j, _ = sch.get_loops(block)
    outer, inner = sch.split(i, [None, 4])
    sch.bind(outer, "blockIdx.x")
    sch.annotate(j, "grain", 3)
    sch.annotate(block, "note", "<&>")
    shown = texts(sch.visualize())
    for expected in [
        "blockIdx.x", "× (n + 3) // 4", "# grain=3", "# note='<&>'", "where", "i_0 * 4 + i_1 < n", "where n >= 1",
        "≤ 120 × ((n + 3) // 4) runs", "20 B × n", "24 B × n", "120 B",
    ]:  # fmt: skip
        assert expected in shown, expected
    assert inner.name == "i_1"


def test_branches_and_bare_stores():
    x, y, i = Buffer("x", (4,), "float32"), Buffer("y", (4,), "float32"), Var("i")
    copy = Store(y, (i,), Load(x, (i,)))
    func = PrimFunc("f", (x, y), 1, For(i, const(4), "serial", If(i < 2, copy, Seq((copy, copy)))))
    boxes = list(nested(root_of(func.visualize())))
    assert [style for style, _ in boxes] == ["serial", "branch", "block", "branch", "block", "block"]
    assert boxes[1][1] == ["if", "i < 2"] and boxes[3][1] == ["else"] and boxes[2][1] == ["y[i] = x[i]"]


def test_how_often_a_block_runs():
    x, i, j = Buffer("x", (4,), "float32"), Var("i"), Var("j")

    def runs(nest: Callable[[Stmt], Stmt]) -> list[str]:
        block = Block("b", (), (), (), (), Store(x, (const(0),), const(0.0, "float32")))
        boxes = dict(nested(root_of(PrimFunc("f", (x,), 1, nest(block), (), (N,)).visualize())))
        return boxes["block"][1:-2]

    assert runs(lambda block: block) == ["1 run"]
    assert runs(lambda block: For(i, const(0), "serial", block)) == ["0 runs"]
    assert runs(lambda block: For(i, N * 6, "serial", For(j, const(500), "serial", block))) == ["3,000 × n runs"]
    assert runs(lambda block: For(i, N + 1, "serial", If(i < 2, block))) == ["≤ (n + 1) runs"]
    assert runs(lambda block: For(i, N, "serial", For(j, i + 1, "serial", block))) == []


def test_before_and_after_stand_side_by_side():
    sch = tiled()
    picture = sch.visualize(before=matmul())
    shown = texts(picture)
    assert shown.index("before: func") < shown.index("after: func")
    left = [rect_of(group.find(f"{SVG}rect")) for group in groups(root_of(picture))]
    assert left[0].right < left[-1].left
    assert texts(matmul().visualize()) != texts(sch.visualize())
    for wrong, hint in ((sch, "as sch.func"), ("y", "create_prim_func")):
        with pytest.raises(ScheduleError, match="not a PrimFunc") as caught:
            sch.visualize(before=wrong)
        assert hint in str(caught.value)


def test_pictures_are_saved_and_shown_by_notebooks(tmp_path):
    sch = tiled()
    picture = sch.visualize(tmp_path / "nest.svg")
    assert (tmp_path / "nest.svg").read_text(encoding="utf-8") == picture.svg == picture._repr_svg_()
    sch.func.visualize(str(tmp_path / "again.svg"))
    picture.save(tmp_path / "saved.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "saved.svg").read_bytes()


def test_pictures_need_nothing_from_elsewhere_and_touch_nothing_else():
    svg = tiled().visualize().svg
    assert not re.search(r"href|url\(|@import|<script|<image", svg)
    assert re.findall(r"https?://[^\"]*", svg) == ["http://www.w3.org/2000/svg"]
    style = root_of(Picture(svg)).find(f"{SVG}style")
    rules = [line.strip() for line in (style.text or "").splitlines() if "{" in line and "@media" not in line]
    assert rules and all(rule.startswith(".kedge-nest ") for rule in rules)  # a notebook has one sheet for the page


def test_schedules_print_themselves(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    sch = tiled()
    sch.print()
    assert capsys.readouterr().out == sch.show() + "\n"


def contrast(a: str, b: str, opacity: float = 1.0) -> float:
    """The contrast (WCAG 2) of ink `a` on paper `b`, which a wash of the ink darkens where `opacity` is below 1."""

    def rgb(colour: str) -> list[float]:
        return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]

    def luminance(values: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = [p + (i - p) * (1 - opacity) for i, p in zip(rgb(a), rgb(b), strict=True)]
    light, dark = sorted((luminance(rgb(a)), luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_text_is_readable(theme):
    for style, fills in BOXES.items():
        for ink in ("text", "quiet", "guard", style if style in INKS else "text"):
            assert contrast(INKS[ink][theme], fills[theme][0]) >= 4.5, (style, ink)
    for ink, inks in INKS.items():
        own = BOXES.get(ink, BOXES["block"])[theme][0]
        assert contrast(inks[theme], own, 0.87) >= 4.5, ink


def test_everything_has_a_colour():
    assert set(get_args(LoopKind)) <= set(BOXES) & set(INKS)
    assert set(get_args(Scope)) | set(get_args(IterKind)) <= set(INKS)


def test_colours_are_those_of_the_viewer():
    svg = tiled().visualize().svg
    light, dark = svg.split("@media (prefers-color-scheme: dark)")
    for name, ((fill, _), (dark_fill, _)) in BOXES.items():
        assert f"rect.{name} {{ fill: {fill}" in light and f"rect.{name} {{ fill: {dark_fill}" in dark
