"""A service that ends with whoever started it, however that one ends.

`python -m kedge.demo.tied MODULE ARGUMENT…` runs a module; its standard input is a pipe that the starter holds open.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading

GRACE_S = 10.0


def _end_with_the_starter() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    # Whoever does not end in order ends all the same: the main thread's end takes this one with it.
    threading.Event().wait(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the module that the arguments name, as `python -m` does."""
    threading.Thread(target=_end_with_the_starter, name="kedge-tied", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
