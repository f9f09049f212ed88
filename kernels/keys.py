"""The write of the keys (SPEC.md §4), by codebook and sub-key, from the sums over the tokens that chose it."""

from typing import Any

import triton
import triton.language as tl

from fwpkm.kernels.key_sums import (
    add_key_sums,
    integers_of_sums,
    rounds_over,
    rows_before,
    sum_of_pieces,
    sums_over_tokens,
)
from fwpkm.kernels.losses import addressing_loss, mean_probabilities
from fwpkm.kernels.propose import store_key
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.shapes import keys_move
from fwpkm.kernels.runtime.windows import Call
from fwpkm.kernels.scores import add_direction_vjp
from fwpkm.kernels.step import step
from fwpkm.kernels.tokens import VARYING, turns_of

EQUATIONS = ("mean_probabilities", "addressing_loss", "key_gradient", "step")


@triton.jit
def count_of(counts, at):
    """n of a window and memory, at least 1."""
    return tl.maximum(tl.load(counts + at), 1).to(tl.float32)


_OF_SUMS = ["first_memory", "windows", "version", "offset", "words", "pieces", *VARYING]


@triton.jit
def summed(
    query, ids, maps, factors, sums, totals, key, group, subkey, begins, first_memory, windows, offset, words, pieces,
    start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    CHUNK: tl.constexpr, AT_REST: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Σ f (q - K), or Σ f q, and Σ f of a sub-key: made here where they are WHOLE, of one piece; else its pieces'."""
    if WHOLE:
        result, total = sums_over_tokens(
            query, ids, maps, factors, key, group, subkey, begins, first_memory, 0,
            rounds_over(windows, length, rows, WORDS), offset, words, start, length, first, num_tokens, rows,
            HEADS, SUBKEYS, HALF, K, SCORE, CHUNK, AT_REST, True, WORDS, BLOCK, CHOICES,
        )  # fmt: skip
    else:
        row = group.to(tl.int64) * SUBKEYS + subkey
        result, total = sum_of_pieces(sums, totals, pieces, tl.num_programs(1), row, SUBKEYS, tl.arange(0, BLOCK), HALF)
    return result, total


@triton.jit(do_not_specialize=["moves_after", "version_after", *_OF_SUMS])
def keys_kernel(
    query, ids, maps, factors, keys, norms, largest, keys_hi_lo, sums, totals, active, moved, coefficient_sums,
    keys_unclipped, due, begins, moves_after, version_after,
    first_memory, windows, version, offset, words, pieces, start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    CHUNK: tl.constexpr, AT_REST: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
    WHOLE: tl.constexpr, RATE: tl.constexpr, DECAY: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """keys ← keys - η (clip(α ∇L_addr) + λ keys), ∇ = Σ c (q - K), or Σ c q; ``factors`` are the coefficients c."""
    group = tl.program_id(1)
    memory = group // (2 * HEADS)
    version_after, moves_after = version_after * 2 * HEADS, moves_after * 2 * HEADS
    for turn in range(turns_of(due, memory, SUBKEYS)):
        subkey = tl.program_id(0) + turn * tl.num_programs(0)
        row = group.to(tl.int64) * SUBKEYS + subkey
        here = rows_before(first_memory, HEADS, SUBKEYS) + row
        d = tl.arange(0, BLOCK)
        key = tl.load(keys + (rows_before(version, HEADS, SUBKEYS) + row) * HALF + d, mask=d < HALF, other=0.0)
        lives = tl.load(active + first_memory + memory) != 0
        gradient, total = summed(
            query, ids, maps, factors, sums, totals, key, group, subkey, begins, first_memory, windows, offset, words,
            pieces, start, length, first, num_tokens, rows,
            HEADS, SUBKEYS, HALF, K, SCORE, CHUNK, AT_REST, WORDS, BLOCK, CHOICES, WHOLE,
        )  # fmt: skip
        if keys_unclipped is not None:
            tl.store(keys_unclipped + here * HALF + d, (tl.abs(gradient) <= CLIP).to(tl.int8), mask=d < HALF)
        new, finite = step(key, gradient, d < HALF, RATE, DECAY, CLIP)
        moves = lives & finite
        new = tl.where(moves, new, key)
        store_key(new, keys, norms, largest, keys_hi_lo, version_after, moves_after, group, subkey, d, SUBKEYS, HALF)
        if moved is not None:
            tl.store(moved + here, moves.to(tl.int8))
            tl.store(coefficient_sums + here, total)


def add_keys(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the write of the keys after a window, from ``version`` to the next, where each is kept; they must move."""
    integers = integers_of_sums(launches, call, integers, offset=integers["first"])
    if not call.cfg.addressing_weight:
        integers["pieces"] = 0  # all coefficients are 0
    add_with_sums(launches, call, integers, keys_kernel, call.shapes.keys, "coefficients")


def add_with_sums(
    launches: Launches, call: Call, integers: dict[str, int], kernel: Any, constants: dict[str, Any], factors: str
) -> None:
    """Add a kernel of every sub-key that asks for ``summed``; before it their pieces, where there are several."""
    if integers["pieces"] > 1:
        add_key_sums(launches, call, integers, factors)
    constants = call.shapes.key_sums | constants | {"WHOLE": integers["pieces"] == 1}
    grid = call.programs(call.cfg.num_subkeys, integers["groups"]), integers["groups"]
    launches.add(kernel, grid, integers, constants, factors=factors)


@triton.jit
def addressing_loss_kernel(
    probability_sums, counts, active, addressing, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """L_addr of a window and memory (§3): Σ p̄ log(p̄ + 1e-8) over its ROWS sub-keys; 0 where no token has a pair."""
    at = tl.program_id(0)
    count = count_of(counts, at)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, ROWS, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        p = tl.load(probability_sums + at.to(tl.int64) * ROWS + row, mask=row < ROWS, other=0)
        total += addressing_loss(mean_probabilities(p, count))
    tl.store(addressing + at, tl.where(tl.load(active + at) != 0, tl.sum(total, 0), 0.0))


def add_addressing_loss(launches: Launches, call: Call) -> None:
    """Add the addressing losses of all windows that are written."""
    if memories := call.plan.rows(call.plan.num_writes) // call.rows:
        launches.add(addressing_loss_kernel, (memories,), {}, call.shapes.addressing_loss)


@triton.jit
def key_gradients(d_keys, moved, keys_unclipped, before, row, known, d, HALF: tl.constexpr, RATE: tl.constexpr):
    """The gradient [..., D] of α ∇L_addr at rows [...] of the keys: -η of that of the keys after, where they moved.

    ``moved`` and ``keys_unclipped`` have those of all windows; the window's own begin at row ``before``.
    """
    inside = known[:, :, None] & (d < HALF)[None, None, :]
    at = row.to(tl.int64)[:, :, None] * HALF + d[None, None, :]
    gradient = tl.load(d_keys + at, mask=inside, other=0.0) * -RATE
    gradient *= tl.load(moved + before + row, mask=known, other=0).to(tl.float32)[:, :, None]
    if keys_unclipped is not None:
        gradient *= tl.load(keys_unclipped + before * HALF + at, mask=inside, other=0).to(tl.float32)
    return gradient


@triton.jit(do_not_specialize=["d_before", "d_after", *_OF_SUMS])
def keys_backward_kernel(
    query, ids, maps, factors, keys, d_keys, sums, totals, moved, coefficient_sums, keys_unclipped, begins,
    d_before, d_after, first_memory, windows, version, offset, words, pieces, start, length, first, num_tokens, rows,
    HEADS: tl.constexpr, SUBKEYS: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    CHUNK: tl.constexpr, AT_REST: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
    WHOLE: tl.constexpr, RATE: tl.constexpr, DECAY: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """The gradient of each sub-key as the windows found it, from Σ f (q - K), or Σ f q, of its ranks' gradients f.

    ``d_keys`` has those of the keys before windows and after them in turns.
    """
    subkey, group = tl.program_id(0), tl.program_id(1)
    before = rows_before(first_memory, HEADS, SUBKEYS)
    row = group.to(tl.int64) * SUBKEYS + subkey
    d = tl.arange(0, BLOCK)
    gradient = tl.load(d_keys + (rows_before(d_after, HEADS, SUBKEYS) + row) * HALF + d, mask=d < HALF, other=0.0)
    key = tl.load(keys + (rows_before(version, HEADS, SUBKEYS) + row) * HALF + d, mask=d < HALF, other=0.0)
    toward, _ = summed(
        query, ids, maps, factors, sums, totals, key, group, subkey, begins, first_memory, windows, offset, words,
        pieces, start, length, first, num_tokens, rows,
        HEADS, SUBKEYS, HALF, K, SCORE, CHUNK, AT_REST, WORDS, BLOCK, CHOICES, WHOLE,
    )  # fmt: skip
    if WRITES:
        moves = tl.load(moved + before + row).to(tl.float32)
        passed = gradient * -RATE * moves
        if keys_unclipped is not None:
            passed *= tl.load(keys_unclipped + (before + row) * HALF + d, mask=d < HALF, other=0).to(tl.float32)
        gradient = gradient * (1 - RATE * DECAY * moves)
        gradient = add_direction_vjp(gradient, tl.load(coefficient_sums + before + row), passed, SCORE)
    row += rows_before(d_before, HEADS, SUBKEYS)
    tl.store(d_keys + row * HALF + d, gradient + toward, mask=d < HALF)


def add_keys_backward(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add the gradient of the keys before windows."""
    writes = call.plan.windows[integers["window"]].writes and keys_move(call.cfg)
    constants, integers = call.shapes.keys_backward | {"WRITES": writes}, integers_of_sums(launches, call, integers)
    add_with_sums(launches, call, integers, keys_backward_kernel, constants, "d_ranks")
