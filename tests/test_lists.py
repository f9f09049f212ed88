"""Sorted lists in registers, beside torch's own sort."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import DEVICE

from fwpkm.kernels.lists import largest_of_rows


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
