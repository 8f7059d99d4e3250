"""Reading what people type: shapes, arrays, targets."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import kedge
from kedge.rpc.errors import ArtifactError, InputError

Shape = tuple[int | str, ...]
Arrays = dict[str, np.ndarray[Any, Any]]


def parse_shapes(texts: list[str] | None) -> dict[str, Shape]:
    """`["x=1,3,224,224"]` as `{"x": (1, 3, 224, 224)}`; a name as a dim stays a name (a free dim)."""
    shapes: dict[str, Shape] = {}
    for text in texts or ():
        name, equals, dims = text.partition("=")
        parts = [part.strip() for part in dims.split(",")] if dims else []
        if not equals or not name or not all(part.isidentifier() or part.isdecimal() for part in parts):
            raise InputError(
                f"--shape {text!r} is not NAME=D0,D1,…", hint="for example --shape x=1,3,224,224 or x=N,784"
            )
        shapes[name.strip()] = tuple(int(part) if part.isdecimal() else part for part in parts)
    return shapes


def load_artifact(path: Path) -> kedge.Artifact:
    """The artifact at `path`; raises ArtifactError, also with the way from a model to an artifact."""
    if path.suffix == ".onnx":
        out = path.with_suffix(".kdg").name
        raise ArtifactError(
            f"{path} is a model, not an artifact", hint=f"compile it first: kedge compile {path} -o {out}"
        )
    return kedge.Artifact.load(path)


def check_output(path: Path, source: Path) -> None:
    """Raise before any work is done where the artifact of `source` could not be written to `path`."""
    if path.is_dir():
        raise ArtifactError(f"cannot write {path}: it is a folder, no regular file", hint="name a .kdg file in it")
    if not path.absolute().parent.is_dir():
        raise ArtifactError(f"cannot write {path}: there is no folder {path.parent}", hint=f"mkdir -p {path.parent}")
    if path.exists() and source.exists() and path.samefile(source):
        raise ArtifactError(f"{path} is the model itself", hint="name another file with -o OUT.kdg")


def load_inputs(path: Path) -> Arrays:
    """The arrays of an `.npz` file by name; raises InputError when it is not one."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                return {name: archive[name] for name in archive.files}
        raise InputError(f"{path} holds one array without a name", hint="save with numpy.savez(path, NAME=array)")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", hint="numpy.savez(path, NAME=array) makes one") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is not an .npz file ({error})", hint="numpy.savez(path, NAME=array) makes one"
        ) from error


def save_outputs(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write arrays to an `.npz` file, whole or not at all; a pipe or device is written to as it is."""
    special = path.exists() and not path.is_file()
    scratch = path if special else path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with scratch.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            if not special:
                scratch.replace(path)
        finally:
            if not special:
                scratch.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", hint="choose another place") from error
