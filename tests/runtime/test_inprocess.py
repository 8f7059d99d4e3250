"""Artifacts bound in this process."""

from __future__ import annotations

import ctypes
import gc
import mmap
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from kedge.artifact import Artifact
from kedge.compiler.toolchain import RuntimeFiles
from kedge.isolated import LocalDevice
from kedge.rpc import abi
from kedge.rpc.artifact import Function, Port
from kedge.rpc.client.inprocess import MAX_PLANS, LoadedModel, open_in_process
from kedge.rpc.errors import ArtifactError, IncompatibleTargetError, InputError, JobError, KedgeError
from support import native
from support.memory import huge_bytes, resident_bytes

from .conftest import ARITHMETIC, artifact_of

W = np.arange(16, dtype=np.float32).reshape(8, 2)


@pytest.fixture
def model(arithmetic_artifact: Artifact, runtime: RuntimeFiles) -> Iterator[LoadedModel]:
    with open_in_process(arithmetic_artifact, runtime.lib, threads=2) as opened:
        yield opened


def data(rows: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)


def expected(x: Any) -> Any:
    return np.tile(x @ W, (1, 2))


class Foreign:
    """An array of another framework: it speaks DLPack and nothing else."""

    def __init__(self, array: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        if self.device != (1, 0):
            raise BufferError("it is not on the CPU")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class Interface:
    """An array that has numpy's array interface and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


# ---- running -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_run(model: LoadedModel, rows: int) -> None:
    x = data(rows)
    for _ in range(2):  # the second time by a remembered plan
        result = model.run({"x": x})
        np.testing.assert_allclose(result["y"], expected(x), rtol=1e-5, atol=1e-5)


def test_functions(model: LoadedModel) -> None:
    result = model["join"]({"a": np.zeros(3, np.float32), "b": np.zeros((2, 6), np.float32)})
    np.testing.assert_array_equal(result["c"], np.full((5, 6), 302))
    ramp = model.run({"a": np.zeros(5, np.float32)}, function="ramp")["out"]
    np.testing.assert_array_equal(ramp, np.tile(np.arange(64, dtype=np.float32) + 1, (5, 1)))
    assert repr(model["main"]) == "<function main(x: float32[N, 8]) -> y: float32[N, 4]>"
    with pytest.raises(ArtifactError, match="has no function 'mian'"):
        model.run({}, function="mian")


@pytest.mark.parametrize("wrap", [Foreign, Interface, np.asfortranarray, lambda a: a[:, :]])
def test_anything_that_is_an_array(model: LoadedModel, wrap: Any) -> None:
    x = data(4)
    np.testing.assert_allclose(model.run({"x": wrap(x)})["y"], expected(x), rtol=1e-5, atol=1e-5)


def test_strided_unaligned_and_read_only_inputs(model: LoadedModel) -> None:
    x = data(4)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 8)
    read_only = x.copy()
    read_only.flags.writeable = False
    for variant in (data(8)[::2], unaligned, read_only):
        np.testing.assert_allclose(model.run({"x": variant})["y"], expected(variant), rtol=1e-5, atol=1e-5)


def test_empty_dims(model: LoadedModel) -> None:
    result = model["join"]({"a": np.zeros(0, np.float32), "b": np.zeros((3, 0), np.float32)})
    assert result["c"].shape == (3, 0)


def test_outputs_speak_dlpack(model: LoadedModel) -> None:
    y = model.run({"x": data(2)})["y"]
    np.testing.assert_array_equal(np.from_dlpack(y), y)
    y[:] = 0  # and are the caller's own


def test_out(model: LoadedModel) -> None:
    x, y = data(3), np.empty((3, 4), np.float32)
    result = model.run({"x": x}, out={"y": y})
    assert result["y"] is y
    np.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-5)


def test_more_shapes_than_are_remembered(model: LoadedModel) -> None:
    for rows in range(1, MAX_PLANS + 10):
        x = data(rows)
        np.testing.assert_allclose(model.run({"x": x})["y"], expected(x), rtol=1e-4, atol=1e-5)


def test_bind(model: LoadedModel) -> None:
    x = data(2)
    call = model.bind({"x": x})
    np.testing.assert_allclose(call()["y"], expected(x), rtol=1e-5, atol=1e-5)
    x += 1  # read where it is, at every call
    assert call() is call.outputs
    np.testing.assert_allclose(call.outputs["y"], expected(x), rtol=1e-5, atol=1e-5)
    y = np.empty((2, 4), np.float32)
    assert model.bind({"x": x}, out={"y": y})()["y"] is y


def test_binding_makes_the_memory_that_calls_need(model: LoadedModel) -> None:
    rows, columns = 1000, 3000
    arena = (rows + columns) * rows * 16
    before = resident_bytes()
    a, b = np.empty(rows, np.float32), np.empty((columns, 2 * rows), np.float32)
    call = model.bind({"a": a, "b": b}, function="join")
    bound = resident_bytes()
    call.outputs["c"].fill(0)
    filled = resident_bytes()
    call()
    assert bound - before > 0.9 * arena
    assert resident_bytes() - filled < 0.1 * arena
    assert call.outputs["c"][0, 0] == rows * 100 + columns


def test_time(model: LoadedModel) -> None:
    timing = model.time({"x": data(1)}, repeat=6, min_repeat_ms=0.1)
    assert timing.repeat == 6
    assert timing.number > 1
    assert timing.min_ms * timing.number >= 0.1
    assert timing.verdict in ("valid", "suspect")
    assert timing.measurement.num_threads == 2


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"xx": data(1)}, r"'main' has no input 'xx'\n  hint: did you mean 'x'\? its inputs: x: float32\[N, 8\]"),
        ({"x": data(1), "z": 1}, "has no input 'z'"),
        ({}, "function 'main' lacks input 'x'"),
        ({"x": data(1).astype(np.float64)}, r"input 'x' has dtype float64, expected x: float32\[N, 8\]"),
        ({"x": np.zeros((1, 9), np.float32)}, r"has shape \[1, 9\], expected x: float32\[N, 8\]: it has 9 in dim 1"),
        ({"x": np.zeros(8, np.float32)}, r"has shape \[8\], expected x: float32\[N, 8\]: it has 1 dims"),
        ({"x": np.zeros((0, 8), np.float32)}, r"dim 0 of input x \(N\) is 0, expected at least 1"),
        ({"x": "text"}, "has dtype <U4"),
        ({"x": object()}, "input 'x' is no array but a object"),
        ({"x": Foreign(data(1), (2, 0))}, "cannot be read as an array .*not on the CPU"),
    ],
)  # fmt: skip
def test_wrong_inputs(model: LoadedModel, inputs: Any, text: str) -> None:
    for call in (model.run, model.bind, model.time):
        with pytest.raises(InputError, match=text):
            call(inputs)
    assert model.run({"x": data(1)})["y"].shape == (1, 4)


def test_symbols_that_disagree(model: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"which is 4 in dim 1"):  # a computed dim: the runtime finds it
        model["join"]({"a": np.zeros(2, np.float32), "b": np.zeros((1, 3), np.float32)})


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ({"z": np.zeros(1)}, "there is no output 'z'"),
        ({"y": np.zeros((1, 4))}, "out 'y' is float64, expected a numpy array of y: float32"),
        ({"y": [1]}, "out 'y' is list"),
        ({"y": np.zeros((4, 1), np.float32)}, r"out 'y' has shape \[4, 1\], expected \[1, 4\]"),
        ({"y": np.zeros((1, 8), np.float32)[:, ::2]}, "must be C-contiguous"),
    ],
)
def test_wrong_outputs(model: LoadedModel, out: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        model.run({"x": data(1)}, out=out)


@pytest.mark.parametrize("overlap", ["x", "part"])
def test_outputs_that_lie_on_inputs(model: LoadedModel, overlap: str) -> None:
    memory = np.ones(20, np.float32)
    x, y = memory[:16].reshape(2, 8), memory[: 8 if overlap == "x" else None][-8:].reshape(2, 4)
    for call in (model.run, model.bind):
        with pytest.raises(InputError, match="out 'y' overlaps an input"):
            call({"x": x}, out={"y": y})


def test_inputs_without_names(model: LoadedModel) -> None:
    for inputs in ([data(1)], data(1), None):
        with pytest.raises(InputError, match=r"takes its inputs by name, not as .*\n.*x: float32\[N, 8\]"):
            model.run(inputs)  # type: ignore[arg-type]
    assert model.run(MappingProxyType({"x": data(1)}))["y"].shape == (1, 4)


@pytest.mark.parametrize(
    "option",
    [{"repeat": 0}, {"repeat": 2.5}, {"number": "a"}, {"warmup": -1}, {"number": 1 << 64}, {"repeat": True},
     {"min_repeat_ms": float("nan")}, {"min_repeat_ms": -1}, {"min_repeat_ms": 1e300}, {"cooldown_interval_ms": "1"}],
)  # fmt: skip
def test_wrong_options_of_timing(model: LoadedModel, option: Any) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))} is .*expected .* at least"):
        model.time({"x": data(1)}, **option)


def test_failures_of_the_call(model: LoadedModel) -> None:
    with pytest.raises(JobError, match="a parallel loop failed with 17") as caught:
        model["fail"]({})
    assert caught.value.outcome == "crash"
    with pytest.raises(JobError, match="overflow") as caught:
        model["huge"]({"a": np.zeros(3, np.float32)})
    assert caught.value.outcome == "out_of_memory"


# ---- artifacts -----------------------------------------------------------------------------------------------------


def test_another_architecture(runtime: RuntimeFiles) -> None:
    artifact = artifact_of(b"", (Function("main", (), ()),), arch="sparc64")
    with pytest.raises(IncompatibleTargetError, match="'c' is for sparc64"):
        open_in_process(artifact, runtime.lib)
    with pytest.raises(IncompatibleTargetError, match="'c' is for sparc64"):
        artifact.open()


def test_a_manifest_that_lies_about_an_output(arithmetic: Path, weights: Path, runtime: RuntimeFiles) -> None:
    """An int8 array where the library writes int64 would be overrun."""
    join = replace(ARITHMETIC[1], outputs=(Port("c", "int8", ("N + M", "2*N")),))
    flat = replace(ARITHMETIC[1], outputs=(Port("c", "int64", ("N + M",)),))
    for lie, text in (
        (join, r"promises join\(.*int8\[2 dims\]\) as function 1, its library has .*int64"),
        (flat, "1 dims"),
    ):
        artifact = artifact_of(arithmetic.read_bytes(), (ARITHMETIC[0], lie, *ARITHMETIC[2:]), weights.read_bytes(), 64)
        with pytest.raises(ArtifactError, match=text):
            open_in_process(artifact, runtime.lib)
        with LocalDevice(threads=1) as device:
            for _ in range(65):  # more than a runner holds at once: none of them stays in it
                with pytest.raises(ArtifactError, match=text):
                    device.load(artifact)


@pytest.mark.parametrize(("size", "offset"), [(100, 64), (128, 128), (128, 1024), (63, 0), (0, 0)])
def test_weights_that_end_too_early(arithmetic: Path, runtime: RuntimeFiles, size: int, offset: int) -> None:
    """Kernels would read what lies behind them."""
    artifact = artifact_of(arithmetic.read_bytes(), ARITHMETIC, bytes(size), offset)
    with pytest.raises(ArtifactError, match="needs 64"):
        open_in_process(artifact, runtime.lib)
    with LocalDevice(threads=1) as device, pytest.raises(ArtifactError, match="end before byte"):
        device.load(artifact)


def test_no_room_to_unpack(arithmetic_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", Path("/proc")):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with pytest.raises(KedgeError, match=r"cannot make a temporary folder .*\n.*TMPDIR"):
            arithmetic_artifact.open()
        with LocalDevice(threads=1) as device, pytest.raises(KedgeError, match="cannot make a temporary folder"):
            device.load(arithmetic_artifact)


def test_features_are_checked_twice(runtime: RuntimeFiles) -> None:
    """By the manifest, and by the library should the manifest be wrong."""
    functions = (Function("main", (), ()),)
    lib = native.module("minimal", '-DFEATURES="time-travel"').read_bytes()
    for features in (("time-travel",), ()):
        with pytest.raises(IncompatibleTargetError, match="lacks: time-travel"):
            open_in_process(artifact_of(lib, functions, features=features), runtime.lib)


def test_a_library_that_is_not_what_the_manifest_says(arithmetic: Path, weights: Path, runtime: RuntimeFiles) -> None:
    for functions in (ARITHMETIC[:2], (ARITHMETIC[1], ARITHMETIC[0], *ARITHMETIC[2:])):
        with pytest.raises(ArtifactError, match="its manifest promises"):
            open_in_process(artifact_of(arithmetic.read_bytes(), functions, weights.read_bytes(), 64), runtime.lib)
    with pytest.raises(ArtifactError, match="cannot load"):
        open_in_process(artifact_of(b"\x7fELF", (Function("main", (), ()),)), runtime.lib)
    with pytest.raises(IncompatibleTargetError, match="speaks ABI 99"):
        lib = native.module("minimal", "-DABI=99").read_bytes()
        open_in_process(artifact_of(lib, (Function("main", (), ()),)), runtime.lib)


def test_weights_are_used_where_they_lie_in_the_file(arithmetic: Path, runtime: RuntimeFiles, tmp_path: Path) -> None:
    """A large member of a .kdg is mapped; the model reads that mapping."""
    blob = b"\xff" * 64 + W.tobytes() + bytes(2 << 20)
    path = tmp_path / "m.kdg"
    artifact_of(arithmetic.read_bytes(), ARITHMETIC, blob, 64).save(path)
    artifact = Artifact.load(path)
    x = data(3)
    with open_in_process(artifact, runtime.lib) as model:
        assert model._weights is not None
        assert np.shares_memory(model._weights, np.frombuffer(artifact.member("weights.bin"), np.uint8))
        assert str(path) in Path("/proc/self/maps").read_text()
        del artifact
        path.unlink()
        np.testing.assert_allclose(model.run({"x": x})["y"], expected(x), rtol=1e-5, atol=1e-5)


def test_weights_in_memory_lie_in_huge_pages(runtime: RuntimeFiles) -> None:
    """A compiler has just written them, into small pages: a product with few rows is slower by their TLB misses."""
    size, page = 16 << 20, 2 << 20
    probe = mmap.mmap(-1, 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    probe.write(bytes(2 * page))
    try:
        probe.madvise(25)  # MADV_COLLAPSE
    except OSError as error:
        pytest.skip(f"this kernel makes no huge pages when asked: {error}")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = np.frombuffer(pages, np.uint8)
    data[:] = 7
    module = native.module("minimal", f"-DWEIGHTS_SIZE={size}").read_bytes()
    artifact = artifact_of(module, (Function("main", (), ()),), memoryview(pages))
    before = huge_bytes(data)
    with open_in_process(artifact, runtime.lib):
        assert huge_bytes(data) - before >= page  # all but what lies at either end, where memory is not in pieces
    assert np.all(data == 7)


def test_no_file_is_left(arithmetic_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with arithmetic_artifact.open(threads=1) as model:
        assert list(tmp_path.iterdir()) == []
        model.run({"x": data(1)})
    del model
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()  # the library is unloaded too


# ---- life ----------------------------------------------------------------------------------------------------------


def test_a_closed_model_says_so(arithmetic_artifact: Artifact, runtime: RuntimeFiles) -> None:
    model = open_in_process(arithmetic_artifact, runtime.lib)
    x = data(1)
    y = model.run({"x": x})["y"]
    call = model.bind({"x": x})
    model.close()
    model.close()
    new = data(2)  # a shape that no plan is there for
    for use in (lambda: model.run({"x": x}), lambda: model.run({"x": new}), call, lambda: model.bind({"x": x})):
        with pytest.raises(KedgeError, match="closed"):
            use()
    np.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-5)


def test_threads_have_contexts_of_their_own(model: LoadedModel) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for rows in range(1, 60):
                x = data(rows, seed)
                np.testing.assert_allclose(model.run({"x": x})["y"], expected(x), rtol=1e-4, atol=1e-5)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_cancel(misbehaving_artifact: Artifact, runtime: RuntimeFiles) -> None:
    with open_in_process(misbehaving_artifact, runtime.lib, threads=1) as model:
        outcomes: list[str] = []

        def call() -> None:
            try:
                model["slow"]({})
            except JobError as error:
                outcomes.append(error.outcome)

        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():  # a cancel before the call began is none
            model.cancel()
            thread.join(0.001)
        assert outcomes == ["cancelled"]


# ---- the ABI itself ------------------------------------------------------------------------------------------------


def test_a_library_by_its_bare_name(runtime: RuntimeFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """dlopen would look for it in the system's folders."""
    (tmp_path / "model.so").write_bytes(native.module("minimal").read_bytes())
    monkeypatch.chdir(tmp_path)
    lib, model = abi.load_runtime(str(runtime.lib)), ctypes.c_void_p()
    options = abi.OpenOptions(struct_size=ctypes.sizeof(abi.OpenOptions), lib_path=b"model.so")
    assert lib.kedge_open(options, model) == abi.OK, lib.kedge_last_error()
    lib.kedge_close(model)
    options.lib_path = b"absent.so"
    assert lib.kedge_open(options, model) == abi.E_LOAD
    assert b"cannot load absent.so" in lib.kedge_last_error()


def test_no_room_for_a_shape(model: LoadedModel) -> None:
    x, lib = data(2), model._lib
    args, rets = (abi.DLTensor * 1)(), (abi.DLTensor * 1)()
    args[0].data, args[0].ndim, args[0].device.device_type = x.ctypes.data, 2, abi.DEVICE_CPU
    args[0].dtype, args[0].shape = abi.DLDataType(abi.CODE_FLOAT, 32, 1), (ctypes.c_int64 * 2)(2, 8)
    context = model._context().handle
    assert lib.kedge_infer(context, 0, args, 1, rets, 1) == abi.E_ARGUMENT
    assert lib.kedge_last_error() == b"output y has no room for its shape"
    rets[0].shape = (ctypes.c_int64 * abi.MAX_NDIM)()
    assert lib.kedge_infer(context, 0, args, 1, rets, 1) == abi.OK
    assert (rets[0].ndim, rets[0].shape[:2]) == (2, [2, 4])


def test_threads_out_of_range(arithmetic_artifact: Artifact) -> None:
    for threads in (-1, 257):
        with pytest.raises(InputError, match=f"num_threads is {threads}"):
            arithmetic_artifact.open(threads)
