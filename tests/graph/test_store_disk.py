"""A module that does not fit on the disk."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from kedge.compiler.errors import FrontendError
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import Module, TensorType


def test_a_full_disk_leaves_no_open_archive_behind(tmp_path, monkeypatch):
    """What is left open would complain out of the garbage collector, as numpy.savez of older versions does."""
    b = Builder("main")
    x = b.input("x", TensorType((4096,), "float32"))
    module = Module({"main": b.finish({"y": b.call("add", x, b.constant(np.ones(4096, np.float32)))})})
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: complaints.append(str(told.exc_value)))
    full = tmp_path / "m.kmod"
    monkeypatch.setattr(Path, "open", lambda *_: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb"))
    with pytest.raises(FrontendError, match=f"cannot write {full}: No space left on device"):
        module.save(full)
    monkeypatch.undo()
    gc.collect()
    assert complaints == [] and list(tmp_path.iterdir()) == []
