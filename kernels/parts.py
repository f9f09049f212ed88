"""Float32 as sums of bfloat16 parts, which a GPU multiplies as matrices; and the keys in that form."""

import triton
import triton.language as tl


@triton.jit
def dot_halves(a, b, total, UPCAST: tl.constexpr):
    """total + a b of bfloat16 matrices; UPCAST for the interpreter, which has no bfloat16 arithmetic."""
    if UPCAST:  # noqa: SIM108
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def rest(x, part):
    """What bfloat16 ``part`` leaves of float32 x."""
    return x - part.to(tl.float32)


@triton.jit
def store_key(
    key, keys, norms, largest, parts, version, window, groups, group, subkey, d,
    SUBKEYS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A sub-key; and for ``select_kernel`` its square, the largest square of its codebook, and two bfloat16 parts.

    The sum of the parts is the sub-key up to 2^-17. ``largest`` is found as an integer, as which positive floats have
    the same order.
    """
    row = group.to(tl.int64) * SUBKEYS + subkey
    at = version * groups.to(tl.int64) * SUBKEYS + row
    tl.store(keys + at * HALF + d, key, mask=d < HALF)
    square = tl.sum(key * key, 0)
    tl.store(norms + row, square)
    tl.atomic_max(largest + window * groups + group, square.to(tl.int32, bitcast=True))
    high = key.to(tl.bfloat16)
    base = parts + ((2 * group).to(tl.int64) * SUBKEYS + subkey) * HALF + d
    tl.store(base, high, mask=d < HALF)
    tl.store(base + SUBKEYS * HALF, rest(key, high).to(tl.bfloat16), mask=d < HALF)


@triton.jit
def begin_kernel(
    given, keys, norms, largest, parts, SUBKEYS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Version 0 of the keys: those of the caller."""
    subkey, group = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    key = tl.load(given + (group.to(tl.int64) * SUBKEYS + subkey) * HALF + d, mask=d < HALF, other=0.0)
    store_key(key, keys, norms, largest, parts, 0, 0, tl.num_programs(1), group, subkey, d, SUBKEYS, HALF)
