"""A small model of bytes with memories, read in one packed call for all rows. Untrained: put your own in its place."""

import hashlib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fwpkm import FwPKMConfig, State
from fwpkm.backends.torch import FwPKM

CONFIG = FwPKMConfig(key_dim=64, value_dim=64, num_subkeys=64, chunk_size=16)
"""A table of 1 MiB for each row and layer."""


class Rows(NamedTuple):
    """Where B sequences stand."""

    memories: list[State]
    """of each memory"""
    beside: dict[str, Tensor]
    """What else a sequence needs to go on, ``[B, ...]`` each, of shapes that do not change; all zeros at the start."""


class Model(Protocol):
    """What the engine serves; ``ByteModel`` is one."""

    config: FwPKMConfig
    """of each memory; its scope must be "sequence", a memory for each row"""

    @property
    def layers(self) -> list[FwPKM]:
        """The memories."""

    def start(self, rows: int) -> Rows:
        """``rows`` rows that have read nothing."""

    def read(self, tokens: Tensor, rows: Rows, ends: Tensor) -> tuple[Tensor, Rows]:
        """Read on, overwriting the states: row i the tokens ``[1, T]`` from ``ends[i]`` to ``ends[i+1]``.

        Returns:
            logits ``[B, 256]`` of the byte after each row's last token, arbitrary where a row read none; the rows.
        """

    def logits_of(self, text: bytes) -> Tensor:
        """``[T, 256]`` after each byte of a text that one sequence reads alone."""

    def digest(self) -> str:
        """A SHA-256 of all that answers follow from."""


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

    @property
    def layers(self) -> list[FwPKM]:
        """The memories."""
        return list(self.memories)

    def start(self, rows: int) -> Rows:
        """``rows`` rows that have read nothing."""
        return Rows([memory.init_state(rows) for memory in self.memories], {})

    def read(self, tokens: Tensor, rows: Rows, ends: Tensor) -> tuple[Tensor, Rows]:
        """Read on, overwriting the states.

        Args:
            tokens: ``[1, T]`` integers: row i reads those from ``ends[i]`` to ``ends[i+1]``, which may be none.
            rows: where B sequences stand.
            ends: ``[B+1]`` int32.

        Returns:
            logits ``[B, 256]`` of the byte after each row's last token, arbitrary where a row read none; the rows.
        """
        x, after = self.embedding(tokens), []
        for memory, state in zip(self.memories, rows.memories):
            read, state = memory(x, state, cu_seqlens=ends, inplace=True)
            x = x + read
            after.append(state)
        last = (ends[1:].long() - 1).clamp(min=0).to(x.device)
        return self.readout(x[0, last]), Rows(after, {})

    def logits_of(self, text: bytes) -> Tensor:
        """``[T, 256]`` after each byte of a text that one sequence reads alone, from the beginning, in one call."""
        x = self.embedding(torch.tensor([list(text)], device=self.embedding.weight.device))
        for memory in self.memories:
            x = x + memory(x, return_state=False)[0]
        return self.readout(x[0])

    def digest(self) -> str:
        """A SHA-256 of all weights and initial tables: what one model has read another cannot go on from."""
        return digest_of(self, self.config)


def choices(model: Model, text: bytes) -> bytes:
    """The likeliest byte after each of a text, read alone."""
    return bytes(model.logits_of(text).argmax(-1).tolist())


def digest_of(model: nn.Module, config: FwPKMConfig) -> str:
    """A SHA-256 of the configuration, and of all weights and initial tables of a module."""
    sha = hashlib.sha256(config.to_json().encode())
    for name, x in model.state_dict().items():
        sha.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        sha.update(x.cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()
