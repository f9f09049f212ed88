"""Caches that begin where memories stood before, with nothing for attention to see."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from fwpkm.backends.torch import pending
from fwpkm.containers import State
from fwpkm.integrations.transformers.cache import MemoryCache, with_states
from fwpkm.integrations.transformers.model import MemoryLayer, decoder_of
from fwpkm.integrations.transformers.settings import Settings, has_memory, name_of
from fwpkm.validation import dtype_name


def cache_from_states(model: Any, states: Mapping[str, State[Tensor]]) -> MemoryCache:
    """A cache for ``generate`` in which attention has seen nothing, and the memories go on from ``states``.

    A prompt is then read as the first text of a conversation by attention, at positions from 0 on, and as what follows
    by the memories, whose pending tokens are still to be written. ``generate`` repeats the rows for beams and for
    several answers, as it repeats those of the prompt.

    Args:
        model: a model with memory, or peft's around one.
        states: one of B rows for each memory, by the names of :meth:`MemoryCache.named_states`; they are copied. What
            does not show in a state, ``fwpkm.load_states`` tells (another configuration of the same shapes), or
            ``unpack`` (another initial memory too).

    Returns:
        A cache of B rows.

    Raises:
        ValueError: a model without memories; a state is missing, of another configuration, dtype or device than its
            memory, or has other rows than the others.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    decoder = decoder_of(model)
    if not has_memory(model):
        raise ValueError(
            f"model must have memories, as insert_memory puts them there. Received: a {type(model).__name__} without"
        )
    memories = {name_of(i): decoder.get_submodule(name_of(i)) for i in Settings.of(model.config).layers}
    _check(memories, states)
    cache = with_states(DynamicCache(config=decoder.config), decoder)
    for its, (name, memory) in zip(cache.states, memories.items()):
        its.begin(memory, states[name])
    return cache


def _check(memories: dict[str, MemoryLayer], states: Any) -> None:
    """Raise unless there is a state for each memory, all of the same rows."""
    if not isinstance(states, Mapping) or states.keys() != memories.keys():
        received = ", ".join(map(str, states)) or "none" if isinstance(states, Mapping) else type(states).__name__
        raise ValueError(
            f"states must hold a state for each memory of the model, by name: {', '.join(memories)}. "
            f"Received: {received}"
        )
    rows = {name: _check_one(name, memory, states[name]) for name, memory in memories.items()}
    if len(set(rows.values())) > 1:
        received = ", ".join(f"{name} of {count} rows" for name, count in rows.items())
        raise ValueError(f"states must be of one batch, each of the same rows. Received: {received}")
    positions = {name: states[name].position.tolist() for name in memories}
    if len(set(map(tuple, positions.values()))) > 1:
        received = ", ".join(f"{name} at {position}" for name, position in positions.items())
        raise ValueError(f"states must be of one reading, each row at one position. Received: {received}")


def _check_one(name: str, memory: MemoryLayer, state: Any) -> int:
    """The rows of a state, once it fits the memory."""
    try:
        count = len(pending(memory.config, state))
    except ValueError as error:
        raise ValueError(f"states[{name!r}]: {error}") from error
    table, received = memory.memory.values, state.memory.values
    if received.dtype != table.dtype:
        raise ValueError(
            f"states[{name!r}] must have tables of the memory's dtype, {dtype_name(table)}: load the model in the "
            f"dtype that the states were read in. Received: {dtype_name(received)}"
        )
    where = {x.device for name, x in state.arrays().items() if name != "position"}
    if not table.is_meta and where != {table.device}:  # one that accelerate has taken away comes with the call
        raise ValueError(
            f"states[{name!r}] must lie where its memory lies, on {table.device}: move it with to_device of "
            f"fwpkm.backends.torch. Received: {', '.join(sorted(map(str, where)))}"
        )
    return count
