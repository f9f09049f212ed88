"""One call of the memory on a GPU: the windows of SPEC.md §5 through the kernels of each step.

The keys do not depend on the values. So the windows are addressed one after the other, moving the keys; the entries of
all windows are then sorted by table row at once; and the windows read and write the values one after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm.config import FwPKMConfig
from fwpkm.kernels import chunk_update, lookup, parts
from fwpkm.kernels.launch import Steps
from fwpkm.kernels.layouts import kept_layout, scratch_layout
from fwpkm.kernels.room import Layout, Room
from fwpkm.kernels.shapes import blocks_of, shapes
from fwpkm.kernels.sums import KeySums
from fwpkm.kernels.tokens import prepare_kernel
from fwpkm.kernels.windows import Bounds, Plan, least, of_plan


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
    kept: Room
    """Of ``kept_layout``."""


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
    batch, memories, query = tokens.query.shape[0], keys.shape[0], tokens.query.dtype
    layout = kept_layout(cfg, most or least(plan, batch), memories, batch, save)
    others = scratch_layout(cfg, plan, memories, batch, query, layout.place("sorted_rows").dtype)
    given = tuple(x is not None for x in (tokens.gate, tokens.mask, tokens.pair))
    steps = _steps(cfg, plan, query, batch, memories, save, given, layout, others)
    tensors, kept = {**tokens._asdict(), "given_keys": keys, "table": values, "due": None}, Room.empty(layout, keys)
    steps.prepare.run(tensors, kept)  # which an idle GPU does while the rest is made ready
    scratch, new, entries = Room.empty(others, keys), plan.room - plan.arrived, cfg.slots_per_token
    slots = keys.new_empty(batch, new, entries, dtype=torch.int64)
    weights, output = keys.new_empty(batch, new, entries), values.new_empty(batch, new, cfg.value_dim, dtype=dtype)
    tensors |= {"new_slots": slots, "new_weights": weights, "output": output}
    steps.address.run(tensors, kept, scratch)
    used = slice(plan.total * entries)
    torch.sort(scratch["table_rows"], stable=True, out=(kept["sorted_rows"][used], kept["order"][used]))
    steps.write.run(tensors, kept, scratch)
    writes = len(plan.windows) - (False in plan.kinds)  # all are of one length, and only the last window may not write
    written = scratch["squared"][: writes * batch * plan.windows[0].length]
    memorization = written.view(writes, memories, -1).sum(2) if writes else keys.new_zeros(0, memories)
    addressing = scratch["terms"][:writes].view(writes, memories, 2 * cfg.num_heads, cfg.num_subkeys).sum((2, 3))
    last = kept["keys"][writes * save].view(keys.shape).clone()
    return Result(output, slots, weights, last, memorization, addressing, kept)


class _Steps(NamedTuple):
    """The launches of a call; between the last two the entries are sorted."""

    prepare: Steps
    address: Steps
    write: Steps


@of_plan
def _steps(
    cfg: FwPKMConfig, plan: Plan, query: torch.dtype, batch: int, memories: int, save: bool, given: tuple[bool, ...],
    kept: Layout, scratch: Layout,
) -> _Steps:  # fmt: skip
    """Those of a plan; ``given``: whether there is a gate, mask and pair."""
    size, shown, (gated, masked, paired) = shapes(cfg, query), plan.room - plan.arrived, given
    steps, (zeros,) = _Steps(Steps(kept), Steps(kept, scratch), Steps(kept, scratch)), kept.place("zeros").shape
    steps.prepare.of(
        prepare_kernel, "query", "value", "gate", "mask", "pair", "flags", "zeros",
        HAS_GATE=gated, HAS_MASK=masked, HAS_PAIR=paired, SHIFTED=paired, **size.prepare,
    )((batch * plan.room + blocks_of(zeros, size.prepare["ZEROS"]),), batch * plan.room, zeros)  # fmt: skip
    steps.address.of(parts.begin_kernel, "given_keys", "keys", "norms", "largest", "halves", **size.begin)(
        (cfg.num_subkeys, 2 * memories * cfg.num_heads)
    )
    add_address(steps.address, cfg, plan, query, batch, memories, shown, save)
    add_write(steps.write, cfg, plan, query, batch, memories, shown, save, gated)
    return steps


def add_address(
    steps: Steps, cfg: FwPKMConfig, plan: Plan, query: torch.dtype, batch: int, memories: int, shown: int, save: bool,
) -> None:  # fmt: skip
    """Add what each token picks, moving the keys.

    Args:
        steps: receives the launches. Where the tensor ``due`` is not None but an int32 on the GPU, and 0, they do
            nothing.
        cfg: the configuration.
        plan: the windows.
        query: the dtype of queries.
        batch: B.
        memories: M.
        shown: how many tokens ``new_slots`` and ``new_weights`` have of each sequence.
        save: for ``backward``: keep the keys of each window.
    """
    size, subkeys, words = shapes(cfg, query), cfg.num_subkeys, steps.place("maps").shape[-1]
    rows, groups = batch // memories, 2 * memories * cfg.num_heads
    select = steps.of(
        lookup.select_kernel, "query", "flags", "norms", "largest", "halves", "proposals", "scales", "due",
        **size.select,
    )  # fmt: skip
    rank = steps.of(
        lookup.rank_kernel, "query", "keys", "proposals", "scales", "flags", "ids", "ranks", "due", **size.rank
    )
    combines = {
        writes: steps.of(
            lookup.combine_kernel, "ids", "ranks", "flags", "kinds", "slots", "weights", "table_rows", "share",
            "counts", "maps", "new_slots", "new_weights", "due",
            WRITES=writes, MAPS=writes or save, **size.combine,
        ) for writes in plan.kinds
    }  # fmt: skip
    pull = steps.of(
        chunk_update.pull_kernel, "ids", "ranks", "kinds", "share", "counts", "active", "pulls", "due", **size.pull
    )
    sum_keys = KeySums(cfg, query, memories, words).of(steps, "pulls")
    step_keys = steps.of(
        chunk_update.keys_kernel, "keys", "norms", "largest", "halves", "sums", "totals", "share", "counts", "active",
        "terms", "moved", "pulled", "keys_unclipped", "due", SAVE=save, **size.keys,
    )  # fmt: skip
    for i, (start, length, writes, first, fresh) in enumerate(plan.windows):
        version, number = i * save, rows * length  # each window before has written
        where = (start, length, first, plan.room, rows)
        select((blocks_of(number, size.select["BLOCK"]), groups, size.select["TILES"]), version, i, *where)
        rank((number, groups), version, *where)
        combines[writes](
            (blocks_of(number, size.combine["BLOCK"]), memories),
            i, memories, words, *where, fresh, plan.arrived, shown,
        )  # fmt: skip
        if writes:
            pull((blocks_of(number, size.pull["BLOCK"]), groups), i, *where)
            pieces = sum_keys(i, version, first, *where)
            step_keys((subkeys, groups), i, version, version + save, pieces)


def add_write(
    steps: Steps, cfg: FwPKMConfig, plan: Plan, query: torch.dtype, batch: int, memories: int, shown: int, save: bool,
    gated: bool,
) -> None:  # fmt: skip
    """Add the reads of all windows and the writes of their chunks. Arguments as in ``add_address``."""
    size, entries = shapes(cfg, query), cfg.slots_per_token
    reads = {
        writes: steps.of(
            lookup.read_kernel, "table", "slots", "weights", "kinds", "value", "gate", "output", "error", "strength",
            "squared", "due", HAS_GATE=gated, WRITES=writes, **size.read,
        ) for writes in plan.kinds
    }  # fmt: skip
    sum_pieces = steps.of(
        chunk_update.piece_kernel, "sorted_rows", "order", "weights", "strength", "error", "kinds", "partial",
        "partial_counts", "due", **size.piece,
    )  # fmt: skip
    writes_of = {
        writes: steps.of(
            chunk_update.values_kernel, "table", "sorted_rows", "order", "weights", "strength", "error", "kinds",
            "active", "partial", "partial_counts", "heads", "steps", "rows", "values_unclipped", "due",
            WRITES=writes, SAVE=save, **size.values,
        ) for writes in plan.kinds
    }  # fmt: skip
    for i, (start, length, writes, first, fresh) in enumerate(plan.windows):
        number = batch * length
        reads[writes](
            (number,), start, length, first, plan.room, batch // memories, fresh, plan.arrived, shown
        )  # fmt: skip
        if writes:
            sum_pieces((blocks_of(number * entries, size.piece["PIECE"]),), length, first, plan.total)
        if writes or save:
            writes_of[writes]((number * entries,), i, memories, length, first, plan.total)
