"""The way from an entry to a C function from outside: a function that has a kernel's form, and hands over tensors.

    i32 kedge_external_N(ptr frame, ptr arg0, …, i64 symbol0, …, ptr workspace)

It builds the `kedge_external_call` of kedge_external.h on its stack, with the shapes of this call, and tells the
runtime by which name the function failed. Struct layouts are those of kedge_external.h and DLPack.
"""

from __future__ import annotations

from collections.abc import Sequence

from kedge.compiler.codegen.affine import Linear
from kedge.compiler.codegen.builder import FunctionBuilder, ModuleBuilder, Value
from kedge.compiler.codegen.constants import Constants, size_of
from kedge.compiler.codegen.expr import ExprEmitter
from kedge.compiler.codegen.parallel import API, API_FIELDS, FRAME, FRAME_FIELDS
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.lower.program import ExternalKernel
from kedge.compiler.tir.expr import Dim, Var, as_expr
from kedge.rpc import abi

_TENSOR = "{ ptr, { i32, i32 }, i32, { i8, i8, i16 }, ptr, ptr, i64 }"
_TENSOR_FIELDS = {"data": 0, "device": 1, "ndim": 2, "dtype": 3, "shape": 4, "strides": 5, "byte_offset": 6}
_ATTRIBUTE = "{ ptr, ptr, ptr, i64 }"
_CALL = "{ i64, ptr, ptr, ptr, ptr, i64, ptr, ptr, i32, i32, i32, i32 }"
_CALL_FIELDS = (
    "struct_size", "name", "inputs", "outputs", "workspace", "workspace_size", "attributes", "frame",
    "n_inputs", "n_outputs", "n_attributes", "reserved",
)  # fmt: skip
#: So many operators stand beside a function's name in messages.
_SHOWN_OPERATORS = 8


def emit_external(module: ModuleBuilder, constants: Constants, kernel: ExternalKernel, symbol: str) -> None:
    """Add the function `symbol` that calls the C function of `kernel`, and declare that."""
    module.declare(kernel.code.function, "hidden i32 @(ptr)")
    _ExternalEmitter(module, constants, kernel).emit(symbol)


def title(kernel: ExternalKernel) -> str:
    """The function with the operators that it stands for, as errors name it: `my_dense (fc, act)`."""
    nodes = kernel.call.origin
    shown = ", ".join(nodes[:_SHOWN_OPERATORS]) + (" …" if len(nodes) > _SHOWN_OPERATORS else "")
    return f"{kernel.code.function} ({shown})" if nodes else kernel.code.function


class _ExternalEmitter(ExprEmitter):
    def __init__(self, module: ModuleBuilder, constants: Constants, kernel: ExternalKernel) -> None:
        super().__init__(FunctionBuilder(module))
        self.module = module
        self.constants = constants
        self.kernel = kernel

    def emit(self, symbol: str) -> None:
        """The whole function."""
        kernel, call = self.kernel, self.kernel.call
        types = [*(own.type for own in call.body.inputs), *call.types]
        params = ["ptr %frame", *(f"ptr %arg{number}" for number in range(len(types)))]
        for number, var in enumerate(kernel.symbols):
            params.append(f"i64 %arg.s{number}")
            self._bind(var, Value(f"%arg.s{number}", "i64"))
        has_workspace = call.workspace != 0
        if has_workspace:
            params.append("ptr %arg.ws")
        inputs = [(None, None) if at is None else (f"%arg{at}", types[at]) for at in kernel.order]
        outputs = [(f"%arg{len(call.body.inputs) + at}", type_) for at, type_ in enumerate(call.types)]
        name = self.constants.text(title(kernel))
        filled = self._filled(
            {
                "struct_size": f"i64 {size_of(_CALL)}",
                "name": f"ptr {name}",
                "inputs": f"ptr {self._tensors(inputs)}",
                "outputs": f"ptr {self._tensors(outputs)}",
                "workspace": f"ptr {'%arg.ws' if has_workspace else 'null'}",
                "workspace_size": self._dim(call.workspace),
                "attributes": f"ptr {self._attributes()}",
                "frame": "ptr %frame",
                "n_inputs": f"i32 {len(inputs)}",
                "n_outputs": f"i32 {len(outputs)}",
                "n_attributes": f"i32 {len(call.attrs)}",
                "reserved": "i32 0",
            }
        )
        status = self.b.result(f"call i32 @{kernel.code.function}(ptr {filled})", "i32")
        self._return(status, name)
        head = f"define hidden i32 @{symbol}({', '.join(params)}) {self.module.attributes}"
        self.module.add(self.b.finish(head))

    def _return(self, status: Value, name: str) -> None:
        """The function's status; the runtime hears of a failure first, and says what it is to the entry."""
        failed, done = self.b.fresh("failed"), self.b.fresh("done")
        self.b.branch(self.b.compare("icmp ne", status, self.b.const(0, "i32")), failed, done)
        self.b.label(failed)
        api = self._load(FRAME, "%frame", FRAME_FIELDS["api"])
        fail = self._load(API, api, API_FIELDS["fail"])
        result = self.b.result(f"call i32 {fail}(ptr %frame, ptr {name}, i32 signext {status.ref}, ptr null)", "i32")
        self.b.emit(f"ret {result.typed}")
        self.b.label(done)
        self.b.emit("ret i32 0")

    def _bind(self, var: Var, value: Value) -> None:
        index = self.b.convert("trunc", value, self.b.index_type) if self.b.index_type != "i64" else value
        self.env[var] = Linear.atom(index)
        self.known[index] = (var.lower or 0, var.upper)

    # Memory -----------------------------------------------------------------------------------------------------

    def _alloca(self, type_: str) -> str:
        name = f"%{self.b.fresh('stack')}"
        self.b.emit_entry(f"{name} = alloca {type_}")
        return name

    def _slot(self, type_: str, base: str, *path: int) -> str:
        indices = ", ".join(f"i32 {index}" for index in path)
        return self.b.result(f"getelementptr inbounds {type_}, ptr {base}, {indices}", "ptr").ref

    def _load(self, type_: str, base: str, field: int) -> str:
        return self.b.result(f"load ptr, ptr {self._slot(type_, base, 0, field)}", "ptr").ref

    def _dim(self, dim: Dim) -> str:
        """The value of a dim as a typed i64."""
        if isinstance(dim, int):
            return f"i64 {dim}"
        return self._widen(self.materialize(self.index(as_expr(dim)))).typed

    def _filled(self, fields: dict[str, str]) -> str:
        call = self._alloca(_CALL)
        for number, name in enumerate(_CALL_FIELDS):
            self.b.emit(f"store {fields[name]}, ptr {self._slot(_CALL, call, 0, number)}")
        return call

    def _tensors(self, tensors: Sequence[tuple[str | None, TensorType | None]]) -> str:
        """An array of `DLTensor`; those without a type are empty."""
        array_type = f"[{len(tensors)} x {_TENSOR}]"
        array = self._alloca(array_type)
        self.b.emit(f"store {array_type} zeroinitializer, ptr {array}")
        for number, (data, type_) in enumerate(tensors):
            if data is None or type_ is None:
                continue
            code, bits = abi.dtype_code(type_.dtype)
            fields = {
                "data": f"ptr {data}",
                "device": f"{{ i32, i32 }} {{ i32 {abi.DEVICE_CPU}, i32 0 }}",
                "ndim": f"i32 {type_.rank}",
                "dtype": f"{{ i8, i8, i16 }} {{ i8 {code}, i8 {bits}, i16 1 }}",
                "shape": f"ptr {self._shape(type_.shape)}",
            }
            for name, value in fields.items():
                self.b.emit(f"store {value}, ptr {self._slot(array_type, array, 0, number, _TENSOR_FIELDS[name])}")
        return array

    def _shape(self, dims: Sequence[Dim]) -> str:
        array_type = f"[{max(len(dims), 1)} x i64]"
        array = self._alloca(array_type)
        for number, dim in enumerate(dims):
            self.b.emit(f"store {self._dim(dim)}, ptr {self._slot(array_type, array, 0, number)}")
        return array

    def _attributes(self) -> str:
        found = []
        for name, value in self.kernel.call.attrs.items():
            numbers = value if isinstance(value, tuple) else (value,)
            floats = isinstance(numbers[0], float)
            array = self.constants.numbers(numbers)
            ints, doubles = ("null", array) if floats else (array, "null")
            found.append(f"{{ ptr {self.constants.text(name)}, ptr {ints}, ptr {doubles}, i64 {len(numbers)} }}")
        return self.constants.array(_ATTRIBUTE, found)
