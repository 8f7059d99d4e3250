"""The benchmarks of CPUs run, check outputs, and judge as they say; figures are judged by people."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = (
    "mlp", "mlp-64", "resnet18", "resnet50", "resnext50", "mobilenetv2", "shufflenetv2", "efficientnet", "convnext",
    "densenet121", "unet", "vgg16", "detector",
)  # fmt: skip


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


# Networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_valid_and_its_activations_stay_near_one(name: str, part: Any) -> None:
    models = part("models")
    assert tuple(models.MODELS) == NAMES
    model = models.MODELS[name]
    net = model.make(size=(64, 96), batch=2, width=1 / 8)
    proto = net.proto()
    onnx.checker.check_model(proto, full_check=True)
    output = proto.graph.output[0].name
    every = [node.output[0] for node in proto.graph.node]
    proto.graph.output.extend(onnx.ValueInfoProto(name=each) for each in every if each != output)
    session = ort.InferenceSession(proto.SerializeToString())
    arrays = dict(zip(every, session.run(every, model.inputs(size=(64, 96), batch=2)), strict=True))
    assert {each: array.shape for each, array in arrays.items()} == {each: net.shapes[each] for each in every}
    powers = {each: float(np.mean(np.square(array, dtype=np.float64))) for each, array in arrays.items()}
    assert max(powers.values()) < 50, max(powers, key=lambda each: powers[each])
    assert 1e-3 < powers[output] < 50


def test_networks_are_the_well_known_ones(part: Any) -> None:
    net = part("models").MODELS["mobilenetv2"].make(size=(224, 224))
    # 3.50 M weights (Sandler et al., table 4) and the means and variances; 300 M multiply-adds.
    assert net.parameters / 1e6 == pytest.approx(3.54, abs=0.01)
    assert net.flops / 2e6 == pytest.approx(300, rel=0.01)
    assert part("models").MODELS["mlp-64"].make().shapes["fc2"] == (64, 10)


def test_a_network_is_the_same_each_time(part: Any) -> None:
    model = part("models").MODELS["mlp"]
    assert model.make().proto().SerializeToString() == model.make().proto().SerializeToString()


def test_models_writes_a_network(tmp_path: Path) -> None:
    path = tmp_path / "mlp.onnx"
    done = run("models.py", "mlp", "--batch", "3", "-o", str(path))
    assert done.returncode == 0, done.stderr
    assert "3x784" in done.stdout
    assert [dim.dim_value for dim in onnx.load(path).graph.input[0].type.tensor_type.shape.dim] == [3, 784]
    assert "give HEIGHTxWIDTH" in run("models.py", "unet", "--size", "96").stderr


def test_other_networks_are_valid(part: Any) -> None:
    """Narrow ones; their shapes are what they are said to be, and nothing grows without bounds."""
    plainly = ort.SessionOptions()
    plainly.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, model in part("other_networks").NETWORKS.items():
        net = model.make(width=1 / 8)
        proto = net.proto()
        onnx.checker.check_model(proto)
        output = proto.graph.output[0].name
        (array,) = ort.InferenceSession(proto.SerializeToString(), plainly).run([output], model.inputs())
        assert array.shape == net.shapes[output], name
        assert 1e-4 < np.mean(np.square(array, dtype=np.float64)) < 100, name


def test_the_table_of_the_documentation_is_of_a_result(part: Any) -> None:
    rows = [row_of(name, median_us=10.0) for name in ("a", "b", "c")]
    for row, ratio in zip(rows, (1.5, 0.25, 0.5), strict=True):
        row["runs"][0]["ratio"] = ratio
    assert part("other_networks").table(rows).splitlines()[2:] == ["| b | 0.25 | a | 1.50 |", "| c | 0.50 |  |  |"]


# Whole networks -----------------------------------------------------------------------------------------------------


def test_the_benchmark_of_networks_runs() -> None:
    done = run("cpu_models.py", "--smoke", "--models", "mlp,resnet18", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"cpu", "cores", "caches", "packages"} <= result["machine"].keys()
    assert [row["model"] for row in result["models"]] == ["mlp", "resnet18"]
    for row in result["models"]:
        figures = row["compile"]
        assert all(figures[f"{state}_s"] > 0 and figures[f"{state}_peak_bytes"] > 1e7 for state in ("warm", "kernels"))
        # What finds the artifact loads no compiler; what finds kernels alone does, and writes the artifact again.
        assert figures["warm_peak_bytes"] < figures["kernels_peak_bytes"] and figures["cold_s"] > 0
        (at,) = row["runs"]
        assert at["ratio"] > 0 and not at["refused"]
        for runtime in ("kedge", "onnxruntime", "openvino"):
            figures = at["runtimes"][runtime]
            assert figures["error"] < 1e-3
            assert figures["peak_bytes"] >= figures["loaded_bytes"] > 1e7
            assert figures["median_us"] >= figures["best_us"] > 0
    assert "written to" not in done.stderr


def row_of(name: str, **figures: Any) -> dict[str, Any]:
    """A row as `cpu_models.benchmark` gives it: each runtime's time, memory and error can be told."""
    runtimes = {
        runtime: {"error": 0.0, "median_us": 10.0, "best_us": 10.0, "loaded_bytes": 100, "peak_bytes": 110}
        for runtime in ("kedge", "onnxruntime", "openvino")
    }
    runtimes["kedge"] |= figures
    run = {"threads": 1, "runtimes": runtimes, "refused": {}}
    return {"model": name, "title": name, "compile": {}, "runs": [run]}


def test_verdicts_tell_what_is_wanted(part: Any) -> None:
    cpu_models = part("cpu_models")
    rows = [row_of("resnet18", median_us=7.0), row_of("vgg16", median_us=20.0, peak_bytes=111)]
    for row in rows:
        row["runs"][0] |= cpu_models.ratios(row["runs"][0]["runtimes"])
    said = {text: met for met, text in cpu_models.verdicts(rows)}
    assert said == {
        "1 thread: geometric mean of ratios 1.18 (of least times 1.00), wanted <= 1.0": False,
        "1 thread: worst vgg16 2.00, wanted <= 1.3": False,
        "1 thread: resnet18 0.70, wanted <= 0.8": True,
        "1 thread: 1 of 2 models add more memory to what is loaded than in ONNX Runtime: vgg16": False,
        "1 thread: 1 of 2 models have a higher peak of memory than in ONNX Runtime: vgg16": False,
    }
    resnet50 = row_of("resnet50")
    resnet50["compile"] = {"cold_s": 16.0, "cold_peak_bytes": 1.9e9, "warm_s": 1.4, "kernels_s": 1.9}
    assert [met for met, text in cpu_models.verdicts([resnet50]) if "compiles" in text] == [False, True, True]
    assert any("again in 1.40 s (1.90 s with its kernels alone)" in text for _, text in cpu_models.verdicts([resnet50]))
    assert (False, "1 thread: 1 of 1 models have no ratio") in cpu_models.verdicts([resnet50])


@pytest.mark.parametrize("error", [2e-3, math.inf, math.nan])
def test_a_wrong_output_is_an_exit_status(
    error: float, part: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu_models = part("cpu_models")
    monkeypatch.setattr(cpu_models, "benchmark", lambda model, folder, settings: row_of(model.name, error=error))
    monkeypatch.setattr(sys, "argv", ["cpu_models.py", "--models", "mlp", "--json"])
    assert cpu_models.main() == 1
    assert "WRONG: mlp, 1 thread: kedge is off by" in capsys.readouterr().err


def test_a_refused_model_is_told_with_its_reason(part: Any) -> None:
    cpu_models = part("cpu_models")
    row = row_of("unet")
    del row["runs"][0]["runtimes"]["kedge"]
    row["runs"][0]["refused"] = {"kedge": "error: no such operator"}
    assert cpu_models.wrong([row]) == ["unet, 1 thread: kedge refuses it: error: no such operator"]


def test_errors_are_relative_to_the_largest_output(part: Any) -> None:
    error = part("harness").relative_error
    b = np.array([1.0, -10.0, 0.0], np.float32)
    assert error({"y": b + np.float32(0.5)}, {"y": b}) == pytest.approx(0.05)
    assert error({"y": b}, {"y": b}) == 0
    assert error({"y": b[:2]}, {"y": b}) == math.inf
    assert error({"z": b}, {"y": b}) == math.inf
    bad = np.array([1.0, np.nan, 0.0], np.float32)
    assert error({"y": bad}, {"y": b}) == math.inf
    assert error({"y": bad}, {"y": bad}) == 0


def test_a_contender_that_cannot_load_says_why(part: Any, tmp_path: Path) -> None:
    harness = part("harness")
    np.savez(tmp_path / "inputs.npz", allow_pickle=False, x=np.zeros(1, np.float32))
    with pytest.raises(harness.WorkerFailed, match=r"kedge: .*missing\.onnx"):
        harness.Contender.start("kedge", tmp_path / "missing.onnx", tmp_path / "inputs.npz", 1)


def test_a_stopped_worker_ends_with_its_parent(tmp_path: Path, part: Any) -> None:
    path = part("models").MODELS["mlp"].make().save(tmp_path / "mlp.onnx")
    np.savez(tmp_path / "inputs.npz", allow_pickle=False, **part("models").MODELS["mlp"].inputs())
    start = f"harness.Contender.start('onnxruntime', Path({str(path)!r}), Path({str(tmp_path / 'inputs.npz')!r}), 1)"
    code = f"import harness, os; from pathlib import Path; print({start}.process.pid, flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        watched = os.pidfd_open(int(done.stdout))
        try:
            assert select.select([watched], [], [], 60)[0], "it is still there"
        finally:
            os.close(watched)


def test_last_words_are_the_error_without_its_hint(part: Any) -> None:
    said = "compile: reading x\nerror: two operators are unknown:\n  A: n1\n  B: n2\nhint: replace them\n"
    assert part("harness").last_words(said) == "error: two operators are unknown: A: n1 B: n2"
    assert part("harness").last_words("Traceback\nkedge.InputError: no\nhint: yes\n") == "kedge.InputError: no"
    assert part("harness").last_words("one\ntwo\n") == "two"
    assert part("harness").last_words("") == ""


def test_the_plot_names_each_model_and_ratio(part: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra 'bench'")
    rows = [row_of("first", median_us=7.0), row_of("refused")]
    rows[0]["runs"][0]["ratio"] = 0.7
    part("cpu_models").plot(rows, {"cpu": "a processor"}, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    # Text is drawn as outlines, named in comments.
    assert all(f"<!-- {each} -->" in text for each in ("first", "refused", "0.70", "1 thread")), text[:2000]


# Matrix products ----------------------------------------------------------------------------------------------------


def test_the_benchmark_of_matrix_products_runs() -> None:
    done = run("cpu_matmul.py", "--smoke", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["products"]
    assert [tuple(row["shape"]) for row in rows] == [(64, 64, 64), (1, 256, 192)]
    for row in rows:
        assert len(row["contenders"]) == 5
        assert row["peak_gflops"] > 1 and row["read_gb_s"] > 0.1
        assert all(row[kind]["ratio"] > 0 and row[kind]["share"] > 0 for kind in ("constant", "inputs"))


@pytest.mark.parametrize("name", ["peak", "stream"])
@pytest.mark.parametrize(("cpu", "register"), [("sapphirerapids", "%zmm"), ("x86_64_v3", "%ymm")])
def test_limits_are_those_of_the_widest_vectors(name: str, cpu: str, register: str, part: Any, tmp_path: Path) -> None:
    """Compilers split vectors of 512 bits in two for Intel's servers; half of what these do is no limit."""
    flags = [flag for flag in part("limits").FLAGS if not flag.startswith("-march")]
    made = tmp_path / "made.s"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu", f"-mcpu={cpu}", *flags]
    subprocess.run([*command, "-S", str(BENCHMARKS / f"{name}.c"), "-o", str(made)], check=True, timeout=300)
    operation = "vfmadd" if name == "peak" else "vaddps"
    wide = [line for line in made.read_text().splitlines() if operation in line and register in line]
    assert len(wide) >= (12 if name == "peak" else 8)


def test_a_product_is_bound_by_the_limit_that_takes_longer(part: Any) -> None:
    cpu_matmul = part("cpu_matmul")
    times = {name: {"median_us": 40.0, "best_us": 30.0} for name in cpu_matmul.CONTENDERS}
    times["numpy"] = {"median_us": 20.0, "best_us": 15.0}
    row = {"shape": (100, 100, 100), "peak_gflops": 100.0, "read_gb_s": 10.0, "bytes": 120_000, "contenders": times}
    found = cpu_matmul.judged(row, {"kedge constant": 25.0, "kedge inputs": 40.0})
    assert found["bound"] == "compute"  # 20 µs of multiply-adds, 12 of reading
    assert found["constant"]["share"] == pytest.approx(0.8)
    assert (found["inputs"]["ratio"], found["inputs"]["ratio_best"]) == (2.0, 2.0)
    assert (
        cpu_matmul.judged(row | {"read_gb_s": 4.0}, {"kedge constant": 60.0, "kedge inputs": 40.0})["bound"] == "memory"
    )


# Estimates for ARM --------------------------------------------------------------------------------------------------

ASSEMBLY = """
\t.text
kernel:
.LBB0_1:                // outer
\tmov x1, x2
.LBB0_2:
\tldr q30, [x1], #16
\tfmla v0.4s, v30.4s, v31.4s
\tfmla v1.2s, v30.2s, v31.2s
\tfmul v2.4s, v30.4s, v31.4s
\tfmla v3.8h, v30.8h, v31.8h
\tsubs x2, x2, #1
\tb.ne .LBB0_2
\tfmla v0.4s, v30.4s, v31.4s
\tcbnz x3, .LBB0_1
.LBB0_3:
\tfmadd s0, s1, s2, s0
\ttbz w0, #0, .LBB0_3
\tret
"""


def test_the_hottest_inner_loop_is_found(part: Any) -> None:
    arm_mca = part("arm_mca")
    assert len(arm_mca.loops(ASSEMBLY)) == 2
    loop = arm_mca.hottest([ASSEMBLY])
    assert loop.instructions[0] == "ldr q30, [x1], #16" and loop.instructions[-1] == "b.ne .LBB0_2"
    assert loop.multiply_adds == 4 + 2  # a product without an addition is none, and half precision is another type
    assert arm_mca.hottest(["kernel:\n\tret\n"]) is None


@pytest.mark.parametrize(
    ("inside", "last", "straight"),
    [
        (("cmp x4, #2", "b.eq .LBB0_3"), "b .LBB0_1", True),  # leaves the loop, which goes on at its end
        (("cbz x5, .LBB0_1",), "b.ne .LBB0_1", False),  # leaves out what is behind
        (("b.eq .LBB0_3", "b.hi .LBB0_1"), "b .LBB0_1", False),
        (("b.hi .LBB0_2", "ldr q30, [x1]"), "b .LBB0_1", False),
        (("b.eq .LBB0_3",), "b.ne .LBB0_1", False),
    ],
)
def test_loops_that_go_on_from_several_places_are_one(
    inside: tuple[str, ...], last: str, straight: bool, part: Any
) -> None:
    body = (*inside, ".LBB0_2:", "fmla v0.4s, v30.4s, v31.4s", last)
    (loop,) = part("arm_mca").loops("\n".join((".LBB0_1:", "add x4, x4, #1", *body, ".LBB0_3:", "ret")))
    assert loop.instructions[0] == "add x4, x4, #1" and loop.instructions[-1] == last
    assert (loop.multiply_adds, loop.is_straight) == (4, straight)


def test_products_and_additions_of_armv7_are_counted(part: Any) -> None:
    arm_mca = part("arm_mca")
    text = "k:\n.L1:\n\tvmla.f32\tq0, q1, q2\n\tvmul.f32 q3, q1, q2\n\tvadd.f32 d0, d1, d2 @ sum\n\tbne\t.L1\n"
    assert arm_mca.hottest([text]).multiply_adds == 4 + 2


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("vldmia r0, {d10, d11}", ["vld1.64 {d10, d11}, [r0]"]),
        ("vstmia r0!, {d0, d1, d2, d3, d4}", ["vst1.64 {d0, d1, d2, d3}, [r0]!", "vst1.64 {d4}, [r0]!"]),
        ("ldm r0, {r0, r1}", ["ldr r1, [r0]"]),
        ("ldr r1, [r0]", ["ldr r1, [r0]"]),
    ],
)
def test_loads_of_several_registers_are_taken_apart(instruction: str, expected: list[str], part: Any) -> None:
    assert part("arm_mca").without_multiples(instruction) == expected


def test_what_limits_a_loop_waits_for_nothing(part: Any) -> None:
    arm_mca = part("arm_mca")
    old, new = arm_mca.CPUS[-1], arm_mca.CPUS[0]
    lines = ["vld1.32 {d0, d1}, [r6], r0", "vmla.f32 q8, q0, d2[0]", "vld1.32 {d2[], d3[]}, [r6:32]!", "bne .L1"]
    assert arm_mca.unhindered(lines, old) == [
        "vld1.32 {d24, d25}, [r6]", "vmla.f32 q0, q14, q15", "vld1.32 {d24[], d25[]}, [r6:32]"
    ]  # fmt: skip
    lines = [
        "ldp q0, q1, [x1, #32]!",
        "ldr q2, [x1], #16",
        "str q3, [x2]",
        "ldr x3, [x4, x5, lsl #3]",
        "add x1, x1, x2",
    ]
    assert arm_mca.unhindered([*lines, "fmla v2.4s, v0.4s, v1.s[0]"], new) == [
        "ldp q24, q25, [x1, #32]", "ldr q24, [x1]", "ldr x3, [x4, x5, lsl #3]", "fmla v0.4s, v30.4s, v31.4s"
    ]  # fmt: skip


def test_the_estimate_says_what_to_install() -> None:
    done = run("arm_mca.py", "--mca", "no-such-program")
    assert done.returncode == 1
    assert "apt-get install llvm-19" in done.stderr


@pytest.mark.skipif(shutil.which("llvm-mca-19") is None, reason="llvm-mca-19 is not installed (Debian: llvm-19)")
def test_the_estimate_runs() -> None:
    done = run("arm_mca.py", "--smoke", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["loops"]
    assert [(row["case"], row["cpu"]) for row in rows] == [("matmul", "neoverse-n1"), ("matmul", "cortex-a9")]
    assert [row["peak_per_cycle"] for row in rows] == [pytest.approx(8, rel=0.02), pytest.approx(4, rel=0.02)]
    assert all(0 < row["share"] <= 1.02 * row["limit"] and row["multiply_adds"] for row in rows)
