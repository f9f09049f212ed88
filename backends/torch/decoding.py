"""One token of each sequence at a time, overwriting the state (SPEC.md §5)."""

import torch
from torch import Tensor, nn

from fwpkm import validation
from fwpkm.backends.torch import engine, exporting, fast, operators, ops, ranks
from fwpkm.backends.torch.checks import check_device, check_state_device
from fwpkm.backends.torch.column_parallel import by_columns, is_sharded
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State
from fwpkm.tokens import Tokens


def start_decoding(state: State[Tensor]) -> State[Tensor]:
    """A copy of a state for :func:`decode` to overwrite, its position on the tables' device.

    float32, or float64 where the tables are. ``state._replace(position=state.position.cpu())`` is an ordinary state
    again, with the same tables.

    Raises:
        ValueError: not a state.
    """
    validation.check_is_state(state)
    dtype = torch.float64 if state.memory.keys.dtype == torch.float64 else torch.float32
    device = state.memory.keys.device

    @by_columns
    def copy(x: Tensor) -> Tensor:
        x = x.detach().clone(memory_format=torch.contiguous_format).to(device)
        return x.to(dtype) if x.is_floating_point() else x

    return state.map(copy)


@torch.no_grad()
def decode(
    cfg: FwPKMConfig,
    state: State[Tensor],
    query: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    implementation: str | None = None,
    forget: Tensor | None = None,
) -> Tensor:
    """Read one token of each sequence and write the chunk that it completes; ``state`` is overwritten. No gradient.

    Where the kernels serve, nothing depends on the host: a CUDA graph, or torch.compile, can hold a step and repeat it
    over any number of chunks. Elsewhere, and with tables in columns, it is :func:`fwpkm.backends.torch.apply`.

    Args:
        cfg: the configuration.
        state: of :func:`start_decoding`; every field is overwritten, the position too.
        query: ``[B, 1, H*Dk]``, any floating dtype.
        value: ``[B, 1, Dv]``.
        gate: ``[B, 1]`` in [0, 1], or None for 1.
        mask: ``[B, 1]`` bool, False for rows that rest, or None for True.
        implementation: as in :func:`fwpkm.backends.torch.apply`.
        forget: ``[B, 1]`` in [0, 1], or None for 0.

    Returns:
        output ``[B, 1, Dv]`` in the query's dtype.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was received.
        RuntimeError: inside of torch.export.
    """
    return decode_tokens(cfg, state, Tokens(query, value, gate, mask, forget), implementation)


def decode_tokens(
    cfg: FwPKMConfig,
    state: State[Tensor],
    tokens: Tokens,
    implementation: str | None = None,
    layer: nn.Module | None = None,
) -> Tensor:
    """``decode`` of tokens, without gradients; ``layer`` as of ``read_on``."""
    if exporting.is_exporting():
        raise RuntimeError(
            "decode overwrites its state, which torch.export does not keep: export calls with T=1 instead"
        )
    traced = torch.compiler.is_compiling()
    traced = traced and engine.choose_engine(implementation, cfg, state.memory, tokens.query) == "compiled"
    if traced:
        ops.refuse_graph(cfg, True)
    else:
        ranks.told(state, _check_decode, cfg, state, tokens)
    in_columns = isinstance(state, State) and is_sharded(state.memory.values)
    if traced or not (in_columns or engine.choose_engine(implementation, cfg, state.memory, tokens.query) == "eager"):
        return operators.decode(cfg, state, tokens)
    # What was made for inference may be overwritten there alone.
    with torch.inference_mode(
        torch.is_inference_mode_enabled() or any(x.is_inference() for x in state.arrays().values())
    ):
        on_host = state._replace(position=state.position.cpu())
        engine_of = implementation if in_columns else "eager"
        output, after, _ = ops.read_on(cfg, on_host, tokens, None, True, True, engine_of, layer)
        assert after is not None
        for old, new in zip(state.arrays().values(), after.arrays().values()):
            if old is not new:
                old.copy_(new)
    return output if torch.is_inference_mode_enabled() or not output.is_inference() else output.clone()


def _check_decode(cfg: FwPKMConfig, state: State, tokens: Tokens) -> None:
    validation.check_apply(cfg, state, tokens, None, True, SELF)
    for name in ("initial_decay", "recent_penalty"):
        if getattr(cfg, name):
            raise ValueError(
                f"{name} must be 0 here: decode does not know it; apply reads one token too. "
                f"Received: {name}={getattr(cfg, name)!r}"
            )
    check_device(tokens.query, **tokens.present())
    check_state_device(tokens.query, state)
    fast.check_decoding(state, tokens.query)
