"""Every command on the digits model, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import kedge
from kedge.cli import EXIT_BUG, main, output
from kedge.cli.app import COMMANDS, tree
from kedge.compiler.frontend.onnx.reference import reference_outputs
from kedge.data import digits_model, digits_test
from kedge.diagnosis import diagnose
from support.commands import Kedge, check_digits_profile, kedge_command


def test_run_saves_what_the_reference_computes(kedge: Kedge, digits: Path, tmp_path: Path) -> None:
    images, labels = digits_test()
    np.savez(tmp_path / "in.npz", image=images)
    done = kedge("run", digits, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as saved:
        probabilities = saved["probabilities"]
    expected = reference_outputs(digits_model(), {"image": images})["probabilities"]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)
    assert (probabilities.argmax(1) == labels).mean() > 0.95


def test_run_with_random_inputs_is_repeatable(kedge_here: Kedge, digits: Path) -> None:
    first, second = (kedge_here("run", digits, "--shape", "image=3,1,8,8", "--json") for _ in range(2))
    assert first.returncode == 0, first.stderr
    facts = json.loads(first.stdout)["probabilities"]
    assert facts["shape"] == [3, 10] and facts["mean"] == pytest.approx(0.1, rel=1e-4)
    assert first.stdout == second.stdout
    other = kedge_here("run", digits, "--shape", "image=3,1,8,8", "--seed", "1", "--json")
    assert other.stdout != first.stdout


def test_bench_reports_samples_with_their_protocol(kedge_here: Kedge, digits: Path) -> None:
    done = kedge_here("bench", digits, "--repeat", "7", "--min-repeat-ms", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["samples_ns"]) == 7
    assert all(sample > 0 for sample in report["samples_ns"])
    assert report["verdict"] in ("valid", "suspect")


def test_bench_times_as_it_is_told(kedge_here: Kedge, digits: Path) -> None:
    told = ("--repeat", "4", "--number", "3", "--warmup", "2", "--cooldown-interval-ms", "0.5")
    more = ("--repeats-to-cooldown", "2", "--cache-flush-bytes", "64KiB", "--limit-zero-time-iterations", "7")
    protocol = json.loads(kedge_here("bench", digits, *told, *more, "--json").stdout)["protocol"]
    assert protocol == {
        "number": 3, "repeat": 4, "min_repeat_ns": 0, "warmup": 2, "limit_zero_time_iterations": 7,
        "cooldown_interval_ns": 500_000, "repeats_to_cooldown": 2, "cache_flush_bytes": 64 << 10, "profile": False,
    }  # fmt: skip


def test_bench_shows_where_the_time_goes(kedge_here: Kedge, digits: Path) -> None:
    short = ("--profile", "--repeat", "3", "--min-repeat-ms", "1")
    done = kedge_here("bench", digits, *short, "--json")
    assert done.returncode in (0, 1), done.stderr  # 1: the machine is too busy to believe the timing
    check_digits_profile(json.loads(done.stdout))
    done = kedge_here("bench", digits, *short, "--shape", "image=3,1,8,8")
    head, *rows = done.stdout.splitlines()
    assert head.split() == [
        "kernel", "calls", "time/call", "share", "GFLOP/s", "GB/s", "roofline", "rule", "decisions", "from",
    ]  # fmt: skip
    assert any("conv2" in row for row in rows) and any("measured reads" in row for row in rows)
    assert "3 samples of" in done.stdout


def test_validate_compares_outputs_and_layers(kedge_here: Kedge, digits: Path) -> None:
    done = kedge_here("validate", digits_model(), digits, "--shape", "image=5,1,8,8", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [item["name"] for item in report["outputs"]] == ["probabilities"] and report["outcome"] == "ok"
    assert 0 <= report["outputs"][0]["max_abs"] < 1e-4
    assert len(report["layers"]) >= 3
    assert report["worst_layer"]["name"] in {layer["name"] for layer in report["layers"]}


def test_a_file_of_bfloat16_serves_every_command(kedge_here: Kedge, tmp_path: Path) -> None:
    """numpy writes bfloat16 as two bytes without a meaning."""
    import onnx
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "relu.onnx")
    model, artifact, data, out = (tmp_path / name for name in ("relu.onnx", "relu.kdg", "in.npz", "out.npz"))
    np.savez(data, x=np.array([[-1.5, 0, 1.5, 3]]).astype("bfloat16"))
    for command in (
        ("compile", model, "-o", artifact),
        ("run", artifact, "--inputs", data, "--outputs", out),
        ("validate", model, artifact, "--inputs", data),
        ("bench", artifact, "--inputs", data, "--repeat", "2"),
    ):
        done = kedge_here(*command)
        assert done.returncode == 0, done.stderr
    with np.load(out) as saved:
        assert saved["y"].view("bfloat16").astype(float).tolist() == [[0, 0, 1.5, 3]]
    np.savez(data, x=np.zeros((1, 4), np.float32))
    done = kedge_here("validate", model, artifact, "--inputs", data)
    assert done.returncode != 0 and "input 'x' has dtype float32, expected x: bfloat16" in done.stderr


def test_validate_fails_on_another_model_s_artifact(kedge_here: Kedge, digits: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(digits_model())
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.5)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    done = kedge_here("validate", tmp_path / "other.onnx", digits)
    assert done.returncode == 1
    assert "differs" in done.stdout
    told = json.loads(kedge_here("validate", tmp_path / "other.onnx", digits, "--no-layers", "--json").stdout)
    assert (told["ok"], told["outcome"]) == (False, "wrong_result")


def test_inspect_model_and_artifact(kedge_here: Kedge, digits: Path) -> None:
    model = kedge_here("inspect", digits_model())
    assert model.returncode == 0, model.stderr
    assert "Conv" in model.stdout and "every operator is supported" in model.stdout
    artifact = kedge_here("inspect", digits, "--json")
    facts = json.loads(artifact.stdout)
    assert facts["functions"][0]["name"] == "main"
    assert facts["functions"][0]["inputs"] == ["image: float32[N, 1, 8, 8]"]
    assert facts["variants"][0]["arch"] == "x86_64"


def test_doctor_finds_a_sound_installation(kedge_here: Kedge) -> None:
    done = kedge_here("doctor", "--json")
    assert done.returncode == 0, done.stdout
    by_check = {finding["check"]: finding["status"] for finding in json.loads(done.stdout)}
    assert by_check["compile and run here"] == "ok" and by_check["tracker"] == "note"


def test_doctor_on_a_machine_that_never_ran_kedge(kedge: Kedge, tmp_path: Path) -> None:
    fresh = tmp_path / "never" / "made"
    (finding,) = _cache_findings(kedge("doctor", "--json", env={**os.environ, "KEDGE_CACHE_DIR": str(fresh)}))
    assert finding["status"] == "ok" and str(fresh) in finding["found"]


def test_doctor_names_a_cache_that_cannot_be_written(
    kedge_here: Kedge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(tmp_path / "file"))
    done = kedge_here("doctor", "--json")
    (finding,) = _cache_findings(done)
    assert done.returncode == 1
    assert finding["status"] == "broken" and "KEDGE_CACHE_DIR" in finding["remedy"]


def _cache_findings(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    return [finding for finding in json.loads(done.stdout) if finding["check"] == "cache"]


def test_doctor_cannot_test_a_device_without_a_tracker() -> None:
    (finding,) = [finding for finding in diagnose(None, "arch=aarch64") if finding.check == "tracker"]
    assert finding.status == "broken" and "--tracker" in finding.remedy


def test_demo_without_a_board(kedge: Kedge) -> None:
    done = kedge("demo", "--no-arm", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["ok"] and row["accuracy"] > 0.95 and row["max_error"] < 1e-4
    assert row["timing"]["verdict"] in ("valid", "suspect")
    assert "compiling the digits model" in done.stderr


def test_help_has_examples(kedge_here: Kedge) -> None:
    assert kedge_here("--help").returncode == 0
    done = kedge_here("tracker", "start", "--help")
    assert done.returncode == 0 and "Examples:" in done.stdout


def every_command(group: Any, path: str = "kedge") -> Iterator[tuple[str, str]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command.help


def test_every_command_has_examples_and_leaves_its_lines_to_the_terminal() -> None:
    helps = dict(every_command(typer.main.get_command(tree())))
    assert len(helps) > 20
    for path, text in helps.items():
        _, found, examples = text.partition("Examples:\n\n")
        assert found and all(line.startswith(f"  {path}") for line in examples.split("\n\n")), path
        assert "\n" not in text.replace("\n\n", ""), path


def truncated(tmp_path: Path, digits: Path) -> list[object]:
    path = tmp_path / "cut.kdg"
    path.write_bytes(digits.read_bytes()[:-500])
    return ["run", path]


def corrupt(tmp_path: Path, digits: Path) -> list[object]:
    data = bytearray(digits.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "corrupt.kdg"
    path.write_bytes(data)
    return ["run", path]


def cut_model(tmp_path: Path, digits: Path) -> list[object]:
    path = tmp_path / "cut.onnx"
    path.write_bytes(digits_model().read_bytes()[:-700])
    return ["compile", path, "-o", tmp_path / "x.kdg"]


def wrong_name(tmp_path: Path, digits: Path) -> list[object]:
    np.savez(tmp_path / "in.npz", imge=np.zeros((1, 1, 8, 8), np.float32))
    return ["run", digits, "--inputs", tmp_path / "in.npz"]


def wrong_dtype(tmp_path: Path, digits: Path) -> list[object]:
    np.savez(tmp_path / "in.npz", image=np.zeros((1, 1, 8, 8), np.float64))
    return ["run", digits, "--inputs", tmp_path / "in.npz"]


def wrong_shape(tmp_path: Path, digits: Path) -> list[object]:
    np.savez(tmp_path / "in.npz", image=np.zeros((1, 1, 8, 9), np.float32))
    return ["run", digits, "--inputs", tmp_path / "in.npz"]


def one_array(tmp_path: Path, digits: Path) -> list[object]:
    np.save(tmp_path / "in.npy", np.zeros((1, 1, 8, 8), np.float32))
    return ["run", digits, "--inputs", tmp_path / "in.npy"]


def cut_inputs(tmp_path: Path, digits: Path) -> list[object]:
    np.savez(tmp_path / "in.npz", image=np.zeros((1, 1, 8, 8), np.float32))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "in.npz").read_bytes()[:-30])
    return ["run", digits, "--inputs", tmp_path / "cut.npz"]


def saved_module(tmp_path: Path) -> Path:
    kedge.load(digits_model()).save(tmp_path / "m.kmod")
    return tmp_path / "m.kmod"


def shape_beside_inputs(tmp_path: Path, digits: Path) -> list[object]:
    np.savez(tmp_path / "in.npz", image=np.zeros((1, 1, 8, 8), np.float32))
    return ["run", digits, "--inputs", tmp_path / "in.npz", "--shape", "image=2,1,8,8"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (truncated, 3, r"cut\.kdg.*not a whole \.kdg artifact"),
        (corrupt, 3, r"corrupt\.kdg"),
        (cut_model, 3, r"cut\.onnx"),
        (lambda t, d: ["validate", t / "no.onnx", d], 3, r"there is no file .*no\.onnx"),
        (wrong_name, 5, r"imge.*image"),
        (wrong_dtype, 5, r"image.*float32.*float64|image.*float64.*float32"),
        (wrong_shape, 5, r"image"),
        (lambda t, d: ["run", t / "nothing.kdg"], 3, r"nothing\.kdg: no such file"),
        (lambda t, d: ["compile", t / "nothing.onnx", "-o", t / "x.kdg"], 3, r"nothing\.onnx"),
        (one_array, 5, r"in\.npy.*savez"),
        (cut_inputs, 5, r"cut\.npz is not an \.npz"),
        (shape_beside_inputs, 2, r"--shape.*--inputs"),
        (lambda t, d: ["run", digits_model()], 3, r"is a model.*kedge compile .*digits\.onnx -o digits\.kdg"),
        (lambda t, d: ["run", d, "--shape", f"image={1 << 42},1,8,8"], 1, r"not enough memory.*hint: "),
        (lambda t, d: ["run", d, "--tracker", "127.0.0.1:1"], 2, r"--tracker without --device"),
        (lambda t, d: ["agent", "start", "--tracker", "127.0.0.1:1", "--label", "rack"], 2, r"KEY=VALUE"),
        (lambda t, d: ["compile", digits_model(), "-o", t / "no" / "x.kdg"], 3, r"cannot write.*mkdir -p"),
        (lambda t, d: ["compile", d, "-o", d], 3, r"is the model itself"),
        (
            lambda t, d: ["compile", digits_model(), "-o", t / "x.kdg", "--target", "raspbery-pi/4b"],
            2,
            r"raspberry-pi/4b",
        ),
        (lambda t, d: ["compile", digits_model(), "-o", t], 3, r"no regular file"),
        (lambda t, d: ["run", d, "--shape", "image=2,1,9,9"], 5, r"image"),
        (lambda t, d: ["run", d, "--shape", "image:2"], 2, r"--shape"),
        (lambda t, d: ["inspect", saved_module(t)], 2, r"is a saved module, not an ONNX model"),
        (lambda t, d: ["validate", saved_module(t), d], 2, r"is a saved module"),
        (lambda t, d: ["run", d, "--function", "train"], 2, r"train.*\n?.*main"),
        (lambda t, d: ["run", d, "--device", "x"], 6, r"--tracker"),
        (lambda t, d: ["run", d, "--on", "gpu"], 2, r"--on: there is no device 'gpu'.*\n.*opencl:1"),
        (lambda t, d: ["run", d, "--on", "opencl"], 4, r"no variant for opencl.*\n.*--target opencl"),
        (lambda t, d: ["devices", "--tracker", "127.0.0.1:1"], 6, r"127\.0\.0\.1:1"),
        (lambda t, d: ["devices", "--tracker", "nonsense"], 6, r"nonsense"),
    ],
)
def test_bad_input_is_one_clear_error(kedge_here: Kedge, digits: Path, tmp_path: Path, arguments, status, says) -> None:
    done = kedge_here(*arguments(tmp_path, digits))
    assert re.search(says, done.stderr, re.DOTALL), done.stderr
    assert done.returncode == status, done.stderr
    assert "error: " in done.stderr and done.stderr.count("error: ") == 1
    assert not (tmp_path / "x.kdg").exists()


def test_an_artifact_for_another_architecture_is_refused_here(kedge_here: Kedge, tmp_path: Path) -> None:
    path = tmp_path / "arm.kdg"
    done = kedge_here("compile", digits_model(), "--target", "raspberry-pi/4b", "-o", path)
    assert done.returncode == 0, done.stderr
    refused = kedge_here("run", path)
    assert refused.returncode == 4
    assert "aarch64" in refused.stderr and "hint: " in refused.stderr


def test_a_tracker_in_the_environment_does_not_choose_the_device(kedge: Kedge, digits: Path) -> None:
    done = kedge("run", digits, env={**os.environ, "KEDGE_TRACKER": "127.0.0.1:1"})
    assert done.returncode == 0, done.stderr


def test_tables_take_text_as_it_is_and_end_where_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    table = output.table("name", "detail")
    table.add_row("x", "a[b] [red]c[/red] :smile:")
    table.add_row("longer", "")
    output.show(table)
    assert capsys.readouterr().out == "name    detail\nx       a[b] [red]c[/red] :smile:\nlonger\n"


def test_a_log_gets_a_line_for_each_stage_that_someone_waits_for(capfd: pytest.CaptureFixture[str]) -> None:
    with output._plain_lines(output.stderr(), "quick", patience_s=60) as report:
        report("over at once")
    with output._plain_lines(output.stderr(), "slow", patience_s=0) as report:
        report("first")
        wait_until(lambda: "first" in capfd.readouterr().err)
        report("second")
        report("second")
    assert capfd.readouterr().err == "slow: second\n"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59, "59 s"), (60, "1 min"), (3600, "1 h"), (48 * 3600, "2 d")]
)
def test_ages_are_for_people(seconds: float, text: str) -> None:
    assert output.age_text(seconds) == text


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_alone_is_what_it_is_among_all(path: str) -> None:
    words = path.split()
    whole = dict(every_command(typer.main.get_command(tree())))
    alone = dict(every_command(typer.main.get_command(tree([*words, "--help"]))))
    assert " ".join(("kedge", *words)) in alone, "what was typed is there"
    assert {name for name in alone if name != "kedge"} == {
        name for name in whole if name == f"kedge {words[0]}" or name.startswith(f"kedge {words[0]} ")
    }
    assert all(alone[name] == whole[name] for name in alone if name != "kedge")


@pytest.mark.parametrize("words", [[], ["--help"], ["compil"], ["--show-completion"]])
def test_what_names_no_command_sees_all(words: list[str]) -> None:
    every = dict(every_command(typer.main.get_command(tree(words))))
    assert {f"kedge {path}" for path in COMMANDS} <= set(every)


IMPORTED = """
import sys
from kedge.cli import main
status = main()
print(status, [name for name in {modules} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("words", "modules"),
    [
        (["--version"], ["grpc", "numpy", "rich.table", "kedge.cli.output"]),
        (["compile", "--help"], ["grpc", "kedge.cli.jobs", "kedge.compiler.pipeline"]),
        (["devices", "--help"], ["grpc", "kedge.cli.compiling"]),
    ],
)
def test_a_command_imports_what_it_needs(words: list[str], modules: list[str]) -> None:
    program = [sys.executable, "-c", IMPORTED.format(modules=modules), *words]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout


def test_compiling_loads_no_grpc(tmp_path: Path) -> None:
    words = ["compile", digits_model(), "-o", tmp_path / "digits.kdg", "--target", "x86-64-v3"]
    program = [sys.executable, "-c", IMPORTED.format(modules=["grpc", "sqlalchemy"]), *map(str, words)]
    environment = {**os.environ, "KEDGE_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout
    assert (tmp_path / "digits.kdg").exists(), "it was compiled"


BROKEN_OFF = """
import sys
from kedge.cli import main

class Planted:
    def find_spec(self, name, path=None, target=None):
        if name == "kedge.cli.app":
            exec("raise {error}")

sys.meta_path.insert(0, Planted())
sys.exit(main())
"""


def test_ctrl_c_while_the_command_line_is_loading(tmp_path: Path) -> None:
    (tmp_path / "broken_off.py").write_text(BROKEN_OFF.format(error="KeyboardInterrupt"))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "broken_off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_bug_of_ours_is_called_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(**options: object) -> int:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("kedge.cli.app.tree", lambda words: broken)
    assert main() == EXIT_BUG
    errors = capsys.readouterr().err
    assert "ZeroDivisionError: planted" in errors and errors.endswith("kedge doctor --json\n")


FULL_DISK = """
mount -t tmpfs -o size=24k kedge-full "$1" || exit 99
folder=$1; shift
"$@" 2>&1; echo "status $?"
echo "left: $(ls -A "$folder")"
"""


@pytest.mark.parametrize("command", ["compile", "run"])
def test_a_full_disk_leaves_nothing_half_written(digits: Path, tmp_path: Path, command: str) -> None:
    """On a real file system without room, mounted where only this test sees it."""
    disk, inputs = tmp_path / "disk", tmp_path / "in.npz"
    disk.mkdir()
    np.savez(inputs, image=np.zeros((2000, 1, 8, 8), np.float32))
    arguments = {
        "compile": ["compile", digits_model(), "-o", disk / "x.kdg"],
        "run": ["run", digits, "--inputs", inputs, "--outputs", disk / "out.npz"],
    }[command]
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", str(disk)]
    done = subprocess.run([*unshare, *kedge_command(*arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "status" not in done.stdout:
        assert not os.environ.get("CI"), done.stderr
        pytest.skip(f"no mount in a user namespace here: {done.stderr.strip()}")
    assert "Traceback" not in done.stdout
    assert re.search(r"error: cannot write .*(x\.kdg|out\.npz): No space left on device", done.stdout), done.stdout
    assert re.search(r"^status [1-9]", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.endswith("left: \n"), done.stdout


def test_outputs_can_go_to_a_pipe_or_device(kedge: Kedge, digits: Path) -> None:
    done = kedge("run", digits, "--outputs", "/dev/full", "--json")
    assert done.returncode != 0 and "/dev/full" in done.stderr
    assert done.stdout == "", "said before it was saved"
    assert Path("/dev/full").is_char_device()


def test_one_artifact_for_several_machines(kedge_here: Kedge, tmp_path: Path) -> None:
    path = tmp_path / "many.kdg"
    targets = [word for target in ("x86-64", "x86-64-v3", "aws/graviton2") for word in ("--target", target)]
    assert kedge_here("compile", digits_model(), *targets, "-o", path).returncode == 0
    facts = json.loads(kedge_here("inspect", path, "--json").stdout)
    assert [variant["arch"] for variant in facts["variants"]] == ["x86_64", "x86_64", "aarch64"]
    # Weights are packed for vectors of 128 bits, which two of the machines have, and of 256.
    assert sum(member["name"].endswith(".safetensors") for member in facts["members"]) == 2
    assert kedge_here("run", path).returncode == 0


def test_completion_is_offered(kedge: Kedge) -> None:
    program = Path(sys.executable).parent / "kedge"
    done = subprocess.run([program, "--show-completion", "bash"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "_KEDGE_COMPLETE=complete_bash" in done.stdout
    environment = {**os.environ, "_KEDGE_COMPLETE": "complete_bash", "COMP_WORDS": "kedge dep", "COMP_CWORD": "1"}
    offered = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert offered.stdout.split() == ["deploy"], offered.stderr
    environment |= {"COMP_WORDS": "kedge compile --target raspberry-pi/4", "COMP_CWORD": "3"}
    offered = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert offered.stdout.split() == ["raspberry-pi/4b", "raspberry-pi/4b-32"], offered.stderr
