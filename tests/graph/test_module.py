"""Building, binding, verifying and interpreting modules."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from kedge.compiler.errors import CompileError, ShapeError, VerifyError
from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.dims import broadcast_shape, divide, evaluate, format_dim, plain, product
from kedge.compiler.graph.ir import Call, Function, Input, Item, Module, Param, TensorType
from kedge.compiler.graph.store import load_module
from kedge.compiler.graph.verify import verify
from kedge.compiler.tir.expr import Binary, Var, ceildiv, maximum, minimum, select
from kedge.rpc.errors import InputError
from support.graphs import digits_network

F32 = "float32"


def scaled(n: Var | int = 3) -> Module:
    b = Builder("main")
    x = b.input("x", TensorType((n, 2), F32))
    return Module({"main": b.finish({"y": b.call("mul", x, b.param("w", TensorType((2,), F32)))})})


def test_the_builder_refuses_names_that_clash():
    b = Builder("main")
    b.input("x", TensorType((2,), F32))
    with pytest.raises(CompileError, match="input 'x' is declared twice"):
        b.input("x", TensorType((2,), F32))
    with pytest.raises(CompileError, match="has the name of an input"):
        b.param("x", TensorType((2,), F32))
    w = b.param("w", TensorType((2,), F32))
    assert b.param("w", TensorType((2,), F32)) is w
    with pytest.raises(ShapeError, match=r"'w' is float32\[2\] and also float32\[3\]"):
        b.param("w", TensorType((3,), F32))
    with pytest.raises(CompileError, match="at least one output"):
        b.finish({})
    with pytest.raises(CompileError, match="unknown graph operator 'frobnicate'"):
        b.call("frobnicate", w)


def test_binding_checks_names_and_types():
    module = scaled()
    with pytest.raises(InputError, match=r"no parameter 'v'[\s\S]*the parameters are: w"):
        module.bind({"v": np.ones(2, np.float32)})
    with pytest.raises(InputError, match=r"'w' is float32\[2\], not float64\[2\]"):
        module.bind({"w": np.ones(2)})
    data = np.ones(2, np.float32)
    bound = module.bind({"w": data})
    assert not bound.params["w"].flags.writeable
    assert module.params == {}


def test_running_with_bound_and_with_given_parameters():
    x, w = np.ones((3, 2), np.float32), np.array([2, 3], np.float32)
    expected = np.tile(w, (3, 1))
    np.testing.assert_array_equal(interp.run(scaled().bind({"w": w}), {"x": x})["y"], expected)
    np.testing.assert_array_equal(interp.run(scaled(), {"x": x, "w": w})["y"], expected)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "missing x"),
        ({"x": np.ones((3, 2), np.float32), "z": 1}, "unknown z"),
        ({"x": np.ones((3, 2))}, r"'x' is float32\[n, 2\], not float64\[3, 2\]"),
        ({"x": np.ones((3, 4), np.float32)}, r"not float32\[3, 4\]"),
        ({"x": np.ones(2, np.float32)}, r"not float32\[2\]"),
        ({"x": np.ones((0, 2), np.float32)}, "dim n is 0; it must be at least 1"),
        ({"x": np.ones((9, 2), np.float32)}, "at most 8"),
    ],
)
def test_wrong_inputs_are_named(inputs, reason):
    module = scaled(Var("n", lower=1, upper=8)).bind({"w": np.ones(2, np.float32)})
    with pytest.raises(InputError, match=reason):
        interp.run(module, inputs)


def test_an_unknown_function_is_named():
    with pytest.raises(InputError, match=r"no function 'decode'[\s\S]*it has: main"):
        interp.run(scaled(), {}, "decode")


def test_digits_run_at_any_batch_size():
    module, params = digits_network()
    x = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    module = module.bind(params)
    whole = interp.run(module, {"image": x})["probabilities"]
    parts = [interp.run(module, {"image": x[i : i + 1]})["probabilities"] for i in range(5)]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5)
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-5)


def _function(call: Call, *inputs: Input) -> Module:
    return Module({"main": Function("main", inputs, (call,), ("y",))})


def test_the_verifier_refuses_broken_modules():
    x = Input("x", TensorType((2,), F32))
    relu = Call("relu", (x,), MappingProxyType({}), (TensorType((2,), F32),))
    good = _function(relu, x)
    assert verify(good) is good
    main = good.functions["main"]
    hidden = Var("m", lower=1)
    broken = [
        (_function(replace(relu, types=(TensorType((3,), F32),)), x), "has type float32.3. but gives float32.2."),
        (_function(relu), "'x' is used but no input"),
        (_function(relu, x, Input("x", x.type)), "two inputs have one name"),
        (_function(replace(relu, attrs={"axis": 1}), x), "relu has attributes"),
        (Module({"other": main}), "listed under the name 'other'"),
        (Module({"main": replace(main, output_names=())}), "differ in number"),
        (Module({"main": replace(main, outputs=(relu, relu), output_names=("y", "y"))}), "two outputs"),
        (Module({"main": replace(main, outputs=(Item(relu, 1),))}), "result 1 of 1"),
        (_function(Call("add", (x, Param("x", x.type)), MappingProxyType({}), (x.type,)), x), "a parameter and an"),
        (_function(Call("add", (x,), MappingProxyType({}), (x.type,)), x), "add"),
    ]
    for module, reason in broken:
        with pytest.raises((VerifyError, CompileError), match=reason):
            verify(module)
    free = Input("x", TensorType((product((2, hidden)),), F32))
    with pytest.raises(VerifyError, match="symbol m is not a whole dim"):
        verify(_function(Call("relu", (free,), MappingProxyType({}), (free.type,)), free))
    with pytest.raises(VerifyError, match="bound to"):
        verify(replace(scaled(), params={"w": np.ones(3, np.float32)}))


def test_arithmetic_on_dims():
    n, m = Var("n", lower=1), Var("m", lower=1)
    assert product((2, 3)) == 6
    assert product((n, 0)) == 0
    assert plain(n * 2 - n - n) == 0
    assert divide((n, 32, 4), (n, 16)) == 8
    assert divide((n, 5), (2,)) is None
    assert divide((4,), (n,)) is None
    assert broadcast_shape((n, 1), (1, m)) == (n, m)
    dim = maximum(ceildiv(n, 4) * 4 - m, 0) + select(n < m, n, m) % 3
    assert evaluate(dim, {n: 9, m: 5}) == 7 + 2
    assert evaluate(minimum(Binary("truncdiv", n, m), Binary("truncmod", n, m)), {n: 9, m: 5}) == 1
    assert format_dim((n + 1) * 2 // 3 - (m - 1)) == "(n + 1) * 2 // 3 - (m - 1)"


@pytest.mark.parametrize("size", [4, 4000], ids=["in the text", "beside it"])
def test_bfloat16_is_saved_and_loaded(size, tmp_path):
    data = np.linspace(-3, 3, size).astype("bfloat16")
    b = Builder("main")
    x = b.input("x", TensorType((size,), "bfloat16"))
    module = Module({"main": b.finish({"y": b.call("add", x, b.constant(data))})})
    module.save(tmp_path / "m.kmod")
    loaded = load_module(tmp_path / "m.kmod")
    for each in (module, loaded):
        (got,) = interp.run(each, {"x": data}).values()
        assert got.dtype == "bfloat16"
        np.testing.assert_array_equal(got.view(np.uint16), (data + data).view(np.uint16))


def test_a_dim_of_thousands_of_operations_is_evaluated():
    size = Var("n", lower=1)
    total = size + 0
    for step in range(5_000):
        total = total + step if step % 2 else total - size
    for dim in (total, plain(total)):
        assert evaluate(dim, {size: 3}) == 3 + sum(range(1, 5_000, 2)) - 2_500 * 3
