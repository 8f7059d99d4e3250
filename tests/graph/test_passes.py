"""Each pass on the patterns it is for, and on what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import Call, Fused, Module, Param, TensorType, Value
from kedge.compiler.graph.passes import (
    CommonSubexpressions,
    FoldBatchNorm,
    FoldConstants,
    Fuse,
    Legalize,
    Simplify,
    default_passes,
    run_passes,
)
from support.graphs import compare, digits_network
from support.nets import F32, N, Net, ops, same_meaning
from support.pieces import counted_pieces

rng = np.random.default_rng(3)


def check(step, module: Module, expected: list[str]) -> Module:
    after = step(module)
    assert ops(after) == expected
    same_meaning(module, after)
    assert step(after) is after
    return after


@pytest.mark.parametrize("step", [*default_passes()], ids=lambda step: step.name)
def test_a_pass_with_nothing_to_do_returns_the_same_object(step):
    net = Net()
    module = net.module(net.softmax(net.input("x", N, 4)))
    assert step(module) is module


# -- folding --


def test_known_values_are_computed_and_named_after_their_parameter():
    net = Net()
    weight = net.transpose(net.param("fc.weight", 5, 4))
    after = check(FoldConstants(), net.module(net.matmul(net.input("x", N, 4), weight)), ["matmul"])
    assert list(after.params) == ["fc.weight.folded"]
    assert after.params["fc.weight.folded"].shape == (4, 5)


def test_chains_keep_one_suffix_and_names_stay_unique():
    net = Net()
    w = net.param("w", 4)
    a, b = net.exp(net.neg(w)), net.sqrt(w)
    after = check(FoldConstants(), net.module(net.add(net.add(net.input("x", N, 4), a), b)), ["add", "add"])
    assert list(after.params) == ["w.folded1", "w.folded2"]


def test_functions_share_what_is_folded():
    functions = {}
    for name in ("prefill", "decode"):
        b = Builder(name)
        x = b.input("x", TensorType((N, 4), F32))
        w = b.call("transpose", b.param("w", TensorType((5, 4), F32)))
        functions[name] = b.finish({"y": b.call("matmul", x, w)})
    after = FoldConstants()(Module(functions).bind({"w": np.ones((5, 4), F32)}))
    assert list(after.params) == ["w.folded"]


def test_transposed_weights_are_views_until_they_are_stored():
    b = Builder("main")
    w = b.call("transpose", b.param("w", TensorType((32, 8), F32)))
    panels = b.call("transpose", b.call("reshape", w, shape=(8, 2, 16)), perm=(1, 0, 2))
    data = np.arange(256, dtype=F32).reshape(32, 8)
    module = Module({"main": b.finish({"y": b.call("add", panels, b.input("x", TensorType((1,), F32)))})})
    (folded,) = FoldConstants()(module.bind({"w": data})).params.values()
    assert np.shares_memory(folded, data) and not folded.flags.writeable
    np.testing.assert_array_equal(folded, data.T.reshape(8, 2, 16).transpose(1, 0, 2))


def test_what_grows_too_much_or_is_not_bound_is_left():
    net = Net()
    zeros = net.broadcast_to(net.b.constant(0.0, F32), shape=(1024, 1024))
    module = net.module(net.add(net.input("x", 1024, 1024), zeros))
    assert FoldConstants()(module) is module
    assert ops(FoldConstants(growth=1 << 23)(module)) == ["add"]
    huge = Net()  # refused before it is computed
    zeros = huge.broadcast_to(huge.b.constant(0.0, F32), shape=(1 << 40,))
    module = huge.module(huge.add(huge.input("x", 1 << 40), zeros))
    assert FoldConstants()(module) is module
    b = Builder("main")
    unbound = Module({"main": b.finish({"y": b.call("neg", b.param("w", TensorType((4,), F32)))})})
    assert FoldConstants()(unbound) is unbound


# -- batch norm --


def norm(net: Net, x: Value, channels: int, name: str = "bn") -> Value:
    return net.batch_norm(x, *[net.param(f"{name}.{part}", channels) for part in ("scale", "bias", "mean", "var")])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_goes_into_a_convolution(bias, groups):
    net = Net()
    weight = net.param("conv.weight", 6, 4 // groups, 3, 3)
    inputs = [net.input("x", N, 4, 5, 5), weight, *([net.param("conv.bias", 6)] if bias else [])]
    after = check(FoldBatchNorm(), net.module(norm(net, net.conv(*inputs, groups=groups), 6)), ["conv"])
    assert list(after.params) == ["conv.weight.folded", "conv.bias.folded" if bias else "bn.bias.folded"]


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("addend", [None, (5,), (1, 5), (1,)])
def test_batch_norm_goes_into_gemm(trans_b, addend):
    net = Net()
    inputs = [net.input("x", N, 4), net.param("w", *((5, 4) if trans_b else (4, 5)))]
    inputs += [] if addend is None else [net.param("c", *addend)]
    gemm = net.gemm(*inputs, trans_b=trans_b, alpha=0.5, beta=2.0)
    check(FoldBatchNorm(), net.module(norm(net, gemm, 5)), ["gemm"])


def test_batch_norm_goes_into_matmul_and_through_its_bias():
    net = Net()
    product = net.matmul(net.input("x", N, 4), net.param("w", 4, 5))
    check(FoldBatchNorm(), net.module(norm(net, net.add(net.param("b", 5), product), 5)), ["matmul", "add"])
    net = Net()
    product = net.matmul(net.input("x", N, 4), net.param("w", 4, 5))
    check(FoldBatchNorm(), net.module(norm(net, product, 5)), ["matmul", "add"])


@pytest.mark.parametrize("kind", ["conv", "groups", "matmul"])
def test_weights_are_scaled_in_pieces(kind, monkeypatch):
    net = Net()
    if kind == "matmul":
        value, width = net.matmul(net.input("x", N, 7), net.param("w", 7, 6)), 6
    else:
        groups = 2 if kind == "groups" else 1
        value, width = net.conv(net.input("x", N, 4, 5, 5), net.param("w", 6, 4 // groups, 3, 3), groups=groups), 6
    module = net.module(norm(net, value, width))
    whole = FoldBatchNorm()(module).params["w.folded"]
    monkeypatch.setattr("kedge.rpc.cores.usable_threads", lambda: 3)
    monkeypatch.setattr("kedge.compiler.pages.PIECE_BYTES", 50)
    pieces = counted_pieces(monkeypatch)
    np.testing.assert_array_equal(FoldBatchNorm()(module).params["w.folded"], whole)
    assert len(pieces) == 1 and pieces[0] > 1
    same_meaning(module, FoldBatchNorm()(module))


def test_batch_norm_of_a_value_with_other_users_stays():
    net = Net()
    conv = net.conv(net.input("x", N, 4, 5, 5), net.param("w", 6, 4, 3, 3))
    module = net.module(norm(net, conv, 6), conv)
    assert FoldBatchNorm()(module) is module


def test_two_norms_share_one_weight():
    net = Net()
    x, w = net.input("x", N, 4, 5, 5), net.param("w", 6, 4, 3, 3)
    module = net.module(norm(net, net.conv(x, w), 6, "bn1"), norm(net, net.conv(x, w, pads=[1] * 4), 6, "bn2"))
    after = check(FoldBatchNorm(), module, ["conv", "conv"])
    assert {"w.folded", "w.folded1"} < set(after.params)


def test_functions_share_folded_weights():
    functions, names = {}, ("scale", "bias", "mean", "var")
    for name in ("prefill", "decode"):
        b = Builder(name)
        x = b.input("x", TensorType((N, 4), F32))
        y = b.call("gemm", x, b.param("w", TensorType((4, 4), F32)))
        parts = [b.param(part, TensorType((4,), F32)) for part in names]
        functions[name] = b.finish({"y": b.call("batch_norm", y, *parts)})
    data = {name: np.ones(4, F32) for name in names}
    after = FoldBatchNorm()(Module(functions).bind({"w": np.eye(4, dtype=F32), **data}))
    assert sorted(after.params) == ["bias.folded", "w.folded"]


# -- legalize --


def test_legalize_covers_every_operator_without_lowering():
    from kedge.compiler.ops import registry

    without = {name for name in registry.names() if registry.get(name).lower is None}
    assert without == {"batch_norm", "flatten", "gemm", "split", "squeeze", "unsqueeze"}


def test_legalize():
    net = Net()
    x = net.input("x", N, 4, 2, 1)
    y = net.unsqueeze(net.flatten(net.squeeze(norm(net, x, 4), axes=[3])), axes=[0])
    a, b = net.split(y, axis=2, sizes=(3, 5))
    after = check(
        Legalize(), net.module(a, b),
        ["add", "rsqrt", "mul", "reshape", "mul", "mul", "sub", "reshape", "add", *["reshape"] * 3, "slice", "slice"],
    )  # fmt: skip
    assert all(value.origin == () for value in after.functions["main"].values() if isinstance(value, Call))


# -- simplify --


def test_neutral_elements_and_identities_go():
    net = Net()
    x = net.input("x", N, 4)
    one, zero = net.b.constant(1.0, F32), net.b.constant(np.zeros(4, F32))
    y = net.div(net.mul(one, net.sub(net.add(net.identity(x), zero), zero)), one)
    y = net.pow(net.cast(net.relu(net.relu(y)), dtype=F32), net.b.constant(2.0, F32))
    check(Simplify(), net.module(y), ["relu", "mul"])


def test_small_powers_are_products_and_roots():
    net = Net()
    x = net.input("x", N, 4)
    cube, root = (net.pow(x, net.b.constant(power, F32)) for power in (3.0, 0.5))
    check(Simplify(), net.module(cube, root), ["mul", "mul", "equal", "sqrt", "abs", "where"])
    half = net.cast(x, dtype="float16")
    check(Simplify(), net.module(net.pow(half, net.b.constant(3.0, "float16"))), ["cast", "pow"])


@pytest.mark.parametrize("dtype", [F32, "float64"])
def test_a_power_of_a_half_has_the_special_values_of_powers(dtype: str) -> None:
    net = Net()
    root = net.pow(net.b.input("x", TensorType((8,), dtype)), net.b.constant(0.5, dtype))
    x = np.array([-np.inf, -0.0, 0.0, np.inf, np.nan, -1.0, 4.0, 2.0], dtype)
    (got,) = interp.run(Simplify()(net.module(root)), {"x": x}).values()
    np.testing.assert_array_equal(got, [np.inf, 0, 0, np.inf, np.nan, np.nan, 2, np.sqrt(x.dtype.type(2))])
    assert not np.signbit(got[[0, 1, 2]]).any()


def test_a_neutral_element_that_broadcasts_stays():
    net = Net()
    module = net.module(net.add(net.input("x", 1, 4), net.b.constant(np.zeros((3, 4), F32))))
    assert Simplify()(module) is module


def test_moves_combine():
    net = Net()
    x = net.input("x", N, 2, 3, 1)
    y = net.transpose(net.transpose(x, perm=(0, 2, 1, 3)), perm=(0, 2, 1, 3))
    y = net.reshape(net.reshape(y, shape=(N, 6)), shape=(N, 3, 2))
    y = net.slice(y, starts=[0], ends=[2**31 - 1], axes=[1])
    y = net.concat(net.pad(net.broadcast_to(y, shape=(N, 3, 2)), pads=(0,) * 6), axis=0)
    check(Simplify(), net.module(y), ["reshape"])
    net = Net()
    y = net.transpose(net.input("x", N, 2, 3, 1), perm=(0, 3, 1, 2))  # moves only a dim of one
    check(Simplify(), net.module(net.relu(y)), ["reshape", "relu"])
    net = Net()
    y = net.transpose(net.transpose(net.input("x", 2, 3, 4), perm=(1, 2, 0)), perm=(1, 2, 0))
    check(Simplify(), net.module(y), ["transpose"])


@pytest.mark.parametrize(
    ("shape", "first", "between", "second", "left"),
    [
        # Out of blocks, channels last: (n, C/c, h, w, c) -> (n, h, w, C); and back.
        ((N, 3, 5, 6, 4), (0, 1, 4, 2, 3), (N, 12, 5, 6), (0, 2, 3, 1), ["transpose", "reshape"]),
        ((N, 5, 6, 12), (0, 3, 1, 2), (N, 3, 4, 5, 6), (0, 1, 3, 4, 2), ["reshape", "transpose"]),
        # From blocks of 6 to such of 4 and 3: all share factors.
        ((1, 2, 5, 6), (0, 1, 3, 2), (1, 4, 3, 5), (0, 1, 3, 2), ["reshape", "transpose", "reshape"]),
        # Into and out of one order.
        ((2, 5, 12), (0, 2, 1), (2, 3, 4, 5), (0, 3, 1, 2), ["reshape"]),
        # 6 and 4 have no common factors in order.
        ((5, 6, 4), (1, 2, 0), (4, 6, 5), (2, 0, 1), ["transpose", "reshape", "transpose"]),
    ],
)
def test_transposes_around_a_reshape_are_one(shape, first, between, second, left) -> None:
    net = Net()
    y = net.reshape(net.transpose(net.input("x", *shape), perm=first), shape=between)
    check(Simplify(), net.module(net.transpose(y, perm=second)), left)


def test_padding_goes_into_a_convolution():
    net = Net()
    padded = net.pad(net.input("x", N, 2, 5, 5), pads=(0, 0, 1, 2, 0, 0, 0, 1))
    y = net.conv(padded, net.param("w", 3, 2, 3, 3), pads=(1, 0, 0, 1))
    after = check(Simplify(), net.module(y), ["conv"])
    assert after.functions["main"].outputs[0].attrs["pads"] == (2, 2, 0, 2)  # type: ignore[attr-defined]


def test_padding_of_other_kinds_stays():
    for attrs in ({"pads": (0, 1, 0, 0, 0, 1, 0, 0)}, {"pads": (0, 0, 1, 1, 0, 0, 1, 1), "value": 1.0}):
        net = Net()
        x = net.pad(net.input("x", N, 2, 5, 5), **attrs)
        module = net.module(net.conv(x, net.param("w", 3, x.type.shape[1], 3, 3)))
        assert Simplify()(module) is module


def test_explicit_broadcasts_go_where_the_operator_does_it():
    net = Net()
    x = net.input("x", N, 4)
    check(Simplify(), net.module(net.add(x, net.broadcast_to(net.input("r", 1, 4), shape=(N, 4)))), ["add"])


def test_casts_that_lose_nothing_combine():
    net = Net()
    wide = net.cast(net.cast(net.input("x", N), dtype="float64"), dtype="float16")
    check(Simplify(), net.module(wide), ["cast"])
    net = Net()
    module = net.module(net.cast(net.cast(net.input("x", N), dtype="int32"), dtype=F32))
    assert Simplify()(module) is module


# -- common subexpressions --


def test_equal_calls_are_merged():
    net = Net()
    x = net.input("x", N, 4)
    a, b = (net.add(net.exp(x), net.b.constant(1.0, F32)) for _ in range(2))
    check(CommonSubexpressions(), net.module(net.mul(a, b), net.exp(x)), ["exp", "add", "mul"])


# -- fuse --


def test_epilogues_join_contractions():
    net = Net()
    conv = net.conv(net.input("x", N, 4, 5, 5), net.param("w", 6, 4, 3, 3))
    y = net.relu(net.add(net.mul(conv, net.param("s", 6, 1, 1)), net.param("b", 6, 1, 1)))
    after = check(Fuse(), net.module(y), ["[conv mul add relu]"])
    (group,) = [v for v in after.functions["main"].values() if isinstance(v, Fused)]
    assert group.body.name == "conv_mul_add_relu"


def test_two_contractions_never_share_a_group():
    net = Net()
    x = net.input("x", N, 4)
    y = net.relu(net.add(net.matmul(x, net.param("a", 4, 4)), net.matmul(x, net.param("b", 4, 4))))
    check(Fuse(), net.module(y), ["matmul", "[matmul add relu]"])


def test_a_residual_connection():
    net = Net()
    x = net.relu(net.input("x", N, 4, 5, 5))
    y = net.relu(net.add(net.conv(x, net.param("w", 4, 4, 3, 3), pads=[1] * 4), x))
    check(Fuse(), net.module(y), ["relu", "[conv add relu]"])


def test_a_diamond_is_one_group():
    net = Net()
    x = net.input("x", N, 4)
    check(Fuse(), net.module(net.mul(x, net.sigmoid(net.neg(x)))), ["[neg sigmoid mul]"])


def test_outputs_are_written_out():
    net = Net()
    a = net.exp(net.input("x", N, 4))
    check(Fuse(), net.module(net.neg(a), a), ["exp", "neg"])


def test_prologue_and_epilogue_of_a_sum():
    net = Net()
    x = net.input("x", N, 4)
    total = net.reduce_sum(net.mul(x, x), axes=(1,), keepdims=True)
    check(Fuse(), net.module(net.sqrt(total)), ["[mul reduce_sum sqrt]"])


def test_normalizing_by_a_sum_is_two_kernels():
    net = Net()
    x = net.exp(net.input("x", N, 4))
    check(Fuse(), net.module(net.div(x, net.reduce_sum(x, axes=(1,), keepdims=True))), ["exp", "reduce_sum", "div"])


def test_costly_values_are_not_repeated_for_a_broadcast():
    net = Net()
    x, gate = net.input("x", N, 4, 5, 5), net.input("g", N, 4, 1, 1)
    check(Fuse(), net.module(net.mul(x, net.sigmoid(gate))), ["sigmoid", "mul"])
    net = Net()
    x, gate = net.input("x", N, 4, 5, 5), net.input("g", N, 4, 1, 1)
    check(Fuse(), net.module(net.mul(x, net.neg(gate))), ["[neg mul]"])


def test_overlapping_windows_do_not_repeat_their_input():
    net = Net()
    x = net.relu(net.input("x", N, 4, 6, 6))
    check(Fuse(), net.module(net.max_pool(x, kernel=(3, 3))), ["relu", "max_pool"])


def test_products_read_operands_before_they_are_transposed():
    net = Net()
    x, w, b = net.input("x", 4, N), net.input("w", 6, 4), net.param("b", 6)
    y = net.add(net.matmul(net.transpose(x), net.transpose(w, perm=(1, 0))), b)
    check(Fuse(), net.module(y), ["[transpose transpose matmul add]"])
    net = Net()
    q, k = net.input("q", N, 5, 2, 8), net.input("k", N, 5, 2, 8)
    y = net.matmul(net.transpose(q, perm=(0, 2, 1, 3)), net.transpose(k, perm=(0, 2, 3, 1)))
    check(Fuse(), net.module(y), ["[transpose transpose matmul]"])


def test_transposes_that_stay_outside_of_products():
    """One whose operands are the same, one that others read, one that takes neighbours far apart, one of integers."""
    net = Net()
    x = net.input("x", N, 4)
    check(Fuse(), net.module(net.matmul(x, net.transpose(x, perm=(1, 0)))), ["transpose", "matmul"])
    net = Net()
    x, w = net.input("x", N, 4), net.transpose(net.input("w", 6, 4), perm=(1, 0))
    check(Fuse(), net.module(net.matmul(x, w), w), ["transpose", "matmul"])
    net = Net()
    x, w = net.input("x", 3, N, 4), net.transpose(net.input("w", 4, 6, 3), perm=(2, 0, 1))
    check(Fuse(), net.module(net.matmul(x, w)), ["transpose", "matmul"])
    net = Net()
    x, w = (net.b.input(name, TensorType(shape, "int32")) for name, shape in (("x", (N, 4)), ("w", (6, 4))))
    check(Fuse(), net.module(net.matmul(x, net.transpose(w, perm=(1, 0)))), ["transpose", "matmul"])


def test_reshapes_stay_outside():
    net = Net()
    x = net.relu(net.input("x", N, 4, 6))
    check(Fuse(), net.module(net.neg(net.reshape(x, shape=(N, 24)))), ["relu", "reshape", "neg"])


def test_groups_have_a_limit():
    net = Net()
    x = net.input("x", N)
    for _ in range(10):
        x = net.neg(x)
    after = Fuse(limit=4)(net.module(x))
    assert [op.count("neg") for op in ops(after)] == [4, 4, 2]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_fusing_keeps_the_meaning_of_any_graph(data):
    """Random graphs of element-wise, broadcasting, moving, summing and multiplying operators."""
    net = Net()
    values = [net.input("x", N, 4), net.input("y", N, 4)]
    weight = net.param("w", 4, 4)
    for _ in range(data.draw(st.integers(1, 12))):
        a, b = data.draw(st.sampled_from(values)), data.draw(st.sampled_from(values))
        choice = data.draw(st.integers(0, 6))
        if choice == 0:
            values.append(net.tanh(a))
        elif choice in (1, 2):
            values.append(net.add(a, b))
        elif choice == 3:
            values.append(net.sub(a, net.reduce_max(b, axes=(1,), keepdims=True)))
        elif choice == 4:
            values.append(net.tanh(net.matmul(a, weight)))
        elif choice == 5:
            values.append(net.slice(net.concat(a, b, axis=1), starts=(2,), ends=(6,), axes=(1,)))
        else:
            values.append(net.maximum(net.neg(a), net.reduce_mean(b, axes=(1,), keepdims=True)))
    outputs = [values[-1], *data.draw(st.lists(st.sampled_from(values[2:]), max_size=2))]
    module = net.module(*outputs)
    after = Fuse()(CommonSubexpressions()(module))
    same_meaning(module, after)
    for value in after.functions["main"].values():
        if isinstance(value, Fused):
            kinds = [v.op for v in value.body.values() if isinstance(v, Call)]
            assert sum(op == "matmul" or op.startswith("reduce") for op in kinds) <= 1


# -- all together --


def test_the_digits_network_becomes_six_kernels():
    module, params = digits_network()
    bound = module.bind(params)
    after = run_passes(bound, default_passes())
    assert ops(after) == [
        "[conv relu]", "max_pool", "[conv relu]", "max_pool", "reshape", "[matmul add]", "softmax"
    ]  # fmt: skip
    same_meaning(bound, after)
    used = {value.name for value in after.functions["main"].values() if isinstance(value, Param)}
    assert set(after.params) == used


def test_the_digits_network_with_parameters_at_run_time():
    module, params = digits_network()
    after = run_passes(module, default_passes())
    image = rng.standard_normal((3, 1, 8, 8)).astype(F32)
    given = {"image": image, **params}
    compare(interp.run(after, given), interp.run(module, given), rtol=1e-4, atol=1e-5)
    assert after.params == {}
