"""The kernels as operators of torch, which torch.compile keeps in its graph (SPEC.md §8).

``fwpkm::apply`` reads rows at position 0, and is functional: it clones the table once, or lays what it writes over it
and returns no tables, and what it returns shares no memory; left_aligned.py makes any call one of such rows.
``fwpkm::decode`` overwrites the state and has no gradient.
Operators take and return flat lists: those of the NamedTuples here (flat.py).
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm import schedule, validation
from fwpkm.backends.torch import fast
from fwpkm.backends.torch.flat import flat, flatten, leaf_names, schema, unflatten
from fwpkm.backends.torch.rows import own_uses
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.tokens import NUMBERS, Tokens

unpacked = functools.lru_cache(FwPKMConfig.from_json)
"""A configuration from an operator's argument."""


@flat
class _Apply(NamedTuple):
    """What ``fwpkm::apply`` takes; ``_taken`` says what it returns."""

    config: str
    memory: Memory
    pair: Tensor | None
    tokens: Tokens
    dtype: torch.dtype
    """Of the output."""
    update: bool
    save: bool
    uses: Tensor | None
    """Before the call."""
    overlaid: bool
    """Whether the value table is one for all memories, and none are returned."""


@flat
class _Backward(NamedTuple):
    """What ``fwpkm::apply_backward`` takes; it returns ``_Gradients``."""

    config: str
    tokens: Tokens
    residuals: Tensor
    d_output: Tensor | None
    d_memory: Memory
    update: bool
    table: bool
    """Whether the gradient of the value table is asked for."""
    initial: Tensor | None
    """The value table of an overlaid call."""


@flat
class _Gradients(NamedTuple):
    """Of what ``fwpkm::apply`` took; empty where none was asked for, or where it took nothing."""

    memory: Memory
    tokens: Tokens


@flat
class _Decode(NamedTuple):
    """What ``fwpkm::decode`` takes."""

    config: str
    state: State
    tokens: Tokens


def run(
    cfg: FwPKMConfig, memory: Memory, uses: Tensor | None, stream: Tokens, pair: Tensor | None, update: bool,
    columns: int, dtype: torch.dtype, initial: Tensor | None = None,
) -> fast.Done:  # fmt: skip
    """``fast.run`` of rows at position 0, as one operator."""
    overlaid = initial is not None
    memory = memory._replace(values=initial) if overlaid else memory
    leaves = (*memory, *stream)
    save = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in leaves])
    arguments = _Apply(cfg.to_json(), memory, pair, stream, dtype, update, save, uses, overlaid)
    results, (after, *_) = _taken(torch.ops.fwpkm.apply(*flatten(arguments)))
    if overlaid or not len(results.memorization):
        results = results._replace(keys=None, values=None)
    return fast.done_with(results, memory, columns, uses if uses is None or not len(results.memorization) else after)


def _taken(output: list[Tensor]) -> tuple[fast.Results, list[Tensor]]:
    """What ``fwpkm::apply`` returns: the results; then the uses, and the residuals that a backward needs."""
    leaves = iter(output)
    return unflatten(fast.Results, leaves), [*leaves]


def _plan(cfg: FwPKMConfig, query: Tensor, update: bool) -> Any:
    from fwpkm.kernels.runtime import windows

    return windows.plan(cfg, 0, query.shape[1], query.shape[0], update)


def _residuals_of(cfg: FwPKMConfig, query: Tensor, update: bool, overlaid: bool) -> tuple:
    """What the layout of a call's residuals follows from; of a query that is traced, symbols."""
    from fwpkm.kernels.runtime import windows

    batch, length = query.shape[:2]
    memories = validation.memories_for(cfg, batch)
    return cfg, windows.bounds(cfg, length, batch, memories, update), memories, batch, True, True, overlaid


@torch.library.custom_op("fwpkm::apply", mutates_args=(), schema=f"({schema(_Apply)}) -> Tensor[]")
def _apply(*arguments: Any) -> list[Tensor]:
    config, memory, pair, tokens, dtype, update, save, uses, overlaid = unflatten(_Apply, arguments)
    cfg, query = unpacked(config), tokens.query
    settings = fast.Settings(cfg, _plan(cfg, query, update), False, dtype, None, overlaid)
    _, most, *_ = _residuals_of(cfg, query, update, overlaid)
    tables, stream = fast.as_tables(memory), tokens.map(fast.plain)
    uses = own_uses(uses, torch.float32, False) if settings.plan.num_writes else None
    result, written = fast.forward(settings, *tables, stream, fast.plain(pair), save, uses, most)
    results = fast.results_of(result, written)
    results = results._replace(flags=results.flags.clone())  # which lie in the residuals' buffer
    after = query.new_empty(0) if uses is None else uses
    return [*present(query, results), after, *([result.residuals.buffer] if save else [])]


def present(query: Tensor, results: tuple) -> list[Tensor]:
    """The leaves of what an operator returns, empty where there is none."""
    return [query.new_empty(0) if x is None else x for x in flatten(results)]


@_apply.register_fake
def _(*arguments: Any) -> list[Tensor]:
    from fwpkm import kernels
    from fwpkm.kernels.runtime import layouts

    config, memory, _, tokens, dtype, update, save, uses, overlaid = unflatten(_Apply, arguments)
    cfg, query = unpacked(config), tokens.query
    reason = kernels.why_unsupported(cfg, memory, query)
    if reason is not None:
        raise ValueError(f"the kernels cannot serve this call: {reason}")
    (batch, length), memories, entries = query.shape[:2], memory.keys.shape[0], cfg.slots_per_token
    new = functools.partial(torch.empty, device=query.device, dtype=torch.float32)
    writes = schedule.written(cfg, length) if update else 0
    tables = Memory(query.new_empty(0), query.new_empty(0))
    if writes and not overlaid:
        tables = Memory(*(new(x.shape) for x in memory))
    layout = layouts.layout_of_residuals(*_residuals_of(cfg, query, update, overlaid))
    results = fast.Results(
        output=new(batch, length, cfg.value_dim, dtype=dtype), **tables._asdict(),
        slots=new(batch, length, entries, dtype=torch.int64), weights=new(batch, length, entries),
        memorization=new(writes, memories), addressing=new(writes, memories),
        flags=new(layout.spec("flags").shape, dtype=torch.int8),
    )  # fmt: skip
    after = new(uses.shape if writes and uses is not None else 0)
    return [*flatten(results), after, *([new(layout.size, dtype=torch.uint8)] if save else [])]


def _set_up(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    taken = unflatten(_Apply, inputs)
    _, (_, *residuals) = _taken(output)
    ctx.set_materialize_grads(False)
    ctx.config, ctx.update = taken.config, taken.update
    initial = taken.memory.values if taken.overlaid else None
    ctx.save_for_backward(*flatten(taken.tokens), next(iter(residuals), None), initial)


def _backward(ctx: Any, d_results: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *tokens, residuals, initial = ctx.saved_tensors
    tokens, d = unflatten(Tokens, tokens), unflatten(fast.Results, d_results)
    written = [x for x in (d.keys, d.values) if x is not None and x.numel()]
    if d.output is None and not written:
        return (None,) * len(ctx.needs_input_grad)
    d_memory = Memory(d.keys, d.values) if written else Memory(None, None)
    table = unflatten(_Apply, ctx.needs_input_grad).memory.values
    arguments = _Backward(ctx.config, tokens, residuals, d.output, d_memory, ctx.update, table, initial)
    found = unflatten(_Gradients, torch.ops.fwpkm.apply_backward(*flatten(arguments)))
    memory = found.memory._replace(values=found.memory.values if table else None)
    asked = {name: getattr(found.tokens, name) for name in NUMBERS if getattr(tokens, name) is not None}
    return tuple(flatten(_Apply(None, memory, None, Tokens(**asked), *[None] * 5)))  # type: ignore[arg-type]


_apply.register_autograd(_backward, setup_context=_set_up)


@torch.library.custom_op("fwpkm::apply_backward", mutates_args=(), schema=f"({schema(_Backward)}) -> Tensor[]")
def _apply_backward(*arguments: Any) -> list[Tensor]:
    from fwpkm.kernels.runtime import call, layouts, workspace

    config, tokens, buffer, d_output, d_memory, update, table, initial = unflatten(_Backward, arguments)
    cfg, query, overlaid = unpacked(config), tokens.query, initial is not None
    residuals = workspace.Workspace(layouts.residuals_layout(*_residuals_of(cfg, query, update, overlaid)), buffer)
    shape = torch.Size(_table_shape(cfg, query, overlaid)) if table else None
    d_output, d_keys, d_values, initial = (fast.plain(x) for x in (d_output, *d_memory, initial))
    plan, stream = _plan(cfg, query, update), tokens.map(fast.plain)
    gradients, memories = (d_output, d_keys, d_values), validation.memories_for(cfg, plan.batch)
    with fast.on_device_of(query):
        found = call.backward(cfg, plan, stream, residuals, memories, *gradients, shape, initial=initial)
    of_tokens = found.tokens._replace(query=found.tokens.query.to(query.dtype))
    # What lies in a buffer with more is no result of an operator.
    return present(query, _Gradients(Memory(found.keys.clone(), found.values), of_tokens))


def _table_shape(cfg: FwPKMConfig, query: Tensor, overlaid: bool) -> tuple:
    """Of the value table that a call takes."""
    return 1 if overlaid else validation.memories_for(cfg, query.shape[0]), cfg.num_slots, cfg.value_dim


@_apply_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    config, tokens, _, _, _, _, table, initial = unflatten(_Backward, arguments)
    cfg, query = unpacked(config), tokens.query
    memories = validation.memories_for(cfg, query.shape[0])
    new = functools.partial(torch.empty, device=query.device, dtype=torch.float32)
    keys = new(memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2)
    values = new(_table_shape(cfg, query, initial is not None)) if table else None
    of_tokens = tokens._replace(mask=None).map(torch.empty_like)
    return present(query, _Gradients(Memory(keys, values), of_tokens))


@torch.library.custom_op(
    "fwpkm::decode",
    mutates_args=[f"state_{name}" for name in leaf_names(State)],
    schema=f"({schema(_Decode, mutated='state')}) -> Tensor",
)
def _decode(*arguments: Any) -> Tensor:
    from fwpkm.kernels.runtime import decoding

    config, state, tokens = unflatten(_Decode, arguments)
    with fast.on_device_of(tokens.query):
        return decoding.decode(unpacked(config), state, tokens)


@_decode.register_fake
def _(*arguments: Any) -> Tensor:
    config, state, tokens = unflatten(_Decode, arguments)
    cfg = unpacked(config)
    validation.check_apply(cfg, state, tokens, None, True, SELF)
    fast.check_decoding(state, tokens.query)
    return tokens.query.new_empty(*tokens.query.shape[:2], cfg.value_dim)


def decode(cfg: FwPKMConfig, state: State, tokens: Tokens) -> Tensor:
    """``ops.decode`` on the kernels."""
    return torch.ops.fwpkm.decode(*flatten(_Decode(cfg.to_json(), state, tokens.map(fast.plain))))
