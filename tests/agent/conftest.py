"""What the agent's tests share: the runner of this machine, and a module that misbehaves on request."""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge.compiler.target import parse
from kedge.compiler.toolchain import build_runtime
from support import handmade
from support.postgres import postgres
from support.python39 import python39

__all__ = ["postgres", "python39"]

#: In the order of tests/agent/module.c.
FUNCTIONS = (
    "add", "crash", "leave", "spin", "refuse", "hog", "litter", "weigh", "pry", "reach", "eat", "swarm",
)  # fmt: skip


@pytest.fixture(scope="session")
def runner() -> Path:
    """kedge-runner for this machine."""
    return build_runtime(parse("native")).runner


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The lib.so of module.c for this machine."""
    out = tmp_path_factory.mktemp("module") / "lib.so"
    return handmade.compile_module(Path(__file__).with_name("module.c"), out).read_bytes()
