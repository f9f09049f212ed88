"""The vectors of writes weighted by use (SPEC.md §11), from the reference alone: ``python tests/make_vectors.py``.

Those of §2 to §5 come from the published equations and stay as they are. Gradients are differences of the reference,
so that no backend vouches for itself; tokens are drawn so that no difference moves a choice of slots.
"""

from pathlib import Path

import numpy as np

from fwpkm import FwPKMConfig, Memory, agreement, reference
from fwpkm.tokens import NUMBERS, Tokens

FOLDER = Path(__file__).parents[1] / "fwpkm_core" / "data" / "vectors"
SIZES = {"key_dim": 16, "value_dim": 16, "num_subkeys": 4, "top_k": 2, "chunk_size": 4}
STEP = 1e-3
"""Of the differences, whose error is of fourth order."""
GAP = 10 * STEP
VECTORS = {
    "uses": (FwPKMConfig(**SIZES, usage_weight=0.25, weight_decay=0.1), (2, 27), None, 13),
    "uses_packed": (FwPKMConfig(**SIZES, usage_weight=1.0, boundary="wait"), (1, 40), [0, 22, 40], None),
}
"""By name: the configuration, [B, T] of the tokens, where packed sequences end, and the tokens before the split."""


def made(name: str, gradients: bool = True) -> dict[str, np.ndarray]:
    """All arrays of a vector by the names of its file (docs/conformance.md)."""
    cfg, shape, ends, split = VECTORS[name]
    packed = {} if ends is None else {"cu_seqlens": np.array(ends, np.int32)}
    batch = shape[0] if ends is None else len(ends) - 1
    memory, tokens, cotangents = _drawn(cfg, shape, batch, packed)
    start = reference.init_state(cfg, memory, batch)
    output, state, trace = reference.apply(cfg, start, **tokens.present(), **packed)
    flushed, last = reference.flush(cfg, state)
    arrays = {"config": np.array(cfg.to_json())} | tokens.present() | memory._asdict() | packed
    arrays |= {f"cot_{field}": x for field, x in cotangents.items()}
    arrays |= {f"out_{field}": x for field, x in trace._asdict().items()}
    arrays |= {f"out_{field}": x for field, x in flushed.memory._asdict().items()}
    arrays |= {"out_output": output, "out_position": state.position, "out_uses": flushed.uses}
    arrays |= {f"flush_{field}": getattr(last, field)[:, 0] for field in ("memorization", "addressing")}
    arrays["flush_writes"] = last.writes
    if split is not None:
        middle = reference.apply(cfg, start, **tokens.slice(0, split).present())[1]
        arrays |= {f"mid_{field.removeprefix('memory.')}": x for field, x in middle.arrays().items()}
        arrays["split"] = np.array(split)
    if gradients:
        inputs = {field: arrays[field] for field in (*NUMBERS, *Memory._fields)}
        arrays |= {f"grad_{field}": x for field, x in _gradients(cfg, inputs, tokens, packed, cotangents).items()}
    return arrays


def _drawn(cfg, shape, batch, packed):
    """Tables, tokens and cotangents of the first seed whose choices of slots are far from hanging on a difference."""
    seed = 0
    while True:
        rng = np.random.default_rng(seed)
        keys = rng.uniform(-1, 1, (batch, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2))
        memory = Memory(keys, rng.normal(size=(batch, cfg.num_slots, cfg.value_dim)))
        query = rng.uniform(-1.2, 1.2, (*shape, cfg.num_heads * cfg.key_dim))
        value, gate = rng.normal(size=(*shape, cfg.value_dim)), rng.uniform(size=shape)
        tokens = Tokens(query, value, gate, rng.uniform(size=shape) < 0.8)
        if agreement.comparable_tokens(cfg, memory, tokens, GAP, **packed) == tokens.length:
            results = {"output": value, **memory._asdict()}
            return memory, tokens, {field: rng.normal(size=x.shape) for field, x in results.items()}
        seed += 1


def _gradients(cfg, inputs, tokens, packed, cotangents):
    """Those of Σ output·cot_output + Σ final tables·cotangents, by differences at ±h and ±2h."""

    def objective():
        memory = Memory(inputs["keys"], inputs["values"])
        state = reference.init_state(cfg, memory, len(memory.keys))
        given = tokens._replace(**{field: inputs[field] for field in NUMBERS})
        output, state, _ = reference.apply(cfg, state, **given.present(), **packed)
        tables = reference.flush(cfg, state)[0].memory
        return sum((x * cotangents[field]).sum() for field, x in {"output": output, **tables._asdict()}.items())

    gradients = {}
    for field, x in inputs.items():
        gradients[field] = gradient = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            before, found = x[at], []
            for steps in (1, -1, 2, -2):
                x[at] = before + steps * STEP
                found.append(objective())
            x[at] = before
            gradient[at] = (8 * (found[0] - found[1]) - (found[2] - found[3])) / (12 * STEP)
    return gradients


if __name__ == "__main__":
    for each in VECTORS:
        np.savez(FOLDER / f"{each}.npz", **made(each))
        print(f"{each}.npz written")
