"""Mistakes of one line in the reference that the conformance suite must catch: those that implementers of it make."""

from mutants.build import Mutant

_LOSSES = "trace.memorization[:, writes], trace.addressing[:, writes] = losses"
_LATE = "late = slice(max(0, stop - schedule.lag(cfg)), stop)"

# By name and by the quantity that gives it away: what stands in the file once, and what instead.
_EQUATIONS = {
    ("weights of one head normalised alone", "weights"): (
        "softmax(logits)",
        "softmax(logits.reshape(n, cfg.num_heads, -1)).reshape(n, -1)",
    ),
    ("temperature ignored", "weights"): (" / query.dtype.type(cfg.temperature)", ""),
    ("codebooks exchanged in the slot's id", "slots"): (
        "first * cfg.num_subkeys + second",
        "second * cfg.num_subkeys + first",
    ),
    ("heads pooled in the addressing loss", "addressing"): (
        "return mean / max(1, counted.sum())",
        "return np.broadcast_to(mean.mean(0), mean.shape) / max(1, counted.sum())",
    ),
    ("mean over all tokens instead of unmasked ones", "addressing"): ("max(1, counted.sum())", "len(counted)"),
    ("temperature in the addressing loss", "keys"): ("softmax(chosen_scores)", "softmax(chosen_scores / 2)"),
    ("masked reads counted in N", "values"): (
        "reads[:, None].astype(terms.dtype)",
        "np.bincount(selection.slots.ravel())[touched][:, None].astype(terms.dtype)",
    ),
    ("sums of terms instead of means", "values"): (" / reads[:, None].astype(terms.dtype)", ""),
    ("kappa constant under normalized", "values"): (
        "return 1 / np.square(weights).sum(-1)",
        "return np.full(len(weights), cfg.slots_per_token, weights.dtype)",
    ),
    ("gate left out of the write", "values"): (" * gate, 0)", ", 0)"),
    ("gradients clipped by norm", "values"): (
        "np.clip(gradient, -cfg.grad_clip, cfg.grad_clip)",
        "gradient * min(1, cfg.grad_clip / (np.linalg.norm(gradient) + 1e-9))",
    ),
}
_REFERENCE = {
    ("tables of two rows swapped", "output"): (
        "return min(row, len(memory.keys) - 1)",
        "return (row + 1) % len(memory.keys)",
    ),
    ("lookahead off by one", "memorization"): (
        "ahead(cfg, window.value)",
        "np.roll(ahead(cfg, window.value), -1, 1)",
    ),
    ("tokens whose target has not arrived make a pair", "memorization"): (
        "equations.pairs(cfg, counted, live)",
        "counted",
    ),
    ("keys not updated", "keys"): ("keys[...] = equations.step(cfg, keys, weighted)", "pass"),
    ("untouched slots decay", "values"): (
        "equations.step(cfg, values[touched], gradient)",
        "equations.step(cfg, values[touched], gradient); values *= 1 - cfg.weight_decay",
    ),
    ("wait reading late", "output"): (
        _LOSSES,
        f"{_LOSSES}; {_LATE}; output[:, late] = _look(cfg, memory, tokens.query[:, late])[0].output",
    ),
    ("pairs across a boundary", "memorization"): (
        "batch, length = query.shape[:2]",
        'batch, length, cfg = *query.shape[:2], FwPKMConfig(**{**cfg.__dict__, "boundary": "wait"})',
    ),
    ("pending gate lost in a split", "values"): ("dtype, state.pending)", "dtype, state.pending._replace(gate=None))"),
    ("pending mask lost in a split", "values"): ("dtype, state.pending)", "dtype, state.pending._replace(mask=None))"),
    ("tables of two rows swapped in the state", "keys"): (
        "State.of(memory, padded",
        "State.of(Memory(*(x[::-1].copy() for x in memory)), padded",
    ),
    ("flush keeps the position", "position"): (
        "batch, dtype), 0), trace",
        "batch, dtype), int(state.position[0])), trace",
    ),
    ("values that are not finite are targets", "output"): (
        '[x for field, x in zip(TOKEN_FIELDS, tokens) if field.kind == "float"]',
        "[tokens.query]",
    ),
}
_SCHEDULE = {("wait writes at once", "output"): ("return cfg.lookahead", "return 0")}

LINES = [
    Mutant(name, file, right, wrong, caught_by)
    for file, mistakes in (("equations.py", _EQUATIONS), ("reference.py", _REFERENCE), ("schedule.py", _SCHEDULE))
    for (name, caught_by), (right, wrong) in mistakes.items()
]
