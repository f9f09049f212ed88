"""The named workloads, for every benchmark on every device. Imports no framework."""

import dataclasses

from fwpkm.config import FwPKMConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of a memory.

    Attributes:
        name: how the command line and the tables call it.
        config: the memory.
        batch: B, sequences.
        length: T, tokens of each.
    """

    name: str
    config: FwPKMConfig
    batch: int
    length: int

    @property
    def chunks(self) -> int:
        """How many chunks the call reads, a last partial one included."""
        return -(-self.length // self.config.chunk_size)

    @property
    def memories(self) -> int:
        """M: one memory for each sequence, or one for all."""
        return self.batch if self.config.memory_scope == "sequence" else 1

    @property
    def table_bytes(self) -> int:
        """Bytes of the value tables in float32."""
        return 4 * self.memories * self.config.num_slots * self.config.value_dim

    def __str__(self) -> str:
        """Shapes in the spec's symbols."""
        cfg = self.config
        return (
            f"B={self.batch} T={self.length} N={cfg.num_subkeys}² Dk={cfg.key_dim} Dv={cfg.value_dim} "
            f"H={cfg.num_heads} k={cfg.top_k} C={cfg.chunk_size}" + ", one table" * (cfg.memory_scope == "batch")
        )


def _paper(name: str, *, batch: int, length: int, num_subkeys: int, memory_scope: str = "sequence") -> Workload:
    config = dataclasses.replace(FwPKMConfig.paper(), num_subkeys=num_subkeys, memory_scope=memory_scope)
    return Workload(name, config, batch, length)


def _tiny(name: str, num_subkeys: int) -> Workload:
    config = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=num_subkeys, top_k=4, chunk_size=32)
    return Workload(name, config, batch=1, length=128)


WORKLOADS = {
    workload.name: workload
    for workload in (
        # One sequence through the paper's memory, at four table sizes: what the CPU benchmark measures.
        *(_paper(f"step-{s}", batch=1, length=2048, num_subkeys=s) for s in (128, 256, 512, 1024)),
        # A training batch, at the sizes for which NOTES.md has the published code's times on one H200.
        *(_paper(f"train-{s}", batch=8, length=4096, num_subkeys=s) for s in (256, 512, 1024)),
        *(
            _paper(f"shared-{s}", batch=8, length=4096, num_subkeys=s, memory_scope="batch")
            for s in (256, 512, 1024, 2048)
        ),
        # One sequence, from short to long; with one sequence both scopes have one table.
        *(
            _paper(f"read-{length // 1024}k-{s}", batch=1, length=length, num_subkeys=s, memory_scope="batch")
            for length in (4096, 32768, 131072)
            for s in (256, 512, 1024, 2048)
        ),
        _paper("single-512", batch=1, length=4096, num_subkeys=512),
        _paper("decode-512", batch=1, length=1, num_subkeys=512),
        # Milliseconds: for tests of the benchmarks themselves.
        _tiny("tiny", 16),
        _tiny("tiny-wide", 128),
    )
}
"""Every workload by its name."""
