"""Files that only their owner may read, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from kedge.rpc.errors import KedgeError

_TEMPORARY = ".new"


class SecretFileError(KedgeError):
    """A file with a secret cannot be read or written, or others may read it."""


def make_private_folder(folder: Path) -> None:
    """Make a folder, mode 0700, that nobody else may look into; raises SecretFileError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name == "posix" and folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise SecretFileError(
            f"cannot use {folder}: {error.strerror}", hint="check its owner and its rights"
        ) from error


def write_private(path: Path, data: bytes) -> None:
    """Write a file, mode 0600 from its first moment, durable when this returns; raises SecretFileError."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        scratch.unlink(missing_ok=True)
        fd = os.open(str(scratch), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SecretFileError(f"cannot write {path}: {error.strerror}", hint="check the folder's rights") from error


def read_private(path: Path) -> bytes:
    """A file that only its owner may read; raises SecretFileError, FileNotFoundError where there is none."""
    try:
        with path.open("rb") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                raise SecretFileError(f"others may read {path}, which holds a secret", hint=f"chmod 600 {path}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        raise SecretFileError(f"cannot read {path}: {error.strerror}", hint="check its owner and its rights") from error
