"""Profiles of compiled models: which kernels a call spends its time in, and what they did for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import kedge
from kedge import patterns as p
from kedge.compiler.frontend import nn
from kedge.rpc import abi
from kedge.rpc.artifact import Manifest
from kedge.rpc.client.profile import Roof, evaluate, profile_of, profile_options
from kedge.rpc.client.timing import Timing
from kedge.rpc.errors import ArtifactError, InputError, JobError
from kedge.rpc.types import Measurement, StepSamples, TimeOptions

SHORT = {"repeat": 3, "min_repeat_ms": 0.1}
RELU = """
#include "kedge_external.h"
int32_t my_relu(const kedge_external_call *call) {
  const float *x = kedge_data(&call->inputs[0]);
  float *y = kedge_data(&call->outputs[0]);
  int64_t n = call->outputs[0].shape[0] * call->outputs[0].shape[1];
  for (int64_t i = 0; i < n; i++) y[i] = x[i] > 0 ? x[i] : 0;
  return 0;
}
"""


class Net(nn.Module):  # type: ignore[misc]
    """Two layers whose kernels are the same, and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 24), nn.Linear(24, 24)
        self.relu = nn.ReLU()

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return nn.op.softmax(self.relu(self.fc2(self.relu(self.fc1(x)))), dim=-1)


def export(batch: Any) -> kedge.Module:
    module, params = Net().export(spec={"forward": {"x": nn.spec.Tensor((batch, 24), "float32")}})
    rng = np.random.default_rng(0)
    return module.bind({name: rng.standard_normal(t.shape).astype(t.dtype) for name, t in params.items()})


@pytest.fixture(scope="module")
def net() -> kedge.Artifact:
    return kedge.compile(export("N"), "native")


def x_of(batch: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.ones((batch, 24), np.float32)}


@pytest.mark.parametrize("batch", [1, 5])
def test_a_kernel_that_is_called_twice_is_one_row(net: kedge.Artifact, batch: int) -> None:
    with net.open(threads=1) as m:
        profile = m.profile(x_of(batch), **SHORT)
    (twice,) = [kernel for kernel in profile.kernels if kernel.calls == 2]
    # A product, a bias, and a maximum with zero; x, weights and bias go in, y comes out.
    assert twice.flops == 2 * (2 * batch * 24 * 24 + 2 * batch * 24)
    assert twice.n_bytes >= 2 * 4 * (2 * batch * 24 + 24 * 24 + 24)
    assert twice.call_ns == pytest.approx(twice.time_ns / 2)
    assert sum(kernel.share for kernel in profile.kernels) == pytest.approx(1)
    assert profile.timing.protocol.profile and len(profile.timing.samples_ns) == 3
    assert sum(kernel.time_ns for kernel in profile.kernels) < 3e6 * profile.timing.max_ms


def test_an_isolated_runner_profiles_the_same(net: kedge.Artifact) -> None:
    with kedge.local(threads=1) as device:
        profile = device.load(net).profile(x_of(4), **SHORT)
    assert sorted(kernel.calls for kernel in profile.kernels)[-1] == 2
    text = str(profile)
    assert "GFLOP/s of float32 (target: multiply-adds per cycle; measured: " in text and "measured reads: " in text
    assert text.splitlines()[0].split()[:3] == ["kernel", "calls", "time/call"]


def test_external_code_has_its_part() -> None:
    external = kedge.External("my_relu", p.op("relu", p.wildcard("x")), source=RELU)
    artifact = kedge.compile(export(3), "native", externals=[external])
    with artifact.open(threads=1) as m:
        kernels = m.profile(x_of(3), **SHORT).kernels
    own = [kernel for kernel in kernels if kernel.rule == "external my_relu"]
    assert len(own) == 2 and all(k.time_ns > 0 and k.flops == 72 and k.n_bytes == 2 * 4 * 72 for k in own)


def test_a_function_of_tensor_ir_has_no_operators_to_count() -> None:
    from kedge import te

    x = te.placeholder((8,), "float32", "x")
    artifact = kedge.compile(
        te.create_prim_func([x, te.compute((8,), lambda i: x[i] + 1.0, name="y")], "inc"), "native"
    )
    with artifact.open(threads=1) as m:
        (kernel,) = m.profile({"x": np.zeros(8, np.float32)}, **SHORT).kernels
    assert (kernel.flops, kernel.gflops_per_s, kernel.roof_share) == (None, None, None)
    assert kernel.n_bytes == 64 and kernel.gbytes_per_s is not None


def test_options_are_those_of_a_timing(net: kedge.Artifact) -> None:
    assert profile_options(repeat=4) == TimeOptions(repeat=4, min_repeat_ns=10_000_000, profile=True)
    with net.open(threads=1) as m, pytest.raises(InputError, match="repeat"):
        m.profile(x_of(1), repeat=0)


def timing(steps: tuple[tuple[float, ...], ...] | None, variant: int = 0) -> Timing:
    rates = (4e9, 3e9, 0.0, 1e9)
    profile = None if steps is None else StepSamples(steps, 1e9, rates, variant)
    return Timing(Measurement(TimeOptions(), (100.0,), profile=profile, num_threads=2))


def manifest(**info: Any) -> Manifest:
    from kedge.rpc.artifact import Function, Port, Symbol

    function = Function("main", (Port("x", "float32", ("N", 3)),), (), (Symbol("N"),))
    return Manifest("m", abi.ABI_VERSION, "test", (function,), (), (), {"variants": [info]} if info else {})


COST = [[abi.EXPR_SYMBOL, 0], [abi.EXPR_CONST, 5], [abi.EXPR_MUL, 0]]
KERNEL = {"name": "k", "rule": "tile", "decisions": {"rows": 2}, "origin": ["conv"]}
INFO = {
    "flops_per_cycle": 10.0, "load_bytes_per_cycle": 32.0, "kernels": [KERNEL],
    "functions": {"main": [{"kernel": "k", "flops": 600, "bytes": COST}, {"kernel": "k", "flops": 400, "bytes": 5}]},
}  # fmt: skip


def test_arithmetic_of_a_profile() -> None:
    samples = timing(((80.0, 60.0, 70.0), (20.0, 20.0, 20.0)))
    (kernel,) = profile_of(manifest(**INFO), "", {"x": np.zeros((4, 3), np.float32)}, samples).kernels
    assert (kernel.calls, kernel.time_ns, kernel.flops, kernel.n_bytes) == (2, 90.0, 1000, 25)
    # Two cores of 10 operations in a cycle of 1 ns: 1000 of them take 50 ns.
    assert kernel.roof_share == pytest.approx(50 / 90)
    assert (kernel.gflops_per_s, kernel.origin) == (pytest.approx(1000 / 90), ("conv",))


def test_memory_bounds_a_kernel_by_the_cache_that_holds_its_working_set() -> None:
    roof = Roof(1e9, ((0, 8e9), (1000, 4e9), (2000, 1e9)), 1e9)
    assert roof.least_ns(0, 800) == pytest.approx(100)
    assert roof.least_ns(0, 1600) == pytest.approx(400)
    assert roof.least_ns(0, 4000) == pytest.approx(4000)
    assert roof.least_ns(5000, 4000) == pytest.approx(5000)
    assert Roof(None, roof.rates, 1e9).least_ns(1, 1) is None


def test_costs_are_postfix_programs() -> None:
    operations = {abi.EXPR_ADD: 9, abi.EXPR_SUB: 5, abi.EXPR_MUL: 14, abi.EXPR_FLOORDIV: 3, abi.EXPR_FLOORMOD: 1,
                  abi.EXPR_MIN: 2, abi.EXPR_MAX: 7}  # fmt: skip
    for opcode, result in operations.items():
        assert evaluate([[abi.EXPR_SYMBOL, 1], [abi.EXPR_CONST, 2], [opcode, 0]], [0, 7]) == result


def test_what_cannot_be_a_profile_says_why() -> None:
    inputs = {"x": np.zeros((4, 3), np.float32)}
    with pytest.raises(JobError, match="made no profile") as caught:
        profile_of(manifest(**INFO), "", inputs, timing(None))
    assert "update the agent" in (caught.value.hint or "")
    for info, steps in (
        (INFO, timing(((1.0,),))),
        ({}, timing(((1.0,),))),
        (INFO, timing(((1.0,), (1.0,)), variant=1)),
    ):
        with pytest.raises(ArtifactError) as refused:
            profile_of(manifest(**info), "", inputs, steps)
        assert "compile the model again" in (refused.value.hint or "")


def test_the_manifest_tells_costs_decisions_and_the_order_of_steps(net: kedge.Artifact) -> None:
    (report,) = net.manifest.info["variants"]
    (steps,) = report["functions"].values()
    names = {kernel["name"] for kernel in report["kernels"]}
    assert [step["kernel"] for step in steps].count(steps[0]["kernel"]) == 2 and {s["kernel"] for s in steps} <= names
    assert all(isinstance(kernel["decisions"], dict) for kernel in report["kernels"])
    assert evaluate(steps[0]["flops"], [7]) == 7 * (2 * 24 * 24 + 2 * 24)
    assert report["flops_per_cycle"] > 0
    assert Manifest.from_json(net.manifest.to_json()) == replace(net.manifest)


def test_on_a_gpu_nothing_is_said_of_a_cores_cycle() -> None:
    artifact = kedge.compile(export(2), "opencl")
    (report,) = artifact.manifest.info["variants"]
    assert report["flops_per_cycle"] is None and report["load_bytes_per_cycle"] is None
