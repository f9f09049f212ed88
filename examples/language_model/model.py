"""A decoder whose attention sees one window in each layer; what lies beyond all of them, only the memories bring."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from examples.language_model import baselines
from examples.language_model.attention import Attention
from examples.language_model.settings import ModelSettings
from fwpkm import FwPKMConfig, State
from fwpkm.backends.torch import FwPKM, nbytes
from fwpkm.tokens import Tokens

VOCABULARY = 256  # bytes


class Reading(NamedTuple):
    """Where a batch of sequences stands."""

    memories: tuple[State | baselines.Carried, ...]
    """of each memory, or of what stands in its place"""
    windows: tuple[Tensor, ...]
    """of each layer: ``[2, B, w, width]``, keys and values of the last w tokens, w at most the window less one."""

    def fork(self, number: int) -> "Reading":
        """Where ``number`` continuations of each sequence stand: they share its memories, which must not be written."""

        def forked(state: State | baselines.Carried) -> State | baselines.Carried:
            return state if isinstance(state, State) else mapped(lambda x: x.repeat_interleave(number, 0), state)

        windows = tuple(past.repeat_interleave(number, 1) for past in self.windows)
        return Reading(tuple(map(forked, self.memories)), windows)

    @property
    def nbytes(self) -> int:
        """Bytes of memories and windows."""
        memories = sum(nbytes(state) if isinstance(state, State) else state.nbytes for state in self.memories)
        return memories + sum(past.nbytes for past in self.windows)


class Going(NamedTuple):
    """What of a state goes on from text to text; the first axis of each tensor is the row."""

    memory: tuple[Tensor, ...]
    uses: Tensor | None

    @classmethod
    def of(cls, state: State | baselines.Carried) -> "Going":
        """That of a memory, or of what stands in its place."""
        return cls(state.memory, getattr(state, "maybe_uses", None))

    def into(self, state: Any) -> Any:
        """Another state with these."""
        return state._replace(**{name: x for name, x in self._asdict().items() if x is not None})

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [*self.memory] if self.uses is None else [*self.memory, self.uses]


def mapped(function: Callable[[Tensor], Tensor], part: Any) -> Any:
    """A reading or a part of one, with ``function`` of each of its tensors."""
    if not isinstance(part, tuple):
        return part if part is None else function(part)
    parts = [mapped(function, inner) for inner in part]
    return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)


class Block(nn.Module):
    """Attention, then SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, settings: ModelSettings):
        """Draw the weights."""
        super().__init__()
        width, hidden = settings.width, settings.hidden
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, settings.heads, settings.window)
        self.mlp_norm = nn.RMSNorm(width)
        self.project_in = nn.Linear(width, 2 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes as in ``Attention``."""
        read, past = self.attention(self.attention_norm(x), past)
        return self.mixed(x + read), past

    def mixed(self, x: Tensor) -> Tensor:
        """SwiGLU behind its norm and beside its residual: ``[..., width]``."""
        gate, up = self.project_in(self.mlp_norm(x)).chunk(2, -1)
        return x + self.project_out(F.silu(gate) * up)


class ForgettingMemory(FwPKM):
    """A memory with a forget gate: a write takes from a row the mean, over its reads, of f = sigmoid(w·norm(x) + b).

    w begins as 0, so that nothing else is drawn otherwise than without the gate, and f is the same everywhere at first.
    """

    def __init__(self, settings: ModelSettings, config: FwPKMConfig):
        """Build the memory and its gate; f begins at sigmoid(``settings.forget_bias``)."""
        super().__init__(settings.width, config, gated=settings.gated)
        self.forget_norm = nn.RMSNorm(settings.width, eps=1e-5)
        self.forget_weight = nn.Parameter(torch.zeros(1, settings.width))
        self.forget_bias = nn.Parameter(torch.full((1,), settings.forget_bias))

    def _project(self, x: Tensor, *others: Any) -> tuple[Tokens, torch.dtype]:
        tokens, dtype = super()._project(x, *others)
        logit = F.linear(self.forget_norm(x), self.forget_weight, self.forget_bias)
        return tokens._replace(forget=logit.squeeze(-1).float().sigmoid()), dtype


def mixer(settings: ModelSettings, config: FwPKMConfig) -> nn.Module:
    """What stands before a layer of ``settings.memories``: a memory, or a baseline in its place.

    Each has FwPKM's call, ``init_state`` and ``memory``.
    """
    match settings.mixer:
        case "fwpkm":
            if settings.forget:
                return ForgettingMemory(settings, config)
            return FwPKM(settings.width, config, gated=settings.gated)
        case "static":
            return baselines.StaticMemory(settings.width, config)
        case "delta":
            return baselines.GatedDelta(settings.width)
        case "attention":
            return baselines.LongAttention(settings.width, settings.heads, settings.context)
        case unknown:
            raise ValueError(f"no mixer is called {unknown!r}")


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out.

    Args:
        settings: of the model.
        memory: fields of FwPKMConfig that override the settings', e.g. ``memory_scope`` or ``learning_rate``.
    """

    def __init__(self, settings: ModelSettings, **memory: Any):
        """Draw the weights and the initial tables from torch's generator."""
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(VOCABULARY, settings.width)
        config = settings.memory_config(**memory)
        self.memories = nn.ModuleDict({str(i): mixer(settings, config) for i in sorted(settings.memories)})
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
            for last in (block.attention.project_out, block.project_out):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * settings.layers))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def start(self, batch: int) -> Reading:
        """Where sequences begin: the initial memories, and nothing seen."""
        nothing = self.embedding.weight.new_zeros(2, batch, 0, self.settings.width)
        return Reading(tuple(m.init_state(batch) for m in self.memories.values()), (nothing,) * len(self.blocks))

    def hold_keys(self) -> None:
        """Let keys stand still where they are: no addressing loss moves them any more."""
        for memory in self.memories.values():
            memory.config = dataclasses.replace(memory.config, addressing_weight=0.0)

    def forward(
        self, tokens: Tensor, reading: Reading, update: bool = True, inplace: bool = False
    ) -> tuple[Tensor, Reading]:
        """Read on.

        Args:
            tokens: ``[B, T]`` integers.
            reading: where the sequences stand; forked, B is a multiple of its memories' rows, and ``update`` is False.
            update: False reads the memories without writing; attention, and a delta rule, go on as ever.
            inplace: the tables of ``reading`` may be overwritten, which saves a copy of each.

        Returns:
            the hidden state of each token, ready for ``logits``, ``[B, T, width]``, and where the sequences stand.
        """
        x = F.rms_norm(self.embedding(tokens), (self.settings.width,))
        states, windows = iter(reading.memories), []
        after = []
        for i, (block, past) in enumerate(zip(self.blocks, reading.windows)):
            if str(i) in self.memories:
                state = next(states)
                # Frozen, a token reads the table wherever it stands: continuations of a sequence lie end to end.
                number = len(state.position) if isinstance(state, State) and not update else len(x)
                rows = x.reshape(number, -1, x.shape[2])
                read, state = self.memories[str(i)](rows, state, update=update, inplace=inplace)
                x = x + read.view_as(x)
                after.append(state)
            x, past = block(x, past)
            windows.append(past)
        return self.norm(x), Reading(tuple(after), tuple(windows))

    def logits(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> ``[..., 256]`` float32; under autocast, of bfloat16 products."""
        return F.linear(x, self.embedding.weight).float()
