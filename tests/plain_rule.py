"""The memory's equations and the experimental rules written plainly, in torch, for autograd to derive (float64)."""

import torch
from torch import Tensor

from fwpkm import FwPKMConfig, Memory


def select(cfg: FwPKMConfig, keys: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots and weights [n, H*k] of queries [n, H, 2, d], and the chosen sub-keys and their scores [n, H, 2, k]."""
    scores = -torch.log(cfg.score_eps + (query[:, :, :, None] - keys).square().sum(-1))
    if cfg.score == "dot_product":
        scores = (query[:, :, :, None] * keys).sum(-1)
    chosen, ids = scores.topk(cfg.top_k)
    sums = chosen[:, :, 0, :, None] + chosen[:, :, 1, None, :]
    slots = ids[:, :, 0, :, None] * cfg.num_subkeys + ids[:, :, 1, None, :]
    best, at = sums.flatten(2).topk(cfg.top_k)
    weights = (best.flatten(1) / cfg.temperature).softmax(-1)
    return slots.flatten(2).gather(2, at).flatten(1), weights, ids, chosen


def write_scale(cfg: FwPKMConfig, weights: Tensor) -> Tensor:
    """κ [n]."""
    ones = torch.ones_like(weights[:, 0])
    scales = {"slots": cfg.slots_per_token * ones, "unit": ones, "normalized": 1 / weights.square().sum(-1)}
    return scales[cfg.write_scale]


def clipped(cfg: FwPKMConfig, x: Tensor) -> Tensor:
    """Within the bound, if there is one."""
    return x if cfg.grad_clip is None else x.clamp(-cfg.grad_clip, cfg.grad_clip)


def write(cfg, keys, values, query, value, gate, forget):
    """The tables after one chunk of n tokens, of which the first C count; the others are targets alone."""
    slots, weights, ids, chosen = select(cfg, keys, query)
    read = (weights[..., None] * values[slots]).sum(1)
    counted = torch.arange(len(query)) < cfg.chunk_size
    pair = counted & (torch.arange(len(query)) + cfg.lookahead < len(query))
    if not pair.any():
        return keys, values
    target = torch.cat([value[cfg.lookahead :], torch.zeros_like(value[: cfg.lookahead])])
    strength = torch.where(pair, write_scale(cfg, weights) * gate, 0)
    error = torch.where(pair[:, None], read - target, 0)
    reads = torch.zeros(len(values), dtype=values.dtype).index_add(
        0, slots.flatten(), counted[:, None].expand_as(slots).flatten().to(values.dtype)
    )
    each = ((strength[:, None] * weights)[..., None] * error[:, None]).flatten(0, 1)
    touched = (reads > 0)[:, None]
    count = reads.clamp(min=1)[:, None]
    step = clipped(cfg, torch.zeros_like(values).index_add(0, slots.flatten(), each) / count)
    forgotten = torch.where(counted, forget, 0)[:, None].expand_as(slots).flatten()
    forgotten = torch.zeros_like(reads).index_add(0, slots.flatten(), forgotten)[:, None] / count
    after = (1 - forgotten) * values - cfg.learning_rate * (step + cfg.weight_decay * values)
    probability = torch.zeros(*chosen.shape[:3], cfg.num_subkeys, dtype=values.dtype).scatter(
        3, ids, chosen.softmax(-1)
    )
    mean = probability[counted].mean(0)
    loss = (mean * torch.log(mean + 1e-8)).sum()
    (slope,) = torch.autograd.grad(loss, keys, create_graph=True)
    slope = clipped(cfg, cfg.addressing_weight * slope)
    return keys - cfg.learning_rate * (slope + cfg.weight_decay * keys), torch.where(touched, after, values)


def run(cfg: FwPKMConfig, memory: Memory, query, value, gate, forget) -> tuple[Tensor, Memory]:
    """Outputs [B, T, Dv] of whole sequences, and the tables after a flush."""
    outputs, tables = [], []
    lag = cfg.lookahead if cfg.boundary == "wait" else 0
    for b in range(len(query)):
        keys, values = (x[b % len(x)] for x in memory)
        q = query[b].unflatten(-1, (cfg.num_heads, 2, -1))
        tokens = q, value[b], gate[b], forget[b]
        length, begin, done = len(q), 0, 0

        def read_to(end, keys, values, done, q=q):
            slots, weights, _, _ = select(cfg, keys, q[done:end])
            outputs.append((weights[..., None] * values[slots]).sum(1))

        while begin + cfg.chunk_size + lag <= length:
            end = begin + cfg.chunk_size + lag
            read_to(end, keys, values, done)
            done = end
            keys, values = write(cfg, keys, values, *(x[begin:end] for x in tokens))
            begin += cfg.chunk_size
        read_to(length, keys, values, done)
        if begin < length:
            keys, values = write(cfg, keys, values, *(x[begin:] for x in tokens))
        tables.append((keys, values))
    return torch.cat(outputs).unflatten(0, (len(query), -1)), Memory(*map(torch.stack, zip(*tables)))
