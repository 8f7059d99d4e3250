"""Modules as files: the printed module and the arrays it leaves out, in one numpy archive."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.errors import FrontendError
from kedge.compiler.graph.ir import Constant, Function, Fused, Module
from kedge.compiler.graph.parser import parse
from kedge.compiler.graph.printer import digest, print_module
from kedge.compiler.npz import write_npz

SUFFIX = ".kmod"
_TEXT = "text"
#: Before the name of a parameter, so that it collides with nothing.
_PARAM = "param:"
_CONSTANT = "constant:"

Array: TypeAlias = np.ndarray[Any, Any]


def save_module(module: Module, path: str | os.PathLike[str]) -> None:
    """Write a module; the file appears whole or not at all.

    Raises:
        FrontendError: the file cannot be written.
    """
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    arrays = {_CONSTANT + digest(array): array for array in _constants(module)}
    arrays |= {_PARAM + name: array for name, array in module.params.items()}
    try:
        try:
            with scratch.open("wb") as file:
                write_npz(file, {_TEXT: np.array(print_module(module)), **arrays})
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise FrontendError(f"cannot write {target}: {error.strerror}", hint="choose another place") from error


def load_module(path: str | os.PathLike[str]) -> Module:
    """Read what `save_module` wrote.

    Raises:
        FrontendError: the file is missing, damaged, or no module.
    """
    source = Path(path)
    try:
        # np.load would leave a file of its own open where the archive is damaged.
        with source.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            text = str(archive[_TEXT])
            arrays = {name.partition(":")[2]: _read(archive[name]) for name in archive.files if name != _TEXT}
    except FileNotFoundError as error:
        raise FrontendError(f"{source}: no such file", hint="Module.save(path) makes one") from error
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FrontendError(f"{source} is not a saved module ({error})", hint="save it again") from error
    return parse(text, arrays)


def _read(array: Array) -> Array:
    """An array as it was saved: numpy's files give bfloat16 back as two bytes without a meaning."""
    return array.view("bfloat16") if array.dtype == np.dtype("V2") else array


def _constants(module: Module) -> Iterator[Array]:
    """The arrays of all literals, those inside of fused groups too."""
    todo: list[Function] = list(module.functions.values())
    while todo:
        for value in todo.pop().values():
            if isinstance(value, Constant):
                yield value.data
            elif isinstance(value, Fused):
                todo.append(value.body)
