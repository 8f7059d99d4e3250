"""The product on an emulated board, from the command line: deploy, run, uninstall, and the whole demo."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from kedge.data import digits_model
from kedge.demo import processes
from kedge.deploy.emulated import EmulatedBoard
from support.boards import require
from support.commands import kedge_command

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
        try:
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


def test_an_unknown_host_key_is_refused(arm64: EmulatedBoard, tmp_path: Path) -> None:
    empty = tmp_path / "known_hosts"
    empty.touch()
    login = [f"{arm64.user}@{arm64.host}:{arm64.port}", "-i", arm64.key_path, "--known-hosts", empty]
    with processes.tracker(tmp_path / "tracker") as address:
        done = kedge("deploy", "board", *login, "--tracker", address)
    assert done.returncode != 0 and "ssh-keyscan" in done.stderr


def test_the_demo_with_its_board() -> None:
    require("arm64")
    done = kedge("demo", "--json")
    assert done.returncode == 0, done.stderr
    here, board = json.loads(done.stdout)
    assert (here["arch"], board["arch"]) == ("x86_64", "aarch64")
    assert all(row["ok"] and row["accuracy"] > 0.95 and row["max_error"] < 1e-4 for row in (here, board))
    assert board["timing"]["verdict"] == "emulated"
