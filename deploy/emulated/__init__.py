"""Boards without hardware: an ARM user land under qemu with a real SSH server."""

from kedge.deploy.emulated.board import ARCHITECTURES, EmulatedBoard

__all__ = ["ARCHITECTURES", "EmulatedBoard"]
