"""Seeded random inputs for a compiled function, for timing and for checks without data at hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.rpc.artifact import Function, Port
from kedge.rpc.errors import InputError

Array = np.ndarray[Any, Any]


def random_inputs(
    function: Function, shapes: Mapping[str, Sequence[int | str]] | None = None, seed: int = 0
) -> dict[str, Array]:
    """One array per input: floats from a standard normal, integers in [0, 2), booleans even.

    A free dim takes its lower bound, at least 1, unless `shapes` (input name -> full shape) says otherwise.

    Raises:
        InputError: `shapes` names an unknown input, has another rank, or contradicts a known dim.
    """
    unknown = sorted(set(shapes or ()) - {port.name for port in function.inputs})
    if unknown:
        known = ", ".join(port.name for port in function.inputs)
        raise InputError(f"function {function.name!r} has no input {', '.join(unknown)}", hint=f"its inputs: {known}")
    sizes = {symbol.name: max(symbol.lower, 1) for symbol in function.symbols}
    for port in function.inputs:
        for dim, size in zip(port.shape, _given(port, shapes), strict=True):
            if isinstance(dim, str) and dim in sizes and size is not None:
                sizes[dim] = size
    rng = np.random.default_rng(seed)
    return {port.name: _random(rng, port.dtype, _shape(port, sizes)) for port in function.inputs}


def _given(port: Port, shapes: Mapping[str, Sequence[int | str]] | None) -> Sequence[int | None]:
    """The sizes that the user fixed for an input; None where nothing was said."""
    wanted = (shapes or {}).get(port.name)
    if wanted is None:
        return [None] * len(port.shape)
    fits = len(wanted) == len(port.shape) and all(
        isinstance(have, str) or isinstance(want, str) or have == want
        for want, have in zip(wanted, port.shape, strict=True)
    )
    if not fits:
        raise InputError(f"shape {tuple(wanted)} does not fit input {port}", hint="only free dims can be chosen")
    return [want if isinstance(want, int) else None for want in wanted]


def _shape(port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = []
    for dim in port.shape:
        if isinstance(dim, str) and dim not in sizes:
            raise InputError(f"input {port} has a derived dim {dim!r}", hint="give its data with --inputs FILE.npz")
        shape.append(sizes[dim] if isinstance(dim, str) else dim)
    return tuple(shape)


def _random(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    kind = np.dtype(dtype)
    if math.prod(shape) * kind.itemsize > sys.maxsize:
        raise MemoryError(f"an input of shape {shape}")  # which numpy would call a bad value
    if dtype in FLOATS:
        return rng.standard_normal(shape).astype(kind)
    return rng.integers(0, 2, shape).astype(kind)
