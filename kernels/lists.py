"""Sorted lists in registers: a tuple of tensors, the first of which holds the largest of every list.

Where each element of a tensor is a list of its own, nothing crosses lanes; and what is merged needs no index.
"""

# A tuple that grows has another type each time.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

EQUATIONS = ()


@triton.jit
def inserted(best, x, AT: tl.constexpr, MOST: tl.constexpr):
    """The MOST largest of the lists and x, which is at most as large as the first AT of its list."""
    result = best[:AT]
    for i in tl.static_range(AT, len(best)):
        result = result + (tl.maximum(best[i], x),)
        x = tl.minimum(best[i], x)
    if len(best) < MOST:
        result = result + (x,)
    return result


@triton.jit
def merged_pairs(best, AXIS: tl.constexpr, MOST: tl.constexpr):
    """The MOST largest of each two lists along an axis of length 2, which is dropped.

    Of two sorted lists the larger ones at each index are a sorted list, and so are the smaller ones; of these the
    i-th, from 0, has 2 i + 1 above it.
    """
    merged = (tl.max(best[0], AXIS),)
    for i in tl.static_range(1, len(best)):
        merged = merged + (tl.max(best[i], AXIS),)
    for i in tl.static_range(0, min(len(best), MOST // 2)):
        merged = inserted(merged, tl.min(best[i], AXIS), 2 * i + 1, MOST)
    return merged


@triton.jit
def paired(best, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Lists [ROWS, OUTER · INNER] as [ROWS, OUTER, INNER]."""
    result = (tl.reshape(best[0], [ROWS, OUTER, INNER]),)
    for i in tl.static_range(1, len(best)):
        result = result + (tl.reshape(best[i], [ROWS, OUTER, INNER]),)
    return result


@triton.jit
def largest_of_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr):
    """The MOST largest of each row of x [ROWS, COLUMNS], which all differ, as lists [ROWS, 1]."""
    # Neighbours first, which a thread of a product of matrices holds; then halves: of 256 columns it holds both
    # until four lists a row are left.
    best = merged_pairs(paired((x,), ROWS, COLUMNS // 2, 2), 2, MOST)
    for level in tl.static_range(2, 12):
        if 2**level <= COLUMNS:
            best = merged_pairs(paired(best, ROWS, 2, COLUMNS // 2**level), 1, MOST)
    return best
