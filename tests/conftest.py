"""Fixtures that every test may use."""

from __future__ import annotations

import difflib
import gc
import os
import signal
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import hypothesis
import pytest

from kedge.compiler.toolchain import cache_dir
from support.order import in_order


def pytest_configure(config: pytest.Config) -> None:
    """Credentials of trackers that tests start stay out of the user's own folder, in subprocesses too.

    zig builds a target's C library in seconds of work, once for each folder that it keeps things in: one for all tests,
    also for those with a cache of their own.

    How long an example may take is not judged: slow machines, and what is imported on the way, take what they take.

    Behind `nohup`, or in the background of a script, tests run with signals ignored, and so would every process that
    they start and interrupt. A handler that does nothing is not inherited.
    """
    hypothesis.settings.register_profile("kedge", deadline=None)
    hypothesis.settings.load_profile("kedge")
    folder = tempfile.TemporaryDirectory(prefix="kedge-tests-config-")
    config.add_cleanup(folder.cleanup)
    os.environ["KEDGE_CONFIG_DIR"] = folder.name
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache_dir() / "zig"))
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests and what they import stay to the end: garbage is not looked for among them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """File by file, as pytest-xdist gives them to its workers."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    items[:] = [item for path in in_order(files) for item in files[path]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite golden files with what the tests print")
    faults = parser.getgroup("faults", "the fault suite (-m faults)")
    faults.addoption("--fault-seed", type=int, help="what is done when (default: drawn, and printed)")
    faults.addoption("--fault-jobs", type=int, default=1_000, help="jobs under each kind of fault (%(default)s)")
    faults.addoption("--fault-injections", type=int, default=20, help="faults of each kind (%(default)s)")
    faults.addoption("--fault-hours", type=float, default=0.0, help="go on for so long, all kinds together")
    faults.addoption("--fault-report", metavar="FILE", help="add a line of JSON for each kind")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares `text` with `goldens/<name>` beside the test file."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "goldens" / name
        text = text if text.endswith("\n") else text + "\n"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return
        if not path.exists():
            pytest.fail(f"no golden {path}; run with --update-goldens, then read the file before committing it")
        expected = path.read_text()
        if expected != text:
            diff = "".join(difflib.unified_diff(expected.splitlines(True), text.splitlines(True), "golden", "now"))
            pytest.fail(f"{path.name} differs (--update-goldens rewrites it):\n{diff}")

    return check
