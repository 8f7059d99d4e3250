"""`kedge.Artifact`: a compiled model that can also be opened in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge.rpc.artifact import Artifact as PlainArtifact
from kedge.rpc.artifact import Manifest

if TYPE_CHECKING:
    from kedge.rpc.client.inprocess import LoadedModel
    from kedge.rpc.types import Health


class Artifact(PlainArtifact):
    """A compiled model: `.save(path)`, `Artifact.load(path)`, `.size`, `.digest`, `.manifest`, `.open(threads=N)`."""

    @classmethod
    def of(cls, artifact: PlainArtifact) -> Artifact:
        """The same artifact with `open`."""
        return cls(
            artifact.manifest, {member.name: artifact.member(member.name) for member in artifact.manifest.members}
        )

    def open(self, threads: int = 0, device: str = "") -> LoadedModel:
        """Bind the variant for this machine in this process, zero-copy; close it, or use it in a `with`.

        Args:
            threads: of the kernels; 0 means as many as this process may use.
            device: where they run: "cpu", "opencl", "cuda" or one by its number, "cuda:1". Unless given, the first
                variant that fits this machine decides, in the order of the targets it was compiled for.

        Raises:
            InputError: `device` names none.
            IncompatibleTargetError: no variant runs on this machine, or on that device.
            ToolchainError: the native runtime is not built yet and cannot be.
        """
        from kedge.compiler.target import parse
        from kedge.compiler.toolchain import build_runtime
        from kedge.rpc.client.inprocess import open_in_process

        self.select_here()
        return open_in_process(self, build_runtime(parse("native")).lib, threads, device, _health)

    def select_here(self) -> None:
        """Raise IncompatibleTargetError where no variant is for this architecture, before anything is built for it."""
        import platform

        machine = platform.machine()
        if not any(variant.arch == machine for variant in self.manifest.variants):
            self.select(machine, ())


def _health() -> Health:
    """This machine's condition, for measurements in this process."""
    from kedge.device_agent.health import examine

    return examine(Path(tempfile.gettempdir()))


def external_functions(manifest: Manifest) -> tuple[str, ...]:
    """The C functions of a user's own that an artifact holds (see `kedge.External`), by its compiler's report."""
    from kedge.compiler.graph.external import EXTERNAL_RULE

    kernels = [kernel for variant in _maps(manifest.info, "variants") for kernel in _maps(variant, "kernels")]
    rules = [str(kernel.get("rule", "")) for kernel in kernels]
    found = [rule.removeprefix(EXTERNAL_RULE) for rule in rules if rule.startswith(EXTERNAL_RULE)]
    return tuple(dict.fromkeys(found))


def _maps(of: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of a list in a report, which other compilers may fill with something else."""
    value = of.get(key)
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
