"""Logging in: against the emulated board's real SSH server, and nothing at all where there is none."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import paramiko
import pytest

from kedge.deploy import ssh
from kedge.deploy.emulated import EmulatedBoard
from kedge.deploy.errors import (
    AuthenticationError,
    BoardAddressError,
    DeployError,
    HostKeyChangedError,
    HostKeyUnknownError,
    RemoteCommandError,
)
from kedge.rpc.errors import ConnectError
from support.boards import BOARDS_CACHE, destination, require


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("target", "user", "host", "port"),
    [
        ("pi@raspberry", "pi", "raspberry", 22),
        ("pi@raspberry:2222", "pi", "raspberry", 2222),
        ("raspberry", getpass.getuser(), "raspberry", 22),
        ("pi@fe80::1", "pi", "fe80::1", 22),
        ("pi@[fe80::1]:2222", "pi", "fe80::1", 2222),
    ],
)
def test_targets(tmp_path: Path, target: str, user: str, host: str, port: int) -> None:
    found = ssh.resolve(target, config=written(tmp_path / "config", ""))
    assert (found.user, found.host, found.port) == (user, host, port)


@pytest.mark.parametrize(
    "target", ["", "pi@", "pi@host:0", "pi@host:70000", "pi@host:ssh", "pi@a..b", f"pi@{'x' * 64}.lab"]
)
def test_targets_that_are_none(tmp_path: Path, target: str) -> None:
    with pytest.raises(BoardAddressError, match="no address of a board") as refused:
        ssh.resolve(target, config=written(tmp_path / "config", ""))
    assert refused.value.exit_status == 2


def test_a_folder_of_host_keys_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BoardAddressError, match="is a folder"):
        ssh.resolve("pi@host", config=written(tmp_path / "config", ""), known_hosts=tmp_path)


@pytest.mark.parametrize("port", ["abc", "0", "70000"])
def test_a_configured_port_that_is_none(tmp_path: Path, port: str) -> None:
    with pytest.raises(ConnectError, match=f"config has a port '{port}'"):
        ssh.resolve("board", config=written(tmp_path / "config", f"Host board\n  Port {port}\n"))


def test_files_of_another_encoding(tmp_path: Path) -> None:
    latin = tmp_path / "latin"
    latin.write_bytes("Host b\xfcro\n".encode("latin-1"))
    with pytest.raises(ConnectError, match="latin cannot be read"):
        ssh.resolve("board", config=latin)
    with pytest.raises(ConnectError, match=r"the host keys in .*latin cannot be read"):
        ssh.connect(nowhere(1, known_hosts=(latin,)))


def test_the_configuration_is_followed_and_arguments_win(tmp_path: Path) -> None:
    config = written(
        tmp_path / "config",
        "Host lab-*\n  User tester\n  Port 2200\n  IdentityFile ~/.ssh/lab\n  UserKnownHostsFile /etc/lab_hosts\n"
        "Host lab-1\n  HostName 10.1.2.3\n  IdentitiesOnly yes\n",
    )
    found = ssh.resolve("lab-1", config=config)
    assert (found.user, found.host, found.port, found.only_identities) == ("tester", "10.1.2.3", 2200, True)
    assert found.identities == (Path.home() / ".ssh" / "lab",)
    assert found.known_hosts == (Path("/etc/lab_hosts"),)
    over = ssh.resolve("me@lab-1:22", config=config, identity=Path("/k"), known_hosts=Path("/h"))
    assert (over.user, over.port, over.identities, over.known_hosts) == ("me", 22, (Path("/k"),), (Path("/h"),))


@pytest.mark.parametrize("option", ["ProxyJump gate", "ProxyCommand nc %h %p"])
def test_jump_hosts_are_refused_by_name(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConnectError, match=option.split()[1]):
        ssh.resolve("board", config=written(tmp_path / "config", f"Host board\n  {option}\n"))


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="cannot be read"):
        ssh.resolve("board", config=tmp_path / "missing")


def nowhere(port: int, **changes: object) -> ssh.Destination:
    where = ssh.Destination("127.0.0.1", port, "x", (), False, (Path("/dev/null"),))
    return dataclasses.replace(where, **changes)  # type: ignore[arg-type]


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectError, match=f"nothing answers at 127.0.0.1 port {port}"):
        ssh.connect(nowhere(port))


def test_no_such_name() -> None:
    with pytest.raises(ConnectError, match=r"board\.invalid cannot be resolved"):
        ssh.connect(nowhere(22, host="board.invalid"))


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(ConnectError):
            ssh.connect(nowhere(server.getsockname()[1]), timeout_s=0.5)
        assert time.monotonic() - began < 10


def test_something_that_is_no_ssh_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectError):
            ssh.connect(nowhere(server.getsockname()[1]), timeout_s=2)
        thread.join()


@pytest.mark.board
class TestOnABoard:
    """Everything that needs an SSH server on the other side."""

    def test_an_unknown_host_key_is_refused_with_what_to_do(self, arm64: EmulatedBoard, tmp_path: Path) -> None:
        hosts = tmp_path / "known hosts"
        where = dataclasses.replace(destination(arm64), known_hosts=(hosts,))
        with pytest.raises(HostKeyUnknownError) as refused:
            ssh.connect(where)
        key = paramiko.ECDSAKey.from_private_key_file(str(arm64.folder / "host_key"))
        assert key.fingerprint in refused.value.message
        assert "`ssh-keygen -lf /etc/ssh/ssh_host_ecdsa_key.pub`" in str(refused.value.hint)
        assert f"ssh-keyscan -p {arm64.port} -t ecdsa 127.0.0.1 >> '{hosts}'" in str(refused.value.hint)
        assert not hosts.exists()

    def test_the_line_of_the_hint_works(self, arm64: EmulatedBoard, tmp_path: Path) -> None:
        if shutil.which("ssh-keyscan") is None:
            pytest.skip("no ssh-keyscan here")
        hosts = tmp_path / "known_hosts"
        where = dataclasses.replace(destination(arm64), known_hosts=(hosts,))
        with pytest.raises(HostKeyUnknownError) as refused:
            ssh.connect(where)
        line = str(refused.value.hint).partition("add it: ")[2]
        subprocess.run(["sh", "-c", line], check=True, capture_output=True, timeout=60)
        ssh.connect(where).close()

    def test_a_changed_host_key_is_refused_loudly(self, arm64: EmulatedBoard, tmp_path: Path) -> None:
        other = paramiko.ECDSAKey.generate()
        line = f"[127.0.0.1]:{arm64.port} {other.get_name()} {other.get_base64()}\n"
        where = dataclasses.replace(destination(arm64), known_hosts=(written(tmp_path / "hosts", line),))
        with pytest.raises(HostKeyChangedError, match="HAS CHANGED") as refused:
            ssh.connect(where)
        assert other.fingerprint in refused.value.message
        assert f"ssh-keygen -R '[127.0.0.1]:{arm64.port}'" in str(refused.value.hint)

    def test_a_key_that_the_board_does_not_know(self, arm64: EmulatedBoard, tmp_path: Path) -> None:
        paramiko.ECDSAKey.generate().write_private_key_file(str(tmp_path / "key"))
        where = dataclasses.replace(destination(arm64), identities=(tmp_path / "key",))
        with pytest.raises(AuthenticationError) as refused:
            ssh.connect(where)
        assert str(tmp_path / "key") in refused.value.message
        assert f"ssh-copy-id -p {arm64.port} board@127.0.0.1" in str(refused.value.hint)

    def test_a_key_that_does_not_exist(self, arm64: EmulatedBoard, tmp_path: Path) -> None:
        where = dataclasses.replace(destination(arm64), identities=(tmp_path / "no",))
        with pytest.raises(AuthenticationError, match="does not exist"):
            ssh.connect(where)

    def test_a_key_with_a_passphrase_is_named(self, arm64: EmulatedBoard, tmp_path: Path) -> None:
        paramiko.ECDSAKey.generate().write_private_key_file(str(tmp_path / "key"), password="secret")
        where = dataclasses.replace(destination(arm64), identities=(tmp_path / "key",))
        with pytest.raises(AuthenticationError, match="has a passphrase"):
            ssh.connect(where)

    def test_the_ssh_agents_keys_are_offered(
        self, arm64: EmulatedBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if shutil.which("ssh-agent") is None:
            pytest.skip("no ssh-agent here")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        where = dataclasses.replace(destination(arm64), identities=(), only_identities=False)
        with subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.PIPE) as agent:
            assert agent.stdout is not None
            agent.stdout.readline()
            with pytest.raises(AuthenticationError, match="no key to log in"):
                ssh.connect(where)
            subprocess.run(["ssh-add", "-q", arm64.key_path], check=True)
            with ssh.connect(where) as connection:
                assert connection.run(["id", "-un"]).stdout == "board\n"
            agent.terminate()

    def test_arguments_arrive_as_they_are(self, arm64: EmulatedBoard) -> None:
        nasty = ["a b", "$HOME", "`id`", "'", '"', "", "*", "; rm -rf /", "ü\n-n"]
        with ssh.connect(destination(arm64)) as connection:
            done = connection.run(["printf", "%s\\0", *nasty])
        assert done.stdout.split("\0")[:-1] == nasty

    def test_both_streams_and_large_inputs(self, arm64: EmulatedBoard) -> None:
        data = os.urandom(1 << 20).hex().encode()
        with ssh.connect(destination(arm64)) as connection:
            done = connection.run(["sh", "-c", "tee /dev/stderr | wc -c"], stdin=data)
        assert done.stderr.encode() == data
        assert int(done.stdout) == len(data)

    def test_a_failing_command_tells_what_it_said(self, arm64: EmulatedBoard) -> None:
        with ssh.connect(destination(arm64)) as connection:
            with pytest.raises(RemoteCommandError, match="status 7: too bad") as failed:
                connection.run(["sh", "-c", "echo too bad >&2; exit 7"])
            assert failed.value.status == 7
            assert connection.run(["sh", "-c", "exit 7"], check=False).status == 7

    def test_a_command_that_does_not_end(self, arm64: EmulatedBoard) -> None:
        with ssh.connect(destination(arm64)) as connection:
            with pytest.raises(DeployError, match="sleep 77 was not done after"):
                connection.run(["sleep", "77"], timeout_s=0.5)
            # The connection is still good.
            assert connection.run(["echo", "on"]).stdout == "on\n"

    def test_a_file_appears_whole(self, arm64: EmulatedBoard, tmp_path: Path) -> None:
        data = os.urandom(3_000_000)
        seen: list[tuple[int, int]] = []
        with ssh.connect(destination(arm64)) as connection:
            connection.run(["mkdir", "-p", "/home/board/files"])
            source = tmp_path / "source"
            source.write_bytes(data)
            connection.put(b"old", "/home/board/files/x y")
            connection.put(
                source, "/home/board/files/x y", mode=0o750, transferred=lambda sent, total: seen.append((sent, total))
            )
            listing = connection.run(["sh", "-c", "cd ~/files && ls -A && stat -c '%a %s' * && sha256sum *"]).stdout
            connection.run(["rm", "-r", "/home/board/files"])
        assert listing.splitlines() == ["x y", f"750 {len(data)}", f"{hashlib.sha256(data).hexdigest()}  x y"]
        assert seen[-1] == (len(data), len(data))

    def test_a_file_that_cannot_be_written_leaves_nothing(self, arm64: EmulatedBoard) -> None:
        with ssh.connect(destination(arm64)) as connection:
            with pytest.raises(DeployError, match="/usr/bin/x"):
                connection.put(b"data", "/usr/bin/x")
            with pytest.raises(DeployError, match=r"/dev/full-disk/x"):
                connection.put(b"data", "/dev/full-disk/x")

    def test_a_board_whose_disk_is_full(self, tmp_path: Path) -> None:
        require("arm64")
        with (
            EmulatedBoard("arm64", BOARDS_CACHE, disk_mb=4) as small,
            ssh.connect(destination(small)) as connection,
        ):
            connection.put(b"old", "/home/board/file")
            with pytest.raises(DeployError, match=r"8\.0 MB") as refused:
                connection.put(bytes(8_000_000), "/home/board/file")
            assert "df -h" in str(refused.value.hint)
            assert connection.run(["cat", "/home/board/file"]).stdout == "old"
            assert connection.run(["ls", "-A", "/home/board"]).stdout.split() == [".ssh", "file"]

    def test_a_lost_connection_is_an_error(self, arm64: EmulatedBoard) -> None:
        connection = ssh.connect(destination(arm64))
        connection.close()
        with pytest.raises(ConnectError, match="is lost"):
            connection.run(["true"])
