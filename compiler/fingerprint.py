"""What tells one compiler from another: hashes of its sources and of the packages below. They are parts of keys."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

from kedge.compiler.toolchain import linker_version
from kedge.rpc import artifact

#: The folders of the compiler that make code of a function.
_MAKING_CODE = ("codegen", "schedule", "target", "tir")
#: Packages that compute or write something of an artifact, beside llvmlite, which `compiler_version` knows.
_PACKAGES = ("kedge", "numpy", "onnx", "ml_dtypes")


@functools.cache
def compiler_version() -> str:
    """Changes whenever what makes code of a function does: the schedule rules, the code generator, the LLVM below."""
    digest = hashlib.sha256(version("llvmlite").encode())
    root = Path(__file__).parent
    for folder in _MAKING_CODE:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def lowering_version() -> str:
    """Changes whenever what lowers groups does: any source that `compiler_version` leaves out, or that itself."""
    digest = hashlib.sha256(compiler_version().encode())
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in _MAKING_CODE:
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def artifact_version() -> str:
    """Changes whenever what makes an artifact of a model may: all sources of the compiler, what it takes from
    `kedge.rpc` (the format, the ABI), Python, the packages that it computes with, the linker, the kind of machine."""
    digest = hashlib.sha256(lowering_version().encode())
    root = Path(artifact.__file__).parents[1]
    for path in sorted((*root.glob("*.py"), *(root / "artifact").glob("*.py"))):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    packages = [(name, version(name)) for name in _PACKAGES]
    facts = (packages, linker_version(), platform.python_version(), platform.system(), platform.machine())
    digest.update(repr(facts).encode())
    return digest.hexdigest()
