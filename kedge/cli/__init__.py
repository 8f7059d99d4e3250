"""The command line: thin commands over the Python API."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

EXIT_INTERRUPTED = 130
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h


def main() -> int:
    """Run the `kedge` command and give its exit status; expected errors are one message on stderr, no traceback."""
    _open_streams()
    # What fails in a TLS handshake is said in our own words, and not in gRPC's beside them.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        status = _run()
        sys.stdout.flush()
    except KeyboardInterrupt:  # also while the imports below run
        return _interrupted()
    except BrokenPipeError:
        return _reader_left()
    except StdoutError as error:
        return _unwritten(error)
    return status


class StdoutError(Exception):
    """Standard output takes no more, and not because its reader left."""


class _Stdout:
    """Standard output whose failures can be told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._refusals():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._refusals():
            self._stream.flush()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StdoutError(error.strerror) from error


def _open_streams() -> None:
    """Take the place of streams that were closed, so that no file gets their number; writing results still fails."""
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, closefd=False))
    if sys.__stdout__ in (None, sys.stdout):  # a caller's own is left alone
        sys.stdout = cast(TextIO, _Stdout(sys.stdout))


def _run() -> int:
    from kedge.cli.app import tree
    from kedge.rpc.errors import KedgeError

    try:
        status = tree(sys.argv[1:])(standalone_mode=False)
    except KedgeError as error:
        return _fail(error)
    except MemoryError as error:
        hint = "choose smaller shapes, or run it on a device with more memory"
        return _fail(KedgeError(f"not enough memory: {error}" if str(error) else "not enough memory", hint=hint))
    except (StdoutError, BrokenPipeError):
        raise
    except OSError as error:
        if error.filename is None or error.strerror is None:
            return _bug()
        return _fail(KedgeError(f"{os.fsdecode(error.filename)}: {error.strerror}"))
    except SystemExit as leaving:
        # How typer and rich take it that the reader of our output left.
        if isinstance(leaving.__context__, BrokenPipeError):
            return _reader_left()
        raise
    except Exception as error:  # noqa: BLE001 - the last resort: nothing is swallowed
        shown = getattr(error, "show", None)  # a usage error of the command line itself
        if shown is None:
            return _bug()
        shown()
        return int(getattr(error, "exit_code", 2))
    if status == EXIT_INTERRUPTED:  # how typer hands Ctrl-C over
        return _interrupted()
    return status if isinstance(status, int) else 0


def _interrupted() -> int:
    with contextlib.suppress(OSError):  # a terminal that is closed
        sys.stderr.write("interrupted\n")
    # Python notes an interrupt within the `exec` of a text, of which dataclasses make much use, and `python -m` then
    # ends by SIGINT, whatever status it is given. Running another text takes the note away.
    exec("")
    return EXIT_INTERRUPTED


def _unwritten(error: StdoutError) -> int:
    from kedge.rpc.errors import KedgeError

    _abandon_stdout()
    return _fail(KedgeError(f"cannot write to standard output: {error}"))


def _reader_left() -> int:
    """As `kedge … | head` does; there is nobody to tell."""
    _abandon_stdout()
    return 0


def _abandon_stdout() -> None:
    """What is still to be written goes nowhere, rather than into a complaint of the interpreter at its end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _bug() -> int:
    """What nobody foresaw: all that helps to find it, and what to do with it."""
    import traceback

    from kedge.rpc.errors import KedgeError

    traceback.print_exc()
    _fail(KedgeError("this is a bug in kedge", hint="report the lines above, with the output of kedge doctor --json"))
    return EXIT_BUG


def _fail(error: Exception) -> int:
    from rich.text import Text

    from kedge.cli.output import stderr

    message, hint = getattr(error, "message", str(error)), getattr(error, "hint", None)
    console = stderr()
    with contextlib.suppress(OSError):  # the status still tells
        console.print(Text("error:", style="bold red"), message, soft_wrap=True)
        if hint:
            console.print(Text("hint:", style="bold cyan"), hint, soft_wrap=True)
    return int(getattr(error, "exit_status", 1))
