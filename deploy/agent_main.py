"""`__main__` of the zipapp on a board: finds grpcio and protobuf beside it, keeps the log small, runs the agent."""

from __future__ import annotations

import os
import sys
import threading

HOME = os.path.dirname(os.path.abspath(sys.argv[0]))
LOG_LIMIT_BYTES = 4 * 1024 * 1024
CHECK_INTERVAL_S = 30


def keep_log_small(stopped: threading.Event) -> None:
    """Move the log aside when it outgrows `LOG_LIMIT_BYTES`, and let the standard streams go on in a new one."""
    log = os.path.join(HOME, "agent.log")
    while not stopped.wait(CHECK_INTERVAL_S):
        try:
            if os.path.exists(log):
                if os.path.getsize(log) <= LOG_LIMIT_BYTES:
                    continue
                os.replace(log, log + ".1")
            fresh = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for stream in (1, 2):
                os.dup2(fresh, stream)
            os.close(fresh)
        except OSError:  # a disk that is full, for instance: the next round may find room
            continue


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
