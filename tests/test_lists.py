"""Sorted lists in registers, beside torch's own sort."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from interpreter import DEVICE

from fwpkm.kernels.listed_slots import best_sums, in_order
from fwpkm.kernels.lists import largest_of_rows, loaded


@triton.jit
def rows_kernel(x, result, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr):
    """The MOST largest of each row."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    best = largest_of_rows(tl.load(x + row[:, None] * COLUMNS + column[None, :]), ROWS, COLUMNS, MOST)
    for j in tl.static_range(MOST):
        tl.store(result + row * MOST + j, tl.reshape(best[j], [ROWS]))


@pytest.mark.parametrize(("columns", "most"), [(2, 1), (2, 2), (16, 5), (16, 16), (64, 11), (256, 35)])
def test_the_largest_of_each_row_in_order(columns: int, most: int) -> None:
    draw = torch.Generator().manual_seed(columns)
    x = torch.stack([torch.randperm(10 * columns, generator=draw)[:columns] for _ in range(8)]).int()
    x -= 5 * columns
    x[0], x[1] = x[0].sort().values, x[1].sort(descending=True).values
    result = torch.zeros(8, most, dtype=torch.int32, device=DEVICE)
    rows_kernel[(1,)](x.to(DEVICE), result, 8, columns, most)
    assert torch.equal(result.cpu(), x.sort(1, descending=True).values[:, :most])


@triton.jit
def best_sums_kernel(ranks, ids, sums, slots, ROWS: tl.constexpr, SUBKEYS: tl.constexpr, K: tl.constexpr):
    """The best sums of two lists of each row, which are sorted first."""
    row = tl.arange(0, ROWS)
    inside = row < ROWS
    one, id1 = in_order(loaded(ranks + row * 2 * K, inside, K), loaded(ids + row * 2 * K, inside, K))
    two, id2 = in_order(loaded(ranks + (row * 2 + 1) * K, inside, K), loaded(ids + (row * 2 + 1) * K, inside, K))
    best, slot = best_sums(one, two, id1, id2, SUBKEYS, K)
    for j in tl.static_range(K):
        tl.store(sums + row * K + j, best[j])
        tl.store(slots + row * K + j, slot[j])


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_best_sums_are_those_of_all_cells(k: int) -> None:
    """Equal ranks go by id, and equal sums by the lower cell; few values, so that there are many of both."""
    rows, subkeys = 64, 2048
    draw = torch.Generator().manual_seed(k)
    ranks = torch.randint(-4, 3, (rows, 2, k), generator=draw).float() / 2
    ranks[0] = -torch.zeros(2, k)
    ranks[1, 0, 0], ranks[2, 1, 0] = -3e38, 3e38
    ids = torch.stack([torch.randperm(subkeys, generator=draw)[:k] for _ in range(2 * rows)]).view(rows, 2, k).int()
    sums, slots = (torch.zeros(rows, k, dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.int32))
    best_sums_kernel[(1,)](ranks.to(DEVICE), ids.to(DEVICE), sums, slots, rows, subkeys, k)
    for row in range(rows):
        pairs = (sorted(zip(ranks[row, i].tolist(), ids[row, i].tolist()), key=lambda x: (-x[0], x[1])) for i in (0, 1))
        cells = [(a + b, i * subkeys + j) for (a, i), (b, j) in itertools.product(*pairs)]
        best = sorted(cells, key=lambda cell: -cell[0])[:k]  # stable, so by cell
        assert (sums[row].tolist(), slots[row].tolist()) == ([pytest.approx(x) for x, _ in best], [x for _, x in best])
