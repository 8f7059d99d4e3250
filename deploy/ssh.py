"""SSH to a board: strict host keys, key login, commands with deadlines, files that appear whole.

Only this module knows paramiko. What `~/.ssh/config` says about `HostName`, `Port`, `User`, `IdentityFile`,
`IdentitiesOnly` and `UserKnownHostsFile` is followed; a jump host is refused by name rather than ignored.
"""

from __future__ import annotations

import contextlib
import getpass
import io
import logging
import posixpath
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import paramiko
from paramiko.auth_strategy import AuthStrategy
from paramiko.pkey import UnknownKeyType
from paramiko.ssh_exception import NoValidConnectionsError

from kedge.deploy.errors import (
    AuthenticationError,
    BoardAddressError,
    DeployError,
    HostKeyChangedError,
    HostKeyUnknownError,
    RemoteCommandError,
)
from kedge.rpc.errors import ConnectError

# What it would print, traceback included, is said by our errors; whoever sets up logging still sees it.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

_KEEPALIVE_S = 15
_DEFAULT_CONFIG = Path("~/.ssh/config")
_DEFAULT_KNOWN_HOSTS = Path("~/.ssh/known_hosts")
_SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")

Transferred = Callable[[int, int], None]
"""Told (bytes sent, bytes in all) while a file travels."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where to log in, and what with; everything already resolved."""

    host: str
    port: int
    user: str
    identities: tuple[Path, ...]
    only_identities: bool
    known_hosts: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" + (f":{self.port}" if self.port != 22 else "")


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command on the board left."""

    status: int
    stdout: str
    stderr: str


def resolve(
    target: str, *, identity: Path | None = None, config: Path | None = None, known_hosts: Path | None = None
) -> Destination:
    """Read `[USER@]HOST[:PORT]`, completed from the SSH configuration. Arguments win over the file.

    Raises:
        BoardAddressError: it is no address, or `known_hosts` no file.
        ConnectError: the configuration cannot be read, or asks for what is not done.
    """
    if known_hosts is not None and known_hosts.is_dir():
        raise BoardAddressError(f"{known_hosts} is a folder, no file of host keys", hint="name the file in it")
    user, _, rest = target.rpartition("@")
    name, port = _split_port(rest, target)
    path = (config if config is not None else _DEFAULT_CONFIG).expanduser()
    found = _lookup(path, name) if config is not None or path.is_file() else {"hostname": name}
    for option in ("proxyjump", "proxycommand"):
        if found.get(option, "none") != "none":
            raise ConnectError(
                f"{path} reaches {name} through {option} {found[option]}, which kedge does not do",
                hint=f"forward a port yourself: ssh -L 2222:{found['hostname']}:22 …, then deploy to 127.0.0.1:2222",
            )
    _check_host(found["hostname"], target)
    identities = [identity] if identity is not None else [Path(each) for each in found.get("identityfile", [])]
    hosts = [str(known_hosts)] if known_hosts is not None else found.get("userknownhostsfile", "").split()
    return Destination(
        host=found["hostname"],
        port=port or _port(found.get("port", "22"), path),
        user=user or found.get("user") or getpass.getuser(),
        identities=tuple(each.expanduser() for each in identities),
        only_identities=identity is not None or found.get("identitiesonly", "no") == "yes",
        known_hosts=tuple(Path(each).expanduser() for each in hosts or [str(_DEFAULT_KNOWN_HOSTS)]),
    )


def _split_port(rest: str, target: str) -> tuple[str, int | None]:
    name, colon, port = rest.rpartition(":")
    if not colon or (":" in name and not name.endswith("]")):
        name, port = rest, ""
    name = name.removeprefix("[").removesuffix("]")
    if not name or (port and not (port.isdigit() and 0 < int(port) < 65536)):
        raise _no_address(target)
    return name, int(port) if port else None


def _check_host(host: str, target: str) -> None:
    try:
        host.encode("idna")
    except UnicodeError as error:  # `a..b`, or more than 63 letters between two dots
        raise _no_address(target) from error


def _no_address(target: str) -> BoardAddressError:
    return BoardAddressError(f"{target!r} is no address of a board", hint="write USER@HOST or USER@HOST:PORT")


def _port(text: str, config: Path) -> int:
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise ConnectError(f"the SSH configuration {config} has a port {text!r}, which is no number from 1 to 65535")
    return int(text)


def _lookup(path: Path, name: str) -> paramiko.SSHConfigDict:
    try:
        return paramiko.SSHConfig.from_path(str(path)).lookup(name)
    except (OSError, UnicodeDecodeError, paramiko.ConfigParseError) as error:
        raise ConnectError(f"the SSH configuration {path} cannot be read: {error}") from error


class _Refuse(paramiko.MissingHostKeyPolicy):
    """Turns an unknown host key into an error that says how to check it and how to add it."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        where = self._destination
        port = f"-p {where.port} " if where.port != 22 else ""
        kind = key.get_name().removeprefix("ssh-").split("-")[0]
        raise HostKeyUnknownError(
            f"the host key of {where} is not in {where.known_hosts[0]}: {key.get_name()} {key.fingerprint}",
            hint=f"if that is what `ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub` prints on the board, add it: "
            f"ssh-keyscan {port}-t {kind} {shlex.quote(where.host)} >> {shlex.quote(str(where.known_hosts[0]))}",
        )


class _KeyLogin:
    """Offers the configured keys, the SSH agent's, then the default ones, until the board accepts one.

    paramiko's own order of trying hides why a login failed: this one remembers what was offered and what was not.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._offered: list[str] = []
        self._unusable: list[str] = []

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Log in, or raise `AuthenticationError`; called by paramiko once the host key is accepted."""
        agent = paramiko.Agent()
        try:
            for name, key in self._keys(agent):
                self._offered.append(name)
                try:
                    transport.auth_publickey(self._destination.user, key)
                except paramiko.AuthenticationException:
                    continue
                return
        finally:
            agent.close()
        raise self._refused()

    def _keys(self, agent: paramiko.Agent) -> Iterator[tuple[str, paramiko.PKey]]:
        where = self._destination
        yield from self._files(where.identities)
        if not where.only_identities:
            for key in agent.get_keys():
                yield f"the SSH agent's {key.get_name()} key", key
            yield from self._files(
                [path for path in _default_keys() if path.is_file() and path not in where.identities]
            )

    def _files(self, paths: Sequence[Path]) -> Iterator[tuple[str, paramiko.PKey]]:
        for path in paths:
            try:
                key = paramiko.PKey.from_path(path)
            except FileNotFoundError:
                self._unusable.append(f"{path} does not exist")
            except (paramiko.PasswordRequiredException, TypeError):
                self._unusable.append(f"{path} has a passphrase (ssh-add it first)")
            except (paramiko.SSHException, UnknownKeyType, OSError, ValueError) as error:
                self._unusable.append(f"{path} cannot be read: {error}")
            else:
                yield str(path), key

    def _refused(self) -> AuthenticationError:
        where = self._destination
        option = f"-p {where.port} " if where.port != 22 else ""
        hint = f"install your key on the board: ssh-copy-id {option}{where.user}@{where.host}"
        unusable = "".join(f"; {reason}" for reason in self._unusable)
        if not self._offered:
            return AuthenticationError(f"there is no key to log in to {where} with{unusable}", hint=hint)
        return AuthenticationError(
            f"{where} refuses every key offered: {', '.join(self._offered)}{unusable}", hint=hint
        )


def _default_keys() -> tuple[Path, ...]:
    paths = (Path("~/.ssh").expanduser() / f"id_{kind}" for kind in ("ed25519", "ecdsa", "rsa"))
    return tuple(path for path in paths if path.is_file())


class Connection:
    """An SSH connection to one board. A context manager; every call has a deadline."""

    def __init__(self, client: paramiko.SSHClient, destination: Destination) -> None:
        self.destination = destination
        self._client = client
        self._sftp: paramiko.SFTPClient | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; what was started detached goes on."""
        self._client.close()

    def run(
        self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0, check: bool = True
    ) -> Completed:
        """Run one program with exactly these arguments and wait for it.

        Raises `RemoteCommandError` if it fails (unless `check` is false), `DeployError` if it is not done in time.
        """
        process = self.start(command, stdin)
        completed = process.wait(timeout_s)
        if completed is None:
            process.close()
            raise DeployError(f"{self.destination}: {_brief(command)} was not done after {timeout_s:.0f} s")
        if check and completed.status != 0:
            said = completed.stderr.strip() or completed.stdout.strip()
            raise RemoteCommandError(
                f"{self.destination}: {_brief(command)} ended with status {completed.status}: {said[-2000:]}",
                status=completed.status,
                stdout=completed.stdout,
                stderr=completed.stderr,
            )
        return completed

    def start(self, command: Sequence[str], stdin: bytes = b"", *, keep_open: bool = False) -> RemoteProcess:
        """Start a program and return at once; it is not detached from this connection.

        With `keep_open` its standard input stays open after `stdin`, until `finish` or the end of the connection.
        """
        transport = self._client.get_transport()
        if transport is None or not transport.is_active():
            raise ConnectError(f"the connection to {self.destination} is lost")
        try:
            channel = transport.open_session(timeout=30)
            channel.exec_command(shlex.join(command))
        except (paramiko.SSHException, OSError) as error:
            raise ConnectError(f"{self.destination}: {_brief(command)} could not be started: {error}") from error
        return RemoteProcess(channel, stdin, keep_open=keep_open)

    def put(
        self, source: Path | bytes, remote: str, *, mode: int = 0o644, transferred: Transferred | None = None
    ) -> None:
        """Write a file on the board by SFTP. It appears under its name only when it is complete."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        part = posixpath.join(posixpath.dirname(remote), f".{posixpath.basename(remote)}.part")
        try:
            if self._sftp is None:
                self._sftp = self._client.open_sftp()
            with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
                self._sftp.putfo(stream, part, file_size=size, callback=transferred)
            self._sftp.chmod(part, mode)
            self._sftp.posix_rename(part, remote)
        except (paramiko.SSHException, OSError, EOFError) as error:
            with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
                if self._sftp is not None:
                    self._sftp.remove(part)
            raise DeployError(
                f"{self.destination}: {remote} ({size / 1e6:.1f} MB) could not be written: {error}",
                hint="is the board's disk full (df -h ~), and does its SSH server offer SFTP?",
            ) from error


class RemoteProcess:
    """A program that runs on the board as long as its connection lives."""

    def __init__(self, channel: paramiko.Channel, stdin: bytes, *, keep_open: bool) -> None:
        self._channel = channel
        self._keep_open = keep_open
        self._output = bytearray()
        self._errors = bytearray()
        self._arrived = threading.Condition()
        self._open_streams = 2
        self._threads = [
            threading.Thread(target=self._drain, args=(channel.recv, self._output), daemon=True),
            threading.Thread(target=self._drain, args=(channel.recv_stderr, self._errors), daemon=True),
            threading.Thread(target=self._feed, args=(stdin,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float) -> Completed | None:
        """What the program left, or None if it still runs after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                return None
        if not self._channel.status_event.wait(max(0.0, deadline - time.monotonic())):
            return None
        text = (bytes(part).decode(errors="replace") for part in (self._output, self._errors))
        # -1: the connection broke before the board told a status.
        return Completed(self._channel.recv_exit_status(), *text)

    def read_line(self, timeout_s: float) -> str:
        """The first line that the program writes, or all that it wrote if it ends or is late; stderr included then."""
        with self._arrived:
            self._arrived.wait_for(lambda: b"\n" in self._output or not self._open_streams, timeout_s)
            line, newline, _ = bytes(self._output).partition(b"\n")
        if newline:
            return line.decode(errors="replace")
        return bytes(self._output + self._errors).decode(errors="replace").strip()

    def finish(self, timeout_s: float) -> Completed | None:
        """Close the program's standard input, which tells it to end, and wait until it has; then `close`.

        None if it still ran after `timeout_s` seconds.
        """
        with contextlib.suppress(OSError):
            self._channel.shutdown_write()
        completed = self.wait(timeout_s)
        self.close()
        return completed

    def close(self) -> None:
        """Stop listening to the program; sshd hangs it up."""
        self._channel.close()

    def _feed(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            # The program may end without reading everything: its status tells, not the broken pipe.
            self._channel.sendall(data)
            if not self._keep_open:
                self._channel.shutdown_write()

    def _drain(self, receive: Callable[[int], bytes], into: bytearray) -> None:
        while chunk := receive(65536):
            with self._arrived:
                into += chunk
                self._arrived.notify_all()
        with self._arrived:
            self._open_streams -= 1
            self._arrived.notify_all()


def connect(destination: Destination, *, timeout_s: float = 15.0) -> Connection:
    """Log in. Raises a `ConnectError` that tells apart: no such host, refused, time, host key, login."""
    client = paramiko.SSHClient()
    for path in (*destination.known_hosts, _SYSTEM_KNOWN_HOSTS):
        if path.is_file():
            _load_host_keys(client, path)
    client.set_missing_host_key_policy(_Refuse(destination))
    try:
        client.connect(
            destination.host,
            destination.port,
            destination.user,
            timeout=timeout_s,
            banner_timeout=timeout_s,
            auth_timeout=timeout_s,
            auth_strategy=cast(AuthStrategy, _KeyLogin(destination)),
        )
    except ConnectError:
        client.close()
        raise
    except (paramiko.SSHException, OSError, EOFError) as error:
        client.close()
        raise _explain(error, destination, timeout_s) from error
    transport = client.get_transport()
    assert transport is not None
    transport.set_keepalive(_KEEPALIVE_S)
    return Connection(client, destination)


def _load_host_keys(client: paramiko.SSHClient, path: Path) -> None:
    try:
        client.load_system_host_keys(str(path))
    except (OSError, ValueError, paramiko.SSHException) as error:
        raise ConnectError(
            f"the host keys in {path} cannot be read: {error}", hint="ssh-keyscan HOST prints what belongs in it"
        ) from error


def _explain(error: Exception, destination: Destination, timeout_s: float) -> ConnectError:
    """The error that a user should see."""
    host, port = destination.host, destination.port
    match error:
        case paramiko.BadHostKeyException():
            return HostKeyChangedError(
                f"THE HOST KEY OF {destination} HAS CHANGED: it presents {error.key.get_name()} "
                f"{error.key.fingerprint}, known_hosts has {error.expected_key.get_name()} "
                f"{error.expected_key.fingerprint}. "
                "Somebody may be listening, or the board was installed anew. Nothing was sent to it",
                hint=f"only if you know why: ssh-keygen -R {shlex.quote(host if port == 22 else f'[{host}]:{port}')}, "
                "then add the new key",
            )
        case socket.gaierror():
            return ConnectError(f"the name {host} cannot be resolved: {error.strerror}")
        case NoValidConnectionsError() | ConnectionRefusedError():
            return ConnectError(
                f"nothing answers at {host} port {port}",
                hint="is the board on, and does its SSH server listen on that port?",
            )
        case TimeoutError():
            return ConnectError(f"{host} port {port} did not answer within {timeout_s:.0f} s", hint=f"ping {host}")
        case _:
            return ConnectError(f"no SSH connection to {destination}: {error or type(error).__name__}")


def _brief(command: Sequence[str]) -> str:
    text = shlex.join(command)
    return text if len(text) <= 120 else text[:117] + "..."
