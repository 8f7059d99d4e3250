"""`kedge cache`, and what `kedge compile` says of what it takes from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from kedge.cli.app import tree
from kedge.compiler.quota import Quota
from kedge.data import digits_model
from support.commands import Kedge, kedge_command
from support.others import as_others, give_away

SAID = "taken from the cache; --no-cache compiles it again\n"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEDGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KEDGE_CACHE_SIZE", raising=False)
    return tmp_path / "cache"


def compiled(kedge: Kedge, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    done = kedge("compile", digits_model(), "-o", out, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_compile_says_that_it_was_none(kedge_here: Kedge, tmp_path: Path) -> None:
    out = tmp_path / "digits.kdg"
    first, said = compiled(kedge_here, out)
    whole = out.read_bytes()
    assert first["cached"] is False and SAID not in said
    again, said = compiled(kedge_here, out)
    assert again["cached"] is True and said.endswith(SAID) and out.read_bytes() == whole
    assert {name: again[name] for name in again if name not in ("cached", "seconds")} == {
        name: first[name] for name in first if name not in ("cached", "seconds")
    }
    text = kedge_here("compile", digits_model(), "-o", out)
    assert text.stderr.endswith(SAID) and text.stdout.startswith(f"{out}: ")


def test_no_cache_passes_it_by(kedge_here: Kedge, tmp_path: Path, root: Path) -> None:
    for _ in range(2):
        facts, said = compiled(kedge_here, tmp_path / "digits.kdg", "--no-cache", "--target", "x86-64")
        assert facts["cached"] is False and SAID not in said
        assert not Quota().kept()
    compiled(kedge_here, tmp_path / "digits.kdg", "--target", "x86-64")
    before = Quota().kept()
    assert not compiled(kedge_here, tmp_path / "other.kdg", "--no-cache", "--target", "x86-64")[0]["cached"]
    assert Quota().kept() == before
    assert (tmp_path / "other.kdg").read_bytes() == (tmp_path / "digits.kdg").read_bytes()


def test_what_is_kept_is_shown_and_cleared(kedge_here: Kedge, tmp_path: Path, root: Path) -> None:
    nothing = json.loads(kedge_here("cache", "--json").stdout)
    assert nothing["folder"] == str(root) and nothing["limit_bytes"] == 5 << 30
    assert nothing["artifacts"] == nothing["kernels"] == {"files": 0, "bytes": 0} and nothing["other"] == {"bytes": 0}
    out = tmp_path / "digits.kdg"
    compiled(kedge_here, out)
    (root / "runtime").mkdir(exist_ok=True)
    (root / "runtime" / "lib").write_bytes(b"1234")
    kept = json.loads(kedge_here("cache", "--json").stdout)
    assert kept["artifacts"]["files"] == 3 and kept["artifacts"]["bytes"] > out.stat().st_size
    assert kept["kernels"]["files"] > 3 and kept["other"]["bytes"] >= 4
    text = kedge_here("cache").stdout
    assert str(root) in text and "artifacts" in text and "of 5.0 GiB" in text
    cleared = json.loads(kedge_here("cache", "clear", "artifacts", "--json").stdout)
    assert cleared["removed"] == kept["artifacts"]
    left = json.loads(kedge_here("cache", "--json").stdout)
    assert left["artifacts"]["files"] == 0 and left["kernels"] == kept["kernels"]
    assert compiled(kedge_here, out)[0]["cached"] is False
    done = kedge_here("cache", "clear")
    assert done.returncode == 0 and done.stdout.startswith(f"removed from {root}: "), done.stderr
    assert not Quota().kept() and (root / "runtime" / "lib").exists()
    assert "0 files, 0 B" in kedge_here("cache", "clear", "kernels").stdout


def test_mistakes_are_named(kedge_here: Kedge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = kedge_here("cache", "clear", "everything")
    assert wrong.returncode == 2 and "one of kernels, artifacts, or nothing for both" in wrong.stderr
    monkeypatch.setenv("KEDGE_CACHE_SIZE", "much")
    for words in (("cache",), ("cache", "clear"), ("compile", digits_model(), "-o", tmp_path / "x.kdg")):
        done = kedge_here(*words)
        assert done.returncode == 1 and "KEDGE_CACHE_SIZE is 'much'" in done.stderr and "hint: " in done.stderr
    findings = json.loads(kedge_here("doctor", "--json").stdout)
    (cache,) = (finding for finding in findings if finding["check"] == "cache")
    assert cache["status"] == "broken" and "KEDGE_CACHE_SIZE" in cache["found"]


def test_help_has_examples_and_the_parts_complete() -> None:
    group = typer.main.get_command(tree(["cache"])).commands["cache"]  # type: ignore[attr-defined]
    assert "Examples:" in group.help and "KEDGE_CACHE_SIZE" in group.help
    assert "artifacts" not in CliRunner().invoke(tree(), ["cache", "--help"]).stdout.partition("Commands")[2]
    words = {"_KEDGE_COMPLETE": "complete_bash", "COMP_WORDS": "kedge cache clear ar", "COMP_CWORD": "3"}
    done = CliRunner().invoke(tree(), prog_name="kedge", env=words)
    assert done.stdout.split() == ["artifacts"]


IMPORTED = """
import sys
from kedge.cli import main
status = main()
heavy = ("numpy", "onnx", "grpc", "rich.progress", "kedge.rpc.types", "kedge.compiler.lower", "kedge.compiler.graph")
print(status, [name for name in heavy if name in sys.modules])
"""


def test_what_is_in_the_cache_needs_no_compiler(kedge: Kedge, tmp_path: Path) -> None:
    words = ["compile", digits_model(), "-o", tmp_path / "digits.kdg", "--target", "x86-64-v3"]
    assert kedge(*words).returncode == 0
    program = [sys.executable, "-c", IMPORTED, *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stderr == SAID and done.stdout.splitlines()[-1] == "0 []", done.stdout


IN_A_MOUNT = """
set -e
mkdir "$1"
mount -t tmpfs -o size="$3" kedge-cache "$1" || exit 99
cp -a "$2"/. "$1"
test "$4" = rw || mount -o remount,ro "$1"
cache=$1; shift 4
KEDGE_CACHE_DIR=$cache "$@" 2>&1; echo "status $?"
echo "left: $(find "$cache/artifacts" -name '.*' | wc -l)"
"""


def in_a_mount(tmp_path: Path, root: Path, size: str, mode: str) -> str:
    """What a compile to second.kdg says whose cache is a copy of `root` on a real file system of its own.

    It is mounted where only this test sees it. "ro": nothing can be written there.
    """
    command = kedge_command("compile", digits_model(), "-o", tmp_path / "second.kdg", "--target", "x86-64-v3")
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", IN_A_MOUNT, "sh"]
    mount = [*unshare, str(tmp_path / "mount"), str(root), size, mode]
    done = subprocess.run([*mount, *command], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "status" not in done.stdout:
        assert not os.environ.get("CI"), done.stderr
        pytest.skip(f"no mount in a user namespace here: {done.stderr.strip()}")
    assert "status 0\nleft: 0" in done.stdout, done.stdout
    assert (tmp_path / "second.kdg").read_bytes() == (tmp_path / "first.kdg").read_bytes()
    return done.stdout


@pytest.mark.parametrize(("mode", "why"), [("rw", "No space left on device"), ("ro", "Read-only file system")])
def test_a_cache_without_room_or_read_only(kedge: Kedge, tmp_path: Path, root: Path, mode: str, why: str) -> None:
    """The kernels are there, the artifact is not."""
    compiled(kedge, tmp_path / "first.kdg", "--target", "x86-64-v3")
    Quota().clear(("artifacts",))
    pages = sum(-(-path.stat().st_size // 4096) for path in root.rglob("*") if path.is_file())
    said = in_a_mount(tmp_path, root, f"{(pages + 5) * 4}k", mode)
    assert "warning: the artifact is not kept for another compile: cannot write" in said and why in said, said
    assert said.count("warning:") == 1, said


def test_a_cache_of_others_is_read(kedge: Kedge, tmp_path: Path, root: Path) -> None:
    words = ("compile", digits_model(), "--target", "x86-64-v3", "-o")
    compiled(kedge, tmp_path / "first.kdg", "--target", "x86-64-v3")
    give_away(root)
    said = subprocess.run(
        as_others(*kedge_command(*words, tmp_path / "second.kdg")), capture_output=True, text=True, check=True
    ).stderr
    assert SAID in said and "warning" not in said, said
    assert (tmp_path / "second.kdg").read_bytes() == (tmp_path / "first.kdg").read_bytes()


def test_what_may_not_be_read_or_removed_is_one_error(kedge_here: Kedge, tmp_path: Path, root: Path) -> None:
    compiled(kedge_here, tmp_path / "first.kdg")
    (kept,) = root.glob("artifacts/objects/??/*.kdg")
    for mode, words, said in (
        (0o555, ("cache", "clear"), f"such as {kept}: Permission denied"),
        (0o000, ("cache",), f"such as {kept.parent}: Permission denied"),
        (0o000, ("cache", "clear"), f"such as {kept.parent}: Permission denied"),
    ):
        kept.parent.chmod(mode)
        try:
            done = subprocess.run(as_others(*kedge_command(*words)), capture_output=True, text=True, check=False)
        finally:
            kept.parent.chmod(0o755)
        assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
        assert said in done.stderr and "one file or folder is out of reach" in done.stderr
        assert "hint: another user's files are theirs to remove" in done.stderr
    assert [each.path for each in Quota().kept()] == [kept]


def test_unfinished_files_and_the_count_have_their_places(kedge_here: Kedge, root: Path) -> None:
    folder = root / "kernels"
    folder.mkdir(parents=True)
    (root / ".size").write_text("0 0\n")
    (root / f".size.{'0' * 16}").write_text("0")
    (folder / ".kernel-abcd").write_text("half")
    (root / "runtime").mkdir()
    (root / "runtime" / "lib").write_bytes(b"123456")
    (root / "runtime" / "link").symlink_to("lib")
    facts = json.loads(kedge_here("cache", "--json").stdout)
    assert facts["unfinished"] == {"files": 2, "bytes": 5} and facts["other"] == {"bytes": 6}
    assert facts["kernels"] == facts["artifacts"] == {"files": 0, "bytes": 0}
    assert "2 files, 5 B" in kedge_here("cache").stdout


def test_what_vanishes_while_it_is_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "runtime").mkdir(parents=True)
    for name in ("first", "second"):
        (root / "runtime" / name).write_bytes(b"123")
    lstat = Path.lstat

    def late(self: Path) -> os.stat_result:
        if self.name == "second":
            self.unlink()
        return lstat(self)

    monkeypatch.setattr(Path, "lstat", late)
    assert Quota().other_bytes() == 3
