"""The hops of `kedge doctor` from here to a device: each is tested only where those before it hold."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator

from kedge.diagnosis import LOW_FREE_BYTES, MIN_FREE_BYTES, Finding, Status, try_on
from kedge.rpc.client.fleet import Fleet
from kedge.rpc.client.plan import is_open_to
from kedge.rpc.errors import AuthenticationError, ConnectError, KedgeError
from kedge.rpc.protocol import ProtocolError, accepts, local_protocol
from kedge.rpc.security import credentials
from kedge.rpc.transport import TRACKER_NAME, Address, handshake_error, parse_trackers, unreachable
from kedge.rpc.types import Deadlines, DeviceState, DeviceStatus, Protocol, TrackerStatus

_PATIENCE_S = 5.0
#: A device that is idle takes the trial job at once, unless somebody was quicker.
_QUEUE_MS = 20_000
_DAY_S = 86_400
#: A token or certificate that ends this soon is worth a word.
_SOON_S = 7 * _DAY_S
#: Clocks that differ by more mislead whoever reads times; by more than that, certificates as well.
_SKEW_S, _FAR_S = 5.0, 300.0
#: A tracker's time never goes back or jumps: it looks at its machine's clock when it starts, and counts from then on.
_TIME_REMEDY = (
    "set the clock of whichever is wrong: timedatectl set-ntp true; if both are right by now, or the tracker's machine "
    "was suspended, restart the tracker: it reads the clock at its start only (jobs outlive that, sessions do not)"
)


class Hops:
    """One walk to the tracker at `address` and on to the devices that `selector` names."""

    def __init__(self, address: str, selector: str | None) -> None:
        self._text = address
        self._selector = selector
        self._address = Address("", 0)
        self._known = credentials.Credentials((), None)
        self._status: TrackerStatus | None = None

    def walk(self) -> Iterator[Finding]:
        """Every finding, up to the first hop that does not hold."""
        steps: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
            ("tracker", self._reach),
            ("credentials", self._credentials),
            ("TLS", self._handshake),
        ]
        for name, step in steps:
            found = list(_said(name, step))
            yield from found
            if any(finding.status == "broken" for finding in found):
                return
        with Fleet(self._address, self._known.tls) as fleet:
            later: list[tuple[str, Callable[[Fleet], Iterator[Finding]]]] = [
                ("tracker", self._hello),
                ("tracker's state", self._tracker_state),
                ("devices", self._devices),
            ]
            for name, hop in later:
                found = list(_said(name, lambda hop=hop: hop(fleet)))  # type: ignore[misc]
                yield from found
                if name == "tracker" and found[0].status == "broken":
                    return

    # ---- The way there ----

    def _reach(self) -> Iterator[Finding]:
        self._address = parse_trackers(self._text)
        answering, failed = [], []
        for each in self._address.each:
            try:
                socket.create_connection((each.host, each.port), timeout=_PATIENCE_S).close()
            except socket.gaierror as error:
                why = f"the host of {each} is not known here ({error.strerror})"
                failed.append(ConnectError(why, hint="check its name, or use its IP address"))
            except OSError as error:
                failed.append(unreachable(each, error.strerror or str(error)))
            else:
                answering.append(each)
        if not answering:
            raise failed[0]
        for refusal in failed:
            yield Finding("network", "note", f"one of several: {refusal.message}", refusal.hint or "")
        yield Finding("network", "ok", f"something listens at {', '.join(map(str, answering))}")
        self._there = answering[0]

    def _credentials(self) -> Iterator[Finding]:
        self._known = known = credentials.find(self._address)
        if known.tls is None:
            remedy = "fine for trying out; start the tracker without --insecure-loopback for anything else"
            yield Finding("credentials", "note", f"{known.path}: plaintext, on this machine only", remedy)
        else:
            whose = "of the tracker that runs here" if known.own else "joined"
            yield Finding("credentials", "ok", f"{known.path} ({whose})")

    def _handshake(self) -> Iterator[Finding]:
        tls = self._known.tls
        if tls is None:
            yield Finding("TLS", "note", "none: the tracker was started with --insecure-loopback")
            return
        context = ssl.create_default_context(cadata=tls.ca.decode())
        # As gRPC's own check, which is the one that counts.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.set_alpn_protocols(["h2"])
        place = (self._there.host, self._there.port)
        try:
            with (
                socket.create_connection(place, timeout=_PATIENCE_S) as plain,
                context.wrap_socket(plain, server_hostname=TRACKER_NAME) as secure,
            ):
                certificate, version = secure.getpeercert(), secure.version()
        except OSError as error:
            failed = handshake_error(self._address, f"Tls handshake failed: {error}")
            assert failed is not None
            raise failed from error
        assert certificate is not None
        ends_s = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
        left_s = ends_s - time.time()
        status, remedy = ("ok", "") if left_s > _SOON_S else ("note", "restart the tracker: it makes a new certificate")
        yield Finding("TLS", status, f"{version}; the tracker's certificate lasts until {_day(ends_s)}", remedy)  # type: ignore[arg-type]

    # ---- The tracker ----

    def _hello(self, fleet: Fleet) -> Iterator[Finding]:
        began = time.perf_counter()
        fleet.hello()
        took_ms = (time.perf_counter() - began) * 1000
        yield Finding("tracker", "ok", f"{self._address} answers, within {took_ms:.0f} ms")

    def _tracker_state(self, fleet: Fleet) -> Iterator[Finding]:
        before = time.time()
        try:
            self._status = status = fleet.status()
        except ProtocolError as error:
            yield Finding("tracker's state", "note", error.message, "update the tracker: this one does not tell")
            return
        here_s = (before + time.time()) / 2
        yield _protocol(status.protocol)
        yield self._account(status, here_s)
        yield _clock(status.unix_ms / 1000 - here_s)
        if status.store_problem:
            remedy = "free space on the tracker's disk; what was accepted is kept, and it goes on by itself"
            yield Finding("tracker's store", "broken", status.store_problem, remedy)
        else:
            yield Finding("tracker's store", "ok", "takes jobs and results")
        yield from _trackers(status)
        yield _disk("tracker's disk", status.disk_free_bytes, "free space on the tracker's disk")

    def _account(self, status: TrackerStatus, now_s: float) -> Finding:
        ends = f", until {_day(status.expires_unix_s)}" if status.expires_unix_s else ""
        found = f"user {status.user!r} with the role {status.role}{ends}"
        create = f"an administrator runs: kedge tracker token create --role submit --user {status.user}"
        if status.role not in ("admin", "submit"):
            kind: Status = "broken" if self._selector else "note"
            return Finding("account", kind, f"{found}, which may not submit jobs", create)
        if status.expires_unix_s and status.expires_unix_s - now_s < _SOON_S:
            return Finding("account", "note", f"{found}, which is soon", create)
        return Finding("account", "ok", found)

    # ---- The devices ----

    def _devices(self, fleet: Fleet) -> Iterator[Finding]:
        every = fleet.devices()
        chosen = fleet.devices(self._selector) if self._selector else every
        if not chosen:
            yield self._nobody(every)
            return
        ours = self._status.protocol if self._status is not None else local_protocol()
        spoken = self._status.agents if self._status is not None else {}
        for device in chosen:
            yield _device(device, spoken.get(device.info.name), ours)
        gone = [device for device in fleet.devices(include_gone=True) if device.state is DeviceState.GONE]
        if gone and not self._selector:
            names = ", ".join(f"{device.info.name} ({_since(device.last_seen_unix_ms)})" for device in gone[:8])
            yield Finding("devices that left", "note", names, "see whether their agents run, and reach the tracker")
        if self._selector:
            user = self._status.user if self._status is not None else ""
            idle = (device for device in chosen if device.state is DeviceState.IDLE and is_open_to(device, user))
            free = next((device.info for device in idle), None)
            if free is None:
                states = ", ".join(f"{device.info.name}: {device.state}" for device in chosen[:8])
                yield Finding(
                    "a job on the device",
                    "note",
                    f"not tried, none is idle and free to use ({states})",
                    "try again later",
                )
            else:
                yield from _said("a job on the device", lambda: _run_there(fleet, free.name, free.target))

    def _nobody(self, every: list[DeviceStatus]) -> Finding:
        start = f"let one join: kedge tracker token create --role enrol --tracker {self._address}"
        if not every:
            return Finding("devices", "broken", "no device is connected", start)
        names = ", ".join(device.info.name for device in every)
        return Finding(
            "devices", "broken", f"no device matches {self._selector!r}", f"choose one of {names}, or {start}"
        )


def _said(name: str, step: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a step finds; what it raises is a finding too."""
    try:
        yield from step()
    except AuthenticationError as error:
        yield Finding("credentials" if name == "tracker" else name, "broken", error.message, error.hint or "")
    except KedgeError as error:
        yield Finding(name, "broken", error.message, error.hint or "")


def _run_there(fleet: Fleet, name: str, target: str) -> Iterator[Finding]:
    with fleet.pin(name, deadlines=Deadlines(queue_ms=_QUEUE_MS)) as device:
        yield try_on("a job on the device", device, target)


def _protocol(theirs: Protocol) -> Finding:
    ours = local_protocol()
    found = f"tracker: {theirs.software or 'unnamed'}, protocol {theirs.version}; here: {ours.software}"
    if not accepts(theirs.version):
        return Finding("versions", "broken", found, "update the older one: protocols may differ by one")
    if theirs.software != ours.software:
        return Finding("versions", "note", found, "they work together; update the older one when you can")
    return Finding("versions", "ok", found)


def _trackers(status: TrackerStatus) -> Iterator[Finding]:
    """Several trackers on one database: who leads, and who is gone."""
    if not status.trackers:
        return
    gone = [tracker.address for tracker in status.trackers if tracker.gone]
    alive = [tracker for tracker in status.trackers if not tracker.gone]
    leader = ", ".join(tracker.address for tracker in alive if tracker.leads)
    found = f"{len(alive)} alive; {leader or 'nobody'} leads, in epoch {status.epoch}"
    if gone:
        yield Finding("trackers", "note", f"{found}; gone: {', '.join(gone)}", "start them again, if they are to stay")
    elif len(alive) == 1:
        remedy = "let another join, or nobody takes its place: kedge tracker token create --role tracker"
        yield Finding("trackers", "note", found, remedy)
    else:
        yield Finding("trackers", "ok", found)


def _clock(skew_s: float) -> Finding:
    found = f"the tracker's clock is {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} the one here"
    if abs(skew_s) <= _SKEW_S:
        return Finding("clock", "ok", found)
    return Finding("clock", "broken" if abs(skew_s) > _FAR_S else "note", found, _TIME_REMEDY)


def _disk(check: str, free: int, remedy: str) -> Finding:
    found = f"{free / (1 << 30):.1f} GiB free"
    if free >= LOW_FREE_BYTES:
        return Finding(check, "ok", found)
    return Finding(check, "broken" if free < MIN_FREE_BYTES else "note", found, remedy)


def _device(device: DeviceStatus, spoken: Protocol | None, tracker: Protocol) -> Finding:
    """One device: what keeps it from jobs, what makes its timings doubtful, what it runs."""
    name, health = device.info.name, device.health
    software = spoken.software if spoken is not None else ""
    check, found = f"device {name}", f"{device.state}, {device.info.arch}" + (f", {software}" if software else "")
    if device.state is DeviceState.QUARANTINED:
        remedy = f"see what its agent logs; once it is mended: kedge resume {name}"
        return Finding(check, "broken", f"{found}: {device.detail}", remedy)
    if health is not None and health.problems:
        return Finding(check, "broken", f"{found}: {'; '.join(health.problems)}", "mend that on the device itself")
    if device.state is DeviceState.MAINTENANCE:
        return Finding(check, "note", f"{found}: {device.detail}", f"kedge resume {name} puts it back to work")
    if health is not None and health.throttled:
        slowed = ", ".join(health.throttled)
        return Finding(check, "note", f"{found}: slowed down by {slowed}", "cool it, or give it a stronger supply")
    if software and software != tracker.software:
        remedy = f"it works with the tracker's {tracker.software}; update it when you can: kedge deploy board"
        return Finding(check, "note", found, remedy)
    held = device.info.confinement
    if held is not None and held.missing:
        remedy = "docs/security.md says what that leaves open to whom"
        return Finding(check, "note", f"{found}; jobs are not held by {'; '.join(held.missing)}", remedy)
    return Finding(check, "ok", found)


def _day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _since(unix_ms: int) -> str:
    return f"since {_day(unix_ms / 1000)}" if unix_ms else "since before the tracker's start"


def hops(address: str, selector: str | None) -> Iterator[Finding]:
    """Every finding on the way to the tracker at HOST:PORT and its devices."""
    return Hops(address, selector).walk()
