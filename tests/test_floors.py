"""The floors hold, and a violation would be found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "lint-imports"
    command = [str(program), "--config", str(root / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=root / ".paths", capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".cache", "__pycache__", "tests", "docs", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, tmp_path / "kedge", symlinks=True, ignore=ignored)
    return tmp_path / "kedge"


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("device_agent/planted.py", "import numpy", "The agent needs"),
        ("device_agent/planted.py", "import kedge.rpc.client", "The agent needs"),
        ("compiler/tir/planted.py", "from kedge.protos.v1 import types_pb2", "The compiler knows"),
        ("compiler/graph/planted.py", "import llvmlite", "Only code generation"),
        ("compiler/tir/planted.py", "import onnx", "Only the front end"),
        ("protos/planted.py", "import kedge.rpc.errors", "Each floor"),
        ("rpc/artifact/planted.py", "import kedge.rpc.tracker", "What hosts and boards share"),
    ],
)
def test_a_planted_violation_is_found(copy: Path, file: str, line: str, contract: str) -> None:
    (copy / file).write_text(line + "\n")
    result = lint_imports(copy)
    assert result.returncode != 0
    broken = [text for text in result.stdout.splitlines() if " BROKEN" in text]
    assert any(text.startswith(contract) for text in broken), result.stdout


def test_the_tree_as_it_is_holds(copy: Path) -> None:
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout
