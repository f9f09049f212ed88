"""The engine of examples/serve.py: every user as alone, bounded tables, nothing mixed, nothing lost, nothing left."""

import dataclasses
import os
import random
import resource
from contextlib import contextmanager

import pytest
import torch
from asserting import assert_close
from processes import python
from serving_clients import Clients
from sources import ROOT

from benchmarks.serving import main
from examples.serving.engine import Engine
from examples.serving.model import ByteModel, choices
from examples.serving.tables import Tables
from fwpkm import FwPKMConfig
from fwpkm.backends.torch import unpack

CONFIG = FwPKMConfig(key_dim=8, value_dim=8, num_subkeys=12, top_k=4, chunk_size=4, learning_rate=0.3)


def make_model(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return ByteModel(config, width=16).double()


MODEL = make_model()
WEIGHTED = make_model(config=dataclasses.replace(CONFIG, usage_weight=0.25))


def serving(folder, model=MODEL, **sizes):
    return Engine(model, folder, **{"rows": 2, "in_memory": 1, "piece": 5} | sizes)


def assert_alone(engine, user, written):
    """Each byte in these places of a user's text is the one that a model chooses which reads that text alone."""
    text = engine.text(user)
    chosen = choices(engine.tables.model, text)
    assert [text[i] for i in written] == [chosen[i - 1] for i in written]


def assert_state_alone(engine, user):
    """What is kept of a user is what one call makes of the text, to rounding."""
    engine.leave(user)
    packed, model = engine.store.load(user), engine.tables.model
    if packed is None:
        return
    x = model.embedding(torch.tensor([list(engine.text(user)[: int(packed.memories["0"].position[0])])]))
    for i, memory in enumerate(model.memories):
        read, alone = memory(x)
        kept, expected = unpack(model.config, packed.memories[str(i)], memory.memory()).arrays(), alone.arrays()
        assert kept.keys() == expected.keys()
        assert_close(tuple(kept.values()), tuple(expected.values()), "float64")
        x = x + read


# Every user as alone


@pytest.mark.parametrize(
    ("model", "seed", "rows", "in_memory", "piece"),
    [(MODEL, 0, 2, 1, 5), (MODEL, 1, 3, 0, 1), (MODEL, 2, 1, 3, 40), (WEIGHTED, 3, 2, 1, 5)],
    ids=["plain", "a token a call", "long pieces", "writes weighted by use"],
)
def test_users_who_come_and_go_get_what_each_gets_alone(tmp_path, model, seed, rows, in_memory, piece):
    engine = serving(tmp_path, model, rows=rows, in_memory=in_memory, piece=piece)
    clients = Clients(engine, seed)
    for round_ in range(80):
        clients.act()
        for _ in range(clients.rng.randint(0, 4)):
            clients.step()
            assert len(engine.resident) <= rows
            assert len(engine.store.bytes_in_memory()) <= in_memory
        if round_ in (30, 60):  # a process that begins anew
            engine = clients.engine = serving(tmp_path, model, rows=rows, in_memory=in_memory, piece=piece)
    while engine.busy:
        clients.step()
    assert min(clients.counts.values()) > 0, clients.counts
    assert sum(map(len, clients.answers.values())) > 30
    assert sorted(engine.users) == sorted(clients.given)
    for user, written in clients.answers.items():
        text = engine.text(user)
        assert bytes(byte for i, byte in enumerate(text) if i not in set(written)) == clients.given[user]
        assert_alone(engine, user, written)
        assert_state_alone(engine, user)


def test_answers_hang_on_the_memory():
    """Or the test above would show nothing: other beginnings, and none written, give other bytes behind them."""
    rng = random.Random(0)
    first, second, end = (rng.randbytes(40) for _ in range(3))
    one, other = (choices(MODEL, beginning + end)[-30:] for beginning in (first, second))
    unwritten = make_model(config=FwPKMConfig(**{**CONFIG.__dict__, "learning_rate": 0.0}))
    frozen = choices(unwritten, first + end)[-30:]
    assert sum(x != y for x, y in zip(one, other)) > 3
    assert sum(x != y for x, y in zip(one, frozen)) > 3


def test_a_fork_shares_nothing_from_there_on(tmp_path):
    engine = serving(tmp_path)
    engine.join("a", b"What both have read, which is of some length.")
    engine.write("a", 3)
    engine.run()
    engine.fork("a", "b")
    before = engine.text("b")
    engine.read("a", b"For a alone.")
    engine.write("b", 8)
    engine.write("a", 8)
    assert engine.run() == {}
    assert engine.text("b")[: len(before)] == before
    for user in ("a", "b"):
        assert_alone(engine, user, range(len(engine.text(user)) - 8, len(engine.text(user))))
    engine.delete("a")
    engine.write("b", 4)
    assert engine.run() == {}
    assert_alone(engine, "b", range(len(before), len(engine.text("b"))))


def test_the_least_recently_used_one_goes_to_memory_then_to_disk(tmp_path):
    engine = serving(tmp_path, rows=1, in_memory=1)
    for user in "abc":
        engine.join(user, b"The text of " + user.encode())
        engine.run()
    assert (engine.resident, list(engine.store.bytes_in_memory()), list(engine.store.bytes_on_disk())) == (
        ["c"],
        ["b"],
        ["a"],
    )
    engine.write("a", 4)
    engine.run()
    assert (engine.resident, list(engine.store.bytes_in_memory())) == (["a"], ["c"])
    assert_alone(engine, "a", range(len(engine.text("a")) - 4, len(engine.text("a"))))


def test_who_is_never_done_keeps_nobody_waiting(tmp_path):
    engine = serving(tmp_path, rows=1, turn=4)
    for user in "abc":
        engine.join(user, b"Text.")
        engine.write(user, 30)
    answered = [user for _ in range(24) for user in engine.step().written]
    assert "".join(answered) == "aaaabbbbcccc" * 2
    assert engine.run() == {}
    for user in "abc":
        assert_alone(engine, user, range(5, 35))


# Nothing is lost


def test_what_was_acknowledged_outlasts_kills(tmp_path):
    """Six processes that serve, each killed at some moment; the helper checks after each (in one process, to be
    quick, from which they fork)."""
    done = python(ROOT / "tests/killed_server.py", tmp_path / "users", "6", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    killed, acknowledged, users = map(int, done.stdout.split()[-3:])
    assert killed == 6
    assert acknowledged >= 6
    assert users > 3


def test_a_text_is_on_the_disk_before_the_states_that_read_it(tmp_path, monkeypatch):
    """For a loss of power: what is stored must not be ahead of the record. Then the folder has the new name."""
    engine, calls = serving(tmp_path), []
    engine.join("a", b"The text of a.")
    engine.run()
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(*paths):
        calls.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    engine.leave("a")
    assert [call for call in calls if not call.startswith(".")] == ["61.text", "replace", tmp_path.name]


def test_a_call_that_fails_sets_nobody_back_for_good(tmp_path, monkeypatch):
    """It may have written one layer's tables and not the other's."""
    engine = serving(tmp_path)
    engine.join("a", b"The text of a, which is read in pieces.")
    engine.join("b", b"And that of b.")
    engine.write("a", 6)
    engine.step()

    def fail(_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(MODEL.readout, "forward", fail)
        with pytest.raises(MemoryError):
            engine.step()
    assert engine.resident == []
    engine.write("b", 6)
    assert engine.run() == {}
    for user in ("a", "b"):
        assert_alone(engine, user, range(len(engine.text(user)) - 6, len(engine.text(user))))
        assert_state_alone(engine, user)


@contextmanager
def full_disk(size):
    """No file grows beyond so many bytes: a write that would is cut off there, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_refuses_whom_it_has_no_room_for(tmp_path):
    engine = serving(tmp_path, rows=1, in_memory=0)
    engine.join("long", bytes(range(90)))
    engine.join("short", b"A short text.")
    engine.run()
    with full_disk(100):
        with pytest.raises(OSError, match="File too large"):
            engine.read("long", bytes(30))
        assert engine.text("long") == bytes(range(90))
        with pytest.raises(OSError, match="File too large"):
            engine.join("new", bytes(120))
        assert engine.users == ["long", "short"]
        engine.write("short", 5)
        assert engine.run() == {}
        engine.write("long", 20)
        failed = engine.run()  # ten bytes fit; and who gives up the row stays in memory
        assert failed.keys() == {"long", "short"}
        assert all(isinstance(error, OSError) for error in failed.values())
        assert list(engine.store.bytes_in_memory()) == ["short"]
        assert len(engine.text("long")) == 100
        with pytest.raises(OSError, match="File too large"):
            engine.leave("short")
    assert not list(tmp_path.glob(".*"))
    assert sorted(serving(tmp_path).users) == ["long", "short"]
    for user in ("long", "short"):
        engine.write(user, 5)
    assert engine.run() == {}
    assert_alone(engine, "long", range(90, 105))
    assert_alone(engine, "short", range(13, 23))


def damage(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a, b: damage(a), "damaged"),
        (lambda a, b: a.write_bytes(a.read_bytes()[:100]), "damaged"),
        (lambda a, b: a.write_bytes(b.read_bytes()), "memory of another user"),
    ],
    ids=["flipped", "cut off", "another's"],
)
def test_a_damaged_file_refuses_its_user_alone(tmp_path, spoil, words):
    engine = serving(tmp_path)
    for user in ("a", "b", "c"):
        engine.join(user, b"The text that was given by " + user.encode())
        engine.run()
        engine.leave(user)
    a, b = (tmp_path / f"{user.encode().hex()}.state" for user in "ab")
    spoil(a, b)
    for user in engine.users:
        engine.write(user, 6)
    failed = engine.run()
    assert failed.keys() == {"a"}
    assert words in str(failed["a"])
    assert str(a) in str(failed["a"])
    engine.reread("a")
    engine.write("a", 6)
    assert engine.run() == {}
    for user in ("a", "b", "c"):
        assert len(engine.text(user)) == 28 + 6
        assert_alone(engine, user, range(28, 34))
        assert_state_alone(engine, user)


def test_a_text_that_was_cut_refuses_its_user_alone(tmp_path):
    engine = serving(tmp_path)
    for user in "ab":
        engine.join(user, b"The text that was given.")
        engine.run()
        engine.leave(user)
    (tmp_path / "61.text").write_bytes(b"The text")
    engine = serving(tmp_path)
    for user in "ab":
        engine.write(user, 2)
    failed = engine.run()
    assert failed.keys() == {"a"}
    assert "Expected: 8 bytes, of which 23 were read" in str(failed["a"])
    assert_alone(engine, "b", range(24, 26))


# Nothing is left


def test_nothing_is_left_of_a_user_who_is_deleted(tmp_path):
    """In a row, in memory, on the disk, or in the file that a killed process was writing."""
    engine = serving(tmp_path, rows=1, in_memory=1)
    start = [x.clone() for state in MODEL.start(1).memories for x in (*state.memory, *state.pending.present().values())]
    secrets = {user: random.Random(user).randbytes(40) for user in ("on disk", "in memory", "in a row")}
    for user, secret in secrets.items():
        engine.join(user, secret)
        engine.run()
    assert engine.resident == ["in a row"]
    assert list(engine.store.bytes_in_memory()) == ["in memory"]
    assert list(engine.store.bytes_on_disk()) == ["on disk"]
    (tmp_path / ".fwpkm-0123.tmp").write_bytes(secrets["on disk"])
    (tmp_path / "dead.state").write_bytes(secrets["on disk"])  # a kill between the two files of a user
    for user, secret in secrets.items():
        engine.delete(user)
        assert not [path for path in tmp_path.iterdir() if path.stem == user.encode().hex()]
        assert user not in engine.users
        assert user not in engine.store.bytes_in_memory()
        assert not [path for path in tmp_path.glob("*.text") if secret in path.read_bytes()]
    states = engine.tables.rows.memories
    now = [x for state in states for x in (*state.memory, *state.pending.present().values())]
    assert all(torch.equal(x, y) for x, y in zip(now, start, strict=True))
    assert all(state.position.tolist() == [0] for state in states)
    serving(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    engine.join("on disk", b"Somebody else, who has that name now.")
    engine.write("on disk", 6)
    engine.run()
    assert_alone(engine, "on disk", range(37, 43))


# Bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.join("a", b"again"), "user must be a new name"),
        (lambda e: e.fork("a", "a"), "user must be a new name"),
        (lambda e: e.join("", b"x"), "user must be a printable name"),
        (lambda e: e.join("x" * 101, b"x"), "user must be a printable name of 1 to 100 bytes"),
        (lambda e: e.join("\ud800", b"x"), "user must be a printable name"),
        (lambda e: e.join(7, b"x"), "user must be a printable name"),
        (lambda e: e.join("b", b""), "text must be at least one byte"),
        (lambda e: e.read("a", "text"), "text must be at least one byte"),
        (lambda e: e.write("a", 0), "number must be an integer of at least 1"),
        (lambda e: e.write("a", True), "number must be an integer of at least 1"),
        *((lambda e, f=f: getattr(e, f)("b"), "user must be one who has joined") for f in ("leave", "delete", "text")),
        (lambda e: e.reread(["a"]), "user must be one who has joined"),
        (lambda e: e.read("b", b"x"), "user must be one who has joined"),
        (lambda e: e.write("A", 1), "user must be one who has joined"),
        (lambda e: e.fork("b", "c"), "user must be one who has joined"),
        (lambda e: serving(e.store.folder, rows=0), "rows must be an integer of at least 1"),
        (lambda e: serving(e.store.folder, in_memory=-1), "in_memory must be an integer of at least 0"),
        (lambda e: serving(e.store.folder, piece=1.5), "piece must be an integer of at least 1"),
        (lambda e: Engine(make_model(1), e.store.folder), "what another model read"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(tmp_path, call, words):
    engine = serving(tmp_path)
    engine.join("a", b"text")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"Received: ") as caught:
        call(engine)
    assert words in str(caught.value)
    assert engine.users == ["a"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "my.state").write_bytes(b"of another program")
    with pytest.raises(
        ValueError, match=r"must be a new or empty folder, or one of users. Received: one with .'my.state'"
    ):
        serving(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["my.state"]


def test_two_processes_on_one_folder_do_not_mix(tmp_path):
    engine = serving(tmp_path)
    engine.join("a", b"text")
    other = serving(tmp_path)
    other.read("a", b" of the other")
    with pytest.raises(ValueError, match=r"another process has written .* Expected: 4 bytes. Received: 17"):
        engine.read("a", b" of the one")
    assert other.text("a") == b"text of the other"
    engine.write("a", 1)
    assert "another process has written" in str(engine.run()["a"])


def test_names_are_files_of_their_own(tmp_path):
    names = ["a", "A", "../a", "a/b", "ä", ".", "x" * 100]
    engine = serving(tmp_path)
    for name in names:
        engine.join(name, name.encode())
    assert sorted(serving(tmp_path).users) == sorted(names)
    assert len(list(tmp_path.iterdir())) == len(names) + 1
    assert all(engine.text(name) == name.encode() for name in names)


# The load test

SMALL = (
    "--users 3 --tokens 60 --text 30 --answer 4 --rows 1 --in-memory 1 --width 16 --num-subkeys 8 --chunk 4 --checked 3"
)


def test_the_load_test_checks_what_it_serves(capsys, monkeypatch):
    assert main([*SMALL.split(), "--markdown", "--dtype", "float64"]) == 0
    printed = capsys.readouterr().out
    assert "| tokens read, written | 180, 24 |" in printed
    assert "| bytes checked alone, of them others | 24, 0 |" in printed
    assert "(1 users)" in printed.partition("packed in memory")[2]
    read = Tables.read
    monkeypatch.setattr(Tables, "read", lambda *args: [byte ^ 1 for byte in read(*args)])
    assert main(SMALL.split()) == 1
