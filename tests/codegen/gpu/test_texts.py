"""The texts for the device: the tutorial's schedules as OpenCL C, facts of their PTX, names, limits, determinism."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kedge.compiler import te
from kedge.compiler.codegen.gpu.ir import Barrier, walk
from kedge.compiler.codegen.gpu.kernel import emit_device
from kedge.compiler.codegen.gpu.opencl import features_of, opencl_source
from kedge.compiler.codegen.gpu.ptx import emit_ptx, emit_ptx_ir
from kedge.compiler.errors import CodegenError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import GpuTarget, parse
from kedge.compiler.tir.stmt import PrimFunc
from support.gpu_threads import launches

STEPS = ("naive", "tiles", "row_sums", "row_sums_by_parts", "softmax")
Golden = Callable[[str, str], None]


@pytest.mark.parametrize("step", STEPS)
def test_the_tutorial_in_opencl_c(tutorial: dict[str, Any], step: str, golden: Golden) -> None:
    golden(f"{step}.cl", opencl_source(launches(tutorial[step]().func)))


@pytest.fixture(scope="module")
def ptx(tutorial: dict[str, Any]) -> dict[str, str]:
    return {step: emit_ptx(launches(tutorial[step]().func), "sm_75") for step in STEPS}


@pytest.mark.parametrize("step", STEPS)
def test_the_tutorial_in_ptx(tutorial: dict[str, Any], ptx: dict[str, str], step: str) -> None:
    (launch,) = launches(tutorial[step]().func)
    text = ptx[step]
    assert re.search(r"^\.target sm_75$", text, re.MULTILINE)
    assert ".visible .entry k(" in text
    assert f".maxntid {', '.join(map(str, launch.block))}" in text
    # The optimiser may repeat a loop's body, and may not drop a barrier.
    assert len(re.findall(r"bar(rier)?\.(cta\.)?sync", text)) >= sum(
        isinstance(each, Barrier) for each in walk(launch.body)
    )
    assert (".shared .align 16" in text) == bool(launch.shared)


def test_tiles_stay_in_registers(ptx: dict[str, str]) -> None:
    assert ".local" not in ptx["tiles"]  # no array in memory: all indices are known
    assert ptx["tiles"].count("fma.rn.f32") >= 64
    assert "ld.shared.v4" in ptx["tiles"]
    assert "ld.shared" not in ptx["naive"]


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_ptxas_assembles_the_tutorial(tutorial: dict[str, Any], arch: str, tmp_path: Path) -> None:
    for step in STEPS:
        assemble(emit_ptx(launches(tutorial[step]().func), arch), arch, tmp_path / step)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "uint64", "float16", "bfloat16", "float64"])
def test_ptxas_assembles_every_element_type(dtype: str, tmp_path: Path) -> None:
    assemble(emit_ptx(launches(staged(dtype).func), "sm_75"), "sm_75", tmp_path / "kernel")


def staged(dtype: str) -> Schedule:
    """Each element through shared and private memory, and back in the opposite order."""
    x = te.placeholder((4, 32), dtype, "x")
    first = te.compute((4, 32), lambda i, j: x[i, j], name="first")
    y = te.compute((4, 32), lambda i, j: first[i, 31 - j], name="y")
    sch = Schedule(te.create_prim_func([x, y], "staged"))
    row, column = sch.get_loops(sch.get_block("y"))
    sch.bind(row, "blockIdx.x")
    sch.compute_at(sch.get_block("first"), row)
    sch.set_scope(sch.get_block("first"), "shared")
    sch.bind(column, "threadIdx.x")
    sch.bind(sch.get_loops(sch.get_block("first"))[-1], "threadIdx.x")
    sch.cache_write(sch.get_block("y"), column, "local")
    return sch


def assemble(text: str, arch: str, path: Path) -> None:
    """Skips where the assembler of CUDA is not installed: no machine needs it to compile."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("ptxas is not on the PATH")
    path.with_suffix(".ptx").write_text(text)
    command = [ptxas, f"-arch={arch}", "-o", str(path.with_suffix(".cubin")), str(path.with_suffix(".ptx"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Names ------------------------------------------------------------------------------------------------------------

TAKEN = (
    "float", "kernel", "get_group_id", "x", "x_1", "x_base", "x_base_1", "main", "half", "exp", "barrier", "NULL",
    "asm", "uint4", "float16", "vload4", "global", "__global", "ß", "a b", "x-y", "kedge_max_float", "as_uint", "9", "",
)  # fmt: skip


def many_names() -> PrimFunc:
    """The sum of many buffers whose names are words of OpenCL C, or none at all."""
    inputs = [te.placeholder((4,), "float32", name) for name in TAKEN]

    def total(i: Any) -> Any:
        result = inputs[0][i]
        for each in inputs[1:]:
            result = result + each[i]
        return result

    return te.create_prim_func([*inputs, te.compute((4,), total, name="int")], "names")


def test_names_are_the_languages_and_apart() -> None:
    sch = Schedule(many_names())
    sch.bind(sch.get_loops(sch.get_block("int"))[0], "blockIdx.x")
    text = opencl_source(launches(sch.func))
    assert text.isascii()
    variables = re.findall(r"\*restrict (\w+) =", text)
    parameters = re.findall(r"uchar \*(\w+), ulong (\w+)", text)
    names = {*variables, *(name for pair in parameters for name in pair)}
    assert len(variables) == len(parameters) == len(TAKEN) + 1
    assert len(names) == 3 * len(variables)
    assert names.isdisjoint(
        ["float", "kernel", "get_group_id", "main", "half", "exp", "asm", "uint4", "int", "float16"]
    )


# Limits -----------------------------------------------------------------------------------------------------------


def spread(extents: dict[str, int]) -> PrimFunc:
    """One loop for each axis."""
    x = te.placeholder(tuple(extents.values()), "float32", "x")
    sch = Schedule(te.create_prim_func([x, te.compute(x.shape, lambda *i: x[i] + 1.0, name="y")], "f"))
    for loop, axis in zip(sch.get_loops(sch.get_block("y")), extents, strict=True):
        sch.bind(loop, axis)
    return sch.func


def gpu(text: str) -> GpuTarget:
    target = parse(text)
    assert isinstance(target, GpuTarget)
    return target


@pytest.mark.parametrize(
    ("target", "extents", "message"),
    [
        ("opencl", {"threadIdx.x": 257}, "a group of 257 x 1 x 1 = 257 threads; opencl has groups of at most 256"),
        ("cuda", {"threadIdx.y": 64, "threadIdx.x": 32}, "a group of 32 x 64 x 1 = 2048 threads"),
        ("cuda", {"threadIdx.z": 65}, "65 on threadIdx.z; CUDA has at most 64"),
        ("cuda", {"blockIdx.y": 65536}, "65536 on blockIdx.y; CUDA has at most 65535"),
        ("cuda", {"blockIdx.z": 65536}, "65536 on blockIdx.z; CUDA has at most 65535"),
        ("cuda", {"blockIdx.x": 2**31}, "2147483648 on blockIdx.x; CUDA has at most 2147483647"),
    ],
)
def test_limits_are_told(target: str, extents: dict[str, int], message: str) -> None:
    with pytest.raises(CodegenError, match=message) as caught:
        emit_device(spread(extents), gpu(target), "k")
    assert caught.value.hint


def test_as_much_as_there_is_is_fine() -> None:
    emit_device(spread({"blockIdx.y": 65535, "threadIdx.z": 64}), gpu("cuda"), "k")
    emit_device(spread({"blockIdx.y": 65536, "threadIdx.x": 256}), gpu("opencl"), "k")


def test_shared_memory_is_limited(tutorial: dict[str, Any]) -> None:
    with pytest.raises(CodegenError, match="buffers in shared scope take 8192 bytes; opencl has 8191 for a group"):
        emit_device(tutorial["tiles"]().func, gpu("opencl -shared=8191"), "k")


def test_free_dims_are_long_and_known_ones_int() -> None:
    n = te.Var("n")
    x = te.placeholder((n, 8), "float32", "x")
    sch = Schedule(te.create_prim_func([x, te.compute((n, 8), lambda i, j: x[i, j] + 1.0, name="y")], "f"))
    i, j = sch.get_loops(sch.get_block("y"))
    sch.bind(i, "blockIdx.x")
    sch.bind(j, "threadIdx.x")
    assert "const long blockIdx_x" in opencl_source(launches(sch.func))
    assert "const int blockIdx_x" in opencl_source(launches(spread({"blockIdx.x": 2**15, "threadIdx.x": 2**8})))
    assert "const long blockIdx_x" in opencl_source(launches(spread({"blockIdx.x": 2**24, "threadIdx.x": 2**8})))


def test_double_precision_is_asked_for() -> None:
    assert features_of(launches(staged("float64").func)) == ("fp64",)
    assert features_of(launches(staged("float32").func)) == ()


# Determinism ------------------------------------------------------------------------------------------------------

PRINT = """
import hashlib, re, sys
from pathlib import Path
from kedge.compiler.codegen.gpu.opencl import opencl_source
from kedge.compiler.codegen.gpu.ptx import emit_ptx_ir
from support.gpu_threads import launches
names = {}
blocks = re.findall(r"```python\\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
exec("\\n".join(block for block in blocks if "target=" not in block), names)
for step in ("tiles", "row_sums", "softmax"):
    made = launches(names[step]().func)
    for text in (opencl_source(made), emit_ptx_ir(made, "sm_75")):
        print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_texts_do_not_depend_on_the_hash_seed(tutorial: dict[str, Any]) -> None:
    """They are part of cached kernels and of artifacts' digests."""
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(root / "tests")}
    command = [sys.executable, "-c", PRINT, str(root / "docs" / "tutorials" / "gpu.md")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    here = []
    for step in ("tiles", "row_sums", "softmax"):
        made = launches(tutorial[step]().func)
        here += [
            hashlib.sha256(text.encode()).hexdigest() for text in (opencl_source(made), emit_ptx_ir(made, "sm_75"))
        ]
    assert done.stdout.split() == here
