"""Operators of ONNX models that a function of tensors defines.

The operators are written with te, so what keeps them (`kedge.compiler.ops.custom`) is imported when one is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from kedge.compiler.te.tensor import Tensor

if TYPE_CHECKING:
    from kedge.compiler.ops.custom import OnnxOperator, TensorFunction


_Function = TypeVar("_Function", bound="Callable[..., Tensor | tuple[Tensor, ...]]")


def register_onnx(domain: str, op_type: str, function: TensorFunction) -> OnnxOperator:
    """Make `function` the meaning of an operator of a custom ONNX domain: models that use it import from then on.

    Args:
        domain: of the operator in the model's nodes; not ONNX's own.
        op_type: its name there.
        function: called as `function(tensors, **attributes)` with one te tensor per input of the node (dims may be
            symbolic) and the node's attributes (int, float, str, or a tuple of them); gives a tensor, or a tuple of
            them for several results. Shapes, dtypes, the reference, the kernels and what they fuse with all follow from
            it. It is called more than once, and must give the same each time.

    Returns:
        The registration: `unregister()` ends it, and so does leaving it as a context manager.

    Raises:
        CompileError: the domain is ONNX's own, or the operator is registered already.
        TypeError: `function` cannot be called like that.
    """
    from kedge.compiler.ops import custom

    return custom.register(domain, op_type, function)


def onnx_operator(domain: str, op_type: str) -> Callable[[_Function], _Function]:
    """`register_onnx` as a decorator."""

    def declare(function: _Function) -> _Function:
        register_onnx(domain, op_type, function)
        return function

    return declare


def unregister_onnx(domain: str, op_type: str) -> None:
    """Forget an operator; raises `CompileError` where it is not registered."""
    from kedge.compiler.ops import custom

    custom.unregister(domain, op_type)
