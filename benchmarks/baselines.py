"""What the torch backend is compared with: (a) the method as its published code computes it, (b) a static memory.

Nothing is made slow on purpose. In (a) selection needs no graph, the table's gradient is made by ``embedding``, the
cheapest of torch's gathers to differentiate on a CPU, and the step is one fused ``addcmul``. (b) is the fastest
measured of the honest ways to write it: scores come from the expansion ‖q‖² + ‖K‖² − 2q·K alone, which autograd
differentiates as two products (computing the chosen ones from differences, as SPEC.md §6 asks, is slower and more
exact near a key), the read is one ``embedding_bag``, and the value table is given flat and has a sparse gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

from fwpkm import FwPKMConfig, Memory
from fwpkm.rules import addressing_loss, write_scale


class Selection(NamedTuple):
    """The k sub-keys per codebook that a query selected."""

    scores: Tensor
    """``[B, H, 2, n, k]`` sub-scores."""
    subkeys: Tensor
    """``[B, H, 2, n, k]`` their indices in [0, S)."""


def dense(
    cfg: FwPKMConfig, memory: Memory, query: Tensor, value: Tensor, gate: Tensor, *, flush: bool = False
) -> tuple[Tensor, Memory]:
    """Formulation (a): each chunk's write asks autograd for the gradient of its losses in both whole tables (§3).

    That gradient is dense, ``[M, N, Dv]``, the step makes a new table, and backward does the same for each chunk. Outer
    gradients are exact because the inner ones are part of the graph (``create_graph=True``). ``query [B, T, H*Dk]`` is
    read chunk by chunk; each full chunk is written, with ``flush`` the last partial one too. Inputs must be finite.

    Returns the output ``[B, T, Dv]`` and the final memory, both differentiable in every argument.

    Raises:
        ValueError: the config asks for what this formulation leaves out.
    """
    if cfg.boundary != "drop" or cfg.memory_scope != "sequence":
        raise ValueError(f"expected boundary='drop' and memory_scope='sequence'. Received: {cfg}")
    memory = Memory(*(table if table.requires_grad else table.detach().requires_grad_() for table in memory))
    outputs = []
    for q, v, g in zip(*(x.split(cfg.chunk_size, dim=1) for x in (query, value, gate))):
        selection = select(cfg, memory.keys, q, by_differences=True)
        slots, weights = combine(cfg, selection)
        output = (weights.unsqueeze(-2) @ _rows(memory.values, slots)).squeeze(-2)
        outputs.append(output)
        length = q.shape[1]
        if length > cfg.lookahead and (flush or length == cfg.chunk_size):
            memory = _write(cfg, memory, (selection, slots, weights, output), v, g)
    return torch.cat(outputs, dim=1), memory


def static(cfg: FwPKMConfig, keys: Tensor, rows: Tensor, query: Tensor) -> Tensor:
    """Formulation (b): a product-key memory that is trained but never written, the whole sequence one lookup (§2).

    ``keys [M, H, 2, S, Dk/2]`` with M = B, or 1 for all sequences, the value tables ``rows [M*N, Dv]`` and ``query
    [B, T, H*Dk]`` give the output ``[B, T, Dv]``; what the config says of writes is ignored.
    """
    slots, weights = combine(cfg, select(cfg, keys, query))
    if len(keys) > 1:
        slots = slots + torch.arange(0, len(rows), cfg.num_slots).view(-1, 1, 1)
    weights, slots = weights.flatten(0, 1), slots.flatten(0, 1)
    output = embedding_bag(slots, rows, per_sample_weights=weights, mode="sum", sparse=True)
    return output.view(*query.shape[:2], -1)


def select(cfg: FwPKMConfig, keys: Tensor, query: Tensor, *, by_differences: bool = False) -> Selection:
    """Sub-scores by one product, and their top-k; or it proposes, and idw is computed from differences (§6)."""
    halves = _halves(cfg, query)
    if cfg.score == "dot_product":
        return Selection(*(halves @ keys.mT).topk(cfg.top_k))
    if cfg.score != "idw":
        cfg.refuse("score", "benchmarks.baselines")
    with torch.set_grad_enabled(torch.is_grad_enabled() and not by_differences):
        nearest, subkeys = _nearness(keys, halves).topk(cfg.top_k)
    if by_differences:
        distance = (halves.unsqueeze(-2) - _rows(keys, subkeys)).square().sum(-1)
    else:
        distance = (halves.square().sum(-1, keepdim=True) - nearest).clamp(min=0)
    return Selection(-(cfg.score_eps + distance).log(), subkeys)


def combine(cfg: FwPKMConfig, selection: Selection) -> tuple[Tensor, Tensor]:
    """The top k of the k² sums: slots and weights ``[B, n, H*k]``."""
    (first, second), (row, column) = selection.scores.unbind(2), selection.subkeys.unbind(2)
    sums, position = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(cfg.top_k)
    slots = row.gather(-1, position // cfg.top_k) * cfg.num_subkeys + column.gather(-1, position % cfg.top_k)
    weights = (sums.transpose(1, 2).flatten(2) / cfg.temperature).softmax(-1)
    return slots.transpose(1, 2).flatten(2), weights


def _halves(cfg: FwPKMConfig, query: Tensor) -> Tensor:
    """``[B, n, H*Dk] -> [B, H, 2, n, Dk/2]``."""
    return query.unflatten(-1, (cfg.num_heads, 2, -1)).permute(0, 2, 3, 1, 4)


def _nearness(keys: Tensor, halves: Tensor) -> Tensor:
    """2q·K − ‖K‖², the order of the distances: ``[B, H, 2, n, S]``."""
    keys = keys.expand(len(halves), *keys.shape[1:]).flatten(0, 2)
    norms = keys.square().sum(-1).unsqueeze(-2)
    return torch.baddbmm(norms, halves.flatten(0, 2), keys.mT, beta=-1, alpha=2).unflatten(0, halves.shape[:3])


def _rows(tables: Tensor, index: Tensor) -> Tensor:
    """Rows of ``tables [*lead, R, D]`` at ``index [*lead, ...]``: ``[*lead, ..., D]``, with a dense gradient."""
    *lead, rows, _ = tables.shape
    count = tables[..., 0, 0].numel()
    offset = torch.arange(0, count * rows, rows).view(*lead, *(1,) * (index.ndim - len(lead)))
    return embedding(index + offset, tables.flatten(0, -2))


def _write(cfg: FwPKMConfig, memory: Memory, read: Any, value: Tensor, gate: Tensor) -> Memory:
    """SPEC.md §4 for one chunk, whose selection, slots, weights and output were read; dense gradients by autograd."""
    selection, slots, weights, output = read
    pairs = value.shape[1] - cfg.lookahead  # tokens whose target lies in the next chunk have no pair
    error = (value[:, cfg.lookahead :] - output[:, :pairs]).square().sum(-1) / 2
    memorization = (write_scale(torch, cfg, weights) * gate)[:, :pairs].mul(error).sum()
    scores, subkeys = (x.flatten(-2) for x in (selection.scores.softmax(-1), selection.subkeys))
    mean = scores.new_zeros(*scores.shape[:-1], cfg.num_subkeys).scatter_add(-1, subkeys, scores / value.shape[1])
    (d_values,) = torch.autograd.grad(memorization, memory.values, create_graph=True, retain_graph=True)
    (d_keys,) = torch.autograd.grad(addressing_loss(torch, mean).sum(), memory.keys, create_graph=True)
    slots = slots.flatten(1)
    counts = torch.zeros(len(slots), cfg.num_slots, dtype=torch.int64).scatter_add_(1, slots, torch.ones_like(slots))
    counts = counts[..., None]
    touched = (counts > 0).to(value.dtype)
    values = _descend(cfg, memory.values, d_values, touched / counts.clamp(min=1), touched * cfg.weight_decay)
    keys = _descend(cfg, memory.keys, d_keys, value.new_tensor(cfg.addressing_weight), cfg.weight_decay)
    return Memory(keys, values)


def _descend(cfg: FwPKMConfig, table: Tensor, gradient: Tensor, scale: Tensor, decay: Tensor | float) -> Tensor:
    """table − η (clip(scale · gradient) + decay · table), a new whole table."""
    if cfg.grad_clip is not None:
        gradient, scale = (scale * gradient).clamp(-cfg.grad_clip, cfg.grad_clip), torch.ones_like(scale)
    stepped = torch.addcmul(table, scale, gradient, value=-cfg.learning_rate)
    return stepped if cfg.weight_decay == 0 else stepped - cfg.learning_rate * decay * table
