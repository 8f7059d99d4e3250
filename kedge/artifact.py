"""`kedge.Artifact`: a compiled model that can also be opened in this process."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kedge.rpc.artifact import Artifact as PlainArtifact
from kedge.rpc.artifact import Manifest
from kedge.rpc.artifact.package import write_whole

if TYPE_CHECKING:
    from kedge.rpc.client.inprocess import LoadedModel
    from kedge.rpc.types import Health


class Artifact(PlainArtifact):
    """A compiled model: `.save(path)`, `Artifact.load(path)`, `.size`, `.digest`, `.manifest`, `.open(threads=N)`.

    `cached` tells whether `kedge.compile` took it from the cache of artifacts.
    """

    cached = False
    _file: Path | None = None

    @classmethod
    def of(cls, artifact: PlainArtifact, file: Path | None = None, *, cached: bool = False) -> Artifact:
        """The same artifact with `open`; `file` of the cache is what saving it would write."""
        made = cls(
            artifact.manifest, {member.name: artifact.member(member.name) for member in artifact.manifest.members}
        )
        made._file, made.cached = file, cached
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.kdg` file, which appears whole or not at all; a copy where it is in the cache, never a link.

        Raises:
            ArtifactError: the folder is missing or not writable, the disk is full, or `path` is no regular file.
        """
        if self._file is not None:
            try:
                source = self._file.open("rb", buffering=0)
            except OSError:  # removed from the cache meanwhile; what is mapped of it stays
                self._file = None
        if self._file is None:
            super().save(path)
            return
        with source:
            write_whole(Path(path), lambda file: self._copy_or_write(source, file))

    def _copy_or_write(self, source: BinaryIO, target: BinaryIO) -> None:
        """Copy the cache's file; what it cannot be read for says nothing of the target: then write what is held."""
        try:
            _copy(source, target)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            self._file = None
            target.seek(0)
            target.truncate()
            self._write(target)

    def open(self, threads: int = 0, device: str = "") -> LoadedModel:
        """Bind the variant for this machine in this process, zero-copy; close it, or use it in a `with`.

        Args:
            threads: of the kernels; 0 means as many as this process may use.
            device: where they run: "cpu", "opencl", "cuda" or one by its number, "cuda:1". Unless given, the first
                variant that fits this machine decides, in the order of the targets it was compiled for.

        Raises:
            InputError: `device` names none.
            IncompatibleTargetError: no variant runs on this machine, or on that device.
            ToolchainError: the native runtime is not built yet and cannot be.
        """
        from kedge.compiler.target import parse
        from kedge.compiler.toolchain import build_runtime
        from kedge.rpc.client.inprocess import open_in_process

        self.select_here()
        return open_in_process(self, build_runtime(parse("native")).lib, threads, device, _health)

    def select_here(self) -> None:
        """Raise IncompatibleTargetError where no variant is for this architecture, before anything is built for it."""
        import platform

        machine = platform.machine()
        if not any(variant.arch == machine for variant in self.manifest.variants):
            self.select(machine, ())


#: What says that the target takes no more, whatever is written to it.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: What says that the system cannot copy between two files, and not that a disk is full.
_NO_COPYING = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    """Copy a file within the system, which shares its blocks where the file system can (Btrfs, XFS, Bcachefs)."""
    if hasattr(os, "copy_file_range"):
        left = os.fstat(source.fileno()).st_size
        try:
            while left and (done := os.copy_file_range(source.fileno(), target.fileno(), left)):
                left -= done
        except OSError as error:
            if error.errno not in _NO_COPYING:
                raise
    shutil.copyfileobj(source, target, 1 << 20)  # what is left of it: both files are where the system stopped


def _health() -> Health:
    """This machine's condition, for measurements in this process."""
    from kedge.device_agent.health import examine

    return examine(Path(tempfile.gettempdir()))


def external_functions(manifest: Manifest) -> tuple[str, ...]:
    """The C functions of a user's own that an artifact holds (see `kedge.External`), by its compiler's report."""
    from kedge.compiler.graph.external import EXTERNAL_RULE

    kernels = [kernel for variant in _maps(manifest.info, "variants") for kernel in _maps(variant, "kernels")]
    rules = [str(kernel.get("rule", "")) for kernel in kernels]
    found = [rule.removeprefix(EXTERNAL_RULE) for rule in rules if rule.startswith(EXTERNAL_RULE)]
    return tuple(dict.fromkeys(found))


def _maps(of: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of a list in a report, which other compilers may fill with something else."""
    value = of.get(key)
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
