"""Whether the kernels agree (SPEC.md §6): with the vectors, the float64 reference at small shapes, and eager float32.

Every result is computed twice, from memory that held NaN, and must have the same bits. Eager runs at the shapes that
are timed, under the tie rule: at S = 512 one choice in a few hundred hangs on a gap smaller than the rule's, so no
chunk of drawn queries would be without a tie. Queries that decide by too small a gap are therefore drawn anew, chunk
by chunk, along the tables that the eager backend writes in float64; then all tokens can be compared.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.findings import Finding, Report, compared, differing_rows, digest, equal, same_bits, twice
from benchmarks.measure import DEVICE
from benchmarks.workloads import Decoder, Inputs, Workload, capture, make_inputs, make_memory, staggered
from fwpkm import FwPKMConfig, Memory, agreement, schedule
from fwpkm.agreement import GAP
from fwpkm.backends import torch as be
from fwpkm.tokens import Tokens

draw_memory = partial(make_memory, device=DEVICE, distinct=True)
"""Tables by workload and seed."""
_WIDTH = 16
"""The kernels take value widths that are multiples of this; columns of zeros change nothing."""
_CLEAR = 2 * GAP
"""Gaps that are drawn anew: twice the rule's, since two float32 runs follow the float64 one only nearly."""

_BATCH, _UNIT, _NORMALIZED = {"memory_scope": "batch"}, {"write_scale": "unit"}, {"write_scale": "normalized"}
SHAPES: dict[str, tuple[int, int, bool, tuple[Any, ...], dict[str, Any]]] = {
    # B, T, whether tokens have a gate and a mask; Dk, Dv, H, S, k, C, L, boundary, score; other fields.
    "tiny": (1, 4, True, (16, 16, 1, 3, 2, 2), {}),
    "odd sizes": (3, 24, True, (48, 80, 1, 20, 5, 7), {}),
    "one choice": (2, 12, False, (16, 16, 1, 1, 1, 4), {}),
    "single tokens": (2, 12, True, (32, 16, 2, 9, 3, 1, 0), _UNIT | {"learning_rate": 0.5}),
    "three heads, wait": (3, 22, True, (32, 48, 3, 12, 3, 6, 2, "wait"), _BATCH | _NORMALIZED | {"temperature": 0.5}),
    "four heads": (2, 20, True, (16, 32, 4, 10, 4, 8, 3, "drop", "dot_product"), _UNIT | {"grad_clip": 0.05}),
    "many choices": (2, 16, True, (32, 32, 1, 40, 32, 5), _NORMALIZED | {"learning_rate": 0.5}),
    "decay, clip, batch": (
        *(3, 40, True, (64, 64, 2, 16, 8, 16)),
        _BATCH | _UNIT | {"weight_decay": 0.1, "grad_clip": 0.05, "addressing_weight": 0.3},
    ),
    "long chunks": (2, 150, True, (64, 64, 1, 130, 8, 64), _NORMALIZED),
}
"""Shapes at which blocks are not full, and the choices on which the kernels branch."""


def vector(name: str) -> Report:
    """A vector in float32: outputs, slots, weights, losses, the flush, final tables and gradients."""
    from fwpkm.conformance import judging, running, strategies

    be, (cfg, arrays) = _kernels(), _load(name)
    memory, tokens = Memory(arrays["keys"], arrays["values"]), Tokens(*map(arrays.get, Tokens._fields))
    ends, used = arrays.get("cu_seqlens"), arrays["out_writes"].max()
    batch = len(tokens.query) if ends is None else len(ends) - 1
    case = strategies.Case(cfg, 0, "float64", frozenset(), batch, tokens.length, memory, tokens).map(np.float32)
    cotangents = [np.float32(arrays[f"cot_{field}"]) for field in ("output", "keys", "values")]
    expected = running.Reading(
        *(arrays[f"out_{x}"] for x in ("output", "slots", "weights")),
        *(arrays[f"out_{x}"][:, :used] for x in ("memorization", "addressing")),
        arrays["out_writes"],
        Memory(arrays["out_keys"], arrays["out_values"]),
    )

    def compute() -> tuple[Any, Any, Any, dict[str, np.ndarray]]:
        packed = {} if ends is None else {"cu_seqlens": running.native(be, ends)}
        call = running.native(be, case.tokens).present() | packed
        output, state, trace = be.apply(cfg, running.start(be, case), **call)
        flushed, last = be.flush(cfg, state)
        output, trace, last, tables, uses = running.as_numpy(
            be, (output, trace, last, flushed.memory, flushed.maybe_uses)
        )
        received = running.gradients(be, case, cotangents, **packed)
        derived = {field: x for field, x in zip(running.INPUTS, received) if x is not None}
        return running.Reading(output, **running.joined_traces([trace]), memory=tables), uses, last, derived

    (reading, uses, last, derived), bits = twice(compute)
    errors = dict(judging.reading_errors(cfg, reading, expected))
    if errors["slots"] and agreement.comparable_tokens(cfg, memory, tokens, cu_seqlens=ends) < tokens.length:
        return Report([bits], ["not compared: choices hang on a gap below the rule's, and the kernels' differ"])
    for loss in ("memorization", "addressing"):
        errors[f"flush {loss}"] = agreement.relative_error(getattr(last, loss)[:, 0], arrays[f"flush_{loss}"])
    if uses is not None:
        errors["uses"] = agreement.relative_error(uses, arrays["out_uses"])
    errors |= {f"grad {key}": agreement.relative_error(x, arrays[f"grad_{key}"]) for key, x in derived.items()}
    return Report([bits, *_judged(errors.items())])


def _load(name: str) -> tuple[FwPKMConfig, dict[str, np.ndarray]]:
    """A vector's configuration and arrays, value columns padded with zeros to what the kernels take."""
    with resources.files("fwpkm.data").joinpath("vectors", name).open("rb") as file, np.load(file) as stored:
        arrays = dict(stored)
    cfg = FwPKMConfig.from_json(str(arrays.pop("config")))
    missing = -cfg.value_dim % _WIDTH
    for field, x in arrays.items():
        if field.rpartition("_")[2] in ("output", "value", "values"):
            padding = np.where(np.isnan(x).any(-1, keepdims=True), np.nan, np.zeros(missing))
            arrays[field] = np.concatenate([x, padding], -1)
    return dataclasses.replace(cfg, value_dim=cfg.value_dim + missing), arrays


def drawn(name: str, seed: int, numbers: Iterable[int] = (1, 2)) -> Report:
    """New numbers at one of ``SHAPES``: all that ``fwpkm conform`` judges. Cases that a mere rounding would move are
    drawn anew, for as long as the task may take.

    Number 1 takes gradients through two halves with a state between them, number 2 through one call.
    """
    from fwpkm.conformance import drawing, judging, results

    findings, aside = [], 0
    batch, length, full, sizes, fields = SHAPES[name]
    shape = drawing.Shape(FwPKMConfig(*sizes, **fields), batch, length, () if full else ("gate", "mask"))
    for number in numbers:
        for attempt in itertools.count():
            passage = drawing.draw(drawing.passages(number, shape, "float32"), f"{seed}/{name}/{number}/{attempt}")
            expected = judging.expect_unmoved(passage)
            if expected is not None:
                break
        aside += attempt
        result, bits = twice(partial(results.run, _kernels(), passage))
        findings += [bits, *_judged(judging.errors(shape.cfg, result, expected))]
    return Report(findings, [f"{aside} draws set aside, as rounding would move them by too much"] * bool(aside))


def _kernels() -> Any:
    """The torch backend held to its kernels, with the functions that conformance calls."""
    from fwpkm.conformance import contestants

    return contestants.load("triton", "float32")


def _judged(errors: Iterable[tuple[str, float]]) -> list[Finding]:
    from fwpkm.conformance.judging import bound

    return [Finding(what, size, bound(what, "float32")) for what, size in errors]


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
    return Report([bits, *judge(workload, actual, expected)])


def untied_inputs(workload: Workload, dtype: str, seed: int, shared: bool = False) -> Inputs:
    """Inputs whose every choice of slots hangs on a clear gap; drawn for as long as the task may take.

    ``shared``, all sequences begin from the first memory.
    """
    # Keys do not depend on values: a table one number wide leads them along the same path.
    cfg = dataclasses.replace(workload.config, value_dim=1)
    memory = Memory(*(x.double() for x in draw_memory(dataclasses.replace(workload, config=cfg), seed=seed)))
    memory = Memory(*(table[:1] for table in memory)) if shared else memory
    state = be.init_state(cfg, memory, batch_size=workload.batch)
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    query, generator = inputs.query.detach(), torch.Generator(DEVICE).manual_seed(seed + 1)
    with torch.no_grad():
        for window in schedule.windows(cfg, 0, workload.length):
            part = query[:, window.start : window.stop]  # a view
            while (close := deciding_gap(cfg, state.memory.keys, part) <= _CLEAR).any():
                again = torch.randn(part[close].shape, generator=generator, device=DEVICE) / math.sqrt(cfg.key_dim)
                part[close] = again.to(query.dtype)
            tokens = part.double(), torch.zeros(*part.shape[:2], 1, dtype=torch.float64, device=DEVICE)
            state = be.apply(cfg, state, *tokens, inplace=True, implementation="eager")[1]
    return inputs


def deciding_gap(cfg: FwPKMConfig, keys: Tensor, query: Tensor) -> Tensor:
    """:func:`fwpkm.agreement.deciding_gap` on the device, in float64: ``[B, n]`` from ``[M, H, 2, S, Dk/2]`` and
    ``[B, n, H*Dk]``.
    """
    k, keys = cfg.top_k, keys.double()
    halves = query.double().unflatten(-1, (cfg.num_heads, 2, -1)).permute(0, 2, 3, 1, 4)  # [B, H, 2, n, Dk/2]
    scores = halves @ keys.mT
    if cfg.score == "idw":
        norms = halves.square().sum(-1, keepdim=True) + keys.square().sum(-1)[..., None, :]
        # In float64 the expansion is exact enough for gaps of 1e-5, and takes no memory for all differences.
        scores = -torch.log(cfg.score_eps + (norms - 2 * scores).clamp(min=0))
    elif cfg.score != "dot_product":
        cfg.refuse("score", "benchmarks.gpu_agreement")
    # Where nothing is left to choose, the next is -inf, and the gap infinite.
    best = F.pad(scores, (0, 1), value=-torch.inf).topk(k + 1).values
    sums = (best[:, :, 0, :, :k, None] + best[:, :, 1, :, None, :k]).flatten(-2)
    best = torch.cat([best, F.pad(sums, (0, 1), value=-torch.inf).topk(k + 1).values[:, :, None]], 2)
    return (best[..., k - 1] - best[..., k]).nan_to_num(torch.inf, torch.inf).amin((1, 2))


def compute(
    workload: Workload, inputs: Inputs, implementation: str, seed: int, derived: bool = True, tables: bool = False
) -> dict[str, Tensor]:
    """Read a workload from its drawn tables: outputs, traces, final tables, and gradients as "grad query"."""
    cfg = workload.config
    tokens: Any = [x.detach().requires_grad_(derived) for x in inputs.tokens]
    memory = draw_memory(workload, seed=seed)
    leaves = [*tokens, *(table.requires_grad_() for table in memory if tables)]
    state = be.init_state(cfg, memory, batch_size=workload.batch)
    del memory  # the state has a copy, and a table can be gigabytes
    output, state, trace = be.apply(cfg, state, *tokens, inplace=not tables, implementation=implementation)
    found = {"output": output.detach(), **trace._asdict(), **be.detach(state).memory._asdict()}
    if derived:
        live = [output, *state.memory] if tables else [output]
        generator = torch.Generator(DEVICE).manual_seed(seed + 2)
        cotangents = (torch.randn(x.shape, generator=generator, device=DEVICE) for x in live[1:])
        gradients = torch.autograd.grad(live, leaves, [inputs.cotangent.detach(), *cotangents])
        found |= {f"grad {name}": x for name, x in zip(("query", "value", "gate", "keys", "values"), gradients)}
    return found


def judge(workload: Workload, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[Finding]:
    """Every quantity; of the value tables the rows that were written, since the others hide their errors.

    Each head's entries are ordered by slot id: sums that nearly tie inside a selection have no agreed order.
    """
    cfg, pair, tables = workload.config, [], []
    rows = written_rows(workload, expected["slots"])
    for found in (actual, expected):
        tables.append(found["values"].flatten(0, 1))
        pair.append(_in_order(cfg, found) | {"values": tables[-1][rows]})
    unwritten = equal("rows not written", not differing_rows(*tables).index_fill_(0, rows, False).any())
    return [*compared(*pair), unwritten]


def _in_order(cfg: FwPKMConfig, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was found, each head's entries by slot id."""
    slots, weights = (found[name].unflatten(-1, (cfg.num_heads, cfg.top_k)) for name in ("slots", "weights"))
    slots, order = slots.sort(dim=-1)
    return found | {"slots": slots, "weights": weights.gather(-1, order)}


def written_rows(workload: Workload, slots: Tensor) -> Tensor:
    """The table rows of all memories that complete chunks touched."""
    whole = workload.length // workload.config.chunk_size * workload.config.chunk_size
    return workload.rows(slots[:, :whole]).unique()


def from_memory(workload: Workload, dtype: str, seed: int, packed: bool, learned: bool) -> Report:
    """A call from a memory without a state, beside eager float32 as in ``agree``.

    ``packed``, the sequences have fewer and fewer tokens; ``learned``, gradients are those of the tables too.
    """
    cfg, options = workload.config, {}
    inputs = untied_inputs(workload, dtype, seed, shared=True)
    if packed:
        lengths = torch.linspace(workload.length, 1, workload.batch).long()
        there = (torch.arange(workload.length) < lengths[:, None]).to(DEVICE)
        inputs = Inputs(*(x.detach()[there][None] for x in inputs))
        options["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()

    def compute(implementation: str, drawn: Inputs) -> dict[str, Tensor]:
        tokens = [x.detach().requires_grad_() for x in drawn.tokens]
        memory = Memory(*(table[:1].clone().requires_grad_(learned) for table in draw_memory(workload, seed=seed)))
        output, _, trace = be.apply(cfg, memory, *tokens, **options, implementation=implementation)
        leaves = [*tokens, *memory] if learned else tokens
        gradients = torch.autograd.grad(output, leaves, drawn.cotangent.detach())
        names = ("query", "value", "gate", "keys", "values")
        found = {"output": output.detach(), **trace._asdict()}
        return found | {f"grad {name}": x for name, x in zip(names, gradients)}

    actual, bits = twice(lambda: compute("triton", inputs))
    expected = compute("eager", Inputs(*(x.float() for x in inputs)))
    return Report([bits, *compared(*(_in_order(cfg, found) for found in (actual, expected)))])


# --- Rows that are not alike ---


def streams(numbers: range, longest: int = 120, both: bool = False) -> Report:
    """Ragged streams of three calls each, beside eager float32: outputs, traces, states, and gradients through all.

    Every number draws one shape and its inputs, the same in every run: so none has choices that hang on rounding. A row
    has up to ``longest`` tokens in a call. ``both``, packed calls have a mask beside ``cu_seqlens``.
    """
    findings = []
    for number in numbers:
        cfg, memory, calls = _drawn(number, longest, both)
        received, bits = twice(partial(_read, cfg, memory, calls, "triton", number))
        findings += [bits, *compared(received, _read(cfg, memory, calls, "eager", number))]
    return Report(findings)


def _drawn(number: int, longest: int, both: bool) -> tuple[FwPKMConfig, Memory, list[dict[str, Tensor]]]:
    """A configuration, its tables, and the arguments of each call; masks and cu_seqlens lie on either device."""
    draw = torch.Generator().manual_seed(number)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    def choice(*options: Any) -> Any:
        return options[integer(0, len(options) - 1)]

    cfg = FwPKMConfig(
        *(32, 32, integer(1, 2), 32, 4, choice(4, 16, 40), integer(0, 2), choice("drop", "wait")),
        write_scale=choice("slots", "unit", "normalized"),
    )
    batch, calls = integer(1, 5), []
    for _ in range(3):
        rows, given = batch, {}
        if choice(True, False):
            length = integer(1, longest)
            given["mask"] = (torch.rand(batch, length, generator=draw) < 0.7).to(choice("cpu", DEVICE))
        else:
            ends = [*itertools.accumulate((integer(0, longest * 3 // 4) for _ in range(batch)), initial=0)]
            rows, length = 1, ends[-1] + 2
            given["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32).to(choice("cpu", DEVICE))
            if both:
                given["mask"] = (torch.rand(rows, length, generator=draw) < 0.7).to(choice("cpu", DEVICE))
        shapes = {"query": (rows, length, 32 * cfg.num_heads), "value": (rows, length, 32), "gate": (rows, length)}
        drawn = {name: torch.rand(shape, generator=draw).to(DEVICE) for name, shape in shapes.items()}
        calls.append({**drawn, **given, "query": drawn["query"] - 0.5, "value": drawn["value"] - 0.5})
    return cfg, Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, batch, seed=number))), calls


def _read(
    cfg: FwPKMConfig, memory: Memory, calls: list[dict[str, Tensor]], implementation: str, seed: int
) -> dict[str, Tensor]:
    """What the calls give, one after the other, and at last the state, by name."""
    state, found, leaves = be.init_state(cfg, memory, memory.keys.shape[0]), {}, {}
    results: list[Tensor] = []
    for number, call in enumerate(calls):
        numbers = {name: call[name].clone().requires_grad_() for name in ("query", "value", "gate")}
        output, state, trace = be.apply(cfg, state, **call | numbers, implementation=implementation)
        told = {"output": output, **trace._asdict(), "slots": trace.slots.sort(-1).values}  # near ties have no order
        found |= {f"{name} {number}": x for name, x in told.items()}
        leaves |= {f"grad {name} {number}": x for name, x in numbers.items()}
        results.append(output)
    found |= {**state.memory._asdict(), **state.pending._asdict(), "position": state.position}
    results += [*state.memory, *(x for x in state.pending if x.is_floating_point())]
    draw = torch.Generator(DEVICE).manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=draw, device=DEVICE) for x in results]
    live = [(x, c) for x, c in zip(results, cotangents) if x.requires_grad]
    live_results, of_live = zip(*live)
    gradients = torch.autograd.grad(live_results, [*leaves.values()], of_live, allow_unused=True)
    found |= {name: torch.zeros_like(x) if d is None else d for (name, x), d in zip(leaves.items(), gradients)}
    return {name: x.detach() for name, x in found.items()}


# --- What training and decoding loops rely on: the same bits everywhere, no waiting, CUDA graphs, torch.compile ---


def repeatable(workload: Workload, dtype: str, seed: int, runs: int = 20) -> Report:
    """The same bits in every run of a training step; the note is to be compared with another process's."""
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    return repeated(lambda: compute(workload, inputs, "triton", seed), runs)


def repeated(step: Callable[[], dict[str, Tensor]], runs: int) -> Report:
    """Whether a step gives the same bits in so many runs; the note is their digest."""
    first = step()
    same = all(same_bits(step(), first) for _ in range(runs - 1))
    finite = all(bool(x.isfinite().all()) for x in first.values())
    findings = [equal(f"bits over {runs} runs", same), equal("outputs, tables and gradients finite", finite)]
    return Report(findings, [f"sha256 of outputs, tables and gradients: {digest(first)}"])


def training(workload: Workload, dtype: str, seed: int, stateless: bool = False) -> Report:
    """A training step, after steps that compile: a wait of the host for the device is an error; in a CUDA graph,
    replayed on other inputs than it was captured with, it gives the bits of the step itself.

    ``stateless``, it begins from a memory.

    Raises:
        RuntimeError: it waited.
    """
    inputs = make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype)
    memory = draw_memory(workload, seed=seed)
    state: Any = Memory(*(table[:1] for table in memory))
    if not stateless:
        state = be.init_state(workload.config, memory, batch_size=workload.batch)

    def step() -> tuple[Tensor, ...]:
        output, after, _ = be.apply(workload.config, state, *inputs.tokens, implementation="triton")
        return output, *(after.memory if after else ()), *torch.autograd.grad(output, inputs.tokens, inputs.cotangent)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    findings = [equal("a training step waits for nothing", True)]
    graph, results = capture(step)
    for number in (1, 2):
        others = make_inputs(workload, seed=seed + number, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            for x, y in zip(inputs, others, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.detach().clone() for x in results]
        same = all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
        findings.append(equal(f"replay {number} of outputs, tables and gradients", same))
    return Report(findings)


def decoded(workload: Workload, dtype: str, seed: int) -> Report:
    """Every token of a workload by one captured ``decode``, replayed, beside the eager backend token by token.

    Several rows stand at positions that differ (``staggered``).
    """
    cfg = workload.config
    tokens = [x.detach() for x in untied_inputs(workload, dtype, seed).tokens]
    state, tokens = staggered(cfg, draw_memory(workload, seed=seed), tokens, "eager")
    length, decoder = tokens[0].shape[1], Decoder(cfg, state, tokens)
    outputs = torch.cat([decoder(t).clone() for t in range(length)], dim=1)
    expected = []
    with torch.no_grad():
        for t in range(length):
            token: Any = [x[:, t : t + 1].float() for x in tokens]
            output, state, _ = be.apply(cfg, state, *token, inplace=True, implementation="eager")
            expected.append(output)
    received, wanted = (
        {"output": output, **state.memory._asdict(), **state.pending._asdict(), "position": state.position}
        for output, state in ((outputs, decoder.state), (torch.cat(expected, dim=1), state))
    )
    return Report(compared(received, wanted), [f"{length} tokens, {length // cfg.chunk_size} writes"])


def compiled(seed: int) -> Report:
    """The layer under ``torch.compile(fullgraph=True)``: outputs, tables and gradients as without it.

    Layer and input are drawn anew until no choice of slots hangs on a small gap.
    """
    cfg, batch, length = FwPKMConfig(key_dim=64, value_dim=64, num_subkeys=16, top_k=4, chunk_size=16), 2, 40
    for number in itertools.count(seed):
        torch.manual_seed(number)
        layer, x = be.FwPKM(64, cfg).to(DEVICE), torch.randn(batch, length, 64, device=DEVICE)
        with torch.no_grad():
            query = layer.query_proj(layer.query_norm(x)).cpu().numpy()
        memory = Memory(*(table.cpu().numpy() for table in layer.memory()))
        value = np.zeros((batch, length, cfg.value_dim))  # keys do not depend on values
        if agreement.comparable_tokens(cfg, memory, Tokens(query, value), gap=1e-4) == length:
            break
    fast = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
    return Report(compared(*(_through(module, layer, x) for module in (fast, layer))))


def _through(module: Any, layer: Any, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    y, state = module(x)
    (y.square().sum() + state.memory.values.square().sum()).backward()
    gradients = {f"grad {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **be.detach(state).memory._asdict(), **gradients}
