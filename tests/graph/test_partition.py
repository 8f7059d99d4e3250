"""Patterns and partitions: what goes to external code, what does not, and that the graph means the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import CompileError, CompileWarning, VerifyError
from kedge.compiler.graph import interp, parser, structural
from kedge.compiler.graph import patterns as p
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.external import External
from kedge.compiler.graph.ir import Call, ExternalCall, Function, Module, TensorType, Value
from kedge.compiler.graph.passes import Fuse, Partition, default_passes
from kedge.compiler.graph.verify import verify
from kedge.compiler.pipeline import Pipeline
from kedge.compiler.tir.expr import Var

N = Var("n", lower=1)
rng = np.random.default_rng(0)


def dense(**options: Any) -> p.Pattern:
    x, w, b = p.wildcard("x"), p.constant("w"), p.wildcard("b")
    return p.op("relu", p.op("add", p.op("matmul", x, w, **options), b))


def external(pattern: p.Pattern, name: str = "f", **options: Any) -> External:
    return External(name, pattern, source="f.c", **options)


def module(build: Callable[[Builder, Value, Value, Value], dict[str, Value]]) -> Module:
    """`build` over a free batch of rows, a bound weight and a bound bias."""
    b = Builder("main")
    x = b.input("x", TensorType((N, 8), "float32"))
    w, bias = b.param("w", TensorType((8, 8), "float32")), b.param("bias", TensorType((8,), "float32"))
    made = Module({"main": b.finish(build(b, x, w, bias))})
    known = {"w": rng.standard_normal((8, 8)).astype("float32"), "bias": rng.standard_normal(8).astype("float32")}
    used = {value.name for value in made.functions["main"].values() if value in (w, bias)}  # type: ignore[attr-defined]
    return verify(made.bind({name: known[name] for name in used}))


def layer(b: Builder, x: Value, w: Value, bias: Value, name: str = "fc") -> Value:
    product = b.call("matmul", x, w, origin=(name,))
    return b.call("relu", b.call("add", product, bias, origin=(name,)), origin=(f"{name}_relu",))


def partitioned(before: Module, *externals: External) -> list[ExternalCall]:
    """The external calls, after checking that the new module is valid, reads back, and means the same."""
    after = verify(Partition(externals)(before))
    arrays = {name: data for name, data in after.params.items() if data.size > 16}
    assert structural.equal(parser.parse(after.show(), arrays), after)
    x = rng.standard_normal((3, 8)).astype("float32")
    expected, got = interp.run(before, {"x": x}), interp.run(after, {"x": x})
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])
    return [value for value in after.functions["main"].values() if isinstance(value, ExternalCall)]


def refused(before: Module, *externals: External) -> str:
    """What is said of externals that match nothing."""
    with pytest.warns(CompileWarning) as caught:
        assert Partition(externals)(before) is before
    return "\n".join(str(each.message) for each in caught)


def test_a_layer_becomes_one_call() -> None:
    (call,) = partitioned(module(lambda b, x, w, c: {"y": layer(b, x, w, c)}), external(dense(), "my_dense"))
    assert [value.name for value in call.body.inputs] == ["x", "w", "b"]  # type: ignore[attr-defined]
    assert call.body.name == "my_dense" and call.origin == ("fc", "fc_relu")


def test_every_match_is_taken_and_what_is_around_it_stays() -> None:
    def build(b: Builder, x: Value, w: Value, c: Value) -> dict[str, Value]:
        hidden = b.call("tanh", layer(b, x, w, c, "first"))
        return {"y": layer(b, hidden, w, c, "second")}

    before = module(build)
    calls = partitioned(before, external(dense()))
    assert [call.origin[0] for call in calls] == ["first", "second"]
    after = Fuse()(Partition([external(dense())])(before))
    assert [type(value).__name__ for value in after.functions["main"].values()].count("ExternalCall") == 2
    assert [value.op for value in after.functions["main"].values() if isinstance(value, Call)] == ["tanh"]


def test_operands_of_a_sum_come_in_any_order() -> None:
    def build(b: Builder, x: Value, w: Value, c: Value) -> dict[str, Value]:
        return {"y": b.call("relu", b.call("add", c, b.call("matmul", x, w)))}

    (call,) = partitioned(module(build), external(dense()))
    assert call.inputs[2].name == "bias"  # type: ignore[attr-defined]


def test_the_largest_match_comes_first_whatever_the_order_of_externals() -> None:
    before = module(lambda b, x, w, c: {"y": layer(b, x, w, c)})
    small, large = external(p.op("matmul", p.wildcard(), p.wildcard()), "small"), external(dense(), "large")
    for pair in ((small, large), (large, small)):
        with pytest.warns(CompileWarning, match="small matches nothing: at fc other matches took a part of it"):
            assert [call.body.name for call in partitioned(before, *pair)] == ["large"]


def test_among_equals_the_first_external_is_taken() -> None:
    before = module(lambda b, x, w, c: {"y": layer(b, x, w, c)})
    with pytest.warns(CompileWarning, match="second"):
        (call,) = partitioned(before, external(dense(), "first"), external(dense(), "second"))
    assert call.body.name == "first"


def test_what_is_used_outside_is_not_hidden() -> None:
    def build(b: Builder, x: Value, w: Value, c: Value) -> dict[str, Value]:
        total = b.call("add", b.call("matmul", x, w, origin=("fc",)), c)
        return {"y": b.call("mul", b.call("relu", total), b.call("exp", total))}

    assert "at fc its add is used outside of it too" in refused(module(build), external(dense()))


def test_an_output_inside_is_not_hidden() -> None:
    def build(b: Builder, x: Value, w: Value, c: Value) -> dict[str, Value]:
        product = b.call("matmul", x, w)
        return {"y": b.call("relu", b.call("add", product, c)), "product": product}

    assert "its matmul is used outside of it too" in refused(module(build), external(dense()))


def test_a_leaf_is_never_something_that_the_subgraph_computes() -> None:
    twice = external(p.op("mul", p.op("exp", p.wildcard("a")), p.wildcard("b")))
    one = module(lambda b, x, w, c: {"y": (lambda e: b.call("mul", e, e))(b.call("exp", x))})
    assert "no subgraph has the form" in refused(one, twice)
    shared = p.op("exp", p.wildcard("a"))
    (call,) = partitioned(one, external(p.op("mul", shared, shared)))
    assert len(call.inputs) == 1


def test_one_pattern_stands_for_one_value() -> None:
    x = p.wildcard("x")
    square = external(p.op("mul", x, x))
    assert "no subgraph" in refused(module(lambda b, x, w, c: {"y": b.call("mul", x, c)}), square)
    (call,) = partitioned(module(lambda b, x, w, c: {"y": b.call("mul", x, x)}), square)
    assert [value.name for value in call.inputs] == ["x"]  # type: ignore[attr-defined]


def test_two_leaves_may_stand_for_one_value() -> None:
    (call,) = partitioned(
        module(lambda b, x, w, c: {"y": b.call("mul", x, x)}), external(p.op("mul", p.wildcard("a"), p.wildcard("b")))
    )
    assert [value.name for value in call.body.inputs] == ["a", "b"] and call.inputs[0] is call.inputs[1]


def test_optional_parts_and_alternatives() -> None:
    product = p.op("matmul", p.wildcard("x"), p.constant("w"))
    whole = external(product.optional(lambda y: p.op("add", y, p.wildcard("b"))).optional(lambda y: p.op("relu", y)))
    assert whole.inputs == ("x", "w", "b")
    lone = module(lambda b, x, w, c: {"y": b.call("relu", b.call("matmul", x, w))})
    assert [[i.name for i in call.body.inputs] for call in partitioned(lone, whole)] == [["x", "w"]]
    full = module(lambda b, x, w, c: {"y": layer(b, x, w, c)})
    assert [[i.name for i in call.body.inputs] for call in partitioned(full, whole)] == [["x", "w", "b"]]
    either = external(p.op("exp", p.wildcard("x")) | p.op(["tanh", "relu"], p.wildcard("x2")))
    assert len(partitioned(lone, either)) == 1


def test_predicates() -> None:
    before = module(lambda b, x, w, c: {"y": layer(b, x, w, c), "z": b.call("softmax", x, axis=-1)})
    for kept in ({"dtype": "float32"}, {"shape": (None, 8)}, {"where": lambda value: value.type.rank == 2}):
        assert len(partitioned(before, external(dense(**kept)))) == 1
    for lost in ({"dtype": "int8"}, {"shape": (8, 8)}, {"shape": (None,)}, {"where": lambda value: False}):
        assert "no subgraph" in refused(before, external(dense(**lost)))
    assert "supports(match) says no" in refused(before, external(dense(), supports=lambda m: m["x"].type.rank == 3))
    softmax = external(
        p.op("softmax", p.wildcard("x"), name="s", attrs={"axis": -1}), attributes=lambda m: m.attrs("s")
    )
    assert [dict(call.attrs) for call in partitioned(before, softmax)] == [{"axis": -1}]
    assert "no subgraph" in refused(before, external(p.op("softmax", p.wildcard("x"), attrs={"axis": 0})))


def test_constants_are_what_is_known() -> None:
    swapped = module(lambda b, x, w, c: {"y": b.call("matmul", b.call("relu", x), b.call("transpose", x, perm=(1, 0)))})
    assert "no subgraph" in refused(swapped, external(p.op("matmul", p.wildcard("x"), p.constant("w"))))
    bound = module(lambda b, x, w, c: {"y": b.call("matmul", x, w)})
    assert len(partitioned(bound, external(p.op("matmul", p.wildcard("x"), p.constant("w"))))) == 1


def test_literals_stay_inside() -> None:
    def build(b: Builder, x: Value, w: Value, c: Value) -> dict[str, Value]:
        return {"y": b.call("mul", x, b.constant(0.5, "float32"))}

    (call,) = partitioned(module(build), external(p.op("mul", p.wildcard("x"), p.literal(0.5))))
    assert len(call.inputs) == 1
    assert "no subgraph" in refused(module(build), external(p.op("mul", p.wildcard("x"), p.literal(0.25))))


def test_workspace_and_attributes_are_printed() -> None:
    options = {
        "workspace": lambda m: m["x"].type.shape[0] * 256 + 64,
        "attributes": lambda m: {"alpha": 0.5, "flags": [True, False], "scales": (1, 0.5)},
    }
    (call,) = partitioned(module(lambda b, x, w, c: {"y": layer(b, x, w, c)}), external(dense(), **options))
    assert dict(call.attrs) == {"alpha": 0.5, "flags": (1, 0), "scales": (1.0, 0.5)}
    after = Partition([external(dense(), **options)])(module(lambda b, x, w, c: {"y": layer(b, x, w, c)}))
    assert "{alpha: 0.5, flags: [1, 0], scales: [1.0, 0.5]} workspace(n * 256 + 64)" in after.show()


def test_the_reason_names_operators_that_are_not_there() -> None:
    before = module(lambda b, x, w, c: {"y": layer(b, x, w, c)})
    said = refused(before, external(p.op("gemm", p.wildcard(), p.wildcard(), p.wildcard())))
    assert said == "external f matches nothing: here the graph has no gemm"


def test_what_cannot_be_an_external() -> None:
    good = p.op("relu", p.wildcard("x"))
    cases = {
        "begins with kedge_": lambda: External("kedge_f", good, source="f.c"),
        "name a function in C": lambda: External("f g", good, source="f.c"),
        "give source= or library=": lambda: External("f", good),
        "2 results": lambda: External("f", (good, good), source="f.c"),  # type: ignore[arg-type]
        "no operator": lambda: External("f", p.wildcard("x"), source="f.c"),
        "two patterns are called 'x'": lambda: External(
            "f", p.op("add", p.wildcard("x"), p.wildcard("x")), source="f.c"
        ),
        "two externals are called f": lambda: Partition([external(good), external(good)])(module_of_relu()),
        "zero": lambda: Partition([external(good, supports=lambda m: 1 / 0)])(module_of_relu()),
        "attribute 'a' is 'text'": lambda: Partition([external(good, attributes=lambda m: {"a": "text"})])(
            module_of_relu()
        ),
        "attributes(match) gives None": lambda: Partition([external(good, attributes=lambda m: None)])(
            module_of_relu()
        ),
        "attribute 'a' is [1, 1180591620717411303424]": lambda: Partition(
            [external(good, attributes=lambda m: {"a": [1, 2**70]})]
        )(module_of_relu()),
        "attribute 'b' is -9223372036854775809": lambda: Partition(
            [external(good, attributes=lambda m: {"b": -(2**63) - 1})]
        )(module_of_relu()),
        "pattern 'y': where(value) fails at x: AttributeError": lambda: Partition(
            [external(p.op("relu", p.wildcard("y", where=lambda value: value.missing)))]  # type: ignore[attr-defined]
        )(module_of_relu()),
        "workspace is -1": lambda: Partition([external(good, workspace=-1)])(module_of_relu()),
    }
    for message, make in cases.items():
        with pytest.raises(CompileError) as caught:
            make()
        assert message in str(caught.value), message
    with pytest.raises(TypeError, match="patterns"):
        p.op("add", "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"kedge\.External"):
        Partition(["f"])(module_of_relu())  # type: ignore[list-item]


def test_types_are_those_of_numpy() -> None:
    for dtype in ("float32", np.float32, np.dtype("float32")):
        after = Partition([external(p.op("relu", p.wildcard("x", dtype=dtype)), workspace=np.int64(64))])(
            module_of_relu()
        )
        assert "external f(" in after.show() and "workspace(64)" in after.show()
    for dtype in ("flot32", np.complex64):
        with pytest.raises(TypeError, match="no element type of tensors; there are bfloat16, bool"):
            p.constant("w", dtype=dtype)


def module_of_relu() -> Module:
    return module(lambda b, x, w, c: {"y": b.call("relu", x)})


def test_the_verifier_looks_at_external_calls() -> None:
    after = Partition([external(p.op("relu", p.wildcard("x")))])(module_of_relu())
    text = after.show()
    for old, new, reason in (
        ("external f(", 'external "no name"(', "no name of a C function"),
        ("(x = %x) :", '(x = %x) {a: "b"} :', "is no number"),
        ("(x = %x) :", "(x = %x) {a: 9223372036854775808} :", "has more than 64 bits"),
        ("(x = %x) :", "(x = %x) workspace(0 - 5) :", "workspace is negative"),
    ):
        changed = text.replace(old, new)
        assert changed != text
        with pytest.raises(VerifyError, match=reason):
            verify(parser.parse(changed))


def gelu() -> p.Pattern:
    x = p.wildcard("x")
    inner = p.op("add", p.op("erf", p.op("mul", x, p.literal(0.70710678))), p.literal(1))
    return p.op("mul", p.op("mul", x, p.literal(0.5)), inner)


@pytest.mark.parametrize("bound", [False, True])
def test_a_gelu_as_exporters_write_it(bound: bool) -> None:
    """Scalars are constants in one model, bound parameters of one element in another."""
    b = Builder("main")
    x = b.input("x", TensorType((N, 8), "float32"))
    scalars = {"half": 0.5, "one": 1.0, "root": 0.70710678}
    params = {name: np.array([value], "float32") for name, value in scalars.items()}
    value = {
        name: b.param(name, TensorType((1,), "float32")) if bound else b.constant(data) for name, data in params.items()
    }
    inner = b.call("add", value["one"], b.call("erf", b.call("mul", value["root"], x)))
    made = Module({"main": b.finish({"y": b.call("mul", inner, b.call("mul", value["half"], x))})})
    (call,) = partitioned(made.bind(params) if bound else made, external(gelu()))
    assert [own.name for own in call.body.inputs] == ["x"]
    assert not [each for each in call.body.values() if type(each).__name__ == "Param"]


def test_generated_names_do_not_collide() -> None:
    with pytest.raises(CompileError, match="two patterns are called 'arg0'"):
        external(p.op("add", p.wildcard(), p.wildcard("arg0")))


def test_the_operators_of_the_front_end_are_there_earlier() -> None:
    def build(b: Builder, x: Value, w: Value, c: Value) -> dict[str, Value]:
        return {"y": b.call("relu", b.call("gemm", x, w, c, trans_b=True, origin=("fc",)))}

    gemm = external(p.op("gemm", p.wildcard("x"), p.constant("w"), p.wildcard("b"), attrs={"trans_b": True}))
    (call,) = partitioned(module(build), gemm)
    assert [each.op for each in call.body.values() if isinstance(each, Call)] == ["gemm"]
    pipeline = Pipeline(default_passes()).insert_before("legalize", Partition([gemm]))
    assert pipeline.externals == (gemm,)
    after = verify(pipeline.run(module(build)))
    assert [value.op for value in after.functions["main"].values() if isinstance(value, Call)] == ["relu"]
    short = Pipeline(default_passes()).without("pack-weights").without("layout").without("fuse").partition([gemm])
    assert short.names[-1] == "partition"
    with pytest.raises(TypeError, match=r"a list: \[f\]"):
        short.partition(gemm)  # type: ignore[arg-type]


OPERATORS = ("relu", "neg", "tanh", "add", "maximum", "softmax")
ANY = {
    "unary": p.op(["relu", "neg", "tanh"], p.wildcard("a")),
    "sum of any": p.op("add", p.wildcard("a"), p.wildcard("b")),
    "chain": p.op("tanh", p.op("relu", p.wildcard("a")).optional(lambda y: p.op("neg", y))),
    "joined": p.op("maximum", p.op(["relu", "neg"], p.wildcard("a")), p.op(["tanh", "relu"], p.wildcard("b"))),
    "three": p.op("add", p.op(["maximum", "add"], p.wildcard("a"), p.wildcard("b")), p.wildcard("c")),
}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_graphs_keep_their_meaning(data: st.DataObject) -> None:
    """Values are used again at random, so that many matches overlap, or hide what others need."""

    def build(b: Builder, x: Value, w: Value, c: Value) -> dict[str, Value]:
        values = [x]
        for _ in range(data.draw(st.integers(1, 12))):
            op = data.draw(st.sampled_from(OPERATORS))
            arity = 2 if op in ("add", "maximum") else 1
            chosen = [values[data.draw(st.integers(max(0, len(values) - 4), len(values) - 1))] for _ in range(arity)]
            values.append(b.call(op, *chosen, **({"axis": -1} if op == "softmax" else {})))
        return {f"y{index}": value for index, value in enumerate(values[-2:]) if value is not x} or {"y": values[-1]}

    names = data.draw(st.lists(st.sampled_from(sorted(ANY)), min_size=1, max_size=4, unique=True))
    externals = [external(ANY[name], f"f{index}") for index, name in enumerate(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)
        before = module(build)
        calls = partitioned(before, *externals)
        after = Partition(externals)(before)
    # Every operator is computed once: inside of a call or outside.
    inside = sum(count_of(call.body) for call in calls)
    assert inside + count_of(after.functions["main"]) == count_of(before.functions["main"])
    left = {value.op for value in after.functions["main"].values() if isinstance(value, Call)}
    assert "unary" not in names or not left & {
        "relu",
        "neg",
        "tanh",
    }  # nothing keeps a single operator from being taken


def count_of(function: Function) -> int:
    return sum(isinstance(value, Call) for value in function.values())
