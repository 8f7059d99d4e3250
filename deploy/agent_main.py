"""`__main__` of the zipapp on a board: finds grpcio and protobuf beside it, keeps the log small, runs the agent."""

from __future__ import annotations

import os
import shutil
import sys
import threading

HOME = os.path.dirname(os.path.abspath(sys.argv[0]))
LOG_LIMIT_BYTES = 4 * 1024 * 1024
CHECK_INTERVAL_S = 30


def keep_log_small(stopped: threading.Event) -> None:
    """Move the log aside when it outgrows `LOG_LIMIT_BYTES`; every writer appends, so it can be emptied in place."""
    log = os.path.join(HOME, "agent.log")
    while not stopped.wait(CHECK_INTERVAL_S):
        if os.path.exists(log) and os.path.getsize(log) > LOG_LIMIT_BYTES:
            shutil.copyfile(log, log + ".1")
            os.truncate(log, 0)


def main() -> int:
    """Run the agent with this process's arguments."""
    # Compiled extensions cannot be loaded from inside a zip file.
    sys.path.insert(1, os.path.join(HOME, "site"))
    from kedge.device_agent.__main__ import main as agent

    stopped = threading.Event()
    if os.environ.get("KEDGE_AGENT_HOME") == HOME:
        threading.Thread(target=keep_log_small, args=(stopped,), daemon=True).start()
    try:
        return int(agent() or 0)
    finally:
        stopped.set()


if __name__ == "__main__":
    sys.exit(main())
