"""Sub-keys used lately score less (docs/retention.md): State.uses holds V; torch and the kernels."""

import pytest
import torch
from interpreter import DEVICE, SMALL, same_or_close
from plain_rule import drawn, summed, worst

import fwpkm
from fwpkm import FwPKMConfig, Memory
from fwpkm.backends.torch import FwPKM

TORCH = fwpkm.get_backend("torch")
FIELDS = [
    {},
    {"boundary": "wait", "lookahead": 2, "weight_decay": 0.05},
    {"num_heads": 2, "grad_clip": 0.02},
    {"addressing_weight": 0.0},
]


def config(**fields):
    return FwPKMConfig(**SMALL | {"recent_penalty": 0.5} | fields)


@pytest.mark.parametrize("fields", FIELDS)
def test_eager_is_the_rule(fields):
    forward, backward = worst(config(**fields), [2, 9, 10], "eager", torch.float64, False)
    assert forward < 1e-10
    assert backward < 1e-9


@pytest.mark.parametrize("fields", FIELDS)
def test_kernels_are_the_rule(fields):
    forward, backward = worst(config(**fields), [2, 9, 10], "triton", torch.float32, False)
    assert forward < 1e-5
    assert backward < 1e-4


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_it_is_the_plain_rule_at_zero(implementation):
    results = []
    for penalty in (0.0, 1e-30):
        cfg = config(recent_penalty=penalty)
        (*tokens, _), memory = drawn(cfg, torch.float32)
        output, state, _ = TORCH.apply(
            cfg, TORCH.init_state(cfg, Memory(*memory), 2), *tokens, implementation=implementation
        )
        live = [output, *state.memory]
        results.append([*live, *torch.autograd.grad(summed(live), [*tokens, *memory])])
    for plain, zero in zip(*results, strict=True):
        same_or_close(zero, plain)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_backward_knows_v_of_before_it_was_overwritten(implementation):
    """A call in place, of a state whose V counts, as a training that goes on."""
    cfg, results = config(), []
    for inplace in (False, True):
        (*tokens, _), memory = drawn(cfg, torch.float32)
        memory = Memory(*(x.detach() for x in memory))
        state = TORCH.init_state(cfg, memory, 2)
        uses = 5 * torch.rand(state.uses.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        state = state._replace(uses=uses)
        options = {"inplace": inplace, "implementation": implementation}
        output, after, _ = TORCH.apply(cfg, state, *(x[:, :8] for x in tokens), **options)
        assert (after.uses.data_ptr() == uses.data_ptr()) == (inplace and implementation == "triton")
        live = [output, *after.memory]
        results.append([*live, after.uses, *torch.autograd.grad(summed(live), tokens)])
    for wanted, found in zip(*results, strict=True):
        same_or_close(found, wanted)


def test_a_penalty_that_outweighs_all_makes_tokens_choose_others():
    """What the first chunk chose, the second does not."""
    cfg = config(recent_penalty=50.0, num_subkeys=8, top_k=2, chunk_size=2)
    (*tokens, _), memory = drawn(cfg, torch.float32, 1, 4)
    query = tokens[0].detach()[:, :1].expand(1, 4, 16)
    for implementation in ("eager", "triton"):
        state = TORCH.init_state(cfg, Memory(*(x.detach() for x in memory)), 1)
        _, state, trace = TORCH.apply(cfg, state, query, tokens[1].detach(), implementation=implementation)
        first, second = (trace.slots[0, t] for t in (0, 2))
        assert not set((first // 8).tolist()) & set((second // 8).tolist())
        assert not set((first % 8).tolist()) & set((second % 8).tolist())
        recent = state.uses.view(2, 8)
        assert recent.sum(1).tolist() == [4 / 4 + 4 / 2] * 2


@pytest.mark.parametrize("fields", [{"usage_weight": 0.7}, {"memory_scope": "batch"}, {"initial_decay": 0.1}])
def test_beside_other_rules_kernels_give_what_eager_gives(fields):
    cfg, results = config(**fields), []
    for implementation in ("eager", "triton"):
        (*tokens, _), memory = drawn(cfg, torch.float32)
        memory = [x[:1] for x in memory]
        options = {"implementation": implementation, "initial_values": memory[1].detach()}
        mask = torch.rand(2, 10, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.2
        state, outputs = TORCH.init_state(cfg, Memory(*memory), 2), []
        for part in (slice(0, 3), slice(3, 10)):
            output, state, _ = TORCH.apply(cfg, state, *(x[:, part] for x in tokens), mask[:, part], **options)
            outputs.append(output)
        frozen, still, _ = TORCH.apply(cfg, state, *(x[:, :3] for x in tokens), update=False, **options)
        assert still.uses is state.uses
        state, _ = TORCH.flush(cfg, state, **options)
        live = [torch.cat(outputs, 1), frozen, *state.memory]
        results.append([*live, state.uses, *torch.autograd.grad(summed(live), [*tokens, *memory])])
    for wanted, found in zip(*results, strict=True):
        same_or_close(found, wanted)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_call_without_a_state_begins_with_nothing_recent(implementation):
    cfg = config()
    (*tokens, _), memory = drawn(cfg, torch.float32)
    memory = Memory(*(x.detach()[:1] for x in memory))
    wanted, _, _ = TORCH.apply(cfg, TORCH.init_state(cfg, memory, 2), *tokens, implementation=implementation)
    found, _, _ = TORCH.apply(cfg, memory, *tokens, implementation=implementation)
    same_or_close(found, wanted)


def test_proposals_that_are_unsure_are_ranked_in_full():
    """Many sub-keys in two tiles, near each other, and penalties that differ a hundredfold."""
    cfg = FwPKMConfig(16, 16, 1, 300, 4, 8, recent_penalty=0.8)
    draw = torch.Generator().manual_seed(0)
    memory = Memory(*(x.to(DEVICE) for x in TORCH.init_memory(cfg, seed=3)))
    state = TORCH.init_state(cfg, memory, 1)
    uses = torch.rand(state.uses.shape, generator=draw).pow(8) * 300
    state = state._replace(uses=uses.to(DEVICE))
    query = 3 * torch.randn(1, 64, 16, generator=draw).to(DEVICE)
    value = torch.randn(1, 64, 16, generator=draw).to(DEVICE)
    traces = [
        TORCH.apply(cfg, state, query, value, update=False, implementation=implementation)[2]
        for implementation in ("eager", "triton")
    ]
    assert torch.equal(traces[0].slots, traces[1].slots)
    same_or_close(traces[1].weights, traces[0].weights)
    plain = FwPKMConfig(16, 16, 1, 300, 4, 8)
    _, _, other = TORCH.apply(plain, TORCH.init_state(plain, memory, 1), query, value, update=False)
    assert (other.slots != traces[0].slots).float().mean() > 0.2


def test_what_does_not_know_it_refuses_it(tmp_path):
    cfg = config()
    (*tokens, _), memory = drawn(cfg, torch.float32)
    memory, tokens = Memory(*(x.detach() for x in memory)), [x.detach() for x in tokens]
    state = TORCH.init_state(cfg, memory, 2)
    for call in (
        lambda: TORCH.lookup(cfg, memory, tokens[0]),
        lambda: TORCH.chunk_update(cfg, memory, *tokens[:2]),
        lambda: TORCH.decode(cfg, TORCH.start_decoding(state), *(x[:, :1] for x in tokens)),
    ):
        with pytest.raises(ValueError, match="recent_penalty must be 0 here"):
            call()
    with pytest.raises(ValueError, match="recent_penalty must be 0 where the score is not 'idw'"):
        config(score="dot_product")


def test_a_layer_reads_on_in_parts():
    torch.manual_seed(0)
    layer, x = FwPKM(16, config()), torch.randn(2, 12, 16)
    whole, _ = layer(x)
    first, state = layer(x[:, :5])
    assert state.uses.shape == (2, 10)
    second, _ = layer(x[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
