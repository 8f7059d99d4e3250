"""The whole road: the agent deployed to an ARM board over SSH, seen by a real tracker, running a real model there."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest

import kedge
from kedge.compiler.target import parse
from kedge.compiler.toolchain import build_runtime
from kedge.demo import processes
from kedge.deploy import ssh
from kedge.deploy.board import DIRECTORY, Boot, Deployment, _Remote, deploy_board, status, uninstall
from kedge.deploy.emulated import EmulatedBoard
from kedge.deploy.errors import BoardUnsuitableError, DeployError, DeploymentInterrupted, NameTakenError
from kedge.deploy.probe import BoardInfo
from kedge.deploy.ssh import Completed
from kedge.deployment import joining, labels_of
from kedge.rpc.client import Fleet
from kedge.rpc.errors import UsageError
from kedge.rpc.tracker import server
from support.boards import BOARDS_CACHE, DEPLOY_CACHE, ROOT, destination, require
from support.boot_programs import PROGRAMS

pytestmark = pytest.mark.board

TRIPLES = {"aarch64": "aarch64-linux-gnu", "armv7l": "armv7-linux-gnueabihf"}
# One of them in a place that no shell would take unquoted.
PLACES = {"arm64": DIRECTORY, "armhf": "~/a b/$x;'"}
MODEL = ROOT / "kedge" / "data" / "digits.onnx"


def runner_for(info: BoardInfo) -> Path:
    return build_runtime(parse(f"llvm -mtriple={TRIPLES[info.arch]}")).runner


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server.start(port=0, data_dir=tmp_path_factory.mktemp("tracker")) as running:  # as users have it
        yield str(running.address)


@pytest.fixture(scope="module")
def fleet(tracker: str) -> Iterator[Fleet]:
    with kedge.connect(tracker) as connection:
        yield connection


Deploy = Callable[..., Deployment]


@pytest.fixture(scope="module")
def deploy(fleet: Fleet, tracker: str) -> Deploy:
    def call(board: EmulatedBoard, **changes: object) -> Deployment:
        settings: dict[str, object] = {
            "tracker": tracker,
            "joining": lambda name: joining(tracker, name),
            "runner_for": runner_for,
            "connected": lambda name, timeout_s: labels_of(fleet, name, timeout_s),
            "cache_dir": DEPLOY_CACHE,
        }
        return deploy_board(destination(board), **(settings | changes))  # type: ignore[arg-type]

    return call


@pytest.fixture(scope="module")
def deployed(board: EmulatedBoard, deploy: Deploy, fleet: Fleet) -> Iterator[Deployment]:
    """The board with its agent, for the tests of a module; afterwards no trace of it may be left."""
    before = listing(board)
    done = deploy(board, labels={"rack": "a-1"}, name=f"the-{board.arch}", directory=PLACES[board.arch])
    yield done
    assert uninstall(destination(board), directory=PLACES[board.arch])
    assert listing(board) == before
    assert not [line for line in board.processes() if "agent" in line or "kedge" in line]
    assert fleet.devices(done.name) == []
    assert not uninstall(destination(board), directory=PLACES[board.arch])


def listing(board: EmulatedBoard) -> list[str]:
    """Every file of the board's user, and what lies in the folders that everybody may write to."""
    with ssh.connect(destination(board)) as connection:
        return connection.run(["find", "/home/board", "/tmp", "/dev/shm"]).stdout.splitlines()


def test_the_tracker_sees_the_board_as_it_is(board: EmulatedBoard, deployed: Deployment, fleet: Fleet) -> None:
    (device,) = fleet.devices(f"arch={board.machine},rack=a-1")
    assert device.info.name == deployed.name
    assert device.info.arch == board.machine == deployed.board.arch
    assert device.info.emulated
    assert device.info.labels["emulated"] == "true"
    assert set(deployed.uploaded) == {"agent.pyz", "kedge-runner", "launch.py", "site"}


def test_nothing_runs_or_lies_where_it_need_not(board: EmulatedBoard, deployed: Deployment) -> None:
    agents = [line for line in board.processes() if "agent.pyz" in line]
    assert len(agents) == 1
    assert not [line for line in board.processes() if "launch.py" in line]
    assert not [path for path in listing(board) if path.endswith((".part", "site.tar.gz", ".unpacking"))]
    home = PLACES[board.arch].replace("~", "/home/board")
    with ssh.connect(destination(board)) as connection:
        assert connection.run(["stat", "-c", "%a", home]).stdout == "700\n"
        # How it joined is known to nobody else, and spent.
        (kept,) = [path for path in listing(board) if path.startswith(f"{home}/data/identity/")]
        assert connection.run(["stat", "-c", "%a", kept]).stdout == "600\n"
    assert f"{home}/join" not in listing(board) and not [line for line in board.processes() if "kedge1." in line]
    told = status(destination(board), directory=PLACES[board.arch])
    assert (told.installed, told.pid, told.name) == (True, deployed.pid, deployed.name)


def test_a_model_runs_there(board: EmulatedBoard, deployed: Deployment, fleet: Fleet) -> None:
    """No SSH connection is open any more: the agent outlived the one that started it."""
    with np.load(ROOT / "kedge" / "data" / "digits_test.npz") as data:
        images = np.asarray(data["images"])[:16]
    (expected,) = onnx.reference.ReferenceEvaluator(onnx.load(MODEL)).run(None, {"image": images})
    (device,) = fleet.devices(deployed.name)
    artifact = kedge.compile(kedge.load(MODEL), target=device.info.target)
    result = fleet.run(artifact, {"image": images}, device=f"arch={board.machine}").wait(timeout=120)
    assert result.device == deployed.name
    np.testing.assert_allclose(result["probabilities"], expected, rtol=1e-4, atol=1e-6)
    timed = fleet.bench(artifact, {"image": images[:1]}, device=deployed.name, repeat=3).wait(timeout=120)
    assert timed.timing is not None
    assert timed.timing.verdict == "emulated"


@pytest.mark.parametrize("board", ["arm64"], indirect=True)
def test_deploying_again_sends_what_changed_and_replaces_the_agent(
    board: EmulatedBoard, deployed: Deployment, deploy: Deploy, fleet: Fleet, tmp_path: Path
) -> None:
    again = deploy(board, name=deployed.name, labels={"rack": "b"}, options=["--log-format=json", "--measure-cores=1"])
    assert again.uploaded == ()
    assert again.boot.by is None and "systemctl: No such file" in again.boot.why
    assert again.pid != deployed.pid
    assert status(destination(board)).pid == again.pid
    (device,) = fleet.devices(deployed.name)
    assert device.info.labels["rack"] == "b"
    assert any("--log-format=json" in line and "--measure-cores=1" in line for line in board.processes())
    newer = tmp_path / "kedge-runner"
    newer.write_bytes(runner_for(deployed.board).read_bytes() + b"\0")
    once_more = deploy(board, name=deployed.name, runner_for=lambda _info: newer, service=False)
    assert once_more.uploaded == ("kedge-runner",) and once_more.boot == Boot(None, "", "")
    assert len([line for line in board.processes() if "agent.pyz" in line]) == 1


@pytest.mark.parametrize("board", ["arm64"], indirect=True)
def test_the_name_of_another_machine_is_refused(
    board: EmulatedBoard, deployed: Deployment, deploy: Deploy, fleet: Fleet, tracker: str, tmp_path: Path
) -> None:
    with processes.agent(tracker, "host1", tmp_path / "agent"):
        with pytest.raises(NameTakenError, match="under the name 'host1'") as refused:
            deploy(board, name="host1")
        assert "--name" in str(refused.value.hint)
    assert [device.info.name for device in fleet.devices(deployed.name)] == [deployed.name]


@pytest.mark.parametrize("board", ["arm64"], indirect=True)
def test_a_failed_update_brings_the_agent_back(
    board: EmulatedBoard, deployed: Deployment, deploy: Deploy, fleet: Fleet, tmp_path: Path
) -> None:
    broken = tmp_path / "runner"
    broken.write_text("#!/bin/sh\necho this is no runner >&2\nexit 1\n")
    labels = fleet.wait_for_device(deployed.name).info.labels
    with pytest.raises(DeployError, match=r"(?s)ended:.*The agent that ran there before runs again"):
        deploy(board, name="other", runner_for=lambda _info: broken)
    assert fleet.wait_for_device(f"name={deployed.name}", timeout=60).info.labels == labels
    assert status(destination(board)).name == deployed.name
    assert not [path for path in listing(board) if path.endswith(("/new", "/old"))]


@pytest.mark.parametrize("board", ["arm64"], indirect=True)
def test_an_interrupt_once_the_tracker_sees_it_tells_that_it_runs(
    board: EmulatedBoard, deployed: Deployment, deploy: Deploy, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while what it replaced is removed: there is no way back then, and nothing claims one."""
    command = _Remote.command

    def interrupted(remote: _Remote, name: str, *arguments: str, **options: Any) -> Completed:
        done = command(remote, name, *arguments, **options)
        if name == "settle":
            raise KeyboardInterrupt
        return done

    before = status(destination(board)).pid
    monkeypatch.setattr(_Remote, "command", interrupted)
    with pytest.raises(DeploymentInterrupted, match=f"the new agent {deployed.name} runs on the board"):
        deploy(board, name=deployed.name)
    told = status(destination(board))
    assert told.pid not in (before, None)
    assert not [path for path in listing(board) if path.endswith(("/new", "/old"))]
    assert fleet.wait_for_device(f"name={deployed.name}", timeout=60)


@pytest.mark.parametrize("board", ["arm64"], indirect=True)
def test_an_interrupt_before_the_tracker_sees_it_brings_the_old_agent_back(
    board: EmulatedBoard, deployed: Deployment, deploy: Deploy, fleet: Fleet
) -> None:
    def interrupted(_name: str, timeout_s: float) -> None:
        if timeout_s:  # the agent was started
            raise KeyboardInterrupt

    labels = fleet.wait_for_device(deployed.name).info.labels
    with pytest.raises(DeploymentInterrupted, match="the board is as it was before"):
        deploy(board, name="other", connected=interrupted)
    assert fleet.wait_for_device(f"name={deployed.name}", timeout=60).info.labels == labels


@pytest.mark.parametrize("board", ["arm64"], indirect=True)
def test_what_can_never_be_is_refused_before_the_board_is_touched(
    board: EmulatedBoard, deployed: Deployment, deploy: Deploy
) -> None:
    wrong: list[dict[str, Any]] = [
        {"name": "x y"}, {"name": "rack=z"}, {"labels": {"a b": "c"}}, {"labels": {"arch": "sparc"}},
    ]  # fmt: skip
    before = status(destination(board)).pid
    for changes in wrong:
        with pytest.raises(UsageError):
            deploy(board, **changes)
    assert status(destination(board)).pid == before


@pytest.fixture
def fresh() -> Iterator[EmulatedBoard]:
    require("arm64")
    with EmulatedBoard("arm64", BOARDS_CACHE) as board:
        yield board


@pytest.fixture
def small() -> Iterator[EmulatedBoard]:
    """A board with room for an agent, and little enough of it to be filled."""
    require("arm64")
    with EmulatedBoard("arm64", BOARDS_CACHE, disk_mb=300) as board:
        yield board


def test_a_board_that_was_restarted_starts_its_agent(fresh: EmulatedBoard, deploy: Deploy, fleet: Fleet) -> None:
    with ssh.connect(destination(fresh)) as connection:
        connection.run(["sh", "-c", "mkdir bin && echo 'PATH=$HOME/bin:$PATH' > .bashrc && touch .calls"])
        for name, text in PROGRAMS.items():
            connection.put(text.encode(), f"/home/board/bin/{name}", mode=0o755)
    before = listing(fresh)
    done = deploy(fresh, name="comes-back")
    assert done.boot.by == "systemd" and status(destination(fresh)).boot == done.boot
    with ssh.connect(destination(fresh)) as connection:
        unit = connection.run(["cat", f"/home/board/.config/systemd/user/{done.boot.what}"]).stdout
        (start,) = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("ExecStart=")]
        connection.run([done.board.python, f"{done.board.directory}/launch.py", "stop"])
        assert status(destination(fresh)).pid is None
        connection.run(["sh", "-c", start])
    assert fleet.wait_for_device("name=comes-back", timeout=60)
    assert status(destination(fresh)).pid not in (None, done.pid)
    assert uninstall(destination(fresh))
    assert listing(fresh) == before


class TestRefusals:
    """What goes wrong leaves the board as it was, and says what to do."""

    def test_a_tracker_that_the_board_cannot_reach(self, fresh: EmulatedBoard, deploy: Deploy) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        before = listing(fresh)
        with pytest.raises(DeployError, match=f"cannot reach the tracker at 127.0.0.1:{port}: .*refused") as refused:
            deploy(fresh, tracker=f"127.0.0.1:{port}")
        assert "means the board itself" in str(refused.value.hint)
        assert f"-R {port}:127.0.0.1:{port}" in str(refused.value.hint)
        assert listing(fresh) == before

    def test_a_broken_off_first_deployment_leaves_nothing(self, fresh: EmulatedBoard, deploy: Deploy) -> None:
        """Ctrl-C while files are sent, and while the agent is awaited."""
        before = listing(fresh)

        def when(moment: str) -> Callable[[str], None]:
            def progress(line: str) -> None:
                if line.startswith(moment):
                    raise KeyboardInterrupt

            return progress

        def interrupted(_name: str, timeout_s: float) -> None:
            if timeout_s:  # the agent was started
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            deploy(fresh, progress=when("sending kedge-runner"))
        assert listing(fresh) == before
        with pytest.raises(KeyboardInterrupt):
            deploy(fresh, connected=interrupted)
        assert listing(fresh) == before
        assert not [line for line in fresh.processes() if "agent" in line or "launch.py" in line]

    def test_one_broken_off_while_the_board_tries_the_tracker_leaves_nothing(
        self, fresh: EmulatedBoard, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        before = listing(fresh)
        monkeypatch.setattr(_Remote, "_answer", interrupted)
        with pytest.raises(DeploymentInterrupted, match="the board is as it was before"):
            deploy(fresh)
        assert listing(fresh) == before
        assert not [line for line in fresh.processes() if "prepare" in line]

    def test_two_deployments_at_once(self, fresh: EmulatedBoard, deploy: Deploy) -> None:
        def meanwhile(_info: BoardInfo) -> Path:
            with pytest.raises(DeployError, match="another deployment to this board is at work"):
                deploy(fresh, name="second")
            with pytest.raises(DeployError, match="another deployment to this board is at work"):
                uninstall(destination(fresh))
            return runner_for(_info)

        assert deploy(fresh, name="first", runner_for=meanwhile).name == "first"
        assert uninstall(destination(fresh))

    def test_removal_works_on_a_board_that_is_no_longer_suitable(self, small: EmulatedBoard, deploy: Deploy) -> None:
        """Its disk is full, its folder unwritable, and its login script talks."""
        full = "for folder in ~ /tmp; do dd if=/dev/zero of=$folder/fill bs=1M 2>&1; done | grep -c 'No space left'"
        deploy(small, name="doomed")
        with ssh.connect(destination(small)) as connection:
            assert connection.run(["sh", "-c", full]).stdout == "2\n"
        with pytest.raises(BoardUnsuitableError, match="the agent needs 120 MB"):
            deploy(small, name="doomed")
        with ssh.connect(destination(small)) as connection:
            connection.run(["chmod", "500", "/home/board/.local/share/kedge-agent"])
        with pytest.raises(BoardUnsuitableError, match="cannot be written"):
            deploy(small, name="doomed")
        with ssh.connect(destination(small)) as connection:
            connection.run(["sh", "-c", "rm ~/fill /tmp/fill; echo 'echo Welcome, stranger' > ~/.bashrc"])
            connection.run(["sh", "-c", "dd if=/dev/zero of=$HOME/fill bs=1M 2>/dev/null; test -s ~/fill"])
        with pytest.raises(BoardUnsuitableError, match="Welcome, stranger"):
            deploy(small, name="doomed")
        assert status(destination(small)).pid is not None
        assert uninstall(destination(small))
        assert not [line for line in small.processes() if "agent" in line]
        assert not uninstall(destination(small))
        with ssh.connect(destination(small)) as connection:
            connection.run(["sh", "-c", "rm ~/fill"])

    def test_an_address_that_is_none(self, fresh: EmulatedBoard, deploy: Deploy) -> None:
        with pytest.raises(DeployError, match="no address of a tracker"):
            deploy(fresh, tracker="somewhere")

    def test_an_agent_that_ends_shows_its_log(self, fresh: EmulatedBoard, deploy: Deploy, tmp_path: Path) -> None:
        broken = tmp_path / "runner"
        broken.write_text("#!/bin/sh\necho this is no runner >&2\nexit 1\n")
        with pytest.raises(DeployError, match=f"the agent {fresh.alias} on .* ended:\n.*runner"):
            deploy(fresh, runner_for=lambda _info: broken)
        told = status(destination(fresh))
        assert (told.installed, told.pid) == (True, None)

    def test_a_tracker_that_never_sees_it(self, fresh: EmulatedBoard, deploy: Deploy) -> None:
        """Something listens, but it is no tracker."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            with pytest.raises(DeployError, match=f"the tracker at {address} did not see it within 1 s") as refused:
                deploy(fresh, tracker=address, timeout_s=1)
            assert "Its log ends with:" in refused.value.message
            assert uninstall(destination(fresh))
        assert not [line for line in fresh.processes() if "agent" in line]

    def test_a_board_without_room(self, deploy: Deploy) -> None:
        require("arm64")
        with (
            EmulatedBoard("arm64", BOARDS_CACHE, disk_mb=64) as small,
            pytest.raises(BoardUnsuitableError, match="the agent needs 120 MB"),
        ):
            deploy(small)


def test_ssh_itself_sees_the_same_board(arm64: EmulatedBoard) -> None:
    """The configuration that a board writes is good for OpenSSH's own client too."""
    if shutil.which("ssh") is None:
        pytest.skip("no OpenSSH client here")
    command = ["ssh", "-F", str(arm64.ssh_config_path), arm64.alias, "uname -m"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "aarch64\n"
