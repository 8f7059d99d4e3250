"""Processors as schedule rules see them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A processor."""

    vector_bits: int = 256
    num_cores: int = 4
    vector_registers: int = 16
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 512 * 1024
    l3_bytes: int = 8 * 1024 * 1024
    fma_per_cycle: float = 2.0
    fma_latency: int = 4
    loads_per_cycle: float = 2.0
    stores_per_cycle: float = 1.0
    fma: bool = True
    fma_by_element: bool = False
    memory_operands: bool = True

    @property
    def l3_share_bytes(self) -> int:
        return self.l3_bytes // self.num_cores


AVX2, AVX512 = Model(), Model(vector_bits=512, vector_registers=32)
NEON = Model(vector_bits=128, vector_registers=32, fma_by_element=True, memory_operands=False)
SCALAR = Model(vector_bits=0, num_cores=1)
TARGETS = {"avx2": AVX2, "avx512": AVX512, "neon": NEON, "scalar": SCALAR}
