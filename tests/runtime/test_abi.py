"""rpc/abi.py is kedge.h: every constant, every struct to the byte, every function."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path

import pytest

from kedge.compiler.toolchain import RuntimeFiles
from kedge.device_agent import runtime as sources
from kedge.rpc import abi
from support import native

HEADER = (sources.SOURCE_DIR / "kedge.h").read_text()
#: C type -> its mirror; those without a mirror are opaque, or callbacks.
STRUCTS = {
    "DLDevice": abi.DLDevice,
    "DLDataType": abi.DLDataType,
    "DLTensor": abi.DLTensor,
    "kedge_expr_op": abi.ExprOp,
    "kedge_expr": abi.Expr,
    "kedge_port": abi.Port,
    "kedge_symbol": abi.Symbol,
    "kedge_device_kernel": abi.DeviceKernel,
    "kedge_launch": abi.Launch,
    "kedge_runtime_api": abi.RuntimeApi,
    "kedge_frame": abi.Frame,
    "kedge_equality": abi.Equality,
    "kedge_function_desc": abi.FunctionDesc,
    "kedge_weight_desc": abi.WeightDesc,
    "kedge_module_desc": abi.ModuleDesc,
    "kedge_open_options": abi.OpenOptions,
    "kedge_context_options": abi.ContextOptions,
    "kedge_time_options": abi.TimeOptions,
    "kedge_time_result": abi.TimeResult,
    "kedge_device_properties": abi.DeviceProperties,
}
CONSTANTS = {
    "KEDGE_ABI_VERSION": abi.ABI_VERSION,
    "KEDGE_MODULE_MAGIC": abi.MODULE_MAGIC,
    "KEDGE_ALIGNMENT": abi.ALIGNMENT,
    "KEDGE_MAX_NDIM": abi.MAX_NDIM,
    "KEDGE_MAX_PARAMETERS": abi.MAX_PARAMETERS,
    "KEDGE_MAX_STEPS": abi.MAX_STEPS,
    "KEDGE_ROOFS": abi.ROOFS,
    "kDLCPU": abi.DEVICE_CPU,
    "kDLCUDA": abi.DEVICE_CUDA,
    "kDLOpenCL": abi.DEVICE_OPENCL,
    "kDLInt": abi.CODE_INT,
    "kDLUInt": abi.CODE_UINT,
    "kDLFloat": abi.CODE_FLOAT,
    "kDLBfloat": abi.CODE_BFLOAT,
    "kDLBool": abi.CODE_BOOL,
} | {
    f"KEDGE_{name}": value
    for name, value in vars(abi).items()
    if re.fullmatch(r"OK|E_[A-Z]+|EXPR_[A-Z]+|COPY_[A-Z_]+", name)
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says about sizes, offsets and constants."""
    facts = {f"sizeof({name})": f"sizeof({name})" for name in STRUCTS}
    for name, mirror in STRUCTS.items():
        facts |= {f"{name}.{field[0]}": f"offsetof({name}, {field[0]})" for field in mirror._fields_}
    facts |= {name: name for name in CONSTANTS}
    lines = [f'  printf("%s\\"{key}\\": %lld", sep, (long long){value}); sep = ", ";' for key, value in facts.items()]
    source = tmp_path_factory.mktemp("probe") / "probe.c"
    body = "\n".join(lines)
    source.write_text(
        '#include <stdio.h>\n#include "kedge.h"\n'
        f'int main(void) {{\n  const char *sep = "";\n  printf("{{");\n{body}\n  printf("}}");\n  return 0;\n}}\n'
    )
    output = subprocess.run([native.compile_c([source])], capture_output=True, text=True, check=True).stdout
    facts_found: dict[str, int] = json.loads(output)
    return facts_found


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(name: str, probed: dict[str, int]) -> None:
    mirror = STRUCTS[name]
    assert ctypes.sizeof(mirror) == probed[f"sizeof({name})"]
    offsets = {field[0]: getattr(mirror, field[0]).offset for field in mirror._fields_}
    assert offsets == {field: probed[f"{name}.{field}"] for field in offsets}


def test_constants(probed: dict[str, int]) -> None:
    assert {name: probed[name] for name in CONSTANTS} == CONSTANTS


def test_every_struct_of_the_header_is_mirrored() -> None:
    declared = set(re.findall(r"^\} (\w+);", HEADER, re.MULTILINE))
    enums = {"DLDeviceType", "DLDataTypeCode", "kedge_status", "kedge_expr_opcode", "kedge_copy_direction"}
    assert declared - enums == set(STRUCTS)


def test_every_field_of_the_header_is_mirrored() -> None:
    for name, mirror in STRUCTS.items():
        # A body has no braces of its own but in comments; fields end with their name (or a function pointer).
        body = re.search(r"\{([^{}]*)\} " + name + ";", re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL))
        assert body is not None
        fields = []
        for line in filter(None, (piece.strip() for piece in body[1].split(";"))):
            pointer = re.match(r".*\(\*(\w+)\)\(", line, re.DOTALL)
            fields.append(pointer[1] if pointer else re.split(r"[ *]", line)[-1].partition("[")[0])
        assert fields == [field[0] for field in mirror._fields_], name


def test_every_enumerator_of_the_header_is_mirrored() -> None:
    declared = set(re.findall(r"[{ ]\s*(KEDGE_(?:OK|E_\w+|EXPR_\w+|COPY_\w+)) = ", HEADER))
    assert declared == {name for name in CONSTANTS if re.match(r"KEDGE_(OK|E_|EXPR_|COPY_)", name)}


def test_every_function_of_the_header_is_declared_and_exported(runtime: RuntimeFiles) -> None:
    declared = set(re.findall(r"^KEDGE_API [^;(]*?(kedge_\w+)\(", HEADER, re.MULTILINE))
    lib = abi.load_runtime(str(runtime.lib))
    assert {name for name in declared if getattr(lib, name).argtypes is not None} == declared
    assert len(declared) == 22


def test_working_sets_are_those_that_the_runtime_reads() -> None:
    source = (sources.SOURCE_DIR / "roof.c").read_text()
    sizes = re.search(r"working_sets\[KEDGE_ROOFS\] = \{(.*?)\}", source)
    assert sizes is not None and len(abi.ROOF_BYTES) == abi.ROOFS
    pairs = (re.findall(r"\d+", size) for size in sizes[1].split(","))
    assert tuple(int(number) << int(shift) for number, shift in pairs) == abi.ROOF_BYTES


def test_status_names(runtime: RuntimeFiles) -> None:
    lib = abi.load_runtime(str(runtime.lib))
    assert {status: lib.kedge_status_name(status).decode() for status in abi.STATUS_NAMES} == abi.STATUS_NAMES
    assert lib.kedge_status_name(99) == b"unknown status"


def test_dtypes_round_trip() -> None:
    assert [abi.dtype_name(*abi.dtype_code(name)) for name in abi.DTYPES] == list(abi.DTYPES)
    with pytest.raises(ValueError, match="unknown dtype 'complex64'"):
        abi.dtype_code("complex64")
    with pytest.raises(ValueError, match="has no kedge dtype"):
        abi.dtype_name(abi.CODE_FLOAT, 32, lanes=4)


def test_a_runtime_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        abi.load_runtime(str(tmp_path / "nothing.so"))
