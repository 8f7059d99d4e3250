"""An artifact bound in this process: zero-copy arrays in and out, no copy of the weights, no round trip.

The runtime library is loaded by ctypes. What a call needs (tensor descriptors, argument objects) is made once per set
of input shapes and kept, so that a call costs a few microseconds more than the kernels.

Native code runs without protection here: a crash ends this process. `kedge.local()` isolates it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from kedge.rpc import abi
from kedge.rpc.artifact import Artifact, Function, Manifest, place
from kedge.rpc.client.gpus import find_gpus
from kedge.rpc.client.inputs import Array, arrange, as_array, check_output
from kedge.rpc.client.profile import Profile, profile_of, profile_options
from kedge.rpc.client.timing import Timing, timing_options
from kedge.rpc.cores import usable_threads
from kedge.rpc.errors import ArtifactError, IncompatibleTargetError, InputError, JobError, KedgeError
from kedge.rpc.measure import judge
from kedge.rpc.types import Health, Measurement, StepSamples, TimeOptions

Outputs = dict[str, Array]

#: Input shapes for which a function remembers its descriptors; a new one beyond that starts over.
MAX_PLANS = 64
_READY = 0x101  # numpy's flags C_CONTIGUOUS | ALIGNED
_FROM_BUFFER, _ADDRESS = ctypes.c_char.from_buffer, ctypes.addressof
#: Reads this machine's condition; None where nothing can.
ReadHealth = Callable[[], Health | None]


def open_in_process(
    artifact: Artifact,
    runtime_lib: Path,
    threads: int = 0,
    device: str = "",
    read_health: ReadHealth = lambda: None,
) -> LoadedModel:
    """Bind the artifact's best variant for this machine, see `place`.

    Args:
        artifact: any artifact; it must stay alive as long as the model only where its weights are mapped.
        runtime_lib: a `libkedge_rt.so` for this machine.
        threads: of the kernels; 0 means as many as this process may use, or one beside a GPU.
        device: where they run: "cpu", "opencl", "cuda:1"; "" leaves it to the artifact.
        read_health: called before and after each timing.

    Raises:
        IncompatibleTargetError: no variant runs on this machine, or on that device.
        ArtifactError: the runtime refuses what is in it.
    """
    return LoadedModel(artifact, runtime_lib, threads, device, read_health)


class LoadedModel:
    """A model ready to be called from any thread; each thread gets a context of its own. A context manager.

    `model["name"]` is a function of it, called as `model["name"]({"x": x})`.
    """

    def __init__(
        self, artifact: Artifact, runtime_lib: Path, threads: int, device: str, read_health: ReadHealth
    ) -> None:
        self._lib = _load_runtime(runtime_lib)
        self._read_health = read_health
        self.artifact = artifact
        features = self._lib.kedge_cpu_features().decode().split(",")
        look = partial(find_gpus, self._lib)
        self.placement = place(artifact.manifest, platform.machine(), features, look, device)
        self.variant = self.placement.variant
        self.threads = self.placement.threads(threads, usable_threads())
        self._weights = _aligned_weights(artifact, self.variant.weights, self.variant.weights_offset)
        self._model = self._open()
        self._local = threading.local()
        self._contexts: weakref.WeakSet[_Context] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        self._finalizer = weakref.finalize(self, self._lib.kedge_close, self._model)
        self._finalizer.atexit = False  # a daemon thread may still be in native code then
        self._check_library()
        functions = artifact.manifest.functions
        self.functions = {f.name: LoadedFunction(self, i, f) for i, f in enumerate(functions)}
        #: Made now, not at the first call: whether the driver takes the kernels, their memory, and what both cost.
        self._first: _Context | None = self._new_context()
        if len(self.functions) == 1:  # of several, one that needs too much must not take the others with it
            next(iter(self.functions.values()))._prepare(self._first)

    @property
    def device(self) -> str:
        """Where the kernels run: "cpu", "opencl:0", "cuda:1"."""
        return self.placement.device

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> LoadedFunction:
        return self.functions[self.artifact.manifest.function(name).name]

    def run(self, inputs: Mapping[str, Any], function: str = "", out: Mapping[str, Array] | None = None) -> Outputs:
        """Call a function.

        Args:
            inputs: name -> array. numpy, or anything with DLPack or numpy's array interface; copied only where it is
                strided or unaligned.
            function: its name; the only one, or "main", unless given.
            out: name -> array to write an output to, C-contiguous; those not named are new arrays.

        Raises:
            InputError: naming the input or output, what was expected and what was given.
            JobError: the call itself failed or was cancelled.
        """
        return self[function](inputs, out)

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Array] | None = None, function: str = "") -> BoundCall:
        """A callable for these very arrays; each call reads and writes their memory as it is then, unchecked."""
        return self[function].bind(inputs, out)

    def time(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Timing:
        """Time a function natively; the options are those of `LoadedFunction.time`."""
        return self[function].time(inputs, **options)

    def profile(self, inputs: Mapping[str, Any], function: str = "", **options: Any) -> Profile:
        """Time every kernel of a function; see `LoadedFunction.profile`."""
        return self[function].profile(inputs, **options)

    def cancel(self) -> None:
        """End the calls that other threads have in flight, at their next kernel; they raise JobError."""
        with self._lock:
            contexts = list(self._contexts)
        for context in contexts:
            context.cancel()

    def close(self) -> None:
        """Free everything, after the calls in flight have ended. Arrays that were returned stay."""
        with self._lock:
            self._closed = True
            contexts = list(self._contexts)
        for context in contexts:
            context.close()
        self._finalizer()
        self._weights = None

    def _open(self) -> ctypes.c_void_p:
        with scratch_folder() as folder:
            lib = folder / "lib.so"
            lib.write_bytes(self.artifact.member(self.variant.lib))
            options = abi.OpenOptions(struct_size=ctypes.sizeof(abi.OpenOptions), lib_path=os.fsencode(lib))
            if self._weights is not None:
                options.weights_data = self._weights.ctypes.data
            model = ctypes.c_void_p()
            status = self._lib.kedge_open(options, model)
        if status != abi.OK:
            _refuse(self._lib, status)
        return model

    def _check_library(self) -> None:
        """What the manifest says must hold for the library: nothing else guards the memory of this process."""
        module = self._lib.kedge_describe(self._model).contents
        functions = [module.functions[i].contents for i in range(module.n_functions)]
        check_interface(
            self.artifact.manifest,
            [interface(_name(f.name), _ports(f.inputs, f.n_inputs), _ports(f.outputs, f.n_outputs)) for f in functions],
        )
        size = 0 if self._weights is None else self._weights.nbytes
        if size < module.weights_size:
            raise ArtifactError(
                f"artifact {self.artifact.manifest.name!r} has {size} bytes of weights, "
                f"its library needs {module.weights_size}",
                hint="compile the model again",
            )

    def _context(self) -> _Context:
        """This thread's context."""
        try:
            context: _Context = self._local.context
        except AttributeError:
            context = self._local.context = self._unused_context()
        return context

    def _unused_context(self) -> _Context:
        """The one that opening made, for whoever asks first, or a new one."""
        with self._lock:
            context, self._first = self._first, None
        return context or self._new_context()

    def _new_context(self) -> _Context:
        with self._lock:
            if self._closed:
                raise KedgeError(f"the model {self.artifact.manifest.name!r} is closed", hint="open the artifact again")
            context = _Context(self._lib, self._model, self.threads, self.placement.dl_device)
            self._contexts.add(context)
            return context


class LoadedFunction:
    """A function of a loaded model."""

    def __init__(self, model: LoadedModel, index: int, manifest: Function) -> None:
        self.manifest = manifest
        self._model = model
        self._index = index
        self._inputs = tuple((port.name, _numpy_dtype(port.dtype)) for port in manifest.inputs)

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, ports)) for ports in (self.manifest.inputs, self.manifest.outputs))
        return f"<function {self.manifest.name}({inputs}) -> {outputs}>"

    def __call__(self, inputs: Mapping[str, Any] = {}, out: Mapping[str, Array] | None = None) -> Outputs:
        """See `LoadedModel.run`."""
        arrays, shapes = self._fast(inputs) or self._slow(inputs)
        context = self._model._context()
        with context.lock:
            plan = context.plans.get((self._index, shapes)) or self._plan(context, arrays, shapes)
            outputs = plan.new_outputs() if out is None else plan.given_outputs(out, arrays)
            plan.point(arrays, outputs)
            status = context.call(*plan.arguments)
        if status:
            context.refuse(status)
        return dict(zip(plan.names, outputs))

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Array] | None = None) -> BoundCall:
        """See `LoadedModel.bind`."""
        arrays, shapes = self._slow(inputs)
        context = self._model._unused_context()
        plan = self._plan(context, arrays, shapes)
        plan.prepare(context)
        outputs = plan.new_outputs() if out is None else plan.given_outputs(out, arrays)
        plan.point(arrays, outputs)
        return BoundCall(self._model, context, plan, arrays, dict(zip(plan.names, outputs, strict=True)))

    def time(
        self,
        inputs: Mapping[str, Any] = {},
        *,
        number: int = 1,
        repeat: int = 20,
        min_repeat_ms: float | None = None,
        warmup: int = 1,
        cooldown_interval_ms: float = 0,
        repeats_to_cooldown: int = 1,
        cache_flush_bytes: int = 0,
        limit_zero_time_iterations: int = 100,
    ) -> Timing:
        """Time the native code in this process; the options have the names and meanings of TVM's time_evaluator."""
        options = timing_options(
            number=number, repeat=repeat, min_repeat_ms=min_repeat_ms, warmup=warmup,
            cooldown_interval_ms=cooldown_interval_ms, repeats_to_cooldown=repeats_to_cooldown,
            cache_flush_bytes=cache_flush_bytes, limit_zero_time_iterations=limit_zero_time_iterations,
        )  # fmt: skip
        return self._time(inputs, options)

    def profile(self, inputs: Mapping[str, Any] = {}, **options: Any) -> Profile:
        """Time every kernel in this process; the options are those of `time`, with min_repeat_ms=10.

        Raises:
            InputError: an input or option is wrong, or the kernels run on a GPU, where none can be timed by itself.
            ArtifactError: the artifact does not say what its kernels are.
        """
        timing = self._time(inputs, profile_options(**options))
        return profile_of(self._model.artifact.manifest, self.manifest.name, inputs, timing)

    def _time(self, inputs: Mapping[str, Any], options: TimeOptions) -> Timing:
        arrays, shapes = self._slow(inputs)
        context = self._model._context()
        samples = (ctypes.c_double * options.repeat)()
        result = abi.TimeResult(struct_size=ctypes.sizeof(abi.TimeResult), samples_ns=samples)
        n_steps = self._model._lib.kedge_describe(self._model._model).contents.functions[self._index].contents.n_steps
        if options.profile:
            result.step_ns = (ctypes.c_double * max(1, options.repeat * n_steps))()
        with context.lock:
            plan = self._plan(context, arrays, shapes)
            outputs = plan.new_outputs()
            plan.point(arrays, outputs)
            before = self._model._read_health()
            status = self._model._lib.kedge_time(*plan.arguments, time_options(options), result)
        after = self._model._read_health()
        if status:
            context.refuse(status)
        measurement = Measurement(
            replace(options, number=result.number), tuple(samples[: result.n_samples]), result.resolution_ns,
            self._model.threads, before, after, profile=self._steps(result, n_steps) if options.profile else None,
        )  # fmt: skip
        verdict, reasons = judge(measurement, num_cores=usable_threads())
        return Timing(replace(measurement, verdict=verdict, reasons=tuple(reasons)))

    def _steps(self, result: abi.TimeResult, n_steps: int) -> StepSamples:
        rows = result.step_ns[: result.n_samples * n_steps]
        variant = self._model.artifact.manifest.variants.index(self._model.variant)
        by_step = tuple(tuple(rows[step::n_steps]) for step in range(n_steps))
        return StepSamples(by_step, result.clock_hz, tuple(result.read_bytes_per_s), variant)

    def _fast(self, inputs: Mapping[str, Any]) -> tuple[list[Array], tuple[Any, ...]] | None:
        """The arrays in order when all of them are as they should be, at the least cost; None when in doubt."""
        if type(inputs) is not dict or len(inputs) != len(self._inputs):
            return None
        arrays, shapes = [], []
        for name, dtype in self._inputs:
            array = inputs.get(name)
            if type(array) is not np.ndarray or array.dtype != dtype or array.flags.num & _READY != _READY:
                return None
            arrays.append(array)
            shapes.append(array.shape)
        return arrays, tuple(shapes)

    def _slow(self, inputs: Mapping[str, Any]) -> tuple[list[Array], tuple[Any, ...]]:
        arrays = arrange(self.manifest, inputs)
        return arrays, tuple(array.shape for array in arrays)

    def _prepare(self, context: _Context) -> None:
        """Make the memory that calls need, where shapes are known before there is one."""
        shapes: tuple[Any, ...] = tuple(port.shape for port in self.manifest.inputs)
        known = all(isinstance(dim, int) for shape in shapes for dim in shape)
        if known and all(dtype is not None for _, dtype in self._inputs):
            arrays = [np.empty(shape, dtype) for shape, (_, dtype) in zip(shapes, self._inputs, strict=True)]
            self._plan(context, arrays, shapes).prepare(context)

    def _plan(self, context: _Context, arrays: Sequence[Array], shapes: tuple[Any, ...]) -> _Plan:
        arrange(self.manifest, {port.name: array for port, array in zip(self.manifest.inputs, arrays, strict=True)})
        plan = _Plan(self._model._lib, context, self._index, self.manifest, arrays)
        if len(context.plans) >= MAX_PLANS:
            context.plans.clear()
        context.plans[self._index, shapes] = plan
        return plan


class BoundCall:
    """One call over fixed arrays, at the lowest cost there is: no checks, no allocation.

    `outputs` are the arrays that every call writes.
    """

    def __init__(
        self, model: LoadedModel, context: _Context, plan: _Plan, arrays: Sequence[Array], outputs: Outputs
    ) -> None:
        self.outputs = outputs
        self._keep = (model, context, plan, arrays)
        self._context, self._lock = context, context.lock
        self._call, self._arguments = context.call, plan.arguments

    def __call__(self) -> Outputs:
        """Call; returns `outputs`."""
        with self._lock:
            status = self._call(*self._arguments)
        if status:
            self._context.refuse(status)
        return self.outputs


class _Context:
    """A kedge_context with what calls on it keep. Its lock is held while native code uses it."""

    def __init__(self, lib: Any, model: ctypes.c_void_p, threads: int, device: tuple[int, int]) -> None:
        self.lib = lib
        self.closed = False
        self._gate = threading.Lock()
        self.handle = ctypes.c_void_p()
        options = abi.ContextOptions(struct_size=ctypes.sizeof(abi.ContextOptions), num_threads=threads)
        status = lib.kedge_context_create(model, abi.DLDevice(*device), options, self.handle)
        if status != abi.OK:
            _refuse(lib, status)
        self.lock = threading.Lock()
        self.plans: dict[tuple[int, tuple[Any, ...]], _Plan] = {}
        #: kedge_call without declared argument types: it takes only ctypes objects, and converts nothing.
        self.call: Any = lib["kedge_call"]
        self.call.restype = ctypes.c_int32
        self._finalizer = weakref.finalize(self, lib.kedge_context_destroy, self.handle)
        self._finalizer.atexit = False

    def cancel(self) -> None:
        """Cancel the call that uses it, if any."""
        with self._gate:
            if not self.closed:
                self.lib.kedge_cancel(self.handle)

    def close(self) -> None:
        """Free it, once no call uses it."""
        with self.lock, self._gate:
            self.closed = True
            self._finalizer()
            self.handle.value = None  # plans share it: whoever still holds one is refused by the runtime

    def refuse(self, status: int) -> NoReturn:
        """Raise what a status means."""
        if self.closed:
            raise KedgeError("the model is closed", hint="open the artifact again")
        _refuse(self.lib, status)


class _Plan:
    """Descriptors and argument objects of a function for one set of input shapes, on one context."""

    def __init__(self, lib: Any, context: _Context, index: int, function: Function, arrays: Sequence[Array]) -> None:
        self._ports = function.outputs
        self.names = tuple(port.name for port in function.outputs)
        n_args, n_rets = len(arrays), len(function.outputs)
        args, rets = (abi.DLTensor * max(n_args, 1))(), (abi.DLTensor * max(n_rets, 1))()
        # Indexing a ctypes array makes a new object each time; these stay.
        self._args, self._rets = tuple(args)[:n_args], tuple(rets)[:n_rets]
        for port, tensor, array in zip(function.inputs, self._args, arrays, strict=True):
            _describe(tensor, port.dtype, array.shape)
        for tensor in self._rets:
            _describe(tensor, "float32", (0,) * abi.MAX_NDIM)
        integer = ctypes.c_int32
        self.arguments = (context.handle, integer(index), args, integer(n_args), rets, integer(n_rets))
        status = lib.kedge_infer(*self.arguments)
        if status != abi.OK:
            context.refuse(status)
        shapes = [tuple(tensor.shape[: tensor.ndim]) for tensor in self._rets]
        self._outputs = [(s, np.dtype(p.dtype)) for s, p in zip(shapes, function.outputs, strict=True)]

    def prepare(self, context: _Context) -> None:
        """Make the memory that a call needs beside its arrays."""
        status = context.lib.kedge_prepare(*self.arguments)
        if status != abi.OK:
            context.refuse(status)

    def new_outputs(self) -> list[Array]:
        """Fresh arrays for the outputs."""
        return [np.empty(shape, dtype) for shape, dtype in self._outputs]

    def given_outputs(self, out: Mapping[str, Array], inputs: Sequence[Array]) -> list[Array]:
        """The user's arrays for the outputs, and fresh ones for those not given; none may lie on another array."""
        unknown = set(out) - set(self.names)
        if unknown:
            raise InputError(f"there is no output {', '.join(sorted(map(repr, unknown)))}", hint=f"{self.names}")
        arrays: list[Array] = []
        for port, (shape, dtype) in zip(self._ports, self._outputs, strict=True):
            array = check_output(port, out[port.name]) if port.name in out else np.empty(shape, dtype)
            if array.shape != shape:
                raise InputError(f"out {port.name!r} has shape {list(array.shape)}, expected {list(shape)}")
            if port.name in out and any(np.may_share_memory(array, other) for other in (*inputs, *arrays)):
                raise InputError(  # kernels are compiled on the promise that it does not
                    f"out {port.name!r} overlaps an input or another output", hint="give it memory of its own"
                )
            arrays.append(array)
        return arrays

    def point(self, arrays: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Let the descriptors point to these arrays."""
        for tensor, array in zip(self._args, arrays):
            tensor.data = _address(array)
        for tensor, array in zip(self._rets, outputs):
            tensor.data = _address(array)


def _address(array: Any) -> int:
    try:
        return _ADDRESS(_FROM_BUFFER(array))  # an eighth of the time that array.ctypes.data takes
    except (TypeError, ValueError):  # read-only, or empty
        return int(array.ctypes.data)


def _describe(tensor: abi.DLTensor, dtype: str, shape: Sequence[int]) -> None:
    code, bits = abi.dtype_code(dtype)
    tensor.device = abi.DLDevice(abi.DEVICE_CPU, 0)
    tensor.dtype = abi.DLDataType(code, bits, 1)
    tensor.ndim = len(shape)
    tensor.shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder to unpack an artifact to; what is mapped from it outlives it.

    Raises:
        KedgeError: it cannot be made, is full, or its disk allows no programs.
    """
    hint = "free space there, or set TMPDIR to another folder"
    try:
        folder = Path(tempfile.mkdtemp(prefix="kedge-"))
    except OSError as error:
        raise KedgeError(f"cannot make a temporary folder in {error.filename}: {error.strerror}", hint=hint) from error
    try:
        if hasattr(os, "statvfs") and os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise KedgeError(
                f"{folder.parent} lies on a disk that allows no programs (noexec)", hint="set TMPDIR to another folder"
            )
        yield folder
    except OSError as error:
        raise KedgeError(f"cannot unpack the artifact to {folder}: {error.strerror}", hint=hint) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def interface(name: str, inputs: Sequence[tuple[str, str, int]], outputs: Sequence[tuple[str, str, int]]) -> str:
    """A function as text, from name, dtype and number of dims of its ports: equal texts, equal calls."""
    taken, given = (", ".join(f"{n}: {dtype}[{ndim} dims]" for n, dtype, ndim in ports) for ports in (inputs, outputs))
    return f"{name}({taken}) -> ({given})"


def check_interface(manifest: Manifest, found: Sequence[str]) -> None:
    """Raise ArtifactError unless `found` (see `interface`) are the manifest's functions: calls go by index."""
    promised = [
        interface(f.name, *([(p.name, p.dtype, len(p.shape)) for p in ports] for ports in (f.inputs, f.outputs)))
        for f in manifest.functions
    ]
    if list(found) == promised:
        return
    for index, (wanted, there) in enumerate(zip_longest(promised, found, fillvalue="nothing")):
        if wanted != there:
            raise ArtifactError(
                f"artifact {manifest.name!r}: its manifest promises {wanted} as function {index}, "
                f"its library has {there}",
                hint="compile the model again",
            )


def _name(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _ports(ports: Any, count: int) -> list[tuple[str, str, int]]:
    """Of a library: name, dtype, number of dims."""
    found = []
    for port in ports[:count] if count else ():
        code, bits, lanes = port.dtype.code, port.dtype.bits, port.dtype.lanes
        try:
            dtype = abi.dtype_name(code, bits, lanes)
        except ValueError:
            dtype = f"dtype({code}, {bits}, {lanes})"
        found.append((_name(port.name), dtype, port.ndim))
    return found


def time_options(options: TimeOptions) -> abi.TimeOptions:
    """The options as the ABI takes them."""
    return abi.TimeOptions(ctypes.sizeof(abi.TimeOptions), *time_fields(options))


def time_fields(options: TimeOptions) -> tuple[int, ...]:
    """The options in the ABI's order."""
    return tuple(getattr(options, field[0]) for field in abi.TimeOptions._fields_[1:])


def raise_status(status: int, message: str) -> NoReturn:
    """The exception that a kedge_status other than OK means to a user."""
    if status in (abi.E_INPUT, abi.E_ARGUMENT):
        raise InputError(message)
    if status in (abi.E_FEATURE, abi.E_ABI):
        raise IncompatibleTargetError(message, hint="compile the model again, for this machine")
    if status == abi.E_LOAD:
        raise ArtifactError(message, hint="compile the model again")
    outcome = {abi.E_MEMORY: "out_of_memory", abi.E_CANCELLED: "cancelled"}.get(status, "crash")
    raise JobError(message, outcome=outcome)


def _refuse(lib: Any, status: int) -> NoReturn:
    raise_status(status, lib.kedge_last_error().decode("utf-8", "replace"))


def _aligned_weights(artifact: Artifact, member: str | None, offset: int) -> Array | None:
    """The weights as memory at the ABI's alignment: the artifact's own, or a copy where they lie badly."""
    if member is None:
        return None
    data = np.frombuffer(artifact.member(member), np.uint8)[max(offset, 0) :]
    if len(data) == 0:
        return None
    if data.ctypes.data % abi.ALIGNMENT == 0:
        return data
    room = np.empty(len(data) + abi.ALIGNMENT, np.uint8)
    start = -room.ctypes.data % abi.ALIGNMENT
    aligned = room[start : start + len(data)]
    aligned[:] = data
    return aligned


_runtimes: dict[Path, Any] = {}
_runtimes_lock = threading.Lock()


def _load_runtime(path: Path) -> Any:
    with _runtimes_lock:
        resolved = path.resolve()
        if resolved not in _runtimes:
            try:
                _runtimes[resolved] = abi.load_runtime(str(resolved))
            except (OSError, ValueError) as error:
                raise IncompatibleTargetError(f"cannot load the runtime: {error}") from error
        return _runtimes[resolved]


def _numpy_dtype(name: str) -> np.dtype[Any] | None:
    """The dtype, or None where numpy has none: an input of it is refused when it is given."""
    try:
        return np.dtype(name)
    except TypeError:
        return None


__all__ = ["BoundCall", "LoadedFunction", "LoadedModel", "as_array", "open_in_process", "raise_status"]
