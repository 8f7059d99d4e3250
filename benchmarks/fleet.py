"""The fleet's figures in one run, beside gRPC's own: jobs, uploads, many agents, a restart, an idle agent.

python benchmarks/fleet.py                      # all of it, on a quiet machine: about a quarter of an hour
python benchmarks/fleet.py --only jobs,restart  # some of jobs, session, throughput, upload, crowd, restart
python benchmarks/fleet.py --smoke              # a few of everything, judges no figure

Jobs, uploads and agents are real ones, over TLS, as a user has them. Simulated agents speak the real protocol, take
every job at once and compute nothing; many of them live in one process, in plaintext on loopback, so that what is
measured is the tracker. A run of everything writes benchmarks/results/fleet-DATE.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import harness
import walking

import kedge
import kedge.aio
from kedge.demo import processes
from kedge.protos.v1 import agent_pb2_grpc
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.protocol import local_protocol
from kedge.rpc.transport import CHANNEL_OPTIONS
from kedge.rpc.types import DeviceInfo, Health, JobResult, JobState

RESULTS = Path(__file__).with_name("results")
PARTS = ("jobs", "session", "throughput", "upload", "crowd", "restart")
Row = dict[str, Any]


# ---- Simulated agents ----------------------------------------------------------------------------------------------


async def simulate(address: str, count: int, idle: bool) -> None:
    """`count` agents until the process is ended; says "ready N SECONDS" whenever all are welcomed (again).

    With `idle` they take jobs and never report.
    """
    welcomed: set[int] = set()
    began = time.monotonic()

    def greet(number: int) -> None:
        nonlocal began
        welcomed.add(number)
        if len(welcomed) == count:
            print(f"ready {count} {time.monotonic() - began:.2f}", flush=True)

    def lose(number: int) -> None:
        nonlocal began
        if len(welcomed) == count:
            began = time.monotonic()
        welcomed.discard(number)

    await asyncio.gather(*(one_agent(address, number, idle, greet, lose) for number in range(count)))


async def one_agent(
    address: str, number: int, idle: bool, greet: Callable[[int], None], lose: Callable[[int], None]
) -> None:
    """One simulated agent: dials again whenever its stream ends, a little later each time."""
    info = DeviceInfo(f"sim-{number}", os.uname().machine, {}, _features(), num_cores=1, memory_bytes=1 << 30)
    instance, pause = secrets.token_hex(8), 0.2
    while True:
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the latter: it ended while we wrote
            call = cast(Any, agent_pb2_grpc).AgentsStub(channel).Connect()
            await call.write(convert.agent_message_to_pb(m.Hello(local_protocol(), info, instance, health=Health()), 1))
            await _converse(call, number, idle, greet)
        lose(number)
        await channel.close()
        await asyncio.sleep(pause * (0.5 + number % 100 / 100))
        pause = min(5.0, 2 * pause)


async def _converse(call: Any, number: int, idle: bool, greet: Callable[[int], None]) -> None:
    beating: asyncio.Task[None] | None = None
    running: list[Any] = []
    try:
        async for pb in call:
            body = convert.tracker_message_from_pb(pb)
            if isinstance(body, m.Welcome):
                greet(number)
                beating = asyncio.create_task(_beat(call, body.heartbeat_interval_ms / 1000, running))
            elif isinstance(body, m.AssignJob):
                running.append(body.lease)
                await call.write(convert.agent_message_to_pb(m.JobStarted(body.lease), 2))
                if not idle:
                    done = m.JobFinished(body.lease, JobResult(Outcome(OutcomeKind.OK)))
                    await call.write(convert.agent_message_to_pb(done, 3))
            elif isinstance(body, m.ResultAccepted):
                running[:] = [lease for lease in running if lease.job_id != body.job_id]
    finally:
        if beating is not None:
            beating.cancel()


async def _beat(call: Any, interval_s: float, running: list[Any]) -> None:
    while True:
        await asyncio.sleep(interval_s)
        await call.write(convert.agent_message_to_pb(m.Heartbeat(running=tuple(running)), 4))


def _features() -> tuple[str, ...]:
    """What this machine's CPU has: artifacts for it fit simulated agents too."""
    from kedge.compiler.target import parse

    return tuple(parse("native").features)


@contextlib.contextmanager
def agents(address: str, count: int, *, idle: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Simulated agents in a process of their own, all of them welcomed."""
    command = [sys.executable, __file__, "--simulate", address, str(count), *(["--idle"] if idle else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_ready(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_ready(process: subprocess.Popen[str]) -> float:
    """Seconds that it took until all were welcomed."""
    assert process.stdout is not None
    line = process.stdout.readline().split()
    if not line:
        raise RuntimeError("the simulated agents ended")
    return float(line[2])


# ---- A tracker in plaintext ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def tracker(folder: Path, port: int = 0, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A tracker in plaintext on loopback, to be killed at will; its address and its process."""
    command = [sys.executable, "-m", "kedge", "tracker", "start", "--insecure-loopback", "--port", str(port)]
    log = (folder / "log").open("a")
    process = subprocess.Popen(
        [*command, "--data-dir", str(folder / "data"), *options], stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        yield processes.ready_line("tracker", process, folder / "log").split()[-1], process
    finally:
        process.kill()
        process.communicate()
        log.close()


async def flood(address: str, jobs: int, together: int) -> float:
    """Jobs per second from submit to result, so many in flight."""
    artifact = walking.trivial()
    async with await kedge.aio.connect(address) as fleet:
        await (await fleet.run(artifact, walking.TRIVIAL_INPUTS)).wait()
        room = asyncio.Semaphore(together)

        async def one() -> None:
            async with room:
                await (await fleet.run(artifact, walking.TRIVIAL_INPUTS)).wait()

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(jobs)))
        return jobs / (time.perf_counter() - began)


def cpu_and_memory(pid: int) -> tuple[float, float]:
    """CPU seconds so far, and resident megabytes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = os.sysconf("SC_CLK_TCK")
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return (int(fields[11]) + int(fields[12])) / ticks, resident / 1e6


# ---- The parts -----------------------------------------------------------------------------------------------------


def raw_unary() -> Row:
    """Milliseconds of gRPC's own unary call over loopback."""
    with walking.raw_sink() as address, grpc.insecure_channel(address) as channel:
        call = channel.stream_unary("/raw/Sink")
        samples = []
        for _ in range(300):
            began = time.perf_counter()
            call(iter([b"x"]))
            samples.append((time.perf_counter() - began) * 1e3)
    return {"p50_ms": statistics.median(samples)}


def jobs(folder: Path, smoke: bool) -> Row:
    """A trivial job's overhead, over TLS, in a new runner each; and what an idle agent occupies."""
    (folder / "jobs").mkdir()
    with walking.fleet_of_one(folder / "jobs") as address:
        artifact, samples = walking.trivial(), []
        with kedge.connect(address) as fleet:
            fleet.wait_for_device(walking.DEVICE, timeout=30)
            for number in range(20 if smoke else 1_000):
                began = time.perf_counter()
                fleet.run(artifact, walking.TRIVIAL_INPUTS, device=walking.DEVICE).wait()
                if number >= 5:
                    samples.append((time.perf_counter() - began) * 1e3)
        samples.sort()
        return {
            "p50_ms": statistics.median(samples),
            "p99_ms": samples[int(len(samples) * 0.99)],
            "jobs": len(samples),
            "grpc_unary": raw_unary(),
            "agent_idle_pss_mb": walking.agent_memory_mb(),
        }


def session(folder: Path, smoke: bool) -> Row:
    """A call inside a session, over TLS, with a small tensor each way; beside gRPC's own unary call, in turn with it.

    What native code takes for it is measured there and told apart.
    """
    (folder / "session").mkdir()
    with walking.fleet_of_one(folder / "session") as address, kedge.connect(address) as fleet:
        fleet.wait_for_device(walking.DEVICE, timeout=30)
        began = time.perf_counter()
        with fleet.session(walking.DEVICE) as device, walking.raw_sink() as raw, grpc.insecure_channel(raw) as channel:
            opened = time.perf_counter() - began
            m = device.load(walking.trivial())
            native_ms = m.time(walking.TRIVIAL_INPUTS, repeat=5).median_ms
            there = {name: device.tensor(value) for name, value in walking.TRIVIAL_INPUTS.items()}
            unary = channel.stream_unary("/raw/Sink")
            steps: dict[str, Callable[[], object]] = {
                "call": lambda: m.run(walking.TRIVIAL_INPUTS),
                "call_keeping": lambda: m.run(there, keep=True),
                "grpc_unary": lambda: unary(iter([b"x"])),
            }
            samples: dict[str, list[float]] = {name: [] for name in steps}
            for number in range(50 if smoke else 2_000):
                for name, step in steps.items():
                    began = time.perf_counter()
                    step()
                    if number >= 20:
                        samples[name].append((time.perf_counter() - began) * 1e3)
    found: Row = {f"{name}_p50_ms": statistics.median(values) for name, values in samples.items()}
    return {
        **found,
        "call_p99_ms": sorted(samples["call"])[int(len(samples["call"]) * 0.99)],
        "over_native_p50_ms": found["call_p50_ms"] - native_ms,
        "calls": len(samples["call"]),
        "open_ms": opened * 1e3,
    }


def throughput(folder: Path, smoke: bool) -> Row:
    """Jobs per second through one tracker: 50 simulated agents, and one agent with real runners."""
    (folder / "many").mkdir()
    with tracker(folder / "many") as (address, _), agents(address, 5 if smoke else 50):
        simulated = asyncio.run(flood(address, 50 if smoke else 5_000, 100))
    (folder / "real").mkdir()
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(processes.tracker(folder / "real" / "tracker"))
        for number in range(4):
            stack.enter_context(processes.agent(address, f"real-{number}", folder / "real" / str(number)))
        real = asyncio.run(flood(address, 20 if smoke else 1_000, 32))
    return {"simulated_jobs_s": simulated, "real_jobs_s": real}


def upload(folder: Path, smoke: bool) -> Row:
    """MB/s of fresh blobs, hashed at both ends, in plaintext and over TLS, beside gRPC's own stream."""
    found = {}
    (folder / "plain").mkdir()
    with tracker(folder / "plain") as (address, _):
        found["plaintext"] = walking.upload_rate(address, smoke)
    with processes.tracker(folder / "tls") as address:
        found["tls"] = walking.upload_rate(address, smoke)
    return found


def crowd(folder: Path, smoke: bool) -> Row:
    """What many connected agents cost the tracker that does nothing else."""
    (folder / "crowd").mkdir()
    count, seconds = (20, 3.0) if smoke else (1_000, 600.0)
    with tracker(folder / "crowd") as (address, process), agents(address, count):
        before, _ = cpu_and_memory(process.pid)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            time.sleep(1.0)  # what is measured is the passing of time
        after, resident = cpu_and_memory(process.pid)
    return {"agents": count, "seconds": seconds, "cores": (after - before) / seconds, "resident_mb": resident}


def restart(folder: Path, smoke: bool) -> Row:
    """A tracker is killed with agents and waiting jobs, and started again."""
    count, waiting = (20, 50) if smoke else (1_000, 10_000)
    (folder / "restart").mkdir()
    with contextlib.ExitStack() as stack:
        with tracker(folder / "restart") as (address, process):
            asyncio.run(submit(address, waiting))
            crew = stack.enter_context(agents(address, count, idle=True))
            process.send_signal(signal.SIGKILL)
            process.wait()
        began = time.perf_counter()
        port = int(address.rpartition(":")[2])
        with tracker(folder / "restart", port) as (_, _again), kedge.connect(address) as fleet:
            accepting = time.perf_counter() - began
            while not fleet.jobs(limit=1, states=(JobState.RUNNING,)):
                pass
            dispatching = time.perf_counter() - began
            wait_ready(crew)
            back = time.perf_counter() - began
            queued = len(fleet.jobs(limit=10_000, states=(JobState.QUEUED,)))
    return {
        "agents": count, "jobs": waiting, "accepting_s": accepting, "dispatching_s": dispatching, "all_back_s": back,
        "queued_then": queued,
    }  # fmt: skip


async def submit(address: str, jobs: int) -> None:
    """Put jobs into the queue of a tracker without agents."""
    artifact = walking.trivial()
    async with await kedge.aio.connect(address) as fleet:
        await fleet.run(artifact, walking.TRIVIAL_INPUTS)
        room = asyncio.Semaphore(64)

        async def one() -> None:
            async with room:
                await fleet.run(artifact, walking.TRIVIAL_INPUTS)

        await asyncio.gather(*(one() for _ in range(jobs - 1)))


WANTED: dict[str, str] = {
    "jobs": "p50 at most 6 ms, p99 at most 25 ms; an idle agent at most 45 MB",
    "session": "p50 of a call at most 1.2 ms over native code",
    "throughput": "300 jobs/s with simulated agents, 150 with real runners",
    "upload": "350 MB/s in plaintext and 250 over TLS, or 0.35 of the raw stream",
    "crowd": "half a core and 500 MB with 1,000 agents",
    "restart": "accepting and dispatching in 10 s, all agents back in 30 s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few of everything, no result file")
    parser.add_argument("--only", metavar="PART,…", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--simulate", nargs=2, metavar=("ADDRESS", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate:
        asyncio.run(simulate(options.simulate[0], int(options.simulate[1]), options.idle))
        return
    chosen = options.only.split(",")
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    result: Row = {"date": datetime.date.today().isoformat(), "machine": harness.machine()}
    functions = {
        "jobs": jobs,
        "session": session,
        "throughput": throughput,
        "upload": upload,
        "crowd": crowd,
        "restart": restart,
    }
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as name:
        for part in chosen:
            print(f"{part} …", flush=True)
            result[part] = functions[part](Path(name), options.smoke)
            print(f"{part}: {json.dumps(result[part])}\n  wanted: {WANTED[part]}", flush=True)
    if not options.smoke and set(chosen) == set(PARTS):
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"fleet-{result['date']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
