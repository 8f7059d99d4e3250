"""Networks described in Python: the quick start, several functions, names, and bad descriptions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kedge.compiler.errors import FrontendError, ShapeError
from kedge.compiler.frontend import nn
from kedge.compiler.frontend.onnx import load_onnx
from kedge.compiler.graph import interp
from kedge.compiler.graph.ir import Constant
from kedge.compiler.graph.verify import verify
from kedge.compiler.tir.expr import Var
from kedge.data import digits_model, digits_test
from kedge.rpc.errors import InputError
from support.onnx_models import one_operator, onnxruntime_outputs

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


class MLP(nn.Module):
    def __init__(self) -> None:
        self.fc1 = nn.Linear(784, 256)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(256, 10)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def embed(self, x: nn.Tensor) -> dict[str, nn.Tensor]:
        return {"hidden": self.act(self.fc1(x))}


SPEC = {"forward": {"x": nn.spec.Tensor(("n", 784), "float32")}}


def test_quick_start_agrees_with_numpy() -> None:
    mlp = MLP()
    mod, params = mlp.export(SPEC)
    verify(mod)
    assert {name: (type_.shape, type_.dtype) for name, type_ in params.items()} == {
        "fc1.weight": ((256, 784), "float32"),
        "fc1.bias": ((256,), "float32"),
        "fc2.weight": ((10, 256), "float32"),
        "fc2.bias": ((10,), "float32"),
    }
    assert mod.params == {}
    data = {name: random(*type_.shape) for name, type_ in params.items()}  # type: ignore[arg-type]
    bound = mod.bind(data)
    for batch in (1, 7):
        x = random(batch, 784)
        hidden = np.maximum(x @ data["fc1.weight"].T + data["fc1.bias"], 0)
        want = hidden @ data["fc2.weight"].T + data["fc2.bias"]
        got = interp.run(bound, {"x": x}, "forward")["output"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        # Unbound, the same parameters are inputs of the call.
        again = interp.run(mod, {"x": x, **data}, "forward")["output"]
        np.testing.assert_array_equal(again, got)


def test_quick_start_as_printed(golden: Any) -> None:
    golden("mlp.txt", MLP().export(SPEC)[0].show())


def test_several_functions_share_parameters_and_dims() -> None:
    mlp = MLP()
    mlp.init_params(seed=1)
    x = nn.spec.Tensor(("n", 784))
    mod, _ = mlp.export({"forward": {"x": x}, "embed": {"x": x}})
    assert list(mod.functions) == ["forward", "embed"]
    assert set(mod.params) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    dims = [function.inputs[0].type.shape[0] for function in mod.functions.values()]
    assert isinstance(dims[0], Var) and dims[0] is dims[1] and dims[0].lower == 1
    image = random(2, 784)
    hidden = interp.run(mod, {"x": image}, "embed")["hidden"]
    want = hidden @ mod.params["fc2.weight"].T + mod.params["fc2.bias"]
    np.testing.assert_allclose(interp.run(mod, {"x": image}, "forward")["output"], want, rtol=1e-5, atol=1e-5)


def test_initial_parameters_are_seeded() -> None:
    first, again, other = (MLP().init_params(seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["fc1.weight"], other["fc1.weight"])
    assert np.abs(first["fc1.weight"]).max() <= 1 / np.sqrt(784)


def digits_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(), nn.Flatten(), nn.Linear(128, 10), nn.Softmax(),
    )  # fmt: skip


def test_the_digits_network_in_layers_is_the_onnx_model() -> None:
    imported = load_onnx(digits_model())
    net = digits_network()
    suffixes = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
    names = {"0": "conv1", "1": "bn1", "4": "conv2", "5": "bn2", "10": "fc"}
    state = {}
    for name, _ in net.named_parameters():
        layer, suffix = name.split(".")
        source = names[layer]
        state[name] = imported.params[f"{source}.{suffixes.get(suffix, suffix) if 'bn' in source else suffix}"]
    net.load_state_dict(state)
    mod, _ = net.export({"forward": {"x": nn.spec.Tensor(("n", 1, 8, 8))}})
    verify(mod)
    images, _ = digits_test()
    np.testing.assert_allclose(
        interp.run(mod, {"x": images}, "forward")["output"],
        interp.run(imported, {"image": images})["probabilities"],
        rtol=1e-5,
        atol=1e-6,
    )


def test_every_layer_and_operator_against_numpy() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            self.scale = nn.Parameter((3,))
            self.layers = [nn.Sigmoid(), nn.Tanh()]
            self.pool = nn.AvgPool2d(2)

        def forward(self, x: nn.Tensor, y: nn.Tensor) -> tuple[nn.Tensor, ...]:
            z = (1 - x * self.scale) / (2 + nn.op.abs(y)) - 0.5
            for layer in self.layers:
                z = layer(z)
            product = x @ nn.op.permute(y, (0, 2, 1))
            parts = nn.op.split(nn.op.concat([x, y], axis=2), [1, 5], axis=2)
            pooled = self.pool(nn.op.unsqueeze(nn.op.pad(x, (0, 0, 0, 0, 0, 1)), 1))
            chosen = nn.op.where(nn.op.greater(x, y), x, 0.0)
            return z, product, parts[1], pooled, chosen, nn.op.mean(x**2, axis=-1), nn.op.argmax(x, axis=-1), -x

    net = Everything()
    scale = random(3)
    net.scale.set(scale)
    spec = nn.spec.Tensor(("b", 4, 3))
    mod, _ = net.export({"forward": {"x": spec, "y": spec}})
    verify(mod)
    x, y = random(2, 4, 3), random(2, 4, 3)
    z = np.tanh(1 / (1 + np.exp(-((1 - x * scale) / (2 + np.abs(y)) - 0.5))))
    padded = np.pad(x, ((0, 0), (0, 0), (0, 1)))
    want = [
        z, x @ y.transpose(0, 2, 1), np.concatenate([x, y], axis=2)[:, :, 1:],
        padded.reshape(2, 1, 2, 2, 2, 2).mean(axis=(3, 5)), np.where(x > y, x, 0), (x**2).mean(axis=-1),
        x.argmax(axis=-1), -x,
    ]  # fmt: skip
    got = interp.run(mod, {"x": x, "y": y}, "forward")
    assert list(got) == [f"output{index}" for index in range(len(want))]
    for result, expected in zip(got.values(), want, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_numbers_take_the_dtype_of_the_tensor() -> None:
    class Halve(nn.Module):
        def forward(self, x: nn.Tensor) -> nn.Tensor:
            return x * 0.5 + np.float64(1.0)

    mod, _ = Halve().export({"forward": {"x": nn.spec.Tensor((4,), "float64")}})
    literals = [value for value in mod.functions["forward"].values() if isinstance(value, Constant)]
    assert {str(value.data.dtype) for value in literals} == {"float64"}
    assert interp.run(mod, {"x": np.ones(4)}, "forward")["output"].dtype == np.float64
    with pytest.raises(FrontendError, match=r"0\.5 is no int32") as caught:
        Halve().export({"forward": {"x": nn.spec.Tensor((4,), "int32")}})
    assert "cast the int32 tensor first" in str(caught.value)


def test_shared_parameters_have_one_name_and_cycles_end() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.parent = self

        def forward(self, x: nn.Tensor) -> nn.Tensor:
            return self.b(self.a(x))

    mod, params = Tied().export({"forward": {"x": nn.spec.Tensor((1, 4))}})
    assert list(params) == ["a.weight"]
    verify(mod)


def test_bad_descriptions() -> None:
    mlp = MLP()
    with pytest.raises(FrontendError, match="no method 'backward'"):
        mlp.export({"backward": {}})
    with pytest.raises(FrontendError, match=r"forward does not take the arguments image") as caught:
        mlp.export({"forward": {"image": nn.spec.Tensor((1, 784))}})
    assert caught.value.hint is not None and "forward(x" in caught.value.hint
    with pytest.raises(FrontendError, match="at least one function"):
        mlp.export({})
    with pytest.raises(ShapeError, match="783"):
        mlp.export({"forward": {"x": nn.spec.Tensor((1, 783))}})
    with pytest.raises(FrontendError, match="only while its module is exported"):
        nn.op.relu(mlp.fc1.weight)

    class Nothing(nn.Module):
        def forward(self, x: nn.Tensor) -> None:
            return None

    class Stray(nn.Module):
        def forward(self, x: nn.Tensor) -> nn.Tensor:
            return x + nn.Parameter((4,))

    with pytest.raises(FrontendError, match="returns NoneType"):
        Nothing().export({"forward": {"x": nn.spec.Tensor((4,))}})
    with pytest.raises(FrontendError, match="stands in no attribute"):
        Stray().export({"forward": {"x": nn.spec.Tensor((4,))}})


def test_bad_parameters() -> None:
    mlp = MLP()
    state = mlp.init_params(0)
    with pytest.raises(InputError, match=r"fc1\.bias is float32\[256\], but its data is float64\[256\]"):
        mlp.load_state_dict({**state, "fc1.bias": np.zeros(256)})
    with pytest.raises(InputError, match=r"lacks fc2\.bias and has unknown fc3\.bias"):
        mlp.load_state_dict({**{k: v for k, v in state.items() if k != "fc2.bias"}, "fc3.bias": np.zeros(1)})


class Decoder(nn.Module):
    def __init__(self, mode: Any, align_corners: bool) -> None:
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.resize = nn.Upsample((2, 3), mode, align_corners)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return self.resize(self.up(x))


@pytest.mark.parametrize(
    ("mode", "align_corners", "attributes"),
    [
        ("nearest", False, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
        ("bilinear", False, {"mode": "linear"}),
        ("bilinear", True, {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
        ("bicubic", False, {"mode": "cubic"}),
    ],
)
def test_making_images_larger(mode: str, align_corners: bool, attributes: dict[str, Any]) -> None:
    """As ONNX Runtime does with the nodes that PyTorch exports for these layers."""
    decoder = Decoder(mode, align_corners)
    params = decoder.init_params(seed=0)
    mod, types = decoder.export({"forward": {"x": nn.spec.Tensor(("n", 6, "h", 5))}})
    assert {name: type_.shape for name, type_ in types.items()} == {"up.weight": (6, 2, 3, 3), "up.bias": (4,)}
    x = random(2, 6, 4, 5)
    weights = [np.asarray(params["up.weight"]), np.asarray(params["up.bias"])]
    model, feeds = one_operator(
        "ConvTranspose", [x, *weights], strides=[2, 2], pads=[1] * 4, output_padding=[1, 1], group=2
    )
    middle = onnxruntime_outputs(model, feeds)["y0"]
    scales = np.array([1, 1, 2, 3], np.float32)
    model, feeds = one_operator("Resize", [middle, None, scales], constant=[2], **attributes)
    want = onnxruntime_outputs(model, feeds)["y0"]
    got = interp.run(mod.bind(params), {"x": x}, "forward")["output"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, strict=True)


def test_nearest_has_no_corners_to_align() -> None:
    with pytest.raises(ShapeError, match="mode 'nearest' with align_corners=True"):
        Decoder("nearest", True).export({"forward": {"x": nn.spec.Tensor(("n", 6, 4, 5))}})
