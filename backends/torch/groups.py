"""Packed sequences of one call in groups of like lengths, each padded to its own longest (SPEC.md §5).

The kernels read a rectangle, in which short sequences beside a long one are mostly padding. Where no state is kept,
sequences have nothing to do with each other, so they may as well be read in several rectangles.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Trace
from fwpkm.tokens import Tokens

_WINDOW = 2048
"""Tokens that take as long as what a window takes besides: one of 512 tokens takes 69 µs, one of 4096 takes 164."""


def groups_of(cfg: FwPKMConfig, ends: list[int]) -> list[list[int]]:
    """The sequences of each group, in order, so that padding and launches together cost least.

    Args:
        cfg: the configuration.
        ends: ``cu_seqlens``.
    """
    by_windows: dict[int, list[int]] = defaultdict(list)
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    for i, length in enumerate(lengths):
        by_windows[max(1, schedule.max_writes(cfg, length))].append(i)
    numbers = sorted(by_windows, reverse=True)
    longest = [max(lengths[i] for i in by_windows[number]) for number in numbers]
    before = [*itertools.accumulate((len(by_windows[number]) for number in numbers), initial=0)]
    best = [(0, 0, 0)]  # of the first so many numbers: what they cost, in how many groups, where the last one begins
    for stop in range(1, len(numbers) + 1):
        found = []
        for start, (cost, groups, _) in enumerate(best):
            cost += (before[stop] - before[start]) * longest[start] + numbers[start] * _WINDOW
            found.append((cost, groups + 1, start))
        best.append(min(found))
    result, stop = [], len(numbers)
    while stop:
        start = best[stop][2]
        result.append(sorted(i for number in numbers[start:stop] for i in by_windows[number]))
        stop = start
    return result[::-1]


def read_groups(
    cfg: FwPKMConfig, inputs: Tokens, ends: list[int], groups: list[list[int]],
    read: Callable[[Tokens, Tensor], tuple[Tensor, Any, Trace]],
) -> tuple[Tensor, None, Trace]:  # fmt: skip
    """``ops.begin`` of a packed row, whose groups ``read`` takes one after the other, each with its ``cu_seqlens``."""
    sequences, length = [*itertools.chain(*groups)], inputs.length
    starts = [*(ends[i] for i in sequences), ends[-1]]  # and of what is behind the last sequence
    lengths = [*(ends[i + 1] - ends[i] for i in sequences), length - ends[-1]]
    shifts = [start - before for start, before in zip(starts, itertools.accumulate(lengths, initial=0))]
    orders = {x.device: _order(shifts, lengths, length, x.device) for x in inputs.present().values()}
    sizes = [sum(ends[i + 1] - ends[i] for i in group) for group in groups]
    sizes[-1] += lengths[-1]
    parts = {name: x.index_select(1, orders[x.device]).split(sizes, 1) for name, x in inputs.present().items()}
    outputs, traces = [], []
    for i, group in enumerate(groups):
        of_group = torch.tensor([0, *(ends[j + 1] - ends[j] for j in group)]).cumsum(0).int()
        output, _, trace = read(Tokens(**{name: of[i] for name, of in parts.items()}), of_group)
        outputs.append(output)
        traces.append(trace)
    here, columns = orders[inputs.query.device], schedule.max_writes(cfg, length)
    back = torch.empty_like(here).scatter_(0, here, torch.arange(length, device=here.device))
    row = torch.tensor(sequences).argsort()

    def of_tokens(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, 1).index_select(1, back)

    def of_sequences(parts: list[Tensor]) -> Tensor:
        parts = [x.to(here.device) for x in parts]  # without a token no kernel runs, and ``writes`` lies on the CPU
        whole = torch.cat([F.pad(x, (0, columns - x.shape[1])) if x.ndim == 2 else x for x in parts])
        return whole.index_select(0, row.to(whole.device, non_blocking=True))

    by_field = Trace(*zip(*traces))
    return of_tokens(outputs), None, Trace(*map(of_tokens, by_field[:2]), *map(of_sequences, by_field[2:]))


def _order(shifts: list[int], lengths: list[int], length: int, device: torch.device) -> Tensor:
    """``[T]``: tokens by group, of sequences that move by ``shifts``; made on the device, as a long copy may wait."""
    shift, number = (torch.tensor(x).to(device, non_blocking=True) for x in (shifts, lengths))
    return torch.arange(length, device=device) + shift.repeat_interleave(number, output_size=length)
