"""``python -m benchmarks.fuzz --minutes 10``: random lives of states in every backend, beside the NumPy reference.

A life draws a configuration and a batch, which then reads (padded, packed, read only, token by token), is flushed,
reset, chosen from, put and joined, packed and unpacked, saved and loaded, by another backend too; damaged copies of its
files must be refused. After each step every backend must hold what the reference holds, which reads each row of the
batch by itself: outputs, slots, weights, losses, tables and pending tokens within the bounds of float64 (SPEC.md §6),
positions and uses to the bit; and states that nobody may overwrite must keep their bits.

A second reference reads the same numbers, each moved by half a unit of rounding. A life ends early where that moves a
result by more than a twentieth of a bound: no run can be judged there. So a failure is a fault.

Before it starts it must find four bugs that it plants itself; where it does not, nothing that it says can be believed,
and the exit status is 2. Where a life fails, the status is 1, and the line that repeats that life is printed; the same
number, backends and versions give the same life. With jax, which compiles for seconds, all lives are of a few
configurations and lengths.
"""

import secrets
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import fwpkm
from benchmarks import report
from benchmarks.lives import Alone, Batch, LifeError, Step, errors
from fwpkm import reference
from fwpkm.conformance import judging
from fwpkm.conformance.drawing import draw
from fwpkm.conformance.running import as_numpy, same_bits
from fwpkm.conformance.strategies import OPTIONAL, configs, draw_memory, draw_tokens, floating, unmasked
from fwpkm.tokens import Tokens

CONFIGS = configs(usage_weight=st.sampled_from([0.0, 0.25, 3.0]))
MOST_ROWS, MOST_STEPS = 4, 30
COMPILED_CONFIGS = 6
"""Of how many configurations the lives are where a backend compiles for each."""
PLANTED_LIVES = 200
"""In so many lives each planted bug must be found."""
PROGRESS = 10.0
"""Seconds between two lines of progress."""


# --- A life ---


class Life:
    """All that follows from a number: a configuration, the steps, and what the backends make of them."""

    def __init__(self, number: int, backends: dict[str, Any], folder: Path) -> None:
        """The backends by name, and a folder for files."""
        self.number, self.folder, self.rng = number, folder, np.random.default_rng(number)
        self.compiled = "jax" in backends
        self.cfg = draw(CONFIGS, f"fuzz/{number % COMPILED_CONFIGS if self.compiled else number}")
        kind = Alone if self.cfg.memory_scope == "sequence" else Batch
        self.expected = kind(reference, self.cfg)
        self.nudged = kind(reference, self.cfg, np.random.default_rng(number))
        self.players = {name: Batch(be, self.cfg) for name, be in backends.items()}
        self.steps: list[str] = []
        self.tokens, self.set_aside = 0, False

    def run(self) -> None:
        """Live it.

        Raises:
            LifeError: something is wrong; says what and where.
        """
        step = self._begin()
        names = self._names()
        for number in range(int(self.rng.integers(5, MOST_STEPS + 1))):
            if number:
                name = str(self.rng.choice(names))
                step = getattr(self, f"_{name}")()
            self.steps.append(step.name)
            self.tokens += 0 if step.tokens is None else int(unmasked(step.tokens).sum())
            try:
                if not self._is_judged(step):
                    self.set_aside = True
                    return
            except Exception as error:
                said = str(error) if isinstance(error, LifeError) else f"{error!r}\n{traceback.format_exc()}"
                raise LifeError(f"step {number + 1} ({', '.join(self.steps)}): {said}") from None

    def _is_judged(self, step: Step) -> bool:
        """Take a step and judge it; False where a rounding moves what must come out."""
        if step.name == "save":
            self._through_files(step)
            return True
        expected, nudged = self.expected.do(step), self.nudged.do(step)
        moves = errors(self.cfg, nudged, expected)
        if any(not error <= judging.FRACTION * judging.bound(what, "float64") for what, error in moves):
            return False
        for name, player in self.players.items():
            try:
                seen = player.do(step)
            except LifeError as error:
                raise LifeError(f"{name}: {error}") from None
            for what, error in errors(self.cfg, seen, expected):
                if not error <= (bound := judging.bound(what, "float64")):
                    raise LifeError(f"{name}: {what} differs by {error:.3g}, more than {bound:.3g}; {self.cfg}")
        return True

    def _names(self) -> list[str]:
        reads = ["padded", "packed"] * 4 + ["read_only", "decode"]
        names = [*reads, "flush", "reset", "select", "pack", "save"]
        batch = self.cfg.memory_scope == "batch"
        return [name for name in names if name != "packed"] if batch else [*names, "put", "concat"]

    # The steps, drawn

    @property
    def size(self) -> int:
        """B."""
        return len(self.expected.seen_state().position)

    def _begin(self) -> Step:
        size = int(self.rng.integers(1, 4))
        own = size if self.rng.integers(2) else 1
        return Step("begin", rows=size, memory=draw_memory(self.rng, self.cfg, own))

    def _lengths(self, count: int) -> list[int]:
        chunk, most = self.cfg.chunk_size, 2 * self.cfg.chunk_size + self.cfg.lookahead + 2
        drawn = [1, 2 * chunk + 1] if self.compiled else [0, 1, chunk, int(self.rng.integers(most + 1)), most]
        return self.rng.choice(drawn, count).tolist()

    def _drawn(self, size: int, length: int) -> Tokens:
        """Tokens; what is masked holds anything, and now and then a number is not finite."""
        left_out = [name for name in OPTIONAL if self.rng.integers(2)]
        tokens = draw_tokens(self.rng, self.cfg, size, length, left_out)
        there = unmasked(tokens)
        for x in floating(tokens).values():
            if x is not None:
                x[~there] = self.rng.choice([np.nan, np.inf, 1e300])
                if x.size and self.rng.integers(8) == 0:
                    x.reshape(-1)[self.rng.integers(x.size)] = self.rng.choice([np.nan, np.inf, -np.inf])
        return tokens

    def _inplace(self) -> bool:
        return bool(self.rng.integers(2))

    def _padded(self) -> Step:
        return Step("read", self._drawn(self.size, self._lengths(1)[0]), inplace=self._inplace())

    def _packed(self) -> Step:
        ends = np.cumsum([0, *self._lengths(self.size)]).astype(np.int32)
        length = (2 * self.cfg.chunk_size + 1) * self.size if self.compiled else int(ends[-1] + self.rng.integers(3))
        return Step("read", self._drawn(1, length), ends, inplace=self._inplace())

    def _read_only(self) -> Step:
        return self._padded()._replace(name="read_only", inplace=False)

    def _decode(self) -> Step:
        return Step("decode", self._drawn(self.size, 1))

    def _rows(self) -> Any:
        """Rows as a caller may name them; in batch scope all of them or none."""
        flags = self.rng.integers(2, size=self.size).astype(bool)
        if self.cfg.memory_scope == "batch":
            flags[:] = flags[0]
        every = None if flags.all() else flags
        return [flags, np.flatnonzero(flags).tolist(), every][self.rng.integers(3)]

    def _flush(self) -> Step:
        return Step("flush", rows=self._rows(), inplace=self._inplace())

    def _reset(self) -> Step:
        memory = draw_memory(self.rng, self.cfg, self.size if self.rng.integers(2) else 1)
        return Step("reset", rows=self._rows(), memory=memory, inplace=self._inplace())

    def _select(self) -> Step:
        return Step("select", rows=self.rng.integers(self.size, size=self.rng.integers(1, MOST_ROWS)).tolist())

    def _with_others(self, name: str, count: int, rows: Any = None) -> Step:
        memory, tokens = draw_memory(self.rng, self.cfg, count), self._drawn(count, self._lengths(1)[0])
        return Step(name, tokens, memory=memory, rows=rows, inplace=self._inplace() and name == "put")

    def _put(self) -> Step:
        count = int(self.rng.integers(1, self.size + 1))
        return self._with_others("put", count, self.rng.permutation(self.size)[:count].tolist())

    def _concat(self) -> Step:
        return self._with_others("concat", 1) if self.size < MOST_ROWS else self._select()

    def _pack(self) -> Step:
        return Step("pack", seed=int(self.rng.integers(2**32)))

    def _save(self) -> Step:
        return Step("save", seed=int(self.rng.integers(2**32)))

    # Files

    def _through_files(self, step: Step) -> None:
        """Every backend saves; each goes on from another's file, after a damaged copy of it was refused."""
        rng, players = np.random.default_rng(step.seed), list(self.players.values())
        kind, shift = str(rng.choice(["state", "states", "packed"])), int(rng.integers(len(players)))
        seen = [player.seen_state() for player in players]
        paths = [self.folder / f"{i}" for i in range(len(players))]
        for player, path in zip(players, paths):
            player.save(path, kind)
        for i, player in enumerate(players):
            source = (i + shift) % len(players)
            memory, whole = seen[source].memory, paths[source].read_bytes()
            damaged = self.folder / "damaged"
            damaged.write_bytes(_damaged(rng, whole))
            try:
                state = player.load(damaged, kind, memory)
            except ValueError as error:
                if str(damaged) not in str(error) and "configuration" not in str(error):
                    raise LifeError(f"a damaged {kind} is refused without a word of which: {error}") from None
            else:  # a bit of the header may make no difference
                if not same_bits(as_numpy(player.be, state), seen[source]):
                    raise LifeError(f"a damaged file of kind {kind} was read, with other bits")
            player.state = player.load(paths[source], kind, memory)
            if not same_bits(player.seen_state(), seen[source]):
                raise LifeError(f"a file of kind {kind} gave other bits")


def _damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """A file that is cut, has a flipped bit, or is another's."""
    at, how = int(rng.integers(len(data))), rng.integers(3)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    return rng.bytes(at)


# --- Planted bugs ---


def _ignoring_the_mask(
    cfg: Any, state: Any, query: Any, value: Any, gate: Any = None, mask: Any = None, **options: Any
) -> Any:
    query, value = (np.where(np.isfinite(x), x, 0) for x in (query, value))
    return reference.apply(cfg, state, query, value, gate, None, **options)


def _flushing_every_row(cfg: Any, state: Any, rows: Any = None, **options: Any) -> Any:
    return reference.flush(cfg, state, None, **options)


def _losing_a_pending_token(cfg: Any, packed: Any, memory: Any) -> Any:
    state = reference.unpack(cfg, packed, memory)
    state.pending.value[:, :1] = 0
    return state


def _forgetting_uses(cfg: Any, state: Any, rows: Any, other: Any, **options: Any) -> Any:
    state = reference.put(cfg, state, rows, other, **options)
    return state if state.maybe_uses is None else state._replace(uses=np.zeros_like(state.uses))


PLANTED: dict[str, dict[str, Callable]] = {
    "apply that reads masked tokens": {"apply": _ignoring_the_mask},
    "flush of all rows, whichever were named": {"flush": _flushing_every_row},
    "unpack that loses the first pending value": {"unpack": _losing_a_pending_token},
    "put that begins to count uses anew": {"put": _forgetting_uses},
}
"""Wrong functions, by what they are."""


def find(functions: dict[str, Callable], folder: Path) -> int | None:
    """The first life in which a planted bug shows, and the right function does not fail; or None."""
    wrong = SimpleNamespace(**vars(reference) | functions)
    for number in range(PLANTED_LIVES):
        try:
            Life(number, {"planted": wrong}, folder).run()
        except LifeError:
            Life(number, {"right": reference}, folder).run()
            return number
    return None


# --- The command ---


def fuzz(seed: int, backends: list[str], folder: Path, seconds: float, lives: int | None) -> int:
    """Live until the time is over, or so many lives; 1 at the first that fails."""
    modules = {name: fwpkm.get_backend(name) for name in backends}
    began = said = time.monotonic()
    steps: Counter[str] = Counter()
    tokens = set_aside = count = 0

    def line() -> str:
        passed = time.monotonic() - began
        return (
            f"{passed:5.0f} s: {count} lives, {sum(steps.values())} steps, {tokens} tokens, "
            f"{set_aside} lives ended early by rounding"
        )

    while (time.monotonic() - began < seconds) if lives is None else (count < lives):
        life = Life(seed + count, modules, folder)
        try:
            life.run()
        except LifeError as error:
            print(f"life {life.number} FAILED: {error}", file=sys.stderr)
            names = " ".join(backends)
            print(f"repeat it: python -m benchmarks.fuzz --seed {life.number} --lives 1 --backends {names}")
            return 1
        count, tokens, set_aside = count + 1, tokens + life.tokens, set_aside + life.set_aside
        steps.update(life.steps)
        if time.monotonic() - said >= PROGRESS:
            said = time.monotonic()
            print(line(), flush=True)
    print(line())
    print("steps: " + ", ".join(f"{name} {number}" for name, number in sorted(steps.items())))
    print("no failure")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Find the planted bugs, then live; the exit status."""
    parser = report.parser("fuzz", __doc__, lives=(None, "so many lives, however long they take"))
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="the first life's number (default: any)")
    parser.add_argument("--backends", nargs="+", default=["numpy", "torch"], choices=("numpy", "torch", "jax"))
    args = parser.parse_args(arguments)
    if "jax" in args.backends:
        import jax

        jax.config.update("jax_enable_x64", True)
    with tempfile.TemporaryDirectory() as folder:
        for name, functions in PLANTED.items():
            number = find(functions, Path(folder))
            if number is None:
                print(f"planted and NOT found in {PLANTED_LIVES} lives: {name}", file=sys.stderr)
                return 2
            print(f"planted and found in life {number}: {name}", flush=True)
        print(f"first life: --seed {args.seed}, backends: {' '.join(args.backends)}", flush=True)
        return fuzz(args.seed, args.backends, Path(folder), 60 * args.minutes, args.lives)


if __name__ == "__main__":
    raise SystemExit(main())
