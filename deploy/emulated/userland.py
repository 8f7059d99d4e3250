"""A Debian or Ubuntu user land for another architecture, fetched without touching the host's package system."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from kedge.deploy.cachedir import Progress, build_once, silent
from kedge.deploy.emulated.sources import Distribution
from kedge.deploy.errors import FetchError

PACKAGES = (
    *("base-files", "bash", "coreutils", "dash", "debianutils", "findutils", "grep", "gzip", "hostname", "libc-bin"),
    *("libstdc++6", "mawk", "openssh-server", "openssh-sftp-server", "procps", "python3", "sed", "tar", "util-linux"),
)
"""What a small board's system has, a C++ runtime for grpcio, and an SSH server."""

_RECIPE = 3
"""Part of the name of a cached user land: raise it when what is built below changes."""

_NEVER_READ = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/i18n", "var/cache")


@dataclass(frozen=True, slots=True)
class _Apt:
    """An apt that sees one architecture, one list of sources and a system with nothing installed."""

    root: Path
    arch: str
    distribution: Distribution

    def prepare(self) -> None:
        for folder in ("lists/partial", "archives/partial"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        (self.root / "sources.list").write_text(self.distribution.sources_list())
        (self.root / "apt.conf").write_text(self._config())

    def _config(self) -> str:
        # Read after the host's own configuration, so a proxy set there still applies; its hooks must not run.
        settings = {
            "APT::Architecture": self.arch,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "APT::Get::Assume-Yes": "true",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "APT::Update::Error-Mode": "any",
            "Dir::Etc::SourceList": self.root / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::State": self.root,
            "Dir::State::status": self.root / "status",
            "Dir::State::Lists": self.root / "lists",
            "Dir::Cache": self.root,
            "Dir::Cache::archives": self.root / "archives",
        }
        lines = [
            "#clear APT::Architectures;",
            "#clear APT::Update;",
            "#clear DPkg;",
            "#clear Acquire::IndexTargets::deb::DEP-11;",
        ]
        lines += [f'{key} "{value}";' for key, value in settings.items()]
        lines.append(f'APT::Architectures {{ "{self.arch}"; }};')
        return "\n".join(lines) + "\n"

    def run(self, *arguments: str) -> str:
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            ["apt-get", "-q", "-c", str(self.root / "apt.conf"), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode != 0:
            complaints = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))][:4]
            mirrors = ", ".join(dict.fromkeys(uri for uri, _ in self.distribution.mirrors))
            raise FetchError(
                f"apt-get {arguments[0]} failed for {self.distribution.name} {self.distribution.codename} {self.arch}: "
                + (" | ".join(complaints) or f"status {done.returncode}"),
                hint=f"is {mirrors} reachable from here, and does it carry {self.arch}?",
            )
        return done.stdout


def userland_path(cache_dir: Path, arch: str, distribution: Distribution, packages: Sequence[str] = PACKAGES) -> Path:
    """Where the user land for `arch` lies, or will lie. Names its inputs: another recipe is another folder."""
    recipe = json.dumps([_RECIPE, list(packages), asdict(distribution)], default=str)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:10]
    return cache_dir / "userland" / f"{distribution.codename}-{arch}-{digest}"


def fetch_userland(
    cache_dir: Path,
    arch: str,
    distribution: Distribution,
    progress: Progress = silent,
    *,
    packages: Sequence[str] = PACKAGES,
) -> Path:
    """The unpacked user land for Debian architecture `arch`; fetched on the first call, no network afterwards.

    It is made of `packages` and what they depend on. apt checks the signatures of the indices and the hashes of the
    packages. Maintainer scripts are not run. Raises `FetchError`.
    """
    final = userland_path(cache_dir, arch, distribution, packages)

    def build(folder: Path) -> None:
        apt = _Apt(folder / ".apt", arch, distribution)
        apt.prepare()
        progress(f"reading the package index of {distribution.name} {distribution.codename} for {arch}")
        apt.run("update")
        progress(f"fetching an {arch} system: {len(packages)} packages and what they need")
        apt.run("install", "--download-only", *packages)
        archives = sorted((apt.root / "archives").glob("*.deb"))
        size_mb = sum(archive.stat().st_size for archive in archives) / 1e6
        progress(f"unpacking {len(archives)} packages, {size_mb:.0f} MB")
        unpack(archives, folder)
        precompile(folder, progress)
        (folder / "packages.txt").write_text("".join(f"{archive.name}\n" for archive in archives))
        shutil.rmtree(apt.root)

    return build_once(final, build, progress)


def unpack(archives: list[Path], folder: Path) -> None:
    """Unpack Debian packages into `folder`, /bin, /lib and /sbin merged into /usr as every current release has it."""
    for name in ("bin", "lib", "sbin"):
        (folder / "usr" / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(f"usr/{name}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda archive: _unpack_one(archive, folder), archives):
            pass
    for name in _NEVER_READ:
        shutil.rmtree(folder / name, ignore_errors=True)


def precompile(folder: Path, progress: Progress = silent) -> None:
    """Compile the board's Python library with a Python of the same release on this machine, as its packages would.

    Bytecode does not depend on the architecture; without it every program on the board compiles, emulated, what it
    imports.
    """
    for library in folder.glob("usr/lib/python3.*"):
        version = library.name.removeprefix("python")
        interpreter = _interpreter(version)
        if interpreter is None:
            progress(f"no Python {version} on this machine: programs on the board will start more slowly")
            continue
        command = [interpreter, "-I", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
        # Some files of the library are not meant to compile; their owner ignores that too.
        subprocess.run([*command, "-s", str(folder), "-p", "/", str(library)], capture_output=True, check=False)


def _interpreter(version: str) -> str | None:
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    return shutil.which(f"python{version}")


def _unpack_one(archive: Path, folder: Path) -> None:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as packed:
        # A package that ships /bin as a directory must land in /usr/bin, not replace the link.
        tar = [
            "tar",
            "-x",
            "-C",
            str(folder),
            "--keep-directory-symlink",
            "--no-same-owner",
            "--no-same-permissions",
            "--delay-directory-restore",
        ]
        done = subprocess.run(tar, stdin=packed.stdout, capture_output=True, text=True, check=False)
        # tar stops at the archive's end marker; drain what follows so that dpkg-deb ends by itself.
        assert packed.stdout is not None
        packed.stdout.read()
    if packed.returncode != 0 or done.returncode != 0:
        raise FetchError(f"{archive.name} cannot be unpacked: {done.stderr.strip() or 'dpkg-deb failed'}")
