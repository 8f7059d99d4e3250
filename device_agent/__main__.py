"""`python -m kedge.device_agent`: offer this device to a tracker."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import sys
from pathlib import Path
from typing import List, Optional

from kedge.rpc.errors import KedgeError, UsageError
from kedge.rpc.names import check_name, parse_labels

_EXAMPLES = """\
examples:
  python3 -m kedge.device_agent --tracker lab:9190 --runner ./kedge-runner
  python3 -m kedge.device_agent --tracker 10.0.0.5:9190 --runner ./kedge-runner --name rpi4-1 \\
      --label rack=a --label camera=yes --threads 3

The agent dials the tracker; nothing needs to reach this device. It runs one job at a time, each in a
process of its own, and keeps trying when the tracker is away. SIGTERM or Ctrl-C stops it cleanly.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kedge-agent",
        description="Offer this device to a kedge tracker: fetch artifacts, run and time them, report.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tracker", metavar="HOST:PORT", required=True, help="the tracker (port 9190 if left out)")
    parser.add_argument("--runner", metavar="PATH", required=True, type=Path, help="the kedge-runner for this device")
    parser.add_argument(
        "--name", default=platform.node(), help="the device's name (default: the host name, %(default)s)"
    )
    parser.add_argument(
        "--label", metavar="KEY=VALUE", action="append", default=[], help="a label for selectors; may be repeated"
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        help="for the cache, one agent per folder (default: ~/.local/state/kedge/agent/NAME)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, default=0, help="that a job may use (default: 0, all cores allowed)"
    )
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: %(default)s"
    )
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the agent; returns the exit status."""
    options = _parser().parse_args(argv)
    # Whoever started the agent may have ignored it, which is inherited: runners would vanish with their exit status.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Runners are forked and executed at once. Before Python 3.10 that runs gRPC's fork handlers, which revive its
    # poller in the child and can end it before it executes. Read when grpc is imported, so not later than here.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname).1s %(message)s", stream=sys.stderr
    )
    try:
        return _serve(options)
    except KedgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status


def _serve(options: argparse.Namespace) -> int:
    from kedge.rpc.transport import parse_address

    tracker = parse_address(options.tracker)
    name, labels = check_name(options.name), parse_labels(options.label)
    runner = options.runner.absolute()
    if not runner.is_file():
        raise KedgeError(f"there is no runner at {runner}", hint="--runner names the kedge-runner for this device")
    if not os.access(str(runner), os.X_OK):
        raise KedgeError(f"{runner} is not executable", hint=f"chmod +x {runner}")
    cores = len(os.sched_getaffinity(0))
    if not 0 <= options.threads <= cores:
        raise UsageError(f"--threads {options.threads}: this process may use {cores} cores", hint="0 means all of them")
    data_dir = options.data_dir or _default_data_dir() / name

    from kedge.device_agent.agent import Agent, Settings
    from kedge.rpc.types import DeviceInfo

    def ready(device: DeviceInfo) -> None:
        emulated = ", emulated" if device.emulated else ""
        sys.stdout.write(
            f"kedge agent {device.name} ready: {device.arch} {device.cpu_name}, {device.num_cores} cores{emulated},"
            f" tracker {tracker}\n"
        )
        sys.stdout.flush()

    return Agent(Settings(tracker, name, runner, data_dir, labels, options.threads), on_ready=ready).run()


def _default_data_dir() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "kedge" / "agent"


if __name__ == "__main__":
    sys.exit(main())
