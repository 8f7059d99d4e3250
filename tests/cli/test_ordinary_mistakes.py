"""What people get wrong every day: a message and a status of its own, and never a traceback."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kedge.data import digits_model
from support.commands import Kedge, kedge_command

LONG = "x" * 300
Words = Callable[[Path, Path], list[object]]


def in_shell(redirection: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it, with a redirection or pipe behind it; bash's own status of a pipe's first."""
    command = f"{shlex.join(kedge_command(*arguments))} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done


REPORTING = [("--version",), ("--help",), ("inspect", digits_model()), ("inspect", digits_model(), "--json")]


@pytest.mark.parametrize("arguments", REPORTING, ids=str)
def test_output_that_nobody_can_take_is_an_error(arguments: tuple[str | Path, ...]) -> None:
    full = in_shell("> /dev/full", *arguments)
    assert full.returncode == 1
    assert full.stderr == "error: cannot write to standard output: No space left on device\n"
    closed = in_shell(">&-", *arguments)
    assert closed.returncode == 1
    assert closed.stderr == "error: cannot write to standard output: Bad file descriptor\n"


@pytest.mark.parametrize("arguments", REPORTING, ids=str)
def test_a_reader_that_left_is_none(arguments: tuple[str | Path, ...]) -> None:
    done = in_shell("| true", *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_place_for_errors_the_status_tells(tmp_path: Path) -> None:
    done = in_shell("2>&-", "run", tmp_path / "nothing.kdg")
    assert (done.returncode, done.stdout) == (3, "")


def strange_dtype(tmp_path: Path, digits: Path) -> list[object]:
    path = tmp_path / "strange.kdg"
    with zipfile.ZipFile(digits) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith(".json"):
                data = data.replace(b'"float32"', b'"float99"')
            new.writestr(info.filename, data)
    return ["run", path]


def cut_model(tmp_path: Path, digits: Path) -> list[object]:
    path = tmp_path / "cut.onnx"
    path.write_bytes(digits_model().read_bytes()[:-700])
    return ["compile", path, "-o", tmp_path / "x.kdg"]


def no_model(tmp_path: Path, digits: Path) -> list[object]:
    path = tmp_path / "notes.txt"
    path.write_text("nothing to see\n")
    return ["inspect", path]


def shape(text: str) -> Words:
    return lambda tmp_path, digits: ["run", digits, "--shape", text]


def compiling(*arguments: object) -> Words:
    return lambda tmp_path, digits: ["compile", digits_model(), "-o", tmp_path / "x.kdg", *arguments]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (shape("image=99999999999999999999,1,8,8"), 2, "a dim is at most 9223372036854775807"),
        (shape("image=" + "9" * 5000), 2, "a dim is at most"),
        (shape(f"image={2**62},1,8,8"), 1, "not enough memory"),
        (shape("image:2"), 2, "is not NAME=D0"),
        (compiling("--shape", f"image={2**63},1,8,8"), 2, "a dim is at most"),
        (compiling("--shape", "image=1,1,8,8", "--shape", "image=2,1,8,8"), 2, "given twice for 'image'"),
        (compiling("--target", "raspbery-pi/4b"), 2, "raspberry-pi/4b"),
        (lambda t, d: ["compile", digits_model(), "-o", t / LONG], 3, "cannot write .*File name too long"),
        (lambda t, d: ["compile", t / f"{LONG}.onnx", "-o", t / "x.kdg"], 3, "File name too long"),
        (lambda t, d: ["compile", t / "no.onnx", "-o", t / "x.kdg"], 3, "no.onnx"),
        (lambda t, d: ["validate", t / "no.onnx", d], 3, "no.onnx"),
        (lambda t, d: ["inspect", t / "no.onnx"], 3, "no.onnx"),
        (cut_model, 3, "cut.onnx"),
        (no_model, 3, "notes.txt"),
        (lambda t, d: ["run", t / LONG], 3, "File name too long"),
        (lambda t, d: ["run", d, "--outputs", t / LONG], 3, "cannot write .*File name too long"),
        (lambda t, d: ["run", d, "--outputs", t / "no" / "x.npz"], 3, "cannot write .*No such file"),
        (lambda t, d: ["run", d, "--function", "nope"], 2, "has no function 'nope'"),
        (lambda t, d: ["bench", d, "--repeat", "1000000000"], 2, "--repeat"),
        (lambda t, d: ["run", d, "--tracker", "127.0.0.1:1"], 2, "--tracker without --device"),
        (strange_dtype, 3, "float99"),
        (lambda t, d: ["devices", "--tracker", "host:no-port"], 2, "no-port"),
        (lambda t, d: ["agent", "start", "--tracker", "h:1", "--label", "rack"], 2, "KEY=VALUE"),
        (lambda t, d: ["agent", "start", "--tracker", "h:1", "--label", "arch=aarch64"], 2, "every device tells"),
        (lambda t, d: ["deploy", "board", "pi@a..b", "--tracker", "127.0.0.1:1"], 2, "no address of a board"),
        (lambda t, d: ["deploy", "board", f"pi@{'x' * 64}", "--uninstall"], 2, "no address of a board"),
        (lambda t, d: ["deploy", "board", "pi@b", "--tracker", "h:1", "--label", "a b=c"], 2, "KEY=VALUE"),
        (lambda t, d: ["deploy", "board", "pi@b", "--tracker", "h:1", "--label", "deployment=x"], 2, "deployment"),
        (lambda t, d: ["deploy", "board", "pi@b", "--tracker", "h:1", "--name", "x y"], 2, "cannot be a device's name"),
        (lambda t, d: ["deploy", "board", "pi@b", "--uninstall", "--known-hosts", t], 2, "is a directory|is a folder"),
    ],
)
def test_a_mistake_is_one_clear_error(
    kedge_here: Kedge, digits: Path, tmp_path: Path, words: Words, status: int, says: str
) -> None:
    done = kedge_here(*words(tmp_path, digits))
    assert done.returncode == status, done.stderr
    assert re.search(says, done.stderr, re.DOTALL), done.stderr
    assert not (tmp_path / "x.kdg").exists()


def test_outputs_that_cannot_be_written_are_refused_before_the_run(
    kedge_here: Kedge, digits: Path, tmp_path: Path
) -> None:
    """The input is wrong, too, which a run would say first."""
    np.savez(tmp_path / "in.npz", imge=np.zeros((1, 1, 8, 8), np.float32))
    done = kedge_here("run", digits, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "no" / "out.npz")
    assert done.returncode == 3 and "cannot write" in done.stderr


def test_inspect_looks_at_what_a_file_holds(kedge_here: Kedge, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "MODEL.ONNX").write_bytes(digits_model().read_bytes())
    (tmp_path / "artifact").write_bytes(digits.read_bytes())
    model = kedge_here("inspect", tmp_path / "MODEL.ONNX")
    assert model.returncode == 0 and "Conv" in model.stdout
    artifact = kedge_here("inspect", tmp_path / "artifact", "--json")
    assert json.loads(artifact.stdout)["functions"][0]["name"] == "main"


def test_json_has_no_nan(kedge_here: Kedge, digits: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", image=np.full((1, 1, 8, 8), np.nan, np.float32))
    done = kedge_here("run", digits, "--inputs", tmp_path / "in.npz", "--json")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(done.stdout, parse_constant=refuse)["probabilities"]["max"] is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KEDGE_DUMP_DIR", "/proc/none/here", "KEDGE_DUMP_DIR: cannot write"),
        ("KEDGE_DEBUG", "yes", "KEDGE_DEBUG is 'yes'"),
    ],
)
def test_a_setting_that_shows_nothing_is_refused(
    kedge_here: Kedge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    done = kedge_here("compile", digits_model(), "-o", tmp_path / "x.kdg")
    assert done.returncode == 1 and says in done.stderr, done.stderr


def test_every_stage_is_shown_again(kedge_here: Kedge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Although the kernels were compiled before, and could be taken from the cache."""
    shown = []
    for turn in ("first", "second"):
        monkeypatch.setenv("KEDGE_DUMP_DIR", str(tmp_path / turn))
        done = kedge_here("compile", digits_model(), "-o", tmp_path / "x.kdg")
        assert done.returncode == 0, done.stderr
        shown.append(sorted(path.name for path in (tmp_path / turn).iterdir()))
    assert shown[0] == shown[1]
    assert {".graph", ".tir", ".ll", ".s"} <= {Path(name).suffix for name in shown[1]}


def test_something_that_is_no_ssh_server_is_one_error(kedge: Kedge, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        board = f"pi@127.0.0.1:{server.getsockname()[1]}"
        done = kedge("deploy", "board", board, "--uninstall", env={**os.environ, "HOME": str(tmp_path)})
        thread.join()
    assert done.returncode == 6
    # A machine that takes more than a second says before what it is at.
    *stages, error = done.stderr.splitlines()
    assert error.startswith(f"error: no SSH connection to {board}"), done.stderr
    assert all(line.startswith(f"deploy {board}: ") for line in stages), done.stderr
