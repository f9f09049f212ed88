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

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fwpkm
from benchmarks import report
from fwpkm.agreement import relative_error

BATCH, LENGTH, CALLS = 3, 29, (5, 1, 14, 9)
CHOICES = {
    "score": ("idw", "dot_product"),
    "write_scale": ("slots", "unit", "normalized"),
    "boundary": ("drop", "wait"),
    "memory_scope": ("sequence", "batch"),
}
"""Every combination is a case."""
IN_TURN = {
    "num_heads": (1, 2),
    "num_subkeys": (40, 6, 6),
    "top_k": (2, 3, 4),
    "lookahead": (0, 1, 2),
    "temperature": (1.0, 0.5, 1.0, 1.0),
    "learning_rate": (1.0, 0.5, 0.5, 0.5, 0.5),
    "weight_decay": (0.0, 0.0, 0.1, 0.0),
    "grad_clip": (None, None, None, 0.05, None),
    "addressing_weight": (1.0, 0.3),
}
"""Case i has the value i of each, from the first again after the last."""


def cases() -> dict[str, tuple[fwpkm.FwPKMConfig, int]]:
    """A configuration and a seed by name."""
    found = {}
    for seed, chosen in enumerate(itertools.product(*CHOICES.values())):
        fields: Any = {name: values[seed % len(values)] for name, values in IN_TURN.items()} | dict(
            zip(CHOICES, chosen)
        )
        cfg = fwpkm.FwPKMConfig(key_dim=16, value_dim=16, chunk_size=8, **fields)
        found["-".join((str(seed), *chosen))] = cfg, seed
    return found


def numbers(be: Any, cfg: fwpkm.FwPKMConfig, seed: int, options: dict[str, Any], move: Callable) -> dict[str, Any]:
    """All that a backend computes in one case, as NumPy arrays by name; ``move`` brings its arrays to the device."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(BATCH, LENGTH, cfg.num_heads * cfg.key_dim)) * 0.3
    value, gate = rng.normal(size=(BATCH, LENGTH, cfg.value_dim)), rng.uniform(size=(BATCH, LENGTH))
    query[0, 11], value[1, 17], gate[2, 23] = np.nan, np.inf, np.nan
    mask = move(be.asarray(rng.uniform(size=(BATCH, LENGTH)) < 0.9, "bool"))
    tables = be.init_memory(cfg, BATCH if cfg.memory_scope == "sequence" else 1, seed)
    leaves = [move(x) for x in (*(be.asarray(x, "float32") for x in (query, value, gate)), *tables)]
    found: dict[str, Any] = {}

    def keep(prefix: Any, parts: dict[str, Any]) -> None:
        found.update({f"{prefix}.{name}": x for name, x in parts.items() if not name.startswith("memory.")})

    def forward(query: Any, value: Any, gate: Any, *tables: Any) -> tuple[Any, ...]:
        state, outputs, at = be.init_state(cfg, fwpkm.Memory(*tables), BATCH), [], 0
        for number, size in enumerate(CALLS):
            part = [x[:, at : at + size] for x in (query, value, gate, mask)]
            output, state, trace = be.apply(cfg, state, *part, **options)
            outputs.append(output)
            keep(number, trace._asdict() | state.arrays())
            at += size
        state, trace = be.flush(cfg, state, **options)
        keep("flush", {name: getattr(trace, name) for name in ("memorization", "addressing", "writes")})
        return (*outputs, *state.memory)

    results = forward(*leaves)
    keep("result", dict(enumerate(results)))
    tokens, memory = leaves[:3], fwpkm.Memory(*leaves[3:])
    keep("lookup", be.lookup(cfg, memory, tokens[0], **options)._asdict())
    for part in be.chunk_update(cfg, memory, *tokens, **options):
        keep("chunk_update", part._asdict())
    arrays = {name: np.array(be.to_numpy(x)) for name, x in found.items()}
    drawn = (np.random.default_rng(1000 + i).normal(size=tuple(x.shape)) for i, x in enumerate(results))
    gradients = be.vjp(forward, leaves, [move(be.asarray(x, "float32")) for x in drawn])
    names = (f"grad.{name}" for name in ("query", "value", "gate", "keys", "values"))
    return arrays | {name: np.array(be.to_numpy(x)) for name, x in zip(names, gradients)}


def digest(arrays: dict[str, np.ndarray]) -> str:
    """One sha256 over names, shapes, dtypes and bits; all NaN count as one."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = np.where(np.isnan(array), array.dtype.type("nan"), array) if array.dtype.kind == "f" else array
        total.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return total.hexdigest()


def compared(arrays: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> str:
    """ "same bits", or what differs: the largest relative error of an array, or which arrays there are."""
    if arrays.keys() != before.keys():
        sizes = f"{len(before)} arrays there, {len(arrays)} here, {len(arrays.keys() & before.keys())} of one name"
        return f"differs: {sizes}"
    if digest(arrays) == digest(before):
        return "same bits"
    error, name = max((relative_error(arrays[name], x), name) for name, x in before.items())
    return f"differs: {error:.1e} in {name}"


def main() -> int:
    """Print a digest for each case and one for all; the exit status is 1 where ``--against`` found another."""
    parser = report.parser("digests", __doc__, every=(1, "each so many-th case alone"))
    parser.add_argument("--backend", choices=("torch", "triton", "jax", "keras"), default="torch")
    parser.add_argument("--device", default="cpu", help="of torch and triton: cpu or cuda")
    parser.add_argument("--save", metavar="FILE", help="an .npz to write")
    parser.add_argument("--against", metavar="FILE", help="an .npz of --save")
    args = parser.parse_args()
    implementation = {"torch": "eager", "triton": "triton"}.get(args.backend)
    options = {"implementation": implementation} if implementation else {}
    be: Any = fwpkm.get_backend("torch" if implementation else args.backend)
    if args.device == "cuda":  # plain PyTorch adds in any order there unless it is told not to
        torch.use_deterministic_algorithms(True, warn_only=True)
    before = dict(np.load(args.against)) if args.against else {}
    kept, total, differs = {}, hashlib.sha256(), False
    for name, (cfg, seed) in itertools.islice(cases().items(), 0, None, args.every):
        arrays = numbers(be, cfg, seed, options, lambda x: x.to(args.device) if implementation else x)
        old = {key.removeprefix(f"{name}/"): x for key, x in before.items() if key.startswith(f"{name}/")}
        verdict = compared(arrays, old) if args.against else ""
        differs |= verdict not in ("", "same bits")
        print(f"{digest(arrays)[:16]}  {name}  {verdict}".rstrip(), flush=True)
        total.update(digest(arrays).encode())
        kept.update({f"{name}/{key}": array for key, array in arrays.items()})
    print(total.hexdigest(), "all")
    if args.save:
        np.savez_compressed(args.save, **kept)
    return int(differs)


if __name__ == "__main__":
    raise SystemExit(main())
