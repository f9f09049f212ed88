"""A small model of bytes with memories, read in one packed call for all rows. Untrained: put your own in its place."""

import hashlib

import torch
from torch import Tensor, nn

from fwpkm import FwPKMConfig, State
from fwpkm.backends.torch import FwPKM

CONFIG = FwPKMConfig(key_dim=64, value_dim=64, num_subkeys=64, chunk_size=16)
"""A table of 1 MiB for each row and layer."""


class ByteModel(nn.Module):
    """Bytes, memories beside a residual, a readout.

    Args:
        config: of each memory; its scope must be "sequence", a memory for each row.
        width: of what stands between the layers.
        layers: how many memories.
    """

    def __init__(self, config: FwPKMConfig = CONFIG, width: int = 64, layers: int = 2):
        """Draw the weights and the initial tables from torch's generator."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(256, width)
        self.memories = nn.ModuleList(FwPKM(width, config) for _ in range(layers))
        self.readout = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 256))
        for memory in self.memories:  # so that what is read weighs as much as the byte, untrained as it is
            nn.init.normal_(memory.output_proj.weight, std=config.value_dim**-0.5)
        self.requires_grad_(False)

    def start(self, rows: int) -> list[State]:
        """A state of each memory: ``rows`` rows that have read nothing."""
        return [memory.init_state(rows) for memory in self.memories]

    def forward(self, tokens: Tensor, states: list[State], ends: Tensor) -> tuple[Tensor, list[State]]:
        """Read on, overwriting the states.

        Args:
            tokens: ``[1, T]`` integers: row i reads those from ``ends[i]`` to ``ends[i+1]``, which may be none.
            states: of each memory, B rows.
            ends: ``[B+1]`` int32.

        Returns:
            logits ``[B, 256]`` of the byte after each row's last token, arbitrary where a row read none; the states.
        """
        x, after = self.embedding(tokens), []
        for memory, state in zip(self.memories, states):
            read, state = memory(x, state, cu_seqlens=ends, inplace=True)
            x = x + read
            after.append(state)
        last = (ends[1:].long() - 1).clamp(min=0).to(x.device)
        return self.readout(x[0, last]), after

    def logits_of(self, text: bytes) -> Tensor:
        """``[T, 256]`` after each byte of a text that one sequence reads alone, from the beginning, in one call."""
        x = self.embedding(torch.tensor([list(text)], device=self.embedding.weight.device))
        for memory in self.memories:
            x = x + memory(x, return_state=False)[0]
        return self.readout(x[0])

    def choices(self, text: bytes) -> bytes:
        """The likeliest byte after each of a text, read alone."""
        return bytes(self.logits_of(text).argmax(-1).tolist())

    def digest(self) -> str:
        """A SHA-256 of all weights and initial tables: what one model has read another cannot go on from."""
        sha = hashlib.sha256(self.config.to_json().encode())
        for name, x in self.state_dict().items():
            sha.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            sha.update(x.cpu().contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()
