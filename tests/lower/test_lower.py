"""Lowered programs: what they call, where their arguments live, and that they compute what the graph says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler import te
from kedge.compiler.errors import CompileError, VerifyError
from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder, call
from kedge.compiler.graph.dims import format_dim, format_type
from kedge.compiler.graph.ir import Call, Input, Module, TensorType
from kedge.compiler.graph.passes import default_passes, run_passes
from kedge.compiler.graph.passes.fuse import make_group
from kedge.compiler.lower import lower as lower_module
from kedge.compiler.lower.interp import run_program
from kedge.compiler.lower.lower import draft, lower, lower_prim_func
from kedge.compiler.lower.lower_group import as_group, group_digest, group_key, lower_group
from kedge.compiler.lower.program import Draft, Entry, Lowered, Program, Recalled
from kedge.compiler.ops import registry
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Dim, Var
from kedge.compiler.tir.verify import verify as verify_func
from kedge.rpc.errors import InputError
from support.graphs import X86, compare, digits_network

F32 = "float32"
N = Var("n", lower=1)


def lowered(module: Module, target: Any = X86) -> Program:
    program = lower(run_passes(module, default_passes()), target)
    for kernel in program.kernels.values():
        verify_func(kernel.func)
    return program


def describe(program: Program) -> str:
    """A program without its kernels' bodies."""
    lines = []
    for entry in program.entries:
        lines.append(f"entry {entry.name}: arena {format_dim(entry.arena_size)} bytes")
        for step in entry.steps:
            args = ", ".join(
                f"arena+{format_dim(slot.offset)}" if slot.kind == "arena" else f"{slot.kind}{slot.index}"
                for slot in step.args
            )
            lines.append(f"  {step.kernel}({args}{''.join(f'; {s.name}' for s in step.symbols)})")  # type: ignore[attr-defined]
    lines += [f"weight {i}: {name}" for i, name in enumerate(program.weights)]
    return "\n".join(lines)


@pytest.mark.parametrize("target", ["llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v4", "raspberry-pi/4b"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_digits_network_lowers_to_what_the_graph_means(size, target):
    module, params = digits_network()
    module = module.bind(params)
    x = np.random.default_rng(size).standard_normal((size, 1, 8, 8)).astype(np.float32)
    got = run_program(lowered(module, parse(target)), {"image": x})
    compare(got, interp.run(module, {"image": x}), rtol=1e-4, atol=1e-5)


def test_golden_of_the_digits_program(golden):
    module, params = digits_network()
    golden("digits.txt", describe(lowered(module.bind(params))))
    golden("digits_unbound.txt", describe(lowered(module)))


def test_golden_of_a_kernel_before_scheduling(golden):
    module, params = digits_network()
    module = run_passes(module.bind(params), default_passes())
    group = next(v for v in module.functions["main"].values() if type(v).__name__ == "Fused")
    func = lower_group(as_group(group), "fused_conv_relu")  # type: ignore[arg-type]
    golden("fused_conv_relu.txt", func.show())
    assert func.attrs["origin"] == ("conv1", "bn1", "relu1")
    assert func.attrs["ops"] == ("conv", "relu")
    assert func.attrs["kind"] == "contraction"


def test_parameters_without_data_follow_the_inputs():
    module, params = digits_network()
    program = lowered(module.bind({"fc.bias": params["fc.bias"]}))
    names = [port.name for port in program.entries[0].inputs]
    assert names[0] == "image"
    assert sorted(names[1:]) == sorted(set(params) - {"fc.bias"})
    assert list(program.weights) == ["fc.bias"]
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    given = {"image": x, **{name: params[name] for name in names[1:]}}
    compare(run_program(program, given), interp.run(module.bind(params), {"image": x}), rtol=1e-4, atol=1e-5)


def test_equal_kernels_are_compiled_once():
    b = Builder("main")
    x = b.input("x", TensorType((N, 8), F32))
    for layer in range(3):
        weight = b.param(f"w{layer}", TensorType((8, 8), F32))
        x = b.call("relu", b.call("matmul", x, weight), origin=(f"relu{layer}",))
    program = lowered(Module({"main": b.finish({"y": x})}))
    assert list(program.kernels) == ["fused_matmul_relu"]
    assert len(program.entries[0].steps) == 3
    assert program.kernels["fused_matmul_relu"].origin == ("relu0", "relu1", "relu2")


def test_functions_share_kernels_and_weights():
    functions = {}
    for name in ("prefill", "decode"):
        b = Builder(name)
        x = b.input("x", TensorType((Var("n", lower=1), 4), F32))
        functions[name] = b.finish({"y": b.call("matmul", x, b.param("w", TensorType((4, 4), F32)))})
    w = np.arange(16, dtype=np.float32).reshape(4, 4)
    program = lowered(Module(functions).bind({"w": w}))
    assert list(program.kernels) == ["matmul"]
    assert list(program.weights) == ["w"]
    for name in functions:
        x = np.ones((2, 4), np.float32)
        np.testing.assert_allclose(run_program(program, {"x": x}, name)["y"], x @ w)


def outputs_module(build) -> Module:
    b = Builder("main")
    x = b.input("x", TensorType((N, 2, 3), F32))
    return Module({"main": b.finish(build(b, x))})


def check(module: Module, size: int = 2) -> Entry:
    program = lowered(module)
    x = np.random.default_rng(0).standard_normal((size, 2, 3)).astype(np.float32)
    compare(run_program(program, {"x": x}), interp.run(module, {"x": x}), rtol=1e-5, atol=1e-6)
    return program.entries[0]


def test_results_go_straight_into_the_callers_buffers():
    entry = check(outputs_module(lambda b, x: {"y": b.call("flatten", b.call("exp", x))}))
    (step,) = entry.steps
    assert [slot.kind for slot in step.args] == ["input", "output"]
    assert entry.arena_size == 0


def test_an_output_that_others_read_needs_no_copy():
    def build(b, x):
        first = b.call("exp", x)
        return {"a": first, "b": b.call("reduce_sum", b.call("reshape", first, shape=(N, 6)), axes=(1,))}

    entry = check(outputs_module(build))
    assert [[slot.kind for slot in step.args] for step in entry.steps] == [["input", "output"], ["output", "output"]]


@pytest.mark.parametrize(
    "build",
    [
        lambda b, x: {"y": x},
        lambda b, x: {"y": b.call("reshape", x, shape=(N, 6))},
        lambda b, x: {"y": b.constant(np.arange(20, dtype=np.float32))},
        lambda b, x: {"y": b.constant(2.0, F32)},
        lambda b, x: dict.fromkeys(("a", "b"), b.call("exp", x)),
        lambda b, x: {"a": (y := b.call("exp", x)), "b": b.call("flatten", y), "c": b.call("reshape", y, shape=(-1,))},
    ],
)
def test_outputs_that_need_copies(build):
    entry = check(outputs_module(build))
    written = sorted(slot.index for step in entry.steps for slot in step.args[-1:] if slot.kind == "output")
    assert written == list(range(len(entry.outputs)))


def test_larger_constants_become_weights_and_equal_ones_are_one():
    def build(b, x):
        data = np.arange(3, dtype=np.float32)
        return {"a": b.call("add", x, b.constant(data)), "b": b.call("exp", b.call("mul", x, b.constant(data.copy())))}

    module = outputs_module(build)
    program = lowered(module)
    assert list(program.weights) == ["constant_0"]
    check(module)


def test_what_is_not_legal_is_refused():
    b = Builder("main")
    x = b.input("x", TensorType((2, 3), F32))
    module = Module({"main": b.finish({"y": b.call("gemm", x, b.param("w", TensorType((3, 4), F32)), origin=("fc",))})})
    with pytest.raises(CompileError, match=r"gemm \(node fc\) has no lowering"):
        lower(module, X86)


def test_a_function_of_loops_becomes_a_program():
    x = te.placeholder((N, 4), F32, "x")
    y = te.compute((N, 4), lambda i, j: x[i, j] * 2.0, name="y")
    program = lower_prim_func(te.create_prim_func([x, y], "double"), X86)
    (entry,) = program.entries
    assert ([p.name for p in entry.inputs], [p.name for p in entry.outputs]) == (["x"], ["y"])
    data = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(run_program(program, {"x": data}, "double")["y"], data * 2)
    hidden = te.placeholder((N * 2,), F32, "x")
    with pytest.raises(CompileError, match="n is not a whole dim"):
        lower_prim_func(te.create_prim_func([hidden, te.compute((N,), lambda i: hidden[i], name="y")], "f"), X86)


def test_what_the_abi_cannot_call_is_refused():
    m = Var("n", lower=1)
    wide, pair = te.placeholder((1,) * 8 + (3,), F32, "wide"), te.placeholder((N, m), F32, "pair")
    for x, message in (
        (wide, "f: wide has 9 dims; what is called takes at most 8"),
        (pair, "f: two symbolic dims are called n"),
    ):
        y = te.compute(x.shape, lambda *i, x=x: x[i] * 2.0, name="y")
        with pytest.raises(CompileError, match=message):
            lower_prim_func(te.create_prim_func([x, y], "f"), X86)
    b = Builder("main")
    x = b.input("x", TensorType((1,) * 9, F32))
    module = Module({"main": b.finish({"y": b.call("relu", x)})})
    with pytest.raises(CompileError, match="main: x has 9 dims"):
        lower(run_passes(module, default_passes()), X86)


def test_the_interpreter_refuses_wrong_inputs_and_wrong_plans():
    module = outputs_module(
        lambda b, x: {"y": b.call("softmax", b.call("matmul", x, b.constant(np.eye(3, dtype=F32))))}
    )
    program = lowered(module)
    with pytest.raises(InputError, match="missing x"):
        run_program(program, {})
    with pytest.raises(InputError, match=r"no entry 'f'[\s\S]*there is: main"):
        run_program(program, {}, "f")
    from dataclasses import replace

    entry = replace(program.entries[0], arena_size=16)
    with pytest.raises(VerifyError, match="do not lie in an arena of 16"):
        run_program(replace(program, entries=(entry,)), {"x": np.ones((2, 2, 3), np.float32)})


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_random_networks_lower_to_what_they_mean(data):
    """Residuals, reshapes, several outputs, a free batch: the arena is reused while results stay right."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    b = Builder("main")
    values = [b.input("x", TensorType((N, 4, 4), F32))]
    params: dict[str, np.ndarray] = {}
    for index in range(data.draw(st.integers(1, 8))):
        a, other = data.draw(st.sampled_from(values)), data.draw(st.sampled_from(values))
        choice = data.draw(st.integers(0, 5))
        if choice == 0:
            params[f"w{index}"] = rng.standard_normal((4, 4)).astype(F32) / 4
            values.append(b.call("matmul", a, b.param(f"w{index}", TensorType((4, 4), F32))))
        elif choice == 1:
            values.append(b.call("tanh", b.call("add", a, other)))
        elif choice == 2:
            values.append(b.call("softmax", b.call("transpose", a, perm=(0, 2, 1))))
        elif choice == 3:
            flat = b.call("reshape", a, shape=(N, 16))
            values.append(
                b.call(
                    "reshape",
                    b.call("sub", flat, b.call("reduce_max", flat, axes=(1,), keepdims=True)),
                    shape=(N, 4, 4),
                )
            )
        elif choice == 4:
            params[f"w{index}"] = rng.standard_normal((4, 4, 3)).astype(F32) / 4
            values.append(b.call("conv", a, b.param(f"w{index}", TensorType((4, 4, 3), F32)), pads=(1, 1)))
        else:
            values.append(
                b.call(
                    "concat",
                    b.call("slice", a, starts=[2], ends=[4], axes=[1]),
                    b.call("slice", other, starts=[0], ends=[2], axes=[1]),
                    axis=1,
                )
            )
    outputs = [values[-1], *data.draw(st.lists(st.sampled_from(values), max_size=2))]
    module = Module({"main": b.finish({f"y{i}": value for i, value in enumerate(outputs)})})
    used = {port for port in params if any(getattr(v, "name", None) == port for v in module.functions["main"].values())}
    module = module.bind({name: params[name] for name in used})
    program = lowered(module)
    x = rng.standard_normal((data.draw(st.integers(1, 3)), 4, 4)).astype(F32)
    compare(run_program(program, {"x": x}), interp.run(module, {"x": x}), rtol=1e-4, atol=1e-5)


def test_entries_say_how_large_free_dims_must_be():
    """Windows of 5 and then of 3 take 7 elements or more; smaller inputs are refused by name."""
    builder, h = Builder("main"), Var("h", lower=1)
    x = builder.input("x", TensorType((N, 2, h, 8), F32))
    wide = call("max_pool", x, kernel=(5, 1))
    last = call("max_pool", wide, kernel=(3, 1), strides=(2, 1))
    one = builder.finish({"y": call("reduce_max", last, axes=(2, 3))})
    program = lowered(Module({"main": one}))
    (entry,) = program.entries
    assert [(symbol.name, symbol.lower) for symbol in entry.symbols] == [("n", 1), ("h", 7)]
    assert entry.symbols[1] is entry.inputs[0].type.shape[2]
    small, enough = np.ones((1, 2, 6, 8), F32), np.ones((1, 2, 7, 8), F32)
    with pytest.raises(InputError, match="dim h is 6; it must be at least 7"):
        run_program(program, {"x": small})
    assert run_program(program, {"x": enough})["y"].tolist() == [[1.0, 1.0]]


def test_a_slice_that_may_be_empty_asks_for_nothing():
    builder = Builder("main")
    x = builder.input("x", TensorType((N, 3), F32))
    one = builder.finish({"y": call("relu", call("slice", x, starts=(2,), ends=(9,), axes=(0,)))})
    program = lowered(Module({"main": one}))
    assert [symbol.lower for symbol in program.entries[0].symbols] == [1]
    assert run_program(program, {"x": np.ones((1, 3), F32)})["y"].shape == (0, 3)


def test_groups_that_differ_in_one_number_are_lowered_apart() -> None:
    x = Input("x", TensorType((4,), "float32"))
    calls = [Call("leaky_relu", (x,), {"alpha": alpha}, (x.type,)) for alpha in (0.0, -0.0, 0.5, 0.5)]
    keys = [group_key(make_group([one])) for one in calls]
    assert keys[2] == keys[3] and len(set(keys)) == 3
    free = Input("x", TensorType((N,), "float32"))
    assert group_key(make_group([Call("relu", (free,), {}, (free.type,))])) is None


class Memory:
    """What groups were lowered to, in a dict."""

    def __init__(self) -> None:
        self.known: dict[str, Lowered] = {}

    def recall(self, group: str) -> Lowered | None:
        return self.known.get(group)

    def remember(self, group: str, lowered: Lowered) -> None:
        self.known[group] = lowered


def free_sizes() -> Module:
    """Convolutions, resizing and reshapes over free dims, in two functions of variables of their own."""
    functions = {}
    for name in ("first", "second"):
        b = Builder(name)
        n, h = Var("n", lower=1), Var("h", lower=3)
        x = b.input("x", TensorType((n, 16, h, h), F32))
        y = b.call("relu", b.call("conv", x, b.param("w", TensorType((16, 16, 3, 3), F32)), pads=(1, 1, 1, 1)))
        y = b.call("resize", y, sizes=(n, 16, h * 2, h * 2))
        functions[name] = b.finish({"y": b.call("softmax", b.call("reshape", y, shape=(n, 16 * h * 2 * h * 2)))})
    w = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    return Module(functions).bind({"w": w})


@pytest.mark.parametrize("make", [lambda: digits_network()[0].bind(digits_network()[1]), free_sizes])
def test_what_was_lowered_before_is_recalled(make, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    passes = [step.for_target(X86) if hasattr(step, "for_target") else step for step in default_passes()]
    first = draft(run_passes(make(), passes), memory=memory)
    assert memory.known and all(isinstance(kernel, Draft) for kernel in first.kernels.values())
    with monkeypatch.context() as patched:
        patched.setattr(lower_module, "lower_group", lambda *_: pytest.fail("lowered again"))
        again = draft(run_passes(make(), passes), memory=memory)
    assert describe(again) == describe(first)
    ports = [(port.name, format_type(port.type)) for program in (first, again) for port in program.entries[0].outputs]
    assert ports[: len(ports) // 2] == ports[len(ports) // 2 :]
    for name, kernel in again.kernels.items():
        whole = first.kernels[name]
        assert isinstance(kernel, Recalled) and isinstance(whole, Draft)
        assert (kernel.digest, kernel.origin) == (whole.digest, whole.origin)
        assert kernel.draft.form == whole.form and kernel.func.name == name
    types = [[format_type(slot.type) for step in p.entries[0].steps for slot in step.args] for p in (first, again)]
    assert types[0] == types[1]


def test_a_group_of_an_operator_that_is_not_the_compiler_s_is_not_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Input("x", TensorType((N, 4), F32))
    group = make_group([Call("relu", (x,), {}, (x.type,))])
    found = group_digest(group)
    assert found is not None and found[1] == (N,)
    own = registry.get("relu")
    monkeypatch.setitem(registry._OPS, "relu", replace(own, lower=registry.get("tanh").lower))
    assert group_digest(group) is None
    with te.register_onnx("my.domain", "Twice", lambda ts: te.compute(ts[0].shape, lambda *i: ts[0][i] * 2)) as twice:
        mine = Call(twice.graph_op(registry.FusionKind.ELEMENTWISE), (x,), {"result": 0}, (x.type,))
        assert group_digest(make_group([mine])) is None


def test_groups_are_told_apart_in_every_process_by_what_lowering_sees() -> None:
    def digest(dim: Dim, attrs: dict[str, Any] | None = None, op: str = "clip", dtype: str = F32) -> str:
        x = Input("x", TensorType((dim, 4), dtype))
        found = group_digest(make_group([Call(op, (x,), attrs or {"min": 0.0, "max": None}, (x.type,))]))
        assert found is not None
        return found[0]

    assert digest(N) == digest(Var("other", lower=1))
    assert digest(3) == "1be4b0a463e6678e1e9985ca453733f309ca0045ff1bf8716f5447f6aaa835ce"
    different = [
        digest(N), digest(3), digest(N * 2), digest(Var("n", lower=2)), digest(Var("n", lower=1, upper=9)), digest(4),
        digest(N, {"min": -0.0, "max": None}), digest(N, {"min": 0, "max": None}), digest(N, dtype="float64"),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
