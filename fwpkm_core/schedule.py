"""When chunks are written: one integer schedule for every backend (SPEC.md §5).

Chunk c holds the tokens [cC, (c+1)C) since the sequence began or was last flushed. It is written once ``lag`` more
tokens have been read, where lag is 0 under boundary="drop" and L under "wait". Everything follows from that one rule.

``written``, ``pending`` and ``reduced`` use nothing but +, -, *, // and abs, so Python integers and traced arrays both
pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

from fwpkm.config import FwPKMConfig
from fwpkm.tokens import Array

MAX_POSITION = 2**31 - 1  # positions are int32
_FAR = 2**30


class Window(NamedTuple):
    """A run of one call's tokens that reads the same tables.

    ``start`` and ``stop`` count from the call's first token. With ``writes`` the tables are rewritten after ``stop``:
    the ``pending`` tokens and these together are then exactly C + lag.
    """

    start: int
    stop: int
    writes: bool


def lag(cfg: FwPKMConfig) -> int:
    """Tokens read between a chunk's end and its write.

    Raises:
        ValueError: the boundary is another one.
    """
    if cfg.boundary == "drop":
        return 0
    if cfg.boundary == "wait":
        return cfg.lookahead
    return cfg.refuse("boundary", "fwpkm")


def written(cfg: FwPKMConfig, position: Array) -> Array:
    """How many chunks have been written once ``position`` tokens were read: max(0, (position - lag) // C)."""
    chunks = (position - lag(cfg)) // cfg.chunk_size
    if lag(cfg) == 0:
        return chunks
    return chunks - (chunks - abs(chunks)) // 2  # max(0, chunks) without a branch, and without overflow of int32


def pending(cfg: FwPKMConfig, position: Array) -> Array:
    """How many of ``position`` tokens no write has consumed yet; at most ``cfg.capacity``."""
    return position - written(cfg, position) * cfg.chunk_size


def reduced(cfg: FwPKMConfig, position: Array) -> Array:
    """``position`` less a multiple of C where it is 2³⁰ or more, so that no call overflows it: the same clock (§5)."""
    settled = cfg.chunk_size + lag(cfg)
    far = position // _FAR  # 0 or 1, as positions are int32
    return position - far * (position - settled) // cfg.chunk_size * cfg.chunk_size


def max_writes(cfg: FwPKMConfig, length: int) -> int:
    """W, the most writes that ``length`` tokens can cause: ceil(T/C)."""
    return -(-length // cfg.chunk_size)


def flush_writes(cfg: FwPKMConfig, pending: Array) -> Array:
    """1 where a flush has a chunk to write, else 0: more than lag tokens, since fewer make no pair under "wait"."""
    excess = pending - lag(cfg)
    return (1 + abs(excess) - abs(excess - 1)) // 2  # excess > 0 as an int, which TensorFlow makes of no bool by 1 *


def windows(cfg: FwPKMConfig, position: int, length: int) -> Iterator[Window]:
    """The runs of ``length`` tokens that begin at ``position``, in order; none is empty."""
    start = 0
    while start < length:
        missing = cfg.chunk_size + lag(cfg) - pending(cfg, position + start)
        stop = min(length, start + missing)
        yield Window(start, stop, writes=stop - start == missing)
        start = stop
