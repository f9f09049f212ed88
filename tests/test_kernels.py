"""The Triton kernels, in Triton's interpreter where there is no GPU, beside the eager torch backend."""

import subprocess
import sys

import pytest
import torch
from interpreter import DEVICE, SMALL, same_or_close
from refusing import WiderConfig, of_unknown_value

from fwpkm import FwPKMConfig, config, kernels
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.backends import torch as be
from fwpkm.containers import Memory
from fwpkm.kernels.runtime import windows
from fwpkm.kernels.runtime.shapes import shapes

CONFIGS = {
    "plain": {},
    "wait, one table": {"boundary": "wait", "lookahead": 2, "memory_scope": "batch", "num_heads": 2},
    "dot product, clipped": {"score": "dot_product", "num_heads": 3, "grad_clip": 0.02, "weight_decay": 0.1},
    "normalized": {"write_scale": "normalized", "temperature": 0.5, "lookahead": 0, "grad_clip": 0.02},
    "unit, every sub-key": {"write_scale": "unit", "top_k": 5, "addressing_weight": 3.0},
    "keys at rest": {"addressing_weight": 0.0, "num_subkeys": 24},
    "keys at rest, windows that overlap": {
        "addressing_weight": 0.0, "boundary": "wait", "lookahead": 2, "memory_scope": "batch", "num_heads": 3,
    },
    "keys that only decay": {"addressing_weight": 0.0, "weight_decay": 0.1, "grad_clip": 0.02, "boundary": "wait"},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")


def reading(cfg: FwPKMConfig, implementation: str, cuts: list[int], with_holes: bool) -> list[torch.Tensor]:
    """Everything that a sequence gives, read in pieces, and the gradients of all of it."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, cuts[-1], cfg.num_heads * cfg.key_dim), (2, cuts[-1], cfg.value_dim), (2, cuts[-1]))
    query, value, gate = (torch.rand(shape, generator=draw) for shape in shapes)
    query, value = query - 0.5, value - 0.5
    mask = torch.rand(2, cuts[-1], generator=draw) > 0.2 if with_holes else None
    if with_holes:
        query[0, 4, 1], value[1, 8, 0] = torch.inf, torch.nan
    inputs = [x.to(DEVICE).requires_grad_() for x in (query, value, gate)]
    tables = [x.to(DEVICE).requires_grad_() for x in be.init_memory(cfg, seed=1)]
    state = be.init_state(cfg, Memory(*tables), batch_size=2)
    outputs, weights, start = [], [], 0
    for stop in cuts:
        part = [x[:, start:stop] for x in inputs]
        masked = None if mask is None else mask[:, start:stop].to(DEVICE)
        output, state, trace = be.apply(cfg, state, *part, masked, implementation=implementation)
        outputs.append(output)
        weights.append(trace.weights)
        start = stop
    state, trace = be.flush(cfg, state, implementation=implementation)
    seen = be.lookup(cfg, state.memory, inputs[0], implementation=implementation)
    pair = (torch.rand(2, cuts[-1], generator=draw) > 0.3).to(DEVICE)
    memory, losses = be.chunk_update(cfg, state.memory, *inputs, pair=pair, implementation=implementation)
    chosen = seen.slots.double().masked_fill(seen.weights.isnan(), torch.nan)  # of the dead they mean nothing
    live = [torch.cat(outputs, 1), *state.memory, seen.output, seen.weights, *memory]
    cotangents = [torch.rand(x.shape, generator=draw).to(DEVICE) - 0.5 for x in live]
    total = sum((x.nan_to_num() * c.masked_fill(x.isnan(), 0)).sum() for x, c in zip(live, cotangents))
    gradients = torch.autograd.grad(total, [*inputs, *tables])
    records = [torch.cat(weights, 1), trace.memorization, trace.addressing, chosen, *losses]
    return [x.detach().double() for x in (*live, *records, *gradients)]


@pytest.mark.parametrize(
    ("name", "cuts", "with_holes"),
    [
        *((name, [10], False) for name in CONFIGS),
        *((name, [2, 9, 10], True) for name in (*list(CONFIGS)[1:3], *list(CONFIGS)[-3:])),
    ],
)
def test_kernels_give_what_eager_gives(name: str, cuts: list[int], with_holes: bool) -> None:
    cfg = FwPKMConfig(**SMALL | CONFIGS[name])
    expected = reading(cfg, "eager", cuts, with_holes)
    received = reading(cfg, "triton", cuts, with_holes)
    for a, b in zip(received, expected, strict=True):
        same_or_close(a, b)


def test_of_windows_that_are_addressed_at_once_one_has_no_pair() -> None:
    """Keys are at rest. A token alone in its chunk has none, so the chunk has no loss and counts no uses (§4)."""
    cfg = FwPKMConfig(**SMALL, addressing_weight=0.0, usage_weight=0.5)
    draw = torch.Generator().manual_seed(5)
    query, value = ((torch.rand(2, 12, 16, generator=draw) - 0.5).to(DEVICE) for _ in range(2))
    value[0, 5:8], value[1, 1:4] = torch.nan, torch.nan
    found = []
    for implementation in ("eager", "triton"):
        state = be.init_state(cfg, Memory(*(x.to(DEVICE) for x in be.init_memory(cfg))), batch_size=2)
        _, state, trace = be.apply(cfg, state, query, value, implementation=implementation)
        found.append([*state.memory, state.uses, trace.memorization, trace.addressing])
    for expected, received in zip(*found, strict=True):
        same_or_close(received, expected)
    assert (found[1][-1] == 0).tolist() == [[False, True, False], [True, False, False]]


def test_near_a_key_the_choice_is_that_of_differences() -> None:
    """Queries on keys far from the origin: the expanded form has no digit left of their distances."""
    cfg = FwPKMConfig(**SMALL | {"num_subkeys": 16})
    keys, values = be.init_memory(cfg)
    keys = keys * 1e-3 + 100
    query = keys[0, 0].reshape(2, 16, 8).transpose(0, 1).reshape(1, 16, 16)
    memory = Memory(keys.to(DEVICE), values.to(DEVICE))
    eager, triton = (be.lookup(cfg, memory, query.to(DEVICE), implementation=name) for name in ("eager", "triton"))
    assert torch.equal(eager.slots, triton.slots)
    assert torch.equal(triton.slots[0, :, 0].cpu(), torch.arange(16) * 17)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("score", ["idw", "dot_product"])
@pytest.mark.parametrize("number", [torch.nan, 3e38])
def test_a_score_that_is_no_number_kills_its_token(score: str, number: float) -> None:
    """It ranks above every number (§2); 3e38 in all of a sub-key makes infinite parts of both signs."""
    cfg = FwPKMConfig(**SMALL, score=score)
    memory = be.init_memory(cfg, seed=1)
    keys = memory.keys.clone()
    keys[0, 0, 0, 2, :] = torch.tensor([number, -number] * 4)
    draw = torch.Generator().manual_seed(3)
    query, value = (torch.randn(1, 8, 16, generator=draw) for _ in range(2))
    found = []
    for implementation in ("eager", "triton"):
        poisoned = Memory(keys.clone().to(DEVICE), memory.values.clone().to(DEVICE))
        output, _, _ = be.apply(cfg, poisoned, 3 * query.to(DEVICE), value.to(DEVICE), implementation=implementation)
        state = be.start_decoding(be.init_state(cfg, poisoned, batch_size=1))
        token = [x[:, :1].to(DEVICE) for x in (3 * query, value)]
        alone = be.decode(cfg, state, *token, implementation=implementation)
        found.append([output, alone])
    for expected, received in zip(*found, strict=True):
        assert torch.equal(received.isnan(), expected.isnan())
        same_or_close(received, expected)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", ["wait, one table", "dot product, clipped", "unit, every sub-key"])
def test_programs_of_a_step_take_turns(name: str, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three rows at positions of their own, whose writes are each due alone, and of more than one."""
    monkeypatch.setattr(
        windows.Call, "programs", lambda made, number, _: min(number, turns) if made.decided else number
    )
    cfg = FwPKMConfig(**SMALL | CONFIGS[name], learning_rate=0.5 + turns / 8)  # lists of launches are remembered
    draw = torch.Generator().manual_seed(0)
    query, value = (torch.rand(3, 24, n, generator=draw).to(DEVICE) - 0.5 for n in (16 * cfg.num_heads, 16))
    gate, mask = torch.rand(3, 24, generator=draw).to(DEVICE), torch.ones(3, 24, dtype=torch.bool, device=DEVICE)
    mask[1, :3] = mask[2, 5:7] = False
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, seed=1)))
    found = []
    for implementation in ("eager", "triton"):
        state = be.start_decoding(be.init_state(cfg, memory, batch_size=3))
        tokens = (tuple(x[:, t : t + 1] for x in (query, value, gate, mask)) for t in range(24))
        outputs = [be.decode(cfg, state, *token, implementation=implementation) for token in tokens]
        found.append([torch.cat(outputs, 1), *state.memory, *state.pending, state.position])
    assert found[0][-1].tolist() == [24, 21, 22] or cfg.memory_scope == "batch"
    for expected, received in zip(*found, strict=True):
        same_or_close(received, expected)


@pytest.mark.parametrize("num_subkeys", [8, 300])
def test_ties_go_to_the_lower_id(num_subkeys: int) -> None:
    """All sub-keys are as near: whatever is proposed, all must be ranked; 300 are proposed in two tiles."""
    cfg = FwPKMConfig(**SMALL | {"num_subkeys": num_subkeys})
    memory = be.init_memory(cfg)
    memory = Memory(torch.zeros_like(memory.keys).to(DEVICE), memory.values.to(DEVICE))
    query = torch.rand(1, 2, 16, device=DEVICE)
    assert be.lookup(cfg, memory, query, implementation="triton").slots.tolist() == [[[0, 1, 2]] * 2]


@pytest.mark.parametrize(("score", "top_k"), [("idw", 5), ("dot_product", 5), ("idw", 14)])
def test_sub_keys_in_two_tiles(score: str, top_k: int) -> None:
    """Of 14 choices the lists would be long, so other code takes them."""
    cfg = FwPKMConfig(**SMALL | {"num_subkeys": 300, "top_k": top_k, "score": score})
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, seed=2)))
    query = (torch.rand(1, 6, 16, generator=torch.Generator().manual_seed(0)) - 0.5).to(DEVICE)
    expected, received = (be.lookup(cfg, memory, query, implementation=name) for name in ("eager", "triton"))
    assert torch.equal(received.slots, expected.slots)
    same_or_close(received.weights, expected.weights)
    same_or_close(received.output, expected.output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_read_exactly(dtype: torch.dtype) -> None:
    """SPEC.md §6: tables as those of a float32 run on the rounded inputs, outputs rounded once."""
    cfg = FwPKMConfig(**SMALL)
    draw = torch.Generator().manual_seed(0)
    inputs = [(torch.rand(2, 9, *w, generator=draw) - 0.5).to(DEVICE, dtype) for w in ((16,), (16,), ())]
    state = be.init_state(cfg, Memory(*(x.to(DEVICE) for x in be.init_memory(cfg))), batch_size=2)
    received, narrow, _ = be.apply(cfg, state, *inputs, implementation="triton")
    expected, wide, _ = be.apply(cfg, state, *(x.float() for x in inputs), implementation="eager")
    assert received.dtype == dtype
    assert relative_error(received.float().cpu(), expected.cpu()) < BOUNDS[str(dtype).removeprefix("torch.")].forward
    for a, b in zip(narrow.memory, wide.memory):
        same_or_close(a, b)


@pytest.mark.parametrize(("centre", "distance"), [(100.0, 0.01), (1.0, 0.01)])
def test_near_keys_far_from_the_origin_the_step_keeps_its_digits(centre: float, distance: float) -> None:
    """Σ c (q - K) from differences: of Σ c q - K Σ c no digit would be left."""
    cfg = FwPKMConfig(**SMALL | {"num_subkeys": 6, "chunk_size": 8, "lookahead": 0})
    draw = torch.Generator().manual_seed(0)
    keys = centre + (torch.rand(1, 1, 2, 6, 8, generator=draw) - 0.5) * distance * 20
    values = be.init_memory(cfg).values
    at = keys[0, 0, :, torch.randint(6, (8,), generator=draw)].permute(1, 0, 2).reshape(1, 8, 16)
    query = at + (torch.rand(at.shape, generator=draw) - 0.5) * distance
    target = torch.rand(1, 8, 16, generator=draw)
    results = []
    for implementation, dtype in (("eager", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (query, keys, values)]
        memory, _ = be.chunk_update(
            cfg, Memory(*leaves[1:]), leaves[0], target.to(DEVICE, dtype), implementation=implementation
        )
        step = memory.keys - leaves[1].detach()
        cotangent = torch.linspace(-1, 1, step.numel(), device=DEVICE, dtype=dtype).view_as(step)
        results.append([step.detach(), *torch.autograd.grad((memory.keys * cotangent).sum(), leaves[:2])])
    for expected, received in zip(*results):
        errors = relative_error(received.cpu().numpy(), expected.cpu().numpy())
        assert errors < BOUNDS["float32"].gradient


def test_one_slot_for_all_tokens() -> None:
    """A crowded row: its entries are summed in order, and its sub-keys' maps are full."""
    cfg = FwPKMConfig(**SMALL | {"chunk_size": 40, "num_subkeys": 4, "top_k": 1})
    memory = be.init_memory(cfg)
    keys = memory.keys.clone()
    keys[:, :, :, 1:] += 100
    memory = Memory(keys.to(DEVICE), memory.values.to(DEVICE))
    draw = torch.Generator().manual_seed(0)
    inputs = [(torch.rand(1, 40, 16, generator=draw) - 0.5).to(DEVICE) for _ in range(2)]
    expected, received = (be.chunk_update(cfg, memory, *inputs, implementation=name) for name in ("eager", "triton"))
    for a, b in zip((*received[0], *received[1]), (*expected[0], *expected[1])):
        same_or_close(a, b)


def test_the_same_bits_twice() -> None:
    cfg = FwPKMConfig(**SMALL | {"num_heads": 2})
    first, second = (reading(cfg, "triton", [9], True) for _ in range(2))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second))


@pytest.mark.parametrize(
    ("fields", "dtype", "reason"),
    [
        ({"key_dim": 24}, torch.float32, "key_dim must be a multiple of 16"),
        ({"num_heads": 5}, torch.float32, "num_heads must be at most 4"),
        ({}, torch.float64, "query must be float32"),
    ],
)
def test_what_the_kernels_do_not_serve_says_why(fields: dict, dtype: torch.dtype, reason: str) -> None:
    cfg = FwPKMConfig(**SMALL | fields)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg)))
    query = torch.zeros(1, 2, cfg.num_heads * cfg.key_dim, dtype=dtype, device=DEVICE)
    assert reason in str(kernels.why_unsupported(cfg, memory, query))
    with pytest.raises(ValueError, match=reason):
        be.lookup(cfg, memory, query, implementation="triton")
    assert be.lookup(cfg, memory, query).output.shape == (1, 2, 16)


def test_more_memories_than_a_launch_has_rows_are_read_eagerly() -> None:
    """CUDA's grids have 65,535 rows at most, and a launch one for each codebook: 16,383 memories of two heads."""
    cfg = FwPKMConfig(**SMALL | {"num_heads": 2, "num_subkeys": 2, "top_k": 1})
    memory = Memory(*(x.to(DEVICE).expand(16384, *x.shape[1:]) for x in be.init_memory(cfg)))
    query = torch.zeros(16384, 1, 32, device=DEVICE)
    assert kernels.why_unsupported(cfg, Memory(*(x[:16383] for x in memory)), query[:16383]) is None
    with pytest.raises(ValueError, match=r"memories of 2 heads must be at most 16383 in a call\. Received: 16384"):
        be.lookup(cfg, memory, query, implementation="triton")
    assert be.lookup(cfg, memory, query).output.shape == (16384, 1, 16)


def test_a_field_that_the_kernels_do_not_know_is_refused() -> None:
    cfg, query = WiderConfig(**SMALL), torch.zeros(1, 2, 16, device=DEVICE)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg)))
    assert kernels.why_unsupported(cfg, memory, query) is None
    cfg = WiderConfig(**SMALL, forget=0.5)
    assert kernels.why_unsupported(cfg, memory, query) == "forget must be 0.0. Received: forget=0.5"
    with pytest.raises(ValueError, match=r"forget must be 0\.0"):
        be.lookup(cfg, memory, query, implementation="triton")


@pytest.mark.parametrize("field", config.CHOICES)
def test_a_choice_that_the_kernels_do_not_know_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, query = of_unknown_value(monkeypatch, field), torch.zeros(1, 2, 16, device=DEVICE)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg)))
    assert f"{field} must be one of" in str(kernels.why_unsupported(cfg, memory, query))
    with pytest.raises(ValueError, match=f"{field}='novel'"):
        be.lookup(cfg, memory, query, implementation="triton")


def test_tensors_on_the_cpu_are_the_reason() -> None:
    code = """
import torch
from fwpkm import FwPKMConfig, kernels
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.backends import torch as be
cfg = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=8)
print(kernels.why_unsupported(cfg, be.init_memory(cfg), torch.zeros(1, 2, 16)))
"""
    environment = {"PATH": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "CUDA device" in done.stdout, done.stderr


@pytest.mark.parametrize(("scope", "save"), [("batch", True), ("sequence", True), ("sequence", False)])
def test_rows_that_many_tokens_read(scope: str, save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four slots for 90 tokens of two sequences: rows with hundreds of entries, over several pieces, in two windows.

    And sub-keys with as many: of all sequences in pieces, of one in none.
    """
    cfg = FwPKMConfig(
        **SMALL | {"num_subkeys": 2, "top_k": 2, "chunk_size": 50, "memory_scope": scope, "write_scale": "unit"}
    )
    monkeypatch.setitem(shapes(cfg, torch.float32).key_sums, "WORDS", 1)
    draw = torch.Generator().manual_seed(3)
    inputs = [(torch.rand(2, 90, *w, generator=draw) - 0.5).to(DEVICE) for w in ((16,), (16,))]
    mask = (torch.rand(2, 90, generator=draw) > 0.2).to(DEVICE)
    cotangents = torch.rand(2, 90, 16, generator=draw).to(DEVICE) - 0.5
    found = []
    for implementation in ("eager", "triton"):
        leaves = [x.clone().requires_grad_(save) for x in inputs]
        tables = [x.to(DEVICE).requires_grad_(save) for x in be.init_memory(cfg, seed=1)]
        state = be.init_state(cfg, Memory(*tables), batch_size=2)
        output, state, _ = be.apply(cfg, state, *leaves, mask=mask, implementation=implementation)
        results = [output, *state.memory]
        if save:
            total = (output * cotangents).sum() + sum(x.square().sum() for x in state.memory)
            results += torch.autograd.grad(total, [*leaves, *tables])
        found.append(results)
    for expected, received in zip(*found, strict=True):
        same_or_close(received, expected)
