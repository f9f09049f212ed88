"""Sorted lists in registers: a tuple of tensors, the first of which holds the largest of every list.

Where each element of a tensor is a list of its own, nothing crosses lanes; and what is merged needs no index.
"""

# A tuple that grows has another type each time.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

EQUATIONS = ()
INDEX_BITS = tl.constexpr(22)
"""Of an index beside a number; the largest table has so many slots."""


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


@triton.jit
def with_index(number, index, cell):
    """A float and its index below 2^22 as one integer: of larger ones the larger, of equal ones that of the lower cell.

    ``cell`` is an integer below 1024; of one cell the lower index is the larger.
    """
    bits = (number + 0.0).to(tl.int32, bitcast=True)  # a sum that is not -0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # so negative floats have the order of their integers
    return bits.to(tl.int64) * 2**32 - index.to(tl.int64) + (2**32 - 1 - cell * 2**INDEX_BITS)


@triton.jit
def numbers_of(best):
    """The floats of ``with_index``."""
    result = ()
    for i in tl.static_range(len(best)):
        bits = (best[i] >> 32).to(tl.int32)
        result = result + ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True),)
    return result


@triton.jit
def indices_of(best):
    """The indices of ``with_index``."""
    result = ()
    for i in tl.static_range(len(best)):
        result = result + ((~best[i] & (2**INDEX_BITS - 1)).to(tl.int32),)
    return result


@triton.jit
def loaded(address, mask, COUNT: tl.constexpr):
    """COUNT numbers from each address on, 0 where not ``mask``."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (tl.load(address + i, mask=mask, other=0),)
    return result


@triton.jit
def softmax(x):
    """exp(x) / Σ exp(x) over a tuple."""
    most = x[0]
    for i in tl.static_range(1, len(x)):
        most = tl.maximum(most, x[i])
    e, total = (), 0.0
    for i in tl.static_range(len(x)):
        e = e + (tl.exp(x[i] - most),)
        total += e[i]
    result = ()
    for i in tl.static_range(len(x)):
        result = result + (e[i] / total,)
    return result
