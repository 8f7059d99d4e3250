"""kedge: compile models on a host, run and time them on remote devices.

    import kedge

    model = kedge.load("resnet18.onnx", shapes={"x": (1, 3, 224, 224)})
    artifact = kedge.compile(model, target="native")
    with artifact.open(threads=1) as m:
        out = m.run({"x": x})

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedge import aio, nn, patterns, te
    from kedge.api import compile, connect, devices, load, local, pipeline  # noqa: A004 - the field says compile
    from kedge.artifact import Artifact
    from kedge.compiler.graph.external import External
    from kedge.compiler.graph.ir import Module
    from kedge.compiler.ops.opaque import register_onnx
    from kedge.compiler.schedule.schedule import Schedule
    from kedge.rpc.errors import KedgeError

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "External",
    "KedgeError",
    "Module",
    "Schedule",
    "__version__",
    "aio",
    "compile",
    "connect",
    "devices",
    "load",
    "local",
    "nn",
    "patterns",
    "pipeline",
    "register_onnx",
    "te",
]

#: Public name -> module, and the name in it; without one the module itself is meant.
_WHERE = {
    "Artifact": ("kedge.artifact", "Artifact"),
    "External": ("kedge.compiler.graph.external", "External"),
    "KedgeError": ("kedge.rpc.errors", "KedgeError"),
    "Module": ("kedge.compiler.graph.ir", "Module"),
    "Schedule": ("kedge.compiler.schedule.schedule", "Schedule"),
    "aio": ("kedge.aio", None),
    "compile": ("kedge.api", "compile"),
    "connect": ("kedge.api", "connect"),
    "devices": ("kedge.api", "devices"),
    "load": ("kedge.api", "load"),
    "local": ("kedge.api", "local"),
    "nn": ("kedge.nn", None),
    "patterns": ("kedge.patterns", None),
    "pipeline": ("kedge.api", "pipeline"),
    "register_onnx": ("kedge.compiler.ops.opaque", "register_onnx"),
    "te": ("kedge.te", None),
}


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _WHERE[name]
    except KeyError:
        raise AttributeError(f"module 'kedge' has no attribute {name!r}") from None
    found = import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
