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
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Final

from kedge.compiler.entries import DamagedError, load_entry, make_folder, touch, write_entry
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

    Used in a `with`: at its end nobody wants the digest any more, and its threads stop within a piece of the file.

    Args:
        model: a file; whatever it is called.
        shapes: of inputs, as for `kedge.load`.
        name: of the artifact.

    Raises:
        OSError: `model` is missing, or no regular file.
        TypeError: a dim in `shapes` is neither a name, a number nor None.
    """

    def __init__(self, model: Path, shapes: Mapping[str, Sequence[int | str | None]] | None, name: str) -> None:
        self.model = model
        self._options = (model.suffix, name, _plain(shapes))
        self._stamps = {model: _stamp(model)}
        self._hashed: Future[str] = Future()
        self._over = threading.Event()
        try:
            threading.Thread(target=self._hash, name="kedge-digest", daemon=True).start()
        except RuntimeError:  # a control group's limit on processes counts threads, too
            self._hash()

    def __enter__(self) -> Request:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _hash(self) -> None:
        try:
            self._hashed.set_result(_digest(self.model, self._over))
        except Exception as error:  # noqa: BLE001 - who wants the digest gets it
            self._hashed.set_exception(error)

    @property
    def digest(self) -> str:
        """That of the model's file; raises OSError where it cannot be read, CancelledError after the `with`."""
        return self._hashed.result()

    def watch(self, files: Sequence[str]) -> None:
        """Note what the files beside the model are like before they are read.

        Raises:
            OSError, ValueError: one is missing or no regular file, or its name is none.
        """
        self._stamps |= {self.model.parent / name: _stamp(self.model.parent / name) for name in files}

    def key(self, targets: Sequence[AnyTarget], files: Sequence[str]) -> str:
        """Names the artifact for `targets` of the model, whose data is in `files` too, as they are now.

        Raises:
            OSError: a file cannot be read.
        """
        beside = [(name, _digest(self.model.parent / name, self._over)) for name in files]
        parts = (artifact_version(), self.digest, beside, self._options, [repr(target) for target in targets])
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def changed(self) -> bool:
        """Whether a file is not any more what it was when it was first seen, or cannot be seen any more."""
        try:
            return any(_stamp(path) != before for path, before in self._stamps.items())
        except OSError:
            return True


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

        What is damaged is removed, with a CompileWarning; with one, what this user may not read is left. There is none,
        either, for a model or data beside it that cannot be read: what loads them says what is wrong.
        """
        if not self._has_models():
            return None  # no need to wait for the digest
        try:
            model = self._path("models", _model_key(request))
            head = _read(model)
            if head is None:
                return None
            key = self._path("keys", request.key(targets, json.loads(head)))
        except OSError:
            return None
        digest = _read(key)
        if digest is None:
            return None
        path = self._object(digest)
        artifact = _load(path, digest)
        if artifact is None:
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
        try:
            key, model = request.key(targets, files), _model_key(request)
        except OSError:
            return None  # a file is gone, or something else by now: the compile itself has succeeded
        if request.changed:
            return None
        path = self._object(artifact.digest)
        written = 0
        try:
            self._quota.make_room(artifact.size)
            make_folder(path.parent)
            artifact.save(path)
            written += _size(path)
            written += write_entry(self._path("keys", key), artifact.digest, b"")
            written += write_entry(self._path("models", model), json.dumps(list(files)), b"")
        except (ToolchainError, ArtifactError) as error:
            why = f"{error.message} (KEDGE_CACHE_DIR names another folder)"
            warnings.warn(f"the artifact is not kept for another compile: {why}", CompileWarning, stacklevel=3)
            return None
        finally:
            if written:  # as far as it came
                self._quota.add(written)
        return path

    def _has_models(self) -> bool:
        try:
            return (self.root / "models").is_dir()
        except OSError:  # of a user who lets nobody in
            return False

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    def _object(self, digest: str) -> Path:
        return self.root / "objects" / digest[:2] / f"{digest}.kdg"


def _model_key(request: Request) -> str:
    return hashlib.sha256(f"{request.digest} {artifact_version()}".encode()).hexdigest()


def _size(path: Path) -> int:
    """The bytes of a file that was just written; none where another process has just cleared the cache."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path) -> str | None:
    """The text of an entry; None if there is none. One that is damaged is removed, with a warning."""
    before = _seen(path)
    try:
        return load_entry(path)[0]
    except DamagedError as error:
        _drop(path, before, str(error))
    except OSError as error:
        _pass_over(path, error)
    return None


def _load(path: Path, digest: str) -> Artifact | None:
    """The artifact in an object; None if there is none. One that is damaged is removed, with a warning."""
    before = _seen(path)
    try:
        artifact = Artifact.load(path, check=check_parts)
    except ArtifactError as error:
        if isinstance(error.__cause__, OSError):
            _pass_over(path, error.__cause__)
        else:
            _drop(path, before, error.message)
        return None
    if artifact.digest != digest:
        _drop(path, before, f"{path} is another artifact")
        return None
    return artifact


def _pass_over(path: Path, error: OSError) -> None:
    """Say why a file is not used that is there; nothing of one that is gone. It is not known to be damaged."""
    if not isinstance(error, FileNotFoundError):
        warnings.warn(
            f"cannot be read in the cache, and compiled anew: {path}: {error.strerror}", CompileWarning, stacklevel=5
        )


def _drop(path: Path, before: tuple[int, ...] | None, why: str) -> None:
    """Remove a damaged file, unless another process has put another one in its place since `before`."""
    if before is None or _seen(path) != before:
        return
    warnings.warn(f"damaged in the cache, and compiled anew: {why}", CompileWarning, stacklevel=5)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} cannot be removed: {error.strerror}", CompileWarning, stacklevel=5)


def _seen(path: Path) -> tuple[int, ...] | None:
    """As `_stamp`; None where there is no file to be seen."""
    try:
        return _stamp(path)
    except OSError:
        return None


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


def _digest(path: Path, over: threading.Event) -> str:
    """A digest of a file: the SHA-256 of those of its pieces, which this thread takes with others on all cores.

    They are no pool's, whose queue the interpreter would work off before it ends: whatever ends this one, or `over`,
    ends them within a piece.

    Raises:
        OSError: the file cannot be read.
        CancelledError: `over` was set before it was done.
    """
    size = path.stat().st_size
    starts = range(0, size, _PIECE)
    pieces = [b""] * len(starts)
    turns = iter(range(len(starts)))  # a step of it is one, whichever thread takes it
    errors: list[Exception] = []
    done = threading.Event()

    def take() -> None:
        try:
            with path.open("rb", buffering=0) as file:
                buffer = memoryview(bytearray(min(size, _PIECE)))
                while not done.is_set() and not over.is_set():
                    turn = next(turns, None)
                    if turn is None:
                        return
                    pieces[turn] = _piece(file, starts[turn], buffer)
        except Exception as error:  # noqa: BLE001 - of any thread, it is raised below
            errors.append(error)
            done.set()

    helpers = []
    try:
        for _ in range(min(cores.usable_threads(), len(starts)) - 1):
            helper = threading.Thread(target=take, name="kedge-digest-piece", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # a control group's limit on processes counts threads, too: fewer do it all
                break
            helpers.append(helper)
        take()
        for helper in helpers:
            helper.join()
    finally:
        done.set()
    if errors:
        raise errors[0]
    if over.is_set():
        raise CancelledError
    return hashlib.sha256(f"{size} ".encode() + b"".join(pieces)).hexdigest()


def _piece(file: FileIO, start: int, buffer: memoryview) -> bytes:
    file.seek(start)
    read = 0
    while got := file.readinto(buffer[read:]):
        read += got
    return hashlib.sha256(buffer[:read]).digest()
