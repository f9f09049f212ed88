"""A call as one operator, which ``torch.export`` keeps: how many chunks a call writes is decided when it runs.

``fwpkm::read`` is ``ops.apply``, functional and without gradient. Who runs an exported program imports
``fwpkm.backends.torch`` first, which registers the operator.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from fwpkm import schedule
from fwpkm.backends.torch.flat import flat, flatten, schema, unflatten
from fwpkm.backends.torch.operators import present, unpacked
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, Memory, State, Trace
from fwpkm.tokens import Tokens

flat(Trace)
for kind in (Memory, State, Trace, LayerTrace):  # so that torch.export.save can name them
    _register_namedtuple(kind, serialized_type_name=f"fwpkm.{kind.__name__}")


@flat
class _Read(NamedTuple):
    """What ``fwpkm::read`` takes; it returns ``_Result``."""

    config: str
    state: State
    tokens: Tokens
    cu_seqlens: Tensor | None
    update: bool


@flat
class _Result(NamedTuple):
    """What ``ops.apply`` returns; all but the state's position lies where the queries do."""

    output: Tensor
    state: State
    trace: Trace


def is_exporting() -> bool:
    """Whether torch.export traces this call.

    ``torch.compiler.is_exporting()`` is True under torch.compile too before torch 2.13, so its flag is read.
    """
    return torch.compiler._is_exporting_flag


def apply(
    cfg: FwPKMConfig, state: State, inputs: Tokens, cu_seqlens: Tensor | None, update: bool
) -> tuple[Tensor, State, Trace]:
    """``ops.apply`` of arguments that were checked."""
    arguments = _Read(cfg.to_json(), state, inputs, cu_seqlens, update)
    output, after, trace = unflatten(_Result, torch.ops.fwpkm.read(*flatten(arguments)))
    return output, after if cfg.usage_weight else after._replace(uses=()), trace


@torch.library.custom_op("fwpkm::read", mutates_args=(), schema=f"({schema(_Read)}) -> Tensor[]")
def _read(*arguments: Any) -> list[Tensor]:
    from fwpkm.backends.torch import ops

    config, state, tokens, cu_seqlens, update = unflatten(_Read, arguments)
    output, after, trace = ops.apply(unpacked(config), state, **tokens.present(), cu_seqlens=cu_seqlens, update=update)
    assert after is not None
    trace = trace._replace(writes=trace.writes.to(output.device))
    dtype = _table_dtype(state, tokens)
    after = after.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    taken = {x.untyped_storage()._cdata for x in arguments if isinstance(x, Tensor)}
    results = []
    # An operator's results are its own, each apart from the others.
    for x in present(tokens.query, _Result(output, after, trace)):
        results.append(x.clone() if x.untyped_storage()._cdata in taken else x)
        taken.add(x.untyped_storage()._cdata)
    return results


@_read.register_fake
def _(*arguments: Any) -> list[Tensor]:
    config, state, tokens, _, _ = unflatten(_Read, arguments)
    cfg, query, dtype = unpacked(config), tokens.query, _table_dtype(state, tokens)
    (rows, length), memories = query.shape[:2], state.memory.keys.shape[0]
    # Of a length that is not known yet: as a formula of it, torch would bind an exported program to W != 1.
    most = schedule.max_writes(cfg, length) if isinstance(length, int) else torch.library.get_ctx().new_dynamic_size()
    entries, columns = (rows, length, cfg.slots_per_token), (memories, most)
    trace = Trace(
        slots=query.new_empty(entries, dtype=torch.int64),
        weights=query.new_empty(entries, dtype=dtype),
        memorization=query.new_empty(columns, dtype=dtype),
        addressing=query.new_empty(columns, dtype=dtype),
        writes=query.new_empty(memories, dtype=torch.int32),
    )
    after = state.map(lambda x: x.new_empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype))
    return present(query, _Result(query.new_empty(rows, length, cfg.value_dim), after, trace))


def _table_dtype(state: State, tokens: Tokens) -> torch.dtype:
    """§6: float64 when queries and tables both are."""
    wide = tokens.query.dtype == state.memory.keys.dtype == torch.float64
    return torch.float64 if wide else torch.float32
