"""The fleet from the command line: real trackers and agents in processes of their own."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from kedge import Artifact, connect
from kedge.data import digits_model, digits_test
from kedge.demo import processes
from kedge.diagnosis import diagnose
from kedge.rpc.errors import JobError
from support.agents import wait_for
from support.commands import Kedge, check_digits_profile, interruptible_command, kedge_command
from support.doubling import gpu_artifact


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a tracker with one agent of this machine."""
    folder = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        address = stack.enter_context(processes.tracker(folder / "tracker"))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("POCL_DEBUG", "error")  # it says nowhere else why it does not build a kernel
            stack.enter_context(processes.agent(address, "bench-1", folder / "agent"))
        yield address


def test_devices_lists_what_the_agent_reports(kedge_here: Kedge, fleet: str) -> None:
    done = kedge_here("devices", "bench-1", "--tracker", fleet, "--json")
    assert done.returncode == 0, done.stderr
    (device,) = json.loads(done.stdout)
    assert device["name"] == "bench-1" and device["arch"] == os.uname().machine
    table = kedge_here("devices", "--tracker", fleet)
    assert "bench-1" in table.stdout and "idle" in table.stdout
    nobody = kedge_here("devices", "arch=sparc", "--tracker", fleet)
    assert nobody.returncode == 1 and "arch=sparc" in nobody.stderr and "hint: " in nobody.stderr


def test_run_bench_validate_and_jobs_on_a_device(kedge_here: Kedge, fleet: str, digits: Path, tmp_path: Path) -> None:
    images, labels = digits_test()
    np.savez(tmp_path / "in.npz", image=images)
    there = ("--device", f"arch={os.uname().machine}", "--tracker", fleet)
    run = kedge_here("run", digits, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz", *there)
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "out.npz") as saved:
        assert (saved["probabilities"].argmax(1) == labels).mean() > 0.95
    bench = kedge_here("bench", digits, "--repeat", "5", "--min-repeat-ms", "1", "--json", *there)
    assert bench.returncode == 0, bench.stderr
    assert len(json.loads(bench.stdout)["samples_ns"]) == 5
    profiled = kedge_here("bench", digits, "--profile", "--repeat", "3", "--min-repeat-ms", "1", "--json", *there)
    assert profiled.returncode in (0, 1), profiled.stderr  # 1: the machine is too busy to believe the timing
    check_digits_profile(json.loads(profiled.stdout))
    validated = kedge_here("validate", digits_model(), digits, "--json", *there)
    assert validated.returncode == 0, validated.stderr
    assert json.loads(validated.stdout)["ok"]
    jobs = json.loads(kedge_here("jobs", "--tracker", fleet, "--json").stdout)
    assert len(jobs) >= 5
    assert all(job["result"]["outcome"]["kind"] == "ok" for job in jobs)


def test_jobs_are_chosen_by_what_is_asked_for(kedge_here: Kedge, fleet: str, digits: Path, tmp_path: Path) -> None:
    at = ("--tracker", fleet)
    assert kedge_here("run", digits, "--device", "bench-1", *at).returncode == 0

    def listed(*words: str | Path) -> list[str]:
        done = kedge_here("jobs", *words, *at, "--json")
        assert done.returncode == 0, done.stderr
        return [job["id"] for job in json.loads(done.stdout)]

    newest = listed("--limit", "1")
    digest = Artifact.load(digits).digest
    assert listed("--artifact", digits, "--device", "bench-1", "--since", "1h", "--limit", "1") == newest
    assert listed("--state", "done", "--artifact", digest[:8], "--limit", "1") == newest == listed(*newest)
    assert listed("--state", "queued", "--state", "running") == listed("--device", "bench-2") == []
    nobodys = kedge_here("jobs", "--user", "nobody-at-all", *at)
    assert nobodys.returncode == 0 and nobodys.stderr == "there is no job that fits --user nobody-at-all\n"
    missing = kedge_here("jobs", newest[0], "no-such-job", *at)
    assert missing.returncode == 1 and newest[0] in missing.stdout
    assert missing.stderr == "there is no job no-such-job\n"
    other = kedge_here("jobs", newest[0], "--state", "queued", "--since", "1h", *at)
    assert other.returncode == 1
    assert other.stderr == f"there is no job {newest[0]} that fits --state queued --since 1h\n"
    for wrong in (("--state", "ended"), ("--artifact", "no.such"), ("--since", "noon")):
        refused = kedge_here("jobs", *wrong, *at)
        assert refused.returncode == 2 and "hint: " in refused.stderr, refused.stderr


def test_the_result_of_a_job_whose_command_is_gone(kedge_here: Kedge, fleet: str, digits: Path, tmp_path: Path) -> None:
    at = ("--tracker", fleet)
    images, labels = digits_test()
    with connect(fleet) as client:
        job = client.run(Artifact.load(digits), {"image": images}, device="bench-1")
        timed = client.bench(Artifact.load(digits), {"image": images}, device="bench-1", repeat=5, min_repeat_ms=1)
        wrong = client.run(Artifact.load(digits), {"image": images}, device="bench-2")
    done = kedge_here("result", job.id, "--outputs", tmp_path / "out.npz", *at)
    assert done.returncode == 0, done.stderr
    assert f"job {job.id} on bench-1: ok\n" in done.stdout and "run " in done.stdout and "probabilities" in done.stdout
    with np.load(tmp_path / "out.npz") as saved:
        assert (saved["probabilities"].argmax(1) == labels).mean() > 0.95
    full = kedge_here("result", job.id, "--outputs", "/dev/full", "--json", *at)
    assert full.returncode != 0 and "/dev/full" in full.stderr and full.stdout == "", "said before it was saved"
    said = json.loads(kedge_here("result", timed.id, "--json", *at).stdout)
    assert len(said["timing"]["samples_ns"]) == 5 and said["result"]["outcome"]["kind"] == "ok"
    late = kedge_here("result", wrong.id, "--timeout", "0.2", *at)
    assert late.returncode == 8 and "is not done after 0.2 s" in late.stderr
    kedge_here("cancel", wrong.id, *at)
    ended = kedge_here("result", wrong.id, *at)
    assert ended.returncode == 8 and "cancelled" in ended.stderr, ended.stderr
    unknown = kedge_here("result", "no-such-job", *at)
    assert unknown.returncode != 0 and "no-such-job" in unknown.stderr


@pytest.mark.parametrize("command", ["run", "bench", "validate", "compare"])
def test_what_is_asked_of_each_job_is_the_same_for_all_commands(
    kedge_here: Kedge, fleet: str, digits: Path, command: str
) -> None:
    artifacts = {"validate": (digits_model(), digits), "compare": (digits, digits)}.get(command, (digits,))
    at = ("--device", "bench-1", "--tracker", fleet)
    terms = ("--queue-timeout", "60", "--transfer-timeout", "61", "--load-timeout", "62.5", "--timeout", "63")
    short = {"bench": ("--repeat", "2"), "compare": ("--blocks", "6", "--repeat", "1", "--min-repeat-ms", "1")}
    done = kedge_here(command, *artifacts, *at, *terms, "--priority", "-3", *short.get(command, ()))
    assert done.returncode in (0, 1), done.stderr
    (job,) = json.loads(kedge_here("jobs", "--tracker", fleet, "--limit", "1", "--json").stdout)
    assert job["spec"]["priority"] == -3
    assert [*job["spec"]["deadlines"].values()] == [60_000, 61_000, 62_500, 63_000]


@pytest.fixture
def quiet(fleet: str, tmp_path: Path) -> Iterator[str]:
    """A device of whose timings nothing is known: other tests compare on the one that they share."""
    with processes.agent(fleet, "quiet-1", tmp_path / "agent"):
        yield "quiet-1"


def test_the_noise_of_a_device_is_its_trackers_to_remember(
    kedge_here: Kedge, fleet: str, quiet: str, digits: Path
) -> None:
    short = ("--blocks", "6", "--repeat", "1", "--min-repeat-ms", "1", "--device", quiet, "--tracker", fleet)
    first = kedge_here("compare", digits, digits, "--json", *short)
    assert first.returncode == 0, first.stderr
    said = json.loads(first.stdout)
    assert (said["device"], said["noise_kept"]) == (quiet, None), said
    assert not any("not kept" in reason for reason in said["reasons"]), said["reasons"]
    (device,) = json.loads(kedge_here("devices", quiet, "--tracker", fleet, "--json").stdout)
    (floor,) = device["noise"]
    assert floor["relative"] == pytest.approx(said["noise_here"]) and floor["target"] == device["target"]
    assert (floor["comparisons"], floor["num_threads"], floor["on"], floor["stale"]) == (1, 1, "cpu", "")
    told = kedge_here("devices", quiet, "-v", "--tracker", fleet).stdout
    assert f"noise of timings with 1 thread on cpu: {floor['relative']:.2%} (1 compared, the last " in told
    assert floor["software"] in told.partition("noise of timings")[2]


def test_a_drained_device_lets_jobs_wait_and_says_why(kedge_here: Kedge, fleet: str, digits: Path) -> None:
    at = ("--tracker", fleet)
    drained = kedge_here("drain", "bench-1", "--reason", "a new fan", *at)
    assert (drained.returncode, drained.stdout) == (0, "bench-1: maintenance\n"), drained.stderr
    try:
        images, _ = digits_test()
        with connect(fleet) as client:
            waiting = client.run(Artifact.load(digits), {"image": images[:1]}, device="bench-1")
        (device,) = json.loads(kedge_here("devices", *at, "--json").stdout)
        assert device["state"] == "maintenance" and "a new fan" in device["detail"]
        listed = next(row for row in kedge_here("jobs", *at).stdout.splitlines() if waiting.id in row)
        assert "queued" in listed and "a new fan" in listed
        seen = kedge_here("top", "--once", *at).stdout
        assert "1 maintenance" in seen and "1 waiting" in seen and waiting.id in seen
        seen = json.loads(kedge_here("top", *at, "--json").stdout)
        assert [job["position"] for job in seen["jobs"]] == [1]
        with connect(fleet) as client:
            other = client.run(Artifact.load(digits), {"image": images[:1]}, device="bench-1")
        cancelled = kedge_here("cancel", waiting.id, "no-such-job", other.id, *at)
        assert cancelled.stdout == f"{waiting.id}: cancelled\n{other.id}: cancelled\n", cancelled.stderr
        assert cancelled.returncode == 1 and "no-such-job" in cancelled.stderr
    finally:
        resumed = kedge_here("resume", "bench-1", *at)
    assert (resumed.returncode, resumed.stdout) == (0, "bench-1: idle\n"), resumed.stderr
    unknown = kedge_here("drain", "bench-9", *at)
    assert unknown.returncode == 7 and "bench-9" in unknown.stderr and "hint: " in unknown.stderr


def test_a_device_is_reserved_and_given_back(kedge_here: Kedge, fleet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    at = ("--tracker", fleet)
    done = kedge_here("reserve", f"arch={os.uname().machine}", "--for", "30min", "--reason", "a demo", *at, "--json")
    assert done.returncode == 0, done.stderr
    reservation = json.loads(done.stdout)
    assert reservation["device"] == "bench-1"
    assert reservation["until_unix_ms"] - reservation["from_unix_ms"] == 1_800_000
    assert reservation["id"] in kedge_here("devices", *at).stdout
    again = kedge_here("reserve", "bench-1", *at)
    assert again.returncode == 7 and "can be reserved" in again.stderr
    released = kedge_here("release", reservation["id"], *at)
    assert released.returncode == 0 and released.stdout.startswith("released: bench-1 from "), released.stderr
    gone = kedge_here("release", reservation["id"], *at)
    assert gone.returncode == 1 and reservation["id"] in gone.stderr
    assert kedge_here("reserve", "bench-1", "--for", "soon", *at).returncode == 2
    later = kedge_here("reserve", "bench-1", "--from", "2126-11-27 14:00", *at)
    assert later.returncode == 2 and "within 366 days" in later.stderr
    soon = datetime.now() + timedelta(days=2)
    later = kedge_here("reserve", "bench-1", "--from", f"{soon:%Y-%m-%d} 14:00", "--for", "30min", *at)
    shown = f"from {soon:%Y-%m-%d} 14:00 until {soon:%Y-%m-%d} 14:30"
    assert later.returncode == 0 and shown in later.stdout, later.stderr
    number = later.stdout.split()[-1]
    assert f"{shown} ({number})" in " ".join(kedge_here("devices", *at).stdout.split())
    assert kedge_here("release", number, *at).returncode == 0


def test_a_session_is_listed_and_can_be_cancelled(kedge_here: Kedge, fleet: str) -> None:
    with connect(fleet) as client, client.session("bench-1") as device:
        (row,) = [line for line in kedge_here("jobs", "--tracker", fleet).stdout.splitlines() if device.id in line]
        assert row.split()[2:6] == ["session", "running", "-", "bench-1"]
        assert kedge_here("cancel", device.id, "--tracker", fleet).returncode == 0
        with pytest.raises(JobError, match="is over: cancelled"):
            while True:
                device.files()


def test_top_ends_with_ctrl_c_and_gives_the_terminal_back(fleet: str) -> None:
    here, there = pty.openpty()
    top = subprocess.Popen(interruptible_command("top", "--tracker", fleet), stdout=there, stderr=there, stdin=there)
    os.close(there)
    shown = b""
    while b"bench-1" not in shown:
        shown += os.read(here, 4096)
    top.send_signal(signal.SIGINT)
    while chunk := read_terminal(here):
        shown += chunk
    assert top.wait(60) == 0
    assert shown.rindex(b"\x1b[?1049l") > shown.index(b"\x1b[?1049h"), "the other screen is left"
    assert shown.rindex(b"\x1b[?25h") > shown.index(b"\x1b[?25l"), "the cursor is back"
    os.close(here)


def read_terminal(fd: int) -> bytes:
    """What comes next; empty once nobody has the other end (Linux says EIO)."""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""


def test_an_artifact_for_another_device_is_refused_before_it_is_sent(
    kedge_here: Kedge, fleet: str, tmp_path: Path
) -> None:
    path = tmp_path / "arm.kdg"
    assert kedge_here("compile", digits_model(), "--target", "raspberry-pi/4b", "-o", path).returncode == 0
    done = kedge_here("run", path, "--device", "bench-1", "--tracker", fleet)
    assert done.returncode == 4 and "aarch64" in done.stderr


def test_no_device_matches(kedge_here: Kedge, fleet: str, digits: Path) -> None:
    done = kedge_here("run", digits, "--device", "key=rpi4", "--tracker", fleet)
    assert done.returncode == 7 and "key=rpi4" in done.stderr


def test_doctor_tests_every_hop(kedge_here: Kedge, fleet: str) -> None:
    done = kedge_here("doctor", "--tracker", fleet, "--device", "bench-1", "--json")
    assert done.returncode == 0, done.stdout
    by_check = {finding["check"]: finding["status"] for finding in json.loads(done.stdout)}
    assert by_check["a job on the device"] == "ok"


def test_doctor_names_a_tracker_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (finding,) = [finding for finding in diagnose(address, None) if finding.check == "tracker"]
    assert finding.status == "broken" and address in finding.found and finding.remedy


def test_a_port_in_use_is_named(kedge: Kedge, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = kedge("tracker", "start", "--port", str(port), "--data-dir", tmp_path)
    assert done.returncode == 6 and str(port) in done.stderr and "hint: " in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_tracker_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    command = interruptible_command("tracker", "start", "--port", "0", "--data-dir", tmp_path / "data")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("kedge tracker ready at 127.0.0.1:")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_an_agent_without_a_good_address_says_so(kedge: Kedge, tmp_path: Path) -> None:
    done = kedge("agent", "start", "--tracker", "host:no-port", "--data-dir", tmp_path)
    assert done.returncode != 0 and "no-port" in done.stderr
    unnamed = kedge("agent", "start", env={k: v for k, v in os.environ.items() if k != "KEDGE_TRACKER"})
    assert unnamed.returncode == 6 and "--tracker" in unnamed.stderr


def test_agents_start_in_any_folder_and_beside_each_other(kedge: Kedge, fleet: str, tmp_path: Path) -> None:
    """The folder holds a queue.py of the user's own; the agents' data folders are named after them."""
    (tmp_path / "queue.py").write_text("jobs = ['the user has a queue of his own']\n")
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    agents = [
        subprocess.Popen(
            kedge_command("agent", "start", "--tracker", fleet, "--name", name),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    try:
        for name, agent in zip(("one", "two"), agents, strict=True):
            assert agent.stdout is not None and agent.stderr is not None
            line = agent.stdout.readline()
            assert line.startswith(f"kedge agent {name} ready"), agent.stderr.read()
        assert sorted(path.name for path in (tmp_path / "state" / "kedge" / "agent").iterdir()) == ["one", "two"]
    finally:
        for agent in agents:
            agent.terminate()
            agent.communicate(timeout=60)


def test_a_gpu_is_chosen_by_label_and_by_name(kedge_here: Kedge, fleet: str, tmp_path: Path) -> None:
    gpu_artifact().save(tmp_path / "gpu.kdg")
    (device,) = json.loads(kedge_here("devices", "bench-1", "--tracker", fleet, "--json").stdout)
    gpus = [gpu for gpu in device["accelerators"] if gpu["kind"] == "opencl"]
    there = ("--device", "opencl>=1", "--tracker", fleet)
    if not gpus:
        done = kedge_here("run", tmp_path / "gpu.kdg", "--device", "bench-1", "--tracker", fleet)
        assert done.returncode == 4 and "needs an OpenCL device" in done.stderr
        pytest.skip("no OpenCL device")
    assert gpus[0]["name"] in kedge_here("devices", "--tracker", fleet).stdout
    done = kedge_here("bench", tmp_path / "gpu.kdg", "--shape", "x=100", "--on", "opencl:0", "--repeat", "3", *there)
    assert done.returncode == 0 and done.stdout.startswith("on opencl:0\n"), done.stderr
    wrong = kedge_here("run", tmp_path / "gpu.kdg", "--shape", "x=100", "--on", "cpu", *there)
    assert wrong.returncode == 4 and "no variant for cpu" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["jobs", "--limit", "3000000000"], "--limit"),
        (["jobs", "--limit", "0"], "--limit"),
        (["run", "--threads", "3000000000"], "--threads"),
        (["run", "--device", "bench-1", "--threads", "3000000000"], "--threads"),
        (["run", "--device", "bench-1", "--timeout", "0"], "--timeout"),
        (["run", "--timeout", "5"], "--timeout without --device"),
        (["bench", "--priority", "-1"], "--priority without --device"),
        (["run", "--queue-timeout", "5"], "--queue-timeout without --device"),
        (["run", "--device", "bench-1", "--load-timeout", "0"], "--load-timeout"),
        (["bench", "--device", "bench-1", "--min-repeat-ms", "1e14"], "min_repeat_ms"),
        (["bench", "--device", "bench-1", "--min-repeat-ms", "inf"], "min_repeat_ms"),
        (["bench", "--device", "bench-1", "--repeat", "99999999999999999999"], "repeat"),
        (["bench", "--min-repeat-ms", "nan"], "repeat"),
        (["bench", "--number", "99999999999999999999"], "number"),
    ],
)
def test_numbers_out_of_range_are_the_users_mistake(
    kedge_here: Kedge, fleet: str, digits: Path, arguments: list[str], words: str
) -> None:
    command, *options = arguments
    there = ["--tracker", fleet] if command == "jobs" or "--device" in options else []
    done = kedge_here(command, *([] if command == "jobs" else [digits]), *options, *there)
    assert done.returncode in (2, 5) and words in done.stderr, done.stderr


def test_a_run_has_a_deadline_on_request(kedge_here: Kedge, fleet: str, digits: Path) -> None:
    there = ("--device", "bench-1", "--tracker", fleet)
    slow = ("bench", digits, "--repeat", "1", "--min-repeat-ms", "60000")
    done = kedge_here(*slow, *there, "--timeout", "0.5")
    assert done.returncode == 8 and "timeout in stage run" in done.stderr and "--timeout" in done.stderr, done.stderr
    assert kedge_here("run", digits, *there, "--timeout", "60").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_stops_a_command_stops_its_job(
    kedge_here: Kedge, fleet: str, digits: Path, number: signal.Signals
) -> None:
    slow = ("bench", digits, "--repeat", "1", "--min-repeat-ms", "60000", "--device", "bench-1", "--tracker", fleet)
    process = subprocess.Popen(interruptible_command(*slow), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def newest() -> list[tuple[str, str | None]]:
        """The last job; none before the command has started."""
        jobs = json.loads(kedge_here("jobs", "--limit", "1", "--tracker", fleet, "--json").stdout)
        return [(job["state"], job["result"] and job["result"]["outcome"]["kind"]) for job in jobs]

    wait_for(lambda: newest() == [("running", None)], "the job to run")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number is signal.SIGINT else -signal.SIGTERM), errors
    assert "Traceback" not in errors
    wait_for(lambda: newest() == [("done", "cancelled")], "the job to be cancelled")
