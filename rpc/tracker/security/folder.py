"""Everything that makes a tracker secure, in the folder `security` of its data folder (mode 0700, files 0600)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kedge.rpc.errors import AuthenticationError
from kedge.rpc.security.files import make_private_folder, read_private, write_private
from kedge.rpc.security.join import DEVICE, Join
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.ca import Authority
from kedge.rpc.tracker.security.devices import LIFETIME_S, Devices
from kedge.rpc.tracker.security.principal import Role
from kedge.rpc.tracker.security.storage import FileStorage, Storage
from kedge.rpc.tracker.security.tokens import Tokens
from kedge.rpc.transport import MAX_CALLS, Address, Tls

T = TypeVar("T")
ADMIN = "admin"
ADMIN_FILE = "admin.token"
#: The token that a new tracker prints is good for so long.
_FIRST_JOIN_S = 86_400


@dataclass(frozen=True, slots=True)
class Limits:
    """What one principal may have of a tracker (how many jobs may wait is in the state's settings).

    `max_user_bytes` is of blobs that cannot go, of one user; None: a share (see `kedge.rpc.tracker.allowance`).
    """

    max_blob_bytes: int = 16 << 30
    max_user_bytes: int | None = None
    max_calls: int = MAX_CALLS


class Keys:
    """A tracker's CA and its own certificate, made where they are not there yet, and its audit log.

    Raises:
        SecretFileError: the folder cannot be used, is damaged, or is open to others.
    """

    def __init__(self, data_dir: Path, *, now_s: Callable[[], float] = time.time) -> None:
        make_private_folder(data_dir)  # jobs, results and blobs are nobody else's either
        self.folder = data_dir / "security"
        make_private_folder(self.folder)
        self.now_s = now_s
        self.is_new = not (self.folder / "ca.pem").exists()
        self.authority = Authority(self.folder, now_s())
        self.certificate = self.authority.tracker(now_s())
        self.audit = Audit(self.folder / "audit.jsonl", now_s)
        #: Told to agents that enrol; known once the tracker listens.
        self.agents_port = 0

    def admin_tls(self) -> Tls:
        """How the owner of the data folder talks to the tracker."""
        return Tls(self.authority.certificate_pem, token=read_private(self.folder / ADMIN_FILE).decode().strip())


class Security:
    """Everything that makes a tracker secure: its keys, its users' tokens and its devices.

    `storage` says where tokens and devices are kept: in files beside the keys, or in the database that trackers share.

    Raises:
        SecretFileError, StoreError: what is kept cannot be read, or is damaged.
    """

    def __init__(
        self,
        keys: Keys,
        storage: Callable[[str], Storage] | None = None,
        *,
        device_lifetime_s: int = LIFETIME_S,
    ) -> None:
        self.keys = keys
        self.shared = storage is not None
        at = storage or (lambda name: FileStorage(keys.folder / name))
        self.now_s, self.authority, self.audit = keys.now_s, keys.authority, keys.audit
        self.tokens = Tokens(at("tokens.json"), keys.now_s)
        self.devices = Devices(at("devices.json"), keys.authority, keys.now_s, device_lifetime_s)
        self.admin_secret = self._admin_secret()
        self._changing = asyncio.Lock()

    async def change(self, work: Callable[[], T], then: Callable[[T], None] = lambda result: None) -> T:
        """Run what reads or writes tokens and devices in a thread, one after the other: shelves may take their time.

        It is done to its end, and `then` called with its result, also where the caller goes away meanwhile.
        """

        async def alone() -> T:
            async with self._changing:
                return await asyncio.get_running_loop().run_in_executor(None, work)

        def finish(done: asyncio.Future[T]) -> None:
            if not done.cancelled() and done.exception() is None:
                then(done.result())

        changing = asyncio.ensure_future(alone())
        try:
            result = await asyncio.shield(changing)
        except asyncio.CancelledError:
            changing.add_done_callback(finish)
            raise
        then(result)
        return result

    @property
    def agents_port(self) -> int:
        """Told to agents that enrol."""
        return self.keys.agents_port

    def _admin_secret(self) -> str:
        """The token of whoever owns the data folder; another one where the last was revoked."""
        path = self.keys.folder / ADMIN_FILE
        try:
            secret = read_private(path).decode().strip()
            self.tokens.check(secret)
        except (FileNotFoundError, AuthenticationError):
            _, secret = self.tokens.create(ADMIN, Role.ADMIN, lifetime_s=0)
            write_private(path, f"{secret}\n".encode())
        return secret

    def admin_tls(self) -> Tls:
        """How the owner of the data folder talks to the tracker."""
        return Tls(self.authority.certificate_pem, token=self.admin_secret)

    def first_join(self, address: Address) -> Join:
        """What a new tracker prints: it lets one device in."""
        _, secret = self.tokens.create(ADMIN, Role.ENROL, lifetime_s=_FIRST_JOIN_S)
        return Join(DEVICE, address, secret, self.authority.certificate_pem)
