"""Running what the compiler made, in this process, through the real runtime and its C ABI."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kedge.compiler.target import parse
from kedge.compiler.target.costs import LINE_BYTES
from kedge.compiler.toolchain import build_runtime
from kedge.rpc import abi
from kedge.rpc.artifact import Artifact

Array = np.ndarray[Any, Any]


@functools.cache
def runtime() -> Any:
    """libkedge_rt.so of this machine, loaded."""
    return abi.load_runtime(str(build_runtime(parse("native")).lib))


class NativeError(Exception):
    """A status other than ok, with the runtime's last error."""


def _check(status: int) -> None:
    if status != 0:
        raise NativeError(f"{runtime().kedge_status_name(status).decode()}: {runtime().kedge_last_error().decode()}")


def _tensor(array: Array) -> abi.DLTensor:
    code, bits = abi.dtype_code(str(array.dtype))
    shape = (ctypes.c_int64 * max(1, array.ndim))(*array.shape)
    tensor = abi.DLTensor()
    tensor.data, tensor.ndim, tensor.shape = array.ctypes.data, array.ndim, shape
    tensor.device = abi.DLDevice(1, 0)
    tensor.dtype = abi.DLDataType(code, bits, 1)
    return tensor


class Opened:
    """An artifact that is loaded here; `run` calls a function of it."""

    def __init__(self, artifact: Artifact, context: Any) -> None:
        self._artifact, self._context = artifact, context

    def run(self, inputs: Mapping[str, Array], function: int = 0) -> dict[str, Array]:
        """The outputs by name; symbolic dims come from the inputs. Outputs start out full of 77."""
        described = self._artifact.manifest.functions[function]
        args = [np.ascontiguousarray(inputs[port.name]) for port in described.inputs]
        tensors = (abi.DLTensor * max(1, len(args)))(*map(_tensor, args))
        blanks = [np.zeros((0,) * len(port.shape), port.dtype) for port in described.outputs]
        results = (abi.DLTensor * len(blanks))(*map(_tensor, blanks))
        rooms = [(ctypes.c_int64 * 8)() for _ in blanks]
        for result, room in zip(results, rooms, strict=True):
            result.shape = room
        _check(runtime().kedge_infer(self._context, function, tensors, len(args), results, len(blanks)))
        outputs = [
            np.full(tuple(room[: len(port.shape)]), 77, port.dtype)
            for room, port in zip(rooms, described.outputs, strict=True)
        ]
        results = (abi.DLTensor * len(outputs))(*map(_tensor, outputs))
        _check(runtime().kedge_call(self._context, function, tensors, len(args), results, len(outputs)))
        return {port.name: out for port, out in zip(described.outputs, outputs, strict=True)}


@contextmanager
def opened(artifact: Artifact, threads: int = 1) -> Iterator[Opened]:
    """Load the artifact's variant for this machine."""
    features = runtime().kedge_cpu_features().decode().split(",")
    variant = artifact.select("x86_64", features)
    with tempfile.TemporaryDirectory(prefix="kedge-test-") as folder:
        lib = Path(folder, "lib.so")
        lib.write_bytes(artifact.member(variant.lib))
        options = abi.OpenOptions(ctypes.sizeof(abi.OpenOptions), str(lib).encode())
        if variant.weights is not None:
            weights = Path(folder, "weights")
            weights.write_bytes(artifact.member(variant.weights))
            options.weights_path, options.weights_offset = str(weights).encode(), variant.weights_offset
        model, context = ctypes.c_void_p(), ctypes.c_void_p()
        _check(runtime().kedge_open(ctypes.byref(options), ctypes.byref(model)))
        try:
            wanted = abi.ContextOptions(ctypes.sizeof(abi.ContextOptions), threads, 0)
            device = abi.DLDevice(1, 0)
            _check(runtime().kedge_context_create(model, device, ctypes.byref(wanted), ctypes.byref(context)))
            try:
                yield Opened(artifact, context)
            finally:
                runtime().kedge_context_destroy(context)
        finally:
            runtime().kedge_close(model)


def placed(array: Array, elements: int) -> Array:
    """A copy of `array` that begins so many elements into a cache line."""
    raw = np.zeros(array.nbytes + 2 * LINE_BYTES, np.uint8)
    begin = -raw.ctypes.data % LINE_BYTES + elements * array.itemsize
    copy = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
