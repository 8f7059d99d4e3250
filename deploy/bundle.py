"""What travels to a board: the agent as one zip file, and the compiled packages that it needs, for that board."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kedge.deploy import agent_main
from kedge.deploy.cachedir import Progress, build_once, silent
from kedge.deploy.errors import FetchError
from kedge.deploy.interpreter import module_command

REQUIREMENTS = ("grpcio>=1.80", "protobuf>=6.33,<8", "typing_extensions>=4.12")
"""What the agent needs beside the standard library: the same bounds as this package's own (a test compares them)."""

_AGENT_PARTS = ("kedge.protos", "kedge.rpc", "kedge.device_agent")
# These import numpy and SQLAlchemy; the agent's floor never imports them.
_HOST_ONLY = ("client", "tracker")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_OLDEST_MANYLINUX = 17


def agent_zipapp() -> bytes:
    """The agent as a zip file that Python runs, the same bytes for the same sources.

    It carries its own, empty `kedge` package: the face of the product is not for boards.
    """
    members = {"__main__.py": Path(agent_main.__file__).read_bytes(), "kedge/__init__.py": b""}
    for package in _AGENT_PARTS:
        for name, source in _sources(package):
            members[name] = source.read_bytes()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(members):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, members[name])
    return stream.getvalue()


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FetchError(f"the package {package} is missing from this installation", hint="reinstall kedge")
    root = Path(next(iter(spec.submodule_search_locations)))
    for source in root.rglob("*.py"):
        inside = source.relative_to(root)
        if inside.parts[0] not in _HOST_ONLY:
            yield f"{package.replace('.', '/')}/{inside.as_posix()}", source


@dataclass(frozen=True, slots=True)
class Site:
    """Unpacked wheels, as a compressed tar file; `digest` is the start of its SHA-256."""

    archive: Path
    digest: str
    wheels: tuple[str, ...]


def platform_tags(arch: str, glibc: tuple[int, int]) -> tuple[str, ...]:
    """The wheel platforms that a glibc system accepts, newest first (PEP 600, and the legacy aliases)."""
    tags = [f"manylinux_2_{minor}_{arch}" for minor in range(glibc[1], _OLDEST_MANYLINUX - 1, -1)]
    return (*tags, f"manylinux2014_{arch}", f"linux_{arch}")


def agent_site(
    cache_dir: Path,
    arch: str,
    glibc: tuple[int, int],
    python_version: tuple[int, int],
    progress: Progress = silent,
) -> Site:
    """grpcio, protobuf and typing_extensions for a board, newest first; fetched once, no network afterwards.

    pip checks the hashes that the index names; what was downloaded is checked again before every use. Raises
    `FetchError` where there is no network or no wheel for that board.
    """
    python = f"{python_version[0]}.{python_version[1]}"
    inputs = json.dumps([REQUIREMENTS, arch, glibc, python])
    name = f"{arch}-glibc{glibc[0]}.{glibc[1]}-python{python}-{hashlib.sha256(inputs.encode()).hexdigest()[:10]}"

    def build(folder: Path) -> None:
        progress(f"fetching grpcio and protobuf for {arch}, Python {python}")
        _download(folder, platform_tags(arch, glibc), arch, python)
        wheels = sorted(folder.glob("*.whl"))
        archive = _site_archive(wheels)
        (folder / "site.tar.gz").write_bytes(archive)
        record = {"sha256": hashlib.sha256(archive).hexdigest(), "wheels": [wheel.name for wheel in wheels]}
        (folder / "site.json").write_text(json.dumps(record, indent=1))
        for wheel in wheels:
            wheel.unlink()

    folder = build_once(cache_dir / "wheels" / name, build, progress)
    record = json.loads((folder / "site.json").read_text())
    archive = folder / "site.tar.gz"
    if hashlib.sha256(archive.read_bytes()).hexdigest() != record["sha256"]:
        raise FetchError(
            f"{archive} is damaged: its SHA-256 is not the recorded one", hint=f"remove {folder} and retry"
        )
    return Site(archive, record["sha256"][:16], tuple(record["wheels"]))


def _download(folder: Path, platforms: tuple[str, ...], arch: str, python: str) -> None:
    command = module_command("pip", "download", "--quiet", "--disable-pip-version-check", "--no-input")
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--implementation", "cp", "--python-version", python]
    for platform in platforms:
        command += ["--platform", platform]
    done = subprocess.run([*command, *REQUIREMENTS], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise FetchError(f"{sys.executable} has no pip to fetch wheels with", hint=f"{sys.executable} -m ensurepip")
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[0] if errors else done.stderr.strip()[-300:]
    missing = re.search(r"No matching distribution found for (\S+)", done.stderr)
    offline = re.search(r"NewConnectionError|NameResolutionError|Temporary failure|timed out|Max retries", done.stderr)
    if missing and not offline:
        raise FetchError(
            f"the package index has no wheel of {missing[1]} for {arch} and Python {python}",
            hint="there are wheels for x86_64, aarch64 and armv7l, and for the usual Python versions",
        )
    raise FetchError(
        f"wheels for {arch} and Python {python} could not be fetched: {reason}", hint="is there a network?"
    )


def _site_archive(wheels: list[Path]) -> bytes:
    """The contents of the wheels as a tar file, the same bytes for the same wheels."""
    members: dict[str, tuple[bytes, int]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    members[entry.filename] = (archive.read(entry), 0o755 if entry.filename.endswith(".so") else 0o644)
    stream = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=6, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name in sorted(members):
            data, mode = members[name]
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()
