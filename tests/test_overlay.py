"""Calls from a Memory without a state: the kernels lay what rows write over its one table (SPEC.md §5)."""

import itertools

import numpy as np
import pytest
import torch
from interpreter import DEVICE, SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fwpkm import FwPKMConfig
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.backends import torch as be
from fwpkm.backends.torch import engine, fast, ragged
from fwpkm.containers import Memory
from fwpkm.kernels.runtime import windows

CONFIGS = {
    "plain": {},
    "wait, two heads": {"boundary": "wait", "lookahead": 2, "num_heads": 2, "num_subkeys": 3, "top_k": 2},
    "clipped, decaying": {"grad_clip": 0.02, "weight_decay": 0.1, "lookahead": 0, "write_scale": "unit"},
    "weighed by use": {"usage_weight": 0.5, "weight_decay": 0.1, "write_scale": "normalized"},
    "keys at rest": {"addressing_weight": 0.0, "usage_weight": 0.5, "boundary": "wait", "lookahead": 2},
    "one memory": {"memory_scope": "batch"},
}
PACKED = [11, 3, 0, 8, 4]
"""Longer than a chunk, shorter, without a token, two chunks, and one."""
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")


def drawn(cfg: FwPKMConfig, lengths: list[int], packed: bool, dtype: torch.dtype) -> tuple[list[Tensor], dict]:
    """Query, value and gate of rows, one of them not finite at a place; and how they lie."""
    draw = torch.Generator().manual_seed(0)
    rows, length = (1, sum(lengths) + 2) if packed else (len(lengths), max(lengths))
    shapes = ((rows, length, cfg.num_heads * cfg.key_dim), (rows, length, cfg.value_dim), (rows, length))
    query, value, gate = (torch.rand(shape, generator=draw) for shape in shapes)
    query, value = query - 0.5, value - 0.5
    query[0, 5, 1] = torch.inf
    mask = torch.rand(rows, length, generator=draw) > 0.15
    options = {"mask": mask.to(DEVICE)}
    if packed:
        ends = itertools.accumulate(lengths, initial=0)
        options["cu_seqlens"] = torch.tensor([*ends], dtype=torch.int32)
    return [x.to(DEVICE, dtype) for x in (query, value, gate)], options


def reading(
    cfg: FwPKMConfig, implementation: str, lengths: list[int], packed: bool, learned: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """What a call without a state gives, and the gradients of its output; of the tables, if they are ``learned``."""
    inputs, options = drawn(cfg, lengths, packed, dtype)
    leaves = [x.requires_grad_() for x in inputs]
    memory = Memory(*(x.to(DEVICE, dtype).requires_grad_(learned) for x in be.init_memory(cfg, seed=1)))
    output, state, trace = be.apply(cfg, memory, *leaves, **options, implementation=implementation)
    assert state is None
    cotangent = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=dtype).view_as(output)
    total = (output.nan_to_num() * cotangent.masked_fill(output.isnan(), 0)).sum()
    asked = [*leaves, *memory] if learned else leaves
    gradients = torch.autograd.grad(total, asked, allow_unused=True, materialize_grads=True)  # of what is not written
    return [output, *trace._replace(slots=trace.slots.masked_fill(trace.weights.isnan(), 0))], [*gradients]


def error(received: Tensor, expected: Tensor) -> float:
    return relative_error(*(x.detach().double().cpu().numpy() for x in (received, expected)))


@pytest.mark.parametrize(
    ("name", "lengths", "packed", "learned"),
    [
        *((name, PACKED, True, name != "plain") for name in list(CONFIGS)[:-1]),
        ("plain", [10, 10], False, True),
        ("keys at rest", [13, 13], False, True),
        ("one memory", [10, 10], False, True),
        ("plain", [3, 2], True, True),  # nothing is written
    ],
)
def test_the_kernels_give_what_eager_gives_in_float64(
    name: str, lengths: list[int], packed: bool, learned: bool
) -> None:
    cfg = FwPKMConfig(**SMALL | CONFIGS[name])
    given = lengths, packed, learned
    expected, derived = reading(cfg, "eager", *given, torch.float64)
    received, gradients = reading(cfg, "triton", *given)
    for a, b in zip(received, expected, strict=True):
        assert error(a, b) < BOUNDS["float32"].forward
    for a, b in zip(gradients, derived, strict=True):
        assert error(a, b) < BOUNDS["float32"].gradient
    output, again = reading(cfg, "triton", *given)
    for a, b in zip((*received, *gradients), (*output, *again), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_many_tokens_of_many_sequences_on_four_slots() -> None:
    """Rows with hundreds of entries in a window, which every memory reads in every window."""
    cfg = FwPKMConfig(**SMALL | {"num_subkeys": 2, "top_k": 2, "chunk_size": 20})
    given = [50, 30, 41], True, True
    expected, received = reading(cfg, "eager", *given, torch.float64), reading(cfg, "triton", *given)
    for a, b in zip(itertools.chain(*received), itertools.chain(*expected), strict=True):
        assert error(a, b) < BOUNDS["float32"].forward


def test_the_same_bits_as_with_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "lays_over", lambda *_: True)
    cfg = FwPKMConfig(**SMALL | {"weight_decay": 0.1})
    inputs, options = drawn(cfg, PACKED, True, torch.float32)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, seed=1)))
    of_state, _, _ = be.apply(cfg, be.init_state(cfg, memory, len(PACKED)), *inputs, **options, implementation="triton")
    of_memory, _, _ = be.apply(cfg, memory, *inputs, **options, implementation="triton")
    assert torch.equal(of_memory.nan_to_num(), of_state.nan_to_num())


class Allocations(TorchDispatchMode):
    """Notes the most bytes of any tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("learned", [False, True])
def test_no_table_is_copied(learned: bool) -> None:
    """Of 24 sequences and one table of 64 KiB all that is made at once is smaller than two tables."""
    cfg = FwPKMConfig(**SMALL | {"num_subkeys": 32, "chunk_size": 2, "lookahead": 0, "key_dim": 16})
    lengths = [3] * 24
    table = 4 * cfg.num_slots * cfg.value_dim
    with Allocations() as made:
        reading(cfg, "eager", lengths, True, learned)
    assert made.largest >= len(lengths) * table
    with Allocations() as made:
        reading(cfg, "triton", lengths, True, learned)
    assert made.largest < 2 * len(lengths) * table // 3


def test_without_a_gradient_the_table_is_copied_where_that_takes_less() -> None:
    """Of 160 tokens 39 chunks of four write 468 rows: more than a table of 25, and less than one of 1024."""
    for num_subkeys, overlaid in ((5, False), (32, True)):
        cfg = FwPKMConfig(**SMALL | {"num_subkeys": num_subkeys})
        inputs, _ = drawn(cfg, [160], False, torch.float32)
        memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, seed=1)))
        plan = windows.plan(cfg, 0, 160, 1, True)
        assert fast.lays_over(cfg, plan, 1, memory.values, False) is overlaid
        assert fast.lays_over(cfg, plan, 1, memory.values, True)
        expected, received = (be.apply(cfg, memory, *inputs, implementation=x)[0] for x in ("eager", "triton"))
        assert error(received, expected) < BOUNDS["float32"].forward


def test_tables_of_inference_mode_are_read_with_gradients() -> None:
    cfg = FwPKMConfig(**SMALL)
    inputs, _ = drawn(cfg, [6, 6], False, torch.float32)
    with torch.inference_mode():
        memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg)))
    found = []
    for implementation in ("eager", "triton"):
        query = inputs[0].clone().requires_grad_()
        output, _, _ = be.apply(cfg, memory, query, *inputs[1:], implementation=implementation)
        found.append(torch.autograd.grad(output.nansum(), query)[0])
    assert error(*found) < BOUNDS["float32"].gradient


def test_a_table_that_is_overwritten_before_the_backward_is_an_error() -> None:
    cfg = FwPKMConfig(**SMALL)
    inputs, options = drawn(cfg, [6, 6], False, torch.float32)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg)))
    output, _, _ = be.apply(cfg, memory, inputs[0].requires_grad_(), *inputs[1:], **options, implementation="triton")
    memory.values.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.nansum().backward()


@pytest.mark.parametrize("kept", [False, True], ids=["from a memory", "from a state"])
@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
def test_no_gradient_passes_through_the_trace(packed: bool, kept: bool) -> None:
    cfg = FwPKMConfig(**SMALL)
    (query, value, gate), options = drawn(cfg, PACKED, packed, torch.float32)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, seed=1)))
    start = be.init_state(cfg, memory, len(PACKED)) if kept else memory
    for implementation in ("triton", "eager"):
        tokens = query.requires_grad_(), value, gate
        output, _, trace = be.apply(cfg, start, *tokens, **options, implementation=implementation)
        assert output.requires_grad
        assert not any(x.requires_grad for x in trace)


def test_packed_calls_do_not_follow_the_default_device() -> None:
    cfg = FwPKMConfig(**SMALL)
    inputs, options = drawn(cfg, PACKED, True, torch.float32)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, seed=1)))
    expected, *_ = be.apply(cfg, memory, *inputs, **options, implementation="triton")
    with torch.device("meta"):
        output, *_ = be.apply(cfg, memory, *inputs, **options, implementation="triton")
    assert torch.equal(output.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",
)
@pytest.mark.parametrize("compiled", [False, True], ids=["called", "compiled"])
def test_a_layer_that_returns_no_state(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, choose = FwPKMConfig(**SMALL), engine.choose_engine
    found = []
    for implementation in ("eager", "triton"):
        monkeypatch.setattr(engine, "choose_engine", lambda _, *rest, forced=implementation: choose(forced, *rest))
        torch.manual_seed(0)
        layer = be.FwPKM(8, cfg, learn_memory=True).to(DEVICE)
        call = layer
        if compiled and implementation == "triton":
            call = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 9, 8, device=DEVICE).requires_grad_()
        y, state = call(x, return_state=False)
        assert state is None
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for expected, received in zip(*found, strict=True):
        assert error(received, expected) < BOUNDS["float32"].gradient


@pytest.mark.parametrize(
    ("lengths", "batches", "tokens"),
    [
        ([1600] * 20, [20, 20, 20, 20], 20 * 1600),
        ([32768], [1] * 64, 32768),
        ([500, 9000, 30, 0, 9100, 512], [5, *[2] * 17], 5 * 512 + 2 * (16 * 512 + 448)),
        ([1300, 1024, 1500], [3, 3, 2], 2 * 3 * 512 + 2 * 511),  # 476 are rounded up to a chunk less one
        ([2000] + [3] * 1000, [7, 1, 1, 1], 7 * 512 + 2 * 512 + 511),  # others share six rows of 511
        ([3, 500, 400], [1], 912),  # nothing is written: one row, of a length that more calls have
    ],
)
def test_each_window_is_read_by_the_first_so_many(lengths: list[int], batches: list[int], tokens: int) -> None:
    found = ragged.rows_of(FwPKMConfig(chunk_size=512), [*itertools.accumulate(lengths, initial=0)], True)
    assert [w.batch for w in found.plan.windows] == batches
    assert found.plan.total == tokens
    assert sorted(found.writers + found.others) == [*range(len(lengths))]
    assert found.ends[-1] == sum(lengths)


UNLIKE = [1, 2, 17, 0, 5, 1, 1]
"""One long sequence between short ones: more padding than the kernels take in one rectangle."""


def agrees(name: str, lengths: list[int]) -> bool:
    cfg = FwPKMConfig(**SMALL | CONFIGS[name])
    expected, received = (
        reading(cfg, "eager", lengths, True, True, torch.float64),
        reading(cfg, "triton", lengths, True, True),
    )
    pairs = [*zip(itertools.chain(*received), itertools.chain(*expected), strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return all(error(a, b) < BOUNDS["float32"].forward for a, b in pairs)


@pytest.mark.parametrize("seed", range(6))
def test_sequences_of_any_lengths_are_read_as_if_alone(seed: int) -> None:
    """Drawn ones: up to four windows, of several sequences or one; many have no chunk, or none but whole ones."""
    draw = np.random.default_rng(seed)
    lengths = draw.choice([0, 1, 3, 4, 5, 6, 8, 9, 12, 14], draw.integers(3, 7)).tolist()
    assert agrees([*CONFIGS][seed % 5], [6, *lengths])


def test_one_long_sequence_between_short_ones() -> None:
    assert agrees("plain", UNLIKE)


def test_a_window_that_a_sequence_misses_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = windows.ragged
    assert agrees("plain", [12, 12, 1])
    monkeypatch.setattr(windows, "ragged", lambda cfg, length, batches: real(cfg, length, (3, 2, batches[2] - 1)))
    assert not agrees("plain", [12, 12, 1])


def test_reading_alone_pads_nothing() -> None:
    """Of sequences that a rectangle would pad beyond what the kernels take."""
    cfg = FwPKMConfig(**SMALL)
    inputs, options = drawn(cfg, UNLIKE, True, torch.float32)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, seed=1)))
    found = []
    for implementation in ("eager", "triton"):
        output, _, trace = be.apply(cfg, memory, *inputs, **options, update=False, implementation=implementation)
        found.append((output, *trace._replace(slots=trace.slots.masked_fill(trace.weights.isnan(), 0))))
    for expected, received in zip(*found, strict=True):
        assert received.shape == expected.shape
        assert error(received, expected) < BOUNDS["float32"].forward


def test_a_sequence_without_a_token_stands_behind_the_others() -> None:
    cfg = FwPKMConfig(**SMALL)
    inputs = [x[:, :9] for x in drawn(cfg, [9], False, torch.float32)[0]]
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg)))
    ends = torch.tensor([0, 9, 9], dtype=torch.int32)
    found = [be.apply(cfg, memory, *inputs, cu_seqlens=ends, implementation=x) for x in ("eager", "triton")]
    (expected, _, told), (received, _, trace) = found
    assert error(received, expected) < BOUNDS["float32"].forward
    assert trace.writes.tolist() == told.writes.tolist()
