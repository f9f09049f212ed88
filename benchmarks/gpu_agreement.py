"""Whether the kernels agree (SPEC.md §6): with the vectors, the float64 reference at small shapes, and eager float32.

Every result is computed twice, from memory that held NaN, and must have the same bits. Eager runs at the shapes that
are timed, under the tie rule: at S = 512 one choice in a few hundred hangs on a gap smaller than the rule's, so no
chunk of drawn queries would be without a tie. Queries that decide by too small a gap are therefore drawn anew, chunk
by chunk, along the tables that the eager backend writes in float64; then all tokens can be compared.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import internals
from benchmarks.findings import Finding, Report, differing_rows, equal, error, twice
from benchmarks.measure import DEVICE
from benchmarks.workloads import Inputs, Workload, make_inputs
from fwpkm import FwPKMConfig, Memory, Trace, agreement, schedule
from fwpkm.agreement import BOUNDS, GAP
from fwpkm.backends import torch as be
from fwpkm.tokens import Tokens

_WIDTH = 16
"""The kernels take value widths that are multiples of this; columns of zeros change nothing."""
_CLEAR = 2 * GAP
"""Gaps that are drawn anew: twice the rule's, since two float32 runs follow the float64 one only nearly."""
_QUERY_DRAWS = 100
_CASE_DRAWS = 20
"""How often numbers are drawn anew for a case that a mere rounding would move."""

# B, T; Dk, Dv, H, S, k, C, L; other fields, and what the tokens have beside query and value.
_FIELDS = ("key_dim", "value_dim", "num_heads", "num_subkeys", "top_k", "chunk_size", "lookahead")
_BATCH = {"memory_scope": "batch"}
SHAPES: dict[str, tuple[int, int, tuple[int, ...], dict[str, Any]]] = {
    "tiny": (1, 4, (16, 16, 1, 3, 2, 2, 1), {}),
    "odd sizes": (3, 24, (48, 80, 1, 20, 5, 7, 1), {}),
    "one choice": (2, 12, (16, 16, 1, 1, 1, 4, 1), {"gated": False, "masked": False}),
    "single tokens": (2, 12, (32, 16, 2, 9, 3, 1, 0), {"write_scale": "unit", "learning_rate": 0.5}),
    "three heads, wait": (
        *(3, 22, (32, 48, 3, 12, 3, 6, 2)),
        {**_BATCH, "boundary": "wait", "write_scale": "normalized", "temperature": 0.5},
    ),
    "four heads, dot product": (
        *(2, 20, (16, 32, 4, 10, 4, 8, 3)),
        {"score": "dot_product", "write_scale": "unit", "grad_clip": 0.05},
    ),
    "many choices": (2, 16, (32, 32, 1, 40, 32, 5, 1), {"write_scale": "normalized", "learning_rate": 0.5}),
    "decay, clip, batch": (
        *(3, 40, (64, 64, 2, 16, 8, 16, 1)),
        {**_BATCH, "write_scale": "unit", "weight_decay": 0.1, "grad_clip": 0.05, "addressing_weight": 0.3},
    ),
    "long chunks": (2, 150, (64, 64, 1, 130, 8, 64, 1), {"write_scale": "normalized"}),
}
"""Shapes at which blocks are not full, and the choices on which the kernels branch."""


def vector(name: str) -> Report:
    """A vector in float32: outputs, slots, weights, losses, final tables and gradients."""
    tools, cfg, arrays = internals.conformance(), *_load(name)
    backend = internals.kernels_backend()
    memory = Memory(arrays["keys"], arrays["values"])
    tokens = Tokens(*(arrays.get(field) for field in ("query", "value", "gate", "mask")))
    batch, length, _ = tokens.query.shape
    wide = tools.Case(cfg, 0, "float64", frozenset(), batch, length, memory, tokens)
    case = wide.map(lambda array: array.astype(np.float32))
    losses = (arrays[f"out_{loss}_loss"] for loss in ("memorization", "addressing"))
    tables = Memory(arrays["out_keys"], arrays["out_values"])
    expected = tools.Reading(arrays["out_output"], arrays["out_slots"], arrays["out_weights"], *losses, tables)
    cotangents = [arrays[f"cot_{field}"].astype(np.float32) for field in ("output", "keys", "values")]

    def compute() -> tuple[Any, dict[str, np.ndarray]]:
        received = tools.gradients(backend, case, cotangents)
        return tools.read(backend, case), {field: x for field, x in zip(tools.INPUTS, received) if x is not None}

    (reading, derived), bits = twice(compute)
    comparable = agreement.comparable_tokens(cfg, memory, tokens)
    if comparable < length and dict(tools.reading_errors(cfg, reading, expected))["slots"]:  # it left the path at a tie
        writes = comparable // cfg.chunk_size
        parts = (_cut(part, comparable, writes) for part in (reading, expected))
        notes = [f"compared over {comparable} of {length} tokens, up to a tie"]
        return Report([bits, *_judged(tools.reading_errors(cfg, *parts))], notes)
    errors = [(f"grad {key}", agreement.relative_error(x, arrays[f"grad_{key}"])) for key, x in derived.items()]
    return Report([bits, *_judged(tools.reading_errors(cfg, reading, expected)), *_judged(errors)])


def _cut(reading: Any, tokens: int, writes: int) -> Any:
    """The beginning of a reading; its tables are left out, since more was written into them."""
    stops = {"output": tokens, "slots": tokens, "weights": tokens, "memorization": writes, "addressing": writes}
    empty = Memory(*(np.zeros(0) for _ in Memory._fields))
    return reading._replace(memory=empty, **{name: getattr(reading, name)[:, :stop] for name, stop in stops.items()})


def _load(name: str) -> tuple[FwPKMConfig, dict[str, np.ndarray]]:
    """A vector's configuration and arrays, value columns padded with zeros to what the kernels take."""
    with resources.files("fwpkm.data").joinpath("vectors", name).open("rb") as file, np.load(file) as stored:
        arrays = dict(stored)
    fields = FwPKMConfig.from_json(str(arrays.pop("config")))
    missing = -fields.value_dim % _WIDTH
    names = ("output", "value", "values")
    for field in (f"{kind}{of}" for kind in ("", "cot_", "out_", "grad_") for of in names):
        if field in arrays:
            array = arrays[field]
            dead = np.isnan(array).any(-1, keepdims=True)
            arrays[field] = np.concatenate([array, np.where(dead, np.nan, np.zeros((*array.shape[:-1], missing)))], -1)
    return dataclasses.replace(fields, value_dim=fields.value_dim + missing), arrays


def shape_of(name: str) -> Any:
    """One of ``SHAPES`` as conformance takes it."""
    batch, length, sizes, fields = SHAPES[name]
    present = {kind: fields.get(kind, True) for kind in ("gated", "masked")}
    fields = {**dict(zip(_FIELDS, sizes)), **{key: x for key, x in fields.items() if key not in present}}
    return internals.conformance().Shape(FwPKMConfig(**fields), batch, length, **present)


def drawn(name: str, seed: int, numbers: Iterable[int] = (1, 2)) -> Report:
    """New numbers at one of ``SHAPES``: all that ``fwpkm conform`` judges.

    Number 1 takes gradients through two halves with a state between them, number 2 through one call.
    """
    tools, shape, findings, aside = internals.conformance(), shape_of(name), [], 0
    for number in numbers:
        for attempt in range(_CASE_DRAWS):
            passage = tools.draw(tools.passages(number, shape, "float32"), f"{seed}/{name}/{number}/{attempt}")
            expected = tools.expect_unmoved(passage)
            if expected is not None:
                break
            aside += 1
        else:
            raise RuntimeError(f"none of {_CASE_DRAWS} draws can be judged in float32. Received: {shape}")
        result, bits = twice(partial(tools.run, internals.kernels_backend(), passage))
        findings += [bits, *_judged(tools.errors(shape.cfg, result, expected))]
    return Report(findings, [f"{aside} draws set aside, as rounding would move them by too much"] * bool(aside))


def _judged(errors: Iterable[tuple[str, float]]) -> list[Finding]:
    bound = internals.conformance().bound
    return [Finding(what, size, bound(what, "float32")) for what, size in errors]


class Outputs(NamedTuple):
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
    actual, bits = twice(lambda: compute(workload, inputs, "triton", seed, derived, tables))
    wide = Inputs(*(x.float() for x in inputs))
    expected = compute(workload, wide, "eager", seed, derived, tables)
    return Report([bits, *judge(workload, actual, expected, dtype)])


def untied_inputs(workload: Workload, dtype: str, seed: int) -> Inputs:
    """Inputs whose every choice of slots hangs on a clear gap."""
    cfg, batch, length = workload.config, workload.batch, workload.length
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    query = inputs.query.detach()
    generator = torch.Generator(DEVICE).manual_seed(seed + 1)
    # Keys do not depend on values: a table one number wide leads them along the same path.
    thin = dataclasses.replace(cfg, value_dim=1)
    keys = draw_keys(workload, seed).double()
    values = torch.zeros(workload.memories, cfg.num_slots, 1, dtype=torch.float64, device=DEVICE)
    state = be.init_state(thin, Memory(keys, values), batch_size=batch)
    nothing = torch.zeros(batch, length, 1, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        for window in schedule.windows(cfg, 0, length):
            part = query[:, window.start : window.stop]  # a view
            for _ in range(_QUERY_DRAWS):
                close = deciding_gap(cfg, state.memory.keys, part) <= _CLEAR
                number = int(close.sum())
                if not number:
                    break
                again = torch.randn(number, part.shape[-1], generator=generator, device=DEVICE) / math.sqrt(cfg.key_dim)
                part[close] = again.to(query.dtype)
            else:
                raise RuntimeError(f"no query without a tie in {_QUERY_DRAWS} draws at {workload}")
            tokens = part.double(), nothing[:, window.start : window.stop]
            state = be.apply(thin, state, *tokens, inplace=True, implementation="eager")[1]
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
    scores = halves @ keys.transpose(-1, -2)
    if cfg.score == "idw":
        norms = halves.square().sum(-1, keepdim=True) + keys.square().sum(-1)[..., None, :]
        # In float64 the expansion is exact enough for gaps of 1e-5, and takes no memory for all differences.
        scores = -torch.log(cfg.score_eps + (norms - 2 * scores).clamp(min=0))
    elif cfg.score != "dot_product":
        cfg.refuse("score", "benchmarks.gpu_agreement")
    best = scores.topk(min(k + 1, subkeys)).values  # [B, H, 2, n, .]
    sums = (best[:, :, 0, :, :k, None] + best[:, :, 1, :, None, :k]).flatten(-2).topk(min(k + 1, k * k)).values
    gaps = [x[..., k - 1] - x[..., k] for x in (best[:, :, 0], best[:, :, 1], sums) if x.shape[-1] > k]
    nothing = torch.full((batch, cfg.num_heads, length), torch.inf, dtype=torch.float64, device=query.device)
    return torch.stack([nothing, *gaps]).nan_to_num(torch.inf, torch.inf).amin((0, 2))


def compute(
    workload: Workload, inputs: Inputs, implementation: str, seed: int, derived: bool = True, tables: bool = False
) -> Outputs:
    """Read a workload from its drawn tables."""
    cfg = workload.config
    tokens: Any = [x.detach().requires_grad_(derived) for x in inputs.tokens]
    memory = draw_memory(workload, seed)
    leaves = [*tokens, *(table.requires_grad_() for table in memory if tables)]
    state = be.init_state(cfg, memory, batch_size=workload.batch)
    del memory  # the state has a copy, and a table can be gigabytes
    output, state, trace = be.apply(cfg, state, *tokens, inplace=not tables, implementation=implementation)
    gradients: tuple[Tensor, ...] = ()
    if derived:
        live = [output, *state.memory] if tables else [output]
        generator = torch.Generator(DEVICE).manual_seed(seed + 2)
        drawn_ones = (torch.randn(x.shape, generator=generator, device=DEVICE) for x in live[1:])
        gradients = torch.autograd.grad(live, leaves, [inputs.cotangent.detach(), *drawn_ones])
    return Outputs(output.detach(), trace, be.detach(state).memory, gradients)


def judge(workload: Workload, actual: Outputs, expected: Outputs, dtype: str) -> Iterator[Finding]:
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
    rows = written_rows(workload, expected.trace.slots)
    values, expected_values = (outputs.memory.values.flatten(0, 1) for outputs in (actual, expected))
    yield Finding("written rows", error(values[rows], expected_values[rows]), full.forward)
    yield equal("rows not written", not differing_rows(values, expected_values).index_fill_(0, rows, False).any())
    bounds = {"query": low, "value": low, "gate": low, "keys": full, "values": full}
    for (name, bound), x, y in zip(bounds.items(), actual.gradients, expected.gradients):
        yield Finding(f"grad {name}", error(x, y), bound.gradient)


def _by_slot(cfg: FwPKMConfig, trace: Trace) -> tuple[Tensor, Tensor]:
    """Each head's entries ordered by slot id: sums that nearly tie inside a selection have no agreed order."""
    slots, weights = (x.unflatten(-1, (cfg.num_heads, cfg.top_k)) for x in (trace.slots, trace.weights))
    slots, order = slots.sort(dim=-1)
    return slots, weights.gather(-1, order)


def written_rows(workload: Workload, slots: Tensor) -> Tensor:
    """The table rows of all memories that complete chunks touched."""
    whole = workload.length // workload.config.chunk_size * workload.config.chunk_size
    return workload.rows(slots[:, :whole]).unique()
