"""Every sequence its own clock (SPEC.md §5): a batch is its rows, each of them alone, whatever is done to it.

A drawn life of a batch (padded and packed calls, flushes, resets, rows that are chosen, put and joined) runs beside one
state of one row for each sequence, which is only ever fed its own tokens, without padding.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from asserting import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from fwpkm import FwPKMConfig, Memory
from fwpkm.conformance.running import as_numpy, native
from fwpkm.conformance.strategies import OPTIONAL, configs, draw_memory, draw_tokens, floating, unmasked
from fwpkm.containers import State
from fwpkm.tokens import Tokens

ACTIONS = ("pad", "pack", "read only", "flush", "reset", "select", "put", "concat")
IN_PLACE = ("apply", "flush", "reset", "put")
DERIVED = ("select", "repeat", "concat", "put", "reset")


@dataclasses.dataclass
class Life:
    """A batch, and each of its rows alone."""

    be: Any
    cfg: FwPKMConfig
    rng: np.random.Generator
    batch: State
    rows: list[State]

    @classmethod
    def begin(cls, be: Any, cfg: FwPKMConfig, seed: int, size: int) -> "Life":
        rng = np.random.default_rng(seed)
        memory = native(be, draw_memory(rng, cfg, size))
        rows = [be.init_state(cfg, Memory(*(x[b : b + 1] for x in memory)), 1) for b in range(size)]
        return cls(be, cfg, rng, be.init_state(cfg, memory, size), rows)

    def pad(self, update: bool = True) -> None:
        """A call under a mask, or one without that gives each row as many tokens; what is masked holds NaN."""
        size, length = len(self.rows), int(self.rng.integers(0, 2 * self.cfg.chunk_size + 3))
        tokens = draw_tokens(self.rng, self.cfg, size, length, self.left_out())
        there = unmasked(tokens)
        for x in floating(tokens).values():
            if x is not None:
                x[~there] = self.rng.choice([np.nan, np.inf, 1e300])
        output, self.batch, trace = self.be.apply(
            self.cfg, self.batch, **native(self.be, tokens).present(), update=update
        )
        output, trace = as_numpy(self.be, output), as_numpy(self.be, trace)
        assert output.shape == (size, length, self.cfg.value_dim)
        for b, own in enumerate(there):
            alone = tokens._replace(mask=None).map(lambda x, b=b, own=own: x[b][own][None])
            self.compare(b, alone, update, output[b][own], trace, (b, own))
        assert not output[~there].any()
        assert not trace.slots[~there].any()
        assert not trace.weights[~there].any()

    def pack(self) -> None:
        """A packed call with empty sequences, masked tokens and a tail."""
        sizes = self.rng.choice([0, 1, 2, self.cfg.chunk_size, 2 * self.cfg.chunk_size + 1], len(self.rows))
        ends = np.cumsum([0, *sizes]).astype(np.int32)
        length = int(ends[-1]) + int(self.rng.integers(3))
        tokens = draw_tokens(self.rng, self.cfg, 1, length, self.left_out())
        there = unmasked(tokens)
        output, self.batch, trace = self.be.apply(
            self.cfg, self.batch, **native(self.be, tokens).present(), cu_seqlens=native(self.be, ends)
        )
        output, trace = as_numpy(self.be, output), as_numpy(self.be, trace)
        assert not output[0, ends[-1] :].any()
        for b, (start, stop) in enumerate(itertools.pairwise(ends)):
            own = start + np.flatnonzero(there[0, start:stop])
            alone = tokens._replace(mask=None).map(lambda x, own=own: x[0][own][None])
            self.compare(b, alone, True, output[0, own], trace, (0, own))

    def compare(self, b: int, alone: Tokens, update: bool, output: np.ndarray, trace: Any, at: Any) -> None:
        """One row of a call with the same tokens fed to its own state."""
        expected, self.rows[b], record = self.be.apply(
            self.cfg, self.rows[b], **native(self.be, alone).present(), update=update
        )
        record = as_numpy(self.be, record)
        assert_close(output, as_numpy(self.be, expected)[0], "float64")
        np.testing.assert_array_equal(trace.slots[at], record.slots[0])
        assert_close(trace.weights[at], record.weights[0], "float64")
        assert trace.writes[b] == record.writes[0]
        for name in ("memorization", "addressing"):
            losses, own = getattr(trace, name)[b], getattr(record, name)[0]
            assert_close(losses[: own.size], own, "float64")
            assert not losses[own.size :].any()

    def flush(self) -> None:
        chosen = self.some()
        self.batch, trace = self.be.flush(self.cfg, self.batch, self.named(chosen))
        trace = as_numpy(self.be, trace)
        for b in range(len(self.rows)):
            if b not in chosen:
                assert trace.writes[b] == 0
                continue
            self.rows[b], record = self.be.flush(self.cfg, self.rows[b])
            record = as_numpy(self.be, record)
            assert trace.writes[b] == record.writes[0]
            assert_close(trace.memorization[b], record.memorization[0], "float64")
            assert_close(trace.addressing[b], record.addressing[0], "float64")

    def reset(self) -> None:
        chosen, own = self.some(), bool(self.rng.integers(2))
        memory = native(self.be, Memory(*(x[: None if own else 1] for x in self.memory(len(self.rows)))))
        self.batch = self.be.reset(self.cfg, self.batch, memory, self.named(chosen))
        for b in chosen:
            self.rows[b] = self.be.init_state(self.cfg, Memory(*(x[b : b + 1] if own else x for x in memory)), 1)

    def select(self) -> None:
        ids = self.rng.integers(len(self.rows), size=self.rng.integers(1, 4)).tolist()
        self.batch, self.rows = self.be.select(self.cfg, self.batch, ids), [self.rows[b] for b in ids]

    def put(self) -> None:
        chosen = self.rng.permutation(self.some() or [0]).tolist()
        other = self.be.init_state(self.cfg, native(self.be, self.memory(len(chosen))), len(chosen))
        self.batch = self.be.put(self.cfg, self.batch, chosen, other)
        for i, b in enumerate(chosen):
            self.rows[b] = self.be.select(self.cfg, other, [i])

    def concat(self) -> None:
        if len(self.rows) < 4:
            other = self.be.init_state(self.cfg, native(self.be, self.memory(1)), 1)
            self.batch, self.rows = self.be.concat(self.cfg, [self.batch, other]), [*self.rows, other]

    def left_out(self) -> list[str]:
        """Fields that a call goes without."""
        return [name for name in OPTIONAL if self.rng.integers(2)]

    def memory(self, size: int) -> Memory:
        return draw_memory(self.rng, self.cfg, size)

    def some(self) -> list[int]:
        return np.flatnonzero(self.rng.integers(2, size=len(self.rows))).tolist()

    def named(self, chosen: list[int]) -> Any:
        """Rows as a caller may name them."""
        mask = np.isin(np.arange(len(self.rows)), chosen)
        every = len(chosen) == len(self.rows)
        return [chosen, mask, native(self.be, mask), None if every else chosen][self.rng.integers(4)]

    def check(self) -> None:
        """The batch is its rows, and says so."""
        batch, rows = as_numpy(self.be, self.batch), [as_numpy(self.be, row) for row in self.rows]
        for b, row in enumerate(rows):
            for name, x, alone in zip(Memory._fields, batch.memory, row.memory):
                assert_close(x[b], alone[0], "float64", name=f"row {b}: {name}")
            for (name, x), alone in zip(batch.pending._asdict().items(), row.pending):
                np.testing.assert_array_equal(x[b], alone[0], err_msg=f"row {b}: {name}")
            assert batch.position[b] == row.position[0]
        counts = [int(as_numpy(self.be, self.be.pending(self.cfg, row))[0]) for row in self.rows]
        assert as_numpy(self.be, self.be.pending(self.cfg, self.batch)).tolist() == counts


@given(
    cfg=configs(memory_scope="sequence"),
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 3),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=6),
)
def test_a_batch_is_each_of_its_rows_alone(be: Any, cfg: FwPKMConfig, seed: int, size: int, actions: list[str]) -> None:
    life = Life.begin(be, cfg, seed, size)
    for action in ["pad", *actions]:
        before = as_numpy(be, life.batch)
        kept = life.batch
        if action == "read only":
            life.pad(update=False)
            assert life.batch is kept
        else:
            getattr(life, action)()
        assert_same_bits(as_numpy(be, kept), before)  # states are values
        life.check()


@pytest.mark.eager
def test_positions_never_overflow(be: Any) -> None:
    """§5: only the place modulo C matters, so a far position is as good as a near one."""
    cfg = FwPKMConfig(key_dim=4, value_dim=3, num_subkeys=4, top_k=2, chunk_size=3, boundary="wait")
    rng = np.random.default_rng(0)
    memory, tokens = native(be, draw_memory(rng, cfg, 2)), native(be, draw_tokens(rng, cfg, 2, 11, ["mask"]))
    outputs = []
    for far in (0, (2**31 - 1) // 3 * 3 - 6):
        state = be.init_state(cfg, memory, 2)
        first, second = tokens.slice(0, 7), tokens.slice(7, 11)
        _, state, _ = be.apply(cfg, state, **first.present())
        position = as_numpy(be, state.position) + far
        state = state._replace(position=native(be, position.astype(np.int32)))
        output, state, _ = be.apply(cfg, state, **second.present())
        assert as_numpy(be, state.position).min() >= 0
        outputs.append((as_numpy(be, output), as_numpy(be, be.pending(cfg, state)), as_numpy(be, state.memory.values)))
    for near, far in zip(*outputs):
        np.testing.assert_array_equal(near, far)


@given(
    cfg=configs(memory_scope="sequence"),
    seed=st.integers(0, 2**32 - 1),
    derived=st.sampled_from(DERIVED),
    call=st.sampled_from(IN_PLACE),
    turned=st.booleans(),
)
def test_a_state_stays_as_it_was_beside_an_inplace_call(
    be: Any, cfg: FwPKMConfig, seed: int, derived: str, call: str, turned: bool
) -> None:
    """A state made of another's rows, and that other: whichever is overwritten, it reads as if it were not."""
    life = Life.begin(be, cfg, seed, 2)
    life.pad()
    first, other = life.batch, be.init_state(cfg, native(be, life.memory(2)), 2)
    second = {
        "select": lambda: be.select(cfg, first, life.rng.permutation(2)),
        "repeat": lambda: be.select(cfg, first, [1] * int(life.rng.integers(1, 3))),
        "concat": lambda: be.concat(cfg, [first]),
        "put": lambda: be.put(cfg, other, [1, 0], first),
        "reset": lambda: be.reset(cfg, first, native(be, life.memory(1)), [0]),
    }[derived]()
    changed, kept = (first, second) if turned else (second, first)
    before, size = as_numpy(be, (changed, kept)), len(as_numpy(be, changed.position))
    tokens = native(be, draw_tokens(life.rng, cfg, size, cfg.chunk_size + cfg.lookahead))
    fresh = be.init_state(cfg, native(be, life.memory(1)), 1)

    def call_on(state: State, inplace: bool) -> State:
        return {
            "apply": lambda: be.apply(cfg, state, **tokens.present(), inplace=inplace)[1],
            "flush": lambda: be.flush(cfg, state, inplace=inplace)[0],
            "reset": lambda: be.reset(cfg, state, fresh.memory, [0], inplace=inplace),
            "put": lambda: be.put(cfg, state, [size - 1], fresh, inplace=inplace),
        }[call]()

    expected = as_numpy(be, call_on(changed, False))
    assert_same_bits(as_numpy(be, changed), before[0])
    assert_same_bits(as_numpy(be, call_on(changed, True)), expected)
    assert_same_bits(as_numpy(be, kept), before[1])
