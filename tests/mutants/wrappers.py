"""Wrong modules of a user: a right backend with one function replaced, which the conformance suite must catch."""

import dataclasses
import itertools
from functools import partial

import numpy as np
from mutants.build import Wrapper

from fwpkm import packing, reference
from fwpkm.containers import Memory
from fwpkm.registry import get_backend

TORCH = get_backend("torch")


def off(x):
    """0.1% too much, of a NumPy array."""
    return x * x.dtype.type(1.001)


def _wrong(name, caught_by, base=reference, **functions):
    return Wrapper(name, base, caught_by, functions)


# Lookup


def _lookup(name, part, change):
    """``change(cfg, look)`` is what stands in that part of what ``lookup`` returns."""

    def lookup(cfg, memory, query):
        look = reference.lookup(cfg, memory, query)
        return look._replace(**{part: change(cfg, look)})

    return _wrong(name, f"lookup {part}", lookup=lookup)


def _exchanged(cfg, look):
    return look.slots % cfg.num_subkeys * cfg.num_subkeys + look.slots // cfg.num_subkeys


def _softmax_per_head(cfg, look):
    by_head = look.weights.reshape(*look.weights.shape[:-1], cfg.num_heads, cfg.top_k)
    return (by_head / by_head.sum(-1, keepdims=True)).reshape(look.weights.shape)


# Chunk update


def _losses(name, part, change):
    def chunk_update(cfg, memory, **tokens):
        written, losses = reference.chunk_update(cfg, memory, **tokens)
        return written, losses._replace(**{part: change(getattr(losses, part))})

    return _wrong(name, f"chunk_update {part}", chunk_update=chunk_update)


def _overshoot(table):
    def chunk_update(cfg, memory, **tokens):
        written, losses = reference.chunk_update(cfg, memory, **tokens)
        old, new = getattr(memory, table), getattr(written, table)
        return written._replace(**{table: old + off(new - old)}), losses

    return _wrong(f"chunk_update of {table} off", f"chunk_update {table}", chunk_update=chunk_update)


def _without_pair(cfg, memory, pair=None, **tokens):
    return reference.chunk_update(cfg, memory, **tokens)


# Beginnings


def _another_seed(cfg, memories=1, seed=0):
    return reference.init_memory(cfg, memories, seed + 1)


def _repeated(cfg, memories=1, seed=0):
    return Memory(*(np.repeat(x, memories, 0) for x in reference.init_memory(cfg, 1, seed)))


def _first_row_alone(cfg, memory, batch_size):
    state = reference.init_state(cfg, memory, batch_size)
    if len(memory.keys) == 1:
        for table in state.memory:
            table[1:] = 0
    return state


# Rows


def _reset_tables_alone(cfg, state, memory, rows):
    return reference.reset(cfg, state, memory, rows).replace_pending(state.pending)


def _reset_every_row(cfg, state, memory, rows):
    return reference.reset(cfg, state, memory)


def _reset_keeps_the_position(cfg, state, memory, rows):
    return reference.reset(cfg, state, memory, rows)._replace(position=state.position)


def _reset_keeps_uses(cfg, state, memory, rows):
    return reference.reset(cfg, state, memory, rows)._replace(uses=state.uses)


def _reset_to_the_first_memory(cfg, state, memory, rows):
    return reference.reset(cfg, state, Memory(*(x[:1] for x in memory)), rows)


def _select_sorted(cfg, state, rows):
    return reference.select(cfg, state, sorted(rows))


def _select_keeps_positions(cfg, state, rows):
    return reference.select(cfg, state, rows)._replace(position=state.position[: len(rows)])


def _select_shares(cfg, state, rows):
    selected = reference.select(cfg, state, rows)
    return selected if cfg.memory_scope == "sequence" else selected._replace(memory=state.memory)


def _concat_reversed(cfg, states):
    return reference.concat(cfg, states[::-1])


def _concat_first_position(cfg, states):
    joined = reference.concat(cfg, states)
    return joined._replace(position=np.resize(states[0].position, joined.position.shape))


def _put_elsewhere(cfg, state, rows, other):
    return reference.put(cfg, state, [(row + 1) % len(state.position) for row in rows], other)


def _put_tables_alone(cfg, state, rows, other):
    return state._replace(memory=reference.put(cfg, state, rows, other).memory)


def _pending_of_the_first(cfg, state):
    counts = reference.pending(cfg, state)
    return np.full_like(counts, counts[0])


def _flush_of_all(cfg, state, rows=None):
    return reference.flush(cfg, state)


def _flush_counts_all(cfg, state, rows=None):
    return reference.flush(cfg, state, rows)[0], reference.flush(cfg, state)[1]


def _from_memory(name, change):
    """``change(cfg, memory, options)`` is what ``apply`` returns where it is given a memory in place of a state."""

    def apply(cfg, state, **options):
        return change(cfg, state, options) if isinstance(state, Memory) else reference.apply(cfg, state, **options)

    return _wrong(name, "from a memory", apply=apply)


def _unmasked(cfg, memory, options):
    return reference.apply(cfg, memory, **options | {"mask": None})


def _without_writes(cfg, memory, options):
    return reference.apply(cfg, memory, **options | {"update": False})


def _in_place_reads_only(cfg, state, inplace=False, **options):
    return reference.apply(cfg, state, **options | ({"update": False} if inplace else {}))


# Packed states


def _pack_by_value(cfg, state, memory, dtype=None):
    def changed(values, initial):
        slots = np.flatnonzero((values != initial).any(-1))
        return slots, values[slots]

    return packing.pack(cfg, state, memory, dtype, reference.SELF, changed=changed)


def _pack_every_row(cfg, state, memory, dtype=None):
    every = lambda values, initial: (np.arange(len(values)), values)  # noqa: E731
    return packing.pack(cfg, state, memory, dtype, reference.SELF, changed=every)


def _pack_rounds(cfg, state, memory, dtype=None):
    packed = reference.pack(cfg, state, memory)
    return dataclasses.replace(packed, values=packed.values.astype(np.float16).astype(packed.values.dtype))


def _unpack_without_tokens(cfg, packed, memory):
    state = reference.unpack(cfg, packed, memory)
    return state.replace_pending(state.pending.map(np.zeros_like))


def _unpack_with_initial_keys(cfg, packed, memory):
    state = reference.unpack(cfg, packed, memory)
    keys = np.broadcast_to(memory.keys, state.memory.keys.shape)
    return state._replace(memory=state.memory._replace(keys=keys))


def _unpack_beside_any(cfg, packed, memory):
    parts = packed if isinstance(packed, list) else [packed]
    own = np.split(packing.digests(memory), len(parts)) if len(memory.keys) > 1 else [packing.digests(memory)]
    parts = [dataclasses.replace(one, initial=np.resize(mine, one.initial.shape)) for one, mine in zip(parts, own)]
    return reference.unpack(cfg, parts, memory)


# update=False, and flush


def _read_only(name, part, change):
    """``change(output, state, length)`` is what ``apply`` of so many tokens gives under ``update=False``."""

    def apply(cfg, state, query, update=True, **tokens):
        output, after, trace = reference.apply(cfg, state, query, update=update, **tokens)
        return (output, after, trace) if update else (*change(output, after, query.shape[1]), trace)

    return _wrong(name, f"update=False {part}", apply=apply)


def _writes(cfg, state, update=True, **tokens):
    return reference.apply(cfg, state, **tokens)


def _moves_on(output, state, length):
    return output, state._replace(position=state.position + np.int32(length))


def _forgets(output, state, length):
    return output, state.replace_pending(state.pending.map(np.zeros_like))


def _packed_reads_a_chunk(cfg, state, query, update=True, cu_seqlens=None, **tokens):
    output, after, trace = reference.apply(cfg, state, query, update=update, cu_seqlens=cu_seqlens, **tokens)
    if cu_seqlens is not None and not update:
        for start, stop in itertools.pairwise(cu_seqlens.tolist()):
            output[:, start + cfg.chunk_size : stop] = output[:, start : start + 1]
    return output, after, trace


def _flush_keeps_pending(cfg, state, rows=None):
    after, trace = reference.flush(cfg, state, rows)
    return after.replace_pending(state.pending), trace


def _flush_keeps_mask(cfg, state, rows=None):
    after, trace = reference.flush(cfg, state, rows)
    return after._replace(pending_mask=state.pending_mask), trace


# Arguments


def _apply_spoils(cfg, state, query, **others):
    result = TORCH.apply(cfg, state, query.clone(), **others)
    if not query.requires_grad:
        query.mul_(1.001)
    return result


def _lookup_spoils(cfg, memory, query):
    look = reference.lookup(cfg, memory, query)
    query /= query.dtype.type(2)
    return look


def _chunk_in_place(cfg, memory, **tokens):
    written, losses = reference.chunk_update(cfg, memory, **tokens)
    for table, new in zip(memory, written):
        table[...] = new
    return memory, losses


def _reset_in_place(cfg, state, memory, rows):
    for array, new in zip(state.pending, reference.reset(cfg, state, memory, rows).pending):
        array[...] = new
    return reference.reset(cfg, state, memory, rows)


FUNCTIONS = [
    _lookup("lookup off", "output", lambda _, look: off(look.output)),
    _lookup("lookup of another slot", "slots", _exchanged),
    _lookup("lookup with a softmax per head", "weights", _softmax_per_head),
    _lookup("lookup weights off", "weights", lambda _, look: off(look.weights)),
    _overshoot("values"),
    _overshoot("keys"),
    _wrong("chunk_update without pair", "chunk_update values", chunk_update=_without_pair),
    _losses("memorization loss without its half", "memorization", lambda x: 2 * x),
    _losses("entropy for the addressing loss", "addressing", lambda x: -x),
    _losses("memorization loss of the whole batch", "memorization", lambda x: np.full_like(x, x.mean())),
    _wrong("init_memory of another seed", "init_memory", init_memory=_another_seed),
    _wrong("init_memory alike for every row", "init_memory", init_memory=_repeated),
    _wrong("one memory for the first row alone", "init_state", init_state=_first_row_alone),
    _wrong("reset does nothing", "reset", reset=lambda cfg, state, memory, rows: state),
    _wrong("reset keeps pending tokens", "reset", reset=_reset_tables_alone),
    _wrong("reset of every row", "reset", reset=_reset_every_row),
    _wrong("reset keeps the position", "reset", reset=_reset_keeps_the_position),
    _wrong("reset keeps the uses", "reset", reset=_reset_keeps_uses),
    _wrong("reset to the first row's memory", "reset", reset=_reset_to_the_first_memory),
    _wrong("select in the state's order", "select", select=_select_sorted),
    _wrong("select keeps the positions", "select", select=_select_keeps_positions),
    _wrong("select shares the one memory", "apart", select=_select_shares),
    _wrong("concat in reverse", "concat", concat=_concat_reversed),
    _wrong("concat takes the first state's positions", "concat", concat=_concat_first_position),
    _wrong("put at another row", "put", put=_put_elsewhere),
    _wrong("put of the tables alone", "put", put=_put_tables_alone),
    _wrong("pending tokens of the first row", "pending, nbytes", pending=_pending_of_the_first),
    _wrong("nbytes of the tables alone", "pending, nbytes", nbytes=lambda state: sum(x.nbytes for x in state.memory)),
    _wrong("pack compares rows by value", "pack", pack=_pack_by_value),
    _wrong("pack keeps every row", "pack", pack=_pack_every_row),
    _wrong("pack rounds rows", "pack", pack=_pack_rounds),
    _wrong("unpack drops pending tokens", "pack", unpack=_unpack_without_tokens),
    _wrong("unpack takes the initial keys", "pack", unpack=_unpack_with_initial_keys),
    _wrong("unpack beside any memory", "pack", unpack=_unpack_beside_any),
    _wrong("flush takes no rows", "flush rows", flush=_flush_of_all),
    _wrong("flush of rows counts the writes of all", "flush rows", flush=_flush_counts_all),
    _from_memory("a memory is read without the mask", _unmasked),
    _from_memory("a memory is read and not written", _without_writes),
    _wrong("a call in place writes nothing", "apart", apply=_in_place_reads_only),
    _wrong("update=False writes", "update=False state", apply=_writes),
    _read_only("update=False moves the position", "state", _moves_on),
    _read_only("update=False drops pending tokens", "state", _forgets),
    _read_only("update=False reads wrong", "output", lambda output, state, _: (off(output), state)),
    _wrong("update=False reads a chunk of packed sequences", "update=False output", apply=_packed_reads_a_chunk),
    _wrong("flush keeps pending tokens", "flush", flush=_flush_keeps_pending),
    _wrong("flush keeps the pending mask", "flush", flush=_flush_keeps_mask),
    _wrong("apply overwrites the tables", "arguments", apply=partial(reference.apply, inplace=True)),
    _wrong("apply overwrites the query", "arguments", TORCH, apply=_apply_spoils),
    _wrong("flush overwrites the tables", "arguments", flush=partial(reference.flush, inplace=True)),
    _wrong("lookup overwrites the query", "arguments", lookup=_lookup_spoils),
    _wrong("chunk_update overwrites the tables", "arguments", chunk_update=_chunk_in_place),
    _wrong("reset overwrites pending tokens", "arguments", reset=_reset_in_place),
]
