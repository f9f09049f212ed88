"""The schedule (SPEC.md §5) against a stream that is walked token by token."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwpkm import FwPKMConfig, schedule

BOUNDARIES = ("drop", "wait")
SMALL = [(c, lookahead, b) for c in range(1, 6) for lookahead in range(c) for b in BOUNDARIES]


class Stream(NamedTuple):
    """What §5 says of the first tokens since the count began."""

    reads: list[int]
    """For each token, how many chunks had been written when it was read."""
    pending: list[list[int]]
    """After n = 0, 1, ... tokens, the tokens that wait to be written or to serve as targets."""
    written_at: list[int]
    """How many tokens had been read when chunk c was written."""


def walk(chunk_size: int, lookahead: int, boundary: str, length: int) -> Stream:
    reads, pending, written_at = [], [[]], []
    waiting: list[int] = []
    for token in range(length):
        reads.append(len(written_at))
        waiting = [*waiting, token]
        first_after_chunk = (len(written_at) + 1) * chunk_size
        last_needed = first_after_chunk - 1 if boundary == "drop" else first_after_chunk + lookahead - 1
        if token == last_needed:
            written_at.append(token + 1)
            waiting = [t for t in waiting if t >= first_after_chunk]
        pending.append(waiting)
    return Stream(reads, pending, written_at)


def config(chunk_size: int, lookahead: int, boundary: str) -> FwPKMConfig:
    return FwPKMConfig(chunk_size=chunk_size, lookahead=lookahead, boundary=boundary)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, str]:
    chunk_size = draw(st.integers(1, 9))
    return chunk_size, draw(st.integers(0, chunk_size - 1)), draw(st.sampled_from(BOUNDARIES))


@pytest.mark.parametrize(("chunk_size", "lookahead", "boundary"), SMALL)
def test_counts_follow_the_stream(chunk_size: int, lookahead: int, boundary: str) -> None:
    cfg, length = config(chunk_size, lookahead, boundary), 6 * chunk_size + 5
    stream = walk(chunk_size, lookahead, boundary, length)
    for n in range(length + 1):
        writes = sum(at <= n for at in stream.written_at)
        assert schedule.written(cfg, n) == writes
        assert schedule.pending(cfg, n) == len(stream.pending[n])
        assert stream.pending[n] == list(range(writes * chunk_size, n))


@pytest.mark.parametrize(("chunk_size", "lookahead", "boundary"), SMALL)
def test_valid_entries_formula(chunk_size: int, lookahead: int, boundary: str) -> None:
    """§5: ``position mod C`` under drop; under wait ``position`` below C + L, then L + (position - L) mod C."""
    cfg = config(chunk_size, lookahead, boundary)
    for n in range(6 * chunk_size + 5):
        if boundary == "drop":
            entries = n % chunk_size
        elif n < chunk_size + lookahead:
            entries = n
        else:
            entries = lookahead + (n - lookahead) % chunk_size
        assert schedule.pending(cfg, n) == entries


@pytest.mark.parametrize(("chunk_size", "lookahead", "boundary"), SMALL)
def test_capacity_is_never_exceeded_and_reached_under_wait(chunk_size: int, lookahead: int, boundary: str) -> None:
    cfg = config(chunk_size, lookahead, boundary)
    assert cfg.capacity == chunk_size + lookahead - 1
    counts = [schedule.pending(cfg, n) for n in range(6 * chunk_size + 5)]
    assert min(counts) == 0
    assert max(counts) == chunk_size - 1 + (lookahead if boundary == "wait" else 0)
    assert max(counts) <= cfg.capacity


@given(sizes=sizes(), calls=st.lists(st.integers(0, 25), max_size=8))
def test_segments_of_any_split_follow_the_stream(sizes: tuple[int, int, str], calls: list[int]) -> None:
    cfg = config(*sizes)
    stream = walk(*sizes, sum(calls))
    reads: list[int] = []
    written_at: list[int] = []
    position = 0
    for length in calls:
        start = 0
        for segment in schedule.windows(cfg, position, length):
            assert segment.start == start
            assert segment.stop > segment.start
            reads += [len(written_at)] * (segment.stop - segment.start)
            if segment.writes:
                waiting = schedule.pending(cfg, position + segment.start) + segment.stop - segment.start
                assert waiting == cfg.chunk_size + schedule.lag(cfg)
                written_at.append(position + segment.stop)
            start = segment.stop
        assert start == length
        position += length
    assert reads == stream.reads
    assert written_at == stream.written_at


@given(sizes=sizes(), position=st.integers(0, schedule.MAX_POSITION - 60), length=st.integers(0, 60))
def test_segments_far_into_a_stream(sizes: tuple[int, int, str], position: int, length: int) -> None:
    """A stream's schedule repeats every C tokens, so a far position is walked from a near one."""
    cfg = config(*sizes)
    near = position if position < 3 * cfg.chunk_size else 2 * cfg.chunk_size + position % cfg.chunk_size
    written_at = walk(*sizes, near + length).written_at
    ends = [s.stop for s in schedule.windows(cfg, position, length) if s.writes]
    assert ends == [at - near for at in written_at if at > near]
    assert schedule.written(cfg, position + length) - schedule.written(cfg, position) == len(ends)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("chunk_size", "lookahead", "boundary"), SMALL)
def test_arrays_count_as_integers_do(chunk_size: int, lookahead: int, boundary: str, dtype: type) -> None:
    cfg = config(chunk_size, lookahead, boundary)
    positions = list(range(40))
    array = np.array(positions, dtype)
    for function in (schedule.written, schedule.pending):
        counts = function(cfg, array)
        assert counts.dtype == dtype
        assert counts.tolist() == [function(cfg, n) for n in positions]
    waiting = schedule.pending(cfg, array)
    assert schedule.flush_writes(cfg, waiting).tolist() == [schedule.flush_writes(cfg, int(n)) for n in waiting]


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_int32_arrays_count_up_to_the_last_position(chunk_size: int, boundary: str) -> None:
    cfg = config(chunk_size, 0, boundary)
    positions = [schedule.MAX_POSITION - n for n in range(4)]
    array = np.array(positions, np.int32)
    for function in (schedule.written, schedule.pending):
        assert function(cfg, array).tolist() == [function(cfg, n) for n in positions]


@pytest.mark.parametrize(("chunk_size", "lookahead", "boundary"), SMALL)
def test_max_writes_is_the_most_that_any_position_sees(chunk_size: int, lookahead: int, boundary: str) -> None:
    cfg = config(chunk_size, lookahead, boundary)
    for length in range(4 * chunk_size + 2):
        stream = walk(chunk_size, lookahead, boundary, 3 * chunk_size + length)
        seen = [sum(start < at <= start + length for at in stream.written_at) for start in range(3 * chunk_size)]
        assert schedule.max_writes(cfg, length) == max(seen)


@pytest.mark.parametrize(("chunk_size", "lookahead", "boundary"), SMALL)
def test_flush_writes_when_a_chunk_is_pending(chunk_size: int, lookahead: int, boundary: str) -> None:
    """§8: a flush has a write if a chunk was pending; under wait, if more than L tokens were."""
    cfg = config(chunk_size, lookahead, boundary)
    for waiting in walk(chunk_size, lookahead, boundary, 4 * chunk_size).pending:
        needed = 1 if boundary == "drop" else lookahead + 1
        assert schedule.flush_writes(cfg, len(waiting)) == int(len(waiting) >= needed)
