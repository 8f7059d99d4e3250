"""Arrays for a function's inputs, from whatever the user has: numpy, torch, anything that speaks DLPack.

Used in this process, by the local device and by the fleet alike, so that a mistake reads the same everywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, cast

import ml_dtypes  # noqa: F401  # for np.dtype("bfloat16")
import numpy as np

from kedge.rpc.artifact import Function, Port
from kedge.rpc.client.tensors import DeviceTensor
from kedge.rpc.errors import InputError
from kedge.rpc.types import ITEM_BYTES

Array = np.ndarray[Any, Any]


def as_array(value: Any, name: str) -> Array:
    """`value` as a numpy array, without a copy where it speaks DLPack or numpy's array interface.

    Raises:
        InputError: it is on another device, or no array at all.
    """
    if isinstance(value, np.ndarray):
        return value
    try:
        if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"input {name!r}: this {type(value).__name__} cannot be read as an array ({error})",
            hint="move it to the CPU and detach it first, or pass a numpy array; torch's bfloat16 becomes one by "
            "t.view(torch.uint16).numpy().view('bfloat16')",
        ) from error
    if array.dtype == object:
        raise InputError(f"input {name!r} is no array but a {type(value).__name__}", hint="pass a numpy array")
    return array


def arrange(function: Function, inputs: Mapping[str, Any]) -> list[Array]:
    """The inputs in the function's order: checked, C-contiguous, aligned. What fits already is not copied.

    Raises:
        InputError: naming the input that is unknown, missing, or of the wrong dtype or shape, and what was expected.
    """
    arrays = arrange_given(function, inputs)
    for port, array in zip(function.inputs, arrays, strict=True):
        if isinstance(array, DeviceTensor):
            raise InputError(
                f"input {port.name!r} is on another device", hint="fetch it with .numpy(), or call the function there"
            )
    return cast("list[Array]", arrays)


def arrange_given(function: Function, inputs: Mapping[str, Any]) -> list[Array | DeviceTensor]:
    """The same, where tensors that are on the device already may be among the inputs."""
    _check_names(function, inputs)
    arrays = [_taken(port, inputs[port.name]) for port in function.inputs]
    sizes: dict[str, tuple[int, str]] = {}
    for port, array in zip(function.inputs, arrays, strict=True):
        if array.dtype != _dtype(port):
            raise InputError(
                f"input {port.name!r} has dtype {array.dtype}, expected {port}",
                hint=f"convert it with .astype({port.dtype!r}), or compile the model for {array.dtype}",
            )
        _check_shape(port, array, sizes, {symbol.name for symbol in function.symbols})
    return arrays


def dense(value: Any) -> Array:
    """Any array as one that can travel: C-contiguous, of a dtype that the wire has; raises InputError."""
    array = np.require(as_array(value, "of the tensor"), None, ["C", "A"])
    if array.dtype.name not in ITEM_BYTES or not array.dtype.isnative:
        raise InputError(f"a tensor cannot have dtype {array.dtype}", hint=f"one of {', '.join(ITEM_BYTES)}")
    return array


def shaped(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Inputs as far as their shapes go, for whoever asks for no more."""
    return {
        name: np.broadcast_to(np.zeros((), value.dtype), value.shape) if isinstance(value, DeviceTensor) else value
        for name, value in inputs.items()
    }


def check_output(port: Port, array: Any) -> Array:
    """An array that the user offers for an output; its shape is checked where it is known.

    Raises:
        InputError: it is no writable C-contiguous array of the port's dtype.
    """
    if not isinstance(array, np.ndarray) or array.dtype != _dtype(port):
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"out {port.name!r} is {found}, expected a numpy array of {port}")
    if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable):
        raise InputError(f"out {port.name!r} must be C-contiguous, aligned and writable")
    return array


def _check_names(function: Function, inputs: Mapping[str, Any]) -> None:
    names = [port.name for port in function.inputs]
    if isinstance(inputs, Mapping) and len(inputs) == len(names) and all(name in inputs for name in names):
        return
    known = f"its inputs: {', '.join(str(port) for port in function.inputs) or 'none'}"
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"function {function.name!r} takes its inputs by name, not as {type(inputs).__name__}",
            hint=f"pass a dict of name -> array; {known}",
        )
    for name in inputs:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"function {function.name!r} has no input {name!r}", hint=f"{guess}{known}")
    missing = [name for name in names if name not in inputs]
    if missing:
        lacking = ", ".join(repr(name) for name in missing)
        raise InputError(f"function {function.name!r} lacks input {lacking}", hint=known)


def _check_shape(port: Port, array: Array | DeviceTensor, sizes: dict[str, tuple[int, str]], symbols: set[str]) -> None:
    """Compare the dims that are numbers or symbols; the runtime checks those that are computed."""
    problem = "" if array.ndim == len(port.shape) else f"{array.ndim} dims"
    if not problem:
        for index, (dim, size) in enumerate(zip(port.shape, array.shape, strict=True)):
            if isinstance(dim, int) and dim != size:
                problem = f"{size} in dim {index}"
            elif isinstance(dim, str) and dim in symbols:
                bound, where = sizes.setdefault(dim, (size, port.name))
                if bound != size:
                    problem = f"{dim} = {size}, but {where!r} has {dim} = {bound}"
    if problem:
        raise InputError(f"input {port.name!r} has shape {list(array.shape)}, expected {port}: it has {problem}")


def _taken(port: Port, value: Any) -> Array | DeviceTensor:
    return value if isinstance(value, DeviceTensor) else np.require(_given(port, value), None, ["C", "A"])


def _given(port: Port, value: Any) -> Array:
    """The array given for an input. numpy's files have no bfloat16 and give it back as two bytes without a meaning."""
    array = as_array(value, port.name)
    return array.view(_dtype(port)) if port.dtype == "bfloat16" and array.dtype == np.dtype("V2") else array


def _dtype(port: Port) -> np.dtype[Any]:
    try:
        return np.dtype(port.dtype)
    except TypeError:
        raise InputError(f"numpy has no {port.dtype} for {port}", hint="cast inside of the model") from None
