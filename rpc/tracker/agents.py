"""The agents' connections: who is connected, what it says, and which leases it has. Pure."""

from __future__ import annotations

from kedge.rpc import messages as m
from kedge.rpc.errors import UsageError
from kedge.rpc.names import check_name
from kedge.rpc.outcome import Stage
from kedge.rpc.protocol import accepts, local_protocol
from kedge.rpc.selector import labels_of
from kedge.rpc.tracker.alarms import Alarms
from kedge.rpc.tracker.devices import Device, Roster, connection_of
from kedge.rpc.tracker.facts import CloseAgent, DeviceForgotten, DevicesChanged, DeviceSeen, Effects, ToAgent
from kedge.rpc.tracker.jobs import Jobs
from kedge.rpc.tracker.lifecycle import Lifecycle
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.types import Lease

#: So many leases of one job may have been handed out, and not stored, when a tracker is killed; devices that name
#: higher ones are not believed.
_UNSTORED_EPOCHS = 16


class Agents:
    """What agents say, by connection; what follows from it is added to the event's `effects`."""

    def __init__(
        self, tracker_id: str, rules: Settings, jobs: Jobs, devices: Roster, alarms: Alarms, lifecycle: Lifecycle
    ) -> None:
        self._tracker_id = tracker_id
        self._rules = rules
        self._jobs = jobs
        self._devices = devices
        self._alarms = alarms
        self._lifecycle = lifecycle
        self._connections: dict[int, str] = {}

    def connect(self, connection: int, hello: m.Hello, now: int, effects: Effects) -> None:
        """An agent's first message on a new connection."""
        name = hello.device.name
        known = self._devices.get(name)
        refusal = self._refusal(hello, known)
        if refusal is not None:
            effects.sends += [ToAgent(connection, refusal), CloseAgent(connection)]
            return
        if known is not None and known.connection is not None:
            # The same agent again: its old connection is dead, though nobody has noticed yet.
            effects.sends.append(CloseAgent(known.connection))
            del self._connections[known.connection]
        device = Device(hello.device, hello.instance_id, labels_of(hello.device), connection, now, now)
        device.protocol = hello.protocol
        # Older agents do not say it before their first heartbeat.
        device.health = hello.health or (known.health if known is not None else None)
        self._devices.add(device)
        self._connections[connection] = name
        welcome = m.Welcome(local_protocol(), self._tracker_id, self._rules.heartbeat_interval_ms)
        effects.sends.append(ToAgent(connection, welcome))
        effects.notes.append(DeviceSeen(device.info, now))
        self._take_stock(device, hello, now, effects)
        self._alarms.set(now + self._rules.silence_ms, "device", name)
        effects.sends.append(DevicesChanged())

    def receive(self, connection: int, body: m.AgentBody, now: int, effects: Effects) -> None:
        """Any later message of an agent. One from a connection that was given up changes nothing."""
        name = self._connections.get(connection)
        if name is None:
            return
        device = self._devices[name]
        device.seen_ms = now
        if isinstance(body, m.Heartbeat):
            self._heartbeat(device, body, now, effects)
        elif isinstance(body, m.JobStarted):
            self._lifecycle.progress(device, body.lease, Stage.TRANSFER, now, effects)
        elif isinstance(body, m.JobProgress):
            self._lifecycle.progress(device, body.lease, body.stage, now, effects)
        elif isinstance(body, m.JobFinished):
            self._finished(device, body, now, effects)
        elif isinstance(body, m.Goodbye):
            self._goodbye(device, body, now, effects)
        else:
            refused = m.Refused("a second hello on one connection")
            effects.sends += [ToAgent(connection, refused), CloseAgent(connection)]
            self._part(device, now, effects)

    def disconnect(self, connection: int, now: int, effects: Effects) -> None:
        """A connection ended. The agent's leases run on for a while: it may come back."""
        name = self._connections.get(connection)
        if name is not None:
            self._part(self._devices[name], now, effects)

    def check(self, name: str, now: int, effects: Effects) -> None:
        """A device of which nothing was heard for long is no longer connected."""
        device = self._devices.get(name)
        if device is None or device.connection is None:
            return
        due = device.seen_ms + self._rules.silence_ms
        if now >= due:
            effects.sends.append(CloseAgent(device.connection))
            self._part(device, now, effects)
        else:
            self._alarms.set(due, "device", name)

    def _refusal(self, hello: m.Hello, known: Device | None) -> m.Refused | None:
        name = hello.device.name
        if not accepts(hello.protocol.version):
            ours = local_protocol().version
            reason = f"it speaks protocol {hello.protocol.version}, this tracker {ours}; update the older one"
            return m.Refused(reason, retry=True)  # a board comes back by itself once the tracker is updated
        try:
            check_name(name)
        except UsageError as error:
            return m.Refused(f"{error.message}: {error.hint}")
        if known is not None and known.connection is not None and known.instance_id != hello.instance_id:
            return m.Refused(f"another device is connected as {name!r}; start this one with another --name", retry=True)
        return None

    def _take_stock(self, device: Device, hello: m.Hello, now: int, effects: Effects) -> None:
        """After a (re)connection: renew the leases that the agent still holds, give up those that it does not."""
        device.holding = {(lease.job_id, lease.epoch) for lease in hello.running}
        for job_id, epoch in sorted(device.holding):
            job = self._jobs.held_under((job_id, epoch), device.info.name)
            if job is None:
                self._call_back(device, Lease(job_id, epoch), effects)
                continue
            self._lifecycle.renew(job, now)
            self._lifecycle.watch(job)
            if job.cancelling is not None:
                self._lifecycle.abort(job, job.cancelling, effects)
        for job in [job for job in self._jobs.held_by(device.info.name) if job.key not in device.holding]:
            same = job.assigned is not None and job.assigned.instance_id == hello.instance_id
            # An agent holds a lease until its result is accepted: one that does not know it never received it.
            never_began = not job.started if same else job.started is False
            self._lifecycle.give_up(job, never_began, "the agent was restarted", now, effects)

    def _heartbeat(self, device: Device, beat: m.Heartbeat, now: int, effects: Effects) -> None:
        before, device.health = device.health, beat.health
        if before is None or before.problems != beat.health.problems:
            effects.sends.append(DevicesChanged())
        listed = {(lease.job_id, lease.epoch) for lease in beat.running}
        device.settled &= listed
        for job_id, epoch in sorted(listed - device.settled):
            job = self._jobs.held_under((job_id, epoch), device.info.name)
            if job is not None:
                self._lifecycle.renew(job, now)
            else:
                self._call_back(device, Lease(job_id, epoch), effects)
        was_idle = device.idle
        # An assignment that crossed this heartbeat on the wire is not in it, and still stands.
        crossed = {key for key in device.holding - listed if self._jobs.held_under(key, device.info.name)}
        device.holding = (listed - device.settled) | crossed
        self._lifecycle.mark(device, was_idle, now, effects)

    def _call_back(self, device: Device, lease: Lease, effects: Effects) -> None:
        """A device has a lease that is not current: nothing under it counts, and no later one is mistaken for it."""
        job = self._jobs.get(lease.job_id)
        if job is not None and lease.epoch <= job.epoch + _UNSTORED_EPOCHS:
            job.named_epoch = max(job.named_epoch, lease.epoch)
        effects.sends.append(ToAgent(connection_of(device), m.AbortJob(lease, "the lease is not current")))

    def _goodbye(self, device: Device, goodbye: m.Goodbye, now: int, effects: Effects) -> None:
        self._part(device, now, effects)
        why = f"the agent stopped ({goodbye.reason})" if goodbye.reason else "the agent stopped"
        for job in self._jobs.held_by(device.info.name):
            self._lifecycle.give_up(job, job.started is False, why, now, effects, meant=True)

    def _finished(self, device: Device, finished: m.JobFinished, now: int, effects: Effects) -> None:
        lease = finished.lease
        key = (lease.job_id, lease.epoch)
        was_idle = device.idle
        device.holding.discard(key)
        device.settled.add(key)
        job = self._jobs.held_under(key, device.info.name)
        stale = job is None and self._jobs.ended(lease.job_id) != lease.epoch
        if job is not None:
            self._lifecycle.report(job, device, finished.result, now, effects)
        effects.sends.append(ToAgent(connection_of(device), m.ResultAccepted(lease.job_id, stale)))
        self._lifecycle.mark(device, was_idle, now, effects)

    def _part(self, device: Device, now: int, effects: Effects) -> None:
        """The device is no longer connected."""
        del self._connections[connection_of(device)]
        device.connection, device.seen_ms = None, now
        effects.sends.append(DevicesChanged())
        if device.revoked:
            self.forget(device.info.name, effects)
        else:
            effects.notes.append(DeviceSeen(device.info, now))
        effects.notes += [DeviceForgotten(name) for name in self._devices.forget(self._rules.remembered_devices)]

    def forget(self, name: str, effects: Effects) -> None:
        """Nothing is left of a device, at once or when it is off."""
        device = self._devices.get(name)
        if device is not None and device.connection is not None:
            device.revoked = True
        else:
            self._devices.drop(name)
            effects.notes.append(DeviceForgotten(name))
