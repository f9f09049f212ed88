"""What stands in the memories' places to compare with them, called as an FwPKM layer is called.

Each has about as many active parameters as a memory: all but the tables of which a token reads a few rows.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from examples.language_model.attention import Attention
from fwpkm import FwPKMConfig
from fwpkm.backends.torch import FwPKM

HEAD = 128  # width of a head of the delta rule, whose state is [HEAD, HEAD]
CHUNK = 128  # tokens that the delta rule takes together
TAPS = 4  # tokens that its convolution sees, the present one included


class Carried(NamedTuple):
    """The state of a baseline; the first axis of every tensor is the row."""

    memory: tuple[Tensor, ...] = ()
    """what goes on from text to text, as a memory's tables do"""
    window: tuple[Tensor, ...] = ()
    """what is seen of the last tokens of this text"""

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return sum(x.nbytes for x in (*self.memory, *self.window))


class LongAttention(nn.Module):
    """Attention to the last ``context`` tokens behind a norm; no residual inside. It writes no memory.

    Args:
        width: of x and y.
        heads: of attention.
        context: how many tokens it sees, the present one included.
    """

    def __init__(self, width: int, heads: int, context: int):
        """Draw the weights."""
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, context)
        _draw(self)

    def memory(self) -> tuple[Tensor, ...]:
        """Nothing goes on from text to text."""
        return ()

    def init_state(self, batch: int) -> Carried:
        """Nothing seen."""
        nothing = self.norm.weight.new_zeros(batch, 0, self.norm.weight.shape[0])
        return Carried(window=(nothing, nothing))

    def forward(self, x: Tensor, state: Carried, *, update: bool, inplace: bool) -> tuple[Tensor, Carried]:
        """``[B, T, width]`` -> the same, and the state T tokens later; no switch changes anything."""
        y, window = self.attention(self.norm(x), torch.stack(state.window))
        return y, Carried(window=tuple(window.unbind()))


class GatedDelta(nn.Module):
    """Gated DeltaNet (Yang et al., arXiv:2412.06464) behind a norm; no residual inside.

    Queries, keys and values pass a short convolution and SiLU, what is read an output gate. In plain torch, since
    flash-linear-attention refuses the backward with triton 3.6 on Hopper GPUs.

    Args:
        width: of the queries, keys, values, x and y; heads are ``HEAD`` wide, or ``width`` if that is less.
    """

    def __init__(self, width: int):
        """Draw the weights; the heads begin with half-lives of 38 to 2,067 tokens."""
        super().__init__()
        self.heads = max(1, width // HEAD)
        if width % self.heads:
            raise ValueError(f"width must be a multiple of {HEAD}, or less. Received: {width}")
        self.norm = nn.RMSNorm(width)
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.convolution = nn.Conv1d(3 * width, 3 * width, TAPS, groups=3 * width, bias=False)
        self.gates = nn.Linear(width, 2 * self.heads)
        self.output_gate = nn.Linear(width, width, bias=False)
        self.output_norm = nn.RMSNorm(width // self.heads)
        self.project_out = nn.Linear(width, width, bias=False)
        _draw(self)
        with torch.no_grad():
            self.gates.bias.copy_(torch.cat([torch.linspace(4, 8, self.heads), torch.zeros(self.heads)]))

    def memory(self) -> tuple[Tensor, ...]:
        """The initial state, of zeros ``[1, heads, HEAD, HEAD]``."""
        head = self.output_norm.weight.shape[0]
        return (self.norm.weight.new_zeros(1, self.heads, head, head, dtype=torch.float32),)

    def init_state(self, batch: int) -> Carried:
        """The initial state for each row, and no token before for the convolution."""
        nothing = self.norm.weight.new_zeros(batch, TAPS - 1, self.project_in.out_features)
        return Carried(tuple(x.repeat(batch, 1, 1, 1) for x in self.memory()), (nothing,))

    def forward(self, x: Tensor, state: Carried, *, update: bool, inplace: bool) -> tuple[Tensor, Carried]:
        """``[B, T, width]`` -> the same, and the state T tokens later; no switch changes anything."""
        x = self.norm(x)
        new, (past,) = self.project_in(x), state.window
        seen = torch.cat([past.to(new.dtype), new], 1)
        mixed = F.silu(self.convolution(seen.mT).mT)
        query, key, value = (z.unflatten(-1, (self.heads, -1)) for z in mixed.chunk(3, -1))
        kept, rate = self.gates(x).float().chunk(2, -1)
        query, key = (F.normalize(z.float(), dim=-1) for z in (query, key))
        # Under autocast the products would be of bfloat16, in which a state forgets what it adds up.
        with torch.autocast(x.device.type, enabled=False):
            out, memory = gated_delta(query, key, value.float(), F.logsigmoid(kept), rate.sigmoid(), state.memory[0])
        out = self.output_norm(out.to(self.output_norm.weight.dtype)).flatten(2)
        return self.project_out(out * F.silu(self.output_gate(x))), Carried((memory,), (seen[:, 1 - TAPS :],))


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Sₜ = αₜ Sₜ₋₁ + kₜ βₜ (vₜ − αₜ Sₜ₋₁ᵀ kₜ)ᵀ and oₜ = Sₜᵀ qₜ, whole chunks at a time.

    Within a chunk Sₜ = Gₜ S₀ + Σ_{j≤t} (Gₜ/Gⱼ) kⱼ uⱼᵀ with G the product of α from the chunk's beginning, and the u
    follow from a triangular system: u = y − W S₀, where y and W do not know S₀. So all chunks are computed together,
    but for S₀ itself, which costs a product of two small matrices a chunk.

    Args:
        query, key, value: ``[B, T, H, d]``, float32.
        decay: ln α, ``[B, T, H]``, at most 0.
        rate: β, ``[B, T, H]``.
        state: S before the first token, ``[B, H, d, d]``.
        chunk: how many tokens are taken together.

    Returns:
        o ``[B, T, H, d]``, and S after the last token.
    """
    length, chunk = query.shape[1], min(chunk, query.shape[1])
    missing = -length % chunk  # filled with tokens of β = 0 and α = 1, which change nothing

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, n, chunk, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
        return x.unflatten(1, (-1, chunk)).movedim(3, 1)

    query, key, value = map(chunks, (query, key, value))
    passed, rate = chunks(decay).cumsum(-1), chunks(rate)[..., None]  # ln G
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).tril()
    ratio = (passed[..., :, None] - passed[..., None, :]).masked_fill(~lower, -math.inf).exp()  # Gᵢ / Gⱼ
    passed, left = passed[..., None], passed[..., -1:, None]
    system = (rate * ratio * (key @ key.mT)).tril(-1)
    y, w = (inverse(system) @ torch.cat([rate * value, rate * passed.exp() * key], -1)).chunk(2, -1)
    later = ((left - passed).exp() * key).mT  # keys as the chunk's end sees them
    step = left.exp() * torch.eye(key.shape[-1], device=key.device) - later @ w
    first, state = scan(step, later @ y, state)
    out = (passed.exp() * query) @ first + (ratio * (query @ key.mT)) @ (y - w @ first)
    return out.movedim(1, 3).flatten(1, 2)[:, :length], state


@torch.compiler.disable
def inverse(lower: Tensor) -> Tensor:
    """(1 + L)⁻¹ of strictly lower triangular ``[..., c, c]``; only products of small matrices, for a GPU's sake."""
    return _Inverse.apply(lower)


class _Inverse(torch.autograd.Function):
    """Of two blocks on the diagonal, inverted as A and D, with L below A: −D L A stands below A. So blocks double."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        whole = 1 << (size - 1).bit_length()
        lower = F.pad(lower, (0, whole - size) * 2)
        result = torch.eye(whole, device=lower.device, dtype=lower.dtype).expand_as(lower).contiguous()
        half = 1
        while half < whole:
            known, below = (_diagonal_blocks(x, 2 * half) for x in (result, lower))
            corner = known[..., half:, half:] @ below[..., half:, :half] @ known[..., :half, :half]
            known[..., half:, :half] = -corner
            half *= 2
        result = result[..., :size, :size].contiguous()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return -(result.mT @ gradient @ result.mT)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """A view of the blocks on the diagonal: ``[..., c, c]`` -> ``[..., c / size, size, size]``."""
    blocks = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return blocks.diagonal(0, -4, -2).movedim(-1, -3)


@torch.compiler.disable  # which would list every chunk's product for minutes, and fuse none
def scan(step: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S ← step S + added, chunk by chunk of ``[B, H, n, d, d]``: S before each of them, and after the last."""
    first, last = _Scan.apply(*(x.flatten(0, 1).transpose(0, 1) for x in (step, added)), state.flatten(0, 1))
    return first.transpose(0, 1).unflatten(0, state.shape[:2]), last.unflatten(0, state.shape[:2])


class _Scan(torch.autograd.Function):
    """Chunks first: ``[n, B·H, d, d]``. The gradient runs back through the same products; that of step is one more."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.empty_like(added, memory_format=torch.contiguous_format)
        for i in range(len(step)):
            first[i] = state
            state = torch.baddbmm(added[i], step[i], state)
        ctx.save_for_backward(step, first)
        return first, state

    @staticmethod
    def backward(ctx: Any, of_first: Tensor, of_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step, first = ctx.saved_tensors
        of_added = torch.empty_like(first)
        for i in reversed(range(len(step))):
            of_added[i] = of_last
            of_last = torch.baddbmm(of_first[i], step[i].mT, of_last)
        return of_added @ first.mT, of_added, of_last


class StaticMemory(nn.Module):
    """A product-key memory that is read as an FwPKM layer is, trained with the other weights, and never written.

    Args:
        width: of x and y.
        config: of the memory; all sequences read one.
    """

    def __init__(self, width: int, config: FwPKMConfig):
        """Draw weights and tables."""
        super().__init__()
        self.layer = FwPKM(width, config, learn_memory=True, memory_scope="batch")

    def memory(self) -> tuple[Tensor, ...]:
        """Nothing goes on from text to text: the tables are parameters."""
        return ()

    def init_state(self, batch: int) -> Carried:
        """There is none."""
        return Carried()

    # A graph of torch.compile would keep the clock of a state that is made here, which a CUDA graph cannot hold.
    @torch.compiler.disable
    def forward(self, x: Tensor, state: Carried, *, update: bool, inplace: bool) -> tuple[Tensor, Carried]:
        """``[B, T, width]`` -> the same; no switch changes anything."""
        y, _ = self.layer(x, update=False, return_state=False)
        return y, state


def active(model: nn.Module) -> int:
    """How many parameters every token meets: all but the tables of a memory."""
    return sum(p.numel() for name, p in model.named_parameters() if ".memory." not in name)


def _draw(module: nn.Module) -> None:
    """Weights as an FwPKM layer draws them."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
