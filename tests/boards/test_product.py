"""The product on an emulated board, from the command line: deploy, run, uninstall, and the whole demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kedge import cli
from kedge.data import digits_model
from kedge.demo import processes
from kedge.deploy import board as remote
from kedge.deploy.emulated import EmulatedBoard
from kedge.rpc.client import Fleet
from support.boards import require
from support.commands import interruptible_command, kedge_command

pytestmark = pytest.mark.board


def kedge(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(kedge_command(*arguments), capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_deploy_run_and_uninstall(arm64: EmulatedBoard, tmp_path: Path) -> None:
    login = [f"{arm64.user}@{arm64.host}:{arm64.port}", "-i", arm64.key_path, "--known-hosts", arm64.known_hosts_path]
    artifact = tmp_path / "digits.kdg"
    with processes.tracker(tmp_path / "tracker") as address:
        deployed = kedge("deploy", "board", *login, "--tracker", address, "--name", "arm-1", "--label", "rack=a")
        assert deployed.returncode == 0, deployed.stderr
        assert "'arm-1'" in deployed.stdout and "aarch64" in deployed.stdout
        # The emulated board has nothing that starts programs.
        assert "after a restart of the board it is not started: systemctl: No such file" in deployed.stdout
        assert "hint: have the board run at its start: " in deployed.stderr and "launch.py start" in deployed.stderr
        try:
            told = json.loads(kedge("deploy", "board", *login, "--status", "--json").stdout)
            assert told["name"] == "arm-1" and told["pid"] is not None and told["boot"]["by"] is None
            (device,) = json.loads(kedge("devices", "rack=a", "--tracker", address, "--json").stdout)
            assert device["name"] == "arm-1" and device["emulated"]
            assert kedge("compile", digits_model(), "--target", device["target"], "-o", artifact).returncode == 0
            there = ("--device", "arch=aarch64", "--tracker", address)
            validated = kedge("validate", digits_model(), artifact, "--json", *there)
            assert validated.returncode == 0, validated.stderr
            assert json.loads(validated.stdout)["ok"]
            bench = kedge("bench", artifact, "--repeat", "3", "--min-repeat-ms", "1", "--json", *there)
            assert json.loads(bench.stdout)["verdict"] == "emulated", bench.stderr
        finally:
            removed = kedge("deploy", "board", *login, "--uninstall")
        assert removed.returncode == 0, removed.stderr
        assert "no agent" in kedge("deploy", "board", *login, "--uninstall").stdout
        assert "no agent is installed" in kedge("deploy", "board", *login, "--status").stdout


def test_an_unknown_host_key_is_refused(arm64: EmulatedBoard, tmp_path: Path) -> None:
    empty = tmp_path / "known_hosts"
    empty.touch()
    login = [f"{arm64.user}@{arm64.host}:{arm64.port}", "-i", arm64.key_path, "--known-hosts", empty]
    with processes.tracker(tmp_path / "tracker") as address:
        done = kedge("deploy", "board", *login, "--tracker", address)
    assert done.returncode != 0 and "ssh-keyscan" in done.stderr


def broken_off(
    moment: str, *arguments: str | Path, number: signal.Signals = signal.SIGINT, **options: Any
) -> tuple[int, str]:
    """Start a command, send the signal once it has said `moment`; its status, and what it said afterwards."""
    command = interruptible_command(*arguments)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if moment in line:
                break
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    assert "Traceback" not in rest
    return process.returncode, rest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_deployment_that_is_broken_off_leaves_the_board_as_it_was(
    arm64: EmulatedBoard, tmp_path: Path, number: signal.Signals
) -> None:
    board = f"{arm64.user}@{arm64.host}:{arm64.port}"
    login = [board, "-i", arm64.key_path, "--known-hosts", arm64.known_hosts_path]
    with processes.tracker(tmp_path / "tracker") as address:
        command = ("deploy", "board", *login, "--tracker", address, "--name", "arm-2")
        status, said = broken_off("deploy ", *command, number=number)
    assert status == (130 if number is signal.SIGINT else -number)
    assert f"{board}: broken off; the board is as it was before" in said, said
    assert "no agent" in kedge("deploy", "board", *login, "--uninstall").stdout


def test_an_interrupt_after_the_deployment_says_that_the_agent_runs(
    arm64: EmulatedBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    board = f"{arm64.user}@{arm64.host}:{arm64.port}"
    login = [board, "-i", str(arm64.key_path), "--known-hosts", str(arm64.known_hosts_path)]

    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    def deployed(*arguments: Any, **options: Any) -> Any:
        done = deploy_board(*arguments, **options)
        monkeypatch.setattr(Fleet, "wait_for_device", interrupted)
        return done

    deploy_board = remote.deploy_board
    monkeypatch.setattr(remote, "deploy_board", deployed)
    with processes.tracker(tmp_path / "tracker") as address:
        monkeypatch.setattr("sys.argv", ["kedge", "deploy", "board", *login, "--tracker", address, "--name", "arm-3"])
        try:
            assert cli.main() == 130
            said = capfd.readouterr().err
            assert "the new agent arm-3 runs on the board" in said and "--uninstall" in said, said
            assert "as it was before" not in said
        finally:
            removed = kedge("deploy", "board", *login, "--uninstall")
    assert "the agent is removed" in removed.stdout, removed.stderr


def test_a_name_in_use_is_refused(arm64: EmulatedBoard, tmp_path: Path) -> None:
    login = [f"{arm64.user}@{arm64.host}:{arm64.port}", "-i", arm64.key_path, "--known-hosts", arm64.known_hosts_path]
    with (
        processes.tracker(tmp_path / "tracker") as address,
        processes.agent(address, "host1", tmp_path / "agent"),
    ):
        done = kedge("deploy", "board", *login, "--tracker", address, "--name", "host1")
    assert done.returncode == 1 and "under the name 'host1'" in done.stderr, done.stderr
    assert "no agent" in kedge("deploy", "board", *login, "--uninstall").stdout


def test_a_demo_that_is_broken_off_waits_for_no_deployment(tmp_path: Path) -> None:
    require("arm64")
    status, said = broken_off("connecting to board@", "demo", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert status == 130 and said.endswith("interrupted\n"), said
    assert "is online" not in said
    assert list(tmp_path.iterdir()) == []


def test_the_demo_with_its_board() -> None:
    require("arm64")
    done = kedge("demo", "--json")
    assert done.returncode == 0, done.stderr
    here, board = json.loads(done.stdout)
    assert (here["arch"], board["arch"]) == ("x86_64", "aarch64")
    assert all(row["ok"] and row["accuracy"] > 0.95 and row["max_error"] < 1e-4 for row in (here, board))
    assert board["timing"]["verdict"] == "emulated"
