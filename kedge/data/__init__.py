"""The digits model and its held-out images, made by `examples/train_digits.py`.

`digits.json` beside them records the accuracy, the split, the seed and the versions used.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np


def digits_model() -> Path:
    """The path of `digits.onnx`: image (N, 1, 8, 8) float32 in [0, 1] -> probabilities (N, 10) float32."""
    return _path("digits.onnx")


def digits_test() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The held-out images (360, 1, 8, 8) float32 and their labels (360,) int64."""
    with np.load(_path("digits_test.npz")) as data:
        return data["images"], data["labels"]


def digits_report() -> dict[str, Any]:
    """What `digits.json` says about the model: accuracy on the held-out images, split, seed, versions."""
    report: dict[str, Any] = json.loads(_path("digits.json").read_text())
    return report


def _path(name: str) -> Path:
    # Wheels are installed unpacked, so that the resource is a file of its own.
    return Path(str(files(__name__).joinpath(name)))
