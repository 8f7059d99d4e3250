"""The kinds of fault, each a function that does one to a world and returns once the fault itself is over.

What may come of jobs meanwhile is part of the kind: `extra` are outcomes that it may cause, at most so many per
injection, and `errors` are what clients may be told. `sessions` is how many sessions one injection may end.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kedge.rpc.artifact import Artifact
from kedge.rpc.types import Deadlines
from support.agents import wait_for
from support.proxy import Action, Direction, Trap

from .ledger import ENDS
from .relay import Order
from .world import World, full

Inject = Callable[[World, random.Random], None]
PATIENCE_S = 60.0
#: Sessions that one client may have at a time, and all clients together.
THREADS = 3
ALL = 2 * THREADS


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `extra` maps outcomes to how many of them one injection may cause."""

    name: str
    inject: Inject
    extra: Mapping[str, int] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    needs: str = ""  # "relay", "disks", "clock" or "pair"
    large_share: float = 0.06
    sessions: int = 0


KINDS: dict[str, Kind] = {}


def kind(
    name: str,
    extra: Mapping[str, int] | None = None,
    errors: tuple[str, ...] = (),
    needs: str = "",
    large_share: float = 0.06,
    sessions: int = 0,
) -> Callable[[Inject], Inject]:
    def add(inject: Inject) -> Inject:
        KINDS[name] = Kind(name, inject, extra or {}, errors, needs, large_share, sessions)
        return inject

    return add


def rest(rng: random.Random, least_s: float, most_s: float) -> None:
    """A fault lasts for a while."""
    time.sleep(rng.uniform(least_s, most_s))


# ---- Processes -----------------------------------------------------------------------------------------------------


@kind("agent-killed", extra={"device_lost": 1}, sessions=1)
def kill_agent(world: World, rng: random.Random) -> None:
    agent = rng.choice(world.agents)
    agent.kill()
    rest(rng, 0.0, 0.5)
    world.start_agent(agent)


@kind("agent-stopped", extra={"device_lost": 1}, sessions=1)
def stop_agent(world: World, rng: random.Random) -> None:
    """One time in five for longer than its lease lasts."""
    agent = rng.choice(world.agents)
    agent.signal(signal.SIGSTOP)
    rest(rng, 9.0, 10.0) if rng.random() < 0.2 else rest(rng, 0.05, 1.5)
    agent.signal(signal.SIGCONT)


@kind("agent-restarted", sessions=1)
def restart_agent(world: World, rng: random.Random) -> None:
    """In order, as for an update: no job is worse for it."""
    agent = rng.choice(world.agents)
    assert agent.end(30) == 0, agent.log_path.read_text()[-3000:]
    rest(rng, 0.0, 0.5)
    world.start_agent(agent)


@kind("runner-killed", extra={"crash": 1, "device_fault": 1}, sessions=1)
def kill_runner(world: World, rng: random.Random) -> None:
    """Before it says hello that is its device's fault, which ends the job where another device had failed with it."""
    _signal_runner(world, rng, signal.SIGKILL)


@kind("runner-stopped", extra={"timeout": 1}, sessions=1)
def stop_runner(world: World, rng: random.Random) -> None:
    """Half of them are never woken again."""
    pid = _signal_runner(world, rng, signal.SIGSTOP)
    rest(rng, 0.02, 0.6)
    if rng.random() < 0.5:
        _send(pid, signal.SIGCONT)


def _signal_runner(world: World, rng: random.Random, number: int) -> int:
    """To the next runner that is there, from a random moment on: they live for milliseconds.

    What an agent is about to start is the agent itself until it has become a runner.
    """
    rest(rng, 0.0, 0.1)
    program = world.runner.resolve()
    found: list[int] = []

    def there() -> bool:
        below = [pid for agent in world.agents for pid in world.runners(agent) if _program(pid) == program]
        if below and _send(below[0], number):
            found.append(below[0])
        return bool(found)

    wait_for(there, "a runner", PATIENCE_S)
    return found[0]


def _program(pid: int) -> Path | None:
    """What a process executes; None once it has ended."""
    try:
        return Path(f"/proc/{pid}/exe").readlink()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@kind("client-killed", sessions=THREADS)
def kill_client(world: World, rng: random.Random) -> None:
    client = rng.choice(world.clients)
    world.clients.remove(client)
    client.kill()
    world.add_client()


@kind("client-stopped")
def stop_client(world: World, rng: random.Random) -> None:
    client = rng.choice(world.clients)
    client.signal(signal.SIGSTOP)
    rest(rng, 0.05, 3.0)
    client.signal(signal.SIGCONT)


@kind("tracker-killed", sessions=ALL)
def kill_tracker(world: World, rng: random.Random) -> None:
    world.tracker.kill()
    rest(rng, 0.0, 0.5)
    world.start_tracker()


@kind("tracker-restarted", sessions=ALL)
def restart_tracker(world: World, rng: random.Random) -> None:
    """In order, as for an update."""
    assert world.tracker.end(30) == 0, world.tracker.log_path.read_text()[-3000:]
    rest(rng, 0.0, 0.5)
    world.start_tracker()


@kind("tracker-stopped")
def stop_tracker(world: World, rng: random.Random) -> None:
    world.tracker.signal(signal.SIGSTOP)
    rest(rng, 0.05, 2.0)
    world.tracker.signal(signal.SIGCONT)


@kind("leader-killed", needs="pair", sessions=ALL)
def kill_leader(world: World, rng: random.Random) -> None:
    leader = world.leader()
    leader.kill()
    rest(rng, 0.0, 3.0)
    world.start_tracker(leader)


@kind("leader-stopped", needs="pair", sessions=ALL)
def stop_leader(world: World, rng: random.Random) -> None:
    """One time in two for so long that another one leads: then it comes back to a fleet that is not its own."""
    leader = world.leader()
    leader.signal(signal.SIGSTOP)
    rest(rng, 5.0, 8.0) if rng.random() < 0.5 else rest(rng, 0.05, 2.0)
    leader.signal(signal.SIGCONT)


@kind("leader-restarted", needs="pair", sessions=ALL)
def restart_leader(world: World, rng: random.Random) -> None:
    """In order, as for an update; the next one of the two may be ended before this one is seen again."""
    leader = world.leader()
    assert leader.end(30) == 0, leader.log_path.read_text()[-3000:]
    rest(rng, 0.0, 1.0)
    world.start_tracker(leader)


@kind("follower-killed", needs="pair", sessions=ALL)
def kill_follower(world: World, rng: random.Random) -> None:
    leader = world.leader()
    (follower,) = [tracker for tracker in world.trackers if tracker is not leader]
    follower.kill()
    rest(rng, 0.0, 1.0)
    world.start_tracker(follower)


@kind("database-away", needs="pair", sessions=ALL)
def stop_database(world: World, rng: random.Random) -> None:
    assert world.shape.database is not None
    world.shape.database.stop()
    rest(rng, 0.0, 3.0)
    world.shape.database.start()


@kind("database-cut", extra={"device_lost": 1}, needs="pair", sessions=ALL)
def cut_database(world: World, rng: random.Random) -> None:
    """One of the two trackers is cut off from it: its connections break, or carry nothing for a while, now and then for
    so long that the other one leads: by then both have clients and agents, and what the one had asked comes late."""
    way = world.databases[rng.choice(world.trackers).name]
    if rng.random() < 0.4:
        way.cut_all(reset=rng.random() < 0.5)
        return
    way.stall()
    rest(rng, 3.0, 12.0) if rng.random() < 0.4 else rest(rng, 0.05, 2.0)
    way.flow()


# ---- Connections ---------------------------------------------------------------------------------------------------


@kind("upload-cut", large_share=0.3, sessions=1)
def cut_upload(world: World, rng: random.Random) -> None:
    _spring(world, "clients", rng.choice(("cut", "abort")), "up", rng.randrange(100_000, 3_000_000))


@kind("result-cut", large_share=0.2, sessions=1)
def cut_result(world: World, rng: random.Random) -> None:
    """Now in a message, now in an output that is uploaded."""
    after = rng.randrange(1, 2_000) if rng.random() < 0.5 else rng.randrange(100_000, 2_000_000)
    _spring(world, "agents", rng.choice(("cut", "abort")), "up", after)


@kind("streams-cut", sessions=ALL)
def cut_streams(world: World, rng: random.Random) -> None:
    """All connections of one side at once, in order or by a reset."""
    world.proxies[rng.choice(("clients", "agents"))].cut_all(reset=rng.random() < 0.5)


@kind("connections-stalled")
def stall(world: World, rng: random.Random) -> None:
    proxy = world.proxies[rng.choice(("clients", "agents"))]
    proxy.stall()
    rest(rng, 0.05, 2.0)
    proxy.flow()


@kind("half-closed", sessions=1)
def half_close(world: World, rng: random.Random) -> None:
    side, direction = rng.choice(("clients", "agents")), rng.choice(("up", "down"))
    _spring(world, side, "half-close", direction, rng.randrange(1, 3_000))


@kind("wire-corrupted", sessions=1)
def corrupt_wire(world: World, rng: random.Random) -> None:
    side, direction = rng.choice(("clients", "agents")), rng.choice(("up", "down"))
    _spring(world, side, "flip", direction, rng.randrange(1, 20_000))


def _spring(world: World, side: str, action: Action, direction: Direction, after: int) -> None:
    trap = world.proxies[side].set(Trap(action, direction, after))
    assert trap.sprung.wait(PATIENCE_S), f"no connection of {side} carried {after} bytes {direction}"


# ---- Messages ------------------------------------------------------------------------------------------------------


@kind("message-duplicated", needs="relay")
def duplicate(world: World, rng: random.Random) -> None:
    _meddle(world, Order("duplicate", rng.choice(("up", "down", "submit"))))


@kind("message-delayed", needs="relay")
def delay(world: World, rng: random.Random) -> None:
    _meddle(world, Order("delay", rng.choice(("up", "down")), rng.uniform(0.05, 1.5)))


@kind("message-late", needs="relay", sessions=1)
def deliver_late(world: World, rng: random.Random) -> None:
    """An agent's last message on a connection arrives when it is back on another one."""
    _meddle(world, Order("late", "up", rng.uniform(0.05, 1.5)))


@kind("submit-reply-lost", needs="relay")
def lose_reply(world: World, rng: random.Random) -> None:
    _meddle(world, Order("lose-reply", "submit"))


def _meddle(world: World, order: Order) -> None:
    assert world.relay.order(order).done.wait(PATIENCE_S), f"no message for {order}"


# ---- Disks ---------------------------------------------------------------------------------------------------------


@kind(
    "tracker-blob-corrupted",
    extra={"load_error": 8, "bad_request": 8},
    errors=("CorruptBlobError", "MissingBlobError"),
    large_share=0.15,
    sessions=ALL,
)
def corrupt_tracker_blob(world: World, rng: random.Random) -> None:
    """Of any job, or of the artifact, which an agent that begins anew has to fetch."""
    objects = world.data / "blobs" / "objects"
    if rng.random() < 0.5:
        _flip_byte(rng, lambda: list(objects.glob("*/*")))
        return
    agent = rng.choice(world.agents)
    _flip_byte(rng, lambda: [path for path in objects.glob("*/*") if path.name in _parts(world)])
    agent.end(30)
    shutil.rmtree(world.agent_data(agent) / "cache")
    world.start_agent(agent)


def _parts(world: World) -> set[str]:
    """The digests of what the artifact is made of."""
    members = Artifact.load(world.artifact).manifest.members
    return {part.digest for member in members for part in member.parts} | {member.digest for member in members}


@kind("agent-blob-corrupted", large_share=0.15)
def corrupt_agent_blob(world: World, rng: random.Random) -> None:
    """While the device is in maintenance and idle: what a job has open already, nobody verifies again."""
    agent = rng.choice(world.agents)
    cache = world.agent_data(agent) / "cache"
    parts = _parts(world)

    def files() -> list[Path]:
        return [path for path in (*cache.glob("blobs/objects/*/*"), *cache.glob("members/*")) if path.name in parts]

    with world.fleet() as fleet:

        def idle() -> bool:
            free = [d.info.name for d in fleet.devices() if not d.running_job_id]
            return agent.name in free and not world.runners(agent)

        fleet.wait_for_device(agent.name, timeout=PATIENCE_S)
        fleet.set_maintenance(agent.name, True, "a fault")
        wait_for(idle, f"{agent.name} to be idle", PATIENCE_S)
        _flip_byte(rng, files)
        fleet.set_maintenance(agent.name, False)
        job = fleet.run(
            Artifact.load(world.artifact), {"x": np.zeros(2, np.float32)}, function="add_one", device=agent.name
        )
        assert job.wait(PATIENCE_S)["y"].tolist() == [1.0, 1.0]
    rotten = [path for path in files() if hashlib.sha256(path.read_bytes()).hexdigest() != path.name]
    assert not rotten, f"used as they are: {rotten}"


def _flip_byte(rng: random.Random, files: Callable[[], list[Path]]) -> None:
    """One byte of one file, none of the smallest: those are of no job that is to come."""
    while True:
        try:
            path = rng.choice([path for path in files() if path.stat().st_size > 32])
            with path.open("r+b") as file:
                at = rng.randrange(path.stat().st_size)
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 0x10]))
        except FileNotFoundError:
            continue
        return


@kind(
    "tracker-disk-full",
    extra={"device_fault": 4},
    errors=("DiskFullError", "StoreError", "BlobQuotaError", "RemoteError"),
    needs="disks",
    sessions=ALL,
)
def fill_tracker_disk(world: World, rng: random.Random) -> None:
    with full(world.data):
        rest(rng, 0.1, 2.5)


@kind("agent-disk-full", extra={"device_fault": 8}, needs="disks", sessions=1)
def fill_agent_disk(world: World, rng: random.Random) -> None:
    with full(world.agent_data(rng.choice(world.agents))):
        rest(rng, 0.1, 1.5)


# ---- Clocks --------------------------------------------------------------------------------------------------------


@kind("clock-jumped", needs="clock", sessions=ALL)
def jump_clock(world: World, rng: random.Random) -> None:
    """By seconds to hours, now and then with a tracker that begins under the wrong time; or by weeks, for a moment."""
    if rng.random() < 0.3:
        world.shift_clock(40 * 86_400)
        rest(rng, 0.5, 1.5)
        world.shift_clock(0)
        return
    world.shift_clock(rng.choice((-1, 1)) * rng.choice((3, 60, 3_600, 20_000)))
    rest(rng, 0.0, 0.5)
    if rng.random() < 0.3:
        world.tracker.kill()
        world.start_tracker()
    rest(rng, 0.0, 0.5)
    if rng.random() < 0.5:
        world.shift_clock(0)


# ---- Artifacts -----------------------------------------------------------------------------------------------------


def _hostile(function: str) -> Inject:
    def inject(world: World, rng: random.Random) -> None:
        """A user's job that means harm, among those of others; it ends as it has to."""
        x = np.array([rng.randrange(1_000), 0], np.float32)
        with world.fleet() as fleet:
            run_ms = rng.randrange(300, 1_000) if function == "endless" else 10_000
            deadlines = Deadlines(queue_ms=60_000, run_ms=run_ms)
            job = fleet.run(Artifact.load(world.artifact), {"x": x}, function=function, deadlines=deadlines)
            result = job.wait(PATIENCE_S, check=False)
        assert result.outcome.kind.value == ENDS.get(function, "ok"), result.outcome

    return inject


for _name, _function in {
    "artifact-segfaults": "segfault",
    "artifact-never-ends": "endless",
    "artifact-eats-memory": "hungry",
    "artifact-forks": "bomb",
    "artifact-corrupts-output": "scribble",
}.items():
    kind(_name)(_hostile(_function))
