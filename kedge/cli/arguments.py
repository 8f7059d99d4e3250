"""Reading what people type: shapes, times, files, arrays."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import kedge
from kedge.rpc.artifact import Function, Manifest
from kedge.rpc.errors import ArtifactError, InputError, KedgeError, UsageError
from kedge.rpc.logs import FORMATS
from kedge.rpc.sizes import parse_size

if TYPE_CHECKING:
    import numpy as np

Shape = tuple[int | str, ...]
Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"


#: Artifacts, the wire and the runtime count in 64 bits.
_LARGEST_DIM = 2**63 - 1
_ZIP = b"PK\x03\x04"


class ModelFileError(KedgeError):
    """A model's file that is missing, or holds no whole model."""

    exit_status = 3


class OutputError(KedgeError):
    """A file for results that cannot be written."""

    exit_status = 3


def parse_shapes(texts: list[str] | None) -> dict[str, Shape]:
    """`["x=1,3,224,224"]` as `{"x": (1, 3, 224, 224)}`; a name as a dim stays a name (a free dim)."""
    shapes: dict[str, Shape] = {}
    for text in texts or ():
        name, equals, dims = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise _no_shape(text)
        if name in shapes:
            raise UsageError(f"--shape is given twice for {name!r}", hint="one shape per input")
        shapes[name] = tuple(_dim(part.strip(), text) for part in dims.split(",")) if dims else ()
    return shapes


def _dim(part: str, text: str) -> int | str:
    if part.isidentifier():
        return part
    if not (part.isascii() and part.isdecimal()):
        raise _no_shape(text)
    if len(part) > len(str(_LARGEST_DIM)) or int(part) > _LARGEST_DIM:
        raise UsageError(f"--shape {text[:120]!r}: a dim is at most {_LARGEST_DIM}", hint="are the commas in place?")
    return int(part)


def _no_shape(text: str) -> UsageError:
    return UsageError(f"--shape {text!r} is not NAME=D0,D1,…", hint="for example --shape x=1,3,224,224 or x=N,784")


_UNIT_S = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400}


def check_log_format(text: str) -> str:
    """The value of `--log-format`; raises UsageError where it is none."""
    if text not in FORMATS:
        raise UsageError(f"--log-format {text!r}", hint=f"one of {', '.join(FORMATS)}")
    return text


def state_dir() -> Path:
    """Where trackers and agents keep what outlives them, unless told otherwise (XDG base directories)."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "kedge"


def parse_duration(text: str) -> float:
    """`90s`, `30min`, `2h` or `1.5d` in seconds; raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", text.strip())
    if match is None or not float(match[1]):
        raise UsageError(f"{text!r} is no duration", hint="a number and a unit: 90s, 30min, 2h, 1d")
    return float(match[1]) * _UNIT_S[match[2]]


def parse_moment(text: str, now: datetime) -> float:
    """`14:00`, the next time that it is, or `2026-11-27 14:00`, in this machine's time zone: Unix seconds.

    Raises UsageError.
    """
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}", text.strip()):
            hour, minute = map(int, text.split(":"))
            today = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            return (today if today >= now else today + timedelta(days=1)).timestamp()
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        raise UsageError(f"{text!r} is no moment", hint="14:00, or with a date: '2026-11-27 14:00'") from None


def parse_bytes(text: str) -> int:
    """`50GiB`, `500 MB` or `1.5T` in bytes; raises UsageError."""
    size = parse_size(text)
    if not size:
        raise UsageError(f"{text!r} is no number of bytes", hint="a number and a unit: 50GiB, 500MB")
    return size


def is_artifact(path: Path) -> bool:
    """Whether a file holds an artifact, whatever it is called; what is no file is judged by its name."""
    try:
        with path.open("rb") as file:
            zipped = file.read(len(_ZIP)) == _ZIP and path.suffix.lower() != ".kmod"
            return zipped or path.suffix.lower() == ".kdg"
    except OSError:
        return path.suffix.lower() != ".onnx"


def load_artifact(path: Path) -> kedge.Artifact:
    """The artifact at `path`; raises ArtifactError, also with the way from a model to an artifact."""
    if path.suffix.lower() == ".onnx" and not is_artifact(path):
        out = path.with_suffix(".kdg").name
        raise ArtifactError(
            f"{path} is a model, not an artifact", hint=f"compile it first: kedge compile {path} -o {out}"
        )
    artifact = kedge.Artifact.load(path)
    _check_dtypes(path, artifact.manifest)
    return artifact


def _check_dtypes(path: Path, manifest: Manifest) -> None:
    from kedge.rpc.types import ITEM_BYTES

    for function in manifest.functions:
        for port in (*function.inputs, *function.outputs):
            if port.dtype not in ITEM_BYTES:
                raise ArtifactError(
                    f"{path}: {function.name!r} has {port}, and there is no dtype {port.dtype!r}",
                    hint="was it made by a newer kedge? Update this one, or compile the model again",
                )


def function_of(artifact: kedge.Artifact, name: str) -> Function:
    """The function that `--function` names; raises UsageError."""
    try:
        return artifact.manifest.function(name)
    except ArtifactError as error:
        raise UsageError(error.message, hint=error.hint) from error


@contextmanager
def reading(model: Path) -> Iterator[None]:
    """What goes wrong inside because the model's file is missing or corrupt is a ModelFileError.

    Raises UsageError at once for a saved module, which only `kedge compile` and Python read.
    """
    from kedge.compiler.errors import FrontendError

    if model.suffix.lower() == ".kmod":
        raise UsageError(
            f"{model} is a saved module, not an ONNX model", hint="kedge.load reads it: .show(), .summary()"
        )
    try:
        yield
    except OSError as error:
        if error.filename is None or Path(os.fsdecode(error.filename)) != model:
            raise
        raise ModelFileError(f"cannot read {model}: {error.strerror}") from error
    except FrontendError as error:
        if _is_whole(model):
            raise
        raise ModelFileError(error.message, hint=error.hint) from error


def _is_whole(model: Path) -> bool:
    from kedge.compiler.errors import FrontendError
    from kedge.compiler.frontend.onnx import read_model

    try:
        read_model(model)
    except (FrontendError, OSError):
        return False
    return True


def check_output(path: Path, source: Path) -> None:
    """Raise before any work is done where the artifact of `source` could not be written to `path`."""
    try:
        if path.is_dir():
            raise ArtifactError(f"cannot write {path}: it is a folder, no regular file", hint="name a .kdg file in it")
        if not path.absolute().parent.is_dir():
            raise ArtifactError(
                f"cannot write {path}: there is no folder {path.parent}", hint=f"mkdir -p {path.parent}"
            )
        if path.exists() and source.exists() and path.samefile(source):
            raise ArtifactError(f"{path} is the model itself", hint="name another file with -o OUT.kdg")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}", hint="name another file with -o") from error


def check_outputs(path: Path | None) -> None:
    """Raise OutputError before any work is done where `save_outputs` could not write to `path`."""
    if path is None:
        return
    try:
        if path.exists() and not path.is_file():
            if not os.access(path, os.W_OK):
                raise OutputError(f"cannot write {path}: Permission denied", hint="choose another place")
            return
        scratch = _scratch(path)
        scratch.open("wb").close()
        scratch.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another place") from error


def load_inputs(path: Path) -> Arrays:
    """The arrays of an `.npz` file by name; raises InputError when it is not one."""
    import numpy as np

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


def inputs_of(function: Function, path: Path | None, shapes: list[str] | None, seed: int) -> Arrays:
    """What a function is called with: the arrays of `path`, or random data of `shapes`; raises UsageError for both."""
    if path and shapes:
        raise UsageError(
            "--shape says nothing beside --inputs", hint="the arrays of the file have their shapes; drop one"
        )
    from kedge.inputs import random_inputs

    return load_inputs(path) if path else random_inputs(function, parse_shapes(shapes), seed)


def save_outputs(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write arrays to an `.npz` file, whole or not at all; a pipe or device is written to as it is."""
    from kedge.compiler.npz import write_npz

    special = path.exists() and not path.is_file()
    scratch = path if special else _scratch(path)
    try:
        try:
            with scratch.open("wb") as file:
                write_npz(file, arrays)
            if not special:
                scratch.replace(path)
        finally:
            if not special:
                scratch.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another place") from error


def _scratch(path: Path) -> Path:
    return path.with_name(f".kedge-{os.getpid()}.part")
