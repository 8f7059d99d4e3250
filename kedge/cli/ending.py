"""Commands that undo what they began when they are asked to end."""

from __future__ import annotations

import signal


def end_in_order() -> None:
    """Let being asked to end, by SIGTERM or a terminal that closes, take Ctrl-C's road."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
