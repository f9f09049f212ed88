"""``python -m benchmarks.faults kill`` and ``soak``: what a crash leaves, and what a million tokens in pieces cost.

``kill``: for each kind of file a process that saves without a pause is killed by SIGKILL at a moment drawn anew, until
100 kills fell into a save. Each time the file must hold the older or the newer contents whole, and the next save must
remove what the killed one left beside it. A recording must hold every call that its writer was told is written.

``soak``: eight sequences are read in random ragged pieces, in batches that are padded under a mask or packed, and that
are joined and parted on the way, 1,000,000 tokens in all. The bytes of the states must not change, nor the process grow
after the first tenth; and the tables, pending tokens and outputs must be those of one call for each sequence.

The exit status is 1 where something is not as it must be.
"""

import argparse
import functools
import mmap
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

import fwpkm
from fwpkm import FwPKMConfig, Memory, PackedState, State, reference
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.conformance.running import as_numpy, native
from fwpkm.conformance.strategies import draw_tokens
from fwpkm.diagnostics.record import open_recording
from fwpkm.files import layer_spec
from fwpkm.tokens import Tokens

SAVED = FwPKMConfig(key_dim=4, value_dim=64, num_subkeys=32, chunk_size=8)
READ = FwPKMConfig(key_dim=8, value_dim=8, num_subkeys=16, top_k=4, chunk_size=32, boundary="wait", learning_rate=0.5)
GROWTH = 32 * 2**20
"""Bytes by which the process may grow after the first tenth."""


# --- Kills ---


def _layer(fill: float) -> Any:
    """A layer of arrays whose numbers are all ``fill``; its projections do not matter."""
    tensors = {"memory.keys": np.full((1, 2, 32, 2), fill, "f4"), "memory.values": np.full((1024, 256), fill, "f4")}
    return SimpleNamespace(
        config=SAVED,
        tensors=tensors,
        spec=lambda: layer_spec(4, True, None, SAVED),
        tensor_shapes=lambda: {name: x.shape for name, x in tensors.items()},
        table_dtype=lambda: "float32",
        export_tensors=lambda variables=None: tensors,
        import_tensors=tensors.update,
    )


_saved_layer = functools.cache(_layer)


@functools.cache
def _state(fill: float) -> State:
    memory = reference.init_memory(SAVED)
    return reference.init_state(SAVED, Memory(memory.keys, np.full_like(memory.values, fill)), 4)


@functools.cache
def _packed(fill: float) -> PackedState:
    return reference.pack(SAVED, _state(fill), reference.init_memory(SAVED))


def _load_layer(path: Path) -> np.ndarray:
    layer = _layer(0)
    fwpkm.load(path, layer)
    return layer.tensors["memory.values"]


class Kind(NamedTuple):
    """A kind of file whose values are all one number."""

    save: Callable[[Path, float], None]
    load: Callable[[Path], np.ndarray]


KINDS = {
    "layer": Kind(lambda path, fill: fwpkm.save(path, _saved_layer(fill)), _load_layer),
    "state": Kind(
        lambda path, fill: fwpkm.save_state(path, _state(fill), SAVED),
        lambda path: fwpkm.load_state(path, SAVED, "numpy").memory.values,
    ),
    "states": Kind(
        lambda path, fill: fwpkm.save_states(path, {"a": _state(fill), "b": _state(fill)}, SAVED),
        lambda path: np.stack([x.memory.values for x in fwpkm.load_states(path, SAVED, "numpy").values()]),
    ),
    "packed": Kind(
        lambda path, fill: fwpkm.save_packed(path, {"a": _packed(fill)}),
        lambda path: fwpkm.load_packed(path)["a"].values,
    ),
}


def kill_saves(kind: str, folder: Path, kills: int) -> str:
    """Kill a process that saves, until so many kills fell into a save; in an empty folder. A line of what was met.

    Raises:
        AssertionError: a file was neither the older nor the newer one, litter stayed, or most kills miss.
    """
    save, load = KINDS[kind]
    path, met, within, tries, seconds = folder / "file", {1.0: 0, 2.0: 0}, 0, 0, 0.0
    for fill in (2.0, 1.0):  # the second time nothing is made that is kept
        began = time.perf_counter()
        save(path, fill)
        seconds = time.perf_counter() - began

    def saving() -> None:
        while True:
            save(path, 2.0)
            save(path, 1.0)

    while within < kills:
        tries += 1
        _must(tries <= 20 * kills + 20, f"of {tries} kills {within} fell into a save")
        _killed(saving, random.uniform(0, 4 * seconds))
        values = load(path)
        _must((values == values.flat[0]).all(), f"{path} holds parts of two files")
        met[float(values.flat[0])] += 1
        within += len(list(folder.iterdir())) > 1
        save(path, 1.0)
        _must([x.name for x in folder.iterdir()] == [path.name], "the next save left litter")
    return (
        f"{tries} killed, {within} of them within a save; {met[1.0]} older and {met[2.0]} newer files, all whole; "
        "the next save removed all litter"
    )


def kill_recordings(folder: Path, kills: int) -> str:
    """Kill the writer of a recording so many times; a line of what was met.

    Raises:
        AssertionError: a call is missing that was said to be written.
    """
    state, tokens = reference.init_state(SAVED, reference.init_memory(SAVED), 1), _drawn(SAVED, 1, 20)
    _, after, trace = reference.apply(SAVED, state, **tokens.map(lambda x: x.astype("f4")).present())
    said, path, total, cut = mmap.mmap(-1, 8), folder / "file", 0, 0

    def recording() -> None:
        with fwpkm.Recorder(path, SAVED, overwrite=True) as recorder:
            for count in range(1, 10**9):
                recorder.write(trace, before=state, after=after)
                said[:] = count.to_bytes(8, "little")

    for _ in range(kills):
        said[:] = bytes(8)
        _killed(recording, random.uniform(0.02, 0.05))
        told = int.from_bytes(said[:], "little")
        if not told:  # it was killed before it had begun
            continue
        found = open_recording(path)
        entries = sum(1 for _ in found.entries())
        _must(told <= entries <= told + 1, f"{told} calls were written, {entries} are there")
        total, cut = total + entries, cut + (found.cut > 0)
    return f"{kills} killed; {total} calls that were told as written are all there; {cut} files end within one"


def _must(hold: Any, otherwise: str) -> None:
    if not hold:
        raise AssertionError(otherwise)


def _killed(forever: Callable[[], None], seconds: float) -> None:
    """Run a function in a child, and kill that after so many seconds."""
    child = os.fork()
    if not child:
        signal.alarm(60)  # so that it ends even where its parent was killed before it
        try:
            forever()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    _must(os.WIFSIGNALED(status), "the child ended by itself: it failed")


# --- A long reading in pieces ---


def _drawn(cfg: FwPKMConfig, rows: int, length: int) -> Tokens:
    return draw_tokens(np.random.default_rng(0), cfg, rows, length, left_out=["mask"])


def _resident() -> int:
    """Bytes of memory that this process takes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Sequences that are read in pieces, in batches that change."""

    def __init__(self, backend: str, length: int, rows: int = 8) -> None:
        """One batch of all rows, whose tokens begin anew after ``length``."""
        self.be: Any = fwpkm.get_backend(backend)
        self.rng, self.cfg, self.tokens = np.random.default_rng(0), READ, _drawn(READ, rows, length)
        self.memory = native(self.be, Memory(*(x.astype("f8") for x in reference.init_memory(self.cfg))))
        self.batches = [(list(range(rows)), self.be.init_state(self.cfg, self.memory, rows))]
        self.read = np.zeros(rows, np.int64)
        self.sums = np.zeros((rows, self.cfg.value_dim))
        self.calls = dict.fromkeys(("masked", "packed", "parted", "joined"), 0)

    def pieces(self, rows: Any, starts: Any, sizes: Any) -> Tokens:
        """So many tokens of each of some sequences from a place on, packed ``[1, n, ...]``."""
        at = np.concatenate([start + np.arange(size) for start, size in zip(starts, sizes)])
        return self.tokens.map(lambda x: x[np.repeat(rows, sizes), at % self.tokens.length][None])

    def step(self) -> None:
        """Part or join batches, now and then; else let one read a piece."""
        chosen = int(self.rng.integers(len(self.batches)))
        if self.rng.integers(10):
            self._read(chosen)
        elif len(self.batches) > 1 and self.rng.integers(3):
            self._join(chosen)
        elif len(self.batches[chosen][0]) > 1:
            self._part(chosen)

    def _part(self, chosen: int) -> None:
        rows, state = self.batches.pop(chosen)
        order = self.rng.permutation(len(rows))
        cut = int(self.rng.integers(1, len(rows)))
        for part in (order[:cut].tolist(), order[cut:].tolist()):
            self.batches.append(([rows[b] for b in part], self.be.select(self.cfg, state, part)))
        self.calls["parted"] += 1

    def _join(self, chosen: int) -> None:
        rows, state = self.batches.pop(chosen)
        others, other = self.batches.pop(int(self.rng.integers(len(self.batches))))
        self.batches.append((rows + others, self.be.concat(self.cfg, [state, other])))
        self.calls["joined"] += 1

    def _read(self, chosen: int) -> None:
        rows, state = self.batches[chosen]
        sizes = self.rng.integers(0, 2 * self.cfg.chunk_size, len(rows))
        if not sizes.any():
            return
        tokens, ends = self.pieces(rows, self.read[rows], sizes), np.cumsum([0, *sizes]).astype(np.int32)
        inplace, masked = bool(self.rng.integers(2)), not self.rng.integers(2)
        self.calls["masked" if masked else "packed"] += 1
        if masked:
            length = int(sizes.max()) + int(self.rng.integers(3))
            mask = np.stack([self.rng.permutation(length) < n for n in sizes])
            tokens = tokens.map(partial(_padded, mask))._replace(mask=mask)
        options = {} if masked else {"cu_seqlens": native(self.be, ends)}
        output, state, _ = self.be.apply(self.cfg, state, **self._native(tokens), **options, inplace=inplace)
        outputs = self.be.to_numpy(output)[mask if masked else 0]
        for row, start, stop in zip(rows, ends, ends[1:]):
            self.sums[row] += outputs[start:stop].sum(0)
        self.read[rows] += sizes
        self.batches[chosen] = (rows, state)

    def _native(self, tokens: Tokens) -> dict[str, Any]:
        return native(self.be, tokens).present()

    @property
    def nbytes(self) -> int:
        """Of all states."""
        return sum(self.be.nbytes(state) for _, state in self.batches)

    def error(self) -> float:
        """The worst relative error against one call for each sequence, of tables, pending tokens and summed outputs."""
        worst = 0.0
        for row, b, state in ((row, b, state) for rows, state in self.batches for b, row in enumerate(rows)):
            tokens, fresh = self.pieces([row], [0], self.read[[row]]), self.be.init_state(self.cfg, self.memory, 1)
            output, once, _ = self.be.apply(self.cfg, fresh, **self._native(tokens))
            own = self.be.select(self.cfg, state, [b])
            pairs = as_numpy(self.be, tuple(zip((*own.memory, *own.pending), (*once.memory, *once.pending))))
            summed = self.sums[row], self.be.to_numpy(output)[0].sum(0)
            worst = max(worst, *(relative_error(x, y) for x, y in (*pairs, summed)))
        return worst


def _padded(mask: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Tokens ``[1, n, ...]`` where the mask says, and NaN between them."""
    whole = np.full((*mask.shape, *x.shape[2:]), np.nan)
    whole[mask] = x[0]
    return whole


def soak(backend: str, tokens: int) -> str:
    """Read so many tokens in pieces; a line of what was met.

    Raises:
        AssertionError: memory grew, or the result is not that of one call.
    """
    reading = Soak(backend, tokens // 4 + 1)  # a row reads an eighth or so
    size, calls, base, most, began = reading.nbytes, 0, 0, 0, time.monotonic()
    while (read := int(reading.read.sum())) < tokens:
        reading.step()
        calls += 1
        _must(reading.nbytes == size, f"the states grew from {size} to {reading.nbytes} bytes")
        if calls % 20 == 0 and read >= tokens / 10:
            base = base or _resident()
            most = max(most, _resident() - base)
            _must(most <= GROWTH, f"the process grew by {most} bytes in {read} tokens")
        if calls % 2_000 == 0:
            print(f"{time.monotonic() - began:5.0f} s: {read} tokens, {most / 2**20:.1f} MiB more", flush=True)
    error, bound = reading.error(), BOUNDS["float64"].forward
    _must(error <= bound, f"the pieces differ from one call by {error:.3g}, more than {bound:.3g}")
    counts = ", ".join(f"{count} {name}" for name, count in reading.calls.items())
    return (
        f"{int(reading.read.sum())} tokens in {backend}; steps: {counts}; states of {size} bytes throughout; the "
        f"process grew by {most / 2**20:.1f} MiB after the first tenth; worst error against one call {error:.1e}, "
        f"bound {bound:.0e}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print what was met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    commands = parser.add_subparsers(dest="command", required=True)
    kill = commands.add_parser("kill", help="kill processes that save")
    text = "within a save of each kind of file (default: %(default)s)"
    kill.add_argument("--kills", type=int, default=100, help=text)
    long = commands.add_parser("soak", help="read many tokens in small pieces")
    long.add_argument("--tokens", type=int, default=1_000_000, help="(default: %(default)s)")
    long.add_argument("--backend", choices=("numpy", "torch"), default="torch")
    args = parser.parse_args(arguments)
    if args.command == "soak":
        print(soak(args.backend, args.tokens))
        return
    for kind in (*KINDS, "recording"):
        with tempfile.TemporaryDirectory() as folder:
            files = kind in KINDS
            line = kill_saves(kind, Path(folder), args.kills) if files else kill_recordings(Path(folder), args.kills)
            print(f"{kind}: {line}", flush=True)


if __name__ == "__main__":
    main()
