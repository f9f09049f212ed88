"""What a token of a call is to the memory, as bits of an int8."""

import triton.language as tl

LIVE = tl.constexpr(1)
"""Unmasked and finite: it counts, and may write."""
DEAD = tl.constexpr(2)
"""Its query, value, gate or a selected score is not finite (SPEC.md §5)."""
TARGET = tl.constexpr(4)
"""Its value may be bound to a query."""
