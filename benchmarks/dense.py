"""Formulation (a): the memory written with autograd through whole tables, as the published code does it.

Each chunk's write asks ``torch.autograd.grad(..., create_graph=True)`` for the gradient of the chunk's losses (SPEC.md
§3) with respect to both tables. That gradient is dense, ``[M, N, Dv]``, and the step makes a new copy of the table;
backward does likewise for each chunk. Outer gradients are exact because the inner ones are part of the graph.

Nothing is made slow on purpose: selection needs no graph, the table's gradient is made by ``embedding``, the cheapest
of torch's gathers to differentiate on CPU, and the step is one fused ``addcmul``.

It covers boundary="drop", memory_scope="sequence" and finite, unmasked inputs: what the workloads use.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import embedding

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory


class Selection(NamedTuple):
    """The k sub-keys per codebook that a query selected."""

    scores: torch.Tensor
    """``[B, H, 2, n, k]`` sub-scores."""
    subkeys: torch.Tensor
    """``[B, H, 2, n, k]`` their indices in [0, S)."""


class Read(NamedTuple):
    """What one chunk read."""

    output: torch.Tensor
    """``[B, n, Dv]``"""
    slots: torch.Tensor
    """``[B, n, H*k]``"""
    weights: torch.Tensor
    """``[B, n, H*k]``"""
    selection: Selection


def apply(
    cfg: FwPKMConfig,
    memory: Memory,
    query: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    flush: bool = False,
) -> tuple[torch.Tensor, Memory]:
    """Read ``query [B, T, H*Dk]`` chunk by chunk and write each full chunk; with ``flush`` the last partial one too.

    Returns the output ``[B, T, Dv]`` and the final memory, both differentiable in every argument.

    Raises:
        ValueError: the config asks for what this formulation leaves out.
    """
    if cfg.boundary != "drop" or cfg.memory_scope != "sequence":
        raise ValueError(f"expected boundary='drop' and memory_scope='sequence'. Received: {cfg}")
    memory = Memory(*(table if table.requires_grad else table.detach().requires_grad_() for table in memory))
    gate = value.new_ones(value.shape[:2]) if gate is None else gate
    outputs = []
    for tokens in zip(*(x.split(cfg.chunk_size, dim=1) for x in (query, value, gate))):
        read = lookup(cfg, memory, tokens[0])
        outputs.append(read.output)
        length = tokens[0].shape[1]
        if length > cfg.lookahead and (flush or length == cfg.chunk_size):
            memory = _write(cfg, memory, read, *tokens[1:])
    return torch.cat(outputs, dim=1), memory


def lookup(cfg: FwPKMConfig, memory: Memory, query: torch.Tensor) -> Read:
    """SPEC.md §2 for one chunk, ``query [B, n, H*Dk]``."""
    selection = select(cfg, memory.keys, query)
    (first, second), (row, column) = selection.scores.unbind(2), selection.subkeys.unbind(2)
    sums, position = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(cfg.top_k)
    rank = position // cfg.top_k, position % cfg.top_k
    slots = row.gather(-1, rank[0]) * cfg.num_subkeys + column.gather(-1, rank[1])
    slots = slots.transpose(1, 2).flatten(2)
    weights = (sums.transpose(1, 2).flatten(2) / cfg.temperature).softmax(-1)
    output = (weights.unsqueeze(-2) @ _rows(memory.values, slots)).squeeze(-2)
    return Read(output, slots, weights, selection)


def select(cfg: FwPKMConfig, keys: torch.Tensor, query: torch.Tensor) -> Selection:
    """Sub-scores and their top-k: proposed by one product, then, for idw, computed from differences (SPEC.md §6)."""
    halves = query.unflatten(-1, (cfg.num_heads, 2, -1)).permute(0, 2, 3, 1, 4)
    if cfg.score == "dot_product":
        return Selection(*(halves @ keys.mT).topk(cfg.top_k))
    with torch.no_grad():
        nearness = torch.baddbmm(
            keys.square().sum(-1).flatten(0, 2).unsqueeze(-2),
            halves.flatten(0, 2),
            keys.flatten(0, 2).mT,
            beta=-1,
            alpha=2,
        )
        subkeys = nearness.topk(cfg.top_k).indices.view(*halves.shape[:-1], cfg.top_k)
    difference = halves.unsqueeze(-2) - _rows(keys, subkeys)
    return Selection(-(cfg.score_eps + difference.square().sum(-1)).log(), subkeys)


def _rows(tables: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of ``tables [*lead, R, D]`` at ``index [*lead, ...]``: ``[*lead, ..., D]``, with a dense gradient."""
    *lead, rows, _ = tables.shape
    count = tables[..., 0, 0].numel()
    offset = torch.arange(0, count * rows, rows).view(*lead, *(1,) * (index.ndim - len(lead)))
    return embedding(index + offset, tables.flatten(0, -2))


def _write(cfg: FwPKMConfig, memory: Memory, read: Read, value: torch.Tensor, gate: torch.Tensor) -> Memory:
    """SPEC.md §4 for one chunk, the gradients taken by autograd and dense."""
    (value_gradient,) = torch.autograd.grad(
        _memorization(cfg, read, value, gate), memory.values, create_graph=True, retain_graph=True
    )
    (key_gradient,) = torch.autograd.grad(_addressing(cfg, read), memory.keys, create_graph=True)
    counts = _counts(read.slots, cfg.num_slots)
    touched = (counts > 0).to(value.dtype)
    values = _descend(cfg, memory.values, value_gradient, touched / counts.clamp(min=1), touched * cfg.weight_decay)
    keys = _descend(cfg, memory.keys, key_gradient, value.new_tensor(cfg.addressing_weight), cfg.weight_decay)
    return Memory(keys, values)


def _memorization(cfg: FwPKMConfig, read: Read, value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """L_mem with κ in it; tokens whose target lies in the next chunk have no pair."""
    if cfg.write_scale == "normalized":
        kappa = 1 / read.weights.square().sum(-1)
    else:
        kappa = torch.full_like(gate, cfg.slots_per_token if cfg.write_scale == "slots" else 1)
    pairs = value.shape[1] - cfg.lookahead
    error = (value[:, cfg.lookahead :] - read.output[:, :pairs]).square().sum(-1) / 2
    return (kappa * gate)[:, :pairs].mul(error).sum()


def _addressing(cfg: FwPKMConfig, read: Read) -> torch.Tensor:
    """L_addr, summed over sequences: no key of one is in the loss of another."""
    scores, subkeys = (x.flatten(-2) for x in (read.selection.scores.softmax(-1), read.selection.subkeys))
    mean = scores.new_zeros(*scores.shape[:-1], cfg.num_subkeys).scatter_add(-1, subkeys, scores / read.slots.shape[1])
    return (mean * (mean + 1e-8).log()).sum()


def _counts(slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """N_i of every memory: ``[B, N, 1]``."""
    flat = slots.flatten(1)
    return torch.zeros(len(flat), num_slots, dtype=torch.int64).scatter_add_(1, flat, torch.ones_like(flat))[..., None]


def _descend(
    cfg: FwPKMConfig, table: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor, decay: torch.Tensor | float
) -> torch.Tensor:
    """table − η (clip(scale · gradient) + decay · table), a new whole table."""
    if cfg.grad_clip is not None:
        gradient, scale = (scale * gradient).clamp(-cfg.grad_clip, cfg.grad_clip), torch.ones_like(scale)
    stepped = torch.addcmul(table, scale, gradient, value=-cfg.learning_rate)
    return stepped if cfg.weight_decay == 0 else stepped - cfg.learning_rate * decay * table
