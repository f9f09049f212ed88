"""The kernels beside the vectors, and beside the float64 reference at small random shapes (SPEC.md §6).

Every result is computed twice, from memory that held NaN, and must have the same bits.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np

from benchmarks import gpu_backend as be
from benchmarks.findings import Finding, Report, equal, same_bits
from benchmarks.poison import poisoned
from fwpkm import agreement
from fwpkm.config import FwPKMConfig
from fwpkm.conformance import judging, results
from fwpkm.conformance.drawing import draw
from fwpkm.conformance.gradients import INPUTS, gradients
from fwpkm.conformance.rounding import expect_unmoved
from fwpkm.conformance.running import Reading, read
from fwpkm.conformance.shapes import Passage, Shape, passages
from fwpkm.conformance.strategies import Case, Tokens
from fwpkm.containers import Memory

_WIDTH = 16
"""The kernels take value widths that are multiples of this; columns of zeros change nothing."""
_OF_VALUE_DIM = ("value", "values", *(f"{kind}_{of}" for kind in ("cot", "out") for of in ("output", "values")))
_OF_VALUE_DIM += ("grad_value", "grad_values")
_DRAWS = 20
"""How often numbers are drawn anew for a case that a mere rounding would move."""


def _shape(
    batch: int, length: int, sizes: tuple[int, ...], gated: bool = True, masked: bool = True, **fields: Any
) -> Shape:
    names = ("key_dim", "value_dim", "num_heads", "num_subkeys", "top_k", "chunk_size", "lookahead")
    return Shape(FwPKMConfig(**dict(zip(names, sizes)), **fields), batch, length, gated, masked)


SHAPES = {
    "tiny": _shape(1, 4, (16, 16, 1, 3, 2, 2, 1)),
    "odd sizes": _shape(3, 24, (48, 80, 1, 20, 5, 7, 1)),
    "one choice": _shape(2, 12, (16, 16, 1, 1, 1, 4, 1), gated=False, masked=False),
    "single tokens": _shape(2, 12, (32, 16, 2, 9, 3, 1, 0), write_scale="unit", learning_rate=0.5),
    "three heads, wait": _shape(
        3, 22, (32, 48, 3, 12, 3, 6, 2),
        boundary="wait", memory_scope="batch", write_scale="normalized", temperature=0.5,
    ),
    "four heads, dot product": _shape(
        2, 20, (16, 32, 4, 10, 4, 8, 3), score="dot_product", write_scale="unit", grad_clip=0.05
    ),
    "many choices": _shape(2, 16, (32, 32, 1, 40, 32, 5, 1), write_scale="normalized", learning_rate=0.5),
    "decay, clip, batch": _shape(
        3, 40, (64, 64, 2, 16, 8, 16, 1),
        memory_scope="batch", write_scale="unit", weight_decay=0.1, grad_clip=0.05, addressing_weight=0.3,
    ),
    "long chunks": _shape(2, 150, (64, 64, 1, 130, 8, 64, 1), write_scale="normalized"),
}  # fmt: skip
"""Shapes at which blocks are not full, and the choices on which the kernels branch."""


def vector(name: str) -> Report:
    """A vector in float32: outputs, slots, weights, losses, final tables and gradients."""
    cfg, arrays = _load(name)
    memory = Memory(arrays["keys"], arrays["values"])
    tokens = Tokens(*(arrays.get(field) for field in ("query", "value", "gate", "mask")))
    batch, length, _ = tokens.query.shape
    wide = Case(cfg, 0, "float64", frozenset(), batch, length, memory, tokens)
    case = wide.map(lambda array: array.astype(np.float32))
    losses = (arrays[f"out_{loss}_loss"] for loss in ("memorization", "addressing"))
    tables = Memory(arrays["out_keys"], arrays["out_values"])
    expected = Reading(arrays["out_output"], arrays["out_slots"], arrays["out_weights"], *losses, tables)
    cotangents = [arrays[f"cot_{field}"].astype(np.float32) for field in ("output", "keys", "values")]

    def compute() -> tuple[Reading, dict[str, np.ndarray]]:
        received = gradients(be, case, cotangents)
        return read(be, case), {field: x for field, x in zip(INPUTS, received) if x is not None}

    (reading, derived), bits = _twice(compute)
    comparable = agreement.comparable_tokens(cfg, memory, *tokens)
    if comparable < length and not _same_slots(cfg, reading, expected):  # it left the path at a tie
        chunks = comparable // cfg.chunk_size
        pair = (_cut(part, comparable, chunks) for part in (reading, expected))
        return Report([bits, *_judge(cfg, *pair)], [f"compared over {comparable} of {length} tokens, up to a tie"])
    errors = [(f"grad {key}", agreement.relative_error(x, arrays[f"grad_{key}"])) for key, x in derived.items()]
    return Report([bits, *_judge(cfg, reading, expected), *_findings(errors)])


def drawn(name: str, seed: int, numbers: Sequence[int] = (1, 2)) -> Report:
    """Fresh numbers at one of ``SHAPES``: all that ``fwpkm conform`` judges.

    Number 1 takes gradients through two halves with a state between them, number 2 through one call.
    """
    shape, findings, aside = SHAPES[name], [], 0
    for number in numbers:
        passage, expected, again = _draw(number, shape, f"{seed}/{name}")
        aside += again
        result, bits = _twice(lambda passage=passage: results.run(be, passage))
        findings += [bits, *_findings(judging.errors(shape.cfg, result, expected))]
    return Report(findings, [f"{aside} draws set aside, as rounding would move them by too much"] * bool(aside))


def _draw(number: int, shape: Shape, seed: str) -> tuple[Passage, results.Result, int]:
    """A passage, the reference's result, and how many were drawn in vain before."""
    for attempt in range(_DRAWS):
        passage = draw(passages(number, shape, "float32"), f"{seed}/{number}/{attempt}")
        expected = expect_unmoved(passage)
        if expected is not None:
            return passage, expected, attempt
    raise RuntimeError(f"none of {_DRAWS} draws can be judged in float32. Received: {shape}")


def _twice(compute: Any) -> tuple[Any, Finding]:
    """The result, computed in poisoned memory, and whether it comes out with the same bits again."""
    with poisoned():
        first, second = compute(), compute()
    return first, equal("the same bits twice", same_bits(_arrays(first), _arrays(second)))


def _arrays(tree: Any) -> Iterator[np.ndarray]:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple):
        for part in tree:
            yield from _arrays(part)
    elif tree is not None:
        yield np.asarray(tree)


def _judge(cfg: FwPKMConfig, actual: Reading, expected: Reading) -> list[Finding]:
    return _findings(judging.reading_errors(cfg, actual, expected))


def _findings(errors: Iterable[tuple[str, float]]) -> list[Finding]:
    return [Finding(what, error, judging.bound(what, "float32")) for what, error in errors]


def _same_slots(cfg: FwPKMConfig, actual: Reading, expected: Reading) -> bool:
    return dict(judging.reading_errors(cfg, actual, expected))["slots"] == 0


def _cut(reading: Reading, tokens: int, writes: int) -> Reading:
    """The beginning of a reading; its tables are left out, since more was written into them."""
    parts = [x[:, :tokens] for x in reading[:3]] + [x[:, :writes] for x in reading[3:5]]
    return Reading(*parts, memory=Memory(*(np.zeros(0) for _ in Memory._fields)))


def _load(name: str) -> tuple[FwPKMConfig, dict[str, np.ndarray]]:
    """A vector's configuration and arrays, value columns padded with zeros to what the kernels take."""
    with resources.files("fwpkm.data").joinpath("vectors", name).open("rb") as file, np.load(file) as stored:
        arrays = dict(stored)
    fields = FwPKMConfig.from_json(str(arrays.pop("config")))
    missing = -fields.value_dim % _WIDTH
    for field in (
        "value",
        "values",
        "cot_output",
        "cot_values",
        "out_output",
        "out_values",
        "grad_value",
        "grad_values",
    ):
        array = arrays[field]
        dead = np.isnan(array).any(-1, keepdims=True)
        arrays[field] = np.concatenate([array, np.where(dead, np.nan, np.zeros((*array.shape[:-1], missing)))], -1)
    return dataclasses.replace(fields, value_dim=fields.value_dim + missing), arrays
