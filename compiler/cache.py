"""Compiled kernels on disk, keyed by what they are made from: a second compile of a model does almost no work.

A draft's key is that of the function before it is scheduled, so that its schedule is not made again either; and what
draft a group of the graph becomes is kept beside, so that it is not lowered again.

Each version of the compiler has folders of its own, which others remove when it does not use them any more.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kedge.compiler.codegen.shapes import Program
from kedge.compiler.entries import read_entry, touch, write_entry
from kedge.compiler.fingerprint import compiler_version, lowering_version
from kedge.compiler.lower.program import Draft, Kernel, Lowered, Recalled
from kedge.compiler.quota import Quota
from kedge.compiler.target import AnyTarget, GpuTarget, Target
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import structural_hash
from kedge.compiler.toolchain import cache_dir

_DAY = 24 * 3600.0
#: Seconds after which what another version of the compiler kept and did not use is removed.
_FORGOTTEN = 30 * _DAY
#: Files that nothing is read from: their times say when a version was used, and when the cache was cleaned.
_USED, _CLEANED = ".used", ".cleaned"
_FOLDERS = re.compile(r"(code|lowered)-[0-9a-f]{16}|\.gone-[0-9a-f]{16}")
#: Folders of before each version had its own, and the files in them.
_EARLIER_FOLDERS = re.compile(r"[0-9a-f]{2}|objects|groups")
_EARLIER_FILES = re.compile(r"[0-9a-f]{64}|\.kernel-\w+")


@dataclass(frozen=True, slots=True)
class KernelObject:
    """A compiled kernel: its linker symbol, object file, and the workspace it needs over its symbols.

    `rule` and `decisions` say how a draft was scheduled. On a GPU the object file is the host's; in it are the kernels
    of the device, under the symbols `launches`, which need `features` of it.
    """

    symbol: str
    code: bytes
    workspace: Program
    launches: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    rule: str = ""
    decisions: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def kernel_key(func: PrimFunc, target: AnyTarget) -> str:
    """Names the machine code of a scheduled function: its structure, the code's target, the compiler."""
    host = target.host
    gpu = (target.label, target.max_threads, target.shared_bytes) if isinstance(target, GpuTarget) else ()
    parts = (structural_hash(func), host.triple, host.cpu, host.features, *gpu, compiler_version())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def draft_key(draft: Draft | Recalled, target: AnyTarget) -> str:
    """Names the schedule and the machine code of a draft: all that rules see, the target's facts included."""
    parts = ("draft", draft.digest, repr(target), compiler_version())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def key_of(kernel: Kernel | Draft | Recalled, target: AnyTarget) -> str:
    """The name of a kernel's code in the cache."""
    return kernel_key(kernel.func, target) if isinstance(kernel, Kernel) else draft_key(kernel, target)


def text_key(text: str, host: Target) -> str:
    """Names the object file of LLVM IR, such as that of a program's entries."""
    parts = ("text", text, host.triple, host.cpu, host.features, compiler_version())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def symbol_of(key: str) -> str:
    """The linker symbol of the kernel with a key."""
    return f"kedge_{key[:24]}"


class KernelCache:
    """A folder of kernel objects, and of what groups are lowered to (a `lower.Memory`).

    Files appear whole; any number of processes may share it. The user's own, which has no `root`, has a quota.

    Raises:
        CacheError: KEDGE_CACHE_SIZE is no size.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_dir() / "kernels" if root is None else root
        self.hits = 0
        self.misses = 0
        self._quota = Quota() if root is None else None
        self._written = 0

    def find(self, key: str) -> KernelObject | None:
        """The kernel with that key; None if there is none that is whole."""
        found = _read(self._path(key), symbol_of(key))
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            touch(self._path(key))
        return found

    def keep(self, key: str, made: KernelObject) -> None:
        """Keep the kernel with that key.

        Raises:
            ToolchainError: the folder cannot be written.
        """
        self._written += _write(self._path(key), made)

    def find_object(self, key: str) -> bytes | None:
        """The object file with that key, which is no kernel's; None if there is none that is whole."""
        entry = read_entry(self._object_path(key))
        if entry is None:
            return None
        touch(self._object_path(key))
        return entry[1]

    def keep_object(self, key: str, code: bytes) -> None:
        """Keep the object file with that key.

        Raises:
            ToolchainError: the folder cannot be written.
        """
        self._written += write_entry(self._object_path(key), "object", code)

    def recall(self, group: str) -> Lowered | None:
        """What a group was lowered to; None where unknown."""
        entry = read_entry(self._group_path(group))
        if entry is None:
            return None
        touch(self._group_path(group))
        form, digest, symbols = json.loads(entry[0])
        return Lowered(form, digest, tuple(symbols))

    def remember(self, group: str, lowered: Lowered) -> None:
        """Keep what a group is lowered to.

        Raises:
            ToolchainError: the folder cannot be written.
        """
        head = json.dumps([lowered.form, lowered.digest, lowered.symbols])
        self._written += write_entry(self._group_path(group), head, b"")

    def clean(self) -> None:
        """Remove what other versions of the compiler keep here and have not used for 30 days; looks once a day.

        Then what was least recently used, where the user's own cache holds more than its quota. Other processes may
        read, write and clean meanwhile: at worst they compile something again.
        """
        self._forget()
        self.count()

    def count(self) -> None:
        """Count what was written against the quota of the user's own cache; also after a compile that failed."""
        written, self._written = self._written, 0
        if self._quota is not None and written:
            self._quota.add(written)

    def _forget(self) -> None:
        now, own = time.time(), (self._code, self._lowered)
        try:
            for folder in own:
                if folder.is_dir():
                    _mark(folder / _USED, now)
            if not self.root.is_dir() or not _mark(self.root / _CLEANED, now):
                return
            folders = [path for path in self.root.iterdir() if path not in own]
        except OSError:
            return  # kernels can be read from a cache that this user may not write to; it is its owner's to clean
        for folder in folders:
            _remove_forgotten(folder, now)

    @property
    def _code(self) -> Path:
        return self.root / f"code-{compiler_version()}"

    @property
    def _lowered(self) -> Path:
        return self.root / f"lowered-{lowering_version()[:16]}"

    def _path(self, key: str) -> Path:
        return self._code / key[:2] / key

    def _object_path(self, key: str) -> Path:
        return self._code / "objects" / key[:2] / key

    def _group_path(self, group: str) -> Path:
        key = hashlib.sha256(f"{group} {lowering_version()}".encode()).hexdigest()
        return self._lowered / key[:2] / key


def _mark(path: Path, now: float) -> bool:
    """Whether the last time of a mark is a day ago; if so, or if there was none, it is now."""
    if path.exists() and now - path.stat().st_mtime < _DAY:
        return False
    path.touch()
    return True


def _remove_forgotten(folder: Path, now: float) -> None:
    """Remove a folder of the cache in which nothing was made, and which no version marked as used, for long."""
    try:
        if not _is_cache(folder):
            return
        if now - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < _FORGOTTEN:
            return
        # At once gone for others, of which none then finds a part.
        gone = folder.rename(folder.with_name(f".gone-{secrets.token_hex(8)}"))
    except OSError:
        return  # another process was faster, or it is another user's
    shutil.rmtree(gone, ignore_errors=True)  # what is left, the next one to clean removes


def _is_cache(folder: Path) -> bool:
    """Whether a folder, and all that is in it, was made by a cache: somebody may keep other things beside."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    if _FOLDERS.fullmatch(folder.name):
        return True
    if not _EARLIER_FOLDERS.fullmatch(folder.name):
        return False
    return all(path.is_dir() or _EARLIER_FILES.fullmatch(path.name) for path in folder.rglob("*"))


def _read(path: Path, symbol: str) -> KernelObject | None:
    """The kernel in a file; None if there is none, or if it is not whole."""
    entry = read_entry(path)
    if entry is None:
        return None
    head, code = entry
    facts = json.loads(head)
    workspace = tuple((int(op), int(value)) for op, value in facts["workspace"])
    launches, features, decisions = tuple(facts["launches"]), tuple(facts["features"]), facts["decisions"]
    return KernelObject(symbol, code, workspace, launches, features, facts["rule"], MappingProxyType(decisions))


def _write(path: Path, kernel: KernelObject) -> int:
    facts = {
        "workspace": kernel.workspace, "launches": kernel.launches, "features": kernel.features, "rule": kernel.rule,
        "decisions": dict(kernel.decisions),
    }  # fmt: skip
    return write_entry(path, json.dumps(facts), kernel.code)
