"""`python -m kedge.device_agent`: offer this device to a tracker."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional

from kedge.rpc import logs
from kedge.rpc.errors import KedgeError, UsageError
from kedge.rpc.names import check_name, parse_labels
from kedge.rpc.printable import printable
from kedge.rpc.security.files import read_private

if TYPE_CHECKING:
    from kedge.rpc.security.identity import Identity
    from kedge.rpc.transport import Address

log = logging.getLogger("kedge.agent")

_EXAMPLES = """\
examples:
  python3 -m kedge.device_agent --join 'kedge1.…' --runner ./kedge-runner
  python3 -m kedge.device_agent --runner ./kedge-runner --name rpi4-1 --label rack=a --threads 3

The first one enrols the device: the join string is what 'kedge tracker token create --role enrol' prints, and is good
for one device. From then on the device has a certificate in its data folder, renewed as long as the agent runs.

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
    parser.add_argument(
        "--join", metavar="STRING", help="enrol this device; better in the environment: KEDGE_JOIN (default: enrolled)"
    )
    parser.add_argument(
        "--join-file",
        metavar="FILE",
        type=Path,
        help="a file with the join string, removed once the device is enrolled",
    )
    parser.add_argument(
        "--tracker",
        metavar="HOST:PORT",
        help="where the tracker is, if it has moved; several of one fleet: a:9190,b:9190 (default: as it was joined)",
    )
    parser.add_argument(
        "--insecure-loopback",
        action="store_true",
        help="speak plaintext with --tracker on this machine, which was started so too (default: no)",
    )
    parser.add_argument(
        "--require-signer",
        metavar="KEY",
        action="append",
        default=[],
        help="run only artifacts that this public key signed; may be repeated (default: everybody's)",
    )
    parser.add_argument(
        "--runner-user",
        metavar="NAME",
        help="whom jobs run as when root starts the agent; 'root' keeps them root (default: kedge-runner where that"
        " user exists, else a number that is nobody's)",
    )
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
        "--measure-cores",
        metavar="LIST",
        help="cores kept for timings and sessions, such as 2-3; all else stays off them (default: none)",
    )
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: %(default)s"
    )
    parser.add_argument(
        "--log-format", choices=logs.FORMATS, default="text", help="lines, or JSON objects (default: %(default)s)"
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
    # What fails in a handshake is said in our own words.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # No runner inherits it.
    options.join = os.environ.pop("KEDGE_JOIN", None) or options.join
    level = logging.getLevelName(options.log_level.upper())
    logs.configure(options.log_format, "%(asctime)s %(levelname).1s %(message)s", level)
    try:
        return _serve(options)
    except KedgeError as error:
        if options.log_format == "json":
            log.critical("%s", error)
        else:
            sys.stderr.write(printable(f"error: {error}") + "\n")
        return error.exit_status


def _serve(options: argparse.Namespace) -> int:
    from kedge.device_agent.cores import parse_cores
    from kedge.rpc.transport import parse_trackers

    tracker = parse_trackers(options.tracker) if options.tracker else None
    name, labels = check_name(options.name), parse_labels(options.label)
    runner = options.runner.absolute()
    if not runner.is_file():
        raise KedgeError(f"there is no runner at {runner}", hint="--runner names the kedge-runner for this device")
    if not os.access(str(runner), os.X_OK):
        raise KedgeError(f"{runner} is not executable", hint=f"chmod +x {runner}")
    cores = len(os.sched_getaffinity(0))
    if not 0 <= options.threads <= cores:
        raise UsageError(f"--threads {options.threads}: this process may use {cores} cores", hint="0 means all of them")
    measuring = parse_cores(options.measure_cores, os.sched_getaffinity(0)) if options.measure_cores else ()
    data_dir = options.data_dir or _default_data_dir() / name

    from kedge.device_agent.agent import Agent, Settings
    from kedge.device_agent.cage import choose_user
    from kedge.rpc.security.signing import parse_signers
    from kedge.rpc.types import DeviceInfo

    signers, user = parse_signers(options.require_signer), choose_user(options.runner_user)
    identity = _identify(options, tracker, name, data_dir)
    address = identity.address if identity is not None else tracker
    if identity is not None and tracker is not None and tracker.others:
        address = identity.addresses(tracker)
    assert address is not None

    def ready(device: DeviceInfo) -> None:
        emulated = ", emulated" if device.emulated else ""
        sys.stdout.write(
            f"kedge agent {device.name} ready: {device.arch} {device.cpu_name}, {device.num_cores} cores{emulated},"
            f" tracker {address}\n"
        )
        sys.stdout.flush()

    settings = Settings(address, name, runner, data_dir, labels, options.threads, identity, signers, user, measuring)
    return Agent(settings, on_ready=ready).run()


def _identify(options: argparse.Namespace, tracker: Optional[Address], name: str, data_dir: Path) -> Optional[Identity]:
    """Who this device is: enrolled now, or before; None for a tracker that speaks plaintext."""
    from kedge.rpc.errors import AuthenticationError
    from kedge.rpc.security import identity as identities
    from kedge.rpc.security.join import parse_join

    text = options.join
    if options.join_file is not None and options.join_file.exists():
        text = text or read_private(options.join_file).decode(errors="replace")
    if options.insecure_loopback:
        if text or tracker is None or not tracker.is_loopback:
            raise UsageError(
                "--insecure-loopback goes with --tracker on this machine, and with nothing to join",
                hint="--tracker 127.0.0.1:9190 --insecure-loopback, for a tracker that was started so too",
            )
        return None
    identity = identities.load(data_dir, name, tracker)
    if text:
        join = parse_join(text)
        if tracker is not None:
            join = replace(join, address=tracker)
        if identity is None or not identity.is_from(join):
            identities.check_writable(data_dir)
            identity = identities.enrol(join, name)
            identity.save(data_dir)
        if options.join_file is not None and options.join_file.exists():
            options.join_file.unlink()
    if identity is None:
        others = identities.names(data_dir)
        as_others = f", only as {', '.join(others)}: see --name" if others else ""
        raise AuthenticationError(
            f"this device is not enrolled as {name!r} ({data_dir}){as_others}",
            hint="join a tracker: --join '…', with what 'kedge tracker token create --role enrol' prints",
        )
    return identity if tracker is None else replace(identity, host=tracker.host)


def _default_data_dir() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "kedge" / "agent"


if __name__ == "__main__":
    sys.exit(main())
