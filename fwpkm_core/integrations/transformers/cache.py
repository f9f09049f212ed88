"""A dynamic cache of transformers that also holds the states of memory layers."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fwpkm.containers import State
from fwpkm.integrations.transformers.settings import Settings, name_of
from fwpkm.integrations.transformers.states import MemoryStates, check_negative


class MemoryCache(DynamicCache):
    """A ``DynamicCache`` whose last layers are the states of the model's memories.

    Models with memory make it themselves, and turn an empty ``DynamicCache`` that they are given into one.

    Attributes:
        ended: ``[B]`` bool while ``generate`` draws tokens: rows that have met the end, and are fed padding from then
            on; else None.
    """

    ended: Tensor | None = None

    @property
    def states(self) -> list[MemoryStates]:
        """Those of the memories, in the order of the decoder layers before which they stand."""
        return [layer for layer in self.layers if isinstance(layer, MemoryStates)]

    def states_of(self, layer_idx: int) -> MemoryStates:
        """Those of the memory before one decoder layer."""
        return next(states for states in self.states if states.layer_idx == layer_idx)

    def named_states(self) -> dict[str, State[Tensor]]:
        """Copies of where the memories stand, by name, as ``fwpkm.save_states`` takes them.

        ``generate`` does not read the last token that it draws: put it before the next prompt.

        Returns:
            A state of all rows for each memory; ``model.base_model.get_submodule(name)`` is its layer.
            :func:`cache_from_states` goes on from them.

        Raises:
            ValueError: nothing was read yet.
        """
        found = {name_of(states.layer_idx): states.state for states in self.states}
        begun = {name: state for name, state in found.items() if state is not None}
        if len(begun) < len(found):
            raise ValueError(
                "cache holds no states yet: memories begin when tokens are read. "
                "Received: a cache before its first call"
            )
        return begun

    @property
    def seen(self) -> Tensor | None:
        """Which tokens the memories have read, ``[B, tokens]`` bool on the CPU, False for padding; None for all."""
        rows = self.states[0].rows
        return None if rows is None else rows.seen

    def check_seen(self, mask: Tensor | None) -> None:
        """Raise unless a mask of the cache's tokens is the one under which the memories have read them.

        Attention can hide or show old tokens at any time; what a memory has written stays written.

        Args:
            mask: ``[B, tokens]`` bool on the CPU; None for True.

        Raises:
            ValueError: it hides tokens that the memories have read, or shows such that they have not.
        """
        seen = self.seen
        if seen is None and mask is None:
            return
        shown = torch.ones_like(seen) if mask is None and seen is not None else mask
        assert shown is not None
        wrong = ~shown if seen is None else shown != seen
        if not wrong.any():
            return
        row = int(wrong.any(1).nonzero()[0])
        first = int(wrong[row].nonzero()[0])
        hidden = bool(~shown[row, first])
        count = int((wrong[row] & (shown[row] != hidden)).sum())
        did = "have read" if hidden else "have not read, because an earlier mask hid them or the row had ended"
        raise ValueError(
            f"attention_mask {'hides' if hidden else 'shows'} {count} tokens of row {row}, from column {first} on, "
            f"which the memories {did}: pass the mask under which the cache was filled (cache.seen), followed by that "
            "of the new tokens, or begin with an empty cache"
        )

    def reset(self) -> None:
        """Forget every sequence, of attention and of the memories: the next call begins as the model begins."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # older transformers fill them with zeros, which later calls attend to
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back from attention and memory.

        Raises:
            ValueError: a positive number.
            RuntimeError: a memory has not recorded that much; nothing was changed.
        """
        check_negative(tokens_to_remove)
        for states in self.states:
            if states.rows is not None:
                states.rows.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)


def with_states(cache: Any, decoder: Any, batch: int | None = None) -> MemoryCache:
    """The same cache, which holds states of the decoder's memories; of so many rows, if told.

    Raises:
        ValueError: another kind of cache, one of another model or of other rows, or one that has read tokens without
            memory.
    """
    settings = Settings.of(decoder.config)
    if not isinstance(cache, MemoryCache):
        _check_empty(cache)
        while len(cache.layers) < decoder.config.num_hidden_layers:  # made without a config, it would grow by itself
            cache.layers.append(cache.layer_class_to_replicate())
        recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
        for layer_idx in settings.layers:
            states = MemoryStates(layer_idx, settings.config, settings.undo)
            states.record_past = recording
            cache.layers.append(states)
        cache.__class__ = MemoryCache  # the caller's own object must carry the states
    _check_fits(cache, settings, batch)
    return cache


def _check_empty(cache: Any) -> None:
    """Raise unless this is a ``DynamicCache`` that has read nothing."""
    if type(cache) is not DynamicCache:
        raise ValueError(
            "cache must be a DynamicCache: a model with memory serves no static, quantized, paged or encoder-decoder "
            f"cache (leave cache_implementation out). Received: {type(cache).__name__}"
        )
    if cache.get_seq_length() > 0:
        raise ValueError(
            f"cache holds {cache.get_seq_length()} tokens that were read without this model's memory, so what they "
            "wrote is missing. Pass an empty cache, or one that this model has filled (peft's prefix tuning makes one "
            "of its own: take LoRA)"
        )


def _check_fits(cache: MemoryCache, settings: Settings, batch: int | None) -> None:
    """Raise unless the states are of such memories, of the tokens that attention holds, and of the call's rows."""
    wanted = [(layer_idx, settings.config) for layer_idx in settings.layers]
    received = [(states.layer_idx, states.config) for states in cache.states]
    if received != wanted:
        raise ValueError(
            f"cache must hold the states of this model's memories, before decoder layers {list(settings.layers)}. "
            f"Received: one of another model, with memories before {[layer_idx for layer_idx, _ in received]}"
        )
    length = cache.get_seq_length()
    for states in cache.states:
        if states.columns != length:
            raise ValueError(
                f"cache holds {length} tokens of attention and {states.columns} of the memory before decoder layer "
                f"{states.layer_idx}: something changed one of them alone, or a call failed midway. Begin with an "
                "empty cache"
            )
        if batch is not None and states.rows is not None and len(states.rows) != batch:
            raise ValueError(
                "cache must be of the rows of the call: begin with an empty one, or change its rows by "
                "batch_select_indices and batch_repeat_interleave. "
                f"Received: a cache of {len(states.rows)} rows, a call of {batch}"
            )


def cache_in(inputs: dict[str, Any]) -> Cache | None:
    """The cache among a call's arguments, under its name of today or of before."""
    cache = inputs.get("cache")
    return inputs.get("past_key_values") if cache is None else cache
