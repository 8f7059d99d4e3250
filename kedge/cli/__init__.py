"""The command line: thin commands over the Python API."""

from __future__ import annotations

import sys

EXIT_INTERRUPTED = 130
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h


def main() -> int:
    """Run the `kedge` command and give its exit status; expected errors are one message on stderr, no traceback."""
    try:
        return _run()
    except KeyboardInterrupt:  # also while the imports below run
        return _interrupted()


def _run() -> int:
    from kedge.cli.app import app
    from kedge.rpc.errors import KedgeError

    try:
        status = app(standalone_mode=False)
    except KedgeError as error:
        return _fail(error)
    except MemoryError as error:
        hint = "choose smaller shapes, or run it on a device with more memory"
        return _fail(KedgeError(f"not enough memory: {error}" if str(error) else "not enough memory", hint=hint))
    except BrokenPipeError:
        # The reader of our output left, as `kedge … | head` does; there is nobody to tell.
        sys.stderr.close()
        return 0
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
    sys.stderr.write("interrupted\n")
    return EXIT_INTERRUPTED


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
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), hint), soft_wrap=True)
    return int(getattr(error, "exit_status", 1))
