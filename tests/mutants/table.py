"""One-line mistakes in the reference that the conformance suite must catch: those that implementers of it make."""

from mutants.build import Mutant

_SELECTION = "return Selection(subkeys, chosen, slots.reshape(n, cfg.slots_per_token), softmax(logits), finite)"
_MEAN = "return touched, np.add.reduceat(terms, first, axis=0) / reads[:, None].astype(terms.dtype)"
_WINDOW = "return _write(cfg, memory, selections, window, ahead(cfg, window.value), counted, pair)"
_FINITE = 'numbers = [x for field, x in zip(TOKEN_FIELDS, tokens) if field.kind == "float"]'
_PENDING = "return _filled(dtype, state.pending).slice(0, count)"
_STATE = "return State.of(memory, padded, np.full(batch, position, np.int32))"
_FLUSHED = "return _state(cfg, memory, _no_tokens(cfg, batch, dtype), 0), trace._replace(writes=np.int32(writes))"
_LOSSES = "trace.memorization[:, writes], trace.addressing[:, writes] = losses"
_LATE = "late = slice(max(0, stop - schedule.lag(cfg)), stop)"


def _equations(name: str, right: str, wrong: str, caught_by: str) -> Mutant:
    return Mutant(name, "equations.py", right, wrong, caught_by)


def _reference(name: str, right: str, wrong: str, caught_by: str) -> Mutant:
    return Mutant(name, "reference.py", right, wrong, caught_by)


LOOKUP = [
    _equations(
        "weights of one head normalised alone",
        _SELECTION,
        _SELECTION.replace("softmax(logits)", "softmax(logits.reshape(n, cfg.num_heads, -1)).reshape(n, -1)"),
        "weights",
    ),
    _equations(
        "temperature ignored",
        "logits = sums.reshape(n, cfg.slots_per_token) / query.dtype.type(cfg.temperature)",
        "logits = sums.reshape(n, cfg.slots_per_token)",
        "weights",
    ),
    _equations(
        "codebooks exchanged in the slot's id",
        "slots[:, h] = first * cfg.num_subkeys + second",
        "slots[:, h] = second * cfg.num_subkeys + first",
        "slots",
    ),
    _reference(
        "tables of two rows swapped",
        "return min(row, len(memory.keys) - 1)",
        "return (row + 1) % len(memory.keys)",
        "output",
    ),
]

LOSSES = [
    _equations(
        "heads pooled in the addressing loss",
        "return mean / max(1, counted.sum())",
        "return np.broadcast_to(mean.mean(0), mean.shape) / max(1, counted.sum())",
        "addressing",
    ),
    _equations(
        "mean over all tokens instead of unmasked ones",
        "return mean / max(1, counted.sum())",
        "return mean / len(counted)",
        "addressing",
    ),
    _equations(
        "temperature in the addressing loss",
        "return softmax(chosen_scores)",
        "return softmax(chosen_scores / 2)",
        "keys",
    ),
    _reference(
        "lookahead off by one",
        _WINDOW,
        _WINDOW.replace("ahead(cfg, window.value)", "np.roll(ahead(cfg, window.value), -1, 1)"),
        "memorization",
    ),
    _reference(
        "tokens whose target has not arrived make a pair",
        "pair = equations.pairs(cfg, counted, live)",
        "pair = counted",
        "memorization",
    ),
]

UPDATE = [
    _equations(
        "masked reads counted in N",
        _MEAN,
        "return touched, np.add.reduceat(terms, first) / np.bincount(selection.slots.ravel())[touched][:, None]",
        "values",
    ),
    _equations("sums of terms instead of means", _MEAN, _MEAN.partition(" / ")[0], "values"),
    _equations(
        "kappa constant under normalized",
        "return 1 / np.square(weights).sum(-1)",
        "return np.full(len(weights), cfg.slots_per_token, weights.dtype)",
        "values",
    ),
    _equations(
        "gate left out of the write",
        "strength = np.where(pair, write_scale(cfg, selection.weights) * gate, 0)",
        "strength = np.where(pair, write_scale(cfg, selection.weights), 0)",
        "values",
    ),
    _equations(
        "gradients clipped by norm",
        "gradient = np.clip(gradient, -cfg.grad_clip, cfg.grad_clip)",
        "gradient = gradient * min(1, cfg.grad_clip / (np.linalg.norm(gradient) + 1e-9))",
        "values",
    ),
    _reference("keys not updated", "keys[...] = equations.step(cfg, keys, weighted)", "pass", "keys"),
    _reference(
        "untouched slots decay",
        "values[touched] = equations.step(cfg, values[touched], gradient)",
        "values[touched] = equations.step(cfg, values[touched], gradient); values *= 1 - cfg.weight_decay",
        "values",
    ),
]

STREAM = [
    Mutant("wait writes at once", "schedule.py", "return cfg.lookahead", "return 0", "output"),
    _reference(
        "wait reading late",
        _LOSSES,
        f"{_LOSSES}; {_LATE}; output[:, late] = _look(cfg, memory, tokens.query[:, late])[0].output",
        "output",
    ),
    _reference(
        "pairs across a boundary",
        "batch, length = query.shape[:2]",
        'batch, length, cfg = *query.shape[:2], FwPKMConfig(**{**cfg.__dict__, "boundary": "wait"})',
        "memorization",
    ),
    _reference(
        "pending gate lost in a split",
        _PENDING,
        _PENDING.replace("pending)", "pending._replace(gate=None))"),
        "values",
    ),
    _reference(
        "pending mask lost in a split",
        _PENDING,
        _PENDING.replace("pending)", "pending._replace(mask=None))"),
        "values",
    ),
    _reference(
        "tables of two rows swapped in the state",
        _STATE,
        _STATE.replace("State.of(memory", "State.of(Memory(*(x[::-1].copy() for x in memory))"),
        "keys",
    ),
    _reference("flush keeps the position", _FLUSHED, _FLUSHED.replace(", 0)", ", int(state.position[0]))"), "position"),
    _reference("values that are not finite are targets", _FINITE, "numbers = [tokens.query]", "output"),
]

LINES = [*LOOKUP, *LOSSES, *UPDATE, *STREAM]
