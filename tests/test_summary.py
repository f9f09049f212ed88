"""``fwpkm.summarize``: counted by hand, and what does not fit refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import fwpkm
from fwpkm import FwPKMConfig, LayerTrace, Memory, Trace, reference, summarize

CFG = FwPKMConfig(key_dim=4, value_dim=3, num_heads=2, num_subkeys=3, top_k=1, chunk_size=4, lookahead=1)


def trace_of(slots, *, gate=None, masked=(), dead=(), writes=(0,), losses=None):
    """A trace of rows of tokens, each a list of slots; ``masked`` and ``dead`` name tokens as (row, time)."""
    slots = np.array(slots, np.int32)
    weights = np.full(slots.shape, 1 / slots.shape[2], np.float32)
    for tokens, value in ((masked, 0), (dead, np.nan)):
        for token in tokens:
            weights[token] = value
    none = np.zeros((len(writes), -(-slots.shape[1] // CFG.chunk_size)))
    losses = np.array(none if losses is None else losses, np.float32)
    trace = Trace(slots, weights, losses, -losses, np.array(writes, np.int32))
    return trace if gate is None else LayerTrace(*trace, gate=np.array(gate, np.float32))


def state_at(*position, cfg=CFG):
    state = reference.init_state(cfg, reference.init_memory(cfg), len(position))
    return state._replace(position=np.array(position, np.int32))


def test_counts_of_one_chunk():
    # Token 0 reads slot 1 twice, which is one read. Slot 1: tokens 0, 1, 2 (three pairs); slot 5: 1 and 2 (one pair).
    found = summarize(CFG, trace_of([[[1, 1], [1, 5], [5, 1], [7, 8]]]))
    assert found["tokens"] == 4
    assert found["slots_used"] == 4
    assert found["slots_used_share"] == 4 / 9
    assert found["collisions"] == 4
    assert found["collision_share"] == 5 / 7
    assert all(type(x) is float for x in found.values())


def test_tokens_collide_within_a_chunk_and_a_memory_alone():
    same = [[1, 2]] * 4
    assert summarize(CFG, trace_of([same]))["collisions"] == 12
    across = summarize(CFG, trace_of([same]), before=state_at(2))  # positions 2 to 5: two tokens in each of two chunks
    assert across["collisions"] == 4
    rows = summarize(CFG, trace_of([same[:2], same[:2]], writes=(0, 0)))
    assert rows["collisions"] == 4
    assert rows["slots_used"] == 4
    one = dataclasses.replace(CFG, memory_scope="batch")
    shared = summarize(one, trace_of([same[:2], same[:2]]))
    assert shared["collisions"] == 12
    assert shared["slots_used_share"] == 2 / 9


@pytest.mark.parametrize(
    ("position", "length", "masked", "cfg", "words"),
    [
        ([2], 6, (), {}, "Received: writes [2], where row 0 read 6 tokens from position 0"),
        ([0, 3], 5, (), {}, "row 1 read 5 tokens from position 0"),
        ([3], 5, [(0, 1)], {"boundary": "wait"}, "row 0 read 4 tokens from position 0"),
        ([3, 3], 5, [(0, 1)], {"memory_scope": "batch"}, "row 0 read 5 tokens from position 0"),
    ],
)
def test_a_call_that_began_elsewhere_is_refused(position, length, masked, cfg, words):
    """Without ``before``, of a call that was given a state; and so in a recording."""
    cfg = dataclasses.replace(CFG, **cfg)
    rng, rows = np.random.default_rng(0), len(position)
    mask = np.ones((rows, length), bool)
    for token in masked:
        mask[token] = False
    query, value = (rng.normal(size=(rows, length, n)).astype("f4") for n in (8, 3))
    before = state_at(*position, cfg=cfg)
    _, _, trace = reference.apply(cfg, before, query, value, mask=mask)
    assert summarize(cfg, trace, before=before)["chunks"] == trace.writes.sum()
    for options in ({}, {"before": reference.init_memory(cfg)}):
        with pytest.raises(ValueError, match=r"trace\.writes must be the chunks that its tokens complete") as caught:
            summarize(cfg, trace, **options)
        assert words in str(caught.value)
        assert "before=" in str(caught.value)


@pytest.mark.parametrize(("chunk_size", "update"), [(3, True), (8, True), (8, False)])
def test_a_config_of_another_chunk_size_is_refused(chunk_size, update):
    other = dataclasses.replace(CFG, chunk_size=chunk_size)
    rng = np.random.default_rng(0)
    query, value = rng.normal(size=(1, 9, 8)).astype("f4"), rng.normal(size=(1, 9, 3)).astype("f4")
    _, _, trace = reference.apply(CFG, reference.init_memory(CFG), query, value, update=update)
    with pytest.raises(ValueError, match="config"):
        summarize(other, trace)


def test_masked_tokens_are_not_there_and_dead_ones_are_counted_apart():
    slots = [[[0, 0], [1, 1], [1, 1], [1, 1], [1, 1]]]
    found = summarize(CFG, trace_of(slots, gate=[[0, 0.5, 0.01, np.nan, 0.99]], masked=[(0, 0)], dead=[(0, 3)]))
    assert found["tokens"] == 3
    assert found["dead_tokens"] == 1
    assert found["collisions"] == 3  # positions 0, 1 and 3 of the chunk; the masked token takes none
    assert found["gate_mean"] == pytest.approx(0.5)
    assert found["gate_near_0"] == found["gate_near_1"] == pytest.approx(1 / 3)
    one = dataclasses.replace(CFG, memory_scope="batch")
    assert (
        summarize(one, trace_of(slots, masked=[(0, 0)], dead=[(0, 3)]))["collisions"] == 1
    )  # the fifth is in a new chunk


def test_packed_sequences_have_clocks_of_their_own():
    slots = [[[1, 1]] * 6]
    trace = trace_of(slots, masked=[(0, 5)], writes=(0, 0, 0))
    found = summarize(CFG, trace, cu_seqlens=np.array([0, 3, 3, 5], np.int32), before=state_at(2, 0, 0))
    assert found["tokens"] == 5
    assert found["collisions"] == 1 + 1  # the first sequence's tokens stand at 2, 3 and, in another chunk, 4
    assert found["slots_used"] == 2


def test_losses_are_means_over_written_chunks():
    trace = trace_of([[[1, 2]] * 8] * 2, masked=[(1, 0)], writes=(2, 1), losses=[[1.0, 2.0], [6.0, 0.0]])
    found = summarize(CFG, trace)
    assert found["memorization"] == 3
    assert found["addressing"] == -3
    assert found["chunks"] == 3
    nothing = summarize(CFG, trace_of([[[1, 2]]]))
    assert math.isnan(nothing["memorization"])
    assert "gate_mean" not in nothing
    assert "rows_kept" not in nothing


@pytest.mark.eager
@pytest.mark.parametrize("boundary", ["drop", "wait"])
def test_rows_written_and_rows_kept(be, boundary):
    """What NumPy counts in the tables; rows whose step overflows keep their bits, and are counted."""
    options = {"num_subkeys": 8, "top_k": 2, "chunk_size": 4, "boundary": boundary, "learning_rate": 100.0}
    cfg = FwPKMConfig(key_dim=4, value_dim=3, **options)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, 7, n)).astype(np.float32) for n in (4, 3)]
    arrays[1][0, 2] = 3e38  # what token 1 binds to its two slots
    query, value = (be.asarray(x, "float32") for x in arrays)
    before = be.init_state(cfg, be.init_memory(cfg), 2)
    _, after, trace = be.apply(cfg, before, query, value)
    found = summarize(cfg, trace, before=before, after=after)
    old, new = (be.to_numpy(state.memory.values) for state in (before, after))
    assert found["rows_written"] == (old != new).any(-1).sum() > 5
    assert found["rows_kept"] == 2
    flushed, trace = be.flush(cfg, after)
    found = summarize(cfg, trace, before=after, after=flushed)
    assert found["chunks"] == 2
    assert found["tokens"] == found["slots_used"] == 0
    assert found["rows_written"] > 3


def test_a_call_without_a_state_is_compared_with_the_initial_memory():
    memory = reference.init_memory(CFG)
    rng = np.random.default_rng(0)
    query, value = rng.normal(size=(2, 4, 8)).astype("f4"), rng.normal(size=(2, 4, 3)).astype("f4")
    _, after, trace = reference.apply(CFG, reference.init_state(CFG, memory, 2), query, value)
    found = summarize(CFG, trace, before=memory, after=after)
    assert found["rows_written"] == (after.memory.values != memory.values).any(-1).sum() > 0


def test_a_table_that_was_overwritten_is_refused():
    rng = np.random.default_rng(0)
    query, value = rng.normal(size=(1, 4, 8)).astype("f4"), rng.normal(size=(1, 4, 3)).astype("f4")
    before = reference.init_state(CFG, reference.init_memory(CFG), 1)
    _, after, trace = reference.apply(CFG, before, query, value, inplace=True)
    with pytest.raises(ValueError, match="inplace=True overwrites"):
        summarize(CFG, trace, before=before, after=after)


GOOD = trace_of([[[1, 2]] * 4])


@pytest.mark.parametrize(
    ("trace", "options", "words"),
    [
        ((1, 2), {}, "trace must be a fwpkm.LayerTrace or a fwpkm.Trace. Received: tuple"),
        (GOOD._replace(slots=GOOD.slots[:, :, :1]), {}, "shape [B, T, H*k=2]"),
        (GOOD._replace(slots=GOOD.slots + 8), {}, "ids of the N=9 slots of this config. Received: ids from 9 to 10"),
        (GOOD._replace(slots=GOOD.weights), {}, "must be integers"),
        (GOOD._replace(weights=GOOD.weights[:, :3]), {}, "trace.weights must have shape [B, T, H*k] = (1, 4, 2)"),
        (GOOD._replace(writes=np.zeros(2, "i4")), {}, "trace.writes must have shape [M] = (1,). Received: shape (2,)"),
        (GOOD._replace(addressing=np.zeros((1, 2))), {}, "trace.addressing must have shape [M, W] = (1, 1)"),
        (GOOD._replace(slots=[[1]]), {}, "trace.slots: expected an array of one of numpy, torch"),
        (LayerTrace(*GOOD, gate=np.ones((1, 3))), {}, "trace.gate must have shape [B, T] = (1, 4)"),
        (GOOD, {"before": 3}, "before must be the fwpkm.State that the call was given"),
        (GOOD, {"before": state_at(0, 0)}, "before.position must have shape [B] = (1,). Received: shape (2,)"),
        (GOOD, {"before": state_at(-1)}, "at least 0"),
        (GOOD, {"after": state_at(4)}, "before must be a fwpkm.State or a fwpkm.Memory"),
        (GOOD, {"before": state_at(0), "after": 3}, "after must be a fwpkm.State. Received: int"),
        (GOOD, {"before": state_at(0), "after": state_at(0, 0)}, "after must hold M=1 value tables"),
        (GOOD, {"cu_seqlens": np.array([0, 9], "i4")}, "cu_seqlens must begin with 0"),
        (GOOD, {"cu_seqlens": np.array([0.0, 4])}, "cu_seqlens must be integers"),
    ],
)
def test_what_does_not_fit_is_named(trace, options, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        summarize(CFG, trace, **options)
    assert words in str(caught.value)


def test_another_config_and_another_dtype_are_refused():
    with pytest.raises(ValueError, match="cfg must be an FwPKMConfig"):
        summarize({}, GOOD)
    wide = state_at(4)._replace(memory=Memory(*(x.astype("f8") for x in state_at(4).memory)))
    with pytest.raises(ValueError, match=r"tables of one dtype\. Received: float32 and float64"):
        summarize(CFG, GOOD, before=state_at(0), after=wide)


def test_traced_arrays_are_refused():
    trace = Trace(*(jax.numpy.asarray(x) for x in GOOD))
    with pytest.raises(ValueError, match=r"trace\.slots must hold numbers, which nothing does inside jax\.jit"):
        jax.jit(lambda trace: fwpkm.summarize(CFG, trace)["tokens"])(trace)
