"""A real Python 3.9, from Debian 11's packages, with the newest grpcio and protobuf that have wheels for it.

Fetched once into the cache by a private apt root; nothing on the host changes. The interpreter runs
in place, through its own dynamic loader, so that neither root nor a chroot is needed.
"""

from __future__ import annotations

import os
import platform
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from kedge.compiler.toolchain import cache_dir
from kedge.deploy.bundle import agent_site
from kedge.deploy.cachedir import build_once
from kedge.deploy.emulated.sources import debian_release
from kedge.deploy.emulated.userland import fetch_userland
from kedge.rpc.errors import KedgeError
from support.boards import BOARDS_CACHE, DEPLOY_CACHE

GLIBC_OF_BULLSEYE = (2, 31)


@dataclass(frozen=True)
class Python39:
    """An interpreter of its own system: `command` runs it, `environment` lets it find its library and packages."""

    system: Path
    site: Path

    @property
    def command(self) -> list[str]:
        """The start of a command line."""
        libraries = ":".join(str(self.system / folder) for folder in ("usr/lib/x86_64-linux-gnu", "usr/lib"))
        loader = self.system / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
        return [str(loader.resolve()), "--library-path", libraries, str(self.system / "usr/bin/python3.9")]

    def environment(self, *path: Path) -> dict[str, str]:
        """The variables to run with; `path` goes before the installed packages."""
        kept = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
        search = ":".join(str(folder) for folder in (*path, self.site))
        return {**kept, "PYTHONHOME": str(self.system / "usr"), "PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *arguments: str, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run it to its end, away from the checkout, whose folders Python would otherwise import from."""
        command = [*self.command, *arguments]
        return subprocess.run(
            command, env=self.environment(*path), cwd=self.site, capture_output=True, text=True, check=False
        )


def fetch_python39() -> Python39:
    """The interpreter, fetched if need be; raises KedgeError where that is impossible."""
    system = fetch_userland(BOARDS_CACHE, "amd64", debian_release("bullseye"))
    site = agent_site(DEPLOY_CACHE, "x86_64", GLIBC_OF_BULLSEYE, (3, 9))

    def unpack(folder: Path) -> None:
        with tarfile.open(site.archive) as archive:
            archive.extractall(folder, filter="data")

    return Python39(system, build_once(cache_dir() / "tests" / f"site-cp39-{site.digest}", unpack))


@pytest.fixture(scope="session")
def python39() -> Python39:
    """A real Python 3.9; skips, and in CI fails, where it cannot be had."""
    try:
        if platform.machine() != "x86_64":
            raise KedgeError(f"Debian 11's Python 3.9 is fetched for x86_64, this is {platform.machine()}")
        return fetch_python39()
    except (KedgeError, FileNotFoundError) as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no Python 3.9 here: {error}")
