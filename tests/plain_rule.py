"""The memory's equations and the experimental rules written plainly, in torch, for autograd to derive (float64)."""

import torch
from interpreter import DEVICE
from torch import Tensor

import fwpkm
from fwpkm import FwPKMConfig, Memory
from fwpkm.agreement import relative_error

TORCH = fwpkm.get_backend("torch")


def select(cfg: FwPKMConfig, keys: Tensor, recent: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots and weights [n, H*k] of queries [n, H, 2, d], and the chosen sub-keys and their scores [n, H, 2, k]."""
    scores = -torch.log(cfg.score_eps + (query[:, :, :, None] - keys).square().sum(-1))
    if cfg.score == "dot_product":
        scores = (query[:, :, :, None] * keys).sum(-1)
    chosen, ids = (scores - cfg.recent_penalty * torch.log(1 + recent)).topk(cfg.top_k)
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


def write(cfg, keys, values, recent, initial, query, value, gate, forget):
    """The tables, and V, after one chunk of n tokens, of which the first C count; the others are targets alone."""
    slots, weights, ids, chosen = select(cfg, keys, recent, query)
    read = (weights[..., None] * values[slots]).sum(1)
    counted = torch.arange(len(query)) < cfg.chunk_size
    pair = counted & (torch.arange(len(query)) + cfg.lookahead < len(query))
    if not pair.any():
        return keys, values, recent
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
    decay = cfg.weight_decay * values + cfg.initial_decay * (values - initial)
    after = (1 - forgotten) * values - cfg.learning_rate * (step + decay)
    probability = torch.zeros(*chosen.shape[:3], cfg.num_subkeys, dtype=values.dtype).scatter(
        3, ids, chosen.softmax(-1)
    )
    mean = probability[counted].mean(0)
    loss = (mean * torch.log(mean + 1e-8)).sum()
    (slope,) = torch.autograd.grad(loss, keys, create_graph=True)
    slope = clipped(cfg, cfg.addressing_weight * slope)
    uses = torch.zeros_like(probability).scatter(3, ids, 1.0)[counted].sum(0)
    keys = keys - cfg.learning_rate * (slope + cfg.weight_decay * keys)
    return keys, torch.where(touched, after, values), (recent + uses) / 2


def run(cfg: FwPKMConfig, memory: Memory, query, value, gate, forget) -> tuple[Tensor, Memory]:
    """Outputs [B, T, Dv] of whole sequences, and the tables after a flush."""
    outputs, tables = [], []
    lag = cfg.lookahead if cfg.boundary == "wait" else 0
    for b in range(len(query)):
        keys, values = (x[b % len(x)] for x in memory)
        initial = memory.values[0].detach()
        recent = torch.zeros(keys.shape[:3], dtype=keys.dtype)
        q = query[b].unflatten(-1, (cfg.num_heads, 2, -1))
        tokens = q, value[b], gate[b], forget[b]
        length, begin, done = len(q), 0, 0

        def read_to(end, keys, values, recent, done, q=q):
            slots, weights, _, _ = select(cfg, keys, recent, q[done:end])
            outputs.append((weights[..., None] * values[slots]).sum(1))

        while begin + cfg.chunk_size + lag <= length:
            end = begin + cfg.chunk_size + lag
            read_to(end, keys, values, recent, done)
            done = end
            keys, values, recent = write(cfg, keys, values, recent, initial, *(x[begin:end] for x in tokens))
            begin += cfg.chunk_size
        read_to(length, keys, values, recent, done)
        if begin < length:
            keys, values, recent = write(cfg, keys, values, recent, initial, *(x[begin:] for x in tokens))
        tables.append((keys, values))
    return torch.cat(outputs).unflatten(0, (len(query), -1)), Memory(*map(torch.stack, zip(*tables)))


def drawn(cfg, dtype, batch=2, length=10):
    """Tokens and tables that need gradients."""
    draw = torch.Generator().manual_seed(0)
    widths = (cfg.num_heads * cfg.key_dim,), (cfg.value_dim,), (), ()
    tokens = [torch.rand(batch, length, *width, generator=draw, dtype=torch.float64) for width in widths]
    memory = [x.double() for x in TORCH.init_memory(cfg, memories=batch, seed=1)]
    tokens[3] = tokens[3] * 0.6
    return ([x.to(DEVICE, dtype).requires_grad_() for x in of] for of in (tokens, memory))


def summed(live):
    return sum(
        x.double().flatten() @ torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=x.device) for x in live
    )


def expected(cfg, forgets):
    """Output, tables and gradients of the rule as it stands here."""
    (*tokens, forget), memory = drawn(cfg, torch.float64)
    output, after = run(cfg, Memory(*memory), *tokens, forget if forgets else forget.detach() * 0)
    inputs = [*tokens, *memory, *([forget] if forgets else [])]
    return [output, *after, *torch.autograd.grad(summed([output, *after]), inputs)]


def received(cfg, cuts, implementation, dtype, forgets):
    """The same of calls up to each of ``cuts``, and a flush."""
    (*tokens, forget), memory = drawn(cfg, dtype)
    state, outputs, start = TORCH.init_state(cfg, Memory(*memory), 2), [], 0
    options = {"implementation": implementation}
    options |= {"initial_values": memory[1][:1].detach()} if cfg.initial_decay else {}
    for stop in cuts:
        here = slice(start, stop)
        output, state, _ = TORCH.apply(
            cfg, state, *(x[:, here] for x in tokens), forget=forget[:, here] if forgets else None, **options
        )
        outputs.append(output)
        start = stop
    state, _ = TORCH.flush(cfg, state, **options)
    live = [torch.cat(outputs, 1), *state.memory]
    return [*live, *torch.autograd.grad(summed(live), [*tokens, *memory, *([forget] if forgets else [])])]


def worst(cfg, cuts, implementation, dtype, forgets=True):
    """The largest relative error of outputs and tables, and of gradients."""
    errors = [
        relative_error(*(z.detach().double().cpu().numpy() for z in pair))
        for pair in zip(received(cfg, cuts, implementation, dtype, forgets), expected(cfg, forgets), strict=True)
    ]
    return max(errors[:3]), max(errors[3:])
