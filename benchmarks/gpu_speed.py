"""Times, memory and traffic of single workloads on a GPU that nothing else uses meanwhile.

Every function returns samples by name, in seconds or bytes. The traffic floor: every byte that must be read or
written, once. A kernel cannot be faster than these bytes at the speed of a plain copy. What is small beside them (keys,
slots, weights, losses) is left out, and so are second reads of what no cache could hold.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import DEVICE
from benchmarks.workloads import Decoder, Inputs, TorchSteps, Workload, capture, make_inputs, make_memory, staggered
from fwpkm import Memory, State
from fwpkm.backends import torch as be

STEPS = {"forward": "forward", "train": "forward + backward"}
SAMPLES = 20
_LONG, _FEW = 65536, 8
"""Calls of so many tokens are sampled less often."""
_EAGER_TOO = ("read-32k-512",)
"""Calls of more than 8 chunks that the eager backend, which takes tens of milliseconds for each, reads all the same."""
_CAPTURED_TOO = ("read-128k-512",)
"""Those that are replayed from a CUDA graph too: what the host's launches cost of their time."""
SETS = 3
"""Sets of inputs that are read in turn, so that none stays in the cache."""
_HEADS = 8
_FEWEST = 100
"""Tokens of the shortest of the rows that are ragged."""
SCORING_KERNELS = ("propose_kernel", "rank_kernel", "select_slots_kernel")
"""The Triton kernels that score."""
_TABLE_ITEM = 4  # bytes of a float32
Samples = dict[str, list[float]]


def speed(workload: Workload, dtype: str, samples: int = SAMPLES) -> Samples:
    """The kernels, and the eager backend where it does not take too long.

    Seconds of "forward" and "train"; of the same "captured", replayed from a CUDA graph, and "eager". Bytes: "extra:
    [eager] forward", the peak beyond inputs, outputs and tables, and "least: forward", the traffic floor.

    Raises:
        RuntimeError: an output is not finite.
    """
    sets, short = _inputs(workload, dtype), workload.chunks <= 8
    number = min(samples, _FEW) if workload.length >= _LONG else samples
    captured = DEVICE == "cuda" and (short or workload.name in _CAPTURED_TOO)
    steps, found = TorchSteps(workload, DEVICE, implementation="triton"), {}
    for step in STEPS:
        function = getattr(steps, step)
        function(sets[0])
        found[f"extra: {step}"] = _extra_bytes(function, sets[1])
        found[step] = sample(function, sets, number)
        if captured:  # what is left of the time where the host need not launch anything
            graph, results = capture(partial(function, sets[0]))
            graph.replay()
            found[f"captured {step}"] = [measure.device_timed(graph.replay)[0] for _ in range(number)]
            del graph, results
    # What the last forward read follows from tables that many calls have written, as in a long sequence.
    (output,) = steps.forward(sets[2])
    if not output.isfinite().all():
        raise RuntimeError(f"outputs are not finite after many calls at {workload}")
    least = traffic_floor(workload, steps.slots, sets[0].query.element_size())
    del steps, function
    measure.free_device_memory()
    if short or workload.name in _EAGER_TOO:
        slow = TorchSteps(workload, DEVICE, implementation="eager")
        for step in STEPS:
            function = getattr(slow, step)
            if short:
                function(sets[0])
            found[f"extra: eager {step}"] = _extra_bytes(function, sets[1])
            found[f"eager {step}"] = sample(function, sets, min(samples, 5) if short else 1)
    return found | {f"least: {step}": [size] for step, size in least.items()}


def traffic_floor(workload: Workload, slots: Tensor, item: int) -> dict[str, int]:
    """The least bytes of a call whose state began at a chunk's first token, under boundary="drop", by step.

    Forward: queries, values and gates are read and outputs written; each chunk reads the rows that it touches, and
    writes them if it is complete.
    With backward: the forward also saves each touched row as it was before its write, and the backward reads it; the
    gradient of each such row is written once and read once; queries, values, gates and the outputs' gradients are
    read, the inputs' gradients written.

    Args:
        workload: the shapes.
        slots: ``[B, T, H*k]`` what was read (``trace.slots``).
        item: bytes of a number of the inputs and outputs.
    """
    cfg, tokens = workload.config, workload.batch * workload.length
    inputs = tokens * item * (cfg.num_heads * cfg.key_dim + cfg.value_dim + 1)
    outputs = tokens * item * cfg.value_dim
    read, written = (rows * _TABLE_ITEM * cfg.value_dim for rows in touched_rows(workload, slots))
    forward = inputs + outputs + read + written
    backward = inputs + outputs + inputs + read + 2 * read
    return {"forward": forward, "train": forward + read + backward}


def touched_rows(workload: Workload, slots: Tensor) -> tuple[int, int]:
    """Distinct table rows of each chunk, summed over the chunks: all of them, and those of complete chunks."""
    size = workload.config.chunk_size
    chunks = [(x.unique().numel(), x.shape[1] == size) for x in workload.rows(slots).split(size, dim=1)]
    return sum(rows for rows, _ in chunks), sum(rows for rows, complete in chunks if complete)


def attention(batch: int, length: int, width: int, dtype: str) -> Samples:
    """Causal attention of 8 heads, by step."""
    shape = (batch, _HEADS, length, width // _HEADS)
    drawn = [torch.randn(4, *shape, device=DEVICE).to(getattr(torch, dtype)) for _ in range(SETS)]
    sets: list[Any] = [(*(x.clone().requires_grad_() for x in parts[:3]), parts[3]) for parts in drawn]
    number = _FEW if length >= _LONG else SAMPLES

    def forward(inputs: Any) -> Any:
        return F.scaled_dot_product_attention(*inputs[:3], is_causal=True)

    def train(inputs: Any) -> Any:
        output = forward(inputs)
        return output, torch.autograd.grad(output, inputs[:3], inputs[3])

    functions = {"forward": torch.no_grad()(forward), "train": train}
    return {step: sample(function, sets, number, warm_up=True) for step, function in functions.items()}


def initial_state(workload: Workload, dtype: str) -> Samples:
    """The copies of one initial memory that a call without a state begins with; for inputs of any dtype."""
    one = make_memory(workload, device=DEVICE)
    one = type(one)(*(table[:1].clone() for table in one))
    measure.free_device_memory()
    return {"copy": sample(lambda _: be.init_state(workload.config, one, workload.batch), [None], SAMPLES, True)}


def bandwidth(size: int = 2**32) -> Samples:
    """Bytes a second, read and written ones, of a large copy."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    _, *seconds = (measure.device_timed(target.copy_, source)[0] for _ in range(11))
    return {"copy": [2 * size / statistics.median(seconds)]}


def kernels(workload: Workload, dtype: str, calls: int = 5) -> Samples:
    """Device seconds a call from the profiler, by step in all and, as "forward: name", by kernel."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    sets, steps, found = _inputs(workload, dtype), TorchSteps(workload, DEVICE, implementation="triton"), {}
    for step in STEPS:
        function = getattr(steps, step)
        for inputs in sets:
            function(inputs)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for number in range(calls):
                function(sets[number % len(sets)])
            torch.cuda.synchronize()
        rows = [row for row in profiler.key_averages() if row.device_type == DeviceType.CUDA]
        found |= by_kernel(step, {row.key: row.self_device_time_total / 1e6 / calls for row in rows})
    return found


def by_kernel(step: str, seconds: dict[str, float]) -> Samples:
    """A step's kernels, their sum, and the sum without those that score."""
    rest = sum(x for name, x in seconds.items() if not any(score in name for score in SCORING_KERNELS))
    named = {"all but scoring": rest, **seconds}
    return {step: [sum(seconds.values())]} | {f"{step}: {name}": [x] for name, x in named.items() if x}


def decoding(workload: Workload, dtype: str) -> Samples:
    """Seconds a token at B sequences, averaged over whole chunks with their writes.

    "graph": a captured ``decode``, replayed after a copy of the next token into its buffers. "graph, one token":
    replayed alone, so that all tokens are the same. "triton" and "eager": ``apply`` of one token, without a graph; of
    one sequence. Several stand at positions that differ, over the whole of a chunk.
    """
    cfg, chunk = workload.config, workload.config.chunk_size
    stream = Workload("stream", cfg, workload.batch, 2 * chunk)
    tokens = [x.detach() for x in make_inputs(stream, seed=1, device=DEVICE, dtype=dtype).tokens]
    decoder = Decoder(cfg, *staggered(cfg, make_memory(workload, device=DEVICE), tokens, "triton"))

    def per_token(run: Callable[[int], Any], number: int, samples: int = 5) -> list[float]:
        run(number)
        return [measure.device_timed(run, number)[0] / number for _ in range(samples)]

    found = {
        "graph": per_token(lambda number: [decoder(t) for t in range(number)], 2 * chunk),
        "graph, one token": per_token(lambda number: [decoder.step() for _ in range(number)], 2 * chunk),
    }
    for implementation in ("triton", "eager") if workload.batch == 1 else ():
        steps = TorchSteps(workload, DEVICE, implementation=implementation)
        found[implementation] = per_token(partial(steps.by_token, tokens), chunk, samples=1)
    return found


def _inputs(workload: Workload, dtype: str) -> list[Inputs]:
    return [make_inputs(workload, seed=seed, device=DEVICE, dtype=dtype) for seed in range(1, SETS + 1)]


def sample(function: Callable[[Any], Any], sets: Sequence[Any], number: int, warm_up: bool = False) -> list[float]:
    """Seconds of single calls, each of the next of the sets; ``warm_up`` calls before, one of each."""
    for inputs in sets if warm_up else ():
        function(inputs)
    return [measure.device_timed(function, sets[i % len(sets)])[0] for i in range(number)]


def _extra_bytes(function: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs) -> list[float]:
    """The peak of memory beyond what was there before, and beyond what is returned; nothing without a CUDA device."""
    if not torch.cuda.is_available():
        return []
    measure.free_device_memory()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = function(inputs)
    torch.cuda.synchronize()
    return [torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in returned)]


# --- Rows that are not alike ---


def masked(workload: Workload, dtype: str, samples: int = SAMPLES) -> Samples:
    """Seconds of "full" rows, and of half as many tokens more, a third of which is "masked" at random, by step."""
    longer = dataclasses.replace(workload, length=workload.length * 3 // 2)
    mask = torch.rand(longer.batch, longer.length, device=DEVICE) >= 1 / 3
    full, masked = (make_inputs(x, seed=1, device=DEVICE, dtype=dtype) for x in (workload, longer))
    return _in_turn(workload, {"full": (full, {}), "masked": (masked, {"mask": mask})}, samples)


def ragged(workload: Workload, dtype: str, batch: int, samples: int = SAMPLES) -> Samples:
    """Seconds of ``batch`` rows of 100 tokens up to all, "masked" and "packed", and of "full" rows, by step.

    Each row has a table of its own, as packed ones need.
    """
    own = dataclasses.replace(workload.config, memory_scope="sequence")
    workload = dataclasses.replace(workload, config=own, batch=batch)
    fewest = min(_FEWEST, workload.length)
    lengths = torch.linspace(fewest, workload.length, batch, device=DEVICE).long()
    mask = torch.arange(workload.length, device=DEVICE) < lengths[:, None]
    inputs = make_inputs(workload, seed=1, device=DEVICE, dtype=dtype)
    packed = Inputs(*(x.detach()[mask][None].requires_grad_(x.requires_grad) for x in inputs))
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().cpu()
    calls = {"full": (inputs, {}), "masked": (inputs, {"mask": mask}), "packed": (packed, {"cu_seqlens": ends})}
    return _in_turn(workload, calls, samples)


def stateless(workload: Workload, dtype: str, sequences: int, samples: int = SAMPLES) -> Samples:
    """Seconds of calls from a memory without a state, by step, beside "in place", rows that rewrite their own tables.

    "rows" are the same rows. Of ``sequences`` packed ones of as many tokens in all, "even" ones have nearly one length,
    "uneven" ones 100 tokens up, and "drawn" ones up to T (``drawn_lengths``). Bytes: "extra: even train" and so on, the
    peak beyond inputs and outputs.
    """
    rows = make_inputs(workload, seed=1, device=DEVICE, dtype=dtype)
    packed = Inputs(*(x.detach().flatten(0, 1)[None].requires_grad_(x.requires_grad) for x in rows))
    tokens = workload.batch * workload.length
    calls: dict[str, tuple[Inputs, dict[str, Tensor]]] = {"in place": (rows, {}), "rows": (rows, {})}
    few, mean = min(_FEWEST, tokens // sequences), tokens // sequences
    lengths = {
        "even": torch.linspace(mean, mean + 1, sequences),
        "uneven": torch.linspace(few, 2 * mean - few, sequences),
        "drawn": drawn_lengths(tokens, sequences, workload.length),
    }
    calls |= {name: (packed, {"cu_seqlens": _ends(tokens, x)}) for name, x in lengths.items()}
    memory = make_memory(workload, device=DEVICE)
    memory = Memory(*(table[:1].clone() for table in memory))
    measure.free_device_memory()
    found = _in_turn(workload, calls, samples, {name: memory for name in calls if name != "in place"})
    steps = TorchSteps(dataclasses.replace(workload, batch=1), DEVICE)
    steps.state = None  # or the first call would free it while its memory is measured
    for name, step in itertools.product(calls, STEPS):
        if name != "in place":
            inputs, options = calls[name]
            run = partial(_run, steps, memory, step, inputs, options)
            found[f"extra: {name} {step}"] = _extra_bytes(lambda _, run=run: run(), inputs)
    return found


def drawn_lengths(tokens: int, sequences: int, most: int) -> Tensor:
    """Lengths that differ as those of documents do, drawn with seed 0: exponentials, of ``most`` tokens at most."""
    lengths = torch.empty(sequences, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    for _ in range(sequences):  # what is cut off one goes to all, until none is too long
        lengths = (lengths * tokens / lengths.sum()).clamp(max=most)
    return lengths


def _ends(tokens: int, lengths: Tensor) -> Tensor:
    """``cu_seqlens`` of sequences whose lengths are as these, that have all tokens."""
    ends = lengths.double().cumsum(0)
    ends = (ends * tokens / ends[-1]).round()
    return torch.cat([ends.new_zeros(1), ends]).int()


def _run(
    steps: TorchSteps, start: State | Memory, step: str, inputs: Inputs, options: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """What a step returns that begins from a state, which it rewrites, or from a memory."""
    steps.state = start if isinstance(start, Memory) else be.detach(start)
    steps.options = {"implementation": "triton", **options}
    return getattr(steps, step)(inputs)


def _in_turn(
    workload: Workload,
    calls: dict[str, tuple[Inputs, dict[str, Tensor]]],
    samples: int,
    memories: Mapping[str, Memory] = MappingProxyType({}),
) -> Samples:
    """Samples of every call by turns, from one state at position 0 whose tables each rewrites, or from a memory."""
    steps = TorchSteps(workload, DEVICE)
    start = steps.state

    def run(step: str, begin: State | Memory, inputs: Inputs, options: dict[str, Tensor]) -> None:
        _run(steps, begin, step, inputs, options)

    contestants = {
        name: lambda _, name=name: {step: partial(run, step, memories.get(name, start), *calls[name]) for step in STEPS}
        for name in calls
    }
    timed = measure.interleaved({"": contestants}, samples, warm_up=2, timer=measure.device_timed)
    return {f"{name} {step}": found for (_, name, step), found in timed.items()}
