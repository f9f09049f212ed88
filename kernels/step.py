"""The step of a row of keys or values (SPEC.md §4)."""

import triton
import triton.language as tl

from fwpkm.kernels.tokens import INF

EQUATIONS = ("step",)


@triton.jit
def step(row, gradient, inside, rate, DECAY: tl.constexpr, CLIP: tl.constexpr, forgotten=None, pulled=None):
    """(1 - F) row - η (clip(gradient) + λ row + what is ``pulled``), 0 outside; and whether it is finite.

    Or else the row keeps its bits.
    """
    if CLIP is not None:
        gradient = tl.minimum(tl.maximum(gradient, -CLIP), CLIP)
    new = row - rate * (gradient + DECAY * row)
    if pulled is not None:
        new -= rate * pulled
    if forgotten is not None:
        new -= forgotten * row
    new = tl.where(inside, new, 0.0)
    return new, tl.min((tl.abs(new) < INF).to(tl.int32), 0) != 0
