"""Devices that are kept for one user's jobs for a time. Pure; times are Unix milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kedge.rpc.errors import UsageError
from kedge.rpc.tracker.settings import Settings, seconds
from kedge.rpc.types import Reservation


class Reservations:
    """All that have not ended."""

    def __init__(self) -> None:
        self._reservations: dict[str, Reservation] = {}

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._reservations.values())

    def __len__(self) -> int:
        return len(self._reservations)

    def get(self, reservation_id: str) -> Reservation | None:
        """One that has not ended."""
        return self._reservations.get(reservation_id)

    def add(self, reservation: Reservation) -> None:
        """Keep a device for a user."""
        self._reservations[reservation.id] = reservation

    def end(self, reservation_id: str) -> None:
        """Everybody may have the device again."""
        self._reservations.pop(reservation_id, None)

    def of(self, device: str, now: int) -> Reservation | None:
        """Who the device is kept for at a time."""
        if not self._reservations:
            return None
        held = (item for item in self if item.device == device)
        return next((item for item in held if item.from_unix_ms <= now < item.until_unix_ms), None)

    def upcoming(self, device: str, now: int) -> tuple[Reservation, ...]:
        """Those of a device that have not begun, the next one first."""
        later = [item for item in self if item.device == device and item.from_unix_ms > now]
        return tuple(sorted(later, key=lambda item: item.from_unix_ms))

    def expired(self, now: int) -> list[Reservation]:
        """Those whose time is over."""
        return [item for item in self if item.until_unix_ms <= now]

    def within(self, begin: int, end: int) -> list[Reservation]:
        """Those that have a part of this time."""
        return [item for item in self if item.from_unix_ms < end and begin < item.until_unix_ms]

    # ---- What one more may be --------------------------------------------------------------------------------------

    def check(self, user: str, begin: int, duration_ms: int, rules: Settings, now: int) -> None:
        """A user may have one more for this time; raises UsageError."""
        if begin > now + rules.max_reservation_ahead_ms:
            days = rules.max_reservation_ahead_ms // 86_400_000
            raise UsageError("a reservation begins too late", hint=f"it may begin within {days} days from now")
        if not 0 < duration_ms <= rules.max_reservation_ms or begin + duration_ms <= now:
            longest = seconds(rules.max_reservation_ms)
            raise UsageError("a reservation has to end in the future", hint=f"it may last up to {longest}")
        mine = sum(item.user == user for item in self)
        if mine >= rules.max_reservations_per_user:
            raise UsageError(f"{user} has {mine} reservations already", hint="end one of them first")

    def check_share(self, user: str, begin: int, end: int, connected: int) -> None:
        """Half of the connected devices are for the others; raises UsageError where the user has as many."""
        mine = {item.device for item in self.within(begin, end) if item.user == user}
        if len(mine) >= max(1, (connected + 1) // 2):
            raise UsageError(
                f"{user} has {len(mine)} of {connected} devices reserved for that time already",
                hint="half of them are for the others: end a reservation, or ask an administrator for one",
            )

    def exhausted(self, user: str, duration_ms: int, rules: Settings) -> set[str]:
        """Devices that the user would have for longer in all than one reservation may last."""
        total: Counter[str] = Counter()
        for item in self:
            if item.user == user:
                total[item.device] += item.until_unix_ms - item.from_unix_ms
        return {name for name, ms in total.items() if ms + duration_ms > rules.max_reservation_ms}
