"""The command line: thin commands over the Python API."""

from __future__ import annotations

import sys

EXIT_INTERRUPTED = 130


def main() -> int:
    """Run the `kedge` command and give its exit status; errors are one message on stderr, never a traceback."""
    from kedge.cli.app import app
    from kedge.rpc.errors import KedgeError

    try:
        status = app(standalone_mode=False)
    except KedgeError as error:
        return _fail(error)
    except BrokenPipeError:
        # The reader of our output left, as `kedge … | head` does; there is nobody to tell.
        sys.stderr.close()
        return 0
    except Exception as error:
        shown = getattr(error, "show", None)  # a usage error of the command line itself
        if shown is None:
            raise
        shown()
        return int(getattr(error, "exit_code", 2))
    if status == EXIT_INTERRUPTED:  # how typer hands Ctrl-C over
        sys.stderr.write("interrupted\n")
    return status if isinstance(status, int) else 0


def _fail(error: Exception) -> int:
    from rich.text import Text

    from kedge.cli.output import stderr

    message, hint = getattr(error, "message", str(error)), getattr(error, "hint", None)
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), hint), soft_wrap=True)
    return int(getattr(error, "exit_status", 1))
