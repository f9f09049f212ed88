"""Mistakes of one line in the reference that the conformance suite must catch: those that implementers of it make."""

from mutants.build import Mutant

_LATE = "late = slice(max(0, stop - start - schedule.lag(cfg)), None); "
_LATE += "again = _look(cfg, own, part.query[:, late])[0].output; "
_LATE += "output[here[:, late]] = _blanked(again, there[:, late], dead[:, late])"

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
        "reads = reads.astype(terms.dtype)",
        "reads = np.bincount(selection.slots.ravel())[touched].astype(terms.dtype)",
    ),
    ("sums of terms instead of means", "values"): (" / reads[:, None]", ""),
    ("kappa constant under normalized", "values"): (
        "return 1 / np.square(weights).sum(-1)",
        "return np.full(len(weights), cfg.slots_per_token, weights.dtype)",
    ),
    ("gate left out of the write", "values"): (" * gate, 0)", ", 0)"),
    ("gradients clipped by norm", "values"): (
        "np.clip(gradient, -cfg.grad_clip, cfg.grad_clip)",
        "gradient * min(1, cfg.grad_clip / (np.linalg.norm(gradient) + 1e-9))",
    ),
    ("decay is not weighted by use", "values"): (
        "rate * (gradient + rows.dtype.type(cfg.weight_decay) * rows)",
        "rate * gradient - rows.dtype.type(cfg.learning_rate * cfg.weight_decay) * rows",
    ),
}
_REFERENCE = {
    ("tables of two rows swapped", "lookup output"): (
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
        "equations.step(cfg, values[touched], gradient, rates)",
        "equations.step(cfg, values[touched], gradient, rates); values *= 1 - cfg.weight_decay",
    ),
    ("wait reading late", "output"): (
        "trace.writes[m] += 1",
        f"trace.writes[m] += 1; {_LATE}",
    ),
    ("pairs across a boundary", "memorization"): (
        "flat = tokens.map",
        'cfg = FwPKMConfig(**{**cfg.__dict__, "boundary": "wait"}); flat = tokens.map',
    ),
    ("pending gate lost in a split", "values"): ("dtype, state.pending)", "dtype, state.pending._replace(gate=None))"),
    ("pending mask lost in a split", "values"): ("dtype, state.pending)", "dtype, state.pending._replace(mask=None))"),
    ("tables of two rows swapped in the state", "keys"): (
        "State.of(memory, rows, position",
        "State.of(Memory(*(x[::-1].copy() for x in memory)), rows, position",
    ),
    ("flush keeps the position", "position"): (
        "np.where(chosen, 0, state.position), uses), trace",
        "state.position, uses), trace",
    ),
    ("values that are not finite are targets", "output"): (
        '[x for field, x in zip(TOKEN_FIELDS, tokens) if field.kind == "float"]',
        "[tokens.query]",
    ),
}
_ENDS = "else cu_seqlens"
_CLOCKS = {
    ("rows read each other's tables", "output"): (
        "*_of_memory(m, memory, uses), _at",
        "*_of_memory(len(memory.keys) - 1 - m, memory, uses), _at",
    ),
    ("masked tokens take positions", "position"): (
        "start + np.flatnonzero(mask.ravel()[start:stop])[None]",
        "np.arange(start, stop)[None]",
    ),
    ("masked tokens read", "output"): ("return np.where(there[..., None], x, 0)", "return x"),
    ("masked tokens are stored as they were", "pending"): ("_without(part, dead | ~there)", "_without(part, dead)"),
    ("masked time steps do not tick in batch scope", "position"): (
        "np.arange(batch * length).reshape(batch, length)]",
        "np.arange(batch * length).reshape(batch, length)[:, mask.any(0)]]",
    ),
    ("dead tokens are taken for masked ones", "output"): (
        "flat = tokens.map",
        "tokens = tokens._replace(mask=tokens.mask & _finite(tokens)); flat = tokens.map",
    ),
    ("packed sequences of equal lengths", "output"): (
        _ENDS,
        "else np.arange(len(cu_seqlens)) * length // (len(cu_seqlens) - 1)",
    ),
    ("packed sequences end a token early", "position"): (_ENDS, "else np.maximum(cu_seqlens - 1, 0)"),
    ("the tail belongs to the last sequence", "position"): (_ENDS, "else np.append(cu_seqlens[:-1], length)"),
    ("packed tokens lose their mask", "output"): (
        "flat = tokens.map",
        "mask = tokens.mask if cu_seqlens is None else tokens.mask | True; tokens = tokens._replace(mask=mask); "
        "flat = tokens.map",
    ),
    ("flush of some rows empties all", "flush rows"): ("        if of_memory[m]:", "        if True:"),
    ("flush of some rows restarts every count", "flush rows"): (
        "np.where(chosen, 0, state.position)",
        "np.where(chosen.any(), 0, state.position)",
    ),
}
_USES = {
    ("uses are not counted", "uses"): ("uses[m, touched] += reads", "pass"),
    ("uses are counted before the step", "values"): ("uses[m, touched])", "uses[m, touched] + reads)"),
    ("a chunk without a pair counts as use", "flush"): (
        "            continue\n        chosen",
        "            for b in [] if uses is None else rows:\n"
        "                np.add.at(uses[m], selections[b].slots[counted[b]], 1)\n"
        "            continue\n        chosen",
    ),
    ("flush forgets the uses", "flush"): (
        "np.where(chosen, 0, state.position), uses), trace",
        "np.where(chosen, 0, state.position), uses if uses is None else 0 * uses), trace",
    ),
}
_SCHEDULE = {("wait writes at once", "output"): ("return cfg.lookahead", "return 0")}

LINES = [
    Mutant(name, file, right, wrong, caught_by)
    for file, mistakes in (
        ("equations.py", _EQUATIONS),
        ("reference.py", _REFERENCE | _CLOCKS | _USES),
        ("schedule.py", _SCHEDULE),
    )
    for (name, caught_by), (right, wrong) in mistakes.items()
]
