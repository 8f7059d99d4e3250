"""Test the fleet with nothing but what users install: the newest packages that pyproject.toml allows, and the oldest.

    python tools/compat.py [newest|oldest]...

The developers' environment has neither: its tools hold packages back. Each set gets an environment of its own, made
anew in .cache/compat, with the Python that runs this and what tests/conftest.py imports as the only guests.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "compat"
#: What tests/conftest.py imports beyond kedge; neither brings a package that kedge uses.
GUESTS = ("pytest", "hypothesis")
#: Tracker, agent, clients and commands as processes, with and without TLS; health, reflection and metrics; what
#: depends on asyncio's inside.
TESTS = (
    "tests/cli/test_fleet.py",
    "tests/cli/test_access.py",
    "tests/wire/test_observability.py",
    "tests/wire/test_session_relay.py",
)


def oldest(requirement: str) -> str:
    """The first version that a requirement of the form "name>=1.2,<3" allows, as a constraint."""
    match = re.fullmatch(r"([\w-]+)>=([\w.]+)(,<[\w.]+)?", requirement)
    if match is None:
        sys.exit(f"pyproject.toml: {requirement!r} does not say which version is the oldest: name>=1.2[,<3]")
    return f"{match[1]}=={match[2]}"


def install(name: str) -> Path:
    """An environment with that set of packages; returns its folder of commands."""
    folder = CACHE / name
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(map(oldest, project["dependencies"])) if name == "oldest" else "")
    guests = [each for each in project["optional-dependencies"]["dev"] if re.split(r"[^\w-]", each)[0] in GUESTS]
    pip = [folder / "bin" / "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--constraint", constraints, "--editable", ROOT, *guests], check=True)
    return folder / "bin"


def test(commands: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests with what is installed there."""
    command = [commands / "pytest", "-q", *TESTS]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def main(names: list[str]) -> int:
    """Test with these sets at once; 1 where one of them fails."""
    sets = {name: install(name) for name in names or ["newest", "oldest"]}
    with ThreadPoolExecutor() as pool:
        done = dict(zip(sets, pool.map(test, sets.values()), strict=True))
    for name, each in done.items():
        print(f"With the {name} packages that users may have:\n{each.stdout}", flush=True)
        if each.returncode != 0:
            subprocess.run([sets[name] / "pip", "list"], check=True)
    return int(any(each.returncode for each in done.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
