"""Describing networks in Python: layers, parameters by name, and functions exported to a kedge module.

    from kedge import nn

    net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    mod, params = net.export({"forward": {"x": nn.spec.Tensor(("n", 784), "float32")}})
    print(mod.show())
    mod = mod.bind(net.init_params(seed=0))

`nn.op` has the operators for use inside `forward`; tensors also take `+ - * / ** @` with numbers and parameters.
"""

from __future__ import annotations

from kedge.compiler.frontend.nn import op, spec
from kedge.compiler.frontend.nn.core import Module, Parameter, Tensor, constant_init, uniform_init
from kedge.compiler.frontend.nn.modules import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    Softmax,
    Tanh,
    Upsample,
)

__all__ = [
    "AvgPool2d", "BatchNorm2d", "Conv2d", "ConvTranspose2d", "Dropout", "Flatten", "Linear", "MaxPool2d", "Module",
    "Parameter", "ReLU", "Sequential", "Sigmoid", "Softmax", "Tanh", "Tensor", "Upsample", "constant_init", "op",
    "spec", "uniform_init",
]  # fmt: skip
