"""What every world of the fault suite needs, made once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kedge.compiler.target import parse
from kedge.compiler.toolchain import build_runtime
from support import handmade, native
from support.postgres import postgres

__all__ = ["postgres"]

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def runner() -> Path:
    """kedge-runner for this machine."""
    return build_runtime(parse("native")).runner


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """module.c as a .kdg file."""
    folder = tmp_path_factory.mktemp("faults")
    source = HERE / "module.c"
    functions = tuple(re.findall(r"FUNCTION\((\w+)\)[,]", source.read_text()))
    lib = handmade.compile_module(source, folder / "lib.so").read_bytes()
    handmade.artifact(lib, functions).save(folder / "faults.kdg")
    return folder / "faults.kdg"


@pytest.fixture(scope="session")
def clock() -> Path:
    """clock.c, to be preloaded."""
    return native.compile_c([HERE / "clock.c"], "-shared", "-fPIC")
