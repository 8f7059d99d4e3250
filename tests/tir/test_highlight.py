"""Colours of printed IR: they add nothing but colours, mark what is what, and go only where they are wanted."""

from __future__ import annotations

import io
import re
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge import nn
from kedge.compiler.graph.ir import Module
from kedge.compiler.graph.passes import default_passes
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.tir.expr import Load, Var, const
from kedge.compiler.tir.highlight import STYLES, classify, highlight, wants_colour, write
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.printer import print_stmt
from kedge.compiler.tir.stmt import Buffer, For, LoopKind, PrimFunc, Seq, Store
from support.functions import bias_sigmoid, chain, conv, dense, mean, pool, softmax, transpose
from support.graphs import module_of
from support.targets import TARGETS

ESCAPE = re.compile(r"\x1b\[[\d;]*m")
N = Var("n", lower=1)
FUNCTIONS = {
    "dense": dense(N, 5, 6),
    "conv": conv(N, 2, 3, 2),
    "pool": pool(N, 2, 4),
    "chain": chain(N),
    "bias": bias_sigmoid(N, 2, 2, 3),
    "softmax": softmax(N, Var("m", lower=2, upper=9)),
    "mean": mean(N, 3, 4),
    "transpose": transpose(N, 7),
}


def network() -> Module:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3), nn.Softmax())
    module, _ = net.export({"forward": {"x": nn.spec.Tensor(("n", 1, 8, 8), "float32")}})
    return module.bind(net.init_params(seed=0))


def roles(text: str) -> list[tuple[str, str]]:
    """The parts of `text` that have a role, as (role, part)."""
    return [(role, part) for role, part in classify(text) if role]


def assert_only_colours(text: str) -> None:
    coloured = highlight(text)
    assert ESCAPE.sub("", coloured) == text
    assert "".join(part for _, part in classify(text)) == text
    assert {role for role, _ in classify(text)} <= {"", *STYLES}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_schedules_without_colours_are_what_they_were(name):
    assert_only_colours(FUNCTIONS[name].show())
    for target in TARGETS.values():
        assert_only_colours(schedule_func(FUNCTIONS[name], target).func.show())


def test_modules_without_colours_are_what_they_were():
    module = network()
    for step in [lambda m: m, *default_passes()]:
        module = step(module)
        assert_only_colours(module.show())
    assert_only_colours(module_of("matmul", [(N, 3), (3, 4)], ["float32", "float32"]).show())


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_without_colours_is_what_it_was(text: str):
    assert "".join(part for _, part in classify(text)) == text


WORDS = ["func", "for", "block", "in", "range", "where", "%0", "@a.b", "#1", " # note", '"', "'x'", "float32", "1.5e-3",
         "(", ")", "[", "]", "{", "}", ":", " ", "\n", "->", "=", "and", "from", "spatial", "é", "\\"]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS)).map("".join))
@settings(max_examples=300, deadline=None)
def test_broken_ir_without_colours_is_what_it_was(text: str):
    assert_only_colours(text)


def test_names_of_every_kind_without_colours_are_what_they_were():
    for name in ("range", "for", "layer/0", 'a"b\\', "# no comment", "%x", "\n", "naïve", ""):
        x, y, i = Buffer(name, (4,), "float32"), Buffer("y", (4,), "float32"), Var(name)
        func = PrimFunc(name, (x, y), 1, For(i, const(4), "serial", Store(y, (i,), Load(x, (i,)))))
        assert_only_colours(func.show())


FUNC = """func f(x: float32[n, 10]) -> (y: float32[n, 10]) where n >= 1:
  alloc r: int8[1] in register
  for i in parallel(n):  # grain=4
    for j in thread(10, 'blockIdx.x'):
      block "y 1":
        vi = spatial(n, i)
        vj = reduce(10, j)
        where i < 3 and j < 2
        y[vi, vj] = max(x[vi, vj], 0.0)"""


def test_tokens_of_a_function():
    found = roles(FUNC)
    for expected in [
        ("keyword", "func"), ("function", "f"), ("declared", "x"), ("dtype", "float32"), ("keyword", "where"),
        ("keyword", "alloc"), ("declared", "r"), ("dtype", "int8"), ("scope", "register"), ("keyword", "for"),
        ("declared", "i"), ("keyword", "in"), ("parallel", "parallel"), ("comment", "# grain=4"),
        ("thread", "thread"), ("string", "'blockIdx.x'"), ("keyword", "block"), ("block", '"y 1"'),
        ("declared", "vi"), ("spatial", "spatial"), ("reduce", "reduce"), ("keyword", "and"), ("call", "max"),
        ("number", "0.0"),
    ]:  # fmt: skip
        assert expected in found, expected
    assert [part for role, part in found if role == "declared"] == ["x", "y", "r", "i", "j", "vi", "vj"]


def test_tokens_of_a_module():
    found = roles(
        'module {\n  param fc.weight: float32[64, 10] = data(2560 bytes, sha256 0f3c2a1b9d8e7f60)\n\n'
        '  func main(x: float32[n, 64]) -> (y: float32[n, 10]) where n >= 1 {\n'
        '    %0 = matmul(%x, @fc.weight) {axis: 1, keep: true} : float32[n, 10] from "fc"\n'
        '    %1 = topk(%0) : (float32[n, 1], int64[n, 1])\n    return %1#1\n  }\n}'
    )  # fmt: skip
    for expected in [
        ("keyword", "module"), ("keyword", "param"), ("declared", "fc.weight"), ("call", "data"), ("number", "2560"),
        ("function", "main"), ("declared", "x"), ("declared", "%0"), ("call", "matmul"), ("number", "true"),
        ("keyword", "from"), ("string", '"fc"'), ("dtype", "int64"), ("keyword", "return"),
    ]:  # fmt: skip
        assert expected in found, expected
    declared = [part for role, part in found if role == "declared"]
    assert declared == ["fc.weight", "x", "y", "%0", "%1"]
    assert not any(role == "comment" for role, _ in found)  # `#1` names a result


def test_a_buffer_that_is_called_like_a_loop_is_none():
    func = parse_func(
        "func f(range: float32[4]) -> (parallel: float32[4]):\n"
        "  for i in range(4):\n"
        "    parallel[i] = range[i] + range[3]"
    )
    found = roles(func.show())
    assert [part for role, part in found if role == "serial"] == ["range"]
    assert not [part for role, part in found if role == "parallel"]
    assert [part for role, part in found if role == "declared"] == ["range", "parallel", "i"]


@pytest.mark.parametrize("kind", get_args(LoopKind))
def test_every_kind_of_loop_has_its_colour(kind):
    loop = For(Var("i"), const(4), kind, Seq(()), "blockIdx.x" if kind == "thread" else None)
    assert kind in {role for role, _ in roles(print_stmt(loop))}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "environment", "wanted"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"TERM": "xterm-256color"}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": ""}, False),
        (False, {"FORCE_COLOR": "1", "TERM": "dumb"}, True),
        (True, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_go_where_they_are_wanted(monkeypatch, terminal, environment, wanted):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if terminal else io.StringIO()
    assert wants_colour(stream, environment) == wanted
    write("func", stream)
    assert (stream.getvalue() != "func\n") == wanted
    assert ESCAPE.sub("", stream.getvalue()) == "func\n"


def test_functions_and_modules_print_themselves(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    func, module = FUNCTIONS["dense"], network()
    for shown in (func, module):
        shown.print()
        assert capsys.readouterr().out == shown.show() + "\n"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    func.print()
    out = capsys.readouterr().out
    assert out != func.show() + "\n"
    assert ESCAPE.sub("", out) == func.show() + "\n"


def luminance(colour: int) -> float:
    """The relative luminance (WCAG 2) of one of the 256 colours of terminals from 16 on."""
    steps = (0, 95, 135, 175, 215, 255)
    cube = colour - 16
    grey = 8 + 10 * (colour - 232)
    rgb = (steps[cube // 36], steps[cube // 6 % 6], steps[cube % 6]) if colour < 232 else (grey,) * 3
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_colours_are_readable_on_black_and_on_white():
    for role, style in STYLES.items():
        match = re.search(r"38;5;(\d+)", style)
        if match:
            light = luminance(int(match[1]))
            assert 1.05 / (light + 0.05) > 3.8, role
            assert (light + 0.05) / 0.05 > 3.8, role
