"""Modules whose kernels run on a GPU: with OpenCL on what this machine has, with CUDA on a stand-in for its driver."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kedge.compiler.toolchain import RuntimeFiles, cache_dir
from kedge.rpc import abi
from support import gpu as support
from support import native
from support.gpu import Gpu, OnDevice, floats, refusal

CPU, CUDA, OPENCL = (abi.DEVICE_CPU, 0), (abi.DEVICE_CUDA, 0), (abi.DEVICE_OPENCL, 0)
PROGRAMS = Path(__file__).with_name("programs")
#: Runs a piece of code with a Gpu `gpu` in a process whose CUDA driver is the stand-in.
WITH_CUDA = "import sys; from support.gpu import *; gpu = Gpu(sys.argv[1], sys.argv[2], (2, int(sys.argv[3])))\n"


def opencl_or_skip(runtime: RuntimeFiles) -> None:
    os.environ.setdefault("POCL_CACHE_DIR", str(cache_dir() / "pocl"))  # else in the home folder
    lib = abi.load_runtime(str(runtime.lib))
    if lib.kedge_device_count(abi.DEVICE_OPENCL) == 0:
        reason = f"no OpenCL: {lib.kedge_last_error().decode()}; apt-get install pocl-opencl-icd ocl-icd-libopencl1"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def opencl(runtime: RuntimeFiles) -> Gpu:
    opencl_or_skip(runtime)
    return Gpu(str(runtime.lib), str(native.module("gpu")), OPENCL)


class FakeCuda:
    """Runs code in processes whose CUDA driver is the stand-in."""

    def __init__(self, runtime: RuntimeFiles, folder: Path) -> None:
        self.runtime, self.folder, self.report = runtime, folder, folder / "report"
        driver = native.compile_c([PROGRAMS / "fake_cuda.c"], "-shared", "-fPIC")
        (folder / "libcuda.so.1").symlink_to(driver)

    def run(self, code: str, *flags: str, device: int = 0, **environment: str) -> str:
        """What the code prints. Nothing may be left of its contexts, modules, streams, memory and context stack."""
        module = native.module("gpu", "-DCUDA", *flags)
        command = [sys.executable, "-c", WITH_CUDA + code, str(self.runtime.lib), str(module), str(device)]
        paths = {
            "LD_LIBRARY_PATH": str(self.folder),
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "FAKE_CUDA_REPORT": str(self.report),
        }
        done = subprocess.run(
            command, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert self.report.read_text().split()[:5] == ["0"] * 5
        return done.stdout


@pytest.fixture
def fake_cuda(runtime: RuntimeFiles, tmp_path: Path) -> FakeCuda:
    return FakeCuda(runtime, tmp_path)


#: Runs a piece of code with a Gpu `gpu` on OpenCL that is watched: `fail(name, error)` lets the next call of that name
#: fail, `alive()` counts what was created and not released.
WATCHED = """
import ctypes, sys
from support.gpu import *
watch = ctypes.CDLL("libOpenCL.so.1")
def fail(name, error, after=0): watch.watch_opencl_fail(name.encode(), error, after)
alive = watch.watch_opencl_alive
gpu = Gpu(sys.argv[1], sys.argv[2], (4, 0))
gpu.properties()
"""


class WatchedOpenCl:
    """Runs code in processes that count OpenCL's objects and let its calls fail."""

    def __init__(self, gpu: Gpu, runtime: RuntimeFiles, folder: Path) -> None:
        self.gpu, self.runtime, self.folder = gpu, runtime, folder
        watch = native.compile_c([PROGRAMS / "watch_opencl.c"], "-shared", "-fPIC")
        (folder / "libOpenCL.so.1").symlink_to(watch)

    def run(self, code: str) -> str:
        """What the code prints; at its end nothing of OpenCL is left."""
        command = [sys.executable, "-c", f"{WATCHED}{code}\nassert alive() == 0, alive()\n"]
        return self.execute([*command, str(self.runtime.lib), self.gpu.module])

    def execute(self, command: list[str], **environment: str) -> str:
        """What a command prints."""
        with Path("/proc/self/maps").open() as maps:
            real = next(line.split()[-1] for line in maps if "/libOpenCL.so" in line)
        paths = {
            "LD_LIBRARY_PATH": str(self.folder),
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "REAL_OPENCL": real,
        }
        done = subprocess.run(
            command, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def watched(opencl: Gpu, runtime: RuntimeFiles, tmp_path: Path) -> WatchedOpenCl:
    return WatchedOpenCl(opencl, runtime, tmp_path)


# On every device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", support.SCENARIOS)
def test_opencl(name: str, opencl: Gpu) -> None:
    support.SCENARIOS[name](opencl)


def test_cuda(fake_cuda: FakeCuda) -> None:
    """All in one process, so that what one leaves behind would be seen by the next."""
    output = fake_cuda.run("for name, scenario in SCENARIOS.items(): scenario(gpu); print(name)")
    assert output.split() == list(support.SCENARIOS)


def test_cuda_on_the_second_device(fake_cuda: FakeCuda) -> None:
    code = "host_tensors(gpu); device_tensors(gpu); print(gpu.properties().name.decode())"
    assert fake_cuda.run(code, device=1).strip() == "Stand-in 1"


def test_the_cpu_serves_the_same_functions(runtime: RuntimeFiles, arithmetic: Path) -> None:
    cpu = Gpu(str(runtime.lib), str(arithmetic), CPU)
    assert cpu.lib.kedge_device_count(abi.DEVICE_CPU) == 1
    found = cpu.properties()
    assert (found.name.decode(), found.arch.decode()) == ("CPU", os.uname().machine)
    assert found.features == cpu.lib.kedge_cpu_features() and found.global_memory > 0
    with cpu.context() as context:
        x = floats(100)
        there = context.put(x)
        np.testing.assert_array_equal(context.get(there), x)
        context.copy(there.address + 40, there.address, 40, abi.COPY_ON_DEVICE)
        np.testing.assert_array_equal(context.get(there)[10:20], x[:10])
        failure = refusal(lambda: context.copy(there.address, there.address + 36, 40, abi.COPY_ON_DEVICE))
        assert failure.status == abi.E_ARGUMENT, "as on a GPU"
        context.synchronize()
        context.free(there.address)
    with cpu.model() as model:
        failure = refusal(lambda: cpu.context_of(model, OPENCL).__enter__())
        assert str(failure) == "the module was compiled for CPU, not for OpenCL"


# Refused when the context is created -------------------------------------------------------------------------------


def test_code_that_does_not_build_is_refused_with_the_log(opencl: Gpu) -> None:
    failure = refusal(lambda: opencl.context(str(native.module("gpu", "-DBROKEN"))).__enter__())
    assert failure.status == abi.E_LOAD
    assert "cannot build the module's kernels" in str(failure) and "this_is_no_type" in str(failure)
    assert "\n" not in str(failure)


def test_a_device_that_lacks_a_feature_is_refused_by_name(opencl: Gpu) -> None:
    needs = str(native.module("gpu", '-DNEEDS="cl_khr_fp64_of_sorts,fp64"'))
    failure = refusal(lambda: opencl.context(needs).__enter__())
    assert failure.status == abi.E_FEATURE
    name = opencl.properties().name.decode()
    assert name in str(failure)
    assert str(failure).endswith("lacks what kernel add needs: cl_khr_fp64_of_sorts")


def test_parameters_that_do_not_fit_the_descriptor_are_refused(opencl: Gpu) -> None:
    failure = refusal(lambda: opencl.context(str(native.module("gpu", "-DPARAMETERS=2"))).__enter__())
    assert failure.status == abi.E_LOAD
    assert str(failure) == "kernel add has 7 parameters, its descriptor promises 8"


def test_cuda_refuses_code_and_features(fake_cuda: FakeCuda) -> None:
    code = "failure = refusal(lambda: gpu.context().__enter__()); print(failure.status, failure)"
    broken = fake_cuda.run(code, "-DBROKEN")
    assert broken == (
        f"{abi.E_LOAD} kernel add on Stand-in 0: ptxas application ptx input, line 4; error: Not a name: this_is: "
        "the CUDA driver refuses the code: bad PTX (CUDA_ERROR_INVALID_PTX)\n"
    )
    lacking = fake_cuda.run(code, '-DNEEDS="fp16,sm_80,sm_90a"')
    assert lacking == (f"{abi.E_FEATURE} CUDA device 0, Stand-in 0 (sm_86), lacks what kernel add needs: sm_90a\n")


CREATION = [
    ("clCreateContext", -6, abi.E_MEMORY, "the OpenCL device cannot be opened: CL_OUT_OF_HOST_MEMORY (-6)"),
    ("clCreateProgramWithSource", -5, abi.E_LOAD, "does not take the module's kernels: CL_OUT_OF_RESOURCES (-5)"),
    ("clCreateBuffer", -4, abi.E_MEMORY, "out of device memory: 128 bytes wanted"),
    ("clEnqueueWriteBuffer", -5, abi.E_KERNEL, "a copy failed: CL_OUT_OF_RESOURCES (-5)"),
    ("clFinish", -5, abi.E_KERNEL, "the device failed: CL_OUT_OF_RESOURCES (-5)"),
    ("clCreateCommandQueue", -5, abi.E_LOAD, "no OpenCL queue: CL_OUT_OF_RESOURCES (-5)"),
    (
        "clCreateKernel",
        -46,
        abi.E_LOAD,
        "kernel add: OpenCL does not make it from the module's code: CL_INVALID_KERNEL_N",
    ),
    ("clGetKernelWorkGroupInfo", -48, abi.E_LOAD, "kernel add: OpenCL does not make it from the module's code"),
]


def test_a_context_that_cannot_be_made_leaves_nothing(watched: WatchedOpenCl) -> None:
    code = f"""
for call, error in {[case[:2] for case in CREATION]}:
    with gpu.model() as model:
        fail(call, error)
        failure = refusal(lambda: gpu.context_of(model).__enter__())
        print(failure.status, failure)
        assert alive() == 0, (call, alive())
        with gpu.context_of(model) as context:
            context.call("chain", [floats(4)], [floats(4)])
"""
    for line, (call, _, status, text) in zip(watched.run(code).splitlines(), CREATION, strict=True):
        assert line.startswith(f"{status} ") and text in line, call


@pytest.mark.parametrize("extensions", ["", "cl_khr_fp16", " cl_khr_fp16  cl_khr_icd ", "cl_khr_fp16 cl_khr_fp64"])
def test_the_features_of_an_opencl_device(extensions: str, watched: WatchedOpenCl) -> None:
    """With nothing written beyond them, which a sanitizer watches."""
    program = native.sanitized([PROGRAMS / "print_device.c"], "address,undefined")
    found = watched.execute([str(program)], WATCH_OPENCL_EXTENSIONS=extensions, ASAN_OPTIONS="detect_leaks=0").strip()
    assert sorted(found.split(",")) == sorted(["fp16"] * ("fp16" in extensions) + ["fp64", *extensions.split()])


# Failures while it runs --------------------------------------------------------------------------------------------


def test_addresses_that_are_no_device_memory_are_refused(opencl: Gpu) -> None:
    with opencl.context() as context:
        failure = refusal(lambda: context.call("stray", [], []))
        assert failure.status == abi.E_KERNEL and "kernel wild: buffer 0 at 0x" in str(failure)
        x = floats(8)
        host = OnDevice(x.ctypes.data, (8,), "float32", OPENCL)
        failure = refusal(lambda: context.call("chain", [host], [x]))
        assert failure.status == abi.E_INPUT
        assert str(failure) == "input x is not in memory of kedge_device_alloc on OpenCL device 0"
        there = context.put(x)
        for beyond in (
            OnDevice(there.address, (9,), "float32", OPENCL),
            OnDevice(there.address, (8,), "float32", OPENCL, 4),
        ):
            y = np.zeros(beyond.shape, np.float32)
            failure = refusal(lambda beyond=beyond, y=y: context.call("chain", [beyond], [y]))
            assert "not in memory of kedge_device_alloc" in str(failure)
        failure = refusal(lambda: context.free(there.address + 4))
        assert failure.status == abi.E_ARGUMENT
        failure = refusal(lambda: context.copy(there.address + 16, x.ctypes.data, 17, abi.COPY_TO_DEVICE))
        assert failure.status == abi.E_ARGUMENT
        context.call("chain", [there], [x])
        context.free(there.address)


def test_the_host_cannot_touch_what_stands_for_device_memory(opencl: Gpu) -> None:
    """A page that nobody may read stands for the memory, so a mix-up ends at once."""
    with opencl.context() as context:
        address = context.alloc(100)
        with Path("/proc/self/maps").open() as maps:
            held = [
                line for line in maps if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
            ]
        assert len(held) == 1 and held[0].split()[1] == "---p"
        context.free(address)


CALLS = [
    (
        "clCreateBuffer",
        -4,
        0,
        abi.E_MEMORY,
        "function chain needs an arena of 928 bytes: out of device memory: 928 bytes wanted",
    ),
    ("clCreateBuffer", -4, 1, abi.E_MEMORY, "input x: out of device memory: 400 bytes wanted"),
    ("clCreateBuffer", -4, 2, abi.E_MEMORY, "output y: out of device memory: 400 bytes wanted"),
    ("clEnqueueWriteBuffer", -4, 0, abi.E_MEMORY, "a copy failed: CL_MEM_OBJECT_ALLOCATION_FAILURE (-4)"),
    (
        "clSetKernelArg",
        -51,
        4,
        abi.E_KERNEL,
        "kernel scale, parameter 4: OpenCL does not take an argument: CL_INVALID_ARG_SIZE",
    ),
    ("clEnqueueNDRangeKernel", -54, 1, abi.E_KERNEL, "the launch failed: CL_INVALID_WORK_GROUP_SIZE (-54)"),
    ("clEnqueueReadBuffer", -5, 0, abi.E_KERNEL, "a copy failed: CL_OUT_OF_RESOURCES (-5)"),
]


def test_a_call_that_fails_leaves_the_context_as_it_was(watched: WatchedOpenCl) -> None:
    code = f"""
x = floats(100)
for call, error, after in {[case[:3] for case in CALLS]}:
    y = np.full(100, 7, np.float32)
    with gpu.context() as context:
        fail(call, error, after)
        failure = refusal(lambda: context.call("chain", [x], [y]))
        print(failure.status, failure)
        np.testing.assert_array_equal(y, 7)
        context.call("chain", [x], [y])
        np.testing.assert_array_equal(y, x * -4)
"""
    for line, (call, _, after, status, text) in zip(watched.run(code).splitlines(), CALLS, strict=True):
        assert line.startswith(f"{status} ") and text in line, (call, after)


def test_a_fault_of_an_opencl_device(watched: WatchedOpenCl) -> None:
    """What happened is known when the queue is waited for: the context refuses from then on."""
    code = """
x, y = floats(100), np.full(100, 7, np.float32)
with gpu.context() as context:
    fail("clFinish", -5)
    failure = refusal(lambda: context.call("chain", [x], [y]))
    print(failure.status, failure)
    np.testing.assert_array_equal(y, 7)
    print(refusal(lambda: context.call("chain", [x], [y])))
with gpu.context() as context:
    context.call("chain", [x], [y])
    np.testing.assert_array_equal(y, x * -4)
"""
    failure, refused = watched.run(code).splitlines()
    assert failure.startswith(f"{abi.E_KERNEL} ") and failure.endswith("the device failed: CL_OUT_OF_RESOURCES (-5)")
    assert refused == "the device faulted earlier: destroy its contexts (close its models), create new ones"


def test_nothing_of_opencl_is_left(watched: WatchedOpenCl) -> None:
    """Also not what a user forgot to free, nor the events of a queue with many launches."""
    code = """
for scenario in SCENARIOS.values(): scenario(gpu)
assert alive() == 0, alive()
with gpu.context() as context:
    context.time("chain", [floats(1)], [floats(1)], number=1000, repeat=2)
    context.alloc(1000)
"""
    watched.run(code)


#: A child of a process with a context: what it is told, and what is left of it when it frees all it has.
FORKED = """
import os, signal
x, y = floats(100), np.zeros(100, np.float32)
with gpu.model() as model, gpu.context_of(model) as context:
    there = context.put(x)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        refused = [
            refusal(lambda: context.call("chain", [x], [y])),
            refusal(lambda: context.time("chain", [x], [y])),
            refusal(lambda: context.alloc(4)),
            refusal(lambda: context.free(there.address)),
            refusal(lambda: gpu.context_of(model).__enter__()),
        ]
        gpu.lib.kedge_context_destroy(context.handle)
        gpu.lib.kedge_close(model)
        print(*{f"{failure.status} {failure}" for failure in refused}, sep="\\n", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    context.call("chain", [there], [y])
    np.testing.assert_array_equal(y, x * -4)
    context.free(there.address)
"""


@pytest.mark.parametrize("name", ["OpenCL", "CUDA"])
def test_a_driver_stays_with_the_parent_of_a_fork(name: str, watched: WatchedOpenCl, fake_cuda: FakeCuda) -> None:
    told = (watched if name == "OpenCL" else fake_cuda).run(FORKED)
    assert told.startswith(f"{abi.E_KERNEL} this process was forked from one that had loaded the {name} driver, which")
    assert told.count("\n") == 1, "each is refused for that reason"


def test_a_fault_of_the_device_ends_its_contexts(fake_cuda: FakeCuda) -> None:
    fake_cuda.run("fault(gpu)")


def test_an_error_that_nobody_knows_ends_the_context_too(fake_cuda: FakeCuda) -> None:
    code = """
with gpu.context() as context:
    print(refusal(lambda: context.call("wild", [], [])))
    print(refusal(context.synchronize))
"""
    assert fake_cuda.run(code, FAKE_CUDA_FAULT="999").splitlines() == [
        "Stand-in 0: the device failed: unknown error (?)",
        "the device faulted earlier: only a new process can use CUDA again",
    ]


def test_a_block_that_fits_the_device_but_not_the_kernel(fake_cuda: FakeCuda) -> None:
    code = """
x = floats(600)
with gpu.context() as context:
    print(refusal(lambda: context.call("wide", [x], [x])))
    context.call("wide", [x[:512].copy()], [x[:512].copy()])
"""
    expected = "kernel scale: a block of 600 x 1 x 1 threads, Stand-in 0 allows it at most 512\n"
    assert fake_cuda.run(code) == expected


@pytest.mark.parametrize("warmup", [0, 2])
def test_timed_repeats_are_launches_and_one_wait(warmup: int, fake_cuda: FakeCuda) -> None:
    code = f"""
x = floats(100)
with gpu.context() as context:
    context.time("chain", [x], [x], number=5, repeat=4, warmup={warmup})
"""
    fake_cuda.run(code)
    launches, waits = map(int, fake_cuda.report.read_text().split()[5:])
    assert launches == 3 * (warmup + 5 * 4)
    weights, warm, outputs = 1, 1, 1  # the input's copy is waited for with the warm-up, also when there is none
    assert waits == weights + warm + 4 + outputs


def test_launches_without_end_take_no_memory_without_end(opencl: Gpu) -> None:
    """A queue holds a bounded number: the oldest are done before more are taken."""
    x, y = floats(1), np.zeros(1, np.float32)
    with opencl.context() as context:
        assert len(context.time("chain", [x], [y], number=1500, repeat=1)) == 1  # 4500 launches in one queue
        np.testing.assert_array_equal(y, x * -4)


# Without a driver --------------------------------------------------------------------------------------------------

NO_DEVICE = """
import sys
from support.gpu import *
gpu = Gpu(sys.argv[1], sys.argv[2], (int(sys.argv[3]), 0))
print(gpu.lib.kedge_device_count(gpu.device[0]), gpu.lib.kedge_last_error().decode())
print(refusal(gpu.properties))
failure = refusal(lambda: gpu.context().__enter__())
print(failure.status, failure)
"""


def without(runtime: RuntimeFiles, device: tuple[int, int], *flags: str, **environment: str) -> list[str]:
    module = native.module("gpu", *flags)
    command = [sys.executable, "-c", NO_DEVICE, str(runtime.lib), str(module), str(device[0])]
    paths = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        command, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("device", "flags", "name"), [(CUDA, ("-DCUDA",), "CUDA"), (OPENCL, (), "OpenCL")])
def test_a_library_that_is_no_driver(
    device: tuple[int, int], flags: tuple[str, ...], name: str, runtime: RuntimeFiles, tmp_path: Path
) -> None:
    """The library is found but is another one: what lacks is named, and there are no devices."""
    source = tmp_path / "empty.c"
    source.write_text("int nothing_of_a_driver;\n")
    library = native.compile_c([source], "-shared", "-fPIC")
    for alias in ("libcuda.so.1", "libcuda.so", "libOpenCL.so.1", "libOpenCL.so"):
        (tmp_path / alias).symlink_to(library)
    count, properties, context = without(runtime, device, *flags, LD_LIBRARY_PATH=str(tmp_path))
    first = {"CUDA": "cuInit", "OpenCL": "clGetPlatformIDs"}[name]
    assert count == f"0 there is no {name} driver: the library lacks {first}"
    assert properties == f"there is no {name} driver: the library lacks {first}"
    assert context == f"{abi.E_LOAD} there is no {name} driver: the library lacks {first}"


def test_a_driver_without_devices(runtime: RuntimeFiles, opencl: Gpu, tmp_path: Path) -> None:
    count, properties, context = without(runtime, OPENCL, OCL_ICD_VENDORS=str(tmp_path))
    assert count == "0 OpenCL finds no device: is the driver of the device installed?"
    assert properties == count[2:] and context == f"{abi.E_LOAD} {count[2:]}"


def test_no_library_at_all(runtime: RuntimeFiles) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        count, _, context = without(runtime, CUDA, "-DCUDA")
        assert count.startswith("0 there is no CUDA driver: libcuda.so.1: cannot open shared object file")
        assert context.startswith(f"{abi.E_LOAD} there is no CUDA driver: libcuda.so.1")
    else:
        pytest.skip("this machine has a CUDA driver")


def test_a_cuda_driver_that_does_not_start(fake_cuda: FakeCuda) -> None:
    output = fake_cuda.run(
        "print(gpu.lib.kedge_device_count(2)); print(refusal(gpu.properties))", FAKE_CUDA_BROKEN="yes"
    )
    assert output == "0\nthe CUDA driver cannot be used: unknown error (?)\n"
