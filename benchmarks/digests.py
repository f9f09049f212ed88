"""``python -m benchmarks.digests``: what a backend computes, as digests, to hold one commit against another.

Every choice of a configuration is covered: outputs, slots, weights, losses, states in mid-sequence, final tables and
gradients of 24 small cases, masked, gated, with tokens that are not finite, read in calls of several sizes. Two runs
whose digests are equal computed the same bits. With ``--save FILE`` the numbers are kept, and with ``--against FILE``
compared: the largest relative error of each case (SPEC.md §6). On a GPU torch runs its deterministic algorithms, and
cuBLAS wants CUBLAS_WORKSPACE_CONFIG=:4096:8.

    python -m benchmarks.digests --backend torch --save before.npz
    python -m benchmarks.digests --backend torch --against before.npz

Backends: torch (plain PyTorch), triton (its kernels; on the CPU in Triton's interpreter, TRITON_INTERPRET=1), jax, and
keras on the framework that KERAS_BACKEND names. ``--device cuda`` moves the first two.
"""

import argparse
import hashlib
import importlib
import itertools
from typing import Any

import numpy as np

import fwpkm
from fwpkm.agreement import relative_error

CHUNK, LENGTH, CALLS = 8, 29, (5, 1, 14, 9)


def cases() -> dict[str, tuple[fwpkm.FwPKMConfig, int]]:
    """A configuration and a seed by name: all scores, scales, boundaries and scopes, other fields in turn."""
    choices = itertools.product(("idw", "dot_product"), ("slots", "unit", "normalized"), ("drop", "wait"))
    found = {}
    for seed, ((score, scale, boundary), scope) in enumerate(itertools.product(choices, ("sequence", "batch"))):
        cfg = fwpkm.FwPKMConfig(
            key_dim=16,
            value_dim=16,
            num_heads=1 + seed % 2,
            num_subkeys=(6, 40)[seed % 3 == 0],
            top_k=(2, 3, 4)[seed % 3],
            chunk_size=CHUNK,
            lookahead=seed % 3,
            boundary=boundary,
            score=score,
            temperature=(1.0, 0.5)[seed % 4 == 1],
            learning_rate=(0.5, 1.0)[seed % 5 == 0],
            write_scale=scale,
            weight_decay=(0.0, 0.1)[seed % 4 == 2],
            grad_clip=(None, 0.05)[seed % 5 == 3],
            addressing_weight=(1.0, 0.3)[seed % 2],
            memory_scope=scope,
        )
        found[f"{seed}-{score}-{scale}-{boundary}-{scope}"] = cfg, seed
    return found


def numbers(be: Any, cfg: fwpkm.FwPKMConfig, seed: int, options: dict[str, Any], place: Any) -> dict[str, np.ndarray]:
    """All that a backend computes in one case; ``place`` moves its arrays to where they are to be."""
    rng, batch, dtype = np.random.default_rng(seed), 3, "float32"
    query = rng.normal(size=(batch, LENGTH, cfg.num_heads * cfg.key_dim)) * 0.3
    value = rng.normal(size=(batch, LENGTH, cfg.value_dim))
    gate = rng.uniform(size=(batch, LENGTH))
    query[0, 11], value[1, 17], gate[2, 23] = np.nan, np.inf, np.nan
    arrays = [place(be.asarray(x, dtype)) for x in (query, value, gate)]
    mask = place(be.asarray(rng.uniform(size=(batch, LENGTH)) < 0.9, "bool"))
    memories = batch if cfg.memory_scope == "sequence" else 1
    tables = [place(table) for table in be.init_memory(cfg, memories, seed)]
    found: dict[str, Any] = {}

    def forward(*leaves: Any) -> tuple[Any, ...]:
        tokens, memory = leaves[:3], fwpkm.Memory(*leaves[3:])
        state, outputs, at = be.init_state(cfg, memory, batch), [], 0
        for number, size in enumerate(CALLS):
            part = [x[:, at : at + size] for x in (*tokens, mask)]
            output, state, trace = be.apply(cfg, state, *part, **options)
            outputs.append(output)
            found.update({f"{number}.{name}": x for name, x in trace._asdict().items()})
            found.update({f"{number}.{name}": x for name, x in state._asdict().items() if name != "memory"})
            at += size
        state, trace = be.flush(cfg, state, **options)
        found.update({f"flush.{name}": getattr(trace, name) for name in ("memorization", "addressing", "writes")})
        return (*outputs, *state.memory)

    results = forward(*arrays, *tables)
    found.update({f"result.{i}": x for i, x in enumerate(results)})
    found.update({f"lookup.{k}": x for k, x in _lookup(be, cfg, tables, arrays, options).items()})
    forward_numbers = {name: np.array(be.to_numpy(x)) for name, x in found.items()}
    seeds = [np.random.default_rng(1000 + i) for i in range(len(results))]
    cotangents = [place(be.asarray(r.normal(size=tuple(x.shape)), dtype)) for r, x in zip(seeds, results)]
    gradients = be.vjp(forward, [*arrays, *tables], cotangents)
    names = ("query", "value", "gate", "keys", "values")
    return forward_numbers | {f"grad.{name}": np.array(be.to_numpy(x)) for name, x in zip(names, gradients)}


def _lookup(be: Any, cfg: fwpkm.FwPKMConfig, tables: list, arrays: list, options: dict) -> dict[str, Any]:
    memory, (query, value, gate) = fwpkm.Memory(*tables), arrays
    look = be.lookup(cfg, memory, query, **options)
    written, losses = be.chunk_update(cfg, memory, query, value, gate, **options)
    return {**look._asdict(), **written._asdict(), **losses._asdict()}


def digest(arrays: dict[str, np.ndarray]) -> str:
    """One sha256 over names, shapes, dtypes and bits."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = np.where(np.isnan(array), array.dtype.type("nan"), array) if array.dtype.kind == "f" else array
        total.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return total.hexdigest()


def main() -> int:
    """Print a digest for each case and one for all; the exit status is 1 where ``--against`` found another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests")
    parser.add_argument("--backend", choices=("torch", "triton", "jax", "keras"), default="torch")
    parser.add_argument("--device", default="cpu", help="of torch and triton: cpu or cuda")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth case alone")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="begin with case K")
    parser.add_argument("--save", metavar="FILE", help="an .npz to write")
    parser.add_argument("--against", metavar="FILE", help="an .npz of --save")
    args = parser.parse_args()
    native = args.backend in ("torch", "triton")
    options: dict[str, Any] = {}
    if native:
        options["implementation"] = "triton" if args.backend == "triton" else "eager"
    be: Any = fwpkm.get_backend("torch" if native else args.backend)
    if args.device == "cuda":  # plain PyTorch adds in any order there unless it is told not to
        torch = importlib.import_module("torch")
        torch.use_deterministic_algorithms(True, warn_only=True)
    place = (lambda x: x.to(args.device)) if native else (lambda x: x)
    before = dict(np.load(args.against)) if args.against else {}
    kept, digests, differs = {}, [], False
    for name, (cfg, seed) in itertools.islice(cases().items(), args.first, None, args.every):
        arrays = numbers(be, cfg, seed, options, place)
        digests.append(digest(arrays))
        line = f"{digests[-1][:16]}  {name}"
        if args.against:
            old = {key.partition("/")[2]: x for key, x in before.items() if key.startswith(f"{name}/")}
            same = digest(old) == digest({key: array for key, array in arrays.items() if key in old})
            differs |= not same
            worst = max(old, key=lambda key: relative_error(arrays[key], old[key]))
            line += "  same bits" if same else f"  differs: {relative_error(arrays[worst], old[worst]):.1e} in {worst}"
        print(line, flush=True)
        kept.update({f"{name}/{key}": array for key, array in arrays.items()})
    print(hashlib.sha256("".join(digests).encode()).hexdigest(), "all")
    if args.save:
        np.savez_compressed(args.save, **kept)
    return int(differs)


if __name__ == "__main__":
    raise SystemExit(main())
