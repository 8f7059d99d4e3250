"""What the agent's tests share: the runner of this machine, and a module that misbehaves on request."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support import handmade
from support.python39 import python39

__all__ = ["python39"]

#: In the order of tests/agent/module.c.
FUNCTIONS = ("add", "crash", "leave", "spin", "refuse", "hog", "litter", "weigh")


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kedge-runner for this machine."""
    out = tmp_path_factory.mktemp("runner") / "kedge-runner"
    sources = sorted(str(path) for path in (handmade.ROOT / "device_agent" / "runtime").glob("*.c"))
    command = [sys.executable, "-m", "ziglang", "cc", "-target", handmade.zig_target(platform.machine())]
    subprocess.run([*command, "-std=c11", "-O1", *sources, "-o", str(out), "-lpthread", "-ldl"], check=True)
    return out


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The lib.so of module.c for this machine."""
    out = tmp_path_factory.mktemp("module") / "lib.so"
    return handmade.compile_module(Path(__file__).with_name("module.c"), out).read_bytes()
