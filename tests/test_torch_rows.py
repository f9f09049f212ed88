"""Rows of a state in torch: what shares a table, and that nobody writes into what another holds."""

import pytest
import torch
from interpreter import DEVICE, same_or_close

from fwpkm import FwPKMConfig
from fwpkm.backends import torch as be
from fwpkm.backends.torch.left_aligned import rounded
from fwpkm.containers import Memory, State
from fwpkm.kernels.runtime import windows

CFG = FwPKMConfig(key_dim=4, value_dim=3, num_subkeys=4, top_k=2, chunk_size=3)


def half_read(rows: int = 2) -> State:
    state = be.init_state(CFG, be.init_memory(CFG, rows), rows)
    return be.apply(CFG, state, torch.rand(rows, 2, 4), torch.rand(rows, 2, 3))[1]


CALLS = {
    "apply": lambda state: be.apply(CFG, state, torch.rand(3, 2, 4), torch.rand(3, 2, 3), inplace=True)[1],
    "flush": lambda state: be.flush(CFG, state, [0], inplace=True)[0],
    "reset": lambda state: be.reset(CFG, state, be.init_memory(CFG, seed=1), [0], inplace=True),
    "put": lambda state: be.put(CFG, state, [0], be.init_state(CFG, be.init_memory(CFG, seed=1), 1), inplace=True),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("rows", [[0, 0, 0], [1, 0, 1]], ids=["beams", "rows"])
def test_in_place_each_row_has_a_table_of_its_own(name: str, rows: list[int]) -> None:
    beams_of_one = rows == [0, 0, 0]
    state = half_read(1 if beams_of_one else 2)
    beams = be.select(CFG, state, rows)
    assert (beams.memory.values.stride(0) == 0) == beams_of_one
    kept = [state.map(torch.clone), beams.map(torch.clone)]
    torch.manual_seed(0)
    after = CALLS[name](beams)
    torch.manual_seed(0)
    expected = CALLS[name](kept[1])
    for x, y in zip(after.arrays().values(), expected.arrays().values()):
        assert torch.equal(x, y)
    for x, y in zip(state.arrays().values(), kept[0].arrays().values()):
        assert torch.equal(x, y)
    assert not torch.equal(after.memory.values[0], state.memory.values[rows[0]])


def test_one_row_alone_is_a_copy() -> None:
    state = half_read()
    before = state.memory.values.clone()
    one = be.select(CFG, state, [1])
    be.apply(CFG, one, torch.rand(1, 2, 4), torch.rand(1, 2, 3), inplace=True)
    assert torch.equal(state.memory.values, before)


def test_beams_that_are_all_one_beam_have_tables_of_their_own() -> None:
    """Whether a call may overwrite them must not hang on what a search chose."""
    beams = be.select(CFG, half_read(), [0, 1, 1, 0])
    assert be.select(CFG, beams, [2, 2, 2, 2]).memory.values.stride(0) != 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_rows_are_of_any_integer_type(dtype: torch.dtype) -> None:
    state, rows = half_read(), torch.tensor([1], dtype=dtype)
    one = be.select(CFG, state, rows)
    assert torch.equal(one.memory.values[0], state.memory.values[1])
    fresh = be.reset(CFG, state, be.init_memory(CFG, 1, seed=1), rows)
    assert be.pending(CFG, be.flush(CFG, fresh, rows)[0]).tolist() == [2, 0]
    assert be.put(CFG, fresh, rows, one).position.tolist() == [2, 2]


def test_beams_that_write_nothing_go_on_sharing() -> None:
    """And read as rows with tables of their own; a shared table counts once."""
    state = half_read(1)
    beams = be.select(CFG, state, [0, 0, 0])
    own = beams.map(torch.clone)
    size = be.nbytes(be.select(CFG, state, [0]))
    assert be.nbytes(own) == 3 * size
    assert be.nbytes(beams) == 3 * size - 2 * sum(x[0].nbytes for x in own.memory)
    inputs = torch.rand(3, 1, 4), torch.rand(3, 1, 3)
    gone = torch.tensor([[False], [False], [False]])
    for options in ({"update": False}, {"mask": gone}):
        output, after, _ = be.apply(CFG, beams, *inputs, **options)
        expected, _, _ = be.apply(CFG, own, *inputs, **options)
        assert torch.equal(output, expected)
        assert after.memory is beams.memory
    query = torch.rand(3, 1, 4, requires_grad=True)
    table = state.memory.values.clone().requires_grad_()
    shared = be.select(CFG, state._replace(memory=state.memory._replace(values=table)), [0, 0, 0])
    output, _, _ = be.apply(CFG, shared, query, inputs[1], update=False)
    found = torch.autograd.grad(output.square().sum(), [query, table])
    rows = state.memory.values[[0, 0, 0]].requires_grad_()
    output, _, _ = be.apply(CFG, own._replace(memory=own.memory._replace(values=rows)), query, inputs[1], update=False)
    expected = torch.autograd.grad(output.square().sum(), [query, rows])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][0], expected[1].sum(0))


def test_a_memory_in_place_of_a_state_is_left_as_it_was() -> None:
    """Whether a chunk is written or none; and no state comes back."""
    memory = be.init_memory(CFG)
    before = memory.values.clone()
    for length in (2, 7):
        inputs = torch.rand(2, length, 4), torch.rand(2, length, 3)
        output, state, trace = be.apply(CFG, memory, *inputs)
        expected, _, record = be.apply(CFG, be.init_state(CFG, memory, 2), *inputs)
        assert state is None
        assert torch.equal(output, expected)
        assert torch.equal(trace.memorization, record.memorization)
        assert torch.equal(memory.values, before)


def test_lengths_are_rounded_to_few_and_by_little() -> None:
    found = [rounded(length) for length in range(1, 8193)]
    assert all(length <= r <= length * 33 / 32 and rounded(r) == r for length, r in enumerate(found, 1))
    assert found[:64] == list(range(1, 65))
    assert len({r for r in found if 4096 < r <= 8192}) == 32
    assert rounded(0) == 1


def test_masked_rows_of_ever_new_lengths_have_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan's launches are listed once, which takes the host longer than the kernels take."""
    planned: list[tuple] = []
    real = windows.plan
    monkeypatch.setattr(windows, "plan", lambda *told: planned.append(told) or real(*told))
    cfg = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=4, top_k=2, chunk_size=80)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg)))
    query, value = torch.rand(2, 1, 70, 16, device=DEVICE)
    for live in (65, 66):
        mask = torch.arange(70)[None] < live
        out = be.apply(cfg, memory, query, value, mask=mask, implementation="triton")[0]
        alone = be.apply(cfg, memory, query[:, :live], value[:, :live], implementation="eager")[0]
        same_or_close(out[:, :live], alone)
        assert not out[:, live:].any()
    assert len(planned) == 2
    assert len(set(planned)) == 1


WIDE = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=4, top_k=2, chunk_size=2)


def read(x: torch.Tensor, implementation: str) -> torch.Tensor:
    memory = Memory(*(table.to(x.device) for table in be.init_memory(WIDE)))
    return be.apply(WIDE, be.init_state(WIDE, memory, 1), x, x, implementation=implementation)[0]


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("of", ["jvp", "hvp", "hessian", "grad"])
def test_second_derivatives_are_refused(of: str, implementation: str) -> None:
    """Where inputs are named torch would leave those of the memory out of the sum without a word."""
    x = torch.rand(1, 5, 16, device=DEVICE, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return read(x, implementation).square().sum()

    calls = {
        "jvp": lambda: torch.autograd.functional.jvp(loss, x, x),
        "hvp": lambda: torch.autograd.functional.hvp(loss, x, x),
        "hessian": lambda: torch.autograd.functional.hessian(loss, x),
        "grad": lambda: torch.autograd.grad(loss(x), x, create_graph=True),
    }
    with pytest.raises(RuntimeError, match="the memory has first derivatives only"):
        calls[of]()
    assert torch.autograd.grad(loss(x), x)[0].isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_gradients_in_batches_are_refused(implementation: str) -> None:
    x = torch.rand(1, 5, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"the memory takes one gradient at a time\. Received: several at once"):
        torch.autograd.grad(read(x, implementation), x, torch.rand(3, 1, 5, 16, device=DEVICE), is_grads_batched=True)
    output = read(x, implementation)
    with pytest.raises(RuntimeError, match="the memory takes one gradient at a time"):
        torch.func.vmap(lambda d: torch.autograd.grad(output, x, d, retain_graph=True)[0])(output[None].detach())


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_table_that_a_backward_needs_is_missed_after_a_call_in_place(implementation: str) -> None:
    """The kernels write behind autograd's back, and must say so."""
    x = torch.rand(1, 2, 16, device=DEVICE, requires_grad=True)
    memory = Memory(*(table.to(DEVICE) for table in be.init_memory(WIDE)))
    state = be.apply(WIDE, be.init_state(WIDE, memory, 1), x, x.detach(), implementation=implementation)[1]
    loss = state.memory.values.square().sum()
    be.apply(WIDE, be.detach(state), x.detach(), x.detach(), inplace=True, implementation=implementation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_decoding_goes_on_from_what_was_made_for_inference() -> None:
    cfg, x = WIDE, torch.rand(2, 3, 16)
    expected = be.apply(cfg, be.init_state(cfg, be.init_memory(cfg), 2), x, x)[0][:, 1:]
    state = be.init_state(cfg, be.init_memory(cfg), 2)
    with torch.inference_mode():
        state = be.apply(cfg, state, x[:, :1], x[:, :1])[1]
    found = [be.decode(cfg, state, x[:, t : t + 1], x[:, t : t + 1]) for t in (1, 2)]
    assert not any(output.is_inference() for output in found)
    same_or_close(torch.cat(found, 1), expected)
    assert state.position.tolist() == [3, 3]


@pytest.mark.parametrize("call", ["put", "reset"])
def test_a_position_made_for_inference_is_not_found_too_late(call: str) -> None:
    state = half_read()
    with torch.inference_mode():
        state = state._replace(position=state.position.clone())
    before = [x.clone() for x in state.arrays().values()]
    with pytest.raises(RuntimeError, match="inference"):
        CALLS[call](state)
    assert all(map(torch.equal, state.arrays().values(), before))
