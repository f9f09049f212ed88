"""What a model's config remembers of its memories."""

import dataclasses
from typing import Any, Self

from fwpkm.config import FwPKMConfig

ATTRIBUTE = "fwpkm_memory"
"""The attribute of a model's config, and the key of its config.json."""
NAME = "fwpkm"
"""The submodule of a decoder layer: weights are ``model.layers.<i>.fwpkm.*``."""
DEFAULT_LAYERS = (1, 4)
"""Where ``insert_memory`` puts memories unless told."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where the memories stand and what they are; all of a model are alike.

    Attributes:
        layers: the decoder layers before which one stands, in ascending order.
        config: the memory's configuration.
        gated: as in :class:`fwpkm.backends.torch.FwPKM`.
        value_norm: as in :class:`fwpkm.backends.torch.FwPKM`.
        learn_memory: as in :class:`fwpkm.backends.torch.FwPKM`.
        undo: chunks that a cache can take back, or None for as many as a draft reaches over.
    """

    layers: tuple[int, ...]
    config: FwPKMConfig
    gated: bool = True
    value_norm: str | None = "zscore"
    learn_memory: bool = False
    undo: int | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """Those that a model's config remembers."""
        saved = getattr(config, ATTRIBUTE)
        return cls(**{**saved, "layers": tuple(saved["layers"]), "config": FwPKMConfig(**saved["config"])})

    def store(self, config: Any) -> None:
        """Let a model's config remember them, as plain values that JSON takes."""
        setattr(config, ATTRIBUTE, {**dataclasses.asdict(self), "layers": list(self.layers)})

    def check_layers(self, count: int) -> None:
        """Raise unless each of ``layers`` is one of ``count`` decoder layers, and none is named twice."""
        layers = self.layers
        if (
            not layers
            or any(type(i) is not int or not 0 <= i < count for i in layers)
            or len(set(layers)) < len(layers)
        ):
            raise ValueError(
                f"layers must be distinct integers from 0 to {count - 1}, at least one: before these of the model's "
                f"{count} decoder layers a memory is put. Received: layers={layers!r}"
                f"{', the default' if layers == DEFAULT_LAYERS else ''}"
            )


def name_of(layer_idx: int) -> str:
    """What the decoder calls the memory before one of its layers."""
    return f"layers.{layer_idx}.{NAME}"


def has_memory(model: Any) -> bool:
    """Whether the config of a model remembers memories."""
    return getattr(model.config, ATTRIBUTE, None) is not None
