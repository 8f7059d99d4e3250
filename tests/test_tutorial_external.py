"""The tutorial on external code runs as it stands, and what it computes is right."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kedge
from kedge.compiler.cache import KernelCache
from kedge.compiler.lower.lower import lower
from support import emulated
from support.commands import kedge_command

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorials" / "bring_your_own_code.md"
#: A block that is a file says so in its first line.
FILE = re.compile(r"(?:/\*|#) (\w+\.(?:c|py))(?: \*/)?\n")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the tutorial's code defines, after it ran in a folder of its own, which `folder` names."""
    names: dict[str, Any] = {}
    text = PAGE.read_text()
    with pytest.MonkeyPatch.context() as patch:
        names["folder"] = tmp_path_factory.mktemp("tutorial")
        patch.chdir(names["folder"])
        try:
            for block in re.finditer(r"```(?:python|c)\n(.*?)```", text, re.DOTALL):
                file = FILE.match(block[1])
                if file is not None:
                    Path(file[1]).write_text(block[1])
                    continue
                line = text.count("\n", 0, block.start(1))
                exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
            yield names
        finally:
            if "registration" in names:
                names["registration"].unregister()


def expected(page: dict[str, Any]) -> np.ndarray:
    w = page["weights"]
    hidden = np.maximum(page["data"]["x"] @ w["w1"] + w["b1"], 0)
    result: np.ndarray = hidden @ w["w2"] + w["b2"]
    return result


def test_the_model_with_the_function_in_it(page: dict[str, Any]) -> None:
    np.testing.assert_allclose(page["result"], expected(page), rtol=1e-4, atol=1e-4)
    assert [kernel["rule"] for kernel in page["kernels"]] == ["external my_dense"] * 2


def test_what_is_printed_is_what_the_page_shows(page: dict[str, Any]) -> None:
    shown = re.findall(r"\n\n```\n(    .*?)```", PAGE.read_text(), re.DOTALL)
    assert len(shown) == 2
    assert shown[0] in page["before"] + "\n" and shown[1] in page["after"] + "\n"


@pytest.mark.parametrize("text", ["raspberry-pi/4b", "beaglebone/black"])
def test_arm_runs_the_function(
    page: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = emulated.emulated(text)
    monkeypatch.chdir(page["folder"])
    # The emulated program has no C library: without a call of fmaxf.
    source = (page["folder"] / "my_dense.c").read_text().replace("fmaxf(to[j], least)", "to[j] > least ? to[j] : least")
    external = page["replace"](page["my_dense"], source=source)
    pipeline = kedge.pipeline().partition([external])
    program = lower(pipeline.run(page["module"]), target, pipeline.externals)
    (got,) = emulated.run_program(program, target, [page["data"]["x"]], tmp_path, KernelCache(tmp_path / "kernels"))
    np.testing.assert_allclose(got, expected(page), rtol=1e-4, atol=1e-4)


def test_the_mistake_is_found_and_named(page: dict[str, Any]) -> None:
    report = page["reports"][page["wrong"]]
    assert not report.ok and report.worst_layer.name in ("fc1, bias1, act1", "fc2, bias2")
    assert not any(layer.ok for layer in report.layers)


def test_the_failure_reads_as_promised(page: dict[str, Any]) -> None:
    source = (page["folder"] / "my_dense.c").read_text().replace("shape[1] != ", "shape[1] == ")
    artifact = kedge.compile(page["module"], externals=[page["replace"](page["my_dense"], source=source)])
    with artifact.open() as m, pytest.raises(kedge.KedgeError) as caught:
        m.run(page["data"])
    said = re.search(r"`(external function .*?)`", " ".join(PAGE.read_text().split()))
    assert said is not None and caught.value.message == said[1]  # type: ignore[attr-defined]


def test_the_operator_that_only_c_computes(page: dict[str, Any]) -> None:
    np.testing.assert_allclose(page["smooth"], page["reference"]([page["data"]["x"]], 0.5), rtol=1e-5)


def test_the_commands_run(page: dict[str, Any]) -> None:
    lines = re.findall(r"^\$ kedge (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        done = subprocess.run(
            kedge_command(*line.split()), cwd=page["folder"], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "worst layer of 1: fc1, bias1, act1" in done.stdout and "not compared" not in done.stdout
