"""One call of the memory on a GPU: the windows of SPEC.md §5 through the kernels of each step.

The keys do not depend on the values. So the windows are addressed one after the other, moving the keys; the entries of
all windows are then sorted by table row at once; and the windows read and write the values one after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.kernels import chunk_update, lookup, parts
from fwpkm.kernels.launch import Launch
from fwpkm.kernels.room import Kept, Scratch, room_for
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.sums import KeySums
from fwpkm.kernels.tokens import prepare_kernel
from fwpkm.kernels.windows import Bounds, Plan, least


class Tokens(NamedTuple):
    """The stream, contiguous; a gate, mask or pair that is None is 1 or True."""

    query: Tensor
    """``[B, n, H*Dk]``"""
    value: Tensor
    """``[B, n, Dv]``"""
    gate: Tensor | None
    """``[B, n]``"""
    mask: Tensor | None
    """``[B, n]`` bool"""
    pair: Tensor | None = None
    """``[B, n]`` bool: values are targets already, and these may be bound (``chunk_update``)."""


class Result(NamedTuple):
    """What a call gives."""

    output: Tensor
    """``[B, T, Dv]``"""
    slots: Tensor
    """``[B, T, H*k]`` int64"""
    weights: Tensor
    """``[B, T, H*k]``: NaN for dead tokens."""
    keys: Tensor
    memorization: Tensor
    """``[windows, M]``"""
    addressing: Tensor
    """``[windows, M]``"""
    kept: Kept


def forward(
    cfg: FwPKMConfig, plan: Plan, keys: Tensor, values: Tensor, tokens: Tokens, save: bool, dtype: torch.dtype,
    most: Bounds | None = None,
) -> Result:  # fmt: skip
    """Read and write all windows; ``values`` [M, N, Dv] is overwritten, ``keys`` is not.

    Args:
        cfg: the configuration.
        plan: the windows.
        keys: ``[M, H, 2, S, Dk/2]`` float32, contiguous.
        values: ``[M, N, Dv]`` float32, contiguous.
        tokens: the stream.
        save: keep what ``backward`` needs.
        dtype: of the output.
        most: what to make room for, so that the shapes of what is kept do not depend on the position.
    """
    batch, memories, size = tokens.query.shape[0], keys.shape[0], shapes(cfg, tokens.query.dtype)
    kept, scratch = room_for(cfg, plan, most or least(plan, batch), keys, batch, save)
    scratch.zeros.zero_()
    Launch(
        prepare_kernel, *tokens, kept.flags,
        HAS_GATE=tokens.gate is not None, HAS_MASK=tokens.mask is not None, HAS_PAIR=tokens.pair is not None,
        SHIFTED=tokens.pair is not None, **size.prepare,
    )((batch * plan.room,))  # fmt: skip
    Launch(parts.begin_kernel, keys, kept.keys, scratch.norms, scratch.largest, scratch.halves, **size.begin)(
        (cfg.num_subkeys, 2 * memories * cfg.num_heads)
    )
    slots = kept.slots.new_empty(batch, plan.room - plan.arrived, cfg.slots_per_token, dtype=torch.int64)
    weights = torch.empty_like(slots, dtype=torch.float32)
    last, addressing = address(cfg, plan, tokens, kept, scratch, slots, weights, save)
    sorted_rows, order = kept.sorted_rows.sort(stable=True)
    kept = kept._replace(sorted_rows=sorted_rows, order=order)
    output, squared = read_and_write(cfg, plan, values, tokens, kept, save, dtype)
    writes = len(plan.windows) - (False in plan.kinds)  # all are of one length, and only the last window may not write
    written = squared[: writes * batch * plan.windows[0].length]
    memorization = written.view(writes, memories, -1).sum(2) if writes else squared.new_zeros(0, memories)
    addressing = addressing[:writes].view(writes, memories, 2 * cfg.num_heads, cfg.num_subkeys).sum((2, 3))
    last = last.view(keys.shape)
    return Result(output, slots, weights, last.clone() if save else last, memorization, addressing, kept)


def address(
    cfg: FwPKMConfig, plan: Plan, tokens: Tokens, kept: Kept, scratch: Scratch, slots: Tensor, weights: Tensor,
    save: bool, due: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What each token picks, moving the keys; returns the last keys and the terms of the addressing loss.

    Args:
        cfg: the configuration.
        plan: the windows.
        tokens: the stream, whose flags are ``kept``, as the keys before it are.
        kept: receives what is computed.
        scratch: of these keys.
        slots: ``[B, T, H*k]`` int64, receives those of the tokens that the call has brought.
        weights: ``[B, T, H*k]``, likewise.
        save: for ``backward``: keep the keys of each window.
        due: None, or an int32 on the GPU: where it is 0, nothing is done and the results mean nothing.
    """
    size, memories = shapes(cfg, tokens.query.dtype), kept.counts.shape[1]
    rows, groups, subkeys = tokens.query.shape[0] // memories, 2 * memories * cfg.num_heads, cfg.num_subkeys
    longest = rows * plan.longest

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=slots.device)

    _, largest, norms, halves = scratch
    addressing = new(len(plan.windows), groups, subkeys)
    listed = size.select["TILES"] * size.select["PROPOSED"]
    proposals = new(memories * longest, cfg.num_heads, 2, listed, dtype=torch.int32)
    scales, pulls = new(memories * longest, cfg.num_heads, 2), new(memories * longest, cfg.num_heads, 2, cfg.top_k)
    sums = KeySums(cfg, tokens.query, kept, longest, due)
    select = Launch(
        lookup.select_kernel, tokens.query, kept.flags, norms, largest, halves, proposals, scales, due,
        **size.select,
    )  # fmt: skip
    rank = Launch(
        lookup.rank_kernel, tokens.query, kept.keys, proposals, scales, kept.flags, kept.ids, kept.ranks, due,
        **size.rank,
    )  # fmt: skip
    combines = {
        writes: Launch(
            lookup.combine_kernel, kept.ids, kept.ranks, kept.flags, kept.kinds, kept.slots, kept.weights,
            kept.sorted_rows, kept.share, kept.counts, kept.maps, slots, weights, due,
            WRITES=writes, MAPS=writes or save, **size.combine,
        ) for writes in plan.kinds
    }  # fmt: skip
    pull = Launch(
        chunk_update.pull_kernel, kept.ids, kept.ranks, kept.kinds, kept.share, kept.counts, kept.active, pulls, due,
        **size.pull,
    )  # fmt: skip
    key_sums = sums.of(pulls)
    step_keys = Launch(
        chunk_update.keys_kernel, kept.keys, norms, largest, halves, sums.sums, sums.totals, kept.share, kept.counts,
        kept.active, addressing, kept.moved, kept.pulled, kept.keys_unclipped, due, SAVE=save, **size.keys,
    )  # fmt: skip
    version = 0
    for i, (start, length, writes, first, fresh) in enumerate(plan.windows):
        where = (start, length, first, plan.room, rows)
        select((blocks_of(rows * length, size.select["BLOCK"]), groups, size.select["TILES"]), version, i, *where)
        rank((rows * length, groups), version, *where)
        combines[writes](
            (blocks_of(rows * length, size.combine["BLOCK"]), memories), i, memories, kept.maps.shape[-1], *where,
            fresh, plan.arrived, slots.shape[1],
        )  # fmt: skip
        if writes:
            pull((blocks_of(rows * length, size.pull["BLOCK"]), groups), i, *where)
            pieces = sums.launch(key_sums, i, version, first, *where)
            after = version + 1 if save else 0
            step_keys((subkeys, groups), i, version, after, pieces)
            version = after
    return kept.keys[version], addressing


def read_and_write(
    cfg: FwPKMConfig, plan: Plan, values: Tensor, tokens: Tokens, kept: Kept, save: bool, dtype: torch.dtype,
    due: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read each window and write its chunk; returns the output, and ½ g ‖v̂ - u‖² [w]. Arguments as in ``address``."""
    size, entries = shapes(cfg, tokens.query.dtype), cfg.slots_per_token
    batch, memories = tokens.query.shape[0], values.shape[0]
    output = values.new_empty(batch, plan.room - plan.arrived, cfg.value_dim, dtype=dtype)
    squared = values.new_empty(plan.total)
    reads = {
        writes: Launch(
            lookup.read_kernel, values, kept.slots, kept.weights, kept.kinds, tokens.value, tokens.gate, output,
            kept.error, kept.strength, squared, due,
            HAS_GATE=tokens.gate is not None, WRITES=writes, **size.read,
        ) for writes in plan.kinds
    }  # fmt: skip
    pieces = blocks_of(batch * plan.longest * entries, size.piece["PIECE"])
    partial, counts = values.new_empty(pieces, cfg.value_dim), kept.slots.new_empty(pieces)
    sum_pieces = Launch(
        chunk_update.piece_kernel, kept.sorted_rows, kept.order, kept.weights, kept.strength, kept.error, kept.kinds,
        partial, counts, due, **size.piece,
    )  # fmt: skip
    steps = {
        writes: Launch(
            chunk_update.values_kernel, values, kept.sorted_rows, kept.order, kept.weights, kept.strength, kept.error,
            kept.kinds, kept.active, partial, counts, kept.heads, kept.steps, kept.rows, kept.values_unclipped, due,
            WRITES=writes, SAVE=save, **size.values,
        ) for writes in plan.kinds
    }  # fmt: skip
    for i, (start, length, writes, first, fresh) in enumerate(plan.windows):
        reads[writes](
            (batch * length,), start, length, first, plan.room, batch // memories, fresh, plan.arrived, output.shape[1]
        )  # fmt: skip
        if writes:
            sum_pieces((blocks_of(batch * length * entries, size.piece["PIECE"]),), length, first, plan.total)
        if writes or save:
            steps[writes]((batch * length * entries,), i, memories, length, first, plan.total)
    return output, squared
