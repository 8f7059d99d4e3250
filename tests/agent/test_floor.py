"""The agent's floors need the standard library, grpcio and protobuf, and nothing else: here and on Python 3.9."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.python39 import Python39

ROOT = Path(__file__).resolve().parent.parent.parent
FLOORS = {"protos": (), "rpc": ("client", "tracker"), "device_agent": ()}

#: Runs in a process of its own: refuses what a board does not have, imports all, says what came along.
PROBE = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if any(name == ban or name.startswith(ban + ".") for ban in BANNED):
            raise ModuleNotFoundError(f"{name} is not on a board", name=name)

BANNED = json.loads(sys.argv[1])
sys.meta_path.insert(0, Refuse())
before = set(sys.modules)
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
roots = {name.split(".")[0] for name in set(sys.modules) - before}
import threading
print(json.dumps({"roots": sorted(roots), "threads": threading.active_count(), "version": sys.version_info[:2]}))
"""
BANNED = [
    *("numpy", "llvmlite", "onnx", "ziglang", "paramiko", "sqlalchemy", "typer", "rich", "cryptography"),
    *("grpc_tools", "grpc_health", "grpc_reflection", "prometheus_client"),
    *("kedge.compiler", "kedge.deploy", "kedge.cli", "kedge.demo", "kedge.rpc.client", "kedge.rpc.tracker"),
]


def modules() -> Iterator[str]:
    for floor, without in FLOORS.items():
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if len(parts) > 1 and parts[1] in without:
                continue
            yield ".".join(("kedge", *(part for part in parts if part != "__init__")))


@pytest.fixture
def board_tree(tmp_path: Path) -> Path:
    """What a board has: the three floors, in an empty `kedge`."""
    package = tmp_path / "kedge"
    package.mkdir()
    (package / "__init__.py").touch()
    for floor in FLOORS:
        (package / floor).symlink_to(ROOT / floor)
    return tmp_path


def check(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    assert found["threads"] == 1, "importing starts nothing"
    return found


def test_every_module_imports_without_what_boards_lack(board_tree: Path) -> None:
    names = list(modules())
    assert "kedge.device_agent.agent" in names
    assert "kedge.rpc.blobs" in names
    command = [sys.executable, "-W", "error", "-c", PROBE, json.dumps(BANNED), json.dumps(names)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=board_tree, env={"PYTHONPATH": str(board_tree)}
    )
    roots = set(check(done)["roots"])  # type: ignore[call-overload]
    # grpc itself looks whether its companions are installed.
    own = {"kedge", "grpc", "grpc_health", "grpc_reflection", "google", "typing_extensions"}
    foreign = roots - set(sys.stdlib_module_names) - own
    # What Cython's and protobuf's compiled modules register under names of their own.
    assert {name for name in foreign if "cython" not in name.lower() and not name.startswith("_")} == set()


def test_a_banned_import_would_be_found(board_tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(["json", "numpy"]), json.dumps(["numpy"])],
        capture_output=True,
        text=True,
        check=False,
        cwd=board_tree,
    )
    assert "numpy is not on a board" in done.stderr


@pytest.mark.board
def test_every_module_imports_on_python_3_9(board_tree: Path, python39: Python39) -> None:
    done = python39.run("-c", PROBE, json.dumps(BANNED), json.dumps(list(modules())), path=(board_tree,))
    assert check(done)["version"] == [3, 9]


@pytest.mark.board
def test_the_command_line_explains_itself_on_python_3_9(board_tree: Path, python39: Python39) -> None:
    done = python39.run("-m", "kedge.device_agent", "--help", path=(board_tree,))
    assert done.returncode == 0, done.stderr
    assert "--tracker HOST:PORT" in done.stdout
