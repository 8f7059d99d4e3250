"""The Python API of the architecture page, as a user's script would use it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kedge
from kedge import nn, te
from kedge.compiler.errors import FrontendError, TargetError
from kedge.compiler.frontend.onnx.reference import reference_outputs
from kedge.compiler.graph import interp
from kedge.compiler.lower.lower import lower_prim_func
from kedge.compiler.schedule.default import is_scheduled, schedule_func
from kedge.compiler.target import parse
from kedge.compiler.tir.stmt import PrimFunc
from kedge.data import digits_model, digits_test
from kedge.rpc.errors import ArtifactError, IncompatibleTargetError, InputError
from support.memory import resident_bytes

ROOT = Path(__file__).resolve().parent.parent


class TwoFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def hidden(self, x: nn.Tensor) -> nn.Tensor:
        return self.fc(x)

    def classify(self, x: nn.Tensor) -> nn.Tensor:
        return nn.op.softmax(self.fc(x), dim=-1)


def exported() -> tuple[kedge.Module, dict[str, np.ndarray]]:
    x = nn.spec.Tensor(("n", 6), "float32")
    module, params = TwoFunctions().export(spec={"hidden": {"x": x}, "classify": {"x": x}})
    rng = np.random.default_rng(0)
    return module, {name: rng.standard_normal(type_.shape).astype(type_.dtype) for name, type_ in params.items()}


class Wide(nn.Module):
    """Its only intermediate tensor is 4096 times as large as a row of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 4096), nn.Linear(4096, 8)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return self.down(nn.op.relu(self.up(x)))


def test_opening_makes_the_memory_that_calls_need() -> None:
    rows = 4096
    module, params = Wide().export(spec={"forward": {"x": nn.spec.Tensor((rows, 8), "float32")}})
    arrays = {name: np.zeros(type_.shape, type_.dtype) for name, type_ in params.items()}
    artifact = kedge.compile(module.bind(arrays), target="native")
    before = resident_bytes()
    with artifact.open(threads=1) as m:
        opened = resident_bytes()
        m.run({"x": np.ones((rows, 8), np.float32)})
        assert opened - before > 0.9 * rows * 4096 * 4
        assert resident_bytes() - opened < 0.1 * rows * 4096 * 4


def test_importing_kedge_imports_nothing_heavy() -> None:
    program = (
        "import sys, kedge\n"
        "heavy = {'numpy', 'llvmlite', 'onnx', 'grpc', 'paramiko', 'sqlalchemy', 'typer', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(kedge.__all__) <= set(dir(kedge))\n"
        "for name in kedge.__all__: getattr(kedge, name)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_one_artifact_at_any_batch_size() -> None:
    images, _ = digits_test()
    artifact = kedge.compile(kedge.load(digits_model()), target="native")
    with artifact.open(threads=1) as m:
        for batch in (1, 2, 17, 360):
            expected = reference_outputs(digits_model(), {"image": images[:batch]})["probabilities"]
            out = m.run({"image": images[:batch]})["probabilities"]
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)


def test_save_load_and_a_second_process(tmp_path: Path) -> None:
    images, _ = digits_test()
    artifact = kedge.compile(digits_model(), target="native")
    artifact.save(tmp_path / "m.kdg")
    again = kedge.Artifact.load(tmp_path / "m.kdg")
    assert again.digest == artifact.digest and again.size == artifact.size
    with artifact.open(threads=1) as m:
        expected = m.run({"image": images[:4]})["probabilities"]
    with kedge.local(threads=1) as device:
        out = device.load(again).run({"image": images[:4]})["probabilities"]
    np.testing.assert_array_equal(out, expected)


def test_functions_share_weights_and_are_called_by_name() -> None:
    module, weights = exported()
    artifact = kedge.compile(module.bind(weights), target="native")
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    hidden = x @ weights["fc.weight"].T + weights["fc.bias"]
    exponent = np.exp(hidden - hidden.max(axis=1, keepdims=True))
    with artifact.open(threads=2) as m:
        np.testing.assert_allclose(m["hidden"]({"x": x})["output"], hidden, rtol=1e-5, atol=1e-6)
        out = m.run({"x": x}, function="classify")["output"]
        np.testing.assert_allclose(out, exponent / exponent.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_parameters_can_stay_inputs() -> None:
    module, weights = exported()
    artifact = kedge.compile(module, target="native")
    assert [port.name for port in artifact.manifest.function("hidden").inputs] == ["x", "fc.weight", "fc.bias"]
    x = np.ones((2, 6), np.float32)
    with artifact.open(threads=1) as m:
        out = m.run({"x": x, **weights}, function="hidden")["output"]
    np.testing.assert_allclose(out, x @ weights["fc.weight"].T + weights["fc.bias"], rtol=1e-5, atol=1e-6)


def test_a_te_function_goes_through_the_same_door() -> None:
    n = 37
    artifact = kedge.compile(product(n), target="native")
    rng = np.random.default_rng(2)
    left, right = (rng.standard_normal((n, n)).astype(np.float32) for _ in range(2))
    with artifact.open(threads=1) as m:
        np.testing.assert_allclose(m.run({"a": left, "b": right})["c"], left @ right, rtol=1e-4, atol=1e-4)


def product(n: int) -> PrimFunc:
    a, b = (te.placeholder((n, n), "float32", name=name) for name in "ab")
    k = te.reduce_axis(n, "k")
    return te.create_prim_func([a, b, te.compute((n, n), lambda i, j: te.sum(a[i, k] * b[k, j], k), name="c")], "main")


def test_the_only_function_needs_no_name() -> None:
    x = te.placeholder((4,), "float32", name="x")
    artifact = kedge.compile(te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1.0, name="y")], name="plus"))
    data = {"x": np.ones(4, np.float32)}
    with artifact.open(threads=1) as m:
        np.testing.assert_array_equal(m.run(data)["y"], 2 * np.ones(4))
        assert m.time(data, repeat=2, min_repeat_ms=0).samples_ns
        with pytest.raises(ArtifactError, match="no function 'main'") as caught:
            m.run(data, function="main")
    assert "it has: plus" in str(caught.value)
    with kedge.local(threads=1) as device:
        np.testing.assert_array_equal(device.load(artifact).run(data)["y"], 2 * np.ones(4))


def test_what_is_scheduled_by_hand_is_compiled_as_it_is() -> None:
    func, rng = product(24), np.random.default_rng(2)
    left, right = (rng.standard_normal((24, 24)).astype(np.float32) for _ in range(2))
    sch = kedge.Schedule(func)
    tiled = sch.get_block("c")
    i, j, k = sch.get_loops(tiled)
    outer, inner = sch.split(j, [None, 8])
    sch.reorder(outer, k, i, inner)
    assert (
        not is_scheduled(func) and is_scheduled(sch.func) and schedule_func(sch.func, parse("native")).func is sch.func
    )
    for source in (sch, schedule_func(func, parse("native")).func, sch.func):
        with kedge.compile(source, target="native").open(threads=1) as m:
            np.testing.assert_allclose(m.run({"a": left, "b": right})["c"], left @ right, rtol=1e-4, atol=1e-5)
    program = lower_prim_func(sch, parse("native"))
    assert program.kernels["main"].rule == "by hand" and program.kernels["main"].func is sch.func
    assert lower_prim_func(sch.func, parse("native")).kernels["main"].rule == "by hand"
    assert lower_prim_func(func, parse("native")).kernels["main"].rule == "matmul"


def test_a_module_is_saved_and_loaded(tmp_path: Path) -> None:
    images, _ = digits_test()
    loaded = kedge.load(digits_model())
    optimized = kedge.pipeline("default").run(loaded)  # literals and fused groups too
    for module in (loaded, optimized):
        module.save(tmp_path / "digits.kmod")
        again = kedge.load(tmp_path / "digits.kmod")
        assert again.show() == module.show()
        expected = interp.run(module, {"image": images[:2]})["probabilities"]
        np.testing.assert_array_equal(interp.run(again, {"image": images[:2]})["probabilities"], expected)
    (tmp_path / "cut.kmod").write_bytes((tmp_path / "digits.kmod").read_bytes()[:-100])
    with pytest.raises(FrontendError, match=r"cut\.kmod"):
        kedge.load(tmp_path / "cut.kmod")
    with pytest.raises(FrontendError, match="cannot write"):
        loaded.save(tmp_path / "no" / "x.kmod")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.kmod", "digits.kmod"]


def test_a_local_device_loads_files_and_gives_functions(tmp_path: Path) -> None:
    images, _ = digits_test()
    kedge.compile(digits_model()).save(tmp_path / "m.kdg")
    with kedge.local(threads=1) as device:
        module = device.load(tmp_path / "m.kdg")
        one, other = module["main"]({"image": images[:1]}), module.run({"image": images[:1]})
        np.testing.assert_array_equal(one["probabilities"], other["probabilities"])
        with pytest.raises(ArtifactError, match="backward"):
            module["backward"]


def test_inputs_that_do_not_fit_are_named() -> None:
    artifact = kedge.compile(digits_model(), target="native")
    good = np.zeros((1, 1, 8, 8), np.float32)
    with artifact.open(threads=1) as m, kedge.local(threads=1) as device:
        for place in (m, device.load(artifact)):
            with pytest.raises(InputError, match="image"):
                place.run({"imag": good})
            with pytest.raises(InputError, match="float32"):
                place.run({"image": good.astype(np.float64)})
            with pytest.raises(InputError, match="image"):
                place.run({"image": good[0]})
            with pytest.raises(ArtifactError, match="backward"):
                place.run({"image": good}, function="backward")


def test_another_architecture_is_refused() -> None:
    artifact = kedge.compile(digits_model(), target="raspberry-pi/4b")
    with pytest.raises(IncompatibleTargetError, match="aarch64"):
        artifact.open()
    with kedge.local() as device, pytest.raises(IncompatibleTargetError, match="aarch64"):
        device.load(artifact)


def test_arguments_that_say_nothing_are_refused() -> None:
    with pytest.raises(TypeError, match=r"type int: give an \.onnx path"):
        kedge.compile(3)
    module = kedge.load(digits_model())
    with pytest.raises(TypeError, match=r"kedge\.load"):
        kedge.compile(module, shapes={"image": (1, 1, 8, 8)})
    x = te.placeholder((4,), "float32", name="x")
    func = te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1.0, name="y")], name="main")
    with pytest.raises(TypeError, match="PrimFunc"):
        kedge.compile(func, pipeline=kedge.pipeline())
    for target, shown in ((3, "3"), (None, "None"), (["native", 3], "3")):
        with pytest.raises(TargetError, match=f"target={shown}: it is .*, not a name"):
            kedge.compile(func, target=target)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="-1"):
        kedge.local(threads=-1)


def test_the_quick_start_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quick_start.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "func forward(x: float32[n, 784])" in printed
    difference = float(printed.split("largest difference from numpy: ")[1].split()[0])
    assert difference < 1e-4
