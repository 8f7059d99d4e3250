"""Computing while compiling what does not depend on inputs."""

from __future__ import annotations

from dataclasses import dataclass

from kedge.compiler.graph.bind import frozen
from kedge.compiler.graph.cost import nbytes
from kedge.compiler.graph.dims import attribute_symbols
from kedge.compiler.graph.interp import Array, apply
from kedge.compiler.graph.ir import Call, Constant, Module, Param, Value
from kedge.compiler.graph.passes.base import Context, rewrite, value_key
from kedge.compiler.ops.movement import permutation

#: What lays weights out for kernels.
_LAYING_OUT = frozenset({"pad", "winograd_weights"})


@dataclass(frozen=True, slots=True)
class FoldConstants:
    """Evaluate calls on constants and bound parameters with the operators' references.

    conv(x, transpose(@w)) -> conv(x, @w.folded)

    A result of parameters is a new parameter, named after the largest of them. Results of more than `growth` bytes
    beyond their operands (a broadcast zero, say) are left to run time; weights that are padded or transformed may
    become `layout` times as large, as they are laid out for a kernel then.
    """

    growth: int = 1 << 20
    layout: int = 4
    name: str = "fold-constants"

    def __call__(self, module: Module) -> Module:
        """The module with such calls evaluated."""
        return rewrite(module, self._fold)

    def _fold(self, context: Context, old: Value, new: Value) -> Value | None:
        if not isinstance(new, Call) or len(new.types) != 1:
            return None
        known = [array for operand in new.inputs if (array := context.known(operand)) is not None]
        if len(known) < len(new.inputs) or not new.type.is_static:
            return None
        if any(True for value in new.attrs.values() for _ in attribute_symbols(value)):
            return None
        size = nbytes(new.type)
        assert isinstance(size, int)  # of a static type
        times = self.layout if new.op in _LAYING_OUT else 1
        if size > times * sum(array.nbytes for array in known) + self.growth:
            return None
        if new.op == "transpose":
            # A view: laying out a weight takes several, and its elements are moved once, when all of them are known.
            result = known[0].transpose(permutation(new.attrs, known[0].ndim))
        else:
            (result,) = apply(new.op, known, new.attrs, {})
        return self._value(context, new, result)

    def _value(self, context: Context, call: Call, result: Array) -> Value:
        params = [operand for operand in call.inputs if isinstance(operand, Param)]
        if not params:
            return Constant(frozen(result))
        largest = max(params, key=lambda param: _size(context, param))
        # Functions that share a parameter share what is folded of it.
        key = (
            call.op,
            tuple(value_key(operand) for operand in call.inputs),
            tuple(sorted(map(repr, call.attrs.items()))),
        )
        return context.new_param(result, largest.name, key=key)


def _size(context: Context, param: Param) -> int:
    data = context.known(param)
    return 0 if data is None else data.nbytes
