"""Compiled kernels on disk, keyed by what they are made from: a second compile of a model does almost no work."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from kedge.compiler.codegen.shapes import Program
from kedge.compiler.errors import ToolchainError
from kedge.compiler.target import AnyTarget, GpuTarget
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import structural_hash
from kedge.compiler.toolchain import cache_dir

_MAGIC = b"kedge-kernel 2\n"


@dataclass(frozen=True, slots=True)
class KernelObject:
    """A compiled kernel: its linker symbol, object file, and the workspace it needs over its symbols.

    On a GPU the object file is the host's; in it are the kernels of the device, under the symbols `launches`, which
    need `features` of it.
    """

    symbol: str
    code: bytes
    workspace: Program
    launches: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


@functools.cache
def compiler_version() -> str:
    """Changes whenever the code generator, or the LLVM below it, does."""
    digest = hashlib.sha256(version("llvmlite").encode())
    root = Path(__file__).parent
    for folder in ("codegen", "tir", "target"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def kernel_key(func: PrimFunc, target: AnyTarget) -> str:
    """Names the machine code of a scheduled function: its structure, the code's target, the compiler."""
    host = target.host
    gpu = (target.label, target.max_threads, target.shared_bytes) if isinstance(target, GpuTarget) else ()
    parts = (structural_hash(func), host.triple, host.cpu, host.features, *gpu, compiler_version())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class KernelCache:
    """A folder of kernel objects. Files appear whole; any number of processes may share it."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_dir() / "kernels" if root is None else root
        self.hits = 0
        self.misses = 0

    def get(self, func: PrimFunc, target: AnyTarget, build: Callable[[str], KernelObject]) -> KernelObject:
        """The object of `func`; `build(symbol)` makes it on a miss.

        Raises:
            ToolchainError: the folder cannot be written.
        """
        key = kernel_key(func, target)
        path = self.root / key[:2] / key
        found = _read(path, f"kedge_{key[:24]}")
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        made = build(f"kedge_{key[:24]}")
        _write(path, made)
        return made


def _read(path: Path, symbol: str) -> KernelObject | None:
    """The kernel in a file; None if there is none, or if it is not whole."""
    entry = read_entry(path)
    if entry is None:
        return None
    head, code = entry
    facts = json.loads(head)
    workspace = tuple((int(op), int(value)) for op, value in facts["workspace"])
    return KernelObject(symbol, code, workspace, tuple(facts["launches"]), tuple(facts["features"]))


def _write(path: Path, kernel: KernelObject) -> None:
    facts = {"workspace": kernel.workspace, "launches": kernel.launches, "features": kernel.features}
    write_entry(path, json.dumps(facts), kernel.code)


def read_entry(path: Path) -> tuple[str, bytes] | None:
    """A line of text and machine code, as `write_entry` wrote them; None if there is no file, or it is not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, body = data[len(_MAGIC) : len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    if not data.startswith(_MAGIC) or digest != hashlib.sha256(body).digest():
        return None
    head, _, code = body.partition(b"\n")
    return head.decode(), code


def make_folder(path: Path) -> None:
    """Make a folder of the cache.

    Raises:
        ToolchainError: the cache cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ToolchainError:
    return ToolchainError(
        f"cannot write the cache {path}: {error.strerror}",
        hint="set KEDGE_CACHE_DIR to a folder with room that you may write to",
    )


def write_entry(path: Path, head: str, code: bytes) -> None:
    """Keep a line of text and machine code in a file, which appears whole.

    Raises:
        ToolchainError: the folder cannot be written.
    """
    body = head.encode() + b"\n" + code
    data = _MAGIC + hashlib.sha256(body).digest() + body
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".kernel-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(path.parent, error) from error
