"""A window: tokens that read the same tables, and the chunk at its beginning that may be written after them (§2 to §4).

``visit`` finds what the tokens pick, without gradients. ``walk`` computes what follows from that, given the rows that
they touch; it is differentiable, so a backward pass needs to keep no more than a ``Visit``.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from fwpkm.backends.jax.addressing import Choice, address, choose, write_keys
from fwpkm.backends.jax.table import Touched, read, rewrite
from fwpkm.backends.jax.tokens import Tokens, ahead, by_memory, halves
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory


class Visit(NamedTuple):
    """What the n tokens of a window met."""

    keys: Array
    """``[M, H, 2, S, d]`` the codebooks that they read."""
    rows: Array
    """``[E, Dv]`` the rows of the value table that they read, distinct."""
    touched: Touched
    """where those rows stand."""
    choice: Choice
    """what they picked."""
    dead: Array
    """``[B, n]`` bool: some input or selected score is not finite."""


class Write(NamedTuple):
    """What a chunk writes."""

    target: Array
    """``[B, n, Dv]``: u, for the tokens that have a pair."""
    pair: Array
    """``[B, n]`` bool"""
    counted: Array
    """``[B, n]`` bool: the tokens whose reads count in N_i."""


class Moved(NamedTuple):
    """What a write moved: all that it could, but for what would not be finite."""

    keys: Array
    """``[M, H, 2, S, 1]`` bool"""
    rows: Array
    """``[E]`` bool: of the touched rows."""


class Step(NamedTuple):
    """What a window gives."""

    reads: Array
    """``[B, n, Dv]``"""
    weights: Array
    """``[B, n, H*k]``"""
    keys: Array
    """the codebooks afterwards."""
    rows: Array
    """the touched rows afterwards."""
    memorization: Array
    """``[M]`` loss, 0 where nothing is written."""
    addressing: Array
    """``[M]`` likewise."""
    moved: Moved | None
    """None where nothing is written."""


def visit(cfg: FwPKMConfig, memory: Memory, window: Tokens, dead: Array) -> Visit:
    """Find what a window's tokens pick; ``dead`` [B, n] are those known not to be finite."""
    memories, slots, width = memory.values.shape
    choice = choose(cfg, halves(cfg, window.without(dead).query, memories), memory.keys)
    first = slots * jnp.arange(memories, dtype=choice.slots.dtype)[:, None, None]
    touched = Touched.of((choice.slots + first).reshape(-1, cfg.slots_per_token), memories * slots)
    # Without the barrier XLA may read the table again where the rows are used, after a write, and so copies it first.
    rows = lax.optimization_barrier(touched.take(memory.values.reshape(-1, width)))
    return Visit(memory.keys, rows, touched, choice, dead | ~choice.finite.reshape(dead.shape))


def chunk_of(cfg: FwPKMConfig, window: Tokens) -> Write:
    """The first C tokens of a window; those after serve only as targets (§5)."""
    counted = window.mask & (jnp.arange(window.length) < cfg.chunk_size)
    return Write(ahead(window.value, cfg.lookahead), counted & ahead(window.mask, cfg.lookahead), counted)


def walk(
    cfg: FwPKMConfig,
    keys: Array,
    rows: Array,
    window: Tokens,
    found: Visit,
    write: Write | None,
    num_slots: int,
    moved: Moved | None = None,
) -> Step:
    """Read a window and perform its write, if it has one.

    Args:
        cfg: the configuration.
        keys: those of ``found``, as an argument to differentiate by.
        rows: likewise.
        window: its tokens, the dead ones blanked.
        found: what they met.
        write: what to write, or None.
        num_slots: N.
        moved: what the write moves, where an earlier walk has found it.
    """
    memories, shape, place = len(keys), window.mask.shape, found.touched.place
    query = halves(cfg, window.query, memories)
    at = address(cfg, query, keys, found.choice)
    weights = at.weights.reshape(-1, cfg.slots_per_token)
    reads = read(rows, place, weights)
    none = jnp.zeros(memories, keys.dtype)
    step = Step(reads.reshape(*shape, -1), weights.reshape(*shape, -1), keys, rows, none, none, None)
    if write is None:
        return step
    pair, counted = write.pair.ravel(), write.counted
    active = by_memory(write.pair, memories).any(1)
    keys_move, rows_move = moved or (None, None)
    keys, keys_move, addressing = write_keys(
        cfg, query, keys, at, found.choice.subkeys, by_memory(counted, memories), active, keys_move
    )
    gate = window.gate.ravel()
    error = reads - jnp.where(write.pair[..., None], write.target, 0).reshape(reads.shape)
    pull = jnp.where(pair, _write_scale(cfg, weights) * gate, 0)[:, None] * weights
    entries = jnp.broadcast_to(counted.ravel()[:, None], place.shape)
    count = jnp.zeros(len(rows), jnp.int32).at[place].add(entries.astype(jnp.int32), mode="promise_in_bounds")
    owner = jnp.minimum(found.touched.rows // num_slots, memories - 1)
    rows, rows_move = rewrite(cfg, rows, place, pull, error, count, active[owner] & (count > 0), rows_move)
    share = jnp.where(pair, 0.5 * gate * jnp.square(error).sum(-1), 0)
    losses = lax.stop_gradient((share.reshape(memories, -1).sum(1), addressing))
    moved = Moved(keys_move, rows_move)
    return step._replace(keys=keys, rows=rows, memorization=losses[0], addressing=losses[1], moved=moved)


def _write_scale(cfg: FwPKMConfig, weights: Array) -> Array | float:
    """κ of each token (§4)."""
    if cfg.write_scale == "slots":
        return float(cfg.slots_per_token)
    return 1.0 if cfg.write_scale == "unit" else 1 / jnp.square(weights).sum(-1)
