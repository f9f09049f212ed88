"""``fwpkm.Recorder``: a recording says who wrote each slot, survives kill -9, and nothing foreign passes for one."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from recordings import CFG, HOSTILE, changed_slots, reading, record

import fwpkm
from fwpkm import FwPKMConfig, Memory, Recorder, reference
from fwpkm.diagnostics.history import KEPT, read_history
from fwpkm.diagnostics.record import MAGIC, open_recording


def history_of(path):
    recording = open_recording(path)
    assert recording.cut == 0
    return read_history(recording.config, recording.entries())


# Who wrote what


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"boundary": "wait", "lookahead": 3},
        {"lookahead": 0},
        {"memory_scope": "batch"},
        {"memory_scope": "batch", "boundary": "wait"},
    ],
    ids=str,
)
def test_the_written_slots_are_those_whose_rows_changed(tmp_path, options):
    """Addressing moves the keys; without it the slots that a write rereads under "wait" are those of the first read."""
    cfg = dataclasses.replace(CFG, **options, addressing_weight=0.0)
    steps = record(tmp_path / "r", cfg)
    history = history_of(tmp_path / "r")
    memories = 2 if cfg.memory_scope == "sequence" else 1
    assert len(history.memories) == memories
    for m, slots in enumerate(history.memories):
        assert set(slots.slot.tolist()) == changed_slots(cfg, steps, m) != set()


def test_every_writer_is_counted_once_a_token(tmp_path):
    """By hand: no token of row 0 is masked, so they stand at 0, 1, ...; the last of each chunk of 8 has no pair."""
    steps = record(tmp_path / "r")
    history = history_of(tmp_path / "r")
    reads = np.concatenate([step.trace.slots[0] for step in steps])
    dead = 5 + 7 + 3
    writers = defaultdict(list)
    for token in range(33):
        if token % 8 != 7 and token < 32 and dead not in (token, token + 1):
            for slot in set(reads[token].tolist()):
                writers[slot].append(token)
    found = history.memories[0]
    assert found.slot.tolist() == sorted(writers)
    for slot, count, chunks, recent in zip(found.slot, found.writers, found.chunks, found.recent):
        assert count == len(writers[slot])
        assert chunks == len({token // 8 for token in writers[slot]})
        assert [(row, number) for row, number, _ in recent] == [(0, t) for t in writers[slot][::-1][:KEPT]]
    weights = np.concatenate([step.trace.weights[0] for step in steps])
    slot = int(found.slot[0])
    token = writers[slot][-1]
    assert found.recent[0][0][2] == pytest.approx(weights[token][reads[token] == slot].sum())
    assert history.chunks == (4 + 1) + (3 + 1)  # the flush found one token of row 0, and two of row 1
    assert history.rows[0].text[dead + 2 : dead + 2 + len(HOSTILE)] == HOSTILE
    assert history.rows[0].live.tolist() == [token != dead for token in range(33)]
    assert [len(row.live) for row in history.rows] == [33, 26]


def test_norms_are_those_of_the_tables(tmp_path):
    steps = record(tmp_path / "r")
    norms = history_of(tmp_path / "r").norms[1]
    expected = np.linalg.norm(steps[-1].options["after"].memory.values[1], axis=1)
    np.testing.assert_allclose(norms.last, expected, rtol=1e-6)
    assert norms.tokens == [3, 8, 26, 26]  # at first, and after each call that wrote
    np.testing.assert_allclose(norms.quantiles[-1], np.percentile(expected, [0, 25, 50, 75, 100]), rtol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_arrays_of_any_backend(tmp_path, backend):
    be = fwpkm.get_backend(backend)
    steps = [next(reading(be=be, sizes=(16,)))]
    with Recorder(tmp_path / "r", CFG) as recorder:
        recorder.write(steps[0].trace, **steps[0].options)
    slots = history_of(tmp_path / "r").memories[0].slot
    assert set(slots.tolist()) == changed_slots(CFG, steps, 0)


def test_packed_sequences_and_calls_without_a_state(tmp_path):
    """Each packed call begins its sequences anew: their tokens follow in the row, their chunks do not mix."""
    rng = np.random.default_rng(0)
    query, value = rng.normal(size=(1, 20, 16)).astype("f4"), rng.normal(size=(1, 20, 4)).astype("f4")
    ends = np.array([0, 11, 20], np.int32)
    memory = reference.init_memory(CFG)
    _, _, trace = reference.apply(CFG, memory, query, value, cu_seqlens=ends)
    with Recorder(tmp_path / "r", CFG) as recorder:
        for _ in range(2):
            recorder.write(trace, cu_seqlens=ends, text=["abcdefghijklmnopqrst"])
    history = history_of(tmp_path / "r")
    assert history.chunks == 4
    assert "".join(history.rows[1].text) == "lmnopqrst" * 2
    assert history.norms == [None, None]
    first = set(trace.slots[0, :7].reshape(-1).tolist())  # of a chunk of 8 the last token has no pair
    assert set(history.memories[0].slot.tolist()) == first
    assert set(history.memories[0].writers.tolist()) <= {2, 4, 6, 8}


def test_what_was_only_read_writes_nothing(tmp_path):
    rng = np.random.default_rng(0)
    query, value = rng.normal(size=(1, 6, 16)).astype("f4"), rng.normal(size=(1, 6, 4)).astype("f4")
    state = reference.init_state(CFG, reference.init_memory(CFG), 1)
    with Recorder(tmp_path / "r", CFG) as recorder:
        for update in (True, False, True):
            _, after, trace = reference.apply(CFG, state, query, value, update=update)
            recorder.write(trace, before=state, after=after)
            state = after
    history = history_of(tmp_path / "r")
    numbers = {number for found in history.memories[0].recent for _, number, _ in found}
    assert numbers == {*range(6), 12}  # 13 is the last of the chunk; 6 to 11 were read without writing
    assert history.rows[0].text is None


def test_what_a_row_had_pending_is_not_written_by_another_sequence(tmp_path):
    """Row 0 is begun anew after 5 tokens, as by ``reset``: of its first chunk those 5 are no writers."""
    rng = np.random.default_rng(0)
    fresh = reference.init_state(CFG, reference.init_memory(CFG), 1)
    with Recorder(tmp_path / "r", CFG) as recorder:
        for size in (5, 8):
            query, value = rng.normal(size=(1, size, 16)).astype("f4"), rng.normal(size=(1, size, 4)).astype("f4")
            _, after, trace = reference.apply(CFG, fresh, query, value)
            recorder.write(trace, before=fresh, after=after)
    recent = history_of(tmp_path / "r").memories[0].recent
    assert {number for found in recent for _, number, _ in found} == set(range(5, 12))


@pytest.mark.parametrize("order", [[0, 2], [0, 1, 1]], ids=["left out", "repeated"])
def test_calls_that_do_not_follow_on_are_refused(tmp_path, order):
    steps = list(reading())
    with Recorder(tmp_path / "r", CFG) as recorder:
        *before, last = [(steps[i].trace, steps[i].options) for i in order]
        for trace, options in before:
            recorder.write(trace, **options)
        size = (tmp_path / "r").stat().st_size
        with pytest.raises(ValueError, match=r"before must stand where the last call .* row 0, at \d+, or at 0"):
            recorder.write(last[0], **last[1])
        assert (tmp_path / "r").stat().st_size == size


def test_two_layers_in_one_recording_are_refused(tmp_path):
    """Both read the same tokens: the second stands where the first began, and then where it ended before."""
    with Recorder(tmp_path / "r", CFG) as recorder:
        first, second = reading(), reading()
        for step in (next(first), next(second), next(first)):
            recorder.write(step.trace, **step.options)
        step = next(second)
        with pytest.raises(
            ValueError, match=r"other layers or batches in recordings of their own. Received: row 0 at 5"
        ):
            recorder.write(step.trace, **step.options)


def test_a_state_that_was_not_recorded_is_refused(tmp_path):
    steps = list(reading())
    with Recorder(tmp_path / "r", CFG) as recorder:
        recorder.write(steps[0].trace)
        with pytest.raises(ValueError, match=r"row 0, without a state .pass after="):
            recorder.write(steps[1].trace, **steps[1].options)


# The file


def test_a_path_that_exists_is_kept_unless_told(tmp_path):
    path = tmp_path / "r"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists already\. Pass overwrite=True"):
        Recorder(path, CFG)
    assert path.read_text() == "mine"
    Recorder(path, CFG, overwrite=True).close()
    assert open_recording(path).config == CFG
    with pytest.raises(FileNotFoundError):
        Recorder(tmp_path / "none" / "r", CFG)
    with pytest.raises(IsADirectoryError):
        Recorder(tmp_path, CFG, overwrite=True)
    with pytest.raises(ValueError, match="overwrite must be True or False"):
        Recorder(path, CFG, overwrite=1)


KILLED = """
import itertools, sys
from recordings import CFG, reading
from fwpkm import Recorder
recorder = Recorder(sys.argv[1], CFG)
steps = list(reading())
for number in itertools.count():
    for step in steps:
        recorder.write(step.trace, **step.options)
    print(number, flush=True)
"""


def test_what_was_written_is_readable_after_kill_9(tmp_path):
    """The child is killed while it writes; what it has said that it wrote must be there."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r")]
    paths = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})
    said = [int(child.stdout.readline()) for _ in range(3)][-1]
    child.send_signal(signal.SIGKILL)
    said = max([said, *map(int, child.stdout.read().split())])
    child.stdout.close()
    child.wait()
    recording = open_recording(tmp_path / "r")
    assert sum(1 for _ in recording.entries()) >= 5 * (said + 1)


def test_a_recording_that_is_cut_anywhere_keeps_its_whole_entries(tmp_path):
    path = tmp_path / "r"
    record(path)
    whole, recording = path.read_bytes(), open_recording(path)
    assert recording.size == len(whole)
    counts = []
    for size in range(len(MAGIC) + 400, len(whole), 173):
        path.write_bytes(whole[:size])
        found = open_recording(path)
        assert found.size + found.cut == size
        counts.append(sum(1 for _ in found.entries()))
        read_history(found.config, found.entries())
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 4)
    path.write_bytes(whole[: len(MAGIC) + 20])
    with pytest.raises(ValueError, match="stopped before it held its config"):
        open_recording(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no recording.*an empty file"),
        (b"\x89PNG\r\n\x1a\n" * 9, "no recording.*Expected: a file of fwpkm.Recorder"),
    ],
)
def test_foreign_files_are_refused(tmp_path, data, words):
    path = tmp_path / "r"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        open_recording(path)


def test_flipped_bits_are_found(tmp_path):
    path = tmp_path / "r"
    record(path)
    whole = path.read_bytes()
    for at in range(len(MAGIC), len(whole), 1009):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="damaged or was edited"):
            open_recording(path)


def test_a_config_of_a_later_release_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(FwPKMConfig, "to_json", lambda self: '{"forget": 0.5}')
    Recorder(tmp_path / "r", CFG).close()
    with pytest.raises(ValueError, match=r"config that this release does not know.*forget"):
        open_recording(tmp_path / "r")


def test_entries_of_another_config_are_refused(tmp_path):
    """As when two recordings were joined by hand: every checksum is right."""
    small = dataclasses.replace(CFG, num_heads=1)
    record(tmp_path / "a")
    record(tmp_path / "b", small)
    Recorder(tmp_path / "c", CFG).close()
    Recorder(tmp_path / "d", small).close()
    heads = [(tmp_path / name).read_bytes() for name in "cd"]
    joined = heads[0] + (tmp_path / "b").read_bytes()[len(heads[1]) :]
    (tmp_path / "a").write_bytes(joined)
    recording = open_recording(tmp_path / "a")
    with pytest.raises(ValueError, match="do not fit the recording's config"):
        list(recording.entries())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trace": 3}, "trace must be a fwpkm.LayerTrace"),
        ({"text": ["ab"]}, r"text must have a row for each of B=2.*Received: rows of \[2\] strings"),
        ({"text": "ab"}, "Received: str"),
        ({"text": [[1] * 5] * 2}, "text must hold strings. Received: 1, of type int"),
        ({"after": 3}, "state must be a fwpkm.State"),
        ({"before": 3}, "before must be the fwpkm.State"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, change, words):
    step = next(reading())
    options = {"trace": step.trace, **step.options, **change}
    with Recorder(tmp_path / "r", CFG) as recorder:
        size = (tmp_path / "r").stat().st_size
        with pytest.raises(ValueError, match=words):
            recorder.write(options.pop("trace"), **options)
        assert (tmp_path / "r").stat().st_size == size
        recorder.write(step.trace, **step.options)
    assert history_of(tmp_path / "r").calls == 1


def test_another_config_and_a_state_of_other_rows_are_refused(tmp_path):
    step = next(reading())
    with (
        Recorder(tmp_path / "r", dataclasses.replace(CFG, top_k=3)) as recorder,
        pytest.raises(ValueError, match=r"H\*k=6"),
    ):
        recorder.write(step.trace, **step.options)
    one = reference.init_state(CFG, reference.init_memory(CFG), 1)
    odd = step.options["after"]._replace(memory=Memory(*(x[:1] for x in step.options["after"].memory)))
    with Recorder(tmp_path / "s", CFG) as recorder:
        with pytest.raises(ValueError, match="after must be a state of B=2 rows"):
            recorder.write(step.trace, after=one)
        with pytest.raises(ValueError, match=r"after\.memory\.values must have shape"):
            recorder.write(step.trace, after=odd)
    with pytest.raises(ValueError, match="is closed"):
        recorder.write(step.trace)
    with pytest.raises(ValueError, match="cfg must be an FwPKMConfig"):
        Recorder(tmp_path / "t", None)
    assert not (tmp_path / "t").exists()


def test_a_full_disk_leaves_the_whole_entries(tmp_path):
    """The disk takes half of an entry; once there is space again, the recording goes on."""
    steps = list(reading())
    with Recorder(tmp_path / "r", CFG) as recorder:
        recorder.write(steps[0].trace, **steps[0].options)
        file = recorder._file

        class Full:
            def write(self, data):
                if len(data) < 900:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data[:500])

            def __getattr__(self, name):
                return getattr(file, name)

        recorder._file = Full()
        with pytest.raises(OSError, match="No space left"):
            recorder.write(steps[1].trace, **steps[1].options)
        recorder._file = file
        found = open_recording(tmp_path / "r")
        assert (sum(1 for _ in found.entries()), found.cut) == (1, 0)
        recorder.write(steps[1].trace, **steps[1].options)
    assert history_of(tmp_path / "r").calls == 2


def test_memory_does_not_grow_with_the_recording(tmp_path):
    """What the recorder holds after a hundred calls is what it held after the first."""
    step = next(reading())
    with Recorder(tmp_path / "r", CFG) as recorder:
        recorder.write(step.trace, **step.options)
        held = {name: value for name, value in vars(recorder).items() if name != "_size"}
        for _ in range(100):
            recorder.write(step.trace, **step.options)
        assert held == {name: value for name, value in vars(recorder).items() if name != "_size"}


def test_a_recording_is_of_one_batch(tmp_path):
    memory = reference.init_memory(CFG, 1)
    with Recorder(tmp_path / "recording", CFG) as recorder:
        for rows in (2, 1):
            state = reference.init_state(CFG, memory, rows)
            query, value = np.ones((rows, 3, 16), np.float32), np.ones((rows, 3, 4), np.float32)
            _, after, trace = reference.apply(CFG, state, query, value)
            if rows == 2:
                recorder.write(trace, before=state, after=after)
                continue
            with pytest.raises(ValueError, match=r"of the 2 rows of the calls before.*Received: a call of 1 rows"):
                recorder.write(trace, before=state, after=after)
    assert len(list(open_recording(tmp_path / "recording").entries())) == 1
