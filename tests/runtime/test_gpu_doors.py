"""A module for OpenCL through every local door: in this process, in a runner, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import kedge
from kedge.artifact import Artifact
from kedge.cli.app import tree
from kedge.compiler import te
from kedge.compiler.toolchain import RuntimeFiles
from kedge.device_agent.runner import Runner
from kedge.device_agent.runner_errors import RunnerRefused
from kedge.diagnosis import diagnose
from kedge.rpc import abi
from kedge.rpc.artifact import VariantDevice
from kedge.rpc.client.gpus import find_gpus
from kedge.rpc.client.inprocess import open_in_process
from kedge.rpc.errors import IncompatibleTargetError, InputError, JobError
from support import native
from support.doubling import gpu_artifact, opencl_device

from .conftest import children

X = np.arange(100, dtype=np.float32)


@pytest.fixture(scope="session")
def opencl(runtime: RuntimeFiles) -> str:
    """The name of the first OpenCL device."""
    return opencl_device(runtime.runner).name


@pytest.fixture(scope="session")
def doubling() -> Artifact:
    return gpu_artifact()


@pytest.mark.usefixtures("opencl")
@pytest.mark.parametrize("device", ["", "opencl", "opencl:0"])
def test_in_this_process(runtime: RuntimeFiles, doubling: Artifact, device: str) -> None:
    with open_in_process(doubling, runtime.lib, threads=1, device=device) as model:
        assert model.device == "opencl:0"
        np.testing.assert_array_equal(model.run({"x": X})["y"], 2 * X + 1)
        out = np.empty_like(X)
        model.run({"x": X[::-1]}, out={"y": out})
        np.testing.assert_array_equal(out, 2 * X[::-1] + 1)
        assert model.time({"x": X}, repeat=3, min_repeat_ms=0.1).repeat == 3


@pytest.mark.usefixtures("opencl")
@pytest.mark.parametrize("device", ["", "opencl:0"])
def test_in_a_runner(doubling: Artifact, device: str) -> None:
    with kedge.local(threads=1, device=device) as here:
        model = here.load(doubling)
        assert model.device == "opencl:0"
        np.testing.assert_array_equal(model.run({"x": X})["y"], 2 * X + 1)
        assert model.time({"x": X}, repeat=3, min_repeat_ms=0.1).repeat == 3


@pytest.mark.usefixtures("opencl")
def test_the_host_only_launches(runtime: RuntimeFiles, doubling: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it uses one thread unless more are wanted, and others may work meanwhile: the verdict takes that in."""
    monkeypatch.setattr("kedge.isolated.usable_threads", lambda: 4)
    monkeypatch.setattr("kedge.rpc.client.inprocess.usable_threads", lambda: 4)
    for threads, used in ((0, 1), (2, 2)):
        with open_in_process(doubling, runtime.lib, threads) as model, kedge.local(threads) as here:
            for there in (model, here.load(doubling)):
                assert there.time({"x": X}, repeat=1, min_repeat_ms=0).measurement.num_threads == used


def test_both_ends_see_the_same_devices(runtime: RuntimeFiles, opencl: str) -> None:
    lib = abi.load_runtime(str(runtime.lib))
    with Runner(runtime.runner) as runner:
        for kind in ("opencl", "cuda"):
            assert runner.devices(kind) == find_gpus(lib, kind)
    listed = [gpu for gpu in kedge.devices() if gpu.device == "opencl:0"]
    assert [gpu.name for gpu in listed] == [opencl]
    assert listed[0].max_threads >= 1 and listed[0].shared_bytes >= 1024 and listed[0].memory_bytes > 1 << 20


@pytest.mark.usefixtures("opencl")
def test_on_the_command_line(tmp_path: Path, doubling: Artifact, opencl: str) -> None:
    path = tmp_path / "doubling.kdg"
    doubling.save(path)
    np.savez(tmp_path / "in.npz", x=X)
    command = CliRunner().invoke(
        tree(),
        [
            "run",
            str(path),
            "--on",
            "opencl:0",
            "--inputs",
            str(tmp_path / "in.npz"),
            "--outputs",
            str(tmp_path / "out.npz"),
        ],
    )
    assert command.exit_code == 0, command.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["y"], 2 * X + 1)
    shown = CliRunner().invoke(tree(), ["inspect", str(path), "--json"])
    assert json.loads(shown.output)["variants"][0]["device"]["kind"] == "opencl"
    listed = CliRunner().invoke(tree(), ["devices", "--local", "--json"])
    assert opencl in [gpu["name"] for gpu in json.loads(listed.output)]


@pytest.mark.usefixtures("opencl")
def test_what_is_compiled_for_all_targets_runs_on_each() -> None:
    x = te.placeholder((X.size,), "float32", name="x")
    func = te.create_prim_func([x, te.compute(x.shape, lambda i: x[i] * 2.0 + 1.0, name="y")], name="main")
    with kedge.local(threads=1) as here:
        targets = here.targets
        artifact = kedge.compile(func, target=targets)
    assert targets[0].startswith(("cuda", "opencl")) and targets[-1] == "native"
    for device in ("", "opencl", "cpu"):
        with artifact.open(threads=1, device=device) as model:
            np.testing.assert_array_equal(model.run({"x": X})["y"], 2 * X + 1)
            assert model.device.startswith(device or targets[0].split()[0])


def test_a_gpu_that_is_not_there(runtime: RuntimeFiles, doubling: Artifact) -> None:
    before = children()
    with kedge.local(device="cuda") as here, pytest.raises(IncompatibleTargetError, match="no variant for cuda"):
        here.load(doubling)
    with pytest.raises(IncompatibleTargetError, match="no variant for cpu: it has 'opencl'"):
        open_in_process(doubling, runtime.lib, device="cpu")
    with kedge.local(device="opencl:77") as here, pytest.raises(IncompatibleTargetError, match="opencl"):
        here.load(doubling)
    for wrong in ("gpu", "opencl:x"):
        with pytest.raises(InputError, match="there is no device"):
            kedge.local(device=wrong)
    assert children() <= before, "no runner is left"


@pytest.mark.usefixtures("opencl")
def test_a_device_that_lacks_what_a_variant_needs(runtime: RuntimeFiles) -> None:
    demanding = gpu_artifact(VariantDevice("opencl", "", 1 << 20))
    with pytest.raises(IncompatibleTargetError, match=r"opencl:0 \(.*\) has \d+ threads in a block, not 1048576"):
        open_in_process(demanding, runtime.lib)


@pytest.mark.usefixtures("opencl")
def test_kernels_that_the_device_cannot_run_are_refused_when_they_are_opened(runtime: RuntimeFiles) -> None:
    lying = gpu_artifact(VariantDevice("opencl"), '-DNEEDS="cl_kedge_none"')
    with pytest.raises(IncompatibleTargetError, match="lacks what kernel doubling needs: cl_kedge_none"):
        open_in_process(lying, runtime.lib)
    with kedge.local() as here, pytest.raises(IncompatibleTargetError, match="cl_kedge_none"):
        here.load(lying)


def test_a_machine_without_drivers_says_what_to_install(
    runtime: RuntimeFiles, doubling: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loader of OpenCL finds its drivers in this folder; where there is no loader, the message is another.
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path))
    with kedge.local() as here, pytest.raises(IncompatibleTargetError) as caught:
        here.load(doubling)
    assert (
        "'opencl' (host" in caught.value.message
        and "needs an OpenCL device, and there is none (" in caught.value.message
    )
    assert "libOpenCL.so.1" in (caught.value.hint or "") and "driver" in (caught.value.hint or "")


def test_a_driver_that_crashes_hides_no_other(
    doubling: Artifact, opencl: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "crash.c"
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) static void crash(void) { abort(); }\n")
    (tmp_path / "libcuda.so.1").symlink_to(native.compile_c([source], "-shared", "-fPIC"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(JobError, match=r"looking for cuda devices failed: .*SIGABRT") as caught:
        kedge.devices()
    assert caught.value.hint is not None and "cuda driver" in caught.value.hint
    listed = CliRunner().invoke(tree(), ["devices", "--local"])
    assert isinstance(listed.exception, JobError) and opencl in listed.output
    findings = {finding.check: finding for finding in diagnose(None, None)}
    assert opencl in findings["opencl devices"].found
    assert findings["cuda devices"].status == "broken" and "SIGABRT" in findings["cuda devices"].found
    with kedge.local() as here:
        assert here.load(doubling).device == "opencl:0", "nobody asks for the other"


def test_a_module_for_the_cpu_is_refused_on_another_device(
    runtime: RuntimeFiles, arithmetic: Path, weights: Path
) -> None:
    with Runner(runtime.runner) as runner, pytest.raises(RunnerRefused):
        runner.open(arithmetic, weights, 64, device=(abi.DEVICE_OPENCL, 0))
