"""V, how often sub-keys were used lately: γ log(1 + V) is taken from their sub-scores (docs/retention.md)."""

import triton
import triton.language as tl

from fwpkm.kernels.key_sums import rows_before
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.shapes import blocks_of
from fwpkm.kernels.runtime.windows import Call

EQUATIONS = ()


@triton.jit(do_not_specialize=["window"])
def recents_kernel(
    recents, subkey_counts, active, window, HEADS: tl.constexpr, SUBKEYS: tl.constexpr, BLOCK: tl.constexpr
):
    """V after a window: (V + how many tokens that count chose the sub-key) / 2; V itself where none has a pair."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    subkey = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = subkey < SUBKEYS
    at = rows_before(window, groups, SUBKEYS) + group.to(tl.int64) * SUBKEYS + subkey
    recent = tl.load(recents + at, mask=inside, other=0.0)
    count = tl.load(subkey_counts + at, mask=inside, other=0).to(tl.float32)
    lives = tl.load(active + window * (groups // (2 * HEADS)) + group // (2 * HEADS)) != 0
    after = rows_before(1, groups, SUBKEYS) + at
    tl.store(recents + after, tl.where(lives, (recent + count) * 0.5, recent), mask=inside)


def add_recents(launches: Launches, call: Call, integers: dict[str, int]) -> None:
    """Add V after a window that is written, once it is known which memories have a pair."""
    constants = call.shapes.recents
    grid = blocks_of(call.cfg.num_subkeys, constants["BLOCK"]), call.groups
    launches.add(recents_kernel, grid, integers, constants)
