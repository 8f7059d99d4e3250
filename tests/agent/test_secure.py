"""The agent as a process against a tracker that is secure: how it joins, stays, and is turned away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kedge.deploy.boot import FINAL_STATUSES
from kedge.rpc.client import Fleet, connect
from kedge.rpc.client.access import Access
from kedge.rpc.errors import AuthenticationError, JobError
from kedge.rpc.security import credentials, identity, signing
from kedge.rpc.security.join import DEVICE, Join, parse_join
from kedge.rpc.tracker.server import RunningTracker, start
from support.agents import AgentProcess, wait_for
from support.handmade import artifact
from support.ports import free_ports

from .conftest import FUNCTIONS

X = np.arange(4, dtype=np.float32)


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[RunningTracker]:
    # Certificates of an hour are always about to expire: the agent renews at once.
    with start(port=free_ports(2), data_dir=tmp_path / "tracker", device_lifetime_s=3_600) as running:
        yield running


@pytest.fixture
def fleet(tracker: RunningTracker) -> Iterator[Fleet]:
    with connect(tracker.address) as fleet:
        yield fleet


@pytest.fixture
def access(tracker: RunningTracker) -> Iterator[Access]:
    with Access(tracker.address, credentials.find(tracker.address).tls) as access:
        yield access


def agent(tracker: RunningTracker, runner: Path, folder: Path, *arguments: str, join: str = "") -> AgentProcess:
    environment = {**os.environ, "KEDGE_JOIN": join} if join else None
    return AgentProcess(str(tracker.address), runner, folder, *arguments, env=environment, secure=True)


def serials(tracker: RunningTracker) -> tuple[str, ...]:
    devices = json.loads((tracker.data_dir / "security" / "devices.json").read_text())
    (found,) = [tuple(device["serials"]) for device in devices if device["name"] == "here"]
    return found


def test_an_agent_joins_works_renews_and_comes_back(
    tracker: RunningTracker, fleet: Fleet, access: Access, runner: Path, module: bytes, tmp_path: Path
) -> None:
    join = str(access.enrol_token("here")[0])
    data = tmp_path / "data"
    with agent(tracker, runner, data, join=join) as process:
        process.wait_ready()
        process.wait_log("renewed the certificate of this device")
        result = fleet.run(artifact(module, FUNCTIONS), {"x": X}, function="add", device="here").wait(60)
        np.testing.assert_array_equal(result["y"], X + 1)
        environment = Path(f"/proc/{process.process.pid}/cmdline").read_bytes()
        assert b"kedge1." not in environment, "no secret is where everybody can read it"
    assert len(serials(tracker)) == 2
    (kept,) = (data / "identity").iterdir()
    assert kept.name.startswith("here@") and kept.stat().st_mode & 0o077 == 0 and data.stat().st_mode & 0o077 == 0
    assert parse_join(join).token not in kept.read_text()
    # The spent join string does no harm, as it is still in whatever starts the agent.
    for again in (join, ""):
        with agent(tracker, runner, data, join=again) as process:
            process.wait_ready()


def test_an_agent_outlives_the_certificate_that_its_stream_began_with(runner: Path, tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "tracker"
    with (
        start(port=free_ports(2), data_dir=folder, device_lifetime_s=25) as brief,
        Access(brief.address, credentials.find(brief.address).tls) as access,
    ):
        identity.enrol(access.enrol_token("here")[0], "here").save(data)
    with (
        start(port=brief.port, agents_port=brief.serving.agents_address.port, data_dir=folder) as tracker,
        agent(tracker, runner, data) as process,
    ):
        process.wait_ready()
        process.wait_log("renewed the certificate of this device")
        process.wait_log("has expired meanwhile")
        process.wait_log(f"connected to the tracker at {tracker.serving.agents_address} again")


def test_a_revoked_agent_ends_and_says_why(
    tracker: RunningTracker, access: Access, runner: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with agent(tracker, runner, data, join=str(access.enrol_token("here")[0])) as process:
        process.wait_ready()
        access.revoke_device("here")
        wait_for(lambda: process.process.poll() is not None, "the agent to end")
        assert process.process.returncode == AuthenticationError.exit_status
        assert process.process.returncode in FINAL_STATUSES, "nothing starts it again"
    assert "the device 'here' was revoked" in process.log and "--join" in process.log
    with agent(tracker, runner, data, join=str(access.enrol_token("here")[0])) as process:
        process.wait_ready()


def started(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kedge.device_agent", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


def test_an_agent_that_may_not_join_says_what_to_do(
    tracker: RunningTracker, access: Access, runner: Path, tmp_path: Path
) -> None:
    known = credentials.find(tracker.address).tls
    assert known is not None
    place = ("--runner", runner, "--data-dir", tmp_path / "data", "--name", "here")
    spent = access.enrol_token("here")[0]
    identity.enrol(spent, "here")
    user = access.create_token("submit", "ann")[1]
    other = replace(access.enrol_token("there")[0], address=tracker.address)
    garbage = Join(DEVICE, tracker.address, "kdg_garbage", known.ca)
    nobody = replace(garbage, address=replace(tracker.address, port=1))
    cases = [
        ("", 9, "is not enrolled"),
        (str(spent), 9, "--role enrol; here: kedge agent start --join"),
        (str(user), 9, "a user's"),
        (str(other), 10, "enrols 'there', not 'here'"),
        (str(garbage), 9, "does not know this token"),
        (str(nobody), 6, "no tracker answers"),
        (str(spent)[:-3], 2, "not copied whole"),
    ]
    for join, status, words in cases:
        done = started(*place, KEDGE_JOIN=join) if join else started(*place)
        assert done.returncode == status and words in done.stderr and "hint:" in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr and "kdg_" not in done.stderr
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    for wrong in (("--tracker", "lab:9190"), (), ("--tracker", "127.0.0.1:1", "--join", str(spent))):
        done = started(*place, *wrong, "--insecure-loopback")
        assert done.returncode == 2 and "--insecure-loopback goes with --tracker" in done.stderr


def test_a_token_is_not_spent_where_no_identity_can_be_kept(
    tracker: RunningTracker, access: Access, runner: Path, tmp_path: Path
) -> None:
    join = str(access.enrol_token("here")[0])
    (tmp_path / "file").touch()
    done = started("--runner", runner, "--data-dir", tmp_path / "file", "--name", "here", KEDGE_JOIN=join)
    assert done.returncode != 0 and f"cannot use {tmp_path / 'file'}" in done.stderr and "hint:" in done.stderr
    with agent(tracker, runner, tmp_path / "data", join=join) as process:
        process.wait_ready()


def test_a_join_file_is_removed_once_it_is_used(
    tracker: RunningTracker, access: Access, runner: Path, tmp_path: Path
) -> None:
    file = tmp_path / "join"
    file.touch(mode=0o600)
    file.write_text(str(access.enrol_token("here")[0]))
    with agent(tracker, runner, tmp_path / "data", "--join-file", str(file)) as process:
        process.wait_ready()
        assert not file.exists()
    file.touch(mode=0o644)
    done = started("--runner", runner, "--data-dir", tmp_path / "new", "--name", "here", "--join-file", file)
    assert done.returncode != 0 and "others may read" in done.stderr


def test_what_a_failed_attempt_joined_does_not_replace_what_was_joined(
    tracker: RunningTracker, access: Access, runner: Path, tmp_path: Path
) -> None:
    """A deployment under another name, or to another tracker, was undone: the agent that was there starts again."""
    data = tmp_path / "data"
    with start(port=0, data_dir=tmp_path / "other") as other:
        assert other.serving.security is not None
        with Access(other.address, other.serving.security.admin_tls()) as elsewhere:
            for name, there in (("here", access), ("there", access), ("here", elsewhere)):
                identity.enrol(there.enrol_token(name)[0], name).save(data)
    with agent(tracker, runner, data) as process:
        process.wait_ready()
    lost = started("--runner", runner, "--data-dir", data, "--name", "nowhere")
    assert lost.returncode == 9 and "not enrolled as 'nowhere'" in lost.stderr and "here, there" in lost.stderr


def test_another_trackers_agent_waits_and_says_why(
    tracker: RunningTracker, access: Access, runner: Path, tmp_path: Path
) -> None:
    """The tracker was set up anew at its address; the agent knows the one before."""
    data = tmp_path / "data"
    identity.enrol(access.enrol_token("here")[0], "here").save(data)
    tracker.stop()
    ports = {"port": tracker.port, "agents_port": tracker.serving.agents_address.port}
    with start(data_dir=tmp_path / "other", **ports) as other, agent(other, runner, data) as process:
        process.wait_log("is not the one that was joined")
        time.sleep(1)
        assert process.log.count("is not the one that was joined") == 1 + process.log.count("cannot be renewed yet")
        assert process.stop() == 0


# ---- Signers -------------------------------------------------------------------------------------------------------


def test_only_what_known_signers_signed_is_run(
    tracker: RunningTracker, access: Access, runner: Path, module: bytes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tls = credentials.find(tracker.address).tls
    keys = {}
    for user in ("known", "stranger"):
        keys[user] = signing.own_key(tmp_path / user, make=True)
        assert keys[user] is not None
    public = signing.public_key(keys["known"]).hex()  # type: ignore[arg-type]
    join = str(access.enrol_token("here")[0])
    with agent(tracker, runner, tmp_path / "data", "--require-signer", public, join=join) as process:
        process.wait_ready()
        made = artifact(module, FUNCTIONS)
        for user, words in (("known", ""), ("stranger", "whom this device does not know"), ("", "is not signed")):
            monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / (user or "nobody")))
            with Fleet(tracker.address, tls) as fleet:
                job = fleet.run(made, {"x": X}, function="add", device="here")
                if not words:
                    np.testing.assert_array_equal(job.wait(60)["y"], X + 1)
                    continue
                with pytest.raises(JobError, match=words) as caught:
                    job.wait(60)
                assert caught.value.outcome == "load_error"


def test_a_required_signer_without_cryptography_is_a_refusal(
    tracker: RunningTracker, access: Access, runner: Path, tmp_path: Path
) -> None:
    (tmp_path / "banned").mkdir()
    (tmp_path / "banned" / "cryptography.py").write_text("raise ImportError('not on this board')\n")
    path = os.pathsep.join([str(tmp_path / "banned"), *filter(None, [os.environ.get("PYTHONPATH")])])
    place = ("--runner", runner, "--data-dir", tmp_path / "data", "--name", "here")
    join = str(access.enrol_token("here")[0])
    done = started(*place, "--require-signer", "ab" * 32, KEDGE_JOIN=join, PYTHONPATH=path)
    assert done.returncode != 0 and "signatures need the Python package 'cryptography'" in done.stderr
    environment = {**os.environ, "PYTHONPATH": path}
    with AgentProcess(str(tracker.address), runner, tmp_path / "data", env=environment, secure=True) as process:
        process.wait_ready()  # enrolled before, and no signer is required
