"""One call of the memory on a GPU: the windows of SPEC.md §5 through the kernels of each step, and back.

The keys do not depend on the values. So the windows are addressed one after the other, moving the keys, or all at once
where no write moves them; the entries of all windows are then sorted by table row at once; and the windows read and
write the values one after the other. The backward takes them in reverse, first through the values, then through the
keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fwpkm.config import FwPKMConfig
from fwpkm.kernels import key_gradient, keys, overlay, propose, ranks, read, slots, tokens, values
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.layouts import backward_layout, forward_layout, residuals_layout
from fwpkm.kernels.runtime.shapes import keys_move
from fwpkm.kernels.runtime.windows import Bounds, Call, Plan, least, of_call
from fwpkm.kernels.runtime.workspace import Layout, Workspace
from fwpkm.tokens import NUMBERS, SCALARS, Tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INPUTS = ("due", "pair", *Tokens._fields)


class Result(NamedTuple):
    """What a call gives."""

    output: Tensor
    """``[B, T, Dv]``"""
    slots: Tensor
    """``[B, T, H*k]`` int64"""
    weights: Tensor
    """``[B, T, H*k]``: NaN for dead tokens."""
    keys: Tensor | None
    """None of an overlaid or ragged call."""
    memorization: Tensor
    """``[windows, M]``; of a ragged plan ``[w, 1]``, of all windows' memories."""
    addressing: Tensor
    """The same."""
    residuals: Workspace
    """Of ``residuals_layout``."""


class Gradients(NamedTuple):
    """With respect to a call's inputs; those of the tables are None where they were not asked for."""

    keys: Tensor
    values: Tensor | None
    tokens: Tokens
    """Of the stream: query ``[B, n, H*Dk]`` in its dtype or float32, and of every other number that was given."""


def forward(
    cfg: FwPKMConfig, plan: Plan, keys: Tensor, values: Tensor, tokens: Tokens, pair: Tensor | None, save: bool,
    dtype: torch.dtype, uses: Tensor | None = None, most: Bounds | None = None, overlaid: bool = False,
) -> Result:  # fmt: skip
    """Read and write all windows; ``values`` [M, N, Dv] and ``uses`` [M, N] are overwritten, ``keys`` is not.

    ``overlaid``, ``values`` is [1, N, Dv] for all memories, and stays: what is written serves this call alone.

    Args:
        cfg: the configuration.
        plan: the windows.
        keys: ``[M, H, 2, S, Dk/2]`` float32, contiguous.
        values: ``[M, N, Dv]`` float32, contiguous.
        tokens: the stream, contiguous; a field that is None is at its default.
        pair: ``[B, n]`` bool, contiguous: the tokens whose values may be bound; None is all.
        save: keep what ``backward`` needs.
        dtype: of the output.
        uses: ``[M, N]`` float32, contiguous: U of each slot; None where no write weighs it.
        most: what to make space for, so that the shapes of residuals do not depend on the position.
        overlaid: every memory begins from one table, and the written ones are not asked for.
    """
    import torch  # here, so that who only lists launches needs none

    inputs = {**tokens._asdict(), "pair": pair, "initial_keys": keys, "table": values, "uses": uses, "due": None}
    call = Call(cfg, plan, tokens.query.dtype, keys.shape[0], save, overlaid)
    launches = forward_launches(call, most)
    residuals = Workspace.empty(launches.residuals, keys)
    launches.prepare.run(inputs, residuals)  # which an idle GPU does while the rest is made ready
    if plan.begins is not None:
        residuals["begins"].copy_(torch.tensor(plan.begins, device="cpu", pin_memory=keys.is_cuda), non_blocking=True)
    workspace, entries = Workspace.empty(launches.workspace, keys), cfg.slots_per_token
    new, by_window = (len(tokens.query), plan.num_new), (-1, call.memories if plan.begins is None else 1)
    slots = keys.new_empty(*new, entries, dtype=torch.int64)
    weights = keys.new_empty(*new, entries)
    output = values.new_empty(*new, cfg.value_dim, dtype=dtype)
    writes, rows = plan.num_writes, plan.rows(plan.num_writes)
    addressing = keys.new_empty(rows // call.rows).view(by_window)
    inputs |= {"new_slots": slots, "new_weights": weights, "output": output, "addressing": addressing}
    if overlaid:
        workspace["by_row"].fill_(-1)
    launches.address.run(inputs, residuals, workspace)
    used = slice(plan.total * entries)
    torch.sort(workspace["table_rows"], stable=True, out=(residuals["sorted_rows"][used], residuals["order"][used]))
    launches.write.run(inputs, residuals, workspace)
    length = plan.windows[0].length
    memorization = workspace["squared"][: rows * length].view(-1, call.rows * length).sum(1).view(by_window)
    version = writes * save * keys_move(cfg)
    last = None if overlaid or plan.begins else residuals["keys"].view(-1, *keys.shape)[version].clone()
    return Result(output, slots, weights, last, memorization, addressing, residuals)


class Forward(NamedTuple):
    """The launches of a forward; between the last two the entries are sorted."""

    residuals: Layout
    workspace: Layout
    prepare: Launches
    address: Launches
    write: Launches


@of_call
def forward_launches(call: Call, most: Bounds | None) -> Forward:
    """Those of a call whose residuals have space for ``most``, or for its own windows."""
    most = most or least(call.plan, call.rows)
    residuals = residuals_layout(call.cfg, most, call.memories, call.plan.batch, call.save, overlaid=call.overlaid)
    workspace = forward_layout(call, residuals.spec("sorted_rows").dtype)
    inputs = *_INPUTS, "initial_keys", "table", "uses", "new_slots", "new_weights", "output", "addressing"
    prepare, address, write = (
        Launches(residuals, inputs=_INPUTS),
        *(Launches(residuals, workspace, inputs=inputs) for _ in range(2)),
    )
    tokens.add_prepare(prepare, call)
    propose.add_begin_keys(address, call)
    add_address(address, call)
    keys.add_addressing_loss(address, call)
    add_write(write, call)
    return Forward(residuals, workspace, prepare, address, write)


def add_address(launches: Launches, call: Call) -> None:
    """Add what each token picks, moving the keys.

    Where the tensor ``due`` is not None but int32 on the GPU, the launches do nothing for memories of which it is 0.
    """
    for window, windows in call.runs:
        integers = call.integers(window, windows)
        propose.add_propose(launches, call, integers)
        ranks.add_rank(launches, call, integers)
        slots.add_select_slots(launches, call, integers)
        if call.plan.windows[window].writes:
            key_gradient.add_coefficients(launches, call, integers)
            if keys_move(call.cfg):
                keys.add_keys(launches, call, integers)


def add_write(launches: Launches, call: Call) -> None:
    """Add the reads of all windows and the writes of their chunks."""
    for i in range(len(call.plan.windows)):
        integers = call.integers(i)
        read.add_read(launches, call, integers)
        values.add_values(launches, call, integers)


def backward(
    cfg: FwPKMConfig,
    plan: Plan,
    tokens: Tokens,
    residuals: Workspace,
    memories: int,
    d_output: Tensor | None,
    d_keys: Tensor | None,
    d_values: Tensor | None,
    table: torch.Size | None,
    d_weights: Tensor | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
    initial: Tensor | None = None,
) -> Gradients:
    """Gradients of a call from those of its output, final keys and final values (None: zero).

    Args:
        cfg: the configuration.
        plan: the windows.
        tokens: the stream.
        residuals: of the forward.
        memories: M.
        d_output: ``[B, T, Dv]``, contiguous.
        d_keys: ``[M, H, 2, S, Dk/2]`` float32, contiguous.
        d_values: ``[M, N, Dv]`` float32, contiguous.
        table: the shape of the value table, if its own gradient is asked for.
        d_weights: ``[w, H*k]`` float32, of the weights themselves.
        summed: makes the sum over all columns of the values, in place, where the table holds some of them.
        initial: ``[1, N, Dv]`` of an overlaid call: the table that its forward read.
    """
    import torch

    query, keys = tokens.query, residuals.layout.spec("keys").shape[1:]
    new = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    overlap = any(a.start + a.length > b.start for a, b in zip(plan.windows, plan.windows[1:]))
    # After a window and before it, in turns; what no later window reads has no gradient but that of the final keys.
    both = new(2, memories, *keys).zero_()
    if d_keys is not None:
        both[len(plan.windows) % 2] = d_keys.view_as(both[0])
    d_table = None
    if table is not None:
        d_table = new(table).zero_() if d_values is None else d_values.clone()
    numbers, wider = [name for name in tokens.present() if name in NUMBERS], {"query": torch.float32} if overlap else {}
    d_tokens = Tokens(**{x: torch.zeros_like(getattr(tokens, x), dtype=wider.get(x)) for x in numbers})
    inputs = {
        **tokens._asdict(), "latest": new(memories * cfg.num_slots, dtype=torch.int32).fill_(-1), "d_keys": both,
        "d_values": d_values, "d_output": d_output, "d_table": d_table, "due": None, "table": initial,
        "needed_by": residuals["sources"] if initial is not None and table is None else None,
        **{f"d_{name}": x for name, x in d_tokens._asdict().items()},
    }  # fmt: skip
    call = Call(cfg, plan, query.dtype, memories, True, initial is not None)
    launches = backward_launches(call, overlap, table is not None, residuals.layout)
    workspace = Workspace.empty(launches.workspace, query)
    launches.through_values.run(inputs, residuals, workspace)
    if summed is not None:
        for x in (workspace["d_weights"], *(getattr(d_tokens, name) for name in SCALARS)):
            if x is not None:
                summed(x)
    if d_weights is not None:
        workspace["d_weights"].add_(d_weights)
    launches.through_keys.run(inputs, residuals, workspace)
    return Gradients(both[0].unflatten(1, (cfg.num_heads, 2)), d_table, d_tokens)


class Backward(NamedTuple):
    """The launches of a backward."""

    workspace: Layout
    through_values: Launches
    through_keys: Launches


@of_call
def backward_launches(call: Call, overlap: bool, table: bool, residuals: Layout) -> Backward:
    """Those of a call; whether windows ``overlap``, and whether the gradient of the ``table`` is asked for."""
    workspace = backward_layout(call, table)
    inputs = (
        *_INPUTS, "latest", "table", "needed_by", "d_keys", "d_values", "d_output", "d_table",
        *(f"d_{name}" for name in NUMBERS),
    )  # fmt: skip
    through_values, through_keys = (Launches(residuals, workspace, inputs=inputs) for _ in range(2))
    _add_values_backward(through_values, call, table)
    slots.add_select_slots_backward(through_keys, call)
    _add_keys_backward(through_keys, call, overlap)
    return Backward(workspace, through_values, through_keys)


def _add_values_backward(launches: Launches, call: Call, table: bool) -> None:
    """Add what gives the gradients of weights, of rows, and of the stream but its queries."""
    for i in reversed(range(len(call.plan.windows))):
        integers = call.integers(i)
        read.add_read_backward(launches, call, integers)
        if i > 0 or table:
            values.add_values_backward(launches, call, integers)
    if table:
        overlay.add_table_backward(launches, call)


def _add_keys_backward(launches: Launches, call: Call, overlap: bool) -> None:
    """Add what gives the gradients of the keys before each run, and of the stream's queries."""
    for run in reversed(call.runs):
        integers = call.integers(*run)
        key_gradient.add_scores_backward(launches, call, integers, overlap)
        keys.add_keys_backward(launches, call, integers)
