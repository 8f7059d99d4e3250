"""What the host asks of a board: install, start, stop, look, remove. Runs on the board, standard library only.

The host sends this text through `python3 - COMMAND DIRECTORY …` over SSH, so a command never depends on what an
earlier deployment left; a copy lies in the directory for whoever is logged in there (`python3 launch.py status`).

The agent is a session of its own with its standard streams in `agent.log`, so the end of an SSH session does not
reach it. It holds a lock on `agent.lock` for as long as it lives: that, and not a process id that may have been
given to another process, tells whether it runs.

A deployment holds `install.lock` from `prepare` to its end. It sends everything into `new`; `launch` puts that in place
of what is there, which `old` keeps until `settle`, so that `rollback` brings back an agent that worked. These hold
`change.lock` while they move files: one that its host gave up on may still be at work when the next one comes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
from typing import Any, Callable

STOP_GRACE_S = 10
CONNECT_S = 10
TAIL_BYTES = 6000
MARK = "KEDGE_AGENT_HOME"

EXIT_NOT_RUNNING = 3
EXIT_RUNNING = 4
EXIT_UNREACHABLE = 5
EXIT_BUSY = 6

NEW = "new"
OLD = "old"
FILES = ("agent.pyz", "kedge-runner", "launch.py")


def path(home: str, name: str) -> str:
    """A file of the installation."""
    return os.path.join(home, name)


def read_json(file: str) -> dict[str, Any]:
    """The contents of a JSON file, or nothing if there is none."""
    try:
        with open(file) as stream:
            contents: dict[str, Any] = json.load(stream)
            return contents
    except FileNotFoundError:
        return {}


def take_lock(home: str, flags: int) -> int:
    """Lock `agent.lock` and return its descriptor; `BlockingIOError` if `flags` say not to wait."""
    descriptor = os.open(path(home, "agent.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, flags)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def running_pid(home: str) -> int | None:
    """The process id of the agent, None if it does not run."""
    if not os.path.exists(path(home, "agent.lock")):
        return None
    while True:
        try:
            os.close(take_lock(home, fcntl.LOCK_SH | fcntl.LOCK_NB))
        except BlockingIOError:
            with open(path(home, "agent.lock")) as stream:
                written = stream.read()
            if written.isdigit() and is_ours(home, int(written)):
                return int(written)
            # It took the lock this very moment: the number is not written yet, or still that of the one before.
            time.sleep(0.001)
            continue
        return None


def is_ours(home: str, pid: int) -> bool:
    """Whether a process inherits `MARK`, or was started from the installation's files."""
    try:
        with open("/proc/%d/environ" % pid, "rb") as stream:
            environment = stream.read().split(b"\0")
        with open("/proc/%d/cmdline" % pid, "rb") as stream:
            words = stream.read().split(b"\0")
    except OSError:  # gone meanwhile, or another user's
        return False
    programs = {path(home, name).encode() for name in ("agent.pyz", "kedge-runner")}
    return (MARK + "=" + home).encode() in environment or bool(programs.intersection(words))


def prepare(home: str, host: str, *ports: str) -> int:
    """Check that the tracker answers from here on all its ports, then `setup`; nothing is made if it does not.

    The installation is locked until standard input is closed. If no agent is installed by then, all that was made goes.
    """
    try:
        for port in ports:
            where = "port " + port
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        print("%s: %s" % (where, error))
        return EXIT_UNREACHABLE
    lock = make_home(home)
    if lock is None:
        return busy()
    try:
        report(home)
        sys.stdout.flush()
        while os.read(0, 65536):
            pass
    finally:
        clear_away(home)
        os.close(lock)
    return 0


def clear_away(home: str) -> None:
    """Remove what a deployment that is over has sent and not launched; everything, if no agent is installed."""
    if os.path.isdir(home):
        change = lock_change(home)
        shutil.rmtree(path(home, NEW), ignore_errors=True)
        if not os.path.exists(path(home, "agent.json")):
            remove_files(home)
        os.close(change)


def busy() -> int:
    """Say that the installation is locked."""
    print("another deployment to this board is at work")
    return EXIT_BUSY


def lock_installation(home: str) -> int | None:
    """The descriptor of the locked `install.lock`; None where somebody else has it."""
    while True:
        try:
            descriptor = os.open(path(home, "install.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # as below
            os.makedirs(home, mode=0o700, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path(home, "install.lock"))):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:  # removed with the whole installation, meanwhile
            os.makedirs(home, mode=0o700, exist_ok=True)
        os.close(descriptor)


def lock_change(home: str) -> int:
    """The descriptor of the locked `change.lock`; waits until whoever changes the installation is done."""
    descriptor = os.open(path(home, "change.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def make_home(home: str) -> int | None:
    """Make the directory and lock it; None where another deployment has the lock."""
    created = []
    folder = home
    while not os.path.isdir(folder):
        created.append(folder)
        folder = os.path.dirname(folder)
    os.makedirs(home, mode=0o700, exist_ok=True)
    if created:
        with open(path(home, "created.json"), "w") as stream:
            json.dump({"directories": created}, stream)
    return lock_installation(home)


def setup(home: str) -> int:
    """Make the directory and `report`."""
    lock = make_home(home)
    if lock is None:
        return busy()
    report(home)
    os.close(lock)
    return 0


def report(home: str) -> None:
    """Make room for what comes; print what is there as JSON: file -> SHA-256, the unpacked sites, the agent."""
    lock = lock_change(home)
    # Left by a deployment that was broken off.
    for name in (NEW, OLD):
        shutil.rmtree(path(home, name), ignore_errors=True)
    os.makedirs(path(home, NEW), exist_ok=True)
    os.close(lock)
    digests = {}
    for name in FILES:
        if os.path.isfile(path(home, name)):
            with open(path(home, name), "rb") as stream:
                digests[name] = hashlib.sha256(stream.read()).hexdigest()
    sites = [name for name in os.listdir(home) if name.startswith("site-")]
    print(json.dumps({"digests": digests, "sites": sites, "agent": state(home)}))


def unpack(home: str, digest: str) -> int:
    """Unpack `site.tar.gz` into `site-DIGEST`."""
    archive, final = path(home, "site.tar.gz"), path(home, "site-" + digest)
    with open(archive, "rb") as stream:
        found = hashlib.sha256(stream.read()).hexdigest()
    if not found.startswith(digest):
        print("site.tar.gz arrived damaged: its SHA-256 is %s, not %s…" % (found, digest))
        return 1
    part = path(home, ".unpacking")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        # The host wrote this archive itself: older releases, which lack filters, lose nothing.
        if hasattr(tarfile, "data_filter"):
            tar.extractall(part, filter="data")
        else:
            tar.extractall(part)
    os.unlink(archive)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(part, final)
    return 0


def use_site(home: str, wanted: str) -> None:
    """Make `site` mean `wanted`, without a moment in which it means nothing."""
    part = path(home, ".site.part")
    if os.path.lexists(part):
        os.unlink(part)
    os.symlink(wanted, part)
    os.replace(part, path(home, "site"))


def swap(home: str, source: str, keep: str | None) -> None:
    """Move every file of the folder `source` into its place; what it replaces goes into the folder `keep`."""
    for name in os.listdir(path(home, source)):
        if keep is not None and os.path.exists(path(home, name)):
            os.replace(path(home, name), path(path(home, keep), name))
        os.replace(path(path(home, source), name), path(home, name))
    os.rmdir(path(home, source))


def start(home: str) -> int:
    """Start the agent that `agent.json` describes; returns once it holds its lock."""
    if running_pid(home) is not None:
        print("the agent runs already")
        return EXIT_RUNNING
    config = read_json(path(home, "agent.json"))
    use_site(home, config["site"])
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        become_agent(home, config, tell)
    os.close(tell)
    os.waitpid(child, 0)
    with os.fdopen(ready) as stream:
        said = stream.read()
    print(said)
    return 0 if said.isdigit() else 1


def take_agent_lock(home: str) -> int:
    """The lock of the one agent; `BlockingIOError` if an agent runs, not if somebody only looks whether one does."""
    while True:
        try:
            return take_lock(home, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if running_pid(home) is not None:
                raise


def become_agent(home: str, config: dict[str, Any], tell: int) -> None:
    """In the detached process: take the lock, redirect the standard streams, become the agent. Never returns."""
    try:
        lock = take_agent_lock(home)
        os.ftruncate(lock, 0)
        os.write(lock, b"%d" % os.getpid())
        # The lock belongs to the agent from now on, and not to the runners that it starts.
        os.set_inheritable(lock, True)
        if os.path.exists(path(home, "agent.log")):
            os.replace(path(home, "agent.log"), path(home, "agent.log.1"))
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(path(home, "agent.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(home)
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        environment[MARK] = home
        command = [config["python"], path(home, "agent.pyz")] + config["arguments"]
        os.write(tell, b"%d" % os.getpid())
        os.execve(command[0], command, environment)
    except BaseException as error:
        os.write(tell, ("the agent could not be started: %s" % error).encode())
        os._exit(1)


def relatives(home: str) -> list[int]:
    """Process ids of the agent's processes."""
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [number for number in numbers if number != os.getpid() and is_ours(home, number)]


def give_up(_number: int, _frame: object) -> None:
    """Ends a wait for the lock."""
    raise TimeoutError


def stop(home: str) -> int:
    """Ask the agent to end; kill it, and whatever it left, if it does not within `STOP_GRACE_S` seconds."""
    pid = running_pid(home) if os.path.isdir(home) else None
    if pid is not None:
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(STOP_GRACE_S)
        try:
            os.kill(pid, signal.SIGTERM)
            os.close(take_lock(home, fcntl.LOCK_EX))
        except ProcessLookupError:
            pass  # it ended by itself, this very moment
        except TimeoutError:
            sys.stderr.write("the agent ignored SIGTERM for %d s and is killed\n" % STOP_GRACE_S)
        finally:
            signal.alarm(0)
    left = relatives(home)
    while left:
        for each in left:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                continue
        # Old board kernels have no pidfd to wait on a process that is not a child.
        time.sleep(0.02)
        left = relatives(home)
    return 0


def make_writable(folder: str) -> None:
    """Let its owner change a folder and all folders below it."""
    os.chmod(folder, 0o700)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                make_writable(entry.path)


def remove(home: str) -> int:
    """Stop the agent and remove the directory, and those above it that the installation made and that are empty."""
    if not os.path.isdir(home):
        stop(home)
        print("nothing is installed in %s" % home)
        return EXIT_NOT_RUNNING
    try:
        # Whatever made it unwritable must not keep it.
        make_writable(home)
        # On a full disk no lock can be made.
        if os.path.exists(path(home, "install.lock")) and lock_installation(home) is None:
            return busy()
        if os.path.exists(path(home, "change.lock")):
            lock_change(home)
        stop(home)
        remove_files(home)
    except OSError as error:
        print("%s cannot be removed: %s" % (home, error))
        return 1
    return 0


def remove_files(home: str) -> None:
    """Remove the directory, and those above it that the installation made and that are empty."""
    created = read_json(path(home, "created.json")).get("directories", [])
    shutil.rmtree(home)
    for folder in created:
        if folder != home:
            try:
                os.rmdir(folder)
            except OSError:  # somebody else uses it by now
                break


def state(home: str) -> dict[str, Any]:
    """What is installed and whether it runs."""
    config = read_json(path(home, "agent.json"))
    pid = running_pid(home) if config else None
    return dict({name: config.get(name) for name in ("name", "tracker", "deployment")}, installed=bool(config), pid=pid)


def status(home: str) -> int:
    """Print `state` as JSON."""
    print(json.dumps(state(home)))
    return 0


def tail(home: str) -> int:
    """Print the end of the log."""
    try:
        with open(path(home, "agent.log"), "rb") as stream:
            stream.seek(max(0, os.path.getsize(path(home, "agent.log")) - TAIL_BYTES))
            sys.stdout.write(stream.read().decode(errors="replace"))
    except FileNotFoundError:
        return EXIT_NOT_RUNNING
    return 0


def wait(home: str) -> int:
    """Return when the agent ends, with its log; or when standard input is closed, because nobody waits any more."""
    done, tell = os.pipe()

    def watch() -> None:
        os.close(take_lock(home, fcntl.LOCK_SH))
        os.write(tell, b"x")

    threading.Thread(target=watch, daemon=True).start()
    readable, _, _ = select.select([0, done], [], [])
    if done in readable:
        tail(home)
    sys.stdout.flush()
    os._exit(0)


def launch(home: str) -> int:
    """Put what `new` holds in place and replace the agent; print the new one's process id; then `wait`."""
    lock = lock_change(home)
    if os.path.isdir(path(home, NEW)):
        os.makedirs(path(home, OLD), exist_ok=True)
        # Before it is stopped: `rollback` starts it even if nothing gets replaced.
        if running_pid(home) is not None:
            open(path(path(home, OLD), ".ran"), "w").close()
        stop(home)
        swap(home, NEW, OLD)
    else:
        stop(home)
    failed = start(home)
    os.close(lock)
    sys.stdout.flush()
    return failed or wait(home)


def rollback(home: str) -> int:
    """Bring back what the last `launch` replaced, and start it if it ran then; prints its process id."""
    lock = lock_change(home)
    if os.path.exists(path(home, "join")):  # not used by the agent that it was for
        os.unlink(path(home, "join"))
    shutil.rmtree(path(home, NEW), ignore_errors=True)
    old = path(home, OLD)
    ran = os.path.exists(path(old, ".ran"))
    if os.path.isdir(old):
        stop(home)
        if ran:
            os.unlink(path(old, ".ran"))
        swap(home, OLD, None)
        forget_replaced(home)
    status = start(home) if ran else EXIT_NOT_RUNNING
    os.close(lock)
    return status


def settle(home: str) -> int:
    """The agent works: remove what it replaced."""
    lock = lock_change(home)
    forget_replaced(home)
    os.close(lock)
    return 0


def forget_replaced(home: str) -> None:
    """Remove `old`, and the sites that the agent does not use."""
    shutil.rmtree(path(home, OLD), ignore_errors=True)
    used = read_json(path(home, "agent.json")).get("site")
    for name in os.listdir(home):
        if name.startswith("site-") and name != used:
            shutil.rmtree(path(home, name))


COMMANDS: dict[str, Callable[..., int]] = {
    "prepare": prepare,
    "setup": setup,
    "launch": launch,
    "rollback": rollback,
    "settle": settle,
    "unpack": unpack,
    "start": start,
    "stop": stop,
    "remove": remove,
    "status": status,
    "tail": tail,
    "wait": wait,
}


def main() -> int:
    """`python3 launch.py COMMAND [DIRECTORY [ARGUMENT …]]`."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: launch.py %s [DIRECTORY]" % "|".join(COMMANDS))
        return 2
    home = sys.argv[2] if len(sys.argv) > 2 else os.path.dirname(os.path.abspath(sys.argv[0]))
    return COMMANDS[sys.argv[1]](os.path.abspath(home), *sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
