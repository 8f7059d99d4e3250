"""Whole artifacts that are kept: what finds one again, what does not, and what is done where there is no room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import kedge
from kedge import te
from kedge.compiler import artifact_cache, entries, quota
from kedge.compiler.cache import KernelCache
from kedge.compiler.errors import CacheError, CompileWarning, FrontendError
from kedge.compiler.quota import ARTIFACTS, KERNELS, Quota
from kedge.compiler.te import Tensor
from kedge.rpc.errors import ArtifactError, InputError
from support.others import as_others

SIZE = 64  # of the matrix: 16 KiB
DAY = 24 * 3600


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KEDGE_CACHE_SIZE", raising=False)
    return tmp_path / "cache"


def model(path: Path, seed: int = 0, *, beside: str = "", op: str = "Relu", domain: str = "") -> Path:
    """y = op(x · w); `beside` names the file that holds w."""
    path.parent.mkdir(exist_ok=True)
    weight = np.random.default_rng(seed).standard_normal((SIZE, SIZE)).astype(np.float32)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["t"]), onnx.helper.make_node(op, ["t"], ["y"], domain=domain)]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("n", SIZE)) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    opsets = [
        onnx.helper.make_opsetid(name, version) for name, version in {"": 17, domain: 17 if not domain else 1}.items()
    ]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    if beside:
        onnx.save_model(proto, path, save_as_external_data=True, location=beside, size_threshold=0)
    else:
        onnx.save_model(proto, path)
    return path


def result(artifact: kedge.Artifact) -> Any:
    with artifact.open(threads=1) as opened:
        return opened.run({"x": np.ones((1, SIZE), np.float32)})["y"]


def files(root: Path, part: str = ARTIFACTS) -> list[Path]:
    return sorted(path for path in (root / part).rglob("*") if path.is_file())


def objects(root: Path) -> list[Path]:
    return sorted(root.glob("artifacts/objects/??/*.kdg"))


def test_what_was_compiled_before_is_not_even_read(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path / "m.onnx")
    first = kedge.compile(path)
    assert not first.cached and len(objects(root)) == 1
    monkeypatch.setattr("kedge.api._read", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("kedge.compiler.pipeline.compile_module", lambda *_, **__: pytest.fail("compiled again"))
    again = kedge.compile(str(path), target="native", shapes={})
    assert again.cached and again.digest == first.digest
    np.testing.assert_array_equal(result(again), result(first))


def test_what_is_saved_is_a_copy(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    for number in range(2):  # compiled, and taken from the cache
        out = tmp_path / f"{number}.kdg"
        kedge.compile(path).save(out)
        (kept,) = objects(root)
        assert out.read_bytes() == kept.read_bytes() and not out.samefile(kept)
        assert out.stat().st_nlink == kept.stat().st_nlink == 1
        assert out.stat().st_mode & 0o777 == 0o644
        out.write_bytes(b"the user's own")
    assert kedge.compile(path).cached


def test_a_copy_is_the_file_that_is_written_without_a_cache(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")
    kedge.compile(path, cache=False).save(tmp_path / "plain.kdg")
    kedge.compile(path).save(tmp_path / "copied.kdg")
    assert (tmp_path / "plain.kdg").read_bytes() == (tmp_path / "copied.kdg").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: {"model": model(path, seed=1)},
        lambda path: {"model": path.rename(path.with_name("other.onnx"))},
        lambda path: {"name": "other"},
        lambda path: {"target": "x86-64"},
        lambda path: {"target": "native -num-cores=31"},
        lambda path: {"target": ["native", "x86-64"]},
        lambda path: {"shapes": {"x": (2, SIZE)}},
        lambda path: {"shapes": {"x": ("batch", SIZE)}},
    ],
    ids=["weights", "file name", "name", "target", "target option", "targets", "shape", "dim's name"],
)
def test_all_that_decides_is_in_the_key(tmp_path: Path, change: Callable[[Path], dict[str, Any]]) -> None:
    path = model(tmp_path / "m.onnx")
    first = kedge.compile(path)
    options = {"model": path, **change(path)}
    other = kedge.compile(**options)
    assert not other.cached and other.digest != first.digest
    assert kedge.compile(**options).cached
    again = kedge.compile(model(tmp_path / "m.onnx"))
    assert again.cached and again.digest == first.digest


def test_targets_are_in_the_key_in_their_order(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")
    assert not kedge.compile(path, target=["x86-64", "x86-64-v3"]).cached
    assert not kedge.compile(path, target=["x86-64-v3", "x86-64"]).cached
    assert kedge.compile(path, target=["x86-64", "x86-64-v3", "x86-64"]).cached, "each is taken once"


@pytest.mark.parametrize(
    "what", ["compiler/frontend/onnx/window.py", "compiler/package/weights.py", "rpc/artifact/package.py"]
)
def test_any_source_of_the_compiler_is_in_the_key(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kedge.compiler import fingerprint

    path = model(tmp_path / "m.onnx")
    kedge.compile(path)
    read = Path.read_bytes

    def changed(self: Path) -> bytes:
        return read(self) + (b"# changed" if str(self).endswith(what) else b"")

    cached = (fingerprint.compiler_version, fingerprint.lowering_version, fingerprint.artifact_version)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", changed)
    try:
        assert not kedge.compile(path).cached
    finally:
        monkeypatch.undo()
        for function in cached:
            function.cache_clear()


@pytest.mark.parametrize("package", ["llvmlite", "numpy", "onnx", "ml_dtypes", "ziglang"])
def test_the_packages_below_are_in_the_key(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from kedge.compiler import fingerprint

    cached = (fingerprint.compiler_version, fingerprint.lowering_version, fingerprint.artifact_version)
    before, version = fingerprint.artifact_version(), metadata.version

    def newer(name: str) -> str:
        return version(name) + (".post1" if name == package else "")

    monkeypatch.setattr(fingerprint, "version", newer)
    monkeypatch.setattr(metadata, "version", newer)
    try:
        for function in cached:
            function.cache_clear()
        assert fingerprint.artifact_version() != before
    finally:
        monkeypatch.undo()
        for function in cached:
            function.cache_clear()


# Data beside the model --------------------------------------------------------------------------------------------


def test_data_beside_the_model_is_in_the_key(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx", beside="m.data")
    data = tmp_path / "m.data"
    whole = data.read_bytes()
    first = kedge.compile(path)
    assert kedge.compile(path).cached
    data.write_bytes(np.full(SIZE * SIZE, 0.5, np.float32).tobytes())
    other = kedge.compile(path)
    assert not other.cached and result(other)[0, 0] == pytest.approx(SIZE / 2)
    assert kedge.compile(path).cached
    data.write_bytes(whole)
    again = kedge.compile(path)
    assert again.cached and again.digest == first.digest
    data.unlink()
    with pytest.raises(FrontendError, match=r"m\.data, which is missing"):
        kedge.compile(path)


@pytest.mark.parametrize("name", ["m.onnx", "m.data"])
def test_what_changes_while_it_is_compiled_is_not_kept(tmp_path: Path, root: Path, name: str) -> None:
    path = model(tmp_path / "m.onnx", beside="m.data")

    def change(what: str) -> None:
        if what.startswith("optimizing the graph for"):
            changed = bytearray((tmp_path / name).read_bytes())
            changed[-1] ^= 1
            (tmp_path / name).write_bytes(changed)

    assert not kedge.compile(path, progress=change).cached
    assert not files(root)


# What has no digest -----------------------------------------------------------------------------------------------


def test_operators_that_users_define_pass_the_cache_by(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx", op="Mine", domain="my.domain")

    def times(factor: float) -> Callable[..., Tensor]:
        def function(tensors: list[Tensor]) -> Tensor:
            (x,) = tensors
            return te.compute(x.shape, lambda *at: x[at] * factor, name="y")

        return function

    found = []
    for factor in (2.0, 3.0):
        with te.register_onnx("my.domain", "Mine", times(factor)):
            artifact = kedge.compile(path)
            assert not artifact.cached
            found.append(result(artifact)[0, 0] / factor)
    assert found[0] == pytest.approx(found[1])
    assert not files(root) and files(root, KERNELS)


def test_what_python_functions_decide_passes_the_cache_by(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    kedge.compile(path)
    before = files(root)
    external = kedge.External(
        "mine",
        kedge.patterns.op("relu", kedge.patterns.wildcard("x")),
        source='#include "kedge_external.h"\nint32_t mine(const kedge_external_call *call) { return call == 0; }\n',
    )
    assert not kedge.compile(path, pipeline=kedge.pipeline("default")).cached
    assert not kedge.compile(path, externals=[external]).cached
    assert not kedge.compile(kedge.load(path)).cached
    assert files(root) == before


@pytest.mark.parametrize("name", ["KEDGE_DEBUG", "KEDGE_DUMP_DIR"])
def test_stages_that_are_to_be_seen_are_gone_through(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path / "m.onnx")
    kedge.compile(path)
    monkeypatch.setenv(name, "1" if name == "KEDGE_DEBUG" else str(tmp_path / "dump"))
    assert not kedge.compile(path).cached


def test_a_saved_module_is_compiled(tmp_path: Path) -> None:
    kedge.load(model(tmp_path / "m.onnx")).save(tmp_path / "m.kmod")
    assert [kedge.compile(tmp_path / "m.kmod").cached for _ in range(2)] == [False, False]


def test_without_a_cache_nothing_is_taken_and_nothing_kept(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    assert not kedge.compile(path, cache=False).cached
    assert not files(root) and not files(root, KERNELS)
    kedge.compile(path)
    assert not kedge.compile(path, cache=False).cached


def test_a_pipe_is_read_once(tmp_path: Path, root: Path) -> None:
    with pytest.raises(FrontendError):
        kedge.compile(tmp_path)
    with pytest.raises(FrontendError, match="there is no file"):
        kedge.compile(tmp_path / "none.onnx")
    path, pipe = model(tmp_path / "m.onnx"), tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    assert not kedge.compile(pipe, name="m").cached
    writer.join()
    assert not files(root)


# Damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["objects", "keys", "models"])
@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 40)])
def test_what_is_damaged_is_dropped_and_compiled_anew(
    kind: str, damage: Callable[[Path], None], tmp_path: Path, root: Path
) -> None:
    path = model(tmp_path / "m.onnx")
    first = kedge.compile(path)
    first.save(tmp_path / "first.kdg")
    (kept,) = (each for each in files(root) if each.relative_to(root / ARTIFACTS).parts[0] == kind)
    good = kept.read_bytes()
    damage(kept)
    with pytest.warns(CompileWarning, match="damaged in the cache, and compiled anew") as said:
        again = kedge.compile(path)
    assert len(said) == 1 and not again.cached and again.digest == first.digest
    assert kept.read_bytes() == good
    with warnings.catch_warnings(action="error"):
        assert kedge.compile(path).cached


def test_an_artifact_under_a_wrong_name_is_damage(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    first = kedge.compile(path)
    (kept,) = objects(root)
    kedge.compile(model(tmp_path / "other.onnx", seed=1), cache=False).save(kept)
    with pytest.warns(CompileWarning, match="another artifact"):
        assert kedge.compile(path).digest == first.digest


def test_what_is_gone_is_compiled_again_without_a_word(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    kedge.compile(path)
    for kept in files(root):
        kept.unlink()
        with warnings.catch_warnings(action="error"):
            assert not kedge.compile(path).cached
            assert kedge.compile(path).cached


# Writing ----------------------------------------------------------------------------------------------------------


def test_an_artifact_that_leaves_the_cache_can_still_be_saved(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    kedge.compile(path).save(tmp_path / "first.kdg")
    again = kedge.compile(path)
    Quota().clear()
    again.save(tmp_path / "again.kdg")
    assert (tmp_path / "again.kdg").read_bytes() == (tmp_path / "first.kdg").read_bytes()
    result(again)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_systems_that_cannot_copy_between_files(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = kedge.compile(model(tmp_path / "m.onnx"))
    artifact.save(tmp_path / "first.kdg")

    def refused(*_: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refused)
    artifact.save(tmp_path / "second.kdg")
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    artifact.save(tmp_path / "third.kdg")
    monkeypatch.delattr(os, "copy_file_range")
    artifact.save(tmp_path / "fourth.kdg")
    assert len({path.read_bytes() for path in tmp_path.glob("*.kdg")}) == 1


def test_a_full_disk_leaves_no_part_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = kedge.compile(model(tmp_path / "m.onnx"))
    copy = os.copy_file_range

    def full(source: int, target: int, count: int) -> int:
        if os.fstat(target).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(source, target, 1000)

    monkeypatch.setattr(os, "copy_file_range", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match=r"cannot write .*out\.kdg: No space left"):
        artifact.save(tmp_path / "out.kdg")
    assert set(tmp_path.iterdir()) == before


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path / "m.onnx")
    write = zipfile.ZipFile.open

    def interrupted(self: zipfile.ZipFile, name: Any, mode: str = "r", **options: Any) -> Any:
        if mode == "w" and name.filename.endswith("safetensors"):
            raise KeyboardInterrupt
        return write(self, name, mode, **options)

    monkeypatch.setattr(zipfile.ZipFile, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kedge.compile(path)
    assert not files(root)
    monkeypatch.undo()
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(root))
    artifact = kedge.compile(path)
    assert not artifact.cached and kedge.compile(path).cached

    def copying(*_: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "copy_file_range", copying)
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        artifact.save(tmp_path / "out.kdg")
    assert set(tmp_path.iterdir()) == before


def test_a_cache_that_takes_no_artifacts_is_a_warning(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    root.mkdir()
    (root / ARTIFACTS).write_text("in the way")
    with pytest.warns(CompileWarning, match=r"not kept for another compile: .*KEDGE_CACHE_DIR") as said:
        artifact = kedge.compile(path)
    assert len(said) == 1
    artifact.save(tmp_path / "out.kdg")
    assert kedge.Artifact.load(tmp_path / "out.kdg").digest == artifact.digest


PROGRAM = """
import sys, kedge
sys.stdin.readline()
artifact = kedge.compile(sys.argv[1])
artifact.save(sys.argv[2])
print(artifact.digest)
"""


def test_many_processes_compile_at_once(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    outs = [tmp_path / f"{number}.kdg" for number in range(4)]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(path), str(out)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for out in outs
    ]  # fmt: skip
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    digests = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(digests) == 1 and len({out.read_bytes() for out in outs}) == 1
    assert not [kept for kept in files(root) if kept.name.startswith(".")]
    assert kedge.compile(path).cached


def test_what_is_cleared_meanwhile_is_compiled_again(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")
    first = kedge.compile(path)
    stop = threading.Event()

    def clear() -> None:
        while not stop.is_set():  # also what is being written at the moment, if it were not left
            Quota().clear()

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        for number in range(20):
            artifact = kedge.compile(path)
            artifact.save(tmp_path / f"{number}.kdg")
            assert kedge.Artifact.load(tmp_path / f"{number}.kdg").digest == first.digest
    finally:
        stop.set()
        thread.join()


# The quota --------------------------------------------------------------------------------------------------------


def used(path: Path, ago_s: float) -> None:
    at = time.time() - ago_s
    os.utime(path, (at, at))


@pytest.fixture
def three(tmp_path: Path, root: Path) -> Iterator[list[Path]]:
    """Three models in the cache, the first one used last, the second one longest ago; kernels before all of them."""
    paths = [model(tmp_path / f"m{number}.onnx", seed=number) for number in range(3)]
    for path, days in zip(paths, (1, 3, 2), strict=True):
        before = set(files(root))
        kedge.compile(path)
        for kept in set(files(root)) - before:
            used(kept, days * DAY)
    for kept in files(root, KERNELS):
        used(kept, 10 * DAY)
    yield paths


def test_the_least_recently_used_goes_first(three: list[Path], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = sum(path.stat().st_size for path in files(root, KERNELS))
    whole = sum(path.stat().st_size for path in files(root))
    monkeypatch.setenv("KEDGE_CACHE_SIZE", str(whole + whole // 6))
    assert kernels < whole // 6, "the three are what takes room"
    fourth = model(three[0].with_name("m3.onnx"), seed=3)
    kedge.compile(fourth)
    monkeypatch.setattr("kedge.api._compile_module", lambda *_: pytest.fail("it was not kept"))
    assert all(kedge.compile(path).cached for path in (three[0], three[2], fourth))
    with pytest.raises(pytest.fail.Exception, match="not kept"):
        kedge.compile(three[1])
    assert sum(each.size for each in Quota().kept()) <= Quota().limit


def test_use_is_noted(three: list[Path], root: Path) -> None:
    kedge.compile(three[1])
    young = [kept for kept in files(root) if time.time() - kept.stat().st_mtime < DAY / 2]
    assert len(young) == 3, "the artifact, its key and its model"
    kedge.compile(three[1], name="again")
    kernels = [kept for kept in files(root, KERNELS) if not kept.name.startswith(".")]
    assert all(time.time() - kept.stat().st_mtime < DAY / 2 for kept in kernels)


def test_kernels_go_too(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEDGE_CACHE_SIZE", "0")
    path = model(tmp_path / "m.onnx")
    artifact = kedge.compile(path)
    assert not objects(root) and not Quota().kept()
    artifact.save(tmp_path / "out.kdg")
    assert not kedge.compile(path).cached


def test_what_is_larger_than_the_quota_is_not_kept(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = kedge.compile(model(tmp_path / "small.onnx"))
    kept = files(root)
    monkeypatch.setenv("KEDGE_CACHE_SIZE", str(small.size - 1))
    monkeypatch.setattr(Quota, "add", lambda *_: None)  # of kernels
    kedge.compile(model(tmp_path / "other.onnx", seed=1))
    assert files(root) == kept


def test_other_peoples_files_are_left(three: list[Path], root: Path) -> None:
    names = [
        "artifacts/notes.txt",
        "artifacts/objects/ab/notes.kdg",
        "kernels/notes.txt",
        "kernels/mine/ab/" + "0" * 64,
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("somebody's")
        used(root / name, 100 * DAY)
    scratch = [root / "artifacts" / "objects" / f".{'0' * 64}.kdg.abcd", root / "kernels" / ".kernel-abcd"]
    for path in scratch:
        path.write_text("half")
    used(scratch[0], 2 * DAY)
    Quota().make_room(Quota().limit)
    assert not Quota().kept()
    assert all((root / name).read_text() == "somebody's" for name in names)
    assert [path.exists() for path in scratch] == [False, True], "the other one may be being written"
    Quota().clear()
    assert scratch[1].exists()
    used(scratch[1], 2 * DAY)
    Quota().clear()
    assert not scratch[1].exists() and all((root / name).exists() for name in names)


def test_what_is_there_is_counted_once_a_day(three: list[Path], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sum(each.size for each in Quota().kept())
    assert Quota()._total() == pytest.approx(real, rel=0.01)
    (root / ".size").write_text("1000 0\n")
    assert Quota()._total() is None
    Quota().add(0)
    assert Quota()._total() == real
    Quota().add(7)
    monkeypatch.setattr(Quota, "look", lambda *_: pytest.fail("counted again"))
    Quota().add(8)
    assert Quota()._total() == real + 15
    for damaged in ("", "x y\n", "5\n", f"5 {time.time()}\nz\n"):
        (root / ".size").write_text(damaged)
        assert Quota()._total() is None


@pytest.mark.parametrize("text", ["much", "-1", "5 apples"])
def test_a_quota_that_is_none_is_refused_before_anything_is_done(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_CACHE_SIZE", text)
    with pytest.raises(CacheError, match="KEDGE_CACHE_SIZE is") as said:
        kedge.compile(model(tmp_path / "m.onnx"), progress=lambda _: pytest.fail("begun"))
    assert said.value.hint is not None and "5GiB" in said.value.hint
    with pytest.raises(CacheError):
        KernelCache()
    KernelCache(tmp_path / "own")


def test_sizes_have_units(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quota.limit() == 5 << 30
    for text, size in (("20GiB", 20 << 30), ("500 MB", 500_000_000), ("0", 0), ("", 5 << 30)):
        monkeypatch.setenv("KEDGE_CACHE_SIZE", text)
        assert quota.limit() == size


def test_a_use_is_noted_once_an_hour(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    path.touch()
    for ago, noted in ((30 * 60, False), (2 * 3600, True)):
        used(path, ago)
        entries.touch(path)
        assert (time.time() - path.stat().st_mtime < 60) is noted
    entries.touch(tmp_path / "gone")


def test_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a control group with a limit on processes: one thread does it all."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("kedge.rpc.artifact.package.MAPPED_MEMBER_BYTES", 1)
    monkeypatch.setattr("kedge.compiler.package.weights.LARGE_BYTES", 1)  # parts of their own
    monkeypatch.setattr(threading.Thread, "start", refused)
    path = model(tmp_path / "m.onnx")
    first = kedge.compile(path)
    assert max(len(member.parts) for member in first.manifest.members) > 1
    again = kedge.compile(path)
    assert again.cached and again.digest == first.digest


def test_pieces_of_a_file_are_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_cache, "_PIECE", 4)
    digests = set()
    for number, data in enumerate((b"", b"abcd", b"abcde", b"abcdefgh", b"efghabcd", b"abcd\0", b"abcd\0\0\0\0")):
        (tmp_path / str(number)).write_bytes(data)
        digests.add(artifact_cache._digest(tmp_path / str(number), threading.Event()))
    assert len(digests) == 7


# What cannot be read, removed or waited for ------------------------------------------------------------------------


def python_as_others(program: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program to which modes of files apply, and in which warnings only are said."""
    command = as_others(sys.executable, "-c", program, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


ROOM = """
from kedge.compiler.quota import Quota
quota = Quota()
quota.make_room(quota.limit)
"""


def test_what_cannot_be_removed_is_passed_over(three: list[Path], root: Path) -> None:
    held = min(objects(root), key=lambda path: path.stat().st_mtime)
    scratch = held.with_name(f".{held.name}.abcd")
    scratch.write_text("half")
    used(scratch, 2 * DAY)
    held.parent.chmod(0o555)
    try:
        done = python_as_others(ROOM)
    finally:
        held.parent.chmod(0o755)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [each.path for each in Quota().kept()] == [held] and scratch.exists()
    assert Quota()._total() == held.stat().st_size, "it is what is left that was counted"


def test_a_cache_that_stays_too_large_is_said(three: list[Path], root: Path) -> None:
    held = objects(root)
    for path in held:
        path.parent.chmod(0o555)
    environment = {**os.environ, "KEDGE_CACHE_SIZE": "1kB"}
    try:
        done = python_as_others("from kedge.compiler.quota import Quota; Quota().add(1)", env=environment)
    finally:
        for path in held:
            path.parent.chmod(0o755)
    assert done.returncode == 0 and done.stderr.count("CompileWarning") == 1, done.stderr
    assert "more than the 1000 of KEDGE_CACHE_SIZE: 3 files or folders are out of reach" in done.stderr
    assert "Permission denied" in done.stderr and "kedge cache clear" in done.stderr
    assert sorted(each.path for each in Quota().kept()) == held


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_count_of_others_is_replaced(mode: int, three: list[Path], root: Path) -> None:
    (root / ".size").write_text(f"5 {time.time()}\n")
    (root / ".size").chmod(mode)
    done = python_as_others("from kedge.compiler.quota import Quota; Quota().add(7)")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert Quota()._total() == sum(each.size for each in Quota().kept())


def test_clearing_goes_on_and_says_what_is_left(three: list[Path], root: Path) -> None:
    held = objects(root)[0]
    held.parent.chmod(0o555)
    program = """
from kedge.compiler.errors import CacheError
from kedge.compiler.quota import Quota
try:
    Quota().clear()
except CacheError as error:
    print(error)
"""
    try:
        done = python_as_others(program)
    finally:
        held.parent.chmod(0o755)
    assert f"one file or folder is out of reach, such as {held}: Permission denied" in done.stdout, done.stderr
    assert "hint: " in done.stdout and "KEDGE_CACHE_DIR" in done.stdout
    assert [each.path for each in Quota().kept()] == [held] and Quota()._total() == held.stat().st_size


def test_entries_are_for_whom_the_umask_lets_in(tmp_path: Path, root: Path) -> None:
    before = os.umask(0o027)
    try:
        kedge.compile(model(tmp_path / "m.onnx"))
    finally:
        os.umask(before)
    written = [path for path in (*files(root), *files(root, KERNELS)) if path.suffix != ".kdg"]
    assert len(written) > 3 and {path.stat().st_mode & 0o777 for path in written} == {0o640}


FIND = """
import sys
from pathlib import Path
from kedge.compiler.artifact_cache import ArtifactCache, Request
from kedge.compiler.target import parse_all
with Request(Path(sys.argv[1]), None, "m") as request:
    print(ArtifactCache().find(request, parse_all("native")))
"""


@pytest.mark.parametrize("kind", ["objects", "keys", "models"])
def test_what_cannot_be_read_is_left(kind: str, tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    kedge.compile(path)
    (kept,) = (each for each in files(root) if each.relative_to(root / ARTIFACTS).parts[0] == kind)
    assert "Found(" in python_as_others(FIND, path).stdout
    kept.chmod(0)
    done = python_as_others(FIND, path)
    assert done.stdout == "None\n" and kept.exists(), done.stderr
    assert f"cannot be read in the cache, and compiled anew: {kept}: Permission denied" in done.stderr
    assert "damaged" not in done.stderr
    kept.chmod(0o644)
    assert kedge.compile(path).cached


def test_what_another_process_wrote_again_is_no_damage(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path / "m.onnx")
    kedge.compile(path)
    (kept,) = objects(root)
    whole = kept.read_bytes()
    flip(kept)
    load = artifact_cache.Artifact.load

    def late(source: Path, **options: Any) -> Any:
        try:
            return load(source, **options)
        finally:
            scratch = kept.with_name("scratch")
            scratch.write_bytes(whole)
            scratch.replace(kept)

    monkeypatch.setattr(artifact_cache.Artifact, "load", late)
    with artifact_cache.Request(path, None, "m") as request, warnings.catch_warnings(action="error"):
        assert artifact_cache.ArtifactCache().find(request, artifact_targets()) is None
    assert kept.read_bytes() == whole


def artifact_targets() -> Any:
    from kedge.compiler.target import parse_all

    return parse_all("native")


ENDLESS = """
import _thread, sys, threading
import kedge
import kedge.compiler.target as targets
from kedge.compiler import artifact_cache
begun, parse_all = threading.Event(), targets.parse_all
def endless(*_):
    begun.set()
    if sys.argv[2] == "native":
        _thread.interrupt_main()
    threading.Event().wait()
def late(target):
    begun.wait()
    return parse_all(target)
artifact_cache._piece, targets.parse_all = endless, late
kedge.compile(sys.argv[1], target=sys.argv[2])
"""


@pytest.mark.parametrize(("target", "said"), [("native", "KeyboardInterrupt"), ("nonsense", "TargetError")])
def test_nobody_waits_for_a_digest_that_is_not_wanted(target: str, said: str, tmp_path: Path) -> None:
    """A piece of the file takes for ever, as on a disk that hangs: neither an interrupt nor an error waits for it."""
    path = model(tmp_path / "m.onnx")
    kedge.compile(path)
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS, str(path), target], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0 and said in done.stderr, done.stderr


def test_a_request_that_is_over_hashes_no_further(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with artifact_cache.Request(path, None, "m") as request:
        pass
    with pytest.raises(CancelledError):
        request._hashed.result(timeout=60)


# The user's files --------------------------------------------------------------------------------------------------


def test_data_that_is_a_folder_by_now(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", beside="m.data")
    kedge.compile(path)
    (tmp_path / "m.data").unlink()
    (tmp_path / "m.data").mkdir()
    with pytest.raises(FrontendError, match=r"tensor 'w' needs .*m\.data, which is no regular file"):
        kedge.compile(path)


COMPILE = """
import sys, kedge
from kedge.compiler.errors import FrontendError
try:
    kedge.compile(sys.argv[1])
except FrontendError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["m.onnx", "m.data", "."])
def test_files_that_may_not_be_read(name: str, tmp_path: Path) -> None:
    path = model(tmp_path / "models" / "m.onnx", beside="m.data")
    kedge.compile(path)
    where = tmp_path / "models" / name
    mode = where.stat().st_mode
    where.chmod(0)
    try:
        done = python_as_others(COMPILE, path)
    finally:
        where.chmod(mode)
    assert "cannot be read: Permission denied" in done.stdout and "hint: check its permissions" in done.stdout, (
        done.stderr
    )


@pytest.mark.parametrize("name", ["m.onnx", "m.data"])
def test_files_that_are_folders_after_the_compile(name: str, tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx", beside="m.data")

    def replace(what: str) -> None:
        if what == "packaging":
            (tmp_path / name).unlink()
            (tmp_path / name).mkdir()

    assert not kedge.compile(path, progress=replace).cached
    assert not files(root)


def test_shapes_that_are_no_mapping_are_refused_on_every_road(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")
    shapes: Any = [("x", (2, SIZE))]
    for call in (
        lambda: kedge.compile(path, shapes=shapes),
        lambda: kedge.compile(path, shapes=shapes, cache=False),
        lambda: kedge.load(path, shapes=shapes),
    ):
        with pytest.raises(InputError, match="of type list, and no mapping") as said:
            call()
        assert said.value.hint is not None and "give a dict" in said.value.hint


def test_a_saved_module_is_not_hashed(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kedge.compiler.graph.store import SUFFIX

    kedge.load(model(tmp_path / "m.onnx")).save(tmp_path / f"m{SUFFIX}")
    monkeypatch.setattr(artifact_cache, "Request", lambda *_: pytest.fail("hashed"))
    assert not kedge.compile(tmp_path / f"m{SUFFIX}").cached


# What is counted ---------------------------------------------------------------------------------------------------


def counted(root: Path) -> None:
    (root / ".size").unlink(missing_ok=True)
    Quota().add(0)
    assert Quota()._total() == sum(each.size for each in Quota().kept())


def test_kernels_of_a_compile_that_fails_are_counted(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path / "m.onnx")
    root.mkdir()
    counted(root)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("kedge.compiler.pipeline.link_shared", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kedge.compile(path)
    assert files(root, KERNELS)
    assert Quota()._total() == sum(each.size for each in Quota().kept()) > 0


def test_an_artifact_whose_key_cannot_be_written_is_counted(tmp_path: Path, root: Path) -> None:
    path = model(tmp_path / "m.onnx")
    kedge.compile(path)
    shutil.rmtree(root / ARTIFACTS)
    (root / ARTIFACTS).mkdir()
    (root / ARTIFACTS / "keys").write_text("in the way")
    counted(root)
    before = Quota()._total()
    assert before is not None
    with pytest.warns(CompileWarning, match="not kept for another compile"):
        kedge.compile(path)
    (kept,) = objects(root)
    assert Quota()._total() == before + kept.stat().st_size


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_cache_that_fails_while_it_is_copied(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = kedge.compile(model(tmp_path / "m.onnx"))
    artifact.save(tmp_path / "first.kdg")
    copy, calls = os.copy_file_range, []

    def failing(source: int, target: int, count: int) -> int:
        calls.append(count)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        return copy(source, target, 1000)

    monkeypatch.setattr(os, "copy_file_range", failing)
    artifact.save(tmp_path / "second.kdg")
    assert len(calls) == 2 and (tmp_path / "second.kdg").read_bytes() == (tmp_path / "first.kdg").read_bytes()
