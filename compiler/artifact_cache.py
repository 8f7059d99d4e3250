"""Whole artifacts on disk, keyed by all that decides them: a model that was compiled before is not even read.

Three kinds of files, each named by a SHA-256 that it is checked against:

    models/   of a model's file: which other files hold its data. They follow from its bytes, and without them
              there is no key.
    keys/     of those bytes, the files beside, the options, the targets and the compiler: which artifact they make.
    objects/  the artifacts, `.kdg` files. They are never written to, so that they can be mapped, and are only copied.

`Quota` removes what is least recently used.
"""

from __future__ import annotations

import hashlib
import json
import operator
import stat
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kedge.compiler.entries import make_folder, read_entry, touch, write_entry
from kedge.compiler.errors import CompileWarning, ToolchainError
from kedge.compiler.fingerprint import artifact_version
from kedge.compiler.quota import ARTIFACTS, Quota
from kedge.compiler.target.parse import AnyTarget
from kedge.rpc import cores
from kedge.rpc.artifact import Artifact
from kedge.rpc.artifact.package import check_parts
from kedge.rpc.errors import ArtifactError

_PIECE: Final = 8 << 20


class Request:
    """What a compile of a file is asked for: the file's digest, taken by a thread of its own, and the options.

    Args:
        model: a file; whatever it is called.
        shapes: of inputs, as for `kedge.load`.
        name: of the artifact.

    Raises:
        OSError: `model` is missing, or no regular file.
        TypeError, ValueError: `shapes` are none, or a dim in them is neither a name, a number nor None.
    """

    def __init__(self, model: Path, shapes: Mapping[str, Sequence[int | str | None]] | None, name: str) -> None:
        self.model = model
        self._options = (model.suffix, name, _plain(shapes))
        self._stamps = {model: _stamp(model)}
        self._hashed: Future[str] = Future()
        try:
            threading.Thread(target=self._hash, name="kedge-digest", daemon=True).start()
        except RuntimeError:  # a control group's limit on processes counts threads, too
            self._hash()

    def _hash(self) -> None:
        try:
            self._hashed.set_result(_digest(self.model))
        except Exception as error:  # noqa: BLE001 - who wants the digest gets it
            self._hashed.set_exception(error)

    @property
    def digest(self) -> str:
        """That of the model's file; raises OSError where it cannot be read."""
        return self._hashed.result()

    def watch(self, files: Sequence[str]) -> None:
        """Note what the files beside the model are like before they are read.

        Raises:
            OSError, ValueError: one is missing, or its name is none.
        """
        self._stamps |= {self.model.parent / name: _stamp(self.model.parent / name) for name in files}

    def key(self, targets: Sequence[AnyTarget], files: Sequence[str]) -> str:
        """Names the artifact for `targets` of the model, whose data is in `files` too, as they are now.

        Raises:
            OSError: a file cannot be read.
        """
        beside = [(name, _digest(self.model.parent / name)) for name in files]
        parts = (artifact_version(), self.digest, beside, self._options, [repr(target) for target in targets])
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def changed(self) -> bool:
        """Whether a file is not any more what it was when it was first seen."""
        return any(_stamp(path) != before for path, before in self._stamps.items())


@dataclass(frozen=True, slots=True)
class Found:
    """An artifact of the cache, and the file that it is mapped from."""

    artifact: Artifact
    path: Path


class ArtifactCache:
    """The user's folder of artifacts. Files appear whole; any number of processes may share it.

    Raises:
        CacheError: KEDGE_CACHE_SIZE is no size.
    """

    def __init__(self) -> None:
        self._quota = Quota()
        self.root = self._quota.root / ARTIFACTS

    def find(self, request: Request, targets: Sequence[AnyTarget]) -> Found | None:
        """The artifact that is wanted, after all its digests were checked; None if there is none.

        What is damaged is removed, with a CompileWarning.

        Raises:
            OSError: the model cannot be read.
        """
        if not (self.root / "models").is_dir():
            return None  # no need to wait for the digest
        model = self._path("models", _model_key(request))
        head = _read(model)
        if head is None:
            return None
        try:
            key = self._path("keys", request.key(targets, json.loads(head)))
        except FileNotFoundError:
            return None  # of the data beside the model: what loads it says so
        digest = _read(key)
        if digest is None:
            return None
        path = self._object(digest)
        try:
            artifact = Artifact.load(path, check=check_parts)
            if artifact.digest != digest:
                raise ArtifactError(f"{path} is another artifact")
        except ArtifactError as error:
            if path.exists():
                _drop(path, error.message)
            return None
        for used in (model, key, path):
            touch(used)
        return Found(artifact, path)

    def keep(
        self, request: Request, targets: Sequence[AnyTarget], files: Sequence[str], artifact: Artifact
    ) -> Path | None:
        """Keep what `request` was compiled to; the file of it. `files` hold data of the model beside it.

        None, and nothing is kept, where it is larger than the quota, or where a file changed while it was compiled;
        and with a CompileWarning where the cache cannot be written.
        """
        if artifact.size > self._quota.limit:
            return None
        path = self._object(artifact.digest)
        try:
            key = request.key(targets, files)
            if request.changed:
                return None
            self._quota.make_room(artifact.size)
            make_folder(path.parent)
            artifact.save(path)
            written = path.stat().st_size + write_entry(self._path("keys", key), artifact.digest, b"")
            written += write_entry(self._path("models", _model_key(request)), json.dumps(list(files)), b"")
        except (ToolchainError, ArtifactError) as error:
            why = f"{error.message} (KEDGE_CACHE_DIR names another folder)"
            warnings.warn(f"the artifact is not kept for another compile: {why}", CompileWarning, stacklevel=3)
            return None
        except FileNotFoundError:
            return None  # the model is gone, or another process has just cleared the cache
        self._quota.add(written)
        return path

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    def _object(self, digest: str) -> Path:
        return self.root / "objects" / digest[:2] / f"{digest}.kdg"


def _model_key(request: Request) -> str:
    return hashlib.sha256(f"{request.digest} {artifact_version()}".encode()).hexdigest()


def _read(path: Path) -> str | None:
    """The text of an entry; None if there is none. One that is damaged is removed, with a warning."""
    entry = read_entry(path)
    if entry is None:
        if path.exists():
            _drop(path, f"{path} is not what was written")
        return None
    return entry[0]


def _drop(path: Path, why: str) -> None:
    warnings.warn(f"damaged in the cache, and compiled anew: {why}", CompileWarning, stacklevel=4)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} cannot be removed: {error.strerror}", CompileWarning, stacklevel=4)


def _plain(shapes: Mapping[str, Sequence[int | str | None]] | None) -> tuple[object, ...]:
    """The shapes in plain types; raises TypeError for what is none."""

    def dim(value: int | str | None) -> int | str | None:
        return value if value is None or isinstance(value, str) else operator.index(value)

    return tuple((str(name), tuple(map(dim, shape))) for name, shape in dict(shapes or {}).items())


def _stamp(path: Path) -> tuple[int, ...]:
    """What differs where a file was written to or replaced; raises OSError where it is no regular file."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(f"{path} is no regular file")
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def _digest(path: Path) -> str:
    """A digest of a file: the SHA-256 of those of its pieces, which several cores take."""
    size = path.stat().st_size
    starts = range(0, size, _PIECE)
    try:
        with ThreadPoolExecutor(max_workers=cores.usable_threads()) as pool:
            pieces = list(pool.map(lambda start: _piece(path, start), starts))
    except RuntimeError:  # a control group's limit on processes counts threads, too: this one does it all
        pieces = [_piece(path, start) for start in starts]
    return hashlib.sha256(f"{size} ".encode() + b"".join(pieces)).hexdigest()


def _piece(path: Path, start: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        data = memoryview(bytearray(_PIECE))
        read = 0
        while got := file.readinto(data[read:]):
            read += got
    return hashlib.sha256(data[:read]).digest()
