"""Concatenations in place: which need no copy, and that programs with them give the same results."""

from __future__ import annotations

import numpy as np
import pytest

from kedge.compiler.graph import interp
from kedge.compiler.graph.ir import Call, Module, Value
from kedge.compiler.graph.passes import default_passes, for_target, run_passes
from kedge.compiler.graph.placement import concats_in_place
from kedge.compiler.lower.interp import run_program
from kedge.compiler.lower.lower import lower
from kedge.compiler.lower.program import Program
from support.graphs import X86, compare
from support.nets import N, Net, ops

rng = np.random.default_rng(11)


def offsets(module: Module) -> list[list[int]]:
    found = concats_in_place(module.functions["main"])
    return [[place.offset for place in places] for places in found.values()]


def branches(net: Net, batch=1, size: int = 4) -> tuple[Value, Value]:
    x = net.input("x", batch, 8, size, size)
    return net.relu(x), net.sigmoid(x)


def pooled(net: Net, x: Value) -> Value:
    return net.max_pool(x, kernel=[2, 2])


def compiled(module: Module) -> Program:
    after = run_passes(module, for_target(default_passes(), X86))
    program = lower(after, X86)
    shape = [dim if isinstance(dim, int) else 2 for dim in module.functions["main"].inputs[0].type.shape]
    inputs = {"x": rng.standard_normal(shape).astype(np.float32)}
    compare(run_program(program, inputs), interp.run(module, inputs), rtol=1e-4, atol=1e-5)
    return program


def kernels(program: Program) -> list[str]:
    return [step.kernel for step in program.entries[0].steps]


def test_parts_are_computed_where_they_belong() -> None:
    net = Net()
    a, b = branches(net)
    module = net.module(pooled(net, net.concat(a, b, axis=1)))
    assert offsets(module) == [[0, 8 * 16 * 4]]
    program = compiled(module)
    assert kernels(program) == ["relu", "sigmoid", "max_pool"]
    relu, sigmoid, pool = program.entries[0].steps
    assert sigmoid.args[-1].offset == relu.args[-1].offset + 8 * 16 * 4
    assert pool.args[0].offset == relu.args[-1].offset


def test_a_part_that_others_read_stays_until_the_last_of_them() -> None:
    net = Net()
    a, b = branches(net)
    y = pooled(net, net.concat(a, b, axis=1))
    z = pooled(net, pooled(net, y))
    module = net.module(
        net.add(net.reduce_sum(z, axes=[1], keepdims=True), net.slice(a, starts=(0, 0), ends=(2, 2), axes=(2, 3)))
    )
    assert offsets(module) == [[0, 512]]
    compiled(module)


def test_a_concatenation_of_concatenations() -> None:
    net = Net()
    a, b = branches(net)
    inner = net.concat(a, b, axis=1)
    outer = net.concat(net.tanh(pooled(net, net.pad(inner, pads=[0, 0, 0, 0, 0, 0, 1, 1]))), inner, axis=1)
    module = net.module(pooled(net, outer))
    assert len(offsets(module)) >= 1
    compiled(module)


@pytest.mark.parametrize("why", ["batch", "symbolic", "input", "twice", "output", "element-wise", "alignment", "part"])
def test_where_a_copy_is_needed(why: str) -> None:
    net = Net()
    a, b = branches(net, {"batch": 2, "symbolic": N}.get(why, 1), 3 if why == "alignment" else 4)
    if why == "input":
        b = next(iter(b.inputs)) if isinstance(b, Call) else b
    parts = [a, a] if why == "twice" else [a, b]
    joined = net.concat(*parts, axis=1)
    if why == "alignment":
        joined = net.concat(net.slice(a, starts=(0,), ends=(7,), axes=(1,)), b, axis=1)
    outputs = [net.relu(joined) if why == "element-wise" else pooled(net, joined)]
    outputs += {"output": [joined], "part": [a]}.get(why, [])
    module = net.module(*outputs)
    assert offsets(module) == []
    compiled(module)


def test_a_fused_producer_writes_its_part() -> None:
    net = Net()
    x = net.input("x", 1, 8, 4, 4)
    left = net.relu(net.conv(x, net.param("w", 8, 8, 1, 1)))
    joined = net.concat(left, net.sigmoid(net.conv(x, net.param("v", 16, 8, 1, 1))), axis=1)
    module = net.module(net.conv(joined, net.param("u", 8, 24, 3, 3)))
    program = compiled(module)
    assert not any("concat" in name for name in kernels(program))


def test_element_wise_users_read_the_parts_themselves() -> None:
    net = Net()
    a, b = branches(net)
    module = net.module(net.relu(net.neg(net.concat(a, b, axis=1))))
    after = run_passes(module, for_target(default_passes(), X86))
    assert any("concat" in name for name in ops(after))
