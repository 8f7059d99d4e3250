"""The Python mirror of `device_agent/runtime/kedge.h`: constants, structs by ctypes, and dtype names.

Standard library only, Python 3.9. A test compiles a probe against the header and compares every value, size and
offset with what stands here; the names are the header's, so that a reader needs only one of the two.
"""

from __future__ import annotations

import ctypes
from typing import Any, Dict, Tuple

ABI_VERSION = 4
MODULE_MAGIC = 0x4547444B
MODULE_SYMBOL = "kedge_module"
ALIGNMENT = 64
MAX_NDIM = 8
MAX_PARAMETERS = 256
MAX_STEPS = 1048576
ROOFS = 4
#: The working sets of `kedge_time_result.read_bytes_per_s`, in bytes.
ROOF_BYTES = (256 << 10, 2 << 20, 16 << 20, 128 << 20)

# kedge_status
OK = 0
E_ARGUMENT = 1
E_INPUT = 2
E_LOAD = 3
E_ABI = 4
E_FEATURE = 5
E_MEMORY = 6
E_CANCELLED = 7
E_KERNEL = 8

#: What `kedge_status_name` prints.
STATUS_NAMES: Dict[int, str] = {
    OK: "ok",
    E_ARGUMENT: "bad argument",
    E_INPUT: "bad input",
    E_LOAD: "load error",
    E_ABI: "wrong ABI",
    E_FEATURE: "missing feature",
    E_MEMORY: "out of memory",
    E_CANCELLED: "cancelled",
    E_KERNEL: "kernel failure",
}

# kedge_expr_opcode
EXPR_CONST = 0
EXPR_SYMBOL = 1
EXPR_ADD = 2
EXPR_SUB = 3
EXPR_MUL = 4
EXPR_FLOORDIV = 5
EXPR_FLOORMOD = 6
EXPR_MIN = 7
EXPR_MAX = 8

# kedge_copy_direction
COPY_TO_DEVICE = 1
COPY_FROM_DEVICE = 2
COPY_ON_DEVICE = 3

# DLDeviceType and DLDataTypeCode
DEVICE_CPU = 1
DEVICE_CUDA = 2
DEVICE_OPENCL = 4
CODE_INT = 0
CODE_UINT = 1
CODE_FLOAT = 2
CODE_BFLOAT = 4
CODE_BOOL = 6

#: dtype by its numpy name -> (DLDataTypeCode, bits); lanes are always 1.
DTYPES: Dict[str, Tuple[int, int]] = {
    "bool": (CODE_BOOL, 8),
    "int8": (CODE_INT, 8),
    "int16": (CODE_INT, 16),
    "int32": (CODE_INT, 32),
    "int64": (CODE_INT, 64),
    "uint8": (CODE_UINT, 8),
    "uint16": (CODE_UINT, 16),
    "uint32": (CODE_UINT, 32),
    "uint64": (CODE_UINT, 64),
    "float16": (CODE_FLOAT, 16),
    "bfloat16": (CODE_BFLOAT, 16),
    "float32": (CODE_FLOAT, 32),
    "float64": (CODE_FLOAT, 64),
}
_DTYPE_NAMES: Dict[Tuple[int, int], str] = {pair: name for name, pair in DTYPES.items()}


def dtype_code(name: str) -> Tuple[int, int]:
    """The (DLDataTypeCode, bits) of a dtype; raises ValueError for one that no kedge tensor has."""
    try:
        return DTYPES[name]
    except KeyError:
        raise ValueError(f"unknown dtype {name!r}; kedge knows {', '.join(DTYPES)}") from None


def dtype_name(code: int, bits: int, lanes: int = 1) -> str:
    """The numpy name of a DLDataType; raises ValueError where there is none."""
    name = _DTYPE_NAMES.get((code, bits))
    if name is None or lanes != 1:
        raise ValueError(f"DLDataType(code={code}, bits={bits}, lanes={lanes}) has no kedge dtype")
    return name


def dtype_size(name: str) -> int:
    """Bytes of one element."""
    return dtype_code(name)[1] // 8


class DLDevice(ctypes.Structure):
    """Where a tensor lives."""

    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class DLDataType(ctypes.Structure):
    """An element type."""

    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    """A borrowed strided array."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class ExprOp(ctypes.Structure):
    """kedge_expr_op: one step of a postfix program."""

    _fields_ = [("opcode", ctypes.c_int64), ("value", ctypes.c_int64)]


class Expr(ctypes.Structure):
    """kedge_expr: a postfix program over a function's symbols."""

    _fields_ = [("ops", ctypes.POINTER(ExprOp)), ("n_ops", ctypes.c_int64)]


class Port(ctypes.Structure):
    """kedge_port: a named input or output."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("shape", ctypes.POINTER(Expr)),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
    ]


class Symbol(ctypes.Structure):
    """kedge_symbol: a free dim and where its value comes from."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("lower", ctypes.c_int64),
        ("upper", ctypes.c_int64),
        ("input", ctypes.c_int32),
        ("dim", ctypes.c_int32),
    ]


class Equality(ctypes.Structure):
    """kedge_equality: two sizes that must be equal, and the operators that need it."""

    _fields_ = [("a", Expr), ("b", Expr), ("of", ctypes.c_char_p)]


class DeviceKernel(ctypes.Structure):
    """kedge_device_kernel: a kernel of a GPU with its code."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("code", ctypes.c_char_p),
        ("code_size", ctypes.c_uint64),
        ("features", ctypes.c_char_p),
        ("n_buffers", ctypes.c_int32),
        ("n_scalars", ctypes.c_int32),
    ]


class Launch(ctypes.Structure):
    """kedge_launch: one launch of a kernel."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("kernel", ctypes.POINTER(DeviceKernel)),
        ("grid", ctypes.c_int64 * 3),
        ("block", ctypes.c_int64 * 3),
        ("args", ctypes.POINTER(ctypes.c_int64)),
    ]


class RuntimeApi(ctypes.Structure):
    """kedge_runtime_api: what compiled code may call."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("parallel_for", ctypes.c_void_p),
        ("parallel_for_dynamic", ctypes.c_void_p),
        ("launch", ctypes.c_void_p),
        ("fail", ctypes.c_void_p),
        ("mark", ctypes.c_void_p),
    ]


class Frame(ctypes.Structure):
    """kedge_frame: one call as compiled code sees it."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("api", ctypes.POINTER(RuntimeApi)),
        ("pool", ctypes.c_void_p),
        ("inputs", ctypes.POINTER(ctypes.c_void_p)),
        ("outputs", ctypes.POINTER(ctypes.c_void_p)),
        ("symbols", ctypes.POINTER(ctypes.c_int64)),
        ("arena", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("cancel", ctypes.c_void_p),
        ("marks", ctypes.POINTER(ctypes.c_int64)),
    ]


class FunctionDesc(ctypes.Structure):
    """kedge_function_desc: a callable of a module."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("entry", ctypes.c_void_p),
        ("inputs", ctypes.POINTER(Port)),
        ("outputs", ctypes.POINTER(Port)),
        ("symbols", ctypes.POINTER(Symbol)),
        ("arena_size", Expr),
        ("n_inputs", ctypes.c_int32),
        ("n_outputs", ctypes.c_int32),
        ("n_symbols", ctypes.c_int32),
        ("n_steps", ctypes.c_int32),
        ("equalities", ctypes.POINTER(Equality)),
        ("n_equalities", ctypes.c_int64),
    ]


class WeightDesc(ctypes.Structure):
    """kedge_weight_desc: where a weight lies."""

    _fields_ = [("name", ctypes.c_char_p), ("offset", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class ModuleDesc(ctypes.Structure):
    """kedge_module_desc: what `lib.so` exports."""

    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("abi_version", ctypes.c_uint32),
        ("struct_size", ctypes.c_uint64),
        ("target", ctypes.c_char_p),
        ("features", ctypes.c_char_p),
        ("functions", ctypes.POINTER(ctypes.POINTER(FunctionDesc))),
        ("weights", ctypes.POINTER(WeightDesc)),
        ("weights_size", ctypes.c_uint64),
        ("n_functions", ctypes.c_int32),
        ("n_weights", ctypes.c_int32),
        ("device_type", ctypes.c_int32),
        ("n_kernels", ctypes.c_int32),
        ("kernels", ctypes.POINTER(ctypes.POINTER(DeviceKernel))),
    ]


class OpenOptions(ctypes.Structure):
    """kedge_open_options."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("lib_path", ctypes.c_char_p),
        ("weights_path", ctypes.c_char_p),
        ("weights_offset", ctypes.c_uint64),
        ("weights_data", ctypes.c_void_p),
    ]


class ContextOptions(ctypes.Structure):
    """kedge_context_options."""

    _fields_ = [("struct_size", ctypes.c_uint64), ("num_threads", ctypes.c_int32), ("reserved", ctypes.c_int32)]


class TimeOptions(ctypes.Structure):
    """kedge_time_options."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("number", ctypes.c_int64),
        ("repeat", ctypes.c_int64),
        ("min_repeat_ns", ctypes.c_int64),
        ("warmup", ctypes.c_int64),
        ("limit_zero_time_iterations", ctypes.c_int64),
        ("cooldown_interval_ns", ctypes.c_int64),
        ("repeats_to_cooldown", ctypes.c_int64),
        ("cache_flush_bytes", ctypes.c_int64),
        ("profile", ctypes.c_int64),
    ]


class TimeResult(ctypes.Structure):
    """kedge_time_result."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("samples_ns", ctypes.POINTER(ctypes.c_double)),
        ("number", ctypes.c_int64),
        ("n_samples", ctypes.c_int64),
        ("resolution_ns", ctypes.c_int64),
        ("step_ns", ctypes.POINTER(ctypes.c_double)),
        ("clock_hz", ctypes.c_double),
        ("read_bytes_per_s", ctypes.c_double * ROOFS),
    ]


class DeviceProperties(ctypes.Structure):
    """kedge_device_properties: what a device is."""

    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("driver_version", ctypes.c_char_p),
        ("arch", ctypes.c_char_p),
        ("features", ctypes.c_char_p),
        ("global_memory", ctypes.c_uint64),
        ("local_memory", ctypes.c_uint64),
        ("max_allocation", ctypes.c_uint64),
        ("max_group", ctypes.c_int64),
        ("compute_units", ctypes.c_int64),
    ]


def load_runtime(path: str) -> Any:
    """Load `libkedge_rt.so` and declare every function of kedge.h on it.

    Raises:
        OSError: the file is missing, or is for another architecture.
        ValueError: the library speaks another ABI version.
    """
    lib = ctypes.CDLL(path)
    handle, tensors, index = ctypes.c_void_p, ctypes.POINTER(DLTensor), ctypes.c_int32
    call = [handle, index, tensors, index, tensors, index]
    signatures: Dict[str, Tuple[Any, Any]] = {
        "kedge_last_error": (ctypes.c_char_p, []),
        "kedge_status_name": (ctypes.c_char_p, [ctypes.c_int32]),
        "kedge_abi_version": (ctypes.c_uint32, []),
        "kedge_open": (index, [ctypes.POINTER(OpenOptions), ctypes.POINTER(ctypes.c_void_p)]),
        "kedge_open_linked": (index, [ctypes.POINTER(ModuleDesc), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]),
        "kedge_close": (None, [handle]),
        "kedge_describe": (ctypes.POINTER(ModuleDesc), [handle]),
        "kedge_function_index": (index, [handle, ctypes.c_char_p]),
        "kedge_context_create": (
            index,
            [handle, DLDevice, ctypes.POINTER(ContextOptions), ctypes.POINTER(ctypes.c_void_p)],
        ),
        "kedge_context_destroy": (None, [handle]),
        "kedge_infer": (index, call),
        "kedge_prepare": (index, call),
        "kedge_call": (index, call),
        "kedge_cancel": (None, [handle]),
        "kedge_time": (index, [*call, ctypes.POINTER(TimeOptions), ctypes.POINTER(TimeResult)]),
        "kedge_device_count": (ctypes.c_int32, [ctypes.c_int32]),
        "kedge_device_info": (index, [ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(DeviceProperties)]),
        "kedge_device_alloc": (index, [handle, ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p)]),
        "kedge_device_free": (index, [handle, ctypes.c_void_p]),
        "kedge_device_copy": (
            index,
            [handle, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int32],
        ),
        "kedge_device_synchronize": (index, [handle]),
        "kedge_cpu_features": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    version = int(lib.kedge_abi_version())
    if version != ABI_VERSION:
        raise ValueError(f"{path} speaks ABI {version}, this kedge speaks {ABI_VERSION}")
    return lib
