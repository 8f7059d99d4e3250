"""The script that made the digits model: what it exports is what it trained, and what it reports is true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kedge.compiler.frontend.onnx import load_onnx
from kedge.compiler.graph import interp
from kedge.data import digits_report, digits_test

SCRIPT = Path(__file__).parents[2] / "examples" / "train_digits.py"


def test_the_script_reports_what_its_model_does(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="training needs scikit-learn: pip install '.[train]'")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--epochs", "4"]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    report = json.loads((tmp_path / "digits.json").read_text())
    images, labels = digits_test()
    with np.load(tmp_path / "digits_test.npz") as data:
        # The split depends on the seed alone: the committed held-out images are those of this run.
        np.testing.assert_array_equal(data["images"], images)
        np.testing.assert_array_equal(data["labels"], labels)
    got = interp.run(load_onnx(tmp_path / "digits.onnx"), {"image": images})["probabilities"]
    assert int((got.argmax(axis=1) == labels).sum()) == report["correct"]
    assert report["accuracy"] > 0.8
    assert report["training"] == {**digits_report()["training"], "epochs": 4}


def test_held_out_images_are_as_described() -> None:
    images, labels = digits_test()
    assert images.dtype == np.float32 and images.shape == (360, 1, 8, 8)
    assert images.min() == 0 and images.max() == 1
    assert labels.dtype == np.int64 and set(labels.tolist()) == set(range(10))
