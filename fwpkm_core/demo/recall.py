"""Stream a text through an untrained memory, pass after pass, in any backend."""

import dataclasses
import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.demo.contexts import SEED, Contexts
from fwpkm.demo.dictionary import Dictionary, replace_some
from fwpkm.demo.text import Text
from fwpkm.protocol import Backend

TOP_K = 16
MAX_SUBKEYS = 2048  # 4 million slots; the three tables of a demo then take 6 GiB
TOKENS_PER_CALL = 512  # how often the progress bar moves; the size of the calls does not change what is read


def config(num_subkeys: int, chunk_size: int) -> FwPKMConfig:
    """The memory of the demo, chosen to hold for any text and chunk size rather than tuned to the shipped one.

    Sixteen slots a context: what others wrote to some of them is outvoted by the rest, the more so the wider the codes.
    "normalized" at rate 1 would write a lone context exactly; 0.5 costs it one more reading and spares those that share
    its slots, which a text too long for the table needs. A tenth of the addressing step: each move of the keys changes
    which slots an old context selects, and short chunks move them often. "wait" loses no pair at the end of a chunk.

    Raises:
        ValueError: a number that breaks its rule.
    """
    return FwPKMConfig(
        key_dim=64,
        value_dim=128,
        num_subkeys=num_subkeys,
        top_k=TOP_K,
        chunk_size=chunk_size,
        lookahead=1,
        boundary="wait",
        learning_rate=0.5,
        write_scale="normalized",
        addressing_weight=0.1,
    )


class Pass(NamedTuple):
    """What one reading of the text found."""

    hits: np.ndarray
    """``[T-1]`` bool: the nearest code to what token t read, before the write of its chunk, is that of token t + 1."""
    reads: np.ndarray
    """``[S, S]`` int64: how many times each slot was read."""
    collisions: float
    """Fraction of the reads that went to slots which contexts with different next tokens read in this pass."""
    seconds: float
    """Time in the memory: reads, writes and the copy of the outputs."""

    @property
    def recall(self) -> float:
        """Fraction of hits."""
        return float(self.hits.mean())

    @property
    def slots_used(self) -> int:
        """Distinct slots that were read."""
        return int(np.count_nonzero(self.reads))


class Reader:
    """One memory that reads one text as often as asked; its tables last from pass to pass.

    A pass ends with a flush, so that every pass cuts the text into the same chunks.

    Args:
        be: a backend of SPEC.md §8.
        cfg: the memory.
        text: what to read.
        contexts: its queries and values.
        shuffled: bind contexts to values of the shuffled text; recall is judged by the true one all the same.
    """

    def __init__(
        self, be: Backend, cfg: FwPKMConfig, text: Text, contexts: Contexts, *, shuffled: bool = False
    ) -> None:
        """Start from the memory that the seed gives, the same in every backend."""
        self._be, self._cfg, self._text, self._contexts, self._shuffled = be, cfg, text, contexts, shuffled
        self._state = be.init_state(cfg, be.init_memory(cfg, memories=1, seed=SEED), batch_size=1)
        self.device = str(getattr(self._state.memory.values, "device", "cpu"))
        """Where the tables are."""
        # Copying the tables costs more than a step (SPEC.md §5), so overwrite them where the backend can.
        self._apply_options, self._flush_options = _inplace(be.apply), _inplace(be.flush)

    def read(self, advance: Callable[[int], None]) -> Pass:
        """Read the text once; ``advance`` is told how many tokens were read after each call."""
        next_ids = self._text.next_ids
        use = _SlotUse(self._cfg)
        nearest, seconds = [], 0.0
        for start in range(0, len(next_ids), TOKENS_PER_CALL):
            stop = min(len(next_ids), start + TOKENS_PER_CALL)
            output, slots, elapsed = self._step(start, stop)
            use.add(slots, next_ids[start:stop])
            nearest.append(self._contexts.nearest(output))
            seconds += elapsed
            advance(stop - start)
        begin = time.perf_counter()
        self._state, _ = self._be.flush(self._cfg, self._state, **self._flush_options)
        seconds += time.perf_counter() - begin
        return Pass(np.concatenate(nearest)[:-1] == next_ids[:-1], use.reads_by_sub_keys(), use.collisions(), seconds)

    def ask(self, ids: np.ndarray, advance: Callable[[int], None]) -> np.ndarray:
        """``[T]`` ids: the codes nearest to what the contexts of another text [T] read; nothing is written."""
        contexts = Contexts(ids, len(self._text.vocabulary), self._cfg.key_dim, self._cfg.value_dim)
        nearest = []
        for start in range(0, len(ids), TOKENS_PER_CALL):
            stop = min(len(ids), start + TOKENS_PER_CALL)
            arrays = contexts.queries(start, stop), contexts.values(start, stop)
            query, value = (self._be.asarray(x[None], "float32") for x in arrays)
            output, _, _ = self._be.apply(self._cfg, self._state, query, value, update=False)
            nearest.append(contexts.nearest(self._be.to_numpy(output)[0]))
            advance(stop - start)
        return np.concatenate(nearest)

    def _step(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Outputs [n, Dv] and slots [n, k] of tokens start to stop, and the seconds they took."""
        arrays = self._contexts.queries(start, stop), self._contexts.values(start, stop, self._shuffled)
        begin = time.perf_counter()
        query, value = (self._be.asarray(x[None], "float32") for x in arrays)
        output, self._state, trace = self._be.apply(self._cfg, self._state, query, value, **self._apply_options)
        read = self._be.to_numpy(output)[0], self._be.to_numpy(trace.slots)[0]
        return *read, time.perf_counter() - begin


class Lookups(NamedTuple):
    """What one reading of the dictionary found."""

    hits: np.ndarray
    """``[T-1]`` bool: what it has for the last eight tokens, before token t is noted, is token t + 1."""
    seconds: float
    """Time of the reading."""

    @property
    def recall(self) -> float:
        """Fraction of hits."""
        return float(self.hits.mean())


class Round(NamedTuple):
    """One pass of the memory, of its two controls and of the dictionary."""

    memory: Pass
    frozen: Pass
    """learning_rate 0: nothing is written."""
    shuffled: Pass
    """Written with targets that do not follow their contexts."""
    dictionary: Lookups
    """The baseline: an exact dictionary of the last eight tokens."""


class Asked(NamedTuple):
    """Fractions of the tokens whose true successor is found when contexts are looked up and nothing is written."""

    memory: float
    dictionary: float
    falling_back: float
    """The dictionary, which looks up fewer tokens where it does not know all eight."""


class Trial:
    """A memory, its two controls and a dictionary, reading one text side by side.

    Args:
        be: a backend of SPEC.md §8.
        cfg: the memory; its chunks are cut to the length of the text.
        text: what to read.
    """

    def __init__(self, be: Backend, cfg: FwPKMConfig, text: Text) -> None:
        """Draw the contexts and start the memory and its controls alike."""
        # A chunk longer than the text is written whole at the end of the pass, and so is one of its length.
        cfg = dataclasses.replace(cfg, chunk_size=min(cfg.chunk_size, len(text.ids)))
        contexts = Contexts(text.ids, len(text.vocabulary), cfg.key_dim, cfg.value_dim)
        frozen = dataclasses.replace(cfg, learning_rate=0.0)
        self._readers = (
            Reader(be, cfg, text, contexts),
            Reader(be, frozen, text, contexts),
            Reader(be, cfg, text, contexts, shuffled=True),
        )
        self._text, self._dictionary = text, Dictionary(len(text.vocabulary))
        self.device = self._readers[0].device

    def read(self, advance: Callable[[int], None]) -> Round:
        """Read the text once more with all; ``advance`` is told of 3·T tokens in all."""
        memory, frozen, shuffled = (reader.read(advance) for reader in self._readers)
        begin = time.perf_counter()
        found = self._dictionary.read(self._text.ids, self._text.next_ids)
        lookups = Lookups(self._hits(found), time.perf_counter() - begin)
        return Round(memory, frozen, shuffled, lookups)

    def ask(self, advance: Callable[[int], None], *, replaced: bool) -> Asked:
        """Look every context up and write nothing; ``advance`` is told of T tokens.

        With ``replaced`` one token in twenty is another one; what is judged is still the true successor.
        """
        ids = self._text.ids
        ids = replace_some(ids, len(self._text.vocabulary), SEED) if replaced else ids
        found = self._readers[0].ask(ids, advance), *(self._dictionary.ask(ids, fall_back=far) for far in (False, True))
        return Asked(*(float(self._hits(ids).mean()) for ids in found))

    def _hits(self, found: np.ndarray) -> np.ndarray:
        return (found == self._text.next_ids)[:-1]


class _SlotUse:
    """Counts reads of the slots, and notes which are read by contexts with different next tokens."""

    def __init__(self, cfg: FwPKMConfig) -> None:
        self._shape = (cfg.num_subkeys, cfg.num_subkeys)
        self._reads = np.zeros(cfg.num_slots, np.int64)
        self._lowest = np.full(cfg.num_slots, np.iinfo(np.int64).max)
        self._highest = np.full(cfg.num_slots, -1)

    def add(self, slots: np.ndarray, next_ids: np.ndarray) -> None:
        """Count the reads [n, k] of n contexts with these next tokens [n]."""
        entries, followers = slots.ravel(), np.repeat(next_ids, slots.shape[1])
        np.add.at(self._reads, entries, 1)
        np.minimum.at(self._lowest, entries, followers)
        np.maximum.at(self._highest, entries, followers)

    def reads_by_sub_keys(self) -> np.ndarray:
        return self._reads.reshape(self._shape)

    def collisions(self) -> float:
        return float(self._reads[self._lowest < self._highest].sum() / self._reads.sum())


def _inplace(function: Callable[..., Any]) -> dict[str, bool]:
    return {"inplace": True} if "inplace" in inspect.signature(function).parameters else {}
