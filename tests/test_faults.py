"""What goes wrong around the library: kills, litter, foreign files, threads; and a long reading in pieces."""

import itertools
import os
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from layer_files import CFG, FakeLayer, half_read_state
from processes import python
from recordings import record
from sources import ROOT

import fwpkm
from benchmarks import faults
from fwpkm import reference, tensor_files
from fwpkm.backends.torch import FwPKM, start_decoding
from fwpkm.conformance.running import same_bits
from fwpkm.diagnostics.doctor import DoctorError, examine
from fwpkm.diagnostics.record import open_recording

# Kills and litter


def test_killed_saves_leave_the_old_file_or_the_new_one() -> None:
    """Three kills within a save of each kind of file, in a process without threads; a recording keeps what was told."""
    done = python("-W", "error", "-m", "benchmarks.faults", "kill", "--kills", "3", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*faults.KINDS, "recording"]
    assert all("3 of them within a save" in line for line in lines[:-1])


def litter(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(".fwpkm-*.tmp")}


def test_litter_of_the_dead_goes_and_files_of_the_living_stay(tmp_path: Path) -> None:
    with tensor_files._temporary(tmp_path) as in_work:
        (tmp_path / ".fwpkm-0123456789abcdef.tmp").write_bytes(b"half of a file")
        (tmp_path / "mine.tmp").write_bytes(b"not ours")
        fwpkm.save(tmp_path / "layer", FakeLayer())
        assert litter(tmp_path) == {in_work.name}
        assert (tmp_path / "mine.tmp").exists()
    fwpkm.save(tmp_path / "layer", FakeLayer())
    assert litter(tmp_path) == set()


def test_without_locks_nothing_is_taken_for_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: what cannot be told from a save in progress stays."""
    monkeypatch.setattr("sys.platform", "win32")
    (tmp_path / ".fwpkm-0123456789abcdef.tmp").touch()
    fwpkm.save(tmp_path / "layer", FakeLayer())
    assert litter(tmp_path) == {".fwpkm-0123456789abcdef.tmp"}
    fwpkm.load(tmp_path / "layer", FakeLayer(1))


def test_a_save_begins_anew_when_another_took_its_file_for_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a file's making and its lock: the other still holds the lock, or is done and the file is gone."""
    make, taken = tensor_files._Lock.__init__, []

    def taking(self: Any, path: Path, flags: int = 0) -> None:
        make(self, path, flags)
        if len(taken) < 2:
            taken.append(path)
            self.held = len(taken) == 2
            if self.held:
                path.unlink()

    monkeypatch.setattr(tensor_files._Lock, "__init__", taking)
    fwpkm.save(tmp_path / "layer", FakeLayer())
    assert len(taken) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"layer", taken[0].name}


def test_threads_that_save_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    def save(name: int) -> None:
        for _ in range(20):
            fwpkm.save(tmp_path / f"{name % 2}", FakeLayer(name))

    in_threads(save, 4)
    for name in (0, 1):
        layer = FakeLayer(9)
        fwpkm.load(tmp_path / f"{name}", layer)
        written = [FakeLayer(seed).tensors["memory.values"] for seed in (name, name + 2)]
        assert any(np.array_equal(layer.tensors["memory.values"], x) for x in written)
    assert len(list(tmp_path.iterdir())) == 2


# Files that would run code


class Runs:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def doctor(path: Path) -> None:
    """The doctor says what is wrong, or raises."""
    problems = examine(path)["problems"]
    assert problems
    raise DoctorError(f"{path}: {problems}")


READERS = {
    "layer": lambda path: fwpkm.load(path, FakeLayer()),
    "state": lambda path: fwpkm.load_state(path, CFG, "numpy"),
    "states": lambda path: fwpkm.load_states(path, CFG, "numpy"),
    "packed": fwpkm.load_packed,
    "recording": open_recording,
    "doctor": doctor,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", ["pickle", "torch", "npy"])
def test_nothing_in_a_foreign_file_is_executed(tmp_path: Path, reader: str, form: str) -> None:
    path, made = tmp_path / "file", tmp_path / "made"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Runs(made)))
    elif form == "torch":
        torch.save({"memory.values": Runs(made)}, path)
    else:
        with path.open("wb") as file:
            np.save(file, np.array([Runs(made)], object), allow_pickle=True)
    with pytest.raises(ValueError, match="file"):
        READERS[reader](path)
    assert not made.exists()
    {  # the file is as bad as it seems
        "pickle": lambda: pickle.loads(path.read_bytes()),
        "torch": lambda: torch.load(path, weights_only=False),
        "npy": lambda: np.load(path, allow_pickle=True),
    }[form]()
    assert made.exists()


def test_every_kind_of_file_is_refused_by_the_readers_of_the_others(tmp_path: Path) -> None:
    memory = reference.init_memory(CFG, 1, seed=3)
    fwpkm.save(tmp_path / "layer", FakeLayer())
    fwpkm.save_state(tmp_path / "state", half_read_state(), CFG)
    fwpkm.save_states(tmp_path / "states", {"a": half_read_state()}, CFG)
    fwpkm.save_packed(tmp_path / "packed", {"a": reference.pack(CFG, half_read_state(), memory)})
    record(tmp_path / "recording")
    for kind, reader in READERS.items():
        for path in tmp_path.iterdir():
            if path.name != kind and kind != "doctor":
                with pytest.raises(ValueError, match=f"{path}: (no recording|not )"):
                    reader(path)


# Threads


def in_threads(run: Any, count: int) -> None:
    """Call ``run(i)`` in threads that begin together; what one raises is raised here."""
    errors, barrier = [], threading.Barrier(count)

    def begin(i: int) -> None:
        try:
            barrier.wait()
            run(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=begin, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_share_a_layer_each_with_its_own_state() -> None:
    """Reading, training and decoding at once give each the bits that it gets alone."""
    torch.manual_seed(0)
    layer = FwPKM(16, key_dim=8, value_dim=8, num_subkeys=8, top_k=4, chunk_size=4)
    texts = torch.randn(3, 2, 60, 16)

    def read(i: int) -> tuple[Any, ...]:
        state, outputs = layer.init_state(2), []
        for at in range(0, 40, 5):
            y, state, _ = layer(texts[i][:, at : at + 5], state, return_trace=True)
            outputs.append(y)
        gradients = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), list(layer.parameters()))
        with torch.no_grad():
            decoded = start_decoding(state)
            steps = [layer.decode(texts[i][:, at : at + 1], decoded) for at in range(40, 60)]
        return tuple(x.detach().numpy() for x in (*outputs, *gradients, *steps, *decoded.memory, decoded.position))

    alone = [read(i) for i in range(3)]
    for _ in range(2):
        together: dict[int, Any] = {}
        in_threads(lambda i, found=together: found.update({i: read(i)}), 3)
        assert all(same_bits(together[i], alone[i]) for i in range(3))


# A long reading


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_reading_in_pieces_costs_no_more_memory_and_gives_the_table_of_one_call(backend: str) -> None:
    """`python -m benchmarks.faults soak` reads a million tokens so."""
    line = faults.soak(backend, 5000)
    assert int(line.partition(" ")[0]) >= 5000
    assert all(f" 0 {name}" not in line for name in ("masked", "packed", "parted", "joined"))


def test_a_long_reading_that_goes_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(cfg: Any, state: Any, query: Any, value: Any, gate: Any = None, mask: Any = None, **options: Any) -> Any:
        return reference.apply(cfg, state, query, value * (1 if mask is None else 1.001), gate, mask, **options)

    monkeypatch.setattr(fwpkm, "get_backend", lambda _: SimpleNamespace(**vars(reference) | {"apply": apply}))
    with pytest.raises(AssertionError, match="differ from one call"):
        faults.soak("numpy", 1000)


def test_memory_that_grows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(faults, "_resident", lambda: next(numbers) * 2**25 + 1)
        with pytest.raises(AssertionError, match="the process grew"):
            faults.soak("numpy", 10_000)
    growing = SimpleNamespace(**vars(reference) | {"nbytes": lambda state: next(numbers)})
    monkeypatch.setattr(fwpkm, "get_backend", lambda _: growing)
    with pytest.raises(AssertionError, match="the states grew"):
        faults.soak("numpy", 10_000)
