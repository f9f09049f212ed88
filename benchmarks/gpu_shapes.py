"""The kernels beside the eager backend at the shapes that are timed, under the tie rule of SPEC.md §6.

At S = 512 one choice in a few hundred hangs on a gap smaller than the rule's, so no chunk of drawn queries would be
without a tie. Queries that decide by too small a gap are therefore drawn anew, chunk by chunk, along the tables that
the eager backend writes in float64; then all tokens can be compared.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.data import Inputs, make_inputs
from benchmarks.findings import Finding, Report, equal
from benchmarks.gpu_backend import DEVICE
from benchmarks.poison import poisoned
from benchmarks.workloads import Workload
from fwpkm import schedule
from fwpkm.agreement import BOUNDS, GAP
from fwpkm.backends import torch as be
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, Trace

_BLOCK = 2**26
"""Numbers that are compared in float64 at a time."""
_CLEAR = 2 * GAP
"""Gaps that are drawn anew: twice the rule's, since two float32 runs follow the float64 one only nearly."""
_MOST_DRAWS = 100


class Gone(NamedTuple):
    """All that reading a workload gave."""

    output: Tensor
    trace: Trace
    memory: Memory
    gradients: tuple[Tensor, ...]
    """Of query, value and gate, then of the initial tables where asked for; none where not derived."""


def agree(workload: Workload, dtype: str, seed: int, derived: bool = True, tables: bool = False) -> Report:
    """The kernels on inputs of a dtype beside the eager backend on the same numbers in float32.

    Args:
        workload: under boundary="drop".
        dtype: "float32", "bfloat16" or "float16".
        seed: of tables and inputs.
        derived: compare gradients too.
        tables: also those of the initial tables, and through the final ones; else the tables are rewritten in place.
    """
    inputs = untied_inputs(workload, dtype, seed)
    with poisoned():
        actual = go(workload, inputs, "triton", seed, derived, tables)
        again = go(workload, inputs, "triton", seed, derived, tables)
    findings = [equal("the same bits twice", same(actual, again))]
    del again
    expected = go(workload, Inputs(*(x.float() for x in inputs)), "eager", seed, derived, tables)
    return Report([*findings, *judge(workload, actual, expected, dtype)])


def untied_inputs(workload: Workload, dtype: str, seed: int) -> Inputs:
    """Inputs whose every choice of slots hangs on a clear gap."""
    cfg, batch, length = workload.config, workload.batch, workload.length
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=getattr(torch, dtype))
    query = inputs.query.detach()
    generator = torch.Generator(DEVICE).manual_seed(seed + 1)
    # Keys do not depend on values: a table one number wide leads them along the same path.
    thin = dataclasses.replace(cfg, value_dim=1)
    keys = draw_keys(workload, seed).double()
    values = torch.zeros(workload.memories, cfg.num_slots, 1, dtype=torch.float64, device=DEVICE)
    state = be.init_state(thin, Memory(keys, values), batch_size=batch)
    nothing = torch.zeros(batch, length, 1, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        for start, stop, _ in schedule.windows(cfg, 0, length):
            part = query[:, start:stop]  # a view
            for _ in range(_MOST_DRAWS):
                close = deciding_gap(cfg, state.memory.keys, part) <= _CLEAR
                number = int(close.sum())
                if not number:
                    break
                fresh = torch.randn(number, part.shape[-1], generator=generator, device=DEVICE) / math.sqrt(cfg.key_dim)
                part[close] = fresh.to(query.dtype)
            else:
                raise RuntimeError(f"no query without a tie in {_MOST_DRAWS} draws at {workload}")
            given = part.double(), nothing[:, start:stop]
            state = be.apply(thin, state, *given, inplace=True, implementation="eager")[1]
    return inputs


def draw_keys(workload: Workload, seed: int) -> Tensor:
    """``[M, H, 2, S, Dk/2]`` float32 (SPEC.md §7)."""
    cfg, bound = workload.config, workload.config.key_dim**-0.5
    keys = torch.empty(workload.memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2, device=DEVICE)
    return keys.uniform_(-bound, bound, generator=torch.Generator(DEVICE).manual_seed(seed))


def draw_memory(workload: Workload, seed: int) -> Memory:
    """These keys, and values of which no two rows are equal: a read of a wrong row shows."""
    cfg = workload.config
    values = torch.empty(workload.memories, cfg.num_slots, cfg.value_dim, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed + 3)
    return Memory(draw_keys(workload, seed), values.normal_(std=cfg.value_dim**-0.5, generator=generator))


def deciding_gap(cfg: FwPKMConfig, keys: Tensor, query: Tensor) -> Tensor:
    """:func:`fwpkm.agreement.deciding_gap` on the device, in float64: ``[B, n]`` from ``[M, H, 2, S, Dk/2]`` and
    ``[B, n, H*Dk]``.
    """
    batch, length, _ = query.shape
    k, subkeys, keys = cfg.top_k, cfg.num_subkeys, keys.double()
    halves = query.double().view(batch, length, cfg.num_heads, 2, -1).permute(0, 2, 3, 1, 4)
    products = halves @ keys.transpose(-1, -2)
    if cfg.score == "idw":
        norms = halves.square().sum(-1, keepdim=True) + keys.square().sum(-1)[..., None, :]
        # In float64 the expansion is exact enough for gaps of 1e-5, and takes no memory for all differences.
        scores = -torch.log(cfg.score_eps + (norms - 2 * products).clamp(min=0))
    else:
        scores = products
    best = scores.topk(min(k + 1, subkeys)).values  # [B, H, 2, n, .]
    sums = (best[:, :, 0, :, :k, None] + best[:, :, 1, :, None, :k]).flatten(-2).topk(min(k + 1, k * k)).values
    gaps = [x[..., k - 1] - x[..., k] for x in (best[:, :, 0], best[:, :, 1], sums) if x.shape[-1] > k]
    nothing = torch.full((batch, cfg.num_heads, length), torch.inf, dtype=torch.float64, device=query.device)
    return torch.stack([nothing, *gaps]).nan_to_num(torch.inf, torch.inf).amin((0, 2))


def go(
    workload: Workload, inputs: Inputs, implementation: str, seed: int, derived: bool = True, tables: bool = False
) -> Gone:
    """Read a workload from its drawn tables."""
    cfg = workload.config
    *leaves, cotangent = (x.detach() for x in inputs)
    leaves = [x.requires_grad_(derived) for x in leaves]
    memory = draw_memory(workload, seed)
    if tables:
        leaves += [table.requires_grad_() for table in memory]
    state = be.init_state(cfg, memory, batch_size=workload.batch)
    del memory  # the state has a copy, and a table can be gigabytes
    output, state, trace = be.apply(cfg, state, *leaves[:3], inplace=not tables, implementation=implementation)
    gradients: tuple[Tensor, ...] = ()
    if derived:
        live = [output, *state.memory] if tables else [output]
        generator = torch.Generator(DEVICE).manual_seed(seed + 2)
        cotangents = [cotangent, *(torch.randn(x.shape, generator=generator, device=DEVICE) for x in live[1:])]
        gradients = torch.autograd.grad(live, leaves, cotangents)
    return Gone(output.detach(), trace, be.detach(state).memory, gradients)


def judge(workload: Workload, actual: Gone, expected: Gone, dtype: str) -> Iterator[Finding]:
    """Every quantity; of the value tables the rows that were written, since the others hide their errors."""
    cfg, low, full = workload.config, BOUNDS[dtype], BOUNDS["float32"]
    slots, weights = _by_slot(cfg, actual.trace)
    expected_slots, expected_weights = _by_slot(cfg, expected.trace)
    yield equal("slots", torch.equal(slots, expected_slots))
    yield Finding("output", error(actual.output, expected.output), low.forward)
    yield Finding("weights", error(weights, expected_weights), full.forward)
    for name in ("memorization", "addressing"):
        yield Finding(name, error(getattr(actual.trace, name), getattr(expected.trace, name)), full.forward)
    yield Finding("keys", error(actual.memory.keys, expected.memory.keys), full.forward)
    rows = _written(workload, expected.trace.slots)
    values, expected_values = (gone.memory.values.flatten(0, 1) for gone in (actual, expected))
    yield Finding("written rows", error(values[rows], expected_values[rows]), full.forward)
    yield equal("rows not written", not _differing(values, expected_values).index_fill_(0, rows, False).any())
    names = ("query", "value", "gate", "keys", "values")
    for number, (name, x, y) in enumerate(zip(names, actual.gradients, expected.gradients)):
        yield Finding(f"grad {name}", error(x, y), low.gradient if number < 3 else full.gradient)


def error(actual: Tensor, expected: Tensor) -> float:
    """:func:`fwpkm.agreement.relative_error` on the device; infinite where anything is not finite."""
    if actual.shape != expected.shape:
        return math.inf
    off = size = 0.0
    for a, b in zip(actual.reshape(-1).split(_BLOCK), expected.reshape(-1).split(_BLOCK)):
        off += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    if not (math.isfinite(off) and math.isfinite(size)):
        return math.inf
    return math.sqrt(off) if size < 1e-12 else math.sqrt(off / size)


def tensors(gone: Gone) -> list[Tensor]:
    """All of it."""
    return [gone.output, *gone.trace, *gone.memory, *gone.gradients]


def same(actual: Gone, expected: Gone) -> bool:
    """Whether two results are equal to the last bit."""
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(tensors(actual), tensors(expected), strict=True))


def digest(parts: Sequence[Tensor]) -> str:
    """A sha256 of the bits of tensors."""
    total = hashlib.sha256()
    for x in parts:
        total.update(_bits(x).reshape(-1).cpu().numpy())
    return total.hexdigest()


def _bits(x: Tensor) -> Tensor:
    """A view in which NaN equal themselves."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(sizes[x.element_size()])


def _by_slot(cfg: FwPKMConfig, trace: Trace) -> tuple[Tensor, Tensor]:
    """Each head's entries ordered by slot id: sums that nearly tie inside a selection have no agreed order."""
    slots, weights = (x.unflatten(-1, (cfg.num_heads, cfg.top_k)) for x in (trace.slots, trace.weights))
    slots, order = slots.sort(dim=-1)
    return slots, weights.gather(-1, order)


def _written(workload: Workload, slots: Tensor) -> Tensor:
    """The table rows of all memories that complete chunks touched."""
    cfg, memories = workload.config, workload.memories
    whole = workload.length // cfg.chunk_size * cfg.chunk_size
    tables = torch.arange(memories, device=slots.device).repeat_interleave(workload.batch // memories)
    return (slots[:, :whole] + tables[:, None, None] * cfg.num_slots).unique()


def _differing(actual: Tensor, expected: Tensor) -> Tensor:
    """``[rows]`` bool: rows with other bits."""
    step = max(1, _BLOCK // actual.shape[1])
    parts = zip(_bits(actual).split(step), _bits(expected).split(step))
    return torch.cat([(a != b).any(1) for a, b in parts])
