"""`--external FILE.py`: external code for commands, given as it is in Python."""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from pathlib import Path

import kedge
from kedge.rpc.errors import KedgeError, UsageError


def load_externals(files: Iterable[Path] | None) -> list[kedge.External]:
    """Every `kedge.External` that the files hold under a name, in order of definition.

    The files are run as scripts are, with `__file__`; what they register with `te.register_onnx` is known, too.

    Raises:
        UsageError: a file cannot be read, fails, or makes no external.
    """
    found: dict[int, kedge.External] = {}
    for file in files or ():
        try:
            names = runpy.run_path(str(file))
        except KedgeError as error:
            raise UsageError(f"{file}: {error.message}", hint=error.hint) from error
        except Exception as error:
            raise UsageError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
        own = {id(value): value for value in names.values() if isinstance(value, kedge.External)}
        if not own:
            raise UsageError(f"{file} makes no kedge.External", hint="give one a name: dense = kedge.External(…)")
        found |= own
    return list(found.values())
