"""Train the digits classifier that kedge carries as package data, and export it to ONNX.

A small convolutional network on scikit-learn's bundled 8x8 digits, in plain numpy so that anybody can rerun it in
seconds on any machine:

    pip install ".[train]"
    python examples/train_digits.py                    # rewrites kedge/data/digits.{onnx,json} and digits_test.npz
    python examples/train_digits.py --out /tmp/digits  # writes them elsewhere

The exported graph keeps BatchNormalization as its own operator (nothing is folded by hand) and a free batch size
"N". Shuffling, initial weights and augmentation come from one seed; with the same numpy and BLAS the result is the
same to the bit.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import sklearn
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

Array = np.ndarray[Any, Any]
DATA = Path(__file__).resolve().parents[1] / "kedge" / "data"
CLASSES = 10
HELD_OUT = 360  # of 1797 images
OPSET = 17


class Layer(Protocol):
    """A differentiable step. `backward` returns the gradient of its input and fills `grads` like `weights`."""

    weights: dict[str, Array]
    grads: dict[str, Array]

    def forward(self, x: Array, train: bool) -> Array: ...
    def backward(self, dy: Array) -> Array: ...


class Conv:
    """3x3 convolution, stride 1, padding 1, as a matrix product over patches (im2col)."""

    def __init__(self, channels_in: int, channels_out: int, rng: np.random.Generator) -> None:
        std = np.sqrt(2.0 / (channels_in * 9))  # He et al. 2015, for the ReLU that follows
        weight = rng.standard_normal((channels_out, channels_in, 3, 3)) * std
        self.weights = {"weight": weight.astype(np.float32), "bias": np.zeros(channels_out, np.float32)}
        self.grads: dict[str, Array] = {}

    def forward(self, x: Array, train: bool) -> Array:
        n, _, h, w = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = sliding_window_view(padded, (3, 3), axis=(2, 3))  # n, c, h, w, 3, 3
        self.patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * h * w, -1)
        weight = self.weights["weight"]
        y = self.patches @ weight.reshape(len(weight), -1).T + self.weights["bias"]
        return y.reshape(n, h, w, -1).transpose(0, 3, 1, 2)

    def backward(self, dy: Array) -> Array:
        n, _, h, w = dy.shape
        weight = self.weights["weight"]
        flat = dy.transpose(0, 2, 3, 1).reshape(n * h * w, -1)
        self.grads = {"weight": (flat.T @ self.patches).reshape(weight.shape), "bias": flat.sum(axis=0)}
        patches = (flat @ weight.reshape(len(weight), -1)).reshape(n, h, w, -1, 3, 3)
        dx = np.zeros((n, weight.shape[1], h + 2, w + 2), np.float32)
        for i in range(3):
            for j in range(3):
                dx[:, :, i : i + h, j : j + w] += patches[..., i, j].transpose(0, 3, 1, 2)
        return dx[:, :, 1:-1, 1:-1]


class BatchNorm:
    """Normalisation per channel (Ioffe & Szegedy 2015); running statistics serve at inference."""

    epsilon = 1e-5
    momentum = 0.9

    def __init__(self, channels: int) -> None:
        self.weights = {"scale": np.ones(channels, np.float32), "bias": np.zeros(channels, np.float32)}
        self.grads: dict[str, Array] = {}
        self.mean = np.zeros(channels, np.float32)
        self.var = np.ones(channels, np.float32)

    def forward(self, x: Array, train: bool) -> Array:
        mean, var = (x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))) if train else (self.mean, self.var)
        if train:
            count = x.size // x.shape[1]
            unbiased = var * (count / (count - 1))
            self.mean = self.momentum * self.mean + (1 - self.momentum) * mean
            self.var = self.momentum * self.var + (1 - self.momentum) * unbiased
        self.inverse = (1.0 / np.sqrt(var + self.epsilon))[:, None, None].astype(np.float32)
        self.normal = (x - mean[:, None, None]) * self.inverse
        return self.normal * self.weights["scale"][:, None, None] + self.weights["bias"][:, None, None]

    def backward(self, dy: Array) -> Array:
        self.grads = {"scale": (dy * self.normal).sum(axis=(0, 2, 3)), "bias": dy.sum(axis=(0, 2, 3))}
        d = dy * self.weights["scale"][:, None, None]
        mean = d.mean(axis=(0, 2, 3), keepdims=True)
        along = (d * self.normal).mean(axis=(0, 2, 3), keepdims=True)
        return (d - mean - self.normal * along) * self.inverse


class Relu:
    """max(x, 0)."""

    def __init__(self) -> None:
        self.weights: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}

    def forward(self, x: Array, train: bool) -> Array:
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy: Array) -> Array:
        return dy * self.positive


class MaxPool:
    """Largest of each 2x2 block; the gradient goes to the first largest."""

    def __init__(self) -> None:
        self.weights: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}

    def forward(self, x: Array, train: bool) -> Array:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
        self.winner = blocks.argmax(axis=-1)
        return blocks.max(axis=-1)

    def backward(self, dy: Array) -> Array:
        n, c, h, w = dy.shape
        blocks = (np.arange(4) == self.winner[..., None]) * dy[..., None]
        return blocks.reshape(n, c, h, w, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, 2 * h, 2 * w)


class Dense:
    """Flatten and multiply: x.reshape(n, -1) @ weight.T + bias."""

    def __init__(self, features: int, outputs: int, rng: np.random.Generator) -> None:
        weight = rng.standard_normal((outputs, features)) * np.sqrt(1.0 / features)
        self.weights = {"weight": weight.astype(np.float32), "bias": np.zeros(outputs, np.float32)}
        self.grads: dict[str, Array] = {}

    def forward(self, x: Array, train: bool) -> Array:
        self.shape = x.shape
        self.flat = x.reshape(len(x), -1)
        return self.flat @ self.weights["weight"].T + self.weights["bias"]

    def backward(self, dy: Array) -> Array:
        self.grads = {"weight": dy.T @ self.flat, "bias": dy.sum(axis=0)}
        return (dy @ self.weights["weight"]).reshape(self.shape)


class Adam:
    """Adam (Kingma & Ba 2015) over the weights of all layers."""

    def __init__(self, layers: list[Layer], beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> None:
        self.layers, self.beta1, self.beta2, self.epsilon = layers, beta1, beta2, epsilon
        self.steps = 0
        self.moments = [{k: (np.zeros_like(w), np.zeros_like(w)) for k, w in layer.weights.items()} for layer in layers]

    def step(self, rate: float) -> None:
        self.steps += 1
        scale = rate * np.sqrt(1 - self.beta2**self.steps) / (1 - self.beta1**self.steps)
        for layer, moments in zip(self.layers, self.moments, strict=True):
            for key, grad in layer.grads.items():
                m, v = moments[key]
                m += (1 - self.beta1) * (grad - m)
                v += (1 - self.beta2) * (grad * grad - v)
                layer.weights[key] -= (scale * m / (np.sqrt(v) + self.epsilon)).astype(np.float32)


def network(rng: np.random.Generator) -> list[Layer]:
    """Conv-BatchNorm-ReLU-MaxPool twice (1 -> 16 -> 32 channels, 8x8 -> 2x2), then a dense layer to 10 logits."""
    return [
        Conv(1, 16, rng), BatchNorm(16), Relu(), MaxPool(),
        Conv(16, 32, rng), BatchNorm(32), Relu(), MaxPool(),
        Dense(128, CLASSES, rng),
    ]  # fmt: skip


def forward(layers: list[Layer], x: Array, train: bool = False) -> Array:
    for layer in layers:
        x = layer.forward(x, train)
    return x


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean loss of a batch and its gradient with respect to the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    gradient = np.exp(log_probabilities)
    gradient[rows, labels] -= 1
    return float(-log_probabilities[rows, labels].mean()), gradient / len(labels)


def shifted(images: Array, rng: np.random.Generator) -> Array:
    """Every image moved by -1, 0 or 1 pixel each way: the only augmentation."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, images.shape[2:], axis=(2, 3))  # n, 1, 3, 3, h, w
    rows, columns = rng.integers(0, 3, (2, len(images)))
    return windows[np.arange(len(images)), :, rows, columns]


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[Array]:
    order = rng.permutation(count)
    yield from (order[start : start + size] for start in range(0, count, size))


def train(images: Array, labels: Array, *, epochs: int, batch: int, rate: float, seed: int) -> list[Layer]:
    """Train from scratch; the learning rate falls to zero along half a cosine."""
    rng = np.random.default_rng(seed)
    layers = network(rng)
    optimizer = Adam(layers)
    for epoch in range(epochs):
        losses = []
        for picked in batches(len(images), batch, rng):
            logits = forward(layers, shifted(images[picked], rng), train=True)
            loss, gradient = cross_entropy(logits, labels[picked])
            for layer in reversed(layers):
                gradient = layer.backward(gradient)
            optimizer.step(rate * 0.5 * (1 + np.cos(np.pi * epoch / epochs)))
            losses.append(loss)
        if epoch % 10 == 9 or epoch == epochs - 1:
            print(f"epoch {epoch + 1:3d}  loss {np.mean(losses):.4f}")
    return layers


def accuracy(layers: list[Layer], images: Array, labels: Array) -> float:
    return float((forward(layers, images).argmax(axis=1) == labels).mean())


def export(layers: list[Layer]) -> onnx.ModelProto:
    """The trained layers as an ONNX model: image (N, 1, 8, 8) float32 -> probabilities (N, 10) float32."""
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, Array] = {}
    current = "image"

    def emit(op: str, name: str, arrays: dict[str, Array], **attributes: Any) -> None:
        nonlocal current
        weights.update({f"{name}.{key}": value for key, value in arrays.items()})
        output = "probabilities" if op == "Softmax" else f"{name}.out"
        operands = [current, *(f"{name}.{key}" for key in arrays)]
        nodes.append(helper.make_node(op, operands, [output], name=name, **attributes))
        current = output

    block = 1
    for layer in layers:
        if isinstance(layer, Conv):
            emit("Conv", f"conv{block}", layer.weights, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
        elif isinstance(layer, BatchNorm):
            arrays = {**layer.weights, "mean": layer.mean, "var": layer.var}
            emit("BatchNormalization", f"bn{block}", arrays, epsilon=layer.epsilon)
        elif isinstance(layer, Relu):
            emit("Relu", f"relu{block}", {})
        elif isinstance(layer, MaxPool):
            emit("MaxPool", f"pool{block}", {}, kernel_shape=[2, 2], strides=[2, 2])
            block += 1
        else:
            emit("Flatten", "flatten", {}, axis=1)
            emit("Gemm", "fc", layer.weights, transB=1)
            emit("Softmax", "softmax", {}, axis=1)
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="train_digits.py"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def load_split(seed: int) -> tuple[Array, Array, Array, Array]:
    """Training images and labels, then the held-out ones; images are (N, 1, 8, 8) float32 in [0, 1]."""
    digits = load_digits()
    images = (digits.images[:, None] / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(images))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    return images[rest], labels[rest], images[held_out], labels[held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: kedge/data)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="initial learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    images, labels, test_images, test_labels = load_split(options.seed)
    layers = train(images, labels, epochs=options.epochs, batch=options.batch, rate=options.rate, seed=options.seed)
    correct = int((forward(layers, test_images).argmax(axis=1) == test_labels).sum())
    report = {
        "accuracy": correct / len(test_labels),
        "correct": correct,
        "train_accuracy": accuracy(layers, images, labels),
        "split": {"train": len(labels), "held_out": len(test_labels), "how": "numpy default_rng(seed).permutation"},
        "training": {"epochs": options.epochs, "batch": options.batch, "rate": options.rate, "seed": options.seed},
        "opset": OPSET,
        "versions": {
            "python": platform.python_version(), "numpy": np.__version__,
            "scikit-learn": sklearn.__version__, "onnx": onnx.__version__,
        },
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    onnx.save(export(layers), str(options.out / "digits.onnx"))
    np.savez_compressed(options.out / "digits_test.npz", images=test_images, labels=test_labels)
    (options.out / "digits.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"accuracy {report['accuracy']:.4f} on {len(test_labels)} held-out images; wrote {options.out}/digits.*")


if __name__ == "__main__":
    main()
