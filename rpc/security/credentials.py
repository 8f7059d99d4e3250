"""What a user has of each tracker: a file, mode 0600, with the tracker's addresses, its CA and the user's token.

    ~/.config/kedge/trackers/NAME.json        (KEDGE_CONFIG_DIR or XDG_CONFIG_HOME say otherwise)

`kedge join` writes them; a tracker that runs writes one for the user that started it (NAME-PORT-own.json). NAME tells
trackers apart: it is the beginning of the CA's SHA-256. A tracker that was started with --insecure-loopback has a file
that says so: without it nothing is ever sent in plaintext.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

from kedge.rpc.errors import AuthenticationError
from kedge.rpc.security.files import SecretFileError, make_private_folder, read_private, write_private
from kedge.rpc.security.join import pem_to_der
from kedge.rpc.transport import Address, Tls, parse_address, unreachable

_SUFFIX = ".json"
#: Of files that a running tracker has written.
_OWN = "-own"
_PROBE_S = 3.0


@dataclass(frozen=True)
class Credentials:
    """How to talk to one tracker. `tls` is None for one that speaks plaintext on loopback.

    `own` are those of whoever runs the tracker, which last as long as that runs.
    """

    addresses: Tuple[Address, ...]
    tls: Optional[Tls]
    own: bool = False

    @property
    def path(self) -> Path:
        """The file."""
        if self.tls is None:
            name = f"plaintext-{self.addresses[0].port}"
        else:
            name = hashlib.sha256(pem_to_der(self.tls.ca)).hexdigest()[:16]
            # Several trackers of one fleet may run here.
            name += f"-{self.addresses[0].port}" if self.own else ""
        return _folder() / f"{name}{_OWN if self.own else ''}{_SUFFIX}"

    def save(self) -> Path:
        """Write the file, in place of what was known of this tracker; raises SecretFileError."""
        path = self.path
        make_private_folder(path.parent)
        tree: Dict[str, Any] = {"addresses": [str(address) for address in self.addresses]}
        if self.tls is not None:
            tree["ca"], tree["token"] = self.tls.ca.decode(), self.tls.token
        write_private(path, json.dumps(tree, indent=1).encode())
        return path

    def remove(self) -> None:
        """Forget this tracker, unless the file is another's by now."""
        if self.path.exists() and _read(self.path).addresses[:1] == self.addresses[:1]:
            self.path.unlink()


def config_dir() -> Path:
    """Where a user's own settings lie."""
    own, xdg = os.environ.get("KEDGE_CONFIG_DIR"), os.environ.get("XDG_CONFIG_HOME")
    if own:
        return Path(own)
    try:
        return (Path(xdg) if xdg else Path.home() / ".config") / "kedge"
    except RuntimeError as error:
        raise SecretFileError("this user has no home directory", hint="set KEDGE_CONFIG_DIR to a folder") from error


def _folder() -> Path:
    return config_dir() / "trackers"


def find(address: Address) -> Credentials:
    """The credentials for a tracker, or for one of several: those that were joined with first, and the newest of them.

    Raises:
        ConnectError: there are none, and nobody listens there either.
        AuthenticationError: there are none.
        SecretFileError: a file is damaged, or others may read it.
    """
    there = set(address.each)
    found = [(not known.own, written, known) for written, known in _all() if there & set(known.addresses)]
    if found:
        return max(found, key=lambda item: item[:2])[2]
    _check_somebody_listens(address)
    raise AuthenticationError(
        f"there are no credentials for the tracker at {address}",
        hint="its administrator makes a join string with 'kedge tracker token create'; here: kedge join '…'",
    )


def remember(credentials: Credentials) -> Path:
    """Save credentials, keeping the other addresses under which the same tracker was known."""
    before = _read(credentials.path).addresses if credentials.path.exists() else ()
    addresses = tuple(dict.fromkeys((*credentials.addresses, *before)))
    return replace(credentials, addresses=addresses).save()


def _all() -> Iterator[Tuple[int, Credentials]]:
    """When each was written (nanoseconds), and what it says."""
    for path in sorted(_folder().glob(f"*{_SUFFIX}")):
        try:
            yield path.stat().st_mtime_ns, _read(path)
        except FileNotFoundError:  # a tracker has just stopped
            continue


def _read(path: Path) -> Credentials:
    data = read_private(path)
    try:
        tree = json.loads(data)
        addresses = tuple(parse_address(text) for text in tree["addresses"])
        tls = Tls(tree["ca"].encode(), token=tree["token"]) if "ca" in tree else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecretFileError(f"{path} is damaged", hint=f"remove it, then 'kedge join' again: {path}") from error
    if tls is None and not all(address.is_loopback for address in addresses):
        raise SecretFileError(f"{path} wants plaintext beyond loopback, which never happens", hint=f"remove {path}")
    return Credentials(addresses, tls, own=path.stem.endswith(_OWN))


def _check_somebody_listens(address: Address) -> None:
    failed: Optional[OSError] = None
    for each in address.each:
        try:
            socket.create_connection((each.host, each.port), timeout=_PROBE_S).close()
        except OSError as error:
            failed = error
        else:
            return
    assert failed is not None
    raise unreachable(address, failed.strerror or str(failed)) from failed
