"""What holds the code of an artifact that means harm, part by part: an artifact tries, in a real runner."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kedge.device_agent import cage
from kedge.device_agent.cage import SPARE_IDS, USER, Cage, User, choose_user, readable, remove_tree
from kedge.device_agent.cgroups import Groups, GroupsUnavailableError
from kedge.device_agent.runner import Limits, Runner
from kedge.device_agent.runner_errors import RunnerCrashed, RunnerError, RunnerOutOfMemory
from kedge.device_agent.runtime.protocol import Tensor
from kedge.rpc.errors import UsageError

from .conftest import FUNCTIONS

NOBODY = 61001
CLOSED = Limits(memory_bytes=1 << 31, processes=70, sandbox=True)
#: What a GPU's driver needs is not refused by filters: the other parts have to hold alone.
OPEN = Limits(processes=70)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a runner as another user")


@pytest.fixture
def home(module: bytes, runner: Path) -> Iterator[Path]:
    """An agent's data folder with secrets in it, below a folder that everybody may enter."""
    top = Path(tempfile.mkdtemp(prefix="kedge-cage-"))
    top.chmod(0o755)
    home = top / "agent"
    for name in ("jobs", "cache", "identity"):
        (home / name).mkdir(parents=True)
    (home / "identity" / "key").write_text("secret")
    (home / "identity" / "key").chmod(0o600)
    (home / "cache" / "lib.so").write_bytes(module)
    (home / "cache" / "weights").write_bytes(bytes(64))
    (home / "cache" / "of-somebody-else").write_text("a model")
    (home / "jobs" / "of-somebody-else").mkdir()
    (home / "jobs" / "of-somebody-else" / "weights").write_text("more of it")
    home.chmod(0o700)
    shutil.copy(runner, top / "kedge-runner")
    yield home
    remove_tree(top)


@contextmanager
def caged(home: Path, user: User | None, limits: Limits) -> Iterator[Runner]:
    """A runner with the module, as a job's is."""
    scratch = home / "jobs" / "job"
    scratch.mkdir(mode=0o700)
    with Cage.build(home.parent / "kedge-runner", home, home / "jobs", user) as cage:
        cage.furnish(scratch)
        with Runner(home.parent / "kedge-runner", 1, limits, cwd=scratch, cage=cage) as runner:
            runner.open(*(cage.admit(home / "cache" / name, scratch, name) for name in ("lib.so", "weights")))
            yield runner
        cage.clear(scratch)


def tried(runner: Runner, function: str, *numbers: float) -> list[int]:
    values = [*numbers, *[0.0] * (8 - len(numbers))]
    data = Tensor("float32", (len(values),), struct.pack(f"<{len(values)}f", *values))
    (result,) = runner.call(FUNCTIONS.index(function), [data])
    return [int(value) for value in struct.unpack(f"<{len(values)}f", result.data)]


def pried(runner: Runner, path: Path | str) -> list[int]:
    """The errno of reading a file, of writing to it, and of making another beside it."""
    return tried(runner, "pry", *(float(byte) for byte in os.fsencode(path)))[:3]


def as_nobody(work: Callable[[], Any]) -> Any:
    """What `work` gives in a child process of a user without any rights."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(write, json.dumps(work()).encode())
        except BaseException as error:  # noqa: BLE001 - the parent reports it
            os.write(write, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = json.loads(answer.read())
    os.waitpid(child, 0)
    return found


REFUSED = [errno.EACCES] * 3


@as_root
def test_another_user_sees_nothing_of_the_agents(home: Path) -> None:
    with caged(home, choose_user(None), CLOSED) as runner:
        assert pried(runner, home / "identity" / "key") == REFUSED
        assert pried(runner, home / "cache" / "of-somebody-else") == REFUSED
        assert pried(runner, home / "jobs" / "of-somebody-else" / "weights") == REFUSED
        assert pried(runner, f"/proc/{os.getpid()}/environ")[:2] == REFUSED[:2]
        assert pried(runner, home / "jobs" / "job" / ".shown" / "lib.so") == REFUSED, (
            "not by the folders that lead to it"
        )
        assert pried(runner, ".shown/lib.so") == [0, errno.EACCES, errno.EACCES], "its own: to be read"
        assert pried(runner, "written") == [errno.ENOENT, errno.ENOENT, 0]
        assert pried(runner, "/etc/passwd") == [0, errno.EACCES, errno.EACCES]
        assert pried(runner, "/tmp/anything")[2] == errno.EACCES
        assert pried(runner, "/dev/null")[:2] == [0, 0]


@as_root
def test_another_user_and_an_empty_network_hold_without_filters(home: Path) -> None:
    """As runners of GPUs have none."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with caged(home, choose_user(None), OPEN) as runner:
            found = tried(runner, "reach", os.getpid(), server.getsockname()[1])
            assert found[:2] == [errno.EPERM, errno.EPERM]
            assert found[2] == errno.ENETUNREACH
            assert found[3] == choose_user(None).uid  # type: ignore[union-attr]
            assert pried(runner, home / "identity" / "key") == REFUSED
            assert pried(runner, home / "jobs" / "of-somebody-else" / "weights") == REFUSED
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with Runner(home.parent / "kedge-runner", 1) as free:
            free.open(home / "cache" / "lib.so", home / "cache" / "weights")
            assert tried(free, "reach", os.getpid(), server.getsockname()[1])[:3] == [0, 0, 0], "it could, otherwise"


def test_an_agent_without_rights_hides_its_files_from_what_it_runs(home: Path) -> None:
    """The same user owns them: only the kernel's view of files stands between."""
    if os.geteuid() == 0:
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)

    def work() -> Any:
        assert choose_user(None) is None
        with Cage.build(home.parent / "kedge-runner", home, home / "jobs", None) as cage:
            missing = cage.missing
        with caged(home, None, CLOSED) as runner:
            return [
                pried(runner, home / "identity" / "key"),
                pried(runner, home / "cache" / "of-somebody-else"),
                pried(runner, home / "loaded" / "job" / "lib.so"),
                pried(runner, "written"),
                pried(runner, "/tmp/anything")[2],
                tried(runner, "add", 1)[0],
                missing,
            ]

    found = as_nobody(work)
    assert isinstance(found, list), found
    key, other, own, written, outside, result, missing = found
    if any(line.startswith("files") for line in missing):
        pytest.skip(f"this kernel has no Landlock: {missing}")
    assert key == REFUSED
    assert other == REFUSED
    assert own == [0, errno.EACCES, errno.EACCES]
    assert written == [errno.ENOENT, errno.ENOENT, 0]
    assert outside == errno.EACCES
    assert result == 2


@as_root
def test_how_it_ended_is_told_from_within_the_cage(home: Path) -> None:
    ends = []
    for function in ("crash", "leave"):
        with caged(home, choose_user(None), CLOSED) as runner, pytest.raises(RunnerCrashed) as caught:
            tried(runner, function)
        ends.append((caught.value.signal, caught.value.exit_status))
    assert ends == [(11, 0), (0, 7)]


@as_root
def test_no_more_processes_than_allowed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the filter: the limit of its user, or its control group's. Killing its process group is not enough."""
    monkeypatch.setattr("kedge.device_agent.cage.SHARED_PROCESSES", 0)
    # The limit counts all processes of a user: nobody else's tests, nor what they left, may have this number.
    number = NOBODY + 1_000 + os.getpid()
    user = User("of this test", number, number)
    try:
        with caged(home, user, OPEN) as runner:
            made = tried(runner, "swarm", 500)[0]
    finally:
        for path in Path("/proc").glob("[0-9]*"):  # without control groups, what no filter stops stays
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # others end meanwhile
                if path.stat().st_uid == user.uid:
                    os.kill(int(path.name), signal.SIGKILL)
    assert 0 < made < 70


def control_groups() -> Groups | None:
    try:
        folder = Path(tempfile.mkdtemp())
        return Groups.claim(folder)
    except GroupsUnavailableError:
        return None


@pytest.fixture(scope="module")
def grouped() -> Iterator[None]:
    groups = control_groups()
    if groups is None:
        pytest.skip("this system lets this process make no control groups with memory and pids")
    groups.close()
    yield


@pytest.mark.usefixtures("grouped")
def test_memory_that_a_control_group_refuses_is_out_of_memory(home: Path) -> None:
    limits = Limits(memory_bytes=64 << 20, processes=70, sandbox=True)
    with caged(home, choose_user(None), limits) as runner:
        assert tried(runner, "eat", 16)[0] == 15
        with pytest.raises(RunnerOutOfMemory):
            tried(runner, "eat", 4096)


@pytest.mark.usefixtures("grouped")
def test_what_left_its_process_group_is_ended_with_its_control_group(home: Path) -> None:
    with caged(home, choose_user(None), OPEN) as runner:
        made = tried(runner, "swarm", 500)[0]
        assert 0 < made < 70
        members = Path(f"/proc/{runner.hello.pid}/cgroup").read_text()
        path = next(line[3:] for line in members.splitlines() if line.startswith("0::"))
        assert "/kedge-" in path
        inside = list(Path("/sys/fs/cgroup").rglob(f"{path.lstrip('/')}/cgroup.procs"))
        numbers = [int(word) for word in inside[0].read_text().split()]
        assert len(numbers) == made + 1
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    assert not inside[0].exists()


@pytest.mark.usefixtures("grouped")
def test_groups_of_an_agent_that_was_killed_are_cleared_away(home: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            group = Groups.claim(home).make(1 << 30, 10)
            if os.fork() == 0:
                (group.path / "cgroup.procs").write_text("0")
                os.setsid()
                signal.pause()
            while not (group.path / "cgroup.procs").read_text():
                pass
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    groups = Groups.claim(home)
    assert not [path for path in groups.base.iterdir() if path.is_dir()]
    groups.close()


def test_the_way_in_is_refused_where_it_leads_nowhere(home: Path) -> None:
    with (
        Cage.build(home.parent / "kedge-runner", home, home / "jobs", User("root", 0, 0)) as cage,
        pytest.raises(RunnerError, match="--user: Invalid argument"),
    ):
        Runner(home.parent / "kedge-runner", cage=cage)


def test_a_folder_that_took_the_place_of_the_jobs_is_noticed(home: Path) -> None:
    with Cage.build(home.parent / "kedge-runner", home, home / "jobs", None) as cage:
        shutil.rmtree(home / "jobs")
        (home / "jobs" / "job").mkdir(parents=True)
        with pytest.raises(OSError, match="restart the agent"):
            cage.furnish(home / "jobs" / "job")


@as_root
def test_an_agent_of_roots_is_not_led_astray_by_its_runner(home: Path) -> None:
    """The job's folder is the runner's own: it can put anything in the place of what the agent made there."""
    elsewhere = home.parent / "elsewhere"
    elsewhere.mkdir()
    user = choose_user(None)
    with Cage.build(home.parent / "kedge-runner", home, home / "jobs", user) as cage:
        scratch = home / "jobs" / "job"
        scratch.mkdir()
        cage.furnish(scratch)
        (scratch / ".shown").rename(scratch / "away")
        (scratch / ".shown").symlink_to(elsewhere)
        with pytest.raises(OSError, match=r"\.shown"):
            cage.admit(home / "cache" / "lib.so", scratch, "lib.so")
        (scratch / ".shown").unlink()
        (scratch / ".shown").mkdir()
        os.chown(scratch / ".shown", user.uid, user.gid)  # type: ignore[union-attr]
        with pytest.raises(OSError, match="not the folder"):
            cage.admit(home / "cache" / "lib.so", scratch, "lib.so")
        assert not list(elsewhere.iterdir())


@as_root
def test_what_is_shown_can_be_read_whatever_the_umask_was(home: Path) -> None:
    (home / "cache" / "lib.so").chmod(0o600)
    before = os.umask(0o077)
    try:
        with caged(home, choose_user(None), CLOSED) as runner:
            assert tried(runner, "add", 1)[0] == 2
    finally:
        os.umask(before)


def test_what_is_shown_takes_the_place_of_what_had_its_name(home: Path, runner: Path) -> None:
    shown = home / "jobs" / "job-1"
    shown.mkdir()
    newer = home / "cache" / "newer.so"
    newer.write_bytes(b"newer")
    with Cage.build(runner, home, home / "jobs", choose_user(None)) as cage:
        cage.furnish(shown)
        first = cage.admit(home / "cache" / "lib.so", shown, "lib.so")
        assert first.read_bytes() == (home / "cache" / "lib.so").read_bytes()
        assert cage.admit(newer, shown, "lib.so") == first and first.read_bytes() == b"newer"
        cage.clear(shown)


# ---- whom runners run as --------------------------------------------------------------------------------------------


@as_root
def test_roots_runners_are_nobodys_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    known = pwd.getpwuid(65534)

    def none(name: str) -> Any:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", none)
    spare = choose_user(None)
    assert spare is not None and spare.uid in SPARE_IDS and spare == User(str(spare.uid), spare.uid, spare.uid)
    assert choose_user(None) == spare
    with pytest.raises(UsageError, match="there is no such user"):
        choose_user("ann")
    monkeypatch.setattr(pwd, "getpwnam", lambda name: known if name == USER else none(name))
    found = choose_user(None)
    assert found is not None and (found.uid, found.gid) == (known.pw_uid, known.pw_gid)
    assert choose_user("root") is None
    monkeypatch.setattr(pwd, "getpwnam", lambda name: pwd.getpwuid(0))
    with pytest.raises(UsageError, match="root by another name"):
        choose_user("toor")


def test_others_cannot_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert choose_user(None) is None
    with pytest.raises(UsageError, match="only an agent that root started"):
        choose_user("root")


@pytest.mark.parametrize("number", SPARE_IDS)
def test_the_spare_numbers_are_nobodys(number: int) -> None:
    with pytest.raises(KeyError):
        pwd.getpwuid(number)


CLAIM = """
import sys
from pathlib import Path
from kedge.device_agent import cage
print(cage._claim_spare(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_no_two_agents_runners_have_one_number(tmp_path: Path) -> None:
    """Limits on processes without control groups are by user: one agent's fork bomb must not be another's."""

    def agent() -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-P", "-c", CLAIM, str(tmp_path)], text=True, **pipes)

    def number(process: subprocess.Popen[str]) -> int:
        assert process.stdout is not None
        return int(process.stdout.readline())

    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate(timeout=60)

    one, two = agent(), agent()
    try:
        first, second = number(one), number(two)
        assert first != second and {first, second} == set(SPARE_IDS[:2])
        end(one)
        three = agent()
        try:
            assert number(three) == first, "what a killed agent had is free"
        finally:
            end(three)
    finally:
        end(one)
        end(two)


def test_there_are_only_so_many_spare_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage, "_claims", {})
    with pytest.raises(UsageError, match="cannot say in"):
        cage._claim_spare(tmp_path / "missing")
    monkeypatch.setattr(cage, "SPARE_IDS", range(0))
    with pytest.raises(UsageError, match="as many as there are spare users") as caught:
        cage._claim_spare(tmp_path)
    assert caught.value.hint is not None and "--runner-user" in caught.value.hint


# ---- what may be read -----------------------------------------------------------------------------------------------


def test_all_may_be_read_but_what_is_hidden_and_what_leads_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    for name in ("usr/lib", "home/ann", "var/lib", "opt/other", "opt/kedge/data/identity", "opt/kedge/bin", "odd"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lib").symlink_to(tmp_path / "usr/lib")
    (tmp_path / "data").symlink_to(tmp_path / "var/lib")
    (tmp_path / "all").symlink_to(tmp_path / "opt")
    found = {str(Path(path).relative_to(tmp_path)) for path in readable(tmp_path / "opt/kedge/data", tmp_path)}
    assert found == {"usr", "usr/lib", "odd", "opt/other", "opt/kedge/bin"}
    monkeypatch.setenv("LD_LIBRARY_PATH", ":/home/ann/lib:relative")
    assert readable(tmp_path / "opt/kedge/data", tmp_path)[-1] == "/home/ann/lib"


def test_a_tree_is_removed_whatever_its_owner_closed(tmp_path: Path) -> None:
    def work() -> Any:
        inner = folder / "a" / "b"
        inner.mkdir(parents=True)
        (inner / "file").write_text("")
        for path in (inner, inner.parent):
            path.chmod(0)
        remove_tree(folder)
        return folder.exists()

    top = Path(tempfile.mkdtemp())
    top.chmod(0o777)
    folder = top / "tree"
    assert as_nobody(work) is False
    remove_tree(top)
