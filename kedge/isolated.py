"""`kedge.local()`: this machine as a device. What is loaded runs in one native runner, as in a session on a board."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from kedge.device_agent.cores import Watch
from kedge.device_agent.health import examine
from kedge.device_agent.runner import Limits, Runner
from kedge.device_agent.runner_errors import (
    RunnerCancelled,
    RunnerCrashed,
    RunnerError,
    RunnerOutOfMemory,
    RunnerRefused,
    RunnerTimeout,
    RunnerUnavailable,
)
from kedge.device_agent.runtime.protocol import Given, Kept, Tensor
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact import Artifact, Found, Placement, place
from kedge.rpc.artifact.place import GPU_KINDS, parse_device
from kedge.rpc.client.inprocess import check_interface, interface, raise_status, scratch_folder
from kedge.rpc.client.inputs import Array, arrange_given, dense, shaped
from kedge.rpc.client.profile import Profile, profile_of, profile_options
from kedge.rpc.client.tensors import DeviceTensor
from kedge.rpc.client.timing import Timing, timing_options
from kedge.rpc.cores import usable_threads
from kedge.rpc.errors import JobError
from kedge.rpc.measure import judge
from kedge.rpc.types import Measurement, Pinning, TimeOptions

#: How long a call may take before its runner is killed, unless the caller says otherwise.
RUN_TIMEOUT_S = 600.0
TIME_TIMEOUT_S = 3600.0
LOAD_TIMEOUT_S = 120.0
_OUTCOMES: Mapping[type[RunnerError], str] = {
    RunnerCrashed: "crash", RunnerTimeout: "timeout", RunnerOutOfMemory: "out_of_memory",
}  # fmt: skip


class LocalDevice:
    """This machine. A context manager: at its end the runner that it started is gone.

    Artifacts that are loaded share a runner, and take turns in it. One that crashes takes the others and all tensors
    with it; the next `load` or `tensor` starts another runner.
    """

    def __init__(self, threads: int = 0, limits: Limits = Limits(), device: str = "") -> None:  # noqa: B008 - frozen
        parse_device(device)
        self.threads = threads
        self.limits = limits
        self.device = device
        self._runner: Runner | None = None
        #: Tensors that stay, by handle, each in its runner; and those that nobody has any more.
        self._tensors: dict[int, tuple[Runner, Kept]] = {}
        self._garbage: deque[int] = deque()
        self._handles = itertools.count(1)

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
        """Load the best variant of an artifact, or of a `.kdg` file, for this machine, beside what is loaded already.

        Raises:
            IncompatibleTargetError: no variant runs here.
            ArtifactError: the runtime refuses what is in it.
            JobError: loading it crashed, took too long, or needed more memory than there is.
        """
        artifact = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
        return LocalModel(artifact, self)

    def tensor(self, value: Any) -> DeviceTensor:
        """Copy an array (numpy, torch, anything with DLPack) into the runner, where it stays.

        Raises:
            InputError: it is no array that a tensor can have.
            JobError: there is no memory for it.
        """
        array = dense(value)
        runner = self.runner()
        self.sweep()
        try:
            kept = runner.keep(_tensor(array.dtype.name, array))
        except RunnerError as error:
            _raise(error)
        return self.keep(runner, kept)

    def close(self) -> None:
        """End the runner, and what is in it."""
        if self._runner is not None:
            self._runner.close()

    def __str__(self) -> str:
        return "this machine"

    # ---- For models and tensors ----

    def runner(self) -> Runner:
        """The runner, or a new one where there is none that lives."""
        if self._runner is None or not self._runner.alive:
            try:
                self._runner = Runner(_runner(), self.threads, self.limits)
            except RunnerError as error:
                _raise(error)
        return self._runner

    def keep(self, runner: Runner, kept: Kept) -> DeviceTensor:
        """A tensor that the runner keeps."""
        handle = next(self._handles)
        self._tensors[handle] = runner, kept
        return DeviceTensor(self, handle, kept.dtype, kept.shape)

    def kept(self, tensor: DeviceTensor, runner: Runner | None = None) -> tuple[Runner, Kept]:
        """Where a tensor is; raises InputError for one that was freed, JobError for one that went with its runner."""
        found = self._tensors[tensor.handle_in(self)]
        if not found[0].alive or (runner is not None and found[0] is not runner):
            raise JobError(
                "this tensor is not there any more: its runner ended", outcome="bad_request", hint="make it anew"
            )
        return found

    def fetch(self, tensor: DeviceTensor) -> Array:
        """See `DeviceTensor.numpy`."""
        runner, kept = self.kept(tensor)
        try:
            return _array(runner.fetch(kept))
        except RunnerError as error:
            _raise(error)

    def free(self, tensor: DeviceTensor) -> None:
        """See `DeviceTensor.free`."""
        self.forget(tensor._handle)
        self.sweep()

    def forget(self, handle: int) -> None:
        """For the garbage collector: free a tensor before the next call."""
        self._garbage.append(handle)

    def sweep(self) -> None:
        """Free what nobody has any more."""
        handles: list[int] = []
        while self._garbage:
            runner, kept = self._tensors.pop(self._garbage.popleft())
            if runner is self._runner and runner.alive:
                handles.append(kept.handle)
        if handles and self._runner is not None:
            try:
                self._runner.release(handles)
            except RunnerError as error:
                _raise(error)


class LocalModel:
    """An artifact in a runner on this machine. A crash of its code is a JobError here, and ends only the runner."""

    def __init__(self, artifact: Artifact, home: LocalDevice) -> None:
        self.artifact = artifact
        self._home = home
        self._runner = home.runner()
        self._module = 0
        self._loaded = True
        self.placement = self._load(home.device)
        self.threads = self.placement.threads(home.threads, usable_threads())

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

    def __getitem__(self, function: str) -> Callable[..., dict[str, Any]]:
        """A function of the artifact, to be called with its inputs as `run` is; raises ArtifactError."""
        self.artifact.manifest.function(function)
        return lambda inputs, keep=False: self.run(inputs, function=function, keep=keep)

    def run(
        self, inputs: Mapping[str, Any], function: str = "", timeout_s: float = RUN_TIMEOUT_S, *, keep: bool = False
    ) -> dict[str, Any]:
        """Call a function; inputs may be numpy, torch, anything with DLPack, and tensors of this device.

        The outputs are arrays by name; with `keep` they stay in the runner, and are returned as `DeviceTensor`s.

        Raises:
            InputError: naming the input, what was expected and what was given.
            JobError: with the outcome "crash", "timeout", "out_of_memory" or "cancelled".
        """
        index, tensors = self._arrange(function, inputs)
        ports = self.artifact.manifest.functions[index].outputs
        try:
            if keep:
                kept = self._runner.call_keeping(index, tensors, timeout_s, module=self._module)
                named = zip(ports, kept, strict=True)
                return {port.name: self._home.keep(self._runner, each) for port, each in named}
            outputs = self._runner.call(index, tensors, timeout_s, module=self._module)
        except RunnerError as error:
            _raise(error)
        return {port.name: _array(tensor) for port, tensor in zip(ports, outputs, strict=True)}

    def time(
        self,
        inputs: Mapping[str, Any],
        function: str = "",
        *,
        number: int = 1,
        repeat: int = 20,
        min_repeat_ms: float | None = None,
        warmup: int = 1,
        cooldown_interval_ms: float = 0,
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
            number=number, repeat=repeat, min_repeat_ms=min_repeat_ms, warmup=warmup,
            cooldown_interval_ms=cooldown_interval_ms, repeats_to_cooldown=repeats_to_cooldown,
            cache_flush_bytes=cache_flush_bytes, limit_zero_time_iterations=limit_zero_time_iterations,
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
        return profile_of(self.artifact.manifest, function, shaped(inputs), timing)

    def _time(self, inputs: Mapping[str, Any], function: str, options: TimeOptions, timeout_s: float) -> Timing:
        index, tensors = self._arrange(function, inputs)
        here = Path(tempfile.gettempdir())
        before = examine(here)
        watch = Watch(self._runner.hello.pid, sorted(os.sched_getaffinity(0)))
        try:
            timed = self._runner.time(index, tensors, options, timeout_s, module=self._module)
        except RunnerError as error:
            _raise(error)
        pinning = Pinning(watch.cpus, others_share=watch.others_share())
        measurement = Measurement(
            options=replace(options, number=timed.number),
            samples_ns=timed.samples_ns,
            resolution_ns=timed.resolution_ns,
            num_threads=self.threads,
            before=before,
            after=examine(here),
            profile=None if timed.profile is None else replace(timed.profile, variant=self._variant()),
            pinning=pinning,
        )
        verdict, reasons = judge(measurement, num_cores=usable_threads())
        return Timing(replace(measurement, verdict=verdict, reasons=tuple(reasons)))

    def _variant(self) -> int:
        return self.artifact.manifest.variants.index(self.placement.variant)

    def cancel(self) -> None:
        """End the call that another thread has in flight; it raises JobError with the outcome "cancelled"."""
        self._runner.cancel()

    def close(self) -> None:
        """Unload it; what it computed stays, and so does what else is loaded. May be called again."""
        if self._loaded and self._runner.alive:
            self._loaded = False
            try:
                self._runner.close_module(self._module)
            except RunnerError as error:
                _raise(error)

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
        try:
            check_interface(self.artifact.manifest, found)
        except BaseException:  # the runner has others in it, and goes on
            self._runner.close_module(module.module)
            raise
        self._module = module.module
        return placement

    def _look(self, kind: str) -> Found:
        return _find_gpus(self._runner, kind)

    def _arrange(self, name: str, inputs: Mapping[str, Any]) -> tuple[int, list[Given]]:
        function = self.artifact.manifest.function(name)
        given = arrange_given(function, inputs)
        if not self._loaded:
            raise JobError("this artifact was unloaded", outcome="bad_request", hint="load it again")
        if not self._runner.alive:
            _raise(RunnerUnavailable("the runner of this artifact has ended", stage="run"))
        self._home.sweep()
        tensors = [
            self._home.kept(each, self._runner)[1] if isinstance(each, DeviceTensor) else _tensor(port.dtype, each)
            for port, each in zip(function.inputs, given, strict=True)
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


def _tensor(dtype: str, array: Array) -> Tensor:
    return Tensor(dtype, array.shape, array.reshape(-1).view(np.uint8).data)


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
