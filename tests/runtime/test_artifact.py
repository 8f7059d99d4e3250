"""The .kdg file: what comes back, and that nothing but an ArtifactError comes of a damaged or hostile one."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kedge.rpc.artifact import Artifact, Function, Manifest, Port, Symbol, Variant, make_member
from kedge.rpc.errors import ArtifactError

LARGE = 2 << 20  # mapped, not read


def make(weights: bytes = bytes(range(256)), lib: bytes = b"\x7fELF" * 20) -> Artifact:
    members = {"lib.so": lib, "weights.bin": weights}
    functions = (
        Function("main", (Port("x", "float32", ("N", 8)),), (Port("y", "float32", ("N", 4)),), (Symbol("N", 1),)),
    )
    variant = Variant("c", "x86_64", "x86_64-linux-gnu", ("avx2",), "lib.so", "weights.bin", 64)
    entries = tuple(make_member(name, data, [100]) for name, data in members.items())
    return Artifact(Manifest("made", 1, "by hand", functions, (variant,), entries, {"a": [1]}), members)


@pytest.mark.parametrize("size", [256, LARGE])
def test_round_trip(tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.kdg"
    artifact = make(random.Random(1).randbytes(size))
    artifact.save(path)
    again = Artifact.load(path)
    assert again.manifest == artifact.manifest
    assert again.digest == artifact.digest
    assert bytes(again.member("weights.bin")) == artifact.member("weights.bin")
    artifact.save(tmp_path / "again.kdg")
    assert (tmp_path / "again.kdg").read_bytes() == path.read_bytes()


def test_members_are_aligned_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.kdg"
    make(lib=b"odd").save(path)
    data = path.read_bytes()
    assert data.index(bytes(range(256))) % 64 == 0


# ---- damage --------------------------------------------------------------------------------------------------------


def damaged(data: bytes) -> Iterator[bytes]:
    """Every prefix, every byte changed, and many bytes changed at once."""
    for size in range(len(data)):
        yield data[:size]
    for at in range(len(data)):
        yield data[:at] + bytes([data[at] ^ 0x81]) + data[at + 1 :]
    source = random.Random(2)
    for _ in range(500):
        copy = bytearray(data)
        for _ in range(source.randint(2, 8)):
            copy[source.randrange(len(copy))] = source.randrange(256)
        yield bytes(copy)


def test_damage_is_never_taken_for_content(tmp_path: Path) -> None:
    """Either the file is refused, or what it holds is what was saved (some bytes of a zip mean nothing)."""
    path, artifact, loaded = tmp_path / "m.kdg", make(), 0
    artifact.save(path)
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        try:
            again = Artifact.load(path)
        except ArtifactError:
            continue
        loaded += 1
        assert [again.member(name) for name in ("lib.so", "weights.bin")] == [
            artifact.member(name) for name in ("lib.so", "weights.bin")
        ]
    assert loaded < 1000


def test_damage_around_a_mapped_member(tmp_path: Path) -> None:
    path = tmp_path / "m.kdg"
    make(bytes(LARGE)).save(path)
    data = path.read_bytes()
    for at in (LARGE // 2, len(data) - 60, len(data) - 120, len(data) - 200):
        path.write_bytes(data[:at])
        with pytest.raises(ArtifactError):
            Artifact.load(path)
    path.write_bytes(data[: LARGE // 2] + b"!" + data[LARGE // 2 + 1 :])
    with pytest.raises(ArtifactError, match=r"weights\.bin is corrupt"):
        Artifact.load(path)


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    """A few kilobytes would unpack to gigabytes."""
    path = tmp_path / "bomb.kdg"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", make().manifest.to_json() + b" " * 1000)
    with pytest.raises(ArtifactError, match=r"manifest\.json is compressed"):
        Artifact.load(path)


def test_a_member_that_is_compressed_or_not_there(tmp_path: Path) -> None:
    path, artifact = tmp_path / "m.kdg", make()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("manifest.json", artifact.manifest.to_json())
        archive.writestr("lib.so", artifact.member("lib.so"), zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match=r"lib\.so is compressed"):
        Artifact.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("manifest.json", artifact.manifest.to_json())
    with pytest.raises(ArtifactError, match=r"lib\.so"):
        Artifact.load(path)


def test_of_two_members_of_a_name_only_the_promised_one_counts(tmp_path: Path) -> None:
    path, artifact = tmp_path / "m.kdg", make()
    artifact.save(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("lib.so", b"another library")
    with pytest.raises(ArtifactError, match=r"lib\.so is corrupt"):
        Artifact.load(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    """Reading /dev/zero would never end, nor would waiting for somebody to write to a pipe."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (Path("/dev/zero"), pipe, tmp_path):
        with pytest.raises(ArtifactError, match="is no regular file"):
            Artifact.load(path)
    with pytest.raises(ArtifactError, match="no such file"):
        Artifact.load(tmp_path / "absent.kdg")
    with pytest.raises(ArtifactError, match="cannot read"):
        Artifact.load(tmp_path / ("x" * 300))


# ---- manifests that lie --------------------------------------------------------------------------------------------


def change(*path: Any, to: Any) -> Callable[[Any], None]:
    def apply(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = to

    return apply


def repeat(*path: Any) -> Callable[[Any], None]:
    def apply(tree: Any) -> None:
        for key in path:
            tree = tree[key]
        tree.append(tree[0])

    return apply


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (change("abi", to=float("inf")), "inf is not a size"),
        (change("name", to=None), "None is not text"),
        (change("format", to=2), "format 2 is not supported"),
        (change("variants", 0, "weights_offset", to=-64), "-64 is not a size"),
        (change("variants", 0, "weights_offset", to=64.5), "64.5 is not a size"),
        (change("variants", 0, "weights_offset", to=257), "begins at byte 257, after its end"),
        (change("variants", 0, "lib", to="../lib.so"), "'../lib.so' of a variant is no member"),
        (change("variants", 0, "weights", to="absent"), "'absent' of a variant is no member"),
        (change("variants", 0, to=[]), "malformed"),
        (change("members", 0, "name", to="../../etc/passwd"), "is not a member name"),
        (change("members", 0, "name", to=".hidden"), "is not a member name"),
        (change("members", 0, "name", to="a\\b"), "is not a member name"),
        (change("members", 0, "size", to=1 << 70), "do not add up"),
        (change("members", 0, "size", to=True), "True is not a size"),
        (change("members", 0, "digest", to="A" * 64), "is not a SHA-256 digest"),
        (change("functions", 0, "inputs", 0, "shape", to=[-1, 8]), "-1 is not a size"),
        (change("functions", 0, "inputs", 0, "shape", to=[None]), "None is not a size"),
        (change("functions", 0, "symbols", 0, "lower", to="1"), "'1' is not a size"),
        (repeat("members"), "more than one member"),
        (repeat("functions"), "more than one function"),
        (repeat("functions", 0, "inputs"), "more than one input of main"),
        (repeat("functions", 0, "outputs"), "more than one output of main"),
    ],
)
def test_manifests_that_are_refused(edit: Callable[[Any], None], text: str) -> None:
    tree = json.loads(make().manifest.to_json())
    edit(tree)
    with pytest.raises(ArtifactError, match=text):
        Manifest.from_json(json.dumps(tree).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b'"text"', b"null", b"{}", b"\xff{}", b"[" * 200_000, b'{"format": 1}'])
def test_no_manifests(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Manifest.from_json(data)


def test_keys_from_the_future_are_ignored() -> None:
    tree = json.loads(make().manifest.to_json())
    tree["colour"] = tree["variants"][0]["taste"] = "new"
    assert Manifest.from_json(json.dumps(tree).encode()) == make().manifest
