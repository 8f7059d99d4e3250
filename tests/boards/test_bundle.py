"""What travels to a board: the agent's zip file and the wheels beside it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from kedge.deploy import bundle
from kedge.deploy.errors import FetchError
from support.boards import DEPLOY_CACHE, ROOT


@pytest.fixture(scope="module")
def zipapp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zipapp") / "agent.pyz"
    path.write_bytes(bundle.agent_zipapp())
    return path


def test_the_same_sources_give_the_same_bytes(zipapp: Path) -> None:
    assert bundle.agent_zipapp() == zipapp.read_bytes()


def test_it_carries_the_agents_floors_and_nothing_else(zipapp: Path) -> None:
    with zipfile.ZipFile(zipapp) as archive:
        names = archive.namelist()
        assert archive.read("kedge/__init__.py") == b""
    assert {"__main__.py", "kedge/device_agent/__main__.py", "kedge/protos/v1/agent_pb2.py"} <= set(names)
    assert {name.split("/")[1] for name in names if "/" in name} == {"__init__.py", "protos", "rpc", "device_agent"}
    assert not [name for name in names if "/client/" in name or "/tracker/" in name or not name.endswith(".py")]


def test_every_import_inside_is_inside_or_installed(zipapp: Path) -> None:
    """No module of the zip needs one that was left behind."""
    with zipfile.ZipFile(zipapp) as archive:
        names = set(archive.namelist())
        for name in names:
            for node in ast.walk(ast.parse(archive.read(name))):
                for module in imported(node):
                    path = module.replace(".", "/")
                    assert {f"{path}.py", f"{path}/__init__.py"} & names, f"{name} imports {module}"


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        modules = [node.module or ""]
    else:
        modules = []
    return [module for module in modules if module.split(".")[0] == "kedge"]


def test_it_runs_without_this_installation(zipapp: Path, tmp_path: Path) -> None:
    """An interpreter that sees no site-packages, with grpcio and protobuf unpacked beside the zip only."""
    version = sys.version_info[:2]
    site = bundle.agent_site(DEPLOY_CACHE, "x86_64", (2, 31), (version[0], version[1]))
    here = tmp_path / "board"
    here.mkdir()
    (here / "agent.pyz").write_bytes(zipapp.read_bytes())
    with tarfile.open(site.archive) as tar:
        tar.extractall(here / "site", filter="data")
    done = subprocess.run(
        [sys.executable, "-I", "-S", here / "agent.pyz", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=here,
    )
    assert done.returncode == 0, done.stderr
    assert "--tracker" in done.stdout
    told = subprocess.run(
        [sys.executable, "-I", "-S", here / "agent.pyz", "--tracker=127.0.0.1:1", "--runner=/nowhere"],
        capture_output=True,
        text=True,
        check=False,
        cwd=here,
    )
    assert told.returncode != 0
    assert "there is no runner at /nowhere" in told.stderr


def test_requirements_are_this_packages_own() -> None:
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {Requirement(text).name: Requirement(text).specifier for text in own}
    for text in bundle.REQUIREMENTS:
        needed = Requirement(text)
        assert bounds.get(needed.name, needed.specifier) == needed.specifier, text


@pytest.mark.parametrize(
    ("arch", "glibc", "python"),
    [("aarch64", (2, 36), (3, 11)), ("armv7l", (2, 31), (3, 9)), ("x86_64", (2, 31), (3, 9))],
)
def test_wheels_fit_the_board(arch: str, glibc: tuple[int, int], python: tuple[int, int]) -> None:
    site = bundle.agent_site(DEPLOY_CACHE, arch, glibc, python)
    platforms = bundle.platform_tags(arch, glibc)
    accepted = {*cpython_tags(python, platforms=platforms), *compatible_tags(python, platforms=platforms)}
    names = set()
    for wheel in site.wheels:
        name, _, _, tags = parse_wheel_filename(wheel)
        names.add(name)
        assert tags & accepted, wheel
    assert names == {"grpcio", "protobuf", "typing-extensions"}
    with tarfile.open(site.archive) as tar:
        members = tar.getmembers()
        extension = next(
            member for member in members if "_cython/cygrpc" in member.name and member.name.endswith(".so")
        )
        stream = tar.extractfile(extension)
        assert stream is not None
        machine = int.from_bytes(stream.read(20)[18:20], "little")
    assert machine == {"aarch64": 0xB7, "armv7l": 0x28, "x86_64": 0x3E}[arch]
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {member.mtime for member in members} == {0}


def test_platforms_newest_first_and_never_newer_than_the_board() -> None:
    tags = bundle.platform_tags("aarch64", (2, 28))
    assert tags[0] == "manylinux_2_28_aarch64"
    assert tags[-2:] == ("manylinux2014_aarch64", "linux_aarch64")
    assert "manylinux_2_29_aarch64" not in tags


def test_a_damaged_cache_is_noticed(tmp_path: Path) -> None:
    site = bundle.agent_site(DEPLOY_CACHE, "armv7l", (2, 31), (3, 9))
    copy = tmp_path / "wheels" / site.archive.parent.name
    copy.mkdir(parents=True)
    (copy / "site.json").write_bytes((site.archive.parent / "site.json").read_bytes())
    data = bytearray(site.archive.read_bytes())
    data[1000] ^= 1
    (copy / "site.tar.gz").write_bytes(data)
    with pytest.raises(FetchError, match="damaged") as refused:
        bundle.agent_site(tmp_path, "armv7l", (2, 31), (3, 9))
    assert str(copy) in str(refused.value.hint)


def test_no_wheel_for_a_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip against an index that exists and has nothing: what a user of an exotic board sees.

    The working directory holds modules of the user's own, which pip must not take for its own.
    """
    for name in ("queue", "pip"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user has one of his own')\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").mkdir()
    only_this_index(monkeypatch, (tmp_path / "index").as_uri())
    with pytest.raises(FetchError, match=r"no wheel of grpcio>=1\.80 for riscv64 and Python 3\.13") as refused:
        bundle.agent_site(tmp_path, "riscv64", (2, 41), (3, 13))
    assert "aarch64" in str(refused.value.hint)
    assert not [path for path in (tmp_path / "wheels").iterdir() if path.is_dir()]


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_this_index(monkeypatch, "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(FetchError) as refused:
        bundle.agent_site(tmp_path, "aarch64", (2, 36), (3, 11))
    assert "network" in str(refused.value.hint)


def only_this_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def test_the_record_names_the_wheels() -> None:
    site = bundle.agent_site(DEPLOY_CACHE, "aarch64", (2, 36), (3, 11))
    record = json.loads((site.archive.parent / "site.json").read_text())
    assert tuple(record["wheels"]) == site.wheels
    assert record["sha256"].startswith(site.digest)
