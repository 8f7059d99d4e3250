"""A module that does not fit on the disk."""

from __future__ import annotations

import errno
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.compiler.errors import FrontendError
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import Module, TensorType


class Full(io.BytesIO):
    """A file on a disk that has room for so many bytes."""

    room = 1000

    def write(self, data: Any) -> int:
        if self.tell() + len(memoryview(data).cast("B")) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_leaves_no_open_archive_behind(tmp_path, monkeypatch):
    """What is left open would complain out of the garbage collector, as numpy.savez of older versions does."""
    b = Builder("main")
    x = b.input("x", TensorType((4096,), "float32"))
    module = Module({"main": b.finish({"y": b.call("add", x, b.constant(np.ones(4096, np.float32)))})})
    archives, closed, file = [], [], Full()
    begin, close = zipfile.ZipFile.__init__, zipfile.ZipFile.close

    def begun(self, *args, **options):
        archives.append(self)
        begin(self, *args, **options)

    def closing(self):
        closed.append(self)
        close(self)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", begun)
    monkeypatch.setattr(zipfile.ZipFile, "close", closing)
    monkeypatch.setattr(Path, "open", lambda *_: file)
    full = tmp_path / "m.kmod"
    with pytest.raises(FrontendError, match=f"cannot write {full}: No space left on device"):
        module.save(full)
    monkeypatch.undo()
    assert len(archives) == 1 and closed[:1] == archives and file.closed and list(tmp_path.iterdir()) == []
