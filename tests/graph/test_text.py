"""Printing, parsing and comparing modules."""

from __future__ import annotations

import numpy as np
import pytest

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph import parser, structural
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import Module, TensorType
from kedge.compiler.graph.parser import ParseError, parse
from kedge.compiler.graph.passes import default_passes, run_passes
from kedge.compiler.graph.verify import verify
from kedge.compiler.tir.expr import Var, maximum
from support.graphs import digits_network


def awkward_module() -> Module:
    """Names to be quoted, two symbols of one name, several results and functions, every kind of attribute."""
    n, other, h = Var("n", lower=1, upper=64), Var("n", lower=0), Var("h", lower=8)
    b = Builder("main")
    x, y = b.input("x:0", TensorType((n, 4, h), "float32")), b.input("0", TensorType((other,), "int64"))
    a, c = b.call("split", x, axis=1, sizes=(1, 3), origin=("a b", 'quote"d'))
    d = b.call("clip", c, min=-1.0, max=float("inf"))
    e = b.call("pad", d, pads=(0, 0, 1, 0, 0, maximum(h - 3, 0)), mode="edge")
    f = b.call("add", a, b.constant(np.array([[[float("nan")]]], np.float32)))
    g = b.call("gather", y, b.constant([0, -1]))
    scaled = b.call("mul", e, b.param("weird name/1", TensorType((3, 1), "float32")))
    main = b.finish({"e": scaled, "f.1": f, "g h": g})
    s = Builder("second one")
    z = s.input("z", TensorType((2,), "bool"))
    second = s.finish({"out": s.call("not", z)})
    return Module({"main": main, "second one": second}, {"weird name/1": np.ones((3, 1), np.float32)})


def test_a_printed_module_reads_back_equal():
    module = verify(awkward_module())
    text = module.show()
    back = parse(text)
    assert back.show() == text
    assert structural.equal(back, module)
    verify(back)


def test_golden_of_the_digits_network(golden):
    module, _ = digits_network()
    golden("digits.txt", module.show())
    assert structural.equal(parse(module.show()), module)


def test_golden_of_the_optimized_digits_network(golden):
    module, params = digits_network()
    module = run_passes(module.bind(params), default_passes())
    golden("digits_optimized.txt", module.show())
    back = parse(module.show(), module.params)
    assert back.show() == module.show()
    assert structural.equal(back, module)


def test_golden_of_the_summary(golden):
    module, params = digits_network()
    golden("digits_summary.txt", module.summary())
    bound = module.bind({name: params[name] for name in list(params)[1:]})
    assert "not bound: conv1.weight" in bound.summary()


def test_data_that_is_left_out_leaves_parameters_unbound():
    module, params = digits_network()
    back = parse(module.bind(params).show())
    assert "conv1.weight" not in back.params
    assert "fc.bias" in back.params  # small enough to stand in the text
    with pytest.raises(ParseError, match="not what the text describes"):
        parse(module.bind(params).show(), {**params, "conv2.weight": np.zeros((32, 16, 3, 3), np.float32)})


def test_large_constants_are_found_by_digest():
    b = Builder("main")
    data = np.arange(40, dtype=np.int64)
    module = Module({"main": b.finish({"y": b.call("neg", b.constant(data))})})
    with pytest.raises(ParseError, match="no data for the constant"):
        parse(module.show())
    from kedge.compiler.graph.printer import digest

    assert structural.equal(parse(module.show(), {digest(data): data}), module)


def test_structure_ignores_origins_and_names_of_symbols():
    def build(symbol: str, origin: str, scale: float) -> Module:
        b = Builder("main")
        x = b.input("x", TensorType((Var(symbol, lower=1), 3), "float32"))
        return Module({"main": b.finish({"y": b.call("mul", x, b.constant(scale, "float32"), origin=(origin,))})})

    assert structural.equal(build("n", "a", 2), build("batch", "b", 2))
    assert not structural.equal(build("n", "a", 2), build("n", "a", 3))


def test_structure_sees_sharing():
    def build(shared: bool) -> Module:
        b = Builder("main")
        x = b.input("x", TensorType((3,), "float32"))
        a = b.call("exp", x)
        return Module({"main": b.finish({"y": b.call("add", a, a if shared else b.call("exp", x))})})

    assert not structural.equal(build(True), build(False))


GOOD = """
module {
  func main(x: float32[n, 3]) -> (y: float32[n, 3]) where n >= 1 {
    %0 = relu(%x) : float32[n, 3]  # a comment
    return %0
  }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("relu(%x)", "relu(%z)", r"line 4, column 15: wanted a value that is defined before, not '%z'"),
        (": float32[n, 3]  #", ": float32[n, 4]  #", "wanted relu to have the type that it gives, float32"),
        ("return %0", "", "wanted a statement or return"),
        ("[n, 3]) where", "[m, 3]) where", "a number or a symbol that the function declares"),
        ("module {", "module", "wanted '{'"),
        ("(%x)", "(%x) {axis: 1}", "unknown attribute axis"),
        ("  }\n}", "", "wanted a statement|wanted param|wanted"),
        ("%0 = ", "%0 = ;", "wanted a token"),
    ],
)
def test_malformed_text_is_refused_with_its_place(old, new, reason):
    assert parse(GOOD).functions["main"].inputs[0].name == "x"
    assert old in GOOD
    with pytest.raises((ParseError, ShapeError), match=reason):
        parser.parse(GOOD.replace(old, new, 1))


def test_bounds_of_symbols_read_back():
    text = GOOD.replace("n >= 1", "2 <= n <= 8")
    (symbol,) = parse(text).functions["main"].symbols
    assert (symbol.name, symbol.lower, symbol.upper) == ("n", 2, 8)
