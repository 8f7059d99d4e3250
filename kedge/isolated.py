"""`kedge.local()`: this machine as a device. Each loaded artifact runs in a native runner of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from kedge.device_agent.health import read_health
from kedge.device_agent.runner import (
    Limits,
    Runner,
    RunnerCancelled,
    RunnerCrashed,
    RunnerError,
    RunnerOutOfMemory,
    RunnerRefused,
    RunnerTimeout,
    Tensor,
)
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact import Artifact, Found, Placement, place
from kedge.rpc.artifact.place import GPU_KINDS, parse_device
from kedge.rpc.client.inprocess import check_interface, interface, raise_status, scratch_folder, usable_cpus
from kedge.rpc.client.inputs import Array, arrange
from kedge.rpc.client.profile import Profile, profile_of, profile_options
from kedge.rpc.client.timing import Timing, timing_options
from kedge.rpc.errors import JobError
from kedge.rpc.measure import judge
from kedge.rpc.types import Measurement, TimeOptions

#: How long a call may take before its runner is killed, unless the caller says otherwise.
RUN_TIMEOUT_S = 600.0
TIME_TIMEOUT_S = 3600.0
LOAD_TIMEOUT_S = 120.0
_OUTCOMES: Mapping[type[RunnerError], str] = {
    RunnerCrashed: "crash", RunnerTimeout: "timeout", RunnerOutOfMemory: "out_of_memory",
}  # fmt: skip


class LocalDevice:
    """This machine. A context manager: at its end every runner it started is gone."""

    def __init__(self, threads: int = 0, limits: Limits = Limits(), device: str = "") -> None:  # noqa: B008 - frozen
        parse_device(device)
        self.threads = threads
        self.limits = limits
        self.device = device
        self._models: list[LocalModel] = []

    #: The target string that compiles for this device's CPU.
    target = "native"

    @property
    def targets(self) -> tuple[str, ...]:
        """Target strings for all that kernels can run on here, GPUs first; `kedge.compile` takes them together.

        Raises:
            JobError: a driver crashed, or did not answer.
        """
        gpus = sorted(devices(), key=lambda gpu: (gpu.kind, gpu.index))
        return (*dict.fromkeys(gpu.target(self.target) for gpu in gpus), self.target)

    def __enter__(self) -> LocalDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, artifact: Artifact | str | os.PathLike[str]) -> LocalModel:
        """Start a runner and load the best variant of an artifact, or of a `.kdg` file, for this machine into it.

        Raises:
            IncompatibleTargetError: no variant runs here.
            ArtifactError: the runtime refuses what is in it.
            JobError: loading it crashed, took too long, or needed more memory than there is.
        """
        artifact = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
        model = LocalModel(artifact, _runner(), self.threads, self.limits, self.device)
        self._models.append(model)
        return model

    def close(self) -> None:
        """End every runner."""
        while self._models:
            self._models.pop().close()


class LocalModel:
    """An artifact in a runner on this machine. A crash of its code is a JobError here, and ends only the runner."""

    def __init__(self, artifact: Artifact, runner: Path, threads: int, limits: Limits, device: str = "") -> None:
        self.artifact = artifact
        try:
            self._runner = Runner(runner, threads, limits)
        except RunnerError as error:
            _raise(error)
        try:
            self.placement = self._load(device)
            self.threads = self.placement.threads(threads, usable_cpus())
        except BaseException:
            self._runner.close()
            raise

    @property
    def device(self) -> str:
        """Where the kernels run: "cpu", "opencl:0", "cuda:1"."""
        return self.placement.device

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, function: str) -> Callable[[Mapping[str, Any]], dict[str, Array]]:
        """A function of the artifact, to be called with its inputs; raises ArtifactError."""
        self.artifact.manifest.function(function)
        return lambda inputs: self.run(inputs, function=function)

    def run(self, inputs: Mapping[str, Any], function: str = "", timeout_s: float = RUN_TIMEOUT_S) -> dict[str, Array]:
        """Call a function; inputs may be numpy, torch, anything with DLPack.

        Raises:
            InputError: naming the input, what was expected and what was given.
            JobError: with the outcome "crash", "timeout", "out_of_memory" or "cancelled".
        """
        index, tensors = self._arrange(function, inputs)
        try:
            outputs = self._runner.call(index, tensors, timeout_s)
        except RunnerError as error:
            _raise(error)
        ports = self.artifact.manifest.functions[index].outputs
        return {port.name: _array(tensor) for port, tensor in zip(ports, outputs, strict=True)}

    def time(
        self,
        inputs: Mapping[str, Any],
        function: str = "",
        *,
        number: int = 1,
        repeat: int = 20,
        min_repeat_ms: float = 50,
        warmup: int = 1,
        cooldown_ms: float = 0,
        repeats_to_cooldown: int = 1,
        cache_flush_bytes: int = 0,
        limit_zero_time_iterations: int = 100,
        timeout_s: float = TIME_TIMEOUT_S,
    ) -> Timing:
        """Time a function natively in the runner; the options have the names and meanings of TVM's time_evaluator.

        Raises:
            InputError, JobError: as `run`.
        """
        options = timing_options(
            number=number, repeat=repeat, min_repeat_ms=min_repeat_ms, warmup=warmup, cooldown_ms=cooldown_ms,
            repeats_to_cooldown=repeats_to_cooldown, cache_flush_bytes=cache_flush_bytes,
            limit_zero_time_iterations=limit_zero_time_iterations,
        )  # fmt: skip
        return self._time(inputs, function, options, timeout_s)

    def profile(
        self, inputs: Mapping[str, Any], function: str = "", *, timeout_s: float = TIME_TIMEOUT_S, **options: Any
    ) -> Profile:
        """Time every kernel of a function; the options are those of `time`, with min_repeat_ms=10.

        Raises:
            InputError, JobError: as `run`. The kernels of a GPU cannot be profiled.
            ArtifactError: the artifact does not say what its kernels are.
        """
        timing = self._time(inputs, function, profile_options(**options), timeout_s)
        return profile_of(self.artifact.manifest, function, inputs, timing)

    def _time(self, inputs: Mapping[str, Any], function: str, options: TimeOptions, timeout_s: float) -> Timing:
        index, tensors = self._arrange(function, inputs)
        here = Path(tempfile.gettempdir())
        before = read_health(here)
        try:
            timed = self._runner.time(index, tensors, options, timeout_s)
        except RunnerError as error:
            _raise(error)
        measurement = Measurement(
            options=replace(options, number=timed.number),
            samples_ns=timed.samples_ns,
            resolution_ns=timed.resolution_ns,
            num_threads=self.threads,
            before=before,
            after=read_health(here),
            profile=None if timed.profile is None else replace(timed.profile, variant=self._variant()),
        )
        verdict, reasons = judge(measurement, num_cores=usable_cpus())
        return Timing(replace(measurement, verdict=verdict, reasons=tuple(reasons)))

    def _variant(self) -> int:
        return self.artifact.manifest.variants.index(self.placement.variant)

    def cancel(self) -> None:
        """End the call that another thread has in flight; it raises JobError with the outcome "cancelled"."""
        self._runner.cancel()

    def close(self) -> None:
        """End the runner."""
        self._runner.close()

    def _load(self, device: str) -> Placement:
        hello = self._runner.hello
        placement = place(self.artifact.manifest, hello.machine, hello.features, self._look, device)
        variant = placement.variant
        with scratch_folder() as folder:
            lib = folder / variant.lib
            lib.write_bytes(self.artifact.member(variant.lib))
            weights = None if variant.weights is None else folder / variant.weights
            if variant.weights is not None and weights is not None:
                weights.write_bytes(self.artifact.member(variant.weights))
            try:
                module = self._runner.open(
                    lib, weights, variant.weights_offset, LOAD_TIMEOUT_S, device=placement.dl_device
                )
            except RunnerError as error:
                _raise(error)
        found = [
            interface(f.name, *([(p.name, p.dtype, p.ndim) for p in ports] for ports in (f.inputs, f.outputs)))
            for f in module.functions
        ]
        check_interface(self.artifact.manifest, found)
        return placement

    def _look(self, kind: str) -> Found:
        return _find_gpus(self._runner, kind)

    def _arrange(self, name: str, inputs: Mapping[str, Any]) -> tuple[int, list[Tensor]]:
        function = self.artifact.manifest.function(name)
        arrays = arrange(function, inputs)
        tensors = [
            Tensor(port.dtype, array.shape, array.reshape(-1).view(np.uint8).data)
            for port, array in zip(function.inputs, arrays, strict=True)
        ]
        return self.artifact.manifest.functions.index(function), tensors


def gpus(kind: str) -> Found:
    """The GPUs of this machine of a kind, "opencl" or "cuda"; its driver is loaded in a runner of its own.

    Raises:
        JobError: its driver crashed, or did not answer.
    """
    try:
        runner = Runner(_runner())
    except RunnerError as error:
        _raise(error)
    with runner:
        return _find_gpus(runner, kind)


def devices() -> list[Accelerator]:
    """See `kedge.devices`."""
    return [gpu for kind in GPU_KINDS for gpu in gpus(kind).accelerators]


def _find_gpus(runner: Runner, kind: str) -> Found:
    try:
        return runner.devices(kind, LOAD_TIMEOUT_S)
    except RunnerError as error:
        raise JobError(
            f"looking for {kind} devices failed: {error.message}",
            outcome=_OUTCOMES.get(type(error), "device_fault"),
            hint=f"the {kind} driver of this machine is broken: mend or remove it; the CPU needs none",
        ) from error


def _runner() -> Path:
    from kedge.compiler.target import parse
    from kedge.compiler.toolchain import build_runtime

    return build_runtime(parse("native")).runner


def _array(tensor: Tensor) -> Array:
    if tensor.nbytes == 0:
        return np.empty(tensor.shape, tensor.dtype)
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)


def _raise(error: RunnerError) -> NoReturn:
    """What a runner's failure means to a user."""
    if isinstance(error, RunnerCancelled):
        raise JobError(error.message, outcome="cancelled") from error
    if isinstance(error, RunnerRefused):
        raise_status(error.status, error.message)
    outcome = _OUTCOMES.get(type(error), "device_fault")
    hint = "load the artifact again for a new runner" if outcome != "out_of_memory" else None
    raise JobError(error.message, outcome=outcome, hint=error.hint or hint) from error
