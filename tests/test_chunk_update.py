"""One write (SPEC.md §3 and §4) against autograd of its two losses, written here from their definitions."""

import dataclasses

import numpy as np
import torch
from asserting import assert_close, assert_same_bits
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st

from fwpkm import FwPKMConfig, Memory
from fwpkm.conformance.running import apply, as_numpy, native, start
from fwpkm.conformance.strategies import FLOATS, Case, cases, unmasked
from fwpkm.tokens import Tokens

PAIRS = st.sampled_from([None, 0.0, 0.5, 1.0])


def selections(cfg, keys, query):
    """What the tokens ``query`` [n, H*Dk] select from one memory: sub-scores, p, sub-keys, sums and slots by head."""
    halves = query.reshape(len(query), cfg.num_heads, 2, 1, -1)
    if cfg.score == "idw":
        scores = -torch.log(cfg.score_eps + ((halves - keys) ** 2).sum(-1))
    else:
        scores = (halves * keys).sum(-1)
    chosen, subkeys = torch.topk(scores, cfg.top_k)  # [n, H, 2, k]
    grid = (chosen[:, :, 0, :, None] + chosen[:, :, 1, None, :]).flatten(2)
    sums, cells = torch.topk(grid, cfg.top_k)
    first, second = subkeys[:, :, 0].gather(-1, cells // cfg.top_k), subkeys[:, :, 1].gather(-1, cells % cfg.top_k)
    p = torch.zeros_like(scores).scatter(-1, subkeys, torch.softmax(chosen, -1))
    return p, sums.flatten(1), (first * cfg.num_subkeys + second).flatten(1)


def addressing_loss(p, mask):
    """L_addr of one memory from p [n, H, 2, S]."""
    mean = p[mask].mean(0)
    return (mean * torch.log(mean + 1e-8)).sum()


def expected_write(cfg, memory, query, target, gate, mask, pair):
    """One memory after its chunk, and its losses; tokens [n, ...] of all the rows that share it, as float64 tensors."""
    keys, values = (table.clone().requires_grad_() for table in memory)
    if not pair.any():
        return Memory(keys.detach(), values.detach()), (0.0, 0.0)
    p, sums, slots = selections(cfg, keys, query)
    addressing = addressing_loss(p, mask)
    weights = torch.softmax(sums.detach() / cfg.temperature, -1)
    read = (weights[..., None] * values[slots]).sum(1)
    each = 0.5 * gate * ((target - read) ** 2).sum(-1)
    scale = {"slots": cfg.num_heads * cfg.top_k, "unit": 1.0, "normalized": 1 / (weights**2).sum(-1)}[cfg.write_scale]
    (d_keys,) = torch.autograd.grad(addressing, keys)
    (d_values,) = torch.autograd.grad((scale * each)[pair].sum(), values)
    count = torch.zeros(cfg.num_slots, dtype=torch.float64)
    for slot in slots[mask].flatten().tolist():
        count[slot] += 1
    bound = float("inf") if cfg.grad_clip is None else cfg.grad_clip
    gradient = (d_values / count.clamp(min=1)[:, None]).clamp(-bound, bound)
    d_keys = (cfg.addressing_weight * d_keys).clamp(-bound, bound)
    stepped = values - cfg.learning_rate * (gradient + cfg.weight_decay * values)
    new = torch.where(count[:, None] > 0, stepped, values)
    moved = keys - cfg.learning_rate * (d_keys + cfg.weight_decay * keys)
    return Memory(moved.detach(), new.detach()), (each[pair].sum().item(), addressing.item())


def chunk_arguments(case, pair_rate):
    """The case's tokens as one chunk: values are targets; a pair only where unmasked."""
    tokens = case.tokens
    rng = np.random.default_rng(case.seed)
    pair = None if pair_rate is None else (rng.uniform(size=(case.batch, case.length)) < pair_rate) & unmasked(tokens)
    return (tokens.query, tokens.value, tokens.gate, tokens.mask, pair)


def write(be, cfg, memory, arguments):
    cfg = dataclasses.replace(cfg, usage_weight=0.0)  # tables alone keep no uses
    return as_numpy(be, be.chunk_update(cfg, native(be, memory), *native(be, tuple(arguments))))


@given(cases(untied=True, dtype=FLOATS), PAIRS)
def test_a_write_is_a_step_down_the_gradients_of_its_losses(be, case, pair_rate):
    """The closed forms of §4, N_i, κ, clipping and decay, all at once, for every memory alone."""
    cfg, arguments = case.cfg, chunk_arguments(case, pair_rate)
    memory, losses = write(be, cfg, case.memory, arguments)
    masked = ~unmasked(case.tokens)
    for x in arguments:
        if x is not None:
            x[masked] = 0  # what a backend takes as not there, whatever it holds
    query, target, gate, mask, pair = (None if x is None else torch.tensor(x) for x in arguments)
    gate = torch.ones(case.batch, case.length) if gate is None else gate
    mask = torch.tensor(unmasked(case.tokens)) if mask is None else mask
    pair = mask if pair is None else pair
    for m in range(len(case.memory.keys)):
        rows = slice(m, m + 1) if cfg.memory_scope == "sequence" else slice(None)
        tokens = (x[rows].flatten(0, 1).double() for x in (query, target, gate))
        flags = (x[rows].flatten() for x in (mask, pair))
        tables = Memory(*(torch.tensor(table[m]).double() for table in case.memory))
        expected, expected_losses = expected_write(cfg, tables, *tokens, *flags)
        assert_close(Memory(*(table[m] for table in memory)), Memory(*map(np.asarray, expected)), case.dtype)
        for loss, expected_loss in zip(losses, expected_losses):
            assert_close(loss[m], np.array(expected_loss), case.dtype)


@given(cases(untied=True, min_length=12))
def test_a_write_equals_apply_over_one_chunk(be, case):
    """Each memory's first C ticks, and under "wait" L more: those of its own clock."""
    cfg, live = case.cfg, unmasked(case.tokens)
    size, ahead = cfg.chunk_size, cfg.lookahead
    needed = size + (ahead if cfg.boundary == "wait" else 0)
    own_clocks = cfg.memory_scope == "sequence"
    target, (counted, pair) = np.zeros_like(case.tokens.value), np.zeros((2, *live.shape), bool)
    for row in range(case.batch):
        ticks = np.flatnonzero(live[row] | (not own_clocks))
        live[row, ticks[needed:]] = False
        counted[row, ticks[:size]] = live[row, ticks[:size]]
        for t, partner in zip(ticks[:size], ticks[ahead:needed]):
            target[row, t], pair[row, t] = case.tokens.value[row, partner], live[row, t] & live[row, partner]
    tokens = case.tokens._replace(mask=live)
    _, state, trace = apply(be, cfg, start(be, case), tokens if own_clocks else tokens.slice(0, needed))
    due = live.sum(1) == needed if own_clocks else np.ones(1, bool)
    chunk = (case.tokens.query, target, case.tokens.gate, counted, pair & np.broadcast_to(due[:, None], live.shape))
    memory, losses = write(be, cfg, case.memory, chunk)
    np.testing.assert_array_equal(trace.writes, due)
    assert_close(as_numpy(be, state.memory), memory, case.dtype)
    assert_close(trace.memorization[:, 0], losses.memorization, case.dtype)
    assert_close(trace.addressing[:, 0], losses.addressing, case.dtype)


@given(cases(dtype=FLOATS), PAIRS)
def test_slots_that_no_unmasked_token_reads_keep_their_bits(be, case, pair_rate):
    """Weight decay or not; and all of a memory, keys too, where its chunk has no pair, with losses of 0."""
    cfg, arguments = case.cfg, chunk_arguments(case, pair_rate)
    memory, losses = write(be, cfg, case.memory, arguments)
    slots = as_numpy(be, be.lookup(cfg, native(be, case.memory), native(be, case.tokens.query)).slots)
    live = unmasked(case.tokens)
    pair = live if arguments[-1] is None else arguments[-1]
    for m in range(len(case.memory.keys)):
        rows = slice(m, m + 1) if cfg.memory_scope == "sequence" else slice(None)
        unread = np.ones(cfg.num_slots, bool)
        unread[slots[rows][live[rows]]] = False
        if not pair[rows].any():
            unread[:] = True
            assert_same_bits(memory.keys[m], case.memory.keys[m])
            assert losses.memorization[m] == losses.addressing[m] == 0
        assert_same_bits(memory.values[m][unread], case.memory.values[m][unread])


@given(
    cases(
        write_scale="normalized",
        num_heads=1,
        learning_rate=1.0,
        weight_decay=0.0,
        grad_clip=None,
        addressing_weight=0.0,
        left_out=st.sampled_from([["gate"], ["gate", "mask"]]),
        min_length=1,
    )
)
def test_normalized_rewrites_exactly_where_nothing_else_reads(be, case):
    """§4: with g = η = 1 and H = 1, reading such a token again gives its target; the keys stay, for α = 0."""
    cfg, arguments = case.cfg, chunk_arguments(case, None)
    slots = as_numpy(be, be.lookup(cfg, native(be, case.memory), native(be, case.tokens.query)).slots)
    memory, _ = write(be, cfg, case.memory, arguments)
    again = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, case.tokens.query)).output)
    live = unmasked(case.tokens)
    for row, t in np.argwhere(live).tolist():
        others = live.copy()
        if cfg.memory_scope == "sequence":
            others[:row] = others[row + 1 :] = False
        others[row, t] = False
        if not np.isin(slots[others], slots[row, t]).any():
            assert_close(again[row, t], case.tokens.value[row, t], "float64")


def test_normalized_rewrites_one_token(be):
    """The rule above, where it cannot be vacuous."""
    cfg = FwPKMConfig(4, 3, 1, 5, 3, 1, 0, write_scale="normalized", addressing_weight=0.0)
    case = drawn(cfg, 2, 1, seed=3, left_out=["gate", "mask"])
    written, _ = write(be, cfg, case.memory, (case.tokens.query, case.tokens.value))
    again = as_numpy(be, be.lookup(cfg, native(be, written), native(be, case.tokens.query)).output)
    assert_close(again, case.tokens.value, "float64")


def test_heads_address_apart(be):
    """§3 sums L_addr over heads, each with its own mean: a head's keys move as they would without the other head."""
    one = FwPKMConfig(4, 2, 1, 5, 3, 4, 0)
    two = dataclasses.replace(one, num_heads=2)
    case = drawn(two, 1, 6, seed=5)
    both, losses = write(be, two, case.memory, tuple(case.tokens))
    alone = []
    for head in (0, 1):
        tables = case.memory._replace(keys=case.memory.keys[:, head : head + 1])
        query = case.tokens.query[..., 4 * head : 4 * head + 4]
        written, loss = write(be, one, tables, (query, *tuple(case.tokens)[1:]))
        assert_close(both.keys[:, head], written.keys[:, 0], "float64")
        alone.append(loss.addressing)
    assert_close(losses.addressing, sum(alone), "float64")


@given(cases(untied=True), st.integers(0, 2**32 - 1))
def test_only_the_memorization_loss_moves_values_and_only_the_addressing_loss_moves_keys(be, case, seed):
    """Other targets and gates leave the keys; another α leaves the values."""
    cfg, arguments = case.cfg, chunk_arguments(case, 1.0)
    memory, losses = write(be, cfg, case.memory, arguments)
    rng = np.random.default_rng(seed)
    target, gate = rng.normal(size=arguments[1].shape), rng.uniform(size=arguments[0].shape[:2])
    other, _ = write(be, cfg, case.memory, (arguments[0], target, gate, *arguments[3:]))
    assert_same_bits(other.keys, memory.keys)
    steeper = dataclasses.replace(cfg, addressing_weight=cfg.addressing_weight + 1)
    other, other_losses = write(be, steeper, case.memory, arguments)
    assert_same_bits(other.values, memory.values)
    assert_close(other_losses, losses, case.dtype)


def test_pairs_across_a_chunks_end(be):
    """By hand, one slot and κ = 1: the row moves by a third of each pair's error; "drop" loses the last pair."""
    rows = {}
    for boundary, targets in (("drop", [2.0, 3.0]), ("wait", [2.0, 3.0, 4.0])):
        cfg = FwPKMConfig(2, 1, 1, 1, 1, 3, 1, boundary=boundary, write_scale="unit")
        tokens = Tokens(np.ones((1, 6, 2)), np.arange(1.0, 7.0).reshape(1, 6, 1), None, None)
        memory = Memory(np.zeros((1, 1, 2, 1, 1)), np.full((1, 1, 1), 10.0))
        case = Case(cfg, 0, "float64", frozenset(), 1, 6, memory, tokens)
        _, state, _ = apply(be, cfg, start(be, case), tokens.slice(0, 4 if boundary == "wait" else 3))
        rows[boundary] = as_numpy(be, state.memory.values).item()
        assert_close(np.array(rows[boundary]), np.array(10.0 + sum(u - 10.0 for u in targets) / 3), "float64")
    assert rows["drop"] != rows["wait"]
