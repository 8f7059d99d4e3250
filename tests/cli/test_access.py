"""Joining, tokens and enrolled devices from the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.demo import processes
from kedge.rpc.errors import AuthenticationError
from kedge.rpc.security import credentials, signing
from kedge.rpc.transport import parse_address
from support.commands import Kedge


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with processes.tracker(tmp_path_factory.mktemp("access") / "tracker") as address:
        yield address


def test_a_user_joins_and_is_who_the_token_says(
    kedge: Kedge, kedge_here: Kedge, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_ann(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as hers:
            hers.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "ann"))
            return kedge_here(*arguments)

    create = ("tracker", "token", "create", "--role", "submit", "--user", "ann", "--expires", "2d")
    made = kedge_here(*create, "--tracker", address)
    assert made.returncode == 0 and "submit, user ann, until 20" in made.stderr, made.stderr
    command, string = re.fullmatch(r"(kedge join) '(kedge1\.\S+)'\n", made.stdout).groups()  # type: ignore[union-attr]
    stranger = as_ann("jobs", "--tracker", address)
    assert stranger.returncode == 9 and "no credentials" in stranger.stderr and "kedge join" in stranger.stderr
    joined = as_ann("join", string)
    assert joined.returncode == 0 and f"KEDGE_TRACKER={address}" in joined.stderr and command
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "ann").rglob("*"))
    assert as_ann("jobs", "--tracker", address).returncode == 0
    refused = as_ann(*create, "--tracker", address)
    assert refused.returncode == 10 and "may not create tokens: that takes the role admin" in refused.stderr
    assert "--role admin --user ann" in refused.stderr, "what to do next"
    ann = {**os.environ, "KEDGE_CONFIG_DIR": str(tmp_path / "ann")}
    enrolling = kedge("agent", "start", "--tracker", address, "--name", "x", "--data-dir", tmp_path / "x", env=ann)
    assert enrolling.returncode == 10 and "hint:" in enrolling.stderr
    listed = json.loads(kedge_here("tracker", "token", "list", "--json", "--tracker", address).stdout)
    (token,) = [token for token in listed if token["user"] == "ann"]
    assert token["state"] == "good" and token["expires_s"] - token["created_s"] == 2 * 86_400
    assert "ann" in kedge_here("tracker", "token", "list", "--tracker", address).stdout
    assert kedge_here("tracker", "token", "revoke", token["id"], "--tracker", address).returncode == 0
    over = as_ann("jobs", "--tracker", address)
    assert over.returncode == 9 and "was revoked" in over.stderr
    unknown = kedge_here("tracker", "token", "revoke", "nonsense", "--tracker", address)
    assert unknown.returncode == 1 and "no token 'nonsense'" in unknown.stderr
    public = as_ann("signer").stdout.strip()
    assert public == signing.public_key(signing.own_key(tmp_path / "ann") or b"").hex()


def test_a_device_joins_and_is_revoked(kedge: Kedge, kedge_here: Kedge, address: str, tmp_path: Path) -> None:
    with processes.agent(address, "cli-1", tmp_path / "agent"):
        (device,) = json.loads(kedge_here("tracker", "enrolled", "--json", "--tracker", address).stdout)
        assert device["device"] == "cli-1" and not device["revoked_s"]
        assert kedge_here("tracker", "revoke", "cli-1", "--tracker", address).returncode == 0
    assert re.search(r"cli-1 .* 20\d\d-", kedge_here("tracker", "enrolled", "--tracker", address).stdout)
    gone = kedge("agent", "start", "--name", "cli-1", "--data-dir", tmp_path / "agent" / "data")
    assert gone.returncode == AuthenticationError.exit_status and "was revoked" in gone.stderr


@pytest.mark.parametrize("wrong", [("--require-signer", "abc"), ("--measure-cores", "9999")])
def test_a_wrong_option_makes_no_token(
    kedge: Kedge, kedge_here: Kedge, address: str, tmp_path: Path, wrong: tuple[str, str]
) -> None:
    done = kedge("agent", "start", "--tracker", address, "--name", "y", "--data-dir", tmp_path / "y", *wrong)
    assert done.returncode == 2 and wrong[1] in done.stderr and "hint:" in done.stderr, done.stderr
    listed = json.loads(kedge_here("tracker", "token", "list", "--json", "--tracker", address).stdout)
    assert not [token for token in listed if token["device"] == "y"]


def test_a_new_tracker_prints_how_to_join_and_only_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ("kedge", "tracker", "start", "--port", "0", "--data-dir", str(tmp_path / "data"))
    said = []
    for _ in range(2):
        with processes.service("tracker", *command, log=log) as process:
            processes.ready_line("tracker", process, log)
        assert process.stdout is not None and process.stdout.closed
        said.append(sorted(path.name for path in (tmp_path / "data" / "security").iterdir()))
    assert said[0] == said[1] and {"ca.key", "ca.pem", "admin.token", "audit.jsonl", "tokens.json"} <= set(said[0])
    tokens = json.loads((tmp_path / "data" / "security" / "tokens.json").read_text())
    assert [token["role"] for token in tokens] == ["admin", "enrol"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["join", "nonsense"], 2, "a join string begins with"),
        (["tracker", "token", "create", "--role", "king", "--user", "ann"], 2, "'king' is no role"),
        (["tracker", "token", "create", "--role", "read"], 2, "cannot be a user's name"),
        (
            ["tracker", "token", "create", "--role", "read", "--user", "ann", "--expires", "soon"],
            2,
            "'soon' is no duration",
        ),
        (["tracker", "token", "create", "--role", "read", "--user", "ann", "--device", "d"], 2, "is for a device"),
        (["tracker", "revoke", "nobody"], 1, "no device 'nobody' is enrolled"),
    ],
)
def test_mistakes_are_named(kedge_here: Kedge, address: str, arguments: list[str], status: int, words: str) -> None:
    there = [] if arguments[0] == "join" else ["--tracker", address]
    done = kedge_here(*arguments, *there)
    assert done.returncode == status and words in done.stderr and "hint:" in done.stderr, done.stderr


def test_a_device_string_is_no_users(kedge_here: Kedge, address: str) -> None:
    made = kedge_here(
        "tracker", "token", "create", "--role", "enrol", "--device", "d-1", "--tracker", address, "--json"
    )
    done = kedge_here("join", json.loads(made.stdout)["join"])
    assert done.returncode == 2 and "kedge agent start --join" in done.stderr


def test_a_tracker_without_security_has_no_tokens(kedge: Kedge, kedge_here: Kedge, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ("kedge", "tracker", "start", "--port", "0", "--insecure-loopback", "--data-dir", str(tmp_path / "data"))
    with processes.service("tracker", *command, log=log) as process:
        place = processes.ready_line("tracker", process, log).split()[-1]
        assert credentials.find(parse_address(place)).tls is None
        assert kedge_here("jobs", "--tracker", place).returncode == 0
        with processes.agent(place, "plain-1", tmp_path / "agent"):
            assert kedge_here("devices", "plain-1", "--tracker", place).returncode == 0
        done = kedge_here("tracker", "token", "list", "--tracker", place)
        assert done.returncode == 2 and "lets everybody in" in done.stderr
    assert "plaintext" in log.read_text()
    beyond = kedge("tracker", "start", "--host", "0.0.0.0", "--insecure-loopback", "--data-dir", tmp_path / "data")
    assert beyond.returncode == 2 and "never spoken beyond this machine" in beyond.stderr
