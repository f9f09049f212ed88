"""The states of one memory layer inside a cache of transformers, beside the keys and values of attention."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from fwpkm.backends.torch import FwPKM
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State
from fwpkm.integrations.transformers.rows import Rows

DRAFT = 20
"""Tokens of a draft in assisted decoding, unless ``generate`` expects longer ones."""


class MemoryStates(LinearAttentionCacheLayerMixin):
    """The half-read sequences of one memory layer, as a layer of a cache.

    While the past is recorded, each write keeps the rows that it replaces, so that :meth:`crop` can take tokens back
    across a chunk's end.

    Args:
        layer_idx: the decoder layer before which the memory stands.
        config: the memory's configuration.
        undo: how many chunks of a row :meth:`crop` can take back; None for ceil((draft + 1) / chunk_size).
    """

    is_compileable = False
    is_croppable = True
    keys = values = None  # what iterating over a cache asks of every layer

    def __init__(self, layer_idx: int, config: FwPKMConfig, undo: int | None = None):
        """States of no sequence yet."""
        super().__init__()
        self.layer_idx, self.config, self.undo, self.draft = layer_idx, config, undo, DRAFT
        self.rows: Rows | None = None
        self._layer: weakref.ref[FwPKM] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the layer: a copy or pickle goes on with the one that reads it next."""
        return {**self.__dict__, "_layer": None}

    @property
    def columns(self) -> int:
        """The tokens that were read of each row, padding among them."""
        return 0 if self.rows is None else self.rows.columns

    @property
    def state(self) -> State[Tensor] | None:
        """A copy of where the sequences stand, for ``fwpkm.save_state`` and the other functions; None before a call."""
        return None if self.rows is None else self.rows.state().detach().clone()

    def begin(self, layer: FwPKM, state: State[Tensor]) -> None:
        """Let the next call go on from a state of the layer, which stays as it is."""
        state = state.clone()
        self.rows = Rows(layer.config, state._replace(position=state.position.cpu()))
        self._layer = weakref.ref(layer)

    def reset(self) -> None:
        """Forget every sequence; the next call begins new ones."""
        self.rows = self._layer = None

    @torch.compiler.disable
    def read(self, layer: FwPKM, x: Tensor, mask: Tensor | None) -> Tensor:
        """Read T more tokens of each row; :func:`~fwpkm.integrations.transformers.cache.with_states` checks rows.

        Args:
            layer: the memory layer.
            x: ``[B, T, hidden_size]``.
            mask: ``[B, T]`` bool on the CPU, False for padding; None for True.

        Returns:
            What the layer adds to x, in its shape.

        Raises:
            ValueError: another model's memory has read before.
        """
        if self._layer is not None and self._layer() is not layer:
            raise ValueError(
                "cache must be one that this model has filled, or an empty one. Received: a cache whose memory before "
                f"decoder layer {self.layer_idx} another model has read"
            )
        self._layer = weakref.ref(layer)
        if self.rows is None:
            self.rows = Rows(layer.config, layer.init_state(1))
            self.batch_repeat_interleave(x.shape[0])
        return self.rows.read(layer, x, mask, self._kept(x.shape[1]) if self.record_past else 0)

    def _kept(self, length: int) -> int:
        """How many writes of a row stay recorded: of a later call all of its own, since it may be a draft alone."""
        chunk = self.config.chunk_size
        undo = -(-(self.draft + 1) // chunk) if self.undo is None else self.undo
        return undo if self.columns == 0 else max(undo, -(-length // chunk))

    def activate_past_recording(self) -> None:
        """From now on keep what writes replace."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens of every row back.

        Raises:
            ValueError: a positive number.
            RuntimeError: it reaches back beyond what is recorded; nothing was changed.
        """
        check_negative(tokens_to_remove)
        if self.rows is not None and tokens_to_remove:
            self.rows.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from row beam_idx[i]; no table is copied before a chunk is written."""
        if self.rows is not None:
            self.rows.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.rows is not None:
            self.rows.select(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows: integers, or a bool for each."""
        if self.rows is not None:
            self.rows.select(torch.arange(len(self.rows))[indices.cpu()])

    # What a cache asks of layers with keys and values, or with convolutions

    def offload(self) -> None:
        """Tables stay where they are."""

    def prefetch(self) -> None:
        """Tables stay where they are."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """States begin when tokens are read."""

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """There is none: :meth:`read` is the one way in."""
        raise NotImplementedError("a memory layer has no convolution")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """There is none that a caller could give: :meth:`read` is the one way in."""
        raise NotImplementedError("a memory's state is written by reading tokens")


def check_negative(tokens_to_remove: int) -> None:
    """Raise for a positive number: until transformers 5.18 it was the length to keep."""
    if tokens_to_remove > 0:
        raise ValueError(
            f"crop takes the number of tokens to remove as a negative integer. Received: {tokens_to_remove}"
        )
