"""What a worker process runs: kernels in, machine code out, as pickles with their length before them.

It reads from its standard input until that ends, and so it ends with the process that started it, however that one
does. Whatever else would write to its standard output goes to standard error.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import logging
import os
import pickle
import struct
import sys
import traceback
import warnings
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

from kedge.compiler.cache import KernelObject
from kedge.compiler.errors import CompileError
from kedge.compiler.kernels import compile_kernel
from kedge.compiler.lower.program import Draft, Kernel
from kedge.compiler.target import AnyTarget
from kedge.rpc.errors import KedgeError

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Job:
    """A kernel to be compiled for a target, under a linker symbol."""

    kernel: Kernel | Draft
    target: AnyTarget
    symbol: str


@dataclass(frozen=True, slots=True)
class Request:
    """A job, and how deep its expressions may be: what the process that asks allows itself."""

    job: Job
    recursion_limit: int


@dataclass(frozen=True, slots=True)
class Reply:
    """The kernel or the error that a job ended with, and what it said on the way."""

    result: KernelObject | Exception
    printed: str = ""
    logged: tuple[logging.LogRecord, ...] = ()
    warned: tuple[tuple[Warning, str, int], ...] = ()  # with file and line


def _read_only(items: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(items)  # by this name pickles find it: the type itself has none that leads to it


class _Pickler(pickle.Pickler):
    """Knows read-only mappings, which functions and targets have for annotations and attributes."""

    dispatch_table = copyreg.dispatch_table.copy()
    dispatch_table[MappingProxyType] = lambda mapping: (_read_only, (dict(mapping),))


def dumps(value: object) -> bytes:
    """`value` as a pickle."""
    out = io.BytesIO()
    _Pickler(out, pickle.HIGHEST_PROTOCOL).dump(value)
    return out.getvalue()


def write_frame(stream: BinaryIO, data: bytes) -> None:
    """Write `data` with its length before it."""
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """What `write_frame` wrote at the other end; None where the stream ends, also within it."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


class _Records(logging.Handler):
    """Keeps what is logged, with arguments in place: they may be things that cannot be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)


def answer(request: Request) -> Reply:
    """Compile one kernel; what it prints, logs and warns of is for the process that asked."""
    sys.setrecursionlimit(request.recursion_limit)
    job, said, log = request.job, io.StringIO(), _Records()
    root = logging.getLogger()
    root.addHandler(log)
    result: KernelObject | Exception
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(said):
            warnings.simplefilter("always")
            result = compile_kernel(job.kernel, job.target, job.symbol)
    except Exception as error:  # noqa: BLE001 - all of them: the process that asked raises it
        result = _sendable(error)
    finally:
        root.removeHandler(log)
    warned = tuple((each.message, each.filename, each.lineno) for each in caught if isinstance(each.message, Warning))
    return Reply(result, said.getvalue(), tuple(log.records), warned)


def _sendable(error: Exception) -> Exception:
    """The error, with where it came from unless it is a refusal, which says so itself; as text if it has no pickle."""
    if not isinstance(error, KedgeError):
        error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(dumps(error))
    except Exception:  # noqa: BLE001 - an exception's own pickling may raise anything
        return CompileError("".join(traceback.format_exception(error)).rstrip())
    return error


def main() -> None:
    """Answer requests until there are no more."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while (frame := read_frame(requests)) is not None:
        request: Any = pickle.loads(frame)
        write_frame(replies, dumps(answer(request)))
