"""Calls of the runtime's C functions on a GPU, and what must hold on every kind of one.

Needs only this repository, numpy and files built elsewhere: `libkedge_rt.so` and tests/runtime/modules/gpu.c. So the
scenarios run with OpenCL in the test process, with a stand-in for CUDA in a process of its own, and on a machine
that has a GPU and no compiler.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge.rpc import abi

FUNCTIONS = (
    "add", "weigh", "chain", "sums", "where", "wide", "forever", "failing", "unlisted", "negative", "stray", "wild",
    "huge",
)  # fmt: skip
NAMES = {abi.DEVICE_CPU: "CPU", abi.DEVICE_CUDA: "CUDA", abi.DEVICE_OPENCL: "OpenCL"}
WEIGHTS = np.arange(32, dtype=np.float32)


class Refused(Exception):
    """A function of the runtime failed."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class OnDevice:
    """A tensor in memory of `kedge_device_alloc`."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    device: tuple[int, int]
    byte_offset: int = 0


def tensor(value: Any) -> Any:
    """The DLTensor of an array or an OnDevice; it keeps alive what it points to, but for the array's data."""
    shape = (ctypes.c_int64 * max(1, len(value.shape)))(*value.shape)
    code, bits = abi.dtype_code(str(value.dtype))
    on_host = isinstance(value, np.ndarray)
    address, device, offset = (
        (value.ctypes.data, (abi.DEVICE_CPU, 0), 0) if on_host else (value.address, value.device, value.byte_offset)
    )
    return abi.DLTensor(
        address, abi.DLDevice(*device), len(value.shape), abi.DLDataType(code, bits, 1), shape, None, offset
    )


class Context:
    """A context; the methods raise Refused."""

    def __init__(self, gpu: Gpu, handle: Any) -> None:
        self.gpu, self.handle = gpu, handle

    def call(self, function: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.gpu.check(self.gpu.lib.kedge_call(*self._arguments(function, inputs, outputs)))

    def time(self, function: str, inputs: Sequence[Any], outputs: Sequence[Any], **options: int) -> list[float]:
        """Nanoseconds of each sample."""
        chosen = {"number": 1, "repeat": 3, "repeats_to_cooldown": 1, **options}
        wanted = abi.TimeOptions(ctypes.sizeof(abi.TimeOptions), **chosen)
        samples = (ctypes.c_double * chosen["repeat"])()
        result = abi.TimeResult(ctypes.sizeof(abi.TimeResult), samples)
        if chosen.get("profile"):
            result.step_ns = (ctypes.c_double * chosen["repeat"])()
        arguments = self._arguments(function, inputs, outputs)
        self.gpu.check(self.gpu.lib.kedge_time(*arguments, ctypes.byref(wanted), ctypes.byref(result)))
        return list(samples[: result.n_samples])

    def _arguments(self, function: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
        args = (abi.DLTensor * max(1, len(inputs)))(*map(tensor, inputs))
        rets = (abi.DLTensor * max(1, len(outputs)))(*map(tensor, outputs))
        return self.handle, FUNCTIONS.index(function), args, len(inputs), rets, len(outputs)

    def alloc(self, size: int) -> int:
        address = ctypes.c_void_p()
        self.gpu.check(self.gpu.lib.kedge_device_alloc(self.handle, size, ctypes.byref(address)))
        assert address.value is not None
        return address.value

    def free(self, address: int) -> None:
        self.gpu.check(self.gpu.lib.kedge_device_free(self.handle, address))

    def copy(self, to: int, source: int, size: int, direction: int) -> None:
        self.gpu.check(self.gpu.lib.kedge_device_copy(self.handle, to, source, size, direction))

    def put(self, array: Any) -> OnDevice:
        """A copy of an array on the device; `free` its address."""
        address = self.alloc(array.nbytes)
        self.copy(address, array.ctypes.data, array.nbytes, abi.COPY_TO_DEVICE)
        return OnDevice(address, array.shape, str(array.dtype), self.gpu.device)

    def get(self, value: OnDevice) -> Any:
        array = np.empty(value.shape, value.dtype)
        self.copy(array.ctypes.data, value.address + value.byte_offset, array.nbytes, abi.COPY_FROM_DEVICE)
        return array

    def cancel(self) -> None:
        self.gpu.lib.kedge_cancel(self.handle)

    def synchronize(self) -> None:
        self.gpu.check(self.gpu.lib.kedge_device_synchronize(self.handle))


class Gpu:
    """A runtime, a build of gpu.c and the device to run it on."""

    def __init__(self, runtime: str, module: str, device: tuple[int, int]) -> None:
        self.lib, self.module, self.device = abi.load_runtime(runtime), module, device
        room = (ctypes.c_char * (WEIGHTS.nbytes + abi.ALIGNMENT))()
        address = -(-ctypes.addressof(room) // abi.ALIGNMENT) * abi.ALIGNMENT
        ctypes.memmove(address, WEIGHTS.ctypes.data, WEIGHTS.nbytes)
        self._weights_memory, self._weights = room, address

    def check(self, status: int) -> None:
        if status != abi.OK:
            raise Refused(status, self.lib.kedge_last_error().decode())

    def properties(self, device: tuple[int, int] | None = None) -> Any:
        found = abi.DeviceProperties(ctypes.sizeof(abi.DeviceProperties))
        self.check(self.lib.kedge_device_info(*(device or self.device), ctypes.byref(found)))
        return found

    @contextmanager
    def model(self, module: str | None = None) -> Iterator[Any]:
        path = (module or self.module).encode()
        options = abi.OpenOptions(ctypes.sizeof(abi.OpenOptions), path, None, 0, self._weights)
        handle = ctypes.c_void_p()
        self.check(self.lib.kedge_open(ctypes.byref(options), ctypes.byref(handle)))
        try:
            yield handle
        finally:
            self.lib.kedge_close(handle)

    @contextmanager
    def context_of(self, model: Any, device: tuple[int, int] | None = None) -> Iterator[Context]:
        handle = ctypes.c_void_p()
        where = abi.DLDevice(*(device or self.device))
        self.check(self.lib.kedge_context_create(model, where, None, ctypes.byref(handle)))
        try:
            yield Context(self, handle)
        finally:
            self.lib.kedge_context_destroy(handle)

    @contextmanager
    def context(self, module: str | None = None) -> Iterator[Context]:
        with self.model(module) as model, self.context_of(model) as context:
            yield context


def refusal(work: Callable[[], object]) -> Refused:
    """The failure that `work` ends with; AssertionError when it succeeds."""
    try:
        work()
    except Refused as failure:
        return failure
    raise AssertionError("it was not refused")


def floats(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(-50, 50, count).astype(np.float32)


# What must hold on every device ------------------------------------------------------------------------------------


def host_tensors(gpu: Gpu) -> None:
    """Shapes grow and shrink, so that memory on the device is made anew and used again."""
    with gpu.context() as context:
        for count in (1, 1000, 63, 64, 65, 100_000, 3):
            a, b, y = floats(count, 1), floats(count, 2), np.zeros(count, np.float32)
            context.call("add", [a, b], [y])
            np.testing.assert_array_equal(y, a + b)


def in_and_out_are_one(gpu: Gpu) -> None:
    with gpu.context() as context:
        x = floats(500)
        expected = x + x
        context.call("add", [x, x], [x])
        np.testing.assert_array_equal(x, expected)


def device_tensors(gpu: Gpu) -> None:
    with gpu.context() as context:
        a, b = floats(300, 1), floats(300, 2)
        on_a, on_y = context.put(a), context.put(np.zeros(300, np.float32))
        context.call("add", [on_a, b], [on_y])
        np.testing.assert_array_equal(context.get(on_y), a + b)
        again = np.zeros(300, np.float32)
        context.call("add", [on_y, on_a], [again])
        np.testing.assert_array_equal(again, a + b + a)
        part = OnDevice(on_a.address, (100,), "float32", gpu.device, 4 * 100)  # in the middle of it
        middle = np.zeros(100, np.float32)
        context.call("add", [part, part], [middle])
        np.testing.assert_array_equal(middle, a[100:200] * 2)
        context.copy(on_y.address + 4, on_a.address, 40, abi.COPY_ON_DEVICE)
        np.testing.assert_array_equal(context.get(on_y)[1:11], a[:10])
        context.synchronize()
        for one in (on_a, on_y):
            context.free(one.address)


def empty_tensors(gpu: Gpu) -> None:
    """No group at all: nothing is launched, and a tensor without bytes needs no memory."""
    with gpu.context() as context:
        nothing = np.zeros(0, np.float32)
        context.call("add", [nothing, nothing], [nothing])
        context.call("chain", [nothing], [nothing])


def weights_on_the_device(gpu: Gpu) -> None:
    """Two contexts of a model, then one after the other: each finds them."""
    x, y = floats(16), np.zeros(16, np.float32)
    with gpu.model() as model:
        with gpu.context_of(model) as one, gpu.context_of(model) as two:
            for context in (one, two):
                context.call("weigh", [x], [y])
                np.testing.assert_array_equal(y, x + WEIGHTS[16:])
        with gpu.context_of(model) as third:
            third.call("weigh", [x], [y])
            np.testing.assert_array_equal(y, x + WEIGHTS[16:])


def arena(gpu: Gpu) -> None:
    with gpu.context() as context:
        for count in (10, 5000, 100):
            x, y = floats(count), np.zeros(count, np.float32)
            context.call("chain", [x], [y])
            np.testing.assert_array_equal(y, x * -4)


def groups(gpu: Gpu) -> None:
    """Memory that a group shares, barriers, and three dimensions of groups and items."""
    with gpu.context() as context:
        x, y = floats(64 * 9).reshape(9, 64), np.zeros(9, np.float32)
        context.call("sums", [x], [y])
        np.testing.assert_array_equal(y, x.sum(axis=1))
        places = np.zeros((4, 3, 8), np.int32)
        context.call("where", [], [places])
        z, row, column = np.meshgrid(np.arange(4), np.arange(3), np.arange(8), indexing="ij")
        np.testing.assert_array_equal(places, column + 100 * row + 10000 * z)


def threads(gpu: Gpu) -> None:
    """A context for each of four threads over one model, created there."""
    failures: list[BaseException] = []

    def work(model: Any, seed: int) -> None:
        try:
            with gpu.context_of(model) as context:
                for count in range(1, 600, 37):
                    x, y = floats(count, seed), np.zeros(count, np.float32)
                    context.call("chain", [x], [y])
                    np.testing.assert_array_equal(y, x * -4)
        except BaseException as failure:  # noqa: BLE001 - the main thread tells
            failures.append(failure)

    with gpu.model() as model:
        workers = [threading.Thread(target=work, args=(model, seed)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert failures == []


def one_context_in_turn(gpu: Gpu) -> None:
    """A context is used by one thread after another."""
    y = np.zeros(8, np.float32)
    with gpu.context() as context:
        worker = threading.Thread(target=context.call, args=("chain", [np.ones(8, np.float32)], [y]))
        worker.start()
        worker.join()
        np.testing.assert_array_equal(y, -4)
        context.call("chain", [y], [y])
        np.testing.assert_array_equal(y, 16)


def cancelling(gpu: Gpu) -> None:
    """Outputs stay as they were, and the context serves on."""
    x, y = floats(64), np.full(64, 7, np.float32)
    with gpu.context() as context:
        ended = threading.Event()
        found: list[Refused] = []

        def work() -> None:
            try:
                found.append(refusal(lambda: context.call("forever", [x], [y])))
            finally:
                ended.set()

        worker = threading.Thread(target=work)
        worker.start()
        while not ended.wait(0.001):
            context.cancel()
        worker.join()
        assert (found[0].status, str(found[0])) == (abi.E_CANCELLED, "function forever was cancelled")
        np.testing.assert_array_equal(y, 7)
        context.call("chain", [x], [y])
        np.testing.assert_array_equal(y, x * -4)


def failing(gpu: Gpu) -> None:
    """An entry that fails after a launch: its outputs are not copied back."""
    x, y = floats(64), np.full(64, 7, np.float32)
    with gpu.context() as context:
        failure = refusal(lambda: context.call("failing", [x], [y]))
        assert (failure.status, str(failure)) == (abi.E_KERNEL, "function failing failed: kernel failure")
        np.testing.assert_array_equal(y, 7)
        context.call("chain", [x], [y])


def timing(gpu: Gpu) -> None:
    x, y = floats(1000), np.zeros(1000, np.float32)
    with gpu.context() as context:
        samples = context.time("chain", [x], [y], number=5, repeat=4, warmup=2)
        assert len(samples) == 4 and min(samples) > 0
        np.testing.assert_array_equal(y, x * -4)
        y[:] = 0
        assert len(context.time("chain", [x], [y], cache_flush_bytes=1 << 16)) == 3
        np.testing.assert_array_equal(y, x * -4)
        failure = refusal(lambda: context.time("chain", [x], [y], profile=1))
        assert failure.status == abi.E_ARGUMENT and "a profile times the kernels of a CPU; on " in str(failure)


def groups_too_large(gpu: Gpu) -> None:
    limit = gpu.properties().max_group
    with gpu.context() as context:
        x = floats(1 << 20)
        failure = refusal(lambda: context.call("wide", [x], [x]))
        assert failure.status == abi.E_FEATURE
        assert "kernel scale" in str(failure) and "1048576" in str(failure) and str(limit) in str(failure)
        y = np.zeros(64, np.float32)
        context.call("wide", [x[:64].copy()], [y])
        np.testing.assert_array_equal(y, x[:64])


def wrong_launches(gpu: Gpu) -> None:
    with gpu.context() as context:
        failure = refusal(lambda: context.call("unlisted", [], []))
        assert (failure.status, str(failure)) == (abi.E_KERNEL, "a launch of a kernel that its module does not list")
        failure = refusal(lambda: context.call("negative", [], []))
        assert str(failure) == "kernel where: a grid of -1 and groups of 1 along x"


def wrong_tensors(gpu: Gpu) -> None:
    kind, number = gpu.device
    name = NAMES[kind]
    x = floats(8)
    with gpu.context() as context:
        elsewhere = OnDevice(4096, (8,), "float32", (7, 0))
        failure = refusal(lambda: context.call("chain", [elsewhere], [x]))
        assert failure.status == abi.E_INPUT
        assert str(failure) == (f"input x is on type-7 device 0, expected the CPU or {name} device {number}")
        failure = refusal(lambda: context.call("chain", [OnDevice(4096, (8,), "float32", (kind, 93))], [x]))
        assert f"on {name} device 93" in str(failure)


def out_of_memory(gpu: Gpu) -> None:
    name = gpu.properties().name.decode()
    x, y = floats(1), np.zeros(1, np.float32)
    with gpu.context() as context:
        failure = refusal(lambda: context.call("huge", [x], [y]))
        assert failure.status == abi.E_MEMORY
        assert f"function huge needs an arena of {1 << 40} bytes: out of device memory" in str(failure)
        assert name in str(failure)
        failure = refusal(lambda: context.alloc(1 << 50))
        assert failure.status == abi.E_MEMORY and str(1 << 50) in str(failure)
        failure = refusal(lambda: context.time("chain", [x], [y], cache_flush_bytes=1 << 50))
        assert str(failure).startswith(f"no memory for cache_flush_bytes: out of device memory: {1 << 50} bytes wanted")
        context.call("chain", [x], [y])


def other_devices(gpu: Gpu) -> None:
    own = NAMES[gpu.device[0]]
    with gpu.model() as model:
        for kind in set(NAMES) - {gpu.device[0]}:
            failure = refusal(lambda kind=kind: gpu.context_of(model, (kind, 0)).__enter__())  # type: ignore[misc]
            assert failure.status == abi.E_ARGUMENT
            assert str(failure) == f"the module was compiled for {own}, not for {NAMES[kind]}"
        failure = refusal(lambda: gpu.context_of(model, (gpu.device[0], 93)).__enter__())
        assert failure.status == abi.E_LOAD
        assert f"there is no {own} device 93: this machine has" in str(failure)


def facts(gpu: Gpu) -> None:
    found = gpu.properties()
    assert 0 < found.max_allocation <= found.global_memory
    assert found.local_memory > 0 and found.max_group > 0 and found.compute_units > 0
    assert found.name and found.driver_version
    features = found.features.decode().split(",")
    if gpu.device[0] == abi.DEVICE_CUDA:
        assert found.arch.startswith(b"sm_") and found.arch.decode() in features and "fp64" in features
    else:
        assert found.arch.startswith(b"OpenCL C ") and "cl_khr_global_int32_base_atomics" in features
    assert gpu.lib.kedge_device_count(gpu.device[0]) > gpu.device[1]


def wrong_copies(gpu: Gpu) -> None:
    with gpu.context() as context:
        address, x = context.alloc(16), floats(4)
        assert refusal(lambda: context.copy(address, x.ctypes.data, 16, 9)).status == abi.E_ARGUMENT
        assert refusal(lambda: context.copy(0, x.ctypes.data, 16, abi.COPY_TO_DEVICE)).status == abi.E_ARGUMENT
        failure = refusal(lambda: context.copy(address + 4, address, 8, abi.COPY_ON_DEVICE))
        assert failure.status == abi.E_ARGUMENT and "overlap" in str(failure)
        context.copy(address + 8, address, 8, abi.COPY_ON_DEVICE)
        context.copy(0, 0, 0, abi.COPY_ON_DEVICE)
        context.free(address)
        context.free(0)


SCENARIOS: dict[str, Callable[[Gpu], None]] = {
    scenario.__name__: scenario
    for scenario in (
        host_tensors, in_and_out_are_one, device_tensors, empty_tensors, weights_on_the_device, arena, groups, threads,
        one_context_in_turn, cancelling, failing, timing, groups_too_large, wrong_launches, wrong_tensors,
        out_of_memory, other_devices, facts, wrong_copies,
    )
}  # fmt: skip


def fault(gpu: Gpu, because: str = "CUDA_ERROR_ILLEGAL_ADDRESS") -> None:
    """CUDA only: a kernel writes where nothing is. All contexts of the process refuse from then on, new ones too."""
    x, y = floats(8), np.full(8, 7, np.float32)
    with gpu.model() as model:
        with gpu.context_of(model) as context, gpu.context_of(model) as other:
            failure = refusal(lambda: context.call("wild", [], []))
            assert failure.status == abi.E_KERNEL
            assert "the device failed" in str(failure) and because in str(failure)
            failure = refusal(lambda: other.call("chain", [x], [y]))
            assert failure.status == abi.E_KERNEL and because in str(failure)
            for work in (
                lambda: context.call("chain", [x], [y]),
                lambda: context.time("chain", [x], [y]),
                lambda: context.alloc(16),
                context.synchronize,
                lambda: other.call("chain", [x], [y]),
            ):
                failure = refusal(work)
                assert failure.status == abi.E_KERNEL
                assert str(failure) == "the device faulted earlier: only a new process can use CUDA again"
            np.testing.assert_array_equal(y, 7)
        failure = refusal(lambda: gpu.context_of(model).__enter__())
        assert failure.status == abi.E_LOAD
        assert str(failure) == "a CUDA device faulted earlier: only a new process can use CUDA again"
