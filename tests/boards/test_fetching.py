"""Where packages come from, and that what is built once is built once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kedge.deploy.cachedir import build_once
from kedge.deploy.emulated.sources import Distribution, host_distribution
from kedge.deploy.emulated.userland import fetch_userland, unpack, userland_path
from kedge.deploy.errors import EmulationError, FetchError
from support.agents import wait_for

BOOKWORM = {"ID": "debian", "VERSION_CODENAME": "bookworm", "VERSION_ID": "12"}


def ubuntu(version: str, codename: str) -> dict[str, str]:
    return {"ID": "ubuntu", "VERSION_CODENAME": codename, "VERSION_ID": version}


def test_only_the_release_itself_from_the_hosts_own_mirror() -> None:
    found = host_distribution(
        "arm64",
        os_release=BOOKWORM,
        sources=[
            ("http://mirror.example/debian", "bookworm"),
            ("http://mirror.example/debian", "bookworm-updates"),
            ("http://mirror.example/debian-security", "bookworm-security"),
            ("https://vendor.example/debian/12/prod", "bookworm"),
            ("https://vendor.example/apt", "bookworm"),
        ],
    )
    assert found.mirrors == (("http://mirror.example/debian", "bookworm"),)
    assert found.sources_list().endswith("http://mirror.example/debian bookworm main\n")


@pytest.mark.parametrize(
    ("arch", "version", "codename", "uri"),
    [
        ("arm64", "24.04", "noble", "http://ports.ubuntu.com/ubuntu-ports"),
        ("armhf", "24.04", "noble", "http://ports.ubuntu.com/ubuntu-ports"),
        ("amd64", "24.04", "noble", "http://mirror.example/ubuntu"),
        ("arm64", "26.04", "resolute", "http://mirror.example/ubuntu"),
        ("armhf", "26.04", "resolute", "http://ports.ubuntu.com/ubuntu-ports"),
    ],
)
def test_ubuntu_keeps_arm_elsewhere(arch: str, version: str, codename: str, uri: str) -> None:
    sources = [("http://mirror.example/ubuntu", codename)]
    found = host_distribution(arch, os_release=ubuntu(version, codename), sources=sources)
    assert found.mirrors == ((uri, codename),)


def test_other_systems_are_refused_by_name() -> None:
    with pytest.raises(EmulationError, match="this machine runs fedora"):
        host_distribution("arm64", os_release={"ID": "fedora"}, sources=[])
    with pytest.raises(EmulationError, match="no source for debian bookworm"):
        host_distribution("arm64", os_release=BOOKWORM, sources=[("http://x/vendor", "bookworm")])


def test_another_recipe_is_another_folder(tmp_path: Path) -> None:
    one = Distribution("debian", "bookworm", (("http://a/debian", "bookworm"),), None)
    two = Distribution("debian", "bookworm", (("http://b/debian", "bookworm"),), None)
    paths = {userland_path(tmp_path, arch, each) for arch in ("arm64", "armhf") for each in (one, two)}
    assert len(paths) == 4


@pytest.mark.board
def test_a_mirror_that_is_not_there(tmp_path: Path) -> None:
    nowhere = Distribution("debian", "bookworm", (("http://127.0.0.1:1/debian", "bookworm"),), None)
    with pytest.raises(FetchError, match=r"apt-get update failed for debian bookworm arm64: .*Connection refused") as e:
        fetch_userland(tmp_path, "arm64", nowhere)
    assert "http://127.0.0.1:1/debian" in str(e.value.hint)
    assert [path.name for path in (tmp_path / "userland").iterdir() if path.is_dir()] == []


@pytest.mark.board
def test_a_damaged_package_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "broken_1_arm64.deb"
    archive.write_bytes(b"!<arch>\nnothing")
    (tmp_path / "root").mkdir()
    with pytest.raises(FetchError, match=r"broken_1_arm64\.deb cannot be unpacked"):
        unpack([archive], tmp_path / "root")


@pytest.mark.board
def test_bin_and_lib_stay_merged(tmp_path: Path) -> None:
    """A package from before the merge, which has /bin as a directory, lands in /usr/bin."""
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: old\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    )
    (tree / "bin").mkdir()
    (tree / "bin" / "tool").write_text("#!/bin/sh\n")
    (tree / "bin" / "tool").chmod(0o4755)
    archive = tmp_path / "old.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, archive], check=True, capture_output=True)
    root = tmp_path / "root"
    root.mkdir()
    unpack([archive], root)
    assert (root / "bin").readlink() == Path("usr/bin")
    # Whoever may read the cache must not find programs there that run with the rights of its owner.
    assert (root / "usr" / "bin" / "tool").stat().st_mode & 0o7777 == 0o755


SLOW_BUILD = """
import sys
from pathlib import Path
from kedge.deploy.cachedir import build_once

final, log, gate = map(Path, sys.argv[1:])

def build(folder):
    with log.open("a") as stream:
        stream.write("built\\n")
    # Blocks until the test opens the other end: the others must find the lock taken.
    gate.read_bytes()
    (folder / "done").touch()

build_once(final, build)
assert (final / "done").exists()
"""


def test_processes_that_want_the_same_wait_for_one(tmp_path: Path) -> None:
    gate, log, final = tmp_path / "gate", tmp_path / "log", tmp_path / "final"
    os.mkfifo(gate)
    command = [sys.executable, "-c", SLOW_BUILD, final, log, gate]
    workers = [subprocess.Popen(command) for _ in range(3)]
    try:
        wait_for(log.exists, "a worker to start building")
        gate.write_bytes(b"go")
        assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
    assert log.read_text() == "built\n"


def test_a_failed_build_leaves_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise FetchError("the mirror went away")

    with pytest.raises(FetchError):
        build_once(tmp_path / "final", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    build_once(tmp_path / "final", lambda folder: (folder / "whole").touch())
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["whole"]


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path; from kedge.deploy.cachedir import build_once\n"
        "def build(folder):\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"build_once(Path({str(tmp_path)!r}) / 'final', build)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert not (tmp_path / "final").exists()
    build_once(tmp_path / "final", lambda folder: (folder / "whole").touch())
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["final"]
