"""A forget gate: a write takes from a row the mean of f over its reads (docs/retention.md); torch and the kernels."""

import pytest
import torch
from interpreter import DEVICE, SMALL, same_or_close
from plain_rule import drawn, summed, worst

import fwpkm
from fwpkm import FwPKMConfig, Memory

TORCH = fwpkm.get_backend("torch")
FIELDS = [
    {},
    {"boundary": "wait", "lookahead": 2},
    {"num_heads": 2, "weight_decay": 0.05, "usage_weight": 0.0},
    {"grad_clip": 0.02, "write_scale": "normalized"},
    {"learning_rate": 0.5, "addressing_weight": 0.0},
]
pytestmark = pytest.mark.filterwarnings(  # what torch's own compiler uses, and does while it traces
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",
)
CUTS = [[10], [2, 9, 10], [4, 8, 10]]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("fields", FIELDS)
def test_eager_is_the_rule(fields, cuts):
    forward, backward = worst(FwPKMConfig(**SMALL | fields), cuts, "eager", torch.float64)
    assert forward < 1e-10
    assert backward < 1e-9


@pytest.mark.parametrize(("fields", "cuts"), [*((fields, CUTS[1]) for fields in FIELDS), (FIELDS[0], CUTS[2])])
def test_kernels_are_the_rule(fields, cuts):
    forward, backward = worst(FwPKMConfig(**SMALL | fields), cuts, "triton", torch.float32)
    assert forward < 1e-5
    assert backward < 1e-4


def plain_and_zero(cfg, implementation, dtype):
    tokens, memory = drawn(cfg, dtype)
    results = []
    for forget in (None, torch.zeros_like(tokens[3])):
        state = TORCH.init_state(cfg, Memory(*memory), 2)
        output, state, _ = TORCH.apply(cfg, state, *tokens[:3], forget=forget, implementation=implementation)
        live = [output, *state.memory]
        results.append([*live, *torch.autograd.grad(summed(live), [*tokens[:3], *memory])])
    return zip(*results, strict=True)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_nothing_is_forgotten_at_zero(implementation):
    """To the bit."""
    for plain, zero in plain_and_zero(FwPKMConfig(**SMALL, weight_decay=0.1), implementation, torch.float32):
        assert torch.equal(plain, zero)


@pytest.mark.parametrize("boundary", ["drop", "wait"])
@pytest.mark.parametrize("begins", ["state", "memory", "packed"])
def test_kernels_give_what_eager_gives_of_ragged_rows(begins, boundary):
    cfg = FwPKMConfig(**SMALL, boundary=boundary)
    results = []
    for implementation in ("eager", "triton"):
        tokens, memory = drawn(cfg, torch.float32, *((1, 16) if begins == "packed" else (2, 10)))
        memory = [x[:1] for x in memory]
        mask = torch.rand(tokens[0].shape[:2], generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.2
        ends = torch.tensor([0, 4, 16], dtype=torch.int32) if begins == "packed" else None
        state = TORCH.init_state(cfg, Memory(*memory), 2) if begins == "state" else Memory(*memory)
        outputs = []
        for part in (slice(0, 3), slice(3, 10)) if begins == "state" else (slice(None),):
            query, value, gate, forget = (x[:, part] for x in tokens)
            output, after, _ = TORCH.apply(
                cfg, state, query, value, gate, mask[:, part], ends, forget=forget, implementation=implementation
            )
            outputs.append(output)
            state = after if begins == "state" else state
        live = [torch.cat(outputs, 1)]
        live += [*after.memory, after.pending_forget] if after is not None else []
        results.append([*live, *torch.autograd.grad(summed(live), [*tokens, *memory])])
    for wanted, found in zip(*results, strict=True):
        same_or_close(found, wanted)
    assert results[0][-3].any()


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("boundary", ["drop", "wait"])
def test_decoding_is_a_call(implementation, boundary):
    cfg = FwPKMConfig(**SMALL, boundary=boundary)
    tokens, memory = drawn(cfg, torch.float32)
    tokens, memory = ([x.detach() for x in of] for of in (tokens, memory))
    query, value, gate, forget = tokens
    state = TORCH.init_state(cfg, Memory(*memory), 2)
    wanted, after, _ = TORCH.apply(cfg, state, query, value, gate, forget=forget, implementation="eager")
    state = TORCH.start_decoding(state)
    for t in range(10):
        one = slice(t, t + 1)
        read = TORCH.decode(
            cfg, state, query[:, one], value[:, one], gate[:, one], forget=forget[:, one], implementation=implementation
        )
        same_or_close(read, wanted[:, one])
    for found, expect in zip(state.memory, after.memory):
        same_or_close(found, expect)
    same_or_close(state.pending_forget, after.pending_forget)


def test_a_graph_holds_a_call():
    cfg = FwPKMConfig(**SMALL)
    tokens, memory = drawn(cfg, torch.float32)
    state = TORCH.init_state(cfg, Memory(*(x.detach() for x in memory)), 2)

    def read(state, query, value, gate, forget, implementation):
        output, after, _ = TORCH.apply(cfg, state, query, value, gate, forget=forget, implementation=implementation)
        return output, *after.memory

    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    results = []
    for live in (read(state, *tokens, "eager"), compiled(state, *tokens, "triton")):
        results.append([*live, *torch.autograd.grad(summed(live), tokens)])
    for wanted, found in zip(*results, strict=True):
        same_or_close(found, wanted)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_token_whose_f_is_not_finite_is_dead(implementation):
    cfg = FwPKMConfig(**SMALL)
    tokens, memory = drawn(cfg, torch.float32)
    query, value, gate, forget = (x.detach().clone() for x in tokens)
    forget[0, 2] = torch.nan
    state = TORCH.init_state(cfg, Memory(*memory), 2)
    output, state, _ = TORCH.apply(cfg, state, query, value, gate, forget=forget, implementation=implementation)
    assert output.isnan().any(-1).nonzero().tolist() == [[0, 2]]
    assert state.memory.values.isfinite().all()


def test_files_and_packed_states_hold_f(tmp_path):
    cfg = FwPKMConfig(**SMALL)
    tokens, memory = drawn(cfg, torch.float32)
    memory = Memory(*(x.detach()[:1].cpu() for x in memory))
    query, value, gate, forget = (x.detach().cpu() for x in tokens)
    _, state, _ = TORCH.apply(cfg, TORCH.init_state(cfg, memory, 2), query, value, gate, forget=forget)
    assert state.pending_forget[:, :2].equal(forget[:, 8:])
    fwpkm.save_state(tmp_path / "state.safetensors", state, cfg)
    fwpkm.save_packed(tmp_path / "packed.safetensors", {"a": TORCH.pack(cfg, state, memory)})
    packed = fwpkm.load_packed(tmp_path / "packed.safetensors")["a"]
    for again in (
        fwpkm.load_state(tmp_path / "state.safetensors", cfg, "torch"),
        TORCH.unpack(cfg, packed, memory),
        TORCH.select(cfg, TORCH.concat(cfg, [state, state]), [2, 3]),
    ):
        for name, x in state.arrays().items():
            assert again.arrays()[name].equal(x)
