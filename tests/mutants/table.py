"""One-line mistakes that the conformance suite must catch: those that implementers of this memory make."""

from mutants.build import Mutant

_SELECTION = "return Selection(subkeys, chosen, slots.reshape(n, cfg.slots_per_token), softmax(logits), finite)"
_MEAN = "return touched, np.add.reduceat(pulls, first, axis=0) / reads[:, None].astype(pulls.dtype)"
_WINDOW = "return _write(cfg, memory, selections, window, _ahead(window.value, cfg.lookahead), counted, pair)"
_FINITE = "return np.isfinite(tokens.query).all(-1) & np.isfinite(tokens.value).all(-1) & np.isfinite(tokens.gate)"
_STATE = "return State(memory, *padded, position=np.full(batch, position, np.int32))"
_FLUSHED = "return _state(cfg, memory, _no_tokens(cfg, batch, dtype), 0), trace._replace(writes=np.int32(writes))"
_LOSSES = "trace.memorization[:, writes], trace.addressing[:, writes] = losses"
_LATE = "late = slice(max(0, stop - schedule.lag(cfg)), stop)"
_STRENGTH = "strength = [torch.where(v.pair, _write_scale(cfg, v.weights) * v.tokens.gate, 0) for v in visits]"


def _equations(name: str, right: str, wrong: str, caught_by: str) -> Mutant:
    return Mutant(name, "numpy", "equations.py", right, wrong, caught_by)


def _reference(name: str, right: str, wrong: str, caught_by: str) -> Mutant:
    return Mutant(name, "numpy", "reference.py", right, wrong, caught_by)


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
        "lookahead off by one", _WINDOW, _WINDOW.replace("cfg.lookahead)", "cfg.lookahead + 1)"), "memorization"
    ),
    _reference(
        "tokens whose target has not arrived make a pair",
        "pair = counted & _ahead(live, cfg.lookahead)",
        "pair = counted",
        "memorization",
    ),
]

UPDATE = [
    _equations(
        "masked reads counted in N",
        _MEAN,
        "return touched, np.add.reduceat(pulls, first) / np.bincount(selection.slots.ravel())[touched][:, None]",
        "values",
    ),
    _equations("sums of pulls instead of means", _MEAN, _MEAN.partition(" / ")[0], "values"),
    _equations(
        "kappa constant under normalized",
        "return 1 / np.square(weights).sum(-1)",
        "return np.full(len(weights), cfg.slots_per_token, weights.dtype)",
        "values",
    ),
    _equations(
        "gate left out of the write",
        "coefficient = np.where(pair, write_scale(cfg, selection.weights) * gate, 0)",
        "coefficient = np.where(pair, write_scale(cfg, selection.weights), 0)",
        "values",
    ),
    _equations(
        "gradients clipped by norm",
        "gradient = np.clip(gradient, -cfg.grad_clip, cfg.grad_clip)",
        "gradient = gradient * min(1, cfg.grad_clip / (np.linalg.norm(gradient) + 1e-9))",
        "values",
    ),
    _reference("keys not updated", "keys[...] = equations.step(cfg, keys, spread)", "pass", "keys"),
    _reference(
        "untouched slots decay",
        "values[touched] = equations.step(cfg, values[touched], pull)",
        "values[touched] = equations.step(cfg, values[touched], pull); values *= 1 - cfg.weight_decay",
        "values",
    ),
]

STREAM = [
    Mutant(
        "wait writes at once",
        "numpy",
        "schedule.py",
        'return cfg.lookahead if cfg.boundary == "wait" else 0',
        "return 0",
        "output",
    ),
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
        "return _tokens(dtype, *state[1:5]).slice(0, count)",
        "return _tokens(dtype, *state[1:3], None, state[4]).slice(0, count)",
        "values",
    ),
    _reference(
        "pending mask lost in a split",
        "return _tokens(dtype, *state[1:5]).slice(0, count)",
        "return _tokens(dtype, *state[1:4], None).slice(0, count)",
        "values",
    ),
    _reference(
        "tables of two rows swapped in the state",
        _STATE,
        _STATE.replace("State(memory", "State(Memory(*(x[::-1].copy() for x in memory))"),
        "keys",
    ),
    _reference("flush keeps the position", _FLUSHED, _FLUSHED.replace(", 0)", ", int(state.position[0]))"), "position"),
    _reference("values that are not finite are targets", _FINITE, "return np.isfinite(tokens.query).all(-1)", "output"),
]

GRADIENTS = [
    Mutant(
        "kappa's gradient dropped",
        "torch",
        "stream.py",
        'return 1.0 if cfg.write_scale == "unit" else 1 / weights.square().sum(-1)',
        'return 1.0 if cfg.write_scale == "unit" else 1 / weights.detach().square().sum(-1)',
        "grad query",
    ),
    Mutant(
        "no gradient from a write to the gate",
        "torch",
        "stream.py",
        _STRENGTH,
        _STRENGTH.replace("v.tokens.gate", "v.tokens.gate.detach()"),
        "grad gate",
    ),
    Mutant(
        "no gradient through written values",
        "torch",
        "table.py",
        "if write and reached:",
        "if write and not reached:",
        "grad value",
    ),
    Mutant(
        "no gradient through written keys",
        "torch",
        "addressing.py",
        "return torch.where(active[:, None, None, None, None] & finite, new, keys), loss",
        "return torch.where(active[:, None, None, None, None] & finite, new.detach(), keys), loss",
        "grad keys",
    ),
    Mutant(
        "clipped elements pass gradients",
        "torch",
        "table.py",
        "rows = gradient.index_select(0, place) * unclipped",
        "rows = gradient.index_select(0, place)",
        "grad value",
    ),
    Mutant("decay's gradient dropped", "torch", "table.py", "if not cfg.weight_decay:", "if True:", "grad values"),
    Mutant(
        "no gradient through pending tokens",
        "torch",
        "ops.py",
        "return State(memory, *waiting.pad(cfg.capacity), position)",
        "return State(memory, *(x.detach() for x in waiting.pad(cfg.capacity)), position)",
        "grad value",
    ),
]

MUTANTS = [*LOOKUP, *LOSSES, *UPDATE, *STREAM, *GRADIENTS]
