"""The language model of examples/language_model as the engine serves it: rows of their own lengths in one call."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from examples.language_model.attention import Attention, rotate, rotation
from examples.language_model.model import LanguageModel
from examples.language_model.needle import SEGMENT
from examples.serving.model import Rows, digest_of
from fwpkm.backends.torch import FwPKM


class Served:
    """A ``LanguageModel`` with memories, one to a row.

    Memories read all rows packed. Attention reads them padded: the last tokens of each row stand at the end of
    ``window - 1`` places, of which a row that has read less has used fewer.
    """

    def __init__(self, model: LanguageModel):
        """Wrap a model; its weights must not change.

        Raises:
            ValueError: it has no memories that are written.
        """
        if not model.memories or not model.settings.writes:
            raise ValueError(f"the engine serves models with memories. Received: {model.settings}")
        self.model, self.config = model, next(iter(model.memories.values())).config
        if self.config.memory_scope != "sequence":
            raise ValueError(f'memory_scope must be "sequence". Received: {self.config.memory_scope!r}')

    @property
    def layers(self) -> list[FwPKM]:
        """The memories."""
        return list(self.model.memories.values())

    def start(self, rows: int) -> Rows:
        """``rows`` rows that have read nothing."""
        settings, weight = self.model.settings, self.model.embedding.weight
        past = {
            f"window.{i}": weight.new_zeros(rows, 2, settings.window - 1, settings.width)
            for i in range(settings.layers)
        }
        return Rows([memory.init_state(rows) for memory in self.layers], past)

    @torch.no_grad()
    def read(self, tokens: Tensor, rows: Rows, ends: Tensor) -> tuple[Tensor, Rows]:
        """Read on, overwriting the states: row i the tokens ``[1, T]`` from ``ends[i]`` to ``ends[i+1]``.

        Returns:
            logits ``[B, 256]`` of the byte after each row's last token, arbitrary where a row read none; the rows.
        """
        x = F.rms_norm(self.model.embedding(tokens), (self.model.settings.width,))
        states, memories = iter(rows.memories), []
        used = rows.memories[0].position.clone()  # of every row, before this call
        beside = {}
        for i, block in enumerate(self.model.blocks):
            if str(i) in self.model.memories:
                read, state = self.model.memories[str(i)](x, next(states), cu_seqlens=ends, inplace=True)
                x = x + read
                memories.append(state)
            mixed, beside[f"window.{i}"] = attend(
                block.attention, block.attention_norm(x), rows.beside[f"window.{i}"], used, ends
            )
            x = block.mixed(x + mixed)
        last = (ends[1:].long() - 1).clamp(min=0).to(x.device)
        return self.model.logits(self.model.norm(x[0, last])), Rows(memories, beside)

    @torch.no_grad()
    def logits_of(self, text: bytes) -> Tensor:
        """``[T, 256]`` after each byte of a text that one sequence reads alone, from the beginning."""
        tokens = torch.tensor([list(text)], device=self.model.embedding.weight.device)
        reading, out = self.model.start(1), []
        for part in tokens.split(SEGMENT, 1):
            hidden, reading = self.model(part, reading)
            out.append(self.model.logits(hidden)[0])
        return torch.cat(out)

    def digest(self) -> str:
        """A SHA-256 of configuration, weights and initial tables."""
        return digest_of(self.model, self.config)


def attend(attention: Attention, x: Tensor, past: Tensor, used: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of packed rows to the last ``window`` tokens of each.

    Args:
        attention: of a block.
        x: ``[1, T, width]``, row i from ``ends[i]`` to ``ends[i+1]``.
        past: ``[B, 2, window - 1, width]``: keys and values of each row's last tokens, the latest last.
        used: ``[B]``: how many tokens each row has read before.
        ends: ``[B+1]``.

    Returns:
        what each token reads ``[1, T, width]``, and ``past`` after it.
    """
    kept, device = past.shape[2], x.device
    starts, sizes = ends[:-1].long(), ends.long().diff()
    step = torch.arange(max(1, int(sizes.max())))
    place = (starts[:, None] + step).clamp(max=x.shape[1] - 1).to(device)  # of token t of row i, [B, n]
    sizes, used = sizes.to(device), used.to(device)
    query, key, value = attention.project_in(x)[0].chunk(3, -1)
    keys = torch.cat([past, torch.stack([key[place], value[place]], 1).to(past.dtype)], 2)
    latest = sizes[:, None] + torch.arange(kept, device=device)  # where a row's last tokens stand after the call
    after = keys.gather(2, latest[:, None, :, None].expand(-1, 2, -1, keys.shape[3]))
    at = torch.arange(keys.shape[2], device=device)
    distance = kept + step.to(device)[:, None] - at
    seen = (distance >= 0) & (distance <= kept) & (at >= (kept - used).clamp(min=0)[:, None])[:, None]
    turn = rotation(keys.shape[2], keys.shape[3] // attention.heads, device)
    query, key, value = (z.unflatten(-1, (attention.heads, -1)) for z in (query[place], keys[:, 0], keys[:, 1]))
    query, key, value = rotate(query, turn, kept), rotate(key.to(query.dtype), turn, 0), value.to(query.dtype)
    query, key, value = (z.transpose(1, 2) for z in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None]).transpose(1, 2).flatten(2)
    row = torch.repeat_interleave(torch.arange(len(sizes)), sizes.cpu())
    found = out[row.to(device), (torch.arange(len(row)) - starts[row]).to(device)]  # what each token of a row reads
    return attention.project_out(F.pad(found, (0, 0, 0, x.shape[1] - len(row))))[None], after
