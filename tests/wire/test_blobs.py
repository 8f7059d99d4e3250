from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.rpc.blobs import (
    BadDigestError,
    BlobError,
    BlobStore,
    CorruptBlobError,
    MissingBlobError,
    UploadOffsetError,
    blob_of,
)
from kedge.rpc.types import Blob

DATA = bytes(range(256)) * 40


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def files(store: BlobStore) -> list[str]:
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


def test_put_and_read(store: BlobStore) -> None:
    blob = store.put(DATA)
    assert blob == blob_of(DATA) == store.put(memoryview(DATA))
    assert store.has(blob) and store.size(blob.digest) == len(DATA) and store.read(blob.digest) == DATA
    with store.open(blob.digest) as file:
        assert file.read() == DATA
    assert list(store) == [blob] and store.used_bytes() == len(DATA)
    store.discard(blob.digest)
    store.discard(blob.digest)
    assert not store.has(blob) and list(store) == []


def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    assert store.read(store.put(b"").digest) == b""


def test_find_missing_names_each_once_and_minds_the_size(store: BlobStore) -> None:
    here, gone = store.put(b"here"), blob_of(b"gone")
    assert store.find_missing([gone, here, gone]) == [gone]
    assert store.find_missing([Blob(here.digest, 5)]) == [Blob(here.digest, 5)]


@pytest.mark.parametrize(
    "digest",
    ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 63 + "\n", "a" * 64 + "\n", "/" + "a" * 63, "a" * 65, "é" * 64],
)
def test_a_digest_never_names_another_path(store: BlobStore, digest: str) -> None:
    for use in (
        store.path,
        store.open,
        store.read,
        store.discard,
        lambda d: store.has(Blob(d, 1)),
        lambda d: store.begin(Blob(d, 1)),
        lambda d: store.committed_bytes(Blob(d, 1)),
        lambda d: store.find_missing([Blob(d, 1)]),
    ):
        with pytest.raises(BadDigestError):
            use(digest)
    assert files(store) == []


@pytest.mark.parametrize(("call", "within"), [("write", "append"), ("fsync", "commit")])
def test_closing_waits_for_what_is_under_way(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, call: str, within: str
) -> None:
    """A slow disk, and an upload that is given up meanwhile: nobody else may get its file before."""
    entered, go_on, order = threading.Event(), threading.Event(), []
    usual = getattr(os, call)

    def slow(fd: int, *arguments: object) -> object:
        if fd == writer._fd and not entered.is_set():
            entered.set()
            assert go_on.wait(60)
        return usual(fd, *arguments)

    def work() -> None:
        getattr(writer, within)(*[DATA] * (within == "append"))
        order.append(within)

    def close() -> None:
        writer.close()
        order.append("close")

    writer = store.begin(blob_of(DATA))
    if within == "commit":
        writer.append(DATA)
    monkeypatch.setattr(os, call, slow)
    threads = [threading.Thread(target=work), threading.Thread(target=close)]
    threads[0].start()
    assert entered.wait(60)
    threads[1].start()
    threads[1].join(0.1)
    with store.begin(blob_of(DATA)) as other:
        assert other.path != writer.path
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert order == [within, "close"]
    assert store.has(blob_of(DATA)) == (within == "commit")
    for late in (lambda: writer.append(b""), writer.commit):
        with pytest.raises(BlobError, match="this upload has ended"):
            late()
    assert store.put(DATA) == blob_of(DATA) and store.read(blob_of(DATA).digest) == DATA


def test_what_is_missing_says_so(store: BlobStore) -> None:
    with pytest.raises(MissingBlobError, match="a" * 64):
        store.read("a" * 64)


def test_negative_sizes_are_refused(store: BlobStore) -> None:
    with pytest.raises(BadDigestError):
        store.begin(Blob("a" * 64, -1))


def test_nothing_is_visible_before_the_commit(store: BlobStore) -> None:
    blob = blob_of(DATA)
    with store.begin(blob) as writer:
        writer.append(DATA)
        assert not store.has(blob) and store.find_missing([blob]) == [blob]
        writer.commit()
    assert store.has(blob) and files(store) == [f"objects/{blob.digest[:2]}/{blob.digest}"]


def test_corrupt_bytes_are_refused_and_forgotten(store: BlobStore) -> None:
    blob = blob_of(DATA)
    with store.begin(blob) as writer:
        writer.append(DATA[:-1] + b"X")
        with pytest.raises(CorruptBlobError, match=blob.digest):
            writer.commit()
    assert files(store) == [] and store.committed_bytes(blob) == 0


def test_more_bytes_than_announced_are_refused(store: BlobStore) -> None:
    blob = blob_of(b"four")
    with store.begin(blob) as writer:
        writer.append(b"fo")
        with pytest.raises(CorruptBlobError, match="more than the 4 bytes"):
            writer.append(b"urs")
    assert files(store) == []


def test_an_upload_goes_on_where_it_stopped_also_in_a_new_process(store: BlobStore) -> None:
    blob = blob_of(DATA)
    with store.begin(blob) as writer:
        writer.append(DATA[:1000])
        with pytest.raises(CorruptBlobError, match="1000 of 10240"):
            writer.commit()
    assert store.committed_bytes(blob) == 1000
    again = BlobStore(store.root)
    assert again.committed_bytes(blob) == 1000
    with again.begin(blob, 1000) as writer:
        assert writer.size == 1000
        writer.append(DATA[1000:])
        writer.commit()
    assert again.read(blob.digest) == DATA and again.committed_bytes(blob) == len(DATA)


def test_going_on_before_the_end_overwrites_the_rest(store: BlobStore) -> None:
    blob = blob_of(DATA)
    with store.begin(blob) as writer:
        writer.append(DATA[:500] + b"garbage")
    with store.begin(blob, 500) as writer:
        writer.append(DATA[500:])
        writer.commit()
    assert store.read(blob.digest) == DATA


def test_going_on_beyond_the_end_is_refused(store: BlobStore) -> None:
    blob = blob_of(DATA)
    with pytest.raises(UploadOffsetError, match="0 bytes are committed"):
        store.begin(blob, 10)
    with pytest.raises(UploadOffsetError):
        store.begin(blob, len(DATA) + 1)


def test_two_uploads_of_one_blob_do_not_disturb_each_other(store: BlobStore) -> None:
    blob = blob_of(DATA)
    first = store.begin(blob)
    first.append(DATA[:3000])
    second = store.begin(blob, 2000)
    first.append(DATA[3000:5000])
    second.append(DATA[2000:])
    second.commit()
    second.close()
    assert store.read(blob.digest) == DATA
    first.append(DATA[5000:])
    first.commit()
    first.close()
    assert store.read(blob.digest) == DATA
    assert files(store) == [f"objects/{blob.digest[:2]}/{blob.digest}"]


def test_of_two_broken_uploads_the_longer_one_is_kept(store: BlobStore) -> None:
    blob = blob_of(DATA)
    first, second = store.begin(blob), store.begin(blob)
    first.append(DATA[:100])
    second.append(DATA[:200])
    first.close()
    second.close()
    assert store.committed_bytes(blob) == 200
    assert len(files(store)) == 1
    third, fourth = store.begin(blob, 200), store.begin(blob)
    fourth.append(DATA[:50])
    third.close()
    fourth.close()
    assert store.committed_bytes(blob) == 200


def test_second_copies_of_a_dead_process_are_swept(store: BlobStore) -> None:
    blob = blob_of(DATA)
    store.begin(blob).append(DATA[:10])
    store.begin(blob).append(DATA[:20])
    assert len(files(store)) == 2
    assert len(files(BlobStore(store.root))) == 1


def test_many_threads_upload_the_same_blob(store: BlobStore) -> None:
    blob, problems = blob_of(DATA), []

    def upload() -> None:
        try:
            with store.begin(blob) as writer:
                for start in range(0, len(DATA), 1000):
                    writer.append(DATA[start : start + 1000])
                writer.commit()
        except BlobError as error:
            problems.append(error)

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and store.read(blob.digest) == DATA
    assert len(files(store)) == 1


@given(cuts=st.lists(st.integers(0, len(DATA)), max_size=5), breaks=st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=30, deadline=None)
def test_any_cutting_and_breaking_ends_in_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], breaks: list[bool]
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    blob, edges = blob_of(DATA), [0, *sorted(cuts), len(DATA)]
    writer = store.begin(blob)
    for start, stop, broken in zip(edges, edges[1:], breaks, strict=False):
        writer.append(DATA[start:stop])
        if broken:
            writer.close()
            writer = store.begin(blob, store.committed_bytes(blob))
            assert writer.size == stop
    writer.commit()
    writer.close()
    assert store.read(blob.digest) == DATA


FULL = """
import resource, sys
from kedge.rpc.blobs import BlobStore, DiskFullError, blob_of
store = BlobStore(sys.argv[1])
data = b"x" * 100_000
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    with store.begin(blob_of(data)) as writer:
        writer.append(data)
except DiskFullError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
blob = blob_of(data)
with store.begin(blob, store.committed_bytes(blob)) as writer:
    writer.append(data[writer.size:])
    writer.commit()
print(store.read(blob.digest) == data)
"""


def test_a_full_disk_has_its_own_error_and_loses_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow, as it does on a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "blobs")], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("no space is left for blobs in ") and "hint: free space" in lines[1]
    assert lines[2] == "True"


def test_a_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BlobError, match="cannot use the blob store"):
        BlobStore(tmp_path / "file" / "blobs")
