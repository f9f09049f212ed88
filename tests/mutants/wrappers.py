"""Wrong modules of a user: a right backend with one function replaced, which the conformance suite must catch."""

import numpy as np
from mutants.build import Wrapper

from fwpkm import reference
from fwpkm.containers import Memory
from fwpkm.registry import get_backend
from fwpkm.tokens import Tokens

TORCH = get_backend("torch")


def off(x):
    """0.1% too much, of a NumPy array."""
    return x * x.dtype.type(1.001)


def _lookup(change):
    return {"lookup": lambda cfg, memory, query: change(cfg, reference.lookup(cfg, memory, query))}


def _softmax_per_head(cfg, look):
    by_head = look.weights.reshape(*look.weights.shape[:-1], cfg.num_heads, cfg.top_k)
    return look._replace(weights=(by_head / by_head.sum(-1, keepdims=True)).reshape(look.weights.shape))


def _exchanged(cfg, look):
    return look._replace(slots=look.slots % cfg.num_subkeys * cfg.num_subkeys + look.slots // cfg.num_subkeys)


LOOKUP = [
    Wrapper("lookup off", reference, "lookup output", _lookup(lambda _, x: x._replace(output=off(x.output)))),
    Wrapper("lookup of another slot", reference, "lookup slots", _lookup(_exchanged)),
    Wrapper("lookup with a softmax per head", reference, "lookup weights", _lookup(_softmax_per_head)),
    Wrapper(
        "lookup weights off", reference, "lookup weights", _lookup(lambda _, x: x._replace(weights=off(x.weights)))
    ),
]


def _chunk(change):
    def chunk_update(cfg, memory, query, target, gate=None, mask=None, pair=None):
        return change(memory, *reference.chunk_update(cfg, memory, query, target, gate, mask, pair))

    return {"chunk_update": chunk_update}


def _losses(**changes):
    def changed(_, written, losses):
        return written, losses._replace(**{name: change(losses) for name, change in changes.items()})

    return _chunk(changed)


def _overshoot(name):
    def changed(before, written, losses):
        old, new = getattr(before, name), getattr(written, name)
        return written._replace(**{name: old + off(new - old)}), losses

    return _chunk(changed)


def _without_pair(cfg, memory, query, target, gate=None, mask=None, pair=None):
    return reference.chunk_update(cfg, memory, query, target, gate, mask)


CHUNK_UPDATE = [
    Wrapper("chunk_update of values off", reference, "chunk_update values", _overshoot("values")),
    Wrapper("chunk_update of keys off", reference, "chunk_update keys", _overshoot("keys")),
    Wrapper("chunk_update without pair", reference, "chunk_update values", {"chunk_update": _without_pair}),
    Wrapper(
        "memorization loss without its half",
        reference,
        "chunk_update memorization",
        _losses(memorization=lambda x: 2 * x.memorization),
    ),
    Wrapper(
        "entropy for the addressing loss",
        reference,
        "chunk_update addressing",
        _losses(addressing=lambda x: -x.addressing),
    ),
    Wrapper(
        "memorization loss of the whole batch",
        reference,
        "chunk_update memorization",
        _losses(memorization=lambda x: np.full_like(x.memorization, x.memorization.mean())),
    ),
]


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


INITIAL = [
    Wrapper("init_memory of another seed", reference, "init_memory", {"init_memory": _another_seed}),
    Wrapper("init_memory alike for every row", reference, "init_memory", {"init_memory": _repeated}),
    Wrapper("one memory for the first row alone", reference, "init_state", {"init_state": _first_row_alone}),
]


def _reset_tables_alone(state, memory, rows):
    return reference.reset(state, memory, rows).replace_pending(state.pending)


def _reset_every_row(state, memory, rows):
    return reference.reset(state, memory, range(len(state.position)))


def _reset_the_count(state, memory, rows):
    return reference.reset(state, memory, rows)._replace(position=np.zeros_like(state.position))


RESET = [
    Wrapper("reset does nothing", reference, "reset", {"reset": lambda state, memory, rows: state}),
    Wrapper("reset keeps pending tokens", reference, "reset", {"reset": _reset_tables_alone}),
    Wrapper("reset of every row", reference, "reset", {"reset": _reset_every_row}),
    Wrapper("reset of the count", reference, "reset", {"reset": _reset_the_count}),
]


def _read_only(change):
    """An ``apply`` that does to ``update=False`` what ``change(cfg, state, tokens)`` says."""

    def apply(cfg, state, query, value, gate=None, mask=None, update=True):
        if update:
            return reference.apply(cfg, state, query, value, gate, mask)
        return change(cfg, state, Tokens(query, value, gate, mask))

    return {"apply": apply}


def _moves_on(cfg, state, tokens):
    output, state, trace = reference.apply(cfg, state, *tokens, update=False)
    return output, state._replace(position=state.position + np.int32(tokens.length)), trace


def _forgets(cfg, state, tokens):
    output, state, trace = reference.apply(cfg, state, *tokens, update=False)
    return output, state.replace_pending(state.pending.map(np.zeros_like)), trace


def _reads_wrong(cfg, state, tokens):
    output, state, trace = reference.apply(cfg, state, *tokens, update=False)
    return off(output), state, trace


READ_ONLY = [
    Wrapper(
        "update=False writes",
        reference,
        "update=False state",
        _read_only(lambda cfg, state, tokens: reference.apply(cfg, state, *tokens)),
    ),
    Wrapper("update=False moves the position", reference, "update=False state", _read_only(_moves_on)),
    Wrapper("update=False drops pending tokens", reference, "update=False state", _read_only(_forgets)),
    Wrapper("update=False reads wrong", reference, "update=False output", _read_only(_reads_wrong)),
]


def _flush_keeps_pending(cfg, state):
    after, trace = reference.flush(cfg, state)
    return after.replace_pending(state.pending), trace


def _flush_keeps_mask(cfg, state):
    after, trace = reference.flush(cfg, state)
    return after._replace(pending_mask=state.pending_mask), trace


FLUSH = [
    Wrapper("flush keeps pending tokens", reference, "flush", {"flush": _flush_keeps_pending}),
    Wrapper("flush keeps the pending mask", reference, "flush", {"flush": _flush_keeps_mask}),
]


def _apply_in_place(cfg, state, query, value, gate=None, mask=None, update=True):
    return reference.apply(cfg, state, query, value, gate, mask, update, inplace=True)


def _apply_spoils(cfg, state, query, value, gate=None, mask=None, update=True):
    result = TORCH.apply(cfg, state, query.clone(), value, gate, mask, update)
    if not query.requires_grad:
        query.mul_(1.001)
    return result


def _flush_in_place(cfg, state):
    return reference.flush(cfg, state, inplace=True)


def _lookup_spoils(cfg, memory, query):
    look = reference.lookup(cfg, memory, query)
    query /= query.dtype.type(2)
    return look


def _chunk_in_place(cfg, memory, query, target, gate=None, mask=None, pair=None):
    written, losses = reference.chunk_update(cfg, memory, query, target, gate, mask, pair)
    for table, new in zip(memory, written):
        table[...] = new
    return memory, losses


def _reset_in_place(state, memory, rows):
    for array, new in zip(state.pending, reference.reset(state, memory, rows).pending):
        array[...] = new
    return reference.reset(state, memory, rows)


ARGUMENTS = [
    Wrapper("apply overwrites the tables", reference, "arguments", {"apply": _apply_in_place}),
    Wrapper("apply overwrites the query", TORCH, "arguments", {"apply": _apply_spoils}),
    Wrapper("flush overwrites the tables", reference, "arguments", {"flush": _flush_in_place}),
    Wrapper("lookup overwrites the query", reference, "arguments", {"lookup": _lookup_spoils}),
    Wrapper("chunk_update overwrites the tables", reference, "arguments", {"chunk_update": _chunk_in_place}),
    Wrapper("reset overwrites pending tokens", reference, "arguments", {"reset": _reset_in_place}),
]

FUNCTIONS = [*LOOKUP, *CHUNK_UPDATE, *INITIAL, *RESET, *READ_ONLY, *FLUSH, *ARGUMENTS]
