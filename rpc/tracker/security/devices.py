"""Enrolled devices: which certificates of which names are good.

A device has one certificate, and after a renewal the one before too, until that expires: connections outlive renewals.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from kedge.rpc.errors import AuthenticationError
from kedge.rpc.security.files import SecretFileError
from kedge.rpc.status import NameTakenError, UnknownTokenError
from kedge.rpc.tracker.security.ca import Authority, Issued
from kedge.rpc.tracker.security.storage import Storage

LIFETIME_S = 90 * 86_400


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device; times are Unix seconds, 0 means not. `serials` are those of its good certificates, newest last."""

    name: str
    enrolled_s: int
    not_after_s: int
    serials: tuple[str, ...]
    revoked_s: int = 0


class Devices:
    """The devices that `storage` keeps, written whole at every change."""

    def __init__(
        self, storage: Storage, authority: Authority, now_s: Callable[[], float], lifetime_s: int = LIFETIME_S
    ) -> None:
        self._storage = storage
        self._authority = authority
        self._now_s = now_s
        self._lifetime_s = lifetime_s
        self._by_name: dict[str, Enrolled] = {}
        try:
            for item in json.loads(storage.read()):
                self._by_name[item["name"]] = Enrolled(**{**item, "serials": tuple(item["serials"])})
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            raise SecretFileError(f"{storage.name} is damaged: {error!r}", hint="restore it from a backup") from error

    def check_free(self, name: str, *, replaces: bool) -> None:
        """Raise NameTakenError where another device has the name.

        `replaces` says that an administrator gave the name to the one that comes.
        """
        known = self._by_name.get(name)
        if known is not None and not known.revoked_s and known.not_after_s > self._now_s() and not replaces:
            raise NameTakenError(
                f"a device is enrolled under the name {name!r} already",
                hint=f"choose another --name, or let this one take its place: "
                f"kedge tracker token create --role enrol --device {name}",
            )

    def enrol(self, name: str, *, replaces: bool) -> Issued:
        """A first certificate for a device; raises as `check_free`."""
        self.check_free(name, replaces=replaces)
        return self._issue(name, ())

    def renew(self, name: str, serial: str) -> Issued:
        """Another certificate for a device that is known by the one with this serial number."""
        self.check(name, serial)
        return self._issue(name, (serial,))

    def _issue(self, name: str, keep: tuple[str, ...]) -> Issued:
        issued = self._authority.device(name, self._now_s(), self._lifetime_s)
        known = self._by_name.get(name)
        enrolled_s = known.enrolled_s if known is not None and keep else int(self._now_s())
        self._put(Enrolled(name, enrolled_s, issued.not_after_s, (*keep, issued.serial)))
        return issued

    def check(self, name: str, serial: str) -> None:
        """Raise AuthenticationError unless this is a good certificate of the device."""
        known = self._by_name.get(name)
        if known is None:
            raise AuthenticationError(f"no device {name!r} is enrolled here", hint=REVOKED_HINT)
        if known.revoked_s:
            raise AuthenticationError(f"the device {name!r} was revoked", hint=REVOKED_HINT)
        if serial not in known.serials:
            raise AuthenticationError(f"another certificate took the place of this one of {name!r}", hint=REVOKED_HINT)

    def revoke(self, name: str) -> Enrolled:
        """Refuse a device from now on; raises UnknownTokenError where none is enrolled."""
        known = self._by_name.get(name)
        if known is None:
            raise UnknownTokenError(f"no device {name[:100]!r} is enrolled", hint="kedge tracker enrolled lists them")
        return known if known.revoked_s else self._put(replace(known, revoked_s=int(self._now_s())))

    def all(self) -> list[Enrolled]:
        """Every device that was ever enrolled, by name."""
        return sorted(self._by_name.values(), key=lambda device: device.name)

    def _put(self, device: Enrolled) -> Enrolled:
        before = self._by_name.get(device.name)
        self._by_name[device.name] = device
        try:
            self._storage.write(json.dumps([asdict(each) for each in self._by_name.values()], indent=1).encode())
        except BaseException:
            if before is None:
                del self._by_name[device.name]
            else:
                self._by_name[device.name] = before
            raise
        return device


REVOKED_HINT = "enrol it (again) with a join string of 'kedge tracker token create --role enrol': --join '…'"
