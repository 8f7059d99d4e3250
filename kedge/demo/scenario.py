"""The main job, end to end: a tracker, agents, a trained model, and what every device made of it."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kedge
from kedge.data import digits_model, digits_test
from kedge.demo import processes
from kedge.rpc.client.timing import Timing
from kedge.rpc.errors import KedgeError

#: Two implementations of the same float32 network differ by rounding; a wrong kernel differs by far more.
MAX_ERROR = 1e-4
#: The emulated ARM device runs this user land.
ARM_ARCH = "arm64"
DEVICE_TIMEOUT_S = 60.0
#: An interrupt that comes when Python has just looked for one, and begins to wait, ends no wait: it is seen after it.
LOOK_S = 0.5

Say = Callable[[str], None]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """What one device made of the model; `problem` says why it is not right, and then figures may be absent."""

    device: str
    arch: str
    target: str
    artifact_bytes: int = 0
    accuracy: float | None = None
    max_error: float | None = None
    timing: Timing | None = None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the device is there, right and timed."""
        return self.problem is None

    def to_json(self) -> dict[str, Any]:
        """The row as JSON-able values."""
        return {
            "device": self.device,
            "arch": self.arch,
            "target": self.target,
            "artifact_bytes": self.artifact_bytes,
            "accuracy": self.accuracy,
            "max_error": self.max_error,
            "timing": self.timing.to_json() if self.timing else None,
            "ok": self.ok,
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out images with their labels, and the probabilities that the ONNX reference evaluator gives."""

    images: Array
    labels: Array
    reference: Array

    def accuracy(self, probabilities: Array) -> float:
        """The share of images whose most probable digit is the labelled one."""
        return float(np.mean(probabilities.argmax(axis=1) == self.labels))


def run_demo(say: Say, *, arm: bool = True) -> list[Row]:
    """Run the main job and give one row per device; everything that was started is gone afterwards.

    `say` receives one line per stage. With `arm` an emulated board joins over SSH, where this machine can carry one.
    """
    stopped = threading.Event()
    say = _stage_lines(say, stopped)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kedge-demo-")))
        say("starting a tracker")
        address = stack.enter_context(processes.tracker(folder / "tracker"))
        pool = stack.enter_context(ThreadPoolExecutor(3))
        try:
            return _rows(stack, pool, address, folder, say, arm)
        finally:
            # What is still joining ends at its next report: told before anything that joined is taken down.
            stopped.set()


def _rows(
    stack: contextlib.ExitStack, pool: ThreadPoolExecutor, address: str, folder: Path, say: Say, arm: bool
) -> list[Row]:
    """Let the devices join, and measure one after the other."""
    joining: dict[str, Future[Any]] = {"this-machine": pool.submit(_start_agent, stack, address, folder, say)}
    if arm:
        missing = processes.missing_for_board(ARM_ARCH)
        if missing:
            say(f"no ARM device: {missing}; going on with this machine only")
        else:
            joining[f"emulated-{ARM_ARCH}"] = pool.submit(_start_board, stack, address, say)
    say("running the held-out images through the reference evaluator")
    held_out = _held_out()
    with kedge.connect(address) as fleet:
        return [_row(fleet, name, joined, held_out, say) for name, joined in joining.items()]


def _stage_lines(say: Say, stopped: threading.Event) -> Say:
    """One line per stage, however often it reports its progress; once `stopped`, a report ends what it is about."""
    lock = threading.Lock()
    said: set[str] = set()

    def line(text: str) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stage = re.sub(r": \d+ % of .*", "", text)
        with lock:
            new = stage not in said
            said.add(stage)
        if new:
            say(stage)

    return line


def _held_out() -> HeldOut:
    from kedge.compiler.frontend.onnx.reference import reference_outputs

    images, labels = digits_test()
    return HeldOut(images, labels, reference_outputs(digits_model(), {"image": images})["probabilities"])


def _start_agent(stack: contextlib.ExitStack, address: str, folder: Path, say: Say) -> None:
    say("starting an agent on this machine")
    stack.enter_context(processes.agent(address, "this-machine", folder / "agent", say))


def _start_board(stack: contextlib.ExitStack, address: str, say: Say) -> None:
    name = f"emulated-{ARM_ARCH}"
    say(f"{name}: an {ARM_ARCH} user land under qemu with an SSH server (its packages are downloaded once)")
    stack.enter_context(processes.board(ARM_ARCH, address, name, lambda what: say(f"{name}: {what}")))


def _row(fleet: Any, name: str, joined: Future[Any], held_out: HeldOut, say: Say) -> Row:
    try:
        while not wait([joined], LOOK_S).done:
            pass
        joined.result()
        device = fleet.wait_for_device(name, timeout=DEVICE_TIMEOUT_S)
    except (KedgeError, OSError) as error:
        return Row(name, "-", "-", problem=str(error))
    info = device.info
    try:
        return _measure(fleet, name, info, held_out, say)
    except KedgeError as error:
        return Row(name, info.arch, info.target, problem=str(error))


def _measure(fleet: Any, name: str, info: Any, held_out: HeldOut, say: Say) -> Row:
    say(f"compiling the digits model for {name}: {info.target}")
    artifact = kedge.compile(digits_model(), target=info.target, name="digits")
    with fleet.pin(name, threads=1) as device:
        module = device.load(artifact)
        say(f"{name}: classifying {len(held_out.labels)} held-out images")
        probabilities = module.run({"image": held_out.images})["probabilities"]
        say(f"{name}: timing one image")
        timing = module.time({"image": held_out.images[:1]}, repeat=20, min_repeat_ms=5)
    error = float(np.abs(probabilities - held_out.reference).max())
    problem = None
    if not error <= MAX_ERROR:  # a NaN is wrong too
        problem = f"largest error against the reference is {error:.3g}, more than {MAX_ERROR:g}"
    elif timing.verdict == "invalid":
        problem = f"the measurement is invalid: {'; '.join(timing.reasons)}"
    return Row(name, info.arch, info.target, artifact.size, held_out.accuracy(probabilities), error, timing, problem)
