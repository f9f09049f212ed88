"""Written rows decay to the initial table (docs/retention.md), in torch and the kernels."""

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
    {"grad_clip": 0.02, "learning_rate": 0.5, "num_heads": 2},
]


def config(**fields):
    return FwPKMConfig(**SMALL | {"initial_decay": 0.3} | fields)


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("fields", FIELDS)
def test_eager_is_the_rule(fields, forgets):
    forward, backward = worst(config(**fields), [2, 9, 10], "eager", torch.float64, forgets)
    assert forward < 1e-10
    assert backward < 1e-9


@pytest.mark.parametrize(("fields", "forgets"), [(FIELDS[0], False), (FIELDS[1], True), (FIELDS[2], False)])
def test_kernels_are_the_rule(fields, forgets):
    forward, backward = worst(config(**fields), [2, 9, 10], "triton", torch.float32, forgets)
    assert forward < 1e-5
    assert backward < 1e-4


def test_beside_uses_kernels_give_what_eager_gives():
    cfg, results = config(usage_weight=0.7), []
    for implementation in ("eager", "triton"):
        (*tokens, _), memory = drawn(cfg, torch.float32)
        options = {"implementation": implementation, "initial_values": memory[1][:1].detach()}
        output, state, _ = TORCH.apply(cfg, TORCH.init_state(cfg, Memory(*memory), 2), *tokens, **options)
        live = [output, *state.memory]
        results.append([*live, *torch.autograd.grad(summed(live), [*tokens, *memory])])
    for wanted, found in zip(*results, strict=True):
        same_or_close(found, wanted)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_memory_in_place_of_a_state_is_what_its_rows_decay_to(implementation):
    """A call that keeps nothing gives the outputs of one that keeps its state, ragged rows too."""
    cfg = config()
    (*tokens, _), memory = drawn(cfg, torch.float32)
    tokens, memory = [x.detach() for x in tokens], Memory(*(x.detach()[:1] for x in memory))
    state = TORCH.init_state(cfg, memory, 2)
    for mask in (None, torch.rand(2, 10, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.2):
        options = {"mask": mask, "implementation": implementation}
        wanted, _, _ = TORCH.apply(cfg, state, *tokens, initial_values=memory.values, **options)
        output, _, _ = TORCH.apply(cfg, memory, *tokens, **options)
        same_or_close(output, wanted)
        plain, _, _ = TORCH.apply(FwPKMConfig(**SMALL), memory, *tokens, **options)
        assert not torch.allclose(output, plain, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_row_that_is_written_nothing_else_goes_back(implementation):
    """Gate 0: what a chunk touches stands λ nearer to its initial row after it."""
    cfg = config(initial_decay=0.25)
    (query, value, gate, _), memory = drawn(cfg, torch.float32, length=4)
    initial = memory[1][:1].detach()
    with torch.no_grad():
        state = TORCH.init_state(cfg, Memory(memory[0], memory[1] + 1), 2)
        _, after, trace = TORCH.apply(
            cfg, state, query, value, gate * 0, initial_values=initial, implementation=implementation
        )
    touched = torch.zeros(2, cfg.num_slots, dtype=torch.bool, device=DEVICE).scatter_(1, trace.slots.flatten(1), True)
    found, before = after.memory.values, state.memory.values
    torch.testing.assert_close(found[touched], (before - 0.25 * (before - initial))[touched])
    assert torch.equal(found[~touched], before[~touched])


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_it_is_the_plain_rule_at_zero(implementation):
    """So small a decay changes no bit."""
    results = []
    for decay in (0.0, 1e-30):
        cfg = config(initial_decay=decay)
        (*tokens, _), memory = drawn(cfg, torch.float32)
        options = {"implementation": implementation, "initial_values": memory[1][:1].detach()}
        output, state, _ = TORCH.apply(cfg, TORCH.init_state(cfg, Memory(*memory), 2), *tokens, **options)
        live = [output, *state.memory]
        results.append([*live, *torch.autograd.grad(summed(live), [*tokens, *memory])])
    for plain, zero in zip(*results, strict=True):
        assert torch.equal(plain, zero)


def test_a_layer_passes_its_own_table():
    layers = []
    for decay in (0.0, 0.3):
        torch.manual_seed(0)
        layers.append(FwPKM(16, FwPKMConfig(**SMALL, initial_decay=decay)))
    x = torch.randn(2, 24, 16)  # so long that chunks write rows again
    layer = layers[1]
    whole, _ = layer(x)
    first, state = layer(x[:, :5])
    second, _ = layer(x[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert not torch.allclose(whole, layers[0](x)[0], atol=1e-6)


def test_what_it_lacks_it_asks_for():
    cfg = config()
    (*tokens, _), memory = drawn(cfg, torch.float32)
    memory = Memory(*(x.detach() for x in memory))
    state = TORCH.init_state(cfg, memory, 2)
    with pytest.raises(ValueError, match=r"initial_values must be the initial memory's values \[1, N, Dv\]"):
        TORCH.apply(cfg, state, *tokens)
    with pytest.raises(ValueError, match=r"initial_values must have shape \[1=1, N=25, Dv=16\]"):
        TORCH.apply(cfg, state, *tokens, initial_values=memory.values)
    with pytest.raises(ValueError, match="initial_values must not require a gradient"):
        TORCH.apply(cfg, state, *tokens, initial_values=memory.values[:1].clone().requires_grad_())
    with pytest.raises(ValueError, match="initial_values must be the initial memory's values"):
        TORCH.flush(cfg, state)
    with pytest.raises(ValueError, match="initial_decay must be 0 here"):
        TORCH.chunk_update(cfg, memory, *tokens[:2])
    with pytest.raises(ValueError, match="initial_decay must be 0 here"):
        TORCH.decode(cfg, TORCH.start_decoding(state), *(x[:, :1].detach() for x in tokens))
    TORCH.apply(cfg, state, *tokens, update=False)
