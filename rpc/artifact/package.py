"""`Artifact`: a manifest and the bytes of its members, in memory or in a `.kdg` file (an uncompressed zip)."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import (
    BinaryIO,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
)

from kedge.rpc.artifact.manifest import Blob, Manifest, Member, Variant
from kedge.rpc.artifact.place import CPU, place
from kedge.rpc.errors import ArtifactError

MANIFEST_NAME = "manifest.json"
#: Members begin at a multiple of this in the file, so that weights can be used where they are.
MEMBER_ALIGNMENT = 64
#: Members of at least this many bytes are mapped instead of read.
MAPPED_MEMBER_BYTES = 1 << 20
#: The zip format cannot represent an earlier moment; a fixed one makes files reproducible.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
#: A zip entry starts with 30 bytes; at 26 stand the lengths of its name and of its extra fields, which follow.
_ZIP_ENTRY, _ZIP_LENGTHS = 30, struct.Struct("<HH")
#: The extra field that other tools use for padding too, and the one for sizes beyond 32 bits that zipfile may add.
_ZIP_PADDING, _ZIP64_EXTRA = 0xD935, 20

Bytes = Union[bytes, memoryview]
Self = TypeVar("Self", bound="Artifact")
#: Raises ArtifactError unless the bytes are those of the member; the text says of which artifact.
Check = Callable[[Member, Bytes, str], None]


def sha256(data: Bytes) -> str:
    """Lower-case hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def make_member(name: str, data: Bytes, cuts: Sequence[int] = ()) -> Member:
    """The manifest entry of a member; `cuts` are the byte offsets at which it is cut into parts."""
    view = memoryview(data)
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(view)}), len(view)]
    spans = [(a, b) for a, b in zip(edges, edges[1:]) if b > a]
    if spans == [(0, len(view))]:
        whole = sha256(view)
        return Member(name, whole, len(view), (Blob(whole, len(view)),))
    # A second core hashes the parts while the first one hashes the whole.
    whole, *digests = _hashed([view, *(view[a:b] for a, b in spans)])
    return Member(name, whole, len(view), tuple(Blob(digest, b - a) for digest, (a, b) in zip(digests, spans)))


def _hashed(pieces: Sequence[Bytes]) -> List[str]:
    """The digests of pieces, on all cores: hashlib lets other threads go on."""
    if len(pieces) > 1:
        try:
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                return list(pool.map(sha256, pieces))
        except RuntimeError:  # a control group's limit on processes counts threads, too: this one does it all
            pass
    return [sha256(piece) for piece in pieces]


def _spans(data: Bytes, parts: Sequence[Blob]) -> Iterator[memoryview]:
    """The bytes of each part of a member."""
    view, start = memoryview(data), 0
    for part in parts:
        yield view[start : start + part.size]
        start += part.size


class Artifact:
    """A compiled model: `manifest` plus the bytes of every member, verified on load."""

    def __init__(self, manifest: Manifest, members: Mapping[str, Bytes]) -> None:
        missing = {member.name for member in manifest.members} ^ set(members)
        if missing:
            raise ArtifactError(f"members and manifest disagree about {', '.join(sorted(missing))}")
        self.manifest = manifest
        self._members: Dict[str, Bytes] = dict(members)

    def __repr__(self) -> str:
        targets = ", ".join(variant.target for variant in self.manifest.variants)
        return f"<Artifact {self.manifest.name!r} for {targets}, {self.size} bytes>"

    @cached_property
    def manifest_json(self) -> bytes:
        """The canonical manifest, made once: nothing in an artifact changes."""
        return self.manifest.to_json()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical manifest; names the artifact, since the manifest carries all digests."""
        return sha256(self.manifest_json)

    @property
    def size(self) -> int:
        """Bytes of all members and the manifest."""
        return len(self.manifest_json) + sum(member.size for member in self.manifest.members)

    def member(self, name: str) -> Bytes:
        """The bytes of a member."""
        self.manifest.member(name)
        return self._members[name]

    def blobs(self) -> Iterator[Tuple[Blob, memoryview]]:
        """Every part of every member with its bytes, each digest once."""
        seen = set()
        for member in self.manifest.members:
            for part, view in zip(member.parts, _spans(self._members[member.name], member.parts)):
                if part.digest not in seen:
                    seen.add(part.digest)
                    yield part, view

    def select(self, arch: str, features: Iterable[str]) -> Variant:
        """The best variant for a machine's CPU alone, see `place`; raises IncompatibleTargetError."""
        return place(self.manifest, arch, features, device=CPU).variant

    def save(self, path: Union[str, "os.PathLike[str]"]) -> None:
        """Write a `.kdg` file; the file appears whole or not at all.

        Raises:
            ArtifactError: the folder is missing or not writable, the disk is full, or `path` is no regular file.
        """
        write_whole(Path(path), self._write)

    def _write(self, file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo(MANIFEST_NAME, _ZIP_EPOCH), self.manifest_json)
            for member in self.manifest.members:
                with archive.open(_aligned_entry(member, file.tell()), "w") as out:
                    out.write(self._members[member.name])

    @classmethod
    def load(cls: Type[Self], path: Union[str, "os.PathLike[str]"], check: Optional[Check] = None) -> Self:
        """Read and verify a `.kdg` file, with `check_member` unless told otherwise; raises ArtifactError naming what is
        wrong with it.

        Large members are mapped, not read: the file may be replaced meanwhile, but must not be written to.
        """
        source = Path(path)
        try:
            if not stat.S_ISREG(source.stat().st_mode):
                raise ArtifactError(f"{source} is no regular file", hint="name a .kdg file")
            with zipfile.ZipFile(source) as archive:
                manifest = Manifest.from_json(archive.read(_stored(archive, MANIFEST_NAME)))
                members = {member.name: _read_member(archive, source, member.name) for member in manifest.members}
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{source}: no such file", hint="kedge compile MODEL.onnx -o OUT.kdg makes one"
            ) from error
        except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ArtifactError(
                f"{source} is not a whole .kdg artifact ({error})", hint="copy it again, or compile the model again"
            ) from error
        except OSError as error:
            raise ArtifactError(f"cannot read {source}: {error.strerror}") from error
        for member in manifest.members:
            (check or check_member)(member, members[member.name], str(source))
        return cls(manifest, members)


def write_whole(target: Path, write: Callable[[BinaryIO], None]) -> None:
    """Have `write` make an artifact's file, which appears whole or not at all.

    Raises:
        ArtifactError: the folder is missing or not writable, the disk is full, or `target` is no regular file.
    """
    if target.exists() and not target.is_file():
        # Renaming over a device or a folder would replace it.
        raise ArtifactError(f"cannot write {target}: it is no regular file", hint="name a file to write")
    try:
        fd, name = tempfile.mkstemp(dir=str(target.parent), prefix=f".{target.name}.")
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror}", hint="choose another folder") from error
    scratch = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            write(file)
        scratch.chmod(0o644)
        scratch.replace(target)
    except OSError as error:
        scratch.unlink()
        raise ArtifactError(f"cannot write {target}: {error.strerror}", hint="free space on that disk") from error
    except BaseException:
        scratch.unlink()
        raise


def _aligned_entry(member: Member, offset: int) -> zipfile.ZipInfo:
    """A zip entry that will be written at `offset`, padded so that its data is aligned."""
    entry = zipfile.ZipInfo(member.name, _ZIP_EPOCH)
    entry.file_size = member.size  # zipfile decides by it whether sizes need 64 bits
    zip64 = member.size * 1.05 > zipfile.ZIP64_LIMIT
    start = offset + _ZIP_ENTRY + len(member.name.encode()) + 4 + (_ZIP64_EXTRA if zip64 else 0)
    padding = -start % MEMBER_ALIGNMENT
    entry.extra = struct.pack("<HH", _ZIP_PADDING, padding) + b"\0" * padding
    return entry


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The entry `name`, which is not compressed: a small file could unpack to more than there is memory."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{name} is compressed")
    return entry


def _read_member(archive: zipfile.ZipFile, source: Path, name: str) -> Bytes:
    """The bytes of a member: in memory, or as a mapping of the file where they are many."""
    entry = _stored(archive, name)
    if entry.file_size < MAPPED_MEMBER_BYTES:
        return archive.read(entry)
    with source.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    at = entry.header_offset + _ZIP_ENTRY - _ZIP_LENGTHS.size
    if at + _ZIP_LENGTHS.size > len(view):
        raise zipfile.BadZipFile(f"{name} begins after the end")
    start = at + _ZIP_LENGTHS.size + sum(_ZIP_LENGTHS.unpack_from(view, at))
    return view[start : start + entry.file_size]


def check_member(member: Member, data: Bytes, where: str) -> None:
    """Raise ArtifactError unless `data` is exactly the member that the manifest promises."""
    if len(data) != member.size or sha256(data) != member.digest:
        raise _corrupt(member, where)


def check_parts(member: Member, data: Bytes, where: str) -> None:
    """As `check_member`, by the digests of the parts, for which all cores are used: of a manifest that is trusted."""
    if len(data) != member.size or any(
        digest != part.digest for digest, part in zip(_hashed(list(_spans(data, member.parts))), member.parts)
    ):
        raise _corrupt(member, where)


def _corrupt(member: Member, where: str) -> ArtifactError:
    return ArtifactError(
        f"{where}: member {member.name} is corrupt (its SHA-256 differs from the manifest's)",
        hint="copy it again, or compile the model again",
    )
