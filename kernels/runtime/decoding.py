"""One token of each sequence on a GPU, and the write of the chunk that it completes, where it does (SPEC.md §5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fwpkm import schedule
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State
from fwpkm.kernels import decode as kernels
from fwpkm.kernels.runtime.call import add_address, add_write
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.layouts import forward_layout, residuals_layout
from fwpkm.kernels.runtime.windows import Call, least, of_call, write
from fwpkm.kernels.runtime.workspace import Layout, Workspace
from fwpkm.tokens import NUMBERS, TOKEN_FIELDS, Tokens, token_specs

if TYPE_CHECKING:
    from torch import Tensor

_PENDING = tuple(f"pending_{field.name}" for field in TOKEN_FIELDS)
_TOKEN = tuple(f"token_{field.name}" for field in TOKEN_FIELDS)


def decode(cfg: FwPKMConfig, state: State, tokens: Tokens) -> Tensor:
    """Read one token of each sequence, and write the chunk that it completes; everything in ``state`` is overwritten.

    Args:
        cfg: the configuration.
        state: contiguous, float32, its position on the GPU.
        tokens: T = 1, contiguous; a field that is None is at its default.

    Returns:
        output ``[B, 1, Dv]`` in the query's dtype.
    """
    keys, values = state.memory.keys, state.memory.values
    batch = tokens.query.shape[0]
    output = tokens.query.new_empty(batch, 1, cfg.value_dim)
    inputs = {
        **state._asdict(), **dict(zip(_TOKEN, tokens)), "uses": state.maybe_uses, "keys": keys, "table": values,
        "output": output,
    }  # fmt: skip
    launches = decode_launches(decode_call(cfg, batch, keys.shape[0]))
    launches.run(inputs, *(Workspace.empty(layout, keys) for layout in launches.layouts))
    return output


def decode_call(cfg: FwPKMConfig, batch: int, memories: int) -> Call:
    """The write of what is pending and a token, of each of so many memories where it is due."""
    # Queries are float32 once they are pending; what reads the token itself does not depend on their dtype.
    return Call(cfg, write(cfg.chunk_size + schedule.lag(cfg), batch), "float32", memories, False, decided=True)


@of_call
def decode_launches(call: Call) -> Launches:
    """The launches of a step, those of the write among them; the call is that of ``decode_call``."""
    inputs = *_PENDING, *_TOKEN, "keys", "table", "uses", "position", "output"
    launches = Launches(*_layouts(call), inputs=inputs)
    kernels.add_read_token(launches, call)
    kernels.add_stage(launches, call)
    add_address(launches, call)
    kernels.add_sort(launches, call)
    add_write(launches, call)
    kernels.add_store_pending(launches, call)
    return launches


def _layouts(call: Call) -> tuple[Layout, ...]:
    """Of what a step needs."""
    cfg, batch, num_tokens = call.cfg, call.plan.batch, call.plan.num_tokens
    residuals = residuals_layout(cfg, least(call.plan, call.rows), call.memories, batch, False, False)
    chunk = token_specs(cfg, batch, ("n", num_tokens))
    own = {
        "token_ranks": ((batch, cfg.num_heads, 2, cfg.num_subkeys), "float32"),
        "token_flags": ((batch,), "int8"),
        "due": ((call.memories,), "int32"),  # whether a memory's chunk is complete
        "pending_index": ((batch,), "int32"),  # where the token will be pending
        **{name: (spec.shape, "float32") for name, spec in chunk._asdict().items() if name in NUMBERS},
        "new_slots": ((0,), "int64"),
        "new_weights": ((0,), "float32"),
    }
    return residuals, forward_layout(call, residuals.spec("sorted_rows").dtype), Layout.of(own)
