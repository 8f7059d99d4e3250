"""Packaging: weights in safetensors, code and manifest in an artifact."""

from kedge.compiler.package.package import CompiledVariant, package
from kedge.compiler.package.weights import Weights, pack_weights

__all__ = ["CompiledVariant", "Weights", "pack_weights", "package"]
