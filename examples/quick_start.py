"""The quick start: define an MLP, look at it, compile it, run it, compare it with numpy, time it.

python examples/quick_start.py
"""

from __future__ import annotations

import numpy as np

import kedge
from kedge import nn


class Mlp(nn.Module):
    """784 pixels to 10 classes through one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 256)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(256, 10)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return self.fc2(self.relu(self.fc1(x)))


def main() -> None:
    """Build, compile, run and check."""
    module, params = Mlp().export(spec={"forward": {"x": nn.spec.Tensor(("n", 784), "float32")}})
    print(module.show())

    rng = np.random.default_rng(0)
    weights = {name: (rng.standard_normal(type_.shape) / 16).astype(type_.dtype) for name, type_ in params.items()}
    artifact = kedge.compile(module.bind(weights), target="native", name="mlp")

    x = rng.random((3, 784), dtype=np.float32)
    with artifact.open(threads=1) as m:
        y = m.run({"x": x}, function="forward")["output"]
    hidden = np.maximum(x @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
    expected = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    print(f"largest difference from numpy: {np.abs(y - expected).max():.2g}")

    with kedge.local(threads=1) as device:
        print(device.load(artifact).time({"x": x[:1]}, function="forward"))


if __name__ == "__main__":
    main()
