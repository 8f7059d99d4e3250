"""The modules that `kedge` offers can be imported as modules, in a process that imported nothing before."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("kedge.aio", "connect", "kedge.rpc.client.aio"),
        ("kedge.nn", "Linear", "kedge.compiler.frontend.nn"),
        ("kedge.te", "compute", "kedge.compiler.te"),
    ],
)
def test_a_module_of_the_face_is_one(module: str, name: str, home: str) -> None:
    program = (
        f"import {module}\n"
        f"from {module} import {name}\n"
        f"import kedge, importlib\n"
        f"home = importlib.import_module('{home}')\n"
        f"assert {name} is home.{name} and {module}.{name} is {name}\n"
        f"assert '{name}' in {module}.__all__\n"
        f"assert all(hasattr({module}, each) for each in {module}.__all__)\n"
        f"assert {module} is kedge.__getattr__('{module.partition('.')[2]}')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_face_is_light() -> None:
    program = "import kedge, sys\nprint(sorted({'numpy', 'grpc', 'llvmlite', 'onnx', 'kedge.te'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
