# ruff: noqa: E402
"""A user who submits job after job and checks every answer: ADDRESS ARTIFACT NUMBER SEED THREADS LARGE_SHARE LOG.

Writes a line of JSON for each thing that happens: what it is about to submit and what has to come of it, that it was
accepted, how it ended. SIGTERM: no more jobs; it ends when those that are under way have.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Waited for, not handled: the kernel may give it to another thread, which does not wake one that joins. Blocked before
# any thread is there: numpy's own would take it, and end the process, while the main thread comes back from a SIGSTOP.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

import numpy as np
import numpy.typing as npt

import kedge
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet
from kedge.rpc.errors import ConnectError, KedgeError
from kedge.rpc.types import Deadlines

F32 = npt.NDArray[np.float32]
#: Numbers of one client's jobs; float32 holds those of a hundred clients.
JOBS_EACH = 100_000
DEADLINES = Deadlines(queue_ms=120_000, transfer_ms=60_000, load_ms=10_000, run_ms=4_000)
#: Of all that a client does.
SESSION_SHARE = 0.03
LARGE = (300_000, 1_200_000)
SLOW_MS = 60


class Client:
    def __init__(self, address: str, artifact: Artifact, number: int, seed: int, large_share: float, log: str) -> None:
        self.address = address
        self.artifact = artifact
        self.seed = seed
        self.large_share = large_share
        self.stopping = threading.Event()
        self._numbers: Iterator[int] = itertools.count(number * JOBS_EACH)
        self._log = open(log, "a", buffering=1)  # noqa: SIM115, PTH123 - as long as the process

    def say(self, what: str, number: int, **more: Any) -> None:
        self._log.write(json.dumps({"what": what, "n": number, **more}) + "\n")

    def work(self, thread: int) -> None:
        rng = random.Random(f"{self.seed}/{thread}")
        with self.connect() as fleet:
            while not self.stopping.is_set():
                do = self.session if rng.random() < SESSION_SHARE else self.one
                do(fleet, rng, next(self._numbers))

    def connect(self) -> Fleet:
        """A tracker that does not answer now may be there in a moment; only jobs are waited for by themselves."""
        while True:
            try:
                return kedge.connect(self.address)
            except ConnectError:
                self.stopping.wait(0.1)

    def one(self, fleet: Fleet, rng: random.Random, number: int) -> None:
        function, x = self.draw(rng, number)
        y = x + np.float32(1)
        self.say("submit", number, function=function, x=sha(x), y=sha(y))
        job_id = ""
        try:
            job = fleet.run(self.artifact, {"x": x}, function=function, deadlines=DEADLINES)
            job_id = job.id
            self.say("accepted", number, id=job_id)
            result = job.wait(timeout=240, check=False)
        except KedgeError as error:
            self.say("error", number, id=job_id, error=type(error).__name__, text=str(error))
            self.stopping.wait(0.2)
            return
        right = result.outcome.ok and np.array_equal(result["y"], y)
        self.say("done", number, id=job_id, outcome=result.outcome.kind.value, right=bool(right))

    def session(self, fleet: Fleet, rng: random.Random, number: int) -> None:
        """A device of one's own, and a tensor that stays there from call to call."""
        _, x = self.draw(rng, number)
        calls = rng.randrange(1, 5)
        self.say("session", number)
        try:
            with fleet.session(deadlines=DEADLINES) as device:
                model, kept = device.load(self.artifact), device.tensor(x)
                for _ in range(calls):
                    kept = model.run({"x": kept}, "add_one", keep=True)["y"]
                right = np.array_equal(kept.numpy(), x + np.float32(calls))
        except KedgeError as error:
            self.say("session-error", number, error=type(error).__name__, text=str(error))
            self.stopping.wait(0.2)
            return
        self.say("session-done", number, right=bool(right))

    def draw(self, rng: random.Random, number: int) -> tuple[str, F32]:
        large = rng.random() < self.large_share
        x = np.zeros(rng.randrange(*LARGE) if large else rng.randrange(2, 60), np.float32)
        x[0], x[1] = number, rng.randrange(SLOW_MS)
        return ("slowly" if rng.random() < 0.3 else "add_one"), x


def sha(array: F32) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def main(address: str, artifact: str, number: str, seed: str, threads: str, large_share: str, log: str) -> None:
    client = Client(address, Artifact.load(artifact), int(number), int(seed), float(large_share), log)
    client.say("ready", 0)
    workers = [threading.Thread(target=client.work, args=(each,)) for each in range(int(threads))]
    for worker in workers:
        worker.start()
    signal.sigwait({signal.SIGTERM})
    client.stopping.set()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
