"""Where this machine's own distribution keeps its packages for another architecture."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kedge.deploy.errors import EmulationError

_KEYRINGS = {
    "debian": Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    "ubuntu": Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
}
_UBUNTU_PORTS = "http://ports.ubuntu.com/ubuntu-ports"


@dataclass(frozen=True, slots=True)
class Distribution:
    """A release whose packages make up a user land.

    `mirrors` are pairs of a repository's URI and a suite in it; the component is always `main`.
    """

    name: str
    codename: str
    mirrors: tuple[tuple[str, str], ...]
    keyring: Path | None

    def sources_list(self) -> str:
        """The text of a `sources.list`."""
        signed = f"[signed-by={self.keyring}] " if self.keyring else ""
        return "".join(f"deb {signed}{uri} {suite} main\n" for uri, suite in self.mirrors)


def read_sources() -> tuple[tuple[str, str], ...]:
    """The (URI, suite) pairs of component `main` that this machine's apt is configured with."""
    done = subprocess.run(
        ["apt-get", "indextargets", "--no-release-info", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise EmulationError(f"apt-get cannot read this machine's package sources: {done.stderr.strip()}")
    found = (line.split() for line in done.stdout.splitlines())
    return tuple(dict.fromkeys((f[0].rstrip("/"), f[1]) for f in found if len(f) == 3 and f[2] == "main"))


def host_distribution(
    arch: str,
    *,
    os_release: dict[str, str] | None = None,
    sources: Iterable[tuple[str, str]] | None = None,
) -> Distribution:
    """The distribution of this machine, from its own mirrors, for Debian architecture `arch`.

    Only the release itself counts: no third-party repository, and no update suites, which change by the hour and
    which a board that lives for minutes on the loopback interface can do without. Raises `EmulationError` where
    this machine is neither Debian nor Ubuntu.
    """
    release = os_release if os_release is not None else platform.freedesktop_os_release()
    name, codename = release.get("ID", "linux"), release.get("VERSION_CODENAME", "")
    if name not in _KEYRINGS or not codename:
        raise EmulationError(
            f"an emulated board is built from Debian's or Ubuntu's packages, and this machine runs {name}",
            hint="run on Debian or Ubuntu, or use a real board: kedge deploy board USER@HOST",
        )
    ours = [
        (uri, suite)
        for uri, suite in (sources if sources is not None else read_sources())
        if suite == codename and urlsplit(uri).path.rstrip("/").rsplit("/", 1)[-1] in (name, f"{name}-ports")
    ]
    if name == "ubuntu":
        ours = _ubuntu_elsewhere(arch, release.get("VERSION_ID", ""), ours)
    if not ours:
        raise EmulationError(
            f"this machine's apt has no source for {name} {codename} main",
            hint=f"add {name}'s own mirror to /etc/apt/sources.list.d",
        )
    keyring = _KEYRINGS[name]
    return Distribution(name, codename, tuple(dict.fromkeys(ours)), keyring if keyring.is_file() else None)


def debian_release(codename: str) -> Distribution:
    """Another Debian release than the host's, from the host's own Debian mirror (to get an older Python)."""
    host = host_distribution("arm64")
    if host.name != "debian":
        raise EmulationError(f"Debian {codename} can only be fetched on Debian, this machine runs {host.name}")
    return Distribution("debian", codename, tuple((uri, codename) for uri, _ in host.mirrors), host.keyring)


def _ubuntu_elsewhere(arch: str, version: str, ours: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Ubuntu keeps ARM on another host than x86; arm64 moved to the main archive with 26.04."""
    year = int(version.split(".")[0] or 0) if version.split(".")[0].isdigit() else 0
    if arch in ("amd64", "i386") or (arch == "arm64" and year >= 26):
        return ours
    return [(_UBUNTU_PORTS, suite) for _, suite in ours]
