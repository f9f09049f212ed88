"""Snapshots: what the memories hold after each text is kept apart, and a text reads the snapshot that fits it best.

An experiment outside of State. A snapshot is what ``pack`` keeps: the rows that differ from the initial memory's, and
the keys. How well it fits is told by its keys: the mean score of the sub-key that is nearest to each query of a text.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.language_model.by_position import BIN
from examples.language_model.model import LanguageModel, Reading
from examples.language_model.training import autocast
from fwpkm import PackedState, State
from fwpkm.backends.torch import FwPKM, pack, select, unpack


class Snapshots:
    """Of the memories of B sequences.

    Args:
        model: whose memories they are.
    """

    def __init__(self, model: LanguageModel):
        """None are kept yet."""
        self._model, self._layers = model, list(model.memories.values())
        self._kept: list[list[list[PackedState]]] = []  # of each snapshot, memory and sequence

    def keep(self, reading: Reading) -> None:
        """Keep the memories as they stand."""
        self._kept.append([_rows(layer, state) for layer, state in zip(self._layers, reading.memories)])

    @torch.no_grad()
    def best(self, text: Tensor) -> Reading:
        """Where sequences begin that read, each, the snapshot whose keys match its text best.

        Args:
            text: ``[B, T]``, of which the first ``BIN`` bytes are compared.
        """
        text = text[:, :BIN].long()
        fits = torch.stack([self._fit(self._reading([i] * len(text)), text) for i in range(len(self._kept))])
        return self._reading(fits.argmax(0).tolist())

    def _reading(self, chosen: list[int]) -> Reading:
        """A beginning with the snapshot ``chosen`` [B] for each sequence."""
        own = [[self._kept[i][at][row] for row, i in enumerate(chosen)] for at in range(len(self._layers))]
        memories = (unpack(layer.config, packed, layer.memory()) for layer, packed in zip(self._layers, own))
        nothing = self._model.embedding.weight.new_zeros(2, len(chosen), 0, self._model.settings.width)
        return Reading(tuple(memories), (nothing,) * len(self._model.blocks))

    def _fit(self, reading: Reading, text: Tensor) -> Tensor:
        """``[B]``: how well the keys of all memories match the queries of texts that read them."""
        found: list[Tensor] = []

        def listens(state: State) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda layer, inputs: found.append(key_match(layer, state, inputs[0]))

        hooks = [
            layer.register_forward_pre_hook(listens(state)) for layer, state in zip(self._layers, reading.memories)
        ]
        try:
            with autocast(text.device):
                self._model(text, reading, update=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found).sum(0)


def _rows(layer: FwPKM, state: State) -> list[PackedState]:
    """Each row of a state, packed."""
    return [pack(layer.config, select(layer.config, state, [b]), layer.memory()) for b in range(len(state.position))]


def key_match(layer: FwPKM, state: State, x: Tensor) -> Tensor:
    """The mean score of the sub-key that is nearest to each query of ``x`` [B, T, width], over codebooks ``[B]``."""
    cfg, keys = layer.config, state.memory.keys
    query = layer.query_proj(layer.query_norm(x)).to(keys.dtype)
    query = query.view(*x.shape[:2], cfg.num_heads, 2, -1).permute(0, 2, 3, 1, 4)
    match cfg.score:
        case "idw":
            distance = torch.cdist(query, keys, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
            scores = -torch.log(cfg.score_eps + distance.square())
        case "dot_product":
            scores = (query @ keys.mT).amax(-1)
        case unknown:
            raise ValueError(f"no score is called {unknown!r}")
    return scores.mean((1, 2, 3))
