"""The devices as the tracker knows them, and whether one may take a job now. Pure; times are Unix milliseconds.

A device takes jobs when it is connected, holds no lease, is not in maintenance or revoked, reports no problem of its
own, and its circuit breaker is closed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from heapq import nsmallest

from kedge.rpc.noise import Conditions, Noise
from kedge.rpc.selector import Selector, labels_of, parse
from kedge.rpc.tracker.breaker import Breaker
from kedge.rpc.tracker.facts import ANYWHERE, LeaseKey, Needs, Serviced
from kedge.rpc.tracker.reservations import Reservations
from kedge.rpc.tracker.scheduler import Want
from kedge.rpc.types import DeviceInfo, DeviceState, DeviceStatus, Health, Protocol

#: So many answers are remembered beside those that queued jobs wait for.
_REMEMBERED = 4_000


@dataclass(slots=True)
class Device:
    """A device that is connected, or was."""

    info: DeviceInfo
    instance_id: str
    labels: dict[str, str]
    connection: int | None
    seen_ms: int
    idle_ms: int
    #: Leases that the agent holds or was given, wanted or not.
    holding: set[LeaseKey] = field(default_factory=set)
    #: Results that were taken, until a heartbeat no longer names them.
    settled: set[LeaseKey] = field(default_factory=set)
    #: None: it is not known yet, and nobody knows whether jobs would be safe there.
    health: Health | None = None
    protocol: Protocol = field(default_factory=lambda: Protocol(0))
    #: It takes no jobs, and is forgotten once it is off.
    revoked: bool = False

    @property
    def idle(self) -> bool:
        """Connected, and without a lease."""
        return self.connection is not None and not self.holding


class Roster:
    """All devices by name, with what keeps them from taking jobs."""

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}
        self._breakers: dict[str, Breaker] = {}
        self._serviced: dict[str, Serviced] = {}
        self.reservations = Reservations()
        #: By what is wanted: its selector, and the devices, connected or not, whose labels and machine are that. What
        #: was asked for last is at the end.
        self._fits: OrderedDict[tuple[str, Needs], tuple[Selector, set[str]]] = OrderedDict()
        self._remembered = _REMEMBERED
        self.noise = Noise()

    def __iter__(self) -> Iterator[Device]:
        return iter(self._devices.values())

    def get(self, name: str) -> Device | None:
        """A device that is known."""
        return self._devices.get(name)

    def __getitem__(self, name: str) -> Device:
        return self._devices[name]

    def add(self, device: Device) -> None:
        """A device (re)connected: what was known of its machine may be wrong now."""
        name = device.info.name
        self._devices[name] = device
        for (_, needs), (selector, names) in self._fits.items():
            names.discard(name)
            if _suits(selector, needs, device):
                names.add(name)

    def unseen(self) -> list[Device]:
        """Devices in maintenance or reserved that are not known: they are off since before the tracker was started."""
        named = {*self._serviced, *(item.device for item in self.reservations)}
        return [unseen_device(name) for name in sorted(named - self._devices.keys())]

    def forget(self, keep: int) -> list[str]:
        """Keep only so many of the devices that are gone, those that left last; returns the names of the others."""
        gone = [device for device in self if device.connection is None]
        longest = nsmallest(len(gone) - keep, gone, key=lambda device: device.seen_ms)
        forgotten = [device.info.name for device in longest]
        for name in forgotten:
            self.drop(name)
        return forgotten

    def drop(self, name: str) -> None:
        """Know nothing of a device, if it is known."""
        self._devices.pop(name, None)
        self._breakers.pop(name, None)
        for _, names in self._fits.values():
            names.discard(name)

    # ---- What keeps a device from taking jobs ----------------------------------------------------------------------

    def breaker(self, name: str) -> Breaker:
        """The circuit breaker of a device."""
        return self._breakers.setdefault(name, Breaker())

    def serve(self, serviced: Serviced) -> None:
        """Take a device out of service."""
        self._serviced[serviced.device] = serviced

    def end_service(self, name: str) -> None:
        """Put a device back, whatever kept it away."""
        self._serviced.pop(name, None)
        self._breakers.pop(name, None)

    def in_service(self, name: str) -> bool:
        """True unless it is in maintenance."""
        return name not in self._serviced

    def obstacle(self, device: Device, now: int) -> tuple[DeviceState, str] | None:
        """Why a connected device takes no jobs though it may be idle; None when it does."""
        name = device.info.name
        if device.revoked:
            return DeviceState.QUARANTINED, "revoked, and about to be disconnected"
        serviced = self._serviced.get(name)
        if serviced is not None:
            by = f" by {serviced.user}" if serviced.user else ""
            return DeviceState.MAINTENANCE, f"in maintenance since {_clock(serviced.since_ms)}{by}: {serviced.reason}"
        if not device.instance_id:
            return DeviceState.GONE, "not connected since the tracker was started"
        if device.health is None:
            return DeviceState.QUARANTINED, "its agent has not said yet how it is"
        if device.health.problems:
            return DeviceState.QUARANTINED, f"unhealthy: {'; '.join(device.health.problems)}"
        breaker = self._breakers.get(name)
        if breaker is not None and breaker.is_open(now):
            return DeviceState.QUARANTINED, f"{breaker.why}; tried again at {_clock(breaker.until_ms)}"
        return None

    def available(self, now: int) -> list[Device]:
        """Devices that take a job now, longest idle first."""
        able = [device for device in self if device.idle and self.obstacle(device, now) is None]
        return sorted(able, key=lambda device: (device.idle_ms, device.info.name))

    def reservable(self, selector: str, begin: int, end: int, without: Collection[str], now: int) -> Device | None:
        """A device that matches and that nobody has reserved then, best one first; raises SelectorError.

        One that is not connected may be back for a later time, but is of no use now.
        """
        wanted = parse(selector)
        taken = {item.device for item in self.reservations.within(begin, end)}.union(without)
        free = [d for d in self if d.info.name not in taken and wanted.matches(d.labels) and not d.revoked]
        free = [d for d in free if d.connection is not None or begin > now]
        best = sorted(
            free,
            key=lambda d: (d.connection is None, self.obstacle(d, now) is not None, not d.idle, d.idle_ms, d.info.name),
        )
        return best[0] if best else None

    # ---- Matching --------------------------------------------------------------------------------------------------

    def expect(self, wants: int) -> None:
        """So many wants are asked for in turn from now on: each has its answer when it comes again."""
        self._remembered = wants + _REMEMBERED

    def takers(self, want: Want, names: Collection[str], now: int) -> list[str]:
        """Those of these devices that may have a job with this want, if they take jobs.

        One that failed while it had the job is taken again only when no other connected one could have it.
        """
        _, fits = self._fitting(want)
        if fits.isdisjoint(names):
            return []
        able = [name for name in names if name in fits]
        if self.reservations:
            able = [name for name in able if self._open_to(want.user, name, now)]
        if not want.avoid.isdisjoint(able) and self._has_alternative(want, now):
            return [name for name in able if name not in want.avoid]
        return able

    def working(self, now: int) -> list[str]:
        """Connected devices that take jobs, now or once they are idle."""
        return [d.info.name for d in self if d.connection is not None and self.obstacle(d, now) is None]

    def _has_alternative(self, want: Want, now: int) -> bool:
        others = (self._devices[name] for name in self._fitting(want)[1] - want.avoid)
        return any(
            device.connection is not None
            and self._open_to(want.user, device.info.name, now)
            and self.obstacle(device, now) is None
            for device in others
        )

    def _open_to(self, user: str, name: str, now: int) -> bool:
        """Whether the device is reserved for nobody else."""
        reserved = self.reservations.of(name, now)
        return reserved is None or reserved.user == user

    def _fitting(self, want: Want) -> tuple[Selector, set[str]]:
        """The selector, and the devices, connected or not, whose labels and machine are what is wanted."""
        key = want.selector, want.needs
        known = self._fits.get(key)
        if known is None:
            selector = parse(want.selector)
            fits = {device.info.name for device in self if _suits(selector, want.needs, device)}
            known = self._fits[key] = selector, fits
            while len(self._fits) > self._remembered:
                self._fits.popitem(last=False)
        self._fits.move_to_end(key)
        return known

    def why_waiting(self, want: Want, now: int) -> str:
        """What keeps a job with this want from starting."""
        here = [device for device in self if device.connection is not None]
        selector, fits = self._fitting(want)
        fit = [device for device in here if device.info.name in fits]
        if fit:
            return self._why_not(want, fit, now)
        chosen = [device for device in here if selector.matches(device.labels)]
        if not chosen:
            nobody = f"no connected device matches {want.selector!r}" if here else "no device is connected"
            return nobody + (self._offline(selector) if want.selector else "")
        if want.needs == ANYWHERE:
            return "no matching device serves sessions: update kedge on it"
        archs = ", ".join(sorted({str(need) for need in want.needs}))
        names = ", ".join(f"{d.info.name} is {_machine(d.info)}" for d in chosen[:3])
        return f"no matching device can run the artifact (it is for {archs}; {names})"

    def _offline(self, selector: Selector) -> str:
        """Which of those that are off would match."""
        off = [device for device in self if device.connection is None and selector.matches(device.labels)]
        if len(off) == 1:
            name, when = off[0].info.name, _clock(off[0].seen_ms)
            if not off[0].instance_id:  # an earlier tracker that was killed saw it come, and not go
                return f" ({name} is offline; it last came or left at {when})"
            return f" ({name} is offline since {when})"
        return f" ({len(off)} that are offline would)" if off else ""

    def _why_not(self, want: Want, able: list[Device], now: int) -> str:
        reasons = {d.info.name: reason[1] for d in able if (reason := self.obstacle(d, now)) is not None}
        for device in able:
            reserved = self.reservations.of(device.info.name, now)
            if reserved is not None and reserved.user != want.user:
                until = _clock(reserved.until_unix_ms)
                reasons.setdefault(device.info.name, f"reserved for {reserved.user or 'another user'} until {until}")
        if len(reasons) == len(able):
            first, why = next(iter(reasons.items()))
            more = f", and {len(able) - 1} more" if len(able) > 1 else ""
            return f"no matching device takes jobs now ({first} is {why}{more})"
        busy = len(able) - len(reasons)
        return "1 matching device is busy" if busy == 1 else f"{busy} matching devices are busy"

    # ---- Pictures --------------------------------------------------------------------------------------------------

    def status(self, device: Device, running_job_id: str, now: int) -> DeviceStatus:
        """The device for whoever asks."""
        state, detail = DeviceState.IDLE if device.idle else DeviceState.BUSY, ""
        obstacle = self.obstacle(device, now)
        if device.connection is None:
            state = DeviceState.GONE
        elif obstacle is not None:
            state = obstacle[0]
        if obstacle is not None:
            detail = obstacle[1]
        reservation = self.reservations.of(device.info.name, now)
        noise = self.noise.floors(device.info.name, conditions_of(device), now)
        seen, health = device.seen_ms, device.health
        upcoming = self.reservations.upcoming(device.info.name, now)
        return DeviceStatus(device.info, state, seen, running_job_id, detail, health, reservation, noise, upcoming)


def offline_device(info: DeviceInfo, seen_ms: int) -> Device:
    """A device that was off when the tracker was started."""
    return Device(info, "", labels_of(info), None, seen_ms, seen_ms)


def unseen_device(name: str) -> Device:
    """What there is to say of a device of which no more is known than its name."""
    return offline_device(DeviceInfo(name, ""), 0)


def conditions_of(device: Device) -> Conditions:
    """What its noise depends on."""
    return Conditions(device.info.target, device.protocol.software, device.health.governor if device.health else "")


def connection_of(device: Device) -> int:
    """The connection of a device that is connected."""
    assert device.connection is not None
    return device.connection


def _suits(selector: Selector, needs: Needs, device: Device) -> bool:
    return selector.matches(device.labels) and able(needs, device)


def able(needs: Needs, device: Device) -> bool:
    """Is the device one for such a job? A session, which names no artifact, needs an agent that serves sessions."""
    if needs == ANYWHERE:
        return "sessions" in device.protocol.capabilities
    return can_run(needs, device.info)


def can_run(needs: Needs, info: DeviceInfo) -> bool:
    """Has the device the architecture, the CPU features and the GPU of any variant?"""
    return any(need.is_met_by(info) for need in needs)


def _machine(info: DeviceInfo) -> str:
    kinds = sorted({gpu.kind for gpu in info.accelerators})
    return f"{info.arch} with {', '.join(kinds)}" if kinds else info.arch


def _clock(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
