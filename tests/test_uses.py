"""Writes weighted by use (SPEC.md §4): by a direct loop, through splits and rows, in torch and on the kernels."""

import dataclasses

import numpy as np
import pytest
import torch
from asserting import assert_close, assert_same_bits
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE, SMALL, same_or_close

import fwpkm
from fwpkm import FwPKMConfig, Memory, agreement, equations, reference
from fwpkm.conformance.running import as_numpy, draw_cotangents, forward, gradients, native
from fwpkm.conformance.strategies import cases, untied_case

TORCH, JAX = map(fwpkm.get_backend, ("torch", "jax"))
EVERY = (reference, TORCH, JAX)
USED = FwPKMConfig(4, 3, 2, 4, 2, 3, 1, usage_weight=0.7, weight_decay=0.05)
WEIGHTS = st.sampled_from([0.25, 1.0, 3.0])
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning",
    "ignore:divide by zero:RuntimeWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",  # what torch's own compiler uses
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",  # as it does while it traces
)


def begun(be, case):
    return be.init_state(case.cfg, native(be, case.memory), case.batch)


def read(be, case, state, start=0, stop=None, **options):
    """Output and next state of some tokens of a case."""
    tokens = native(be, case.tokens.slice(start, stop))
    output, state, _ = be.apply(case.cfg, state, **tokens.present(), **options)
    return as_numpy(be, output), state


# The rule


def by_hand(cfg, memory, query, value, gate):
    """Final values and uses of one sequence of whole chunks, one row at a time; lookahead 1, boundary "drop"."""
    keys, values = (x[0].copy() for x in memory)
    uses = np.zeros(cfg.num_slots)
    halves = query.reshape(len(query), cfg.num_heads, 2, -1)
    for begin in range(0, len(query) - cfg.chunk_size + 1, cfg.chunk_size):
        here = slice(begin, begin + cfg.chunk_size)
        q, u, g = halves[here], value[here], gate[here]
        chosen = equations.select_slots(cfg, q, keys)
        read = equations.read(values, chosen.slots, chosen.weights)
        counts, gradient = np.zeros(cfg.num_slots), np.zeros_like(values)
        for t, slots in enumerate(chosen.slots):
            for slot, weight in zip(slots, chosen.weights[t]):
                counts[slot] += 1
                if t + 1 < cfg.chunk_size:
                    gradient[slot] += cfg.slots_per_token * weight * g[t] * (read[t] - u[t + 1])
        for slot in np.flatnonzero(counts):
            rate = cfg.learning_rate * counts[slot] / (counts[slot] + cfg.usage_weight * uses[slot])
            values[slot] -= rate * (gradient[slot] / counts[slot] + cfg.weight_decay * values[slot])
            uses[slot] += counts[slot]
        every = np.ones(cfg.chunk_size, bool)
        keys = equations.step(cfg, keys, cfg.addressing_weight * equations.key_gradient(cfg, keys, q, chosen, every))
    return values, uses


def test_the_reference_is_the_rule():
    case = drawn(USED, 1, 12, left_out=["mask"])
    values, uses = by_hand(case.cfg, case.memory, *(x[0] for x in case.tokens.present().values()))
    _, state = read(reference, case, begun(reference, case))
    assert_close(state.memory.values[0], values, "float64")
    np.testing.assert_array_equal(state.uses[0], uses)
    assert len(np.unique(uses)) > 2


def test_a_row_is_the_mean_of_what_was_written_to_it():
    """η = β = 1 and one slot that every token reads alone: U counts the chunks."""
    cfg = FwPKMConfig(2, 2, 1, 1, 1, 1, 0, usage_weight=1.0)
    case = drawn(cfg, 1, 9, left_out=["mask", "gate"])
    _, state = read(reference, case, begun(reference, case))
    assert_close(state.memory.values[0, 0], case.tokens.value[0].mean(0), "float64")
    assert state.uses.tolist() == [[9.0]]


def test_a_chunk_without_a_pair_counts_nothing():
    cfg = dataclasses.replace(USED, chunk_size=2)
    case = drawn(cfg, 1, 4)
    mask = np.array([[True, True, True, False]])  # no partner in the second chunk
    case = dataclasses.replace(case, tokens=case.tokens._replace(mask=mask))
    for be in EVERY:
        state = read(be, case, begun(be, case))[1]
        before = as_numpy(be, state.uses)
        assert before.sum() == 2 * cfg.slots_per_token
        state, trace = be.flush(cfg, state)
        assert as_numpy(be, trace.writes).tolist() == [1]
        assert_same_bits(as_numpy(be, state.uses), before)


def test_a_chunk_that_is_due_without_a_pair_counts_nothing():
    """The partner of its only pair is there, and not finite."""
    cfg = dataclasses.replace(USED, chunk_size=2)
    case = drawn(cfg, 1, 4, left_out=["mask"])
    case.tokens.value[0, 3] = np.nan
    for be in EVERY:
        state = read(be, case, begun(be, case))[1]
        assert as_numpy(be, state.uses).sum() == 2 * cfg.slots_per_token


def test_a_row_that_keeps_its_bits_counts_as_used():
    """Its new value would not be finite."""
    case = drawn(dataclasses.replace(USED, learning_rate=1e300), 1, 3, left_out=["mask"])
    case = dataclasses.replace(case, memory=case.memory._replace(values=case.memory.values * 1e10))
    for be in EVERY:
        state = read(be, case, begun(be, case))[1]
        assert_same_bits(as_numpy(be, state.memory.values), case.memory.values)
        assert as_numpy(be, state.uses).sum() == 3 * case.cfg.slots_per_token


# Torch beside the reference


@given(cases(usage_weight=WEIGHTS))
def test_torch_gives_what_the_reference_gives(case):
    expected, state = read(reference, case, begun(reference, case))
    received, found = read(TORCH, case, begun(TORCH, case))
    assert_close(received, expected, case.dtype)
    state, _ = reference.flush(case.cfg, state)
    found = as_numpy(TORCH, TORCH.flush(case.cfg, found)[0])
    for name, wanted in state.memory._asdict().items():
        assert_close(getattr(found.memory, name), wanted, case.dtype, name=name)
    np.testing.assert_array_equal(found.uses, state.uses)


@given(cases(usage_weight=WEIGHTS), st.data())
def test_any_split_gives_the_same(case, data):
    at = data.draw(st.integers(0, case.length))
    inplace = data.draw(st.booleans())
    for be in (reference, TORCH):
        expected, whole = read(be, case, begun(be, case))
        first, state = read(be, case, begun(be, case), 0, at, inplace=inplace)
        second, state = read(be, case, state, at, inplace=inplace)
        assert_close(np.concatenate([first, second], 1), expected, case.dtype)
        assert_close(as_numpy(be, state.memory), as_numpy(be, whole.memory), case.dtype)
        np.testing.assert_array_equal(as_numpy(be, state.uses), as_numpy(be, whole.uses))


@pytest.mark.parametrize("fields", [{}, {"boundary": "wait"}, {"grad_clip": 0.3}, {"memory_scope": "batch"}])
def test_gradients_equal_central_differences_of_the_reference(fields):
    cfg = dataclasses.replace(USED, score_eps=0.1, **fields)
    clear = 100 * agreement.DIFFERENCE_STEP / 1e-3**0.5
    case = untied_case(cfg, 3, "float64", frozenset(), 2, 11, [], None, gap=clear)
    rng = np.random.default_rng(0)
    weights = draw_cotangents(case, rng)
    received = gradients(TORCH, case, weights)
    arrays = [case.tokens.query, case.tokens.value, case.tokens.gate, *case.memory]

    def objective(*inputs):
        return sum((a * b).sum() for a, b in zip(forward(reference, case, inputs), weights))

    step = agreement.DIFFERENCE_STEP
    for i, gradient in enumerate(received):
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        ahead, behind = (
            objective(*(x + sign * step * direction if i == j else x for j, x in enumerate(arrays))) for sign in (1, -1)
        )
        error = abs((ahead - behind) / (2 * step) - (gradient * direction).sum())
        assert error <= agreement.DIFFERENCE_BOUND * max(1.0, np.linalg.norm(gradient)), i


# The kernels


@pytest.mark.parametrize("cuts", [[10], [2, 9, 10]])
@pytest.mark.parametrize(
    "fields", [{}, {"weight_decay": 0.1, "grad_clip": 0.02}, {"boundary": "wait", "memory_scope": "batch"}]
)
def test_kernels_give_what_eager_gives(fields, cuts):
    cfg = FwPKMConfig(**SMALL | {"usage_weight": 0.7} | fields)
    results = []
    for implementation in ("eager", "triton"):
        draw = torch.Generator().manual_seed(0)
        tokens = [torch.rand(2, 10, *width, generator=draw).to(DEVICE).requires_grad_() for width in ((16,), (16,), ())]
        memory = [table.to(DEVICE).requires_grad_() for table in TORCH.init_memory(cfg, seed=1)]
        state, outputs, start = TORCH.init_state(cfg, Memory(*memory), 2), [], 0
        mask = torch.rand(2, 10, generator=draw).to(DEVICE) > 0.2 if len(cuts) > 1 else None
        for stop in cuts:
            part = [x[:, start:stop] for x in (*tokens, *([] if mask is None else [mask]))]
            output, state, _ = TORCH.apply(cfg, state, *part, implementation=implementation)
            outputs.append(output)
            start = stop
        state, _ = TORCH.flush(cfg, state, implementation=implementation)
        live = [torch.cat(outputs, 1), *state.memory]
        total = sum((x * torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)).sum() for x in live)
        results.append([*live, state.uses, *torch.autograd.grad(total, [*tokens, *memory])])
    for expected, received in zip(*results, strict=True):
        same_or_close(received, expected)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_what_a_call_in_place_overwrites(implementation):
    cfg = FwPKMConfig(**SMALL, usage_weight=1.0)
    memory = Memory(*(table.to(DEVICE) for table in TORCH.init_memory(cfg)))
    state = TORCH.init_state(cfg, memory, 1)
    query, value = (torch.rand(1, 9, 16, device=DEVICE) for _ in range(2))
    options = {"implementation": implementation}
    _, expected, _ = TORCH.apply(cfg, state, query, value, **options)
    assert not state.uses.any()
    _, after, _ = TORCH.apply(cfg, state, query, value, inplace=True, **options)
    assert after.uses is state.uses
    assert torch.equal(after.uses, expected.uses)
    assert TORCH.apply(cfg, after, query, value, update=False, **options)[1].uses is after.uses


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_decoding_overwrites_the_uses(implementation):
    cfg = FwPKMConfig(**SMALL, usage_weight=1.0)
    memory = Memory(*(table.to(DEVICE) for table in TORCH.init_memory(cfg)))
    query, value = (torch.rand(2, 9, 16, device=DEVICE) for _ in range(2))
    _, expected, _ = TORCH.apply(cfg, TORCH.init_state(cfg, memory, 2), query, value, implementation="eager")
    state = TORCH.start_decoding(TORCH.init_state(cfg, memory, 2))
    for t in range(9):
        TORCH.decode(cfg, state, query[:, t : t + 1], value[:, t : t + 1], implementation=implementation)
    same_or_close(state.memory.values, expected.memory.values)
    assert torch.equal(state.uses, expected.uses)


def test_a_graph_holds_a_call():
    cfg = FwPKMConfig(**SMALL, usage_weight=1.0)
    state = TORCH.init_state(cfg, Memory(*(table.to(DEVICE) for table in TORCH.init_memory(cfg))), 2)
    query, value = (torch.rand(2, 9, 16, device=DEVICE) for _ in range(2))
    _, expected, _ = TORCH.apply(cfg, state, query, value, implementation="eager")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def read_in_a_graph(state, query, value):
        return TORCH.apply(cfg, state, query, value, implementation="triton")[1]

    after = read_in_a_graph(state, query, value)
    same_or_close(after.memory.values, expected.memory.values)
    assert torch.equal(after.uses, expected.uses)


# Where it is off


def test_a_state_without_it_has_no_uses():
    cfg = dataclasses.replace(USED, usage_weight=0.0)
    case = drawn(cfg, 2, 8)
    for be in EVERY:
        state = read(be, case, begun(be, case))[1]
        assert state.uses == ()
        assert "uses" not in state.arrays()


def test_uses_and_their_weight_go_together():
    case = drawn(USED, 2, 8)
    for be in EVERY:
        state = begun(be, case)
        with pytest.raises(ValueError, match=r"state\.uses must be an array \[M, N\].*usage_weight is 0\.7"):
            read(be, case, state._replace(uses=None))
        plain = dataclasses.replace(case, cfg=dataclasses.replace(USED, usage_weight=0.0))
        with pytest.raises(ValueError, match=r"state\.uses must be \(\), since usage_weight is 0\.0"):
            read(be, plain, state)
        with pytest.raises(ValueError, match=r"state\.uses must have shape \[M=2, N=16\]"):
            read(be, case, state._replace(uses=state.uses[:, 1:]))


def test_tables_alone_keep_no_uses():
    case = drawn(USED, 1, 3, left_out=["mask", "gate"])
    for be in EVERY:
        query, value = native(be, case.tokens.query), native(be, case.tokens.value)
        with pytest.raises(ValueError, match="usage_weight must be 0 here"):
            be.chunk_update(USED, native(be, case.memory), query, value)


# States


@pytest.mark.parametrize("functions", EVERY)
def test_rows_keep_their_uses(functions):
    be = functions
    case = drawn(USED, 3, 8)
    state = read(be, case, begun(be, case))[1]
    uses = as_numpy(be, state.uses)
    memory = native(be, Memory(*(x[:1] for x in case.memory)))
    picked = be.select(USED, state, [2, 0])
    np.testing.assert_array_equal(as_numpy(be, picked.uses), uses[[2, 0]])
    joined = be.concat(USED, [picked, state])
    np.testing.assert_array_equal(as_numpy(be, joined.uses), uses[[2, 0, 0, 1, 2]])
    np.testing.assert_array_equal(as_numpy(be, be.put(USED, state, [0, 1], picked).uses), uses[[2, 0, 2]])
    anew = as_numpy(be, be.reset(USED, state, memory, [1]).uses)
    assert not anew[1].any()
    np.testing.assert_array_equal(anew[[0, 2]], uses[[0, 2]])
    assert be.nbytes(state) == be.nbytes(state._replace(uses=None)) + uses.nbytes


@pytest.mark.parametrize("functions", EVERY)
def test_files_and_packed_states_hold_the_uses(functions, tmp_path):
    be = functions
    case = drawn(USED, 2, 8)
    state = read(be, case, begun(be, case))[1]
    fwpkm.save_state(tmp_path / "state.safetensors", state, USED)
    for backend in ("numpy", "torch", "jax"):
        loaded = fwpkm.load_state(tmp_path / "state.safetensors", USED, backend)
        assert_same_bits(as_numpy(fwpkm.get_backend(backend), loaded), as_numpy(be, state))
    fwpkm.save_states(tmp_path / "states.safetensors", {"a": state, "b": begun(be, case)}, USED)
    for name, loaded in fwpkm.load_states(tmp_path / "states.safetensors", USED, backend).items():
        expected = {"a": state, "b": begun(be, case)}[name]
        assert_same_bits(as_numpy(fwpkm.get_backend(backend), loaded), as_numpy(be, expected))
    packed = be.pack(USED, state, native(be, case.memory))
    fwpkm.save_packed(tmp_path / "packed.safetensors", {"a": packed})
    back = be.unpack(USED, fwpkm.load_packed(tmp_path / "packed.safetensors")["a"], native(be, case.memory))
    assert_same_bits(as_numpy(be, back), as_numpy(be, state))
    with pytest.raises(ValueError, match=r"packed\.uses must be an array"):
        be.unpack(USED, dataclasses.replace(packed, uses=None), native(be, case.memory))
