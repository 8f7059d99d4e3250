"""The package list, the checker's view of the tree, and the wheel as a user installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("compiler", "deploy", "device_agent", "protos", "rpc")


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages_in_tree() -> set[str]:
    found = set()
    for top in (*FLOORS, "kedge"):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "kedge" else ("kedge", *parts)))
    return found


def test_every_package_of_the_tree_is_listed() -> None:
    assert set(settings()["packages"]) == packages_in_tree()


def test_checkers_see_every_module_of_the_face() -> None:
    """`.paths/kedge` holds one link per floor and per module of kedge/; mypy checks what is linked."""
    linked, own = (
        {path.name: path for path in folder.iterdir() if path.name != "__pycache__"}
        for folder in (ROOT / ".paths" / "kedge", ROOT / "kedge")
    )
    assert set(linked) == set(own) | set(FLOORS)
    for path in linked.values():
        assert path.is_symlink() and path.exists(), f"{path} points nowhere"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked by pip, away from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"
    # Built from the committed and new files only: a build folder in the checkout would disturb other tests.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        origin = ROOT / name
        if origin.is_file() and not origin.is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(origin.read_bytes())
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("kedge-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run_installed(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=site.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_carries_code_and_data(installed: Path) -> None:
    program = (
        "import kedge, kedge.data, importlib.resources as r\n"
        "print(kedge.__file__)\n"
        "assert kedge.data.digits_model().is_file()\n"
        "assert r.files('kedge.device_agent.runtime').joinpath('kedge.h').is_file()\n"
        "assert r.files('kedge.device_agent.runtime').joinpath('kedge_external.h').is_file()\n"
        "assert r.files('kedge.protos').joinpath('v1/fleet.proto').is_file()\n"
    )
    result = run_installed(installed, "-c", program)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(installed)


def test_the_installed_wheel_compiles_and_runs(installed: Path, tmp_path: Path) -> None:
    program = (
        "import sys, kedge, kedge.data\n"
        "assert 'sklearn' not in sys.modules\n"
        "images, labels = kedge.data.digits_test()\n"
        "artifact = kedge.compile(kedge.data.digits_model(), target='native')\n"
        "with artifact.open(threads=1) as m:\n"
        "    p = m.run({'image': images})['probabilities']\n"
        "print((p.argmax(1) == labels).mean())\n"
    )
    result = run_installed(installed, "-c", program)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0.95


WITHOUT_SKLEARN = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sklearn", "onnxruntime"):
            raise ImportError(f"{name} is not there for users")

sys.meta_path.insert(0, Refuse())
sys.argv = ["kedge", "demo", "--no-arm", "--json"]
from kedge.cli import main
sys.exit(main())
"""


def test_the_demo_runs_from_the_installed_wheel(installed: Path) -> None:
    result = run_installed(installed, "-c", WITHOUT_SKLEARN)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert row["ok"] and row["accuracy"] > 0.95


def test_a_users_own_rpc_module_does_not_shadow_ours(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "rpc.py").write_text("NAME = 'mine'\n")
    script = tmp_path / "script.py"
    script.write_text("import rpc, kedge.rpc.errors\nprint(rpc.NAME, kedge.rpc.errors.KedgeError.__name__)\n")
    result = run_installed(installed, str(script))
    assert result.stdout.split() == ["mine", "KedgeError"], result.stderr
