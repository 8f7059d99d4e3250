"""A cache of the test run's own, so that every kernel is compiled by the code under test."""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge.compiler.cache import KernelCache


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    return KernelCache(Path(tmp_path_factory.mktemp("kernels")))
