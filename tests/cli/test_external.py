"""`--external FILE.py`: what commands make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kedge.data import digits_model
from support.commands import Kedge

MAKE = """
import kedge
from kedge import patterns as p

relu = kedge.External("my_relu", p.op("relu", p.wildcard("x")), source=__file__.replace("external.py", "relu.c"))
"""
RELU = """
#include "kedge_external.h"
int32_t my_relu(const kedge_external_call *call) {
  const float *x = kedge_data(&call->inputs[0]);
  float *y = kedge_data(&call->outputs[0]);
  for (int64_t i = 0; i < kedge_size(&call->outputs[0]); i++) y[i] = x[i] > LEAST ? x[i] : 0;
  return KEDGE_OK;
}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(digits_model(), tmp_path / "digits.onnx")
    (tmp_path / "external.py").write_text(MAKE)
    (tmp_path / "relu.c").write_text(RELU.replace("LEAST", "0"))
    return tmp_path


def test_compile_and_validate(kedge_here: Kedge, folder: Path) -> None:
    model, external, out = folder / "digits.onnx", folder / "external.py", folder / "out.kdg"
    done = kedge_here("compile", model, "--external", external, "-o", out)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    done = kedge_here("validate", model, out, "--external", external, "--json")
    report = json.loads(done.stdout)
    assert report["ok"] and report["layers_skipped"] is None
    assert {"relu1", "relu2"} <= {layer["name"] for layer in report["layers"]}
    assert "external code: my_relu" in kedge_here("inspect", out).stdout
    assert json.loads(kedge_here("inspect", out, "--json").stdout)["external"] == ["my_relu"]
    done = kedge_here("validate", model, out)
    assert done.returncode == 0
    assert "layers are not compared: the artifact has external code that was not given: my_relu" in done.stdout


def test_a_wrong_function_is_found(kedge_here: Kedge, folder: Path) -> None:
    (folder / "relu.c").write_text(RELU.replace("LEAST", "0.5f"))
    model, external, out = folder / "digits.onnx", folder / "external.py", folder / "out.kdg"
    assert kedge_here("compile", model, "--external", external, "-o", out).returncode == 0
    done = kedge_here("validate", model, out, "--external", external)
    assert done.returncode == 1
    # The classification is robust: the outputs alone would not tell.
    assert "probabilities" in done.stdout and "external my_relu differs at relu1: max |error| 0.4" in done.stdout


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("x = 1\n", 2, "makes no kedge.External"),
        ("import nothing_there\n", 2, "external.py cannot be run: ModuleNotFoundError"),
        ("import kedge\nkedge.External('f', kedge.patterns.wildcard(), source='f.c')\n", 2, "no operator"),
        (MAKE.replace("relu.c", "none.c"), 1, "none.c: No such file"),
    ],
)
def test_mistakes(kedge_here: Kedge, folder: Path, text: str, status: int, said: str) -> None:
    (folder / "external.py").write_text(text)
    model = folder / "digits.onnx"
    done = kedge_here("compile", model, "--external", folder / "external.py", "-o", folder / "out.kdg")
    assert done.returncode == status and said in done.stderr
    assert not (folder / "out.kdg").exists()


def test_what_the_compiler_says_is_shown(kedge_here: Kedge, folder: Path) -> None:
    arguments = ("compile", folder / "digits.onnx", "--external", folder / "external.py", "-o", folder / "out.kdg")
    (folder / "relu.c").write_text(RELU.replace("LEAST", "0").replace("  return", "  int unused;\n  return"))
    done = kedge_here(*arguments)
    assert done.returncode == 0 and "relu.c:7:7: warning: unused variable 'unused'" in done.stderr
    (folder / "relu.c").write_text(RELU)
    done = kedge_here(*arguments)
    assert done.returncode == 1
    assert "error: external my_relu does not compile for x86_64" in done.stderr
    assert "relu.c:6:77: error: use of undeclared identifier 'LEAST'" in done.stderr


def test_one_that_matches_nothing_is_a_warning(kedge_here: Kedge, folder: Path) -> None:
    (folder / "external.py").write_text(MAKE.replace('"relu"', '"gemm"'))
    done = kedge_here("compile", folder / "digits.onnx", "--external", folder / "external.py", "-o", folder / "out.kdg")
    assert done.returncode == 0
    assert "warning: external my_relu matches nothing: here the graph has no gemm" in done.stderr
