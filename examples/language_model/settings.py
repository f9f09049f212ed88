"""An experiment is one TOML file: the model, what it is trained on, and how."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from examples.language_model import experiments
from fwpkm import FwPKMConfig

MIXERS = ("fwpkm", "attention", "delta", "static")
TRAINED = ("key_dim", "value_dim", "num_heads", "num_subkeys", "chunk_size", "lookahead", "memory_scope", "boundary")
"""Fields of a memory that reading cannot change: tables and the schedule follow from them."""


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(table: str, settings: Any, names: str, holds: Callable[[Any], bool], wanted: str) -> None:
    for name in names.split():
        if not holds(value := getattr(settings, name)):
            raise ValueError(f"{table}.{name} must be {wanted}. Received: {value!r}")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The decoder; tokens are bytes.

    Args:
        width: of the residual stream.
        layers: attention and SwiGLU blocks.
        heads: of attention.
        window: how many tokens attention sees, the present one included.
        hidden: width of SwiGLU.
        memories: before which layers a mixer stands, counted from 0; empty for none.
        mixer: what stands there: "fwpkm", a memory; or, to compare with (baselines.py), "attention" to ``context``
            tokens, "delta", a Gated DeltaNet, or "static", a memory that is trained and never written.
        context: how many tokens the mixer "attention" sees, the present one included.
        gated: whether memories have a gate.
        memory: fields of FwPKMConfig that differ from its defaults; key_dim and value_dim are ``width`` if absent.
        reading: those that are others once the model is trained.
    """

    width: int = 256
    layers: int = 6
    heads: int = 4
    window: int = 256
    hidden: int = 768
    memories: tuple[int, ...] = ()
    mixer: str = "fwpkm"
    context: int = 4096
    gated: bool = True
    memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reading: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what the modules would not."""
        names = "width layers heads window hidden context"
        _require("model", self, names, lambda x: _integer(x, 1), "an integer of at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width must be a multiple of 2 * heads, for rotary positions. "
                f"Received: width={self.width}, heads={self.heads}"
            )
        _require("model", self, "gated", lambda x: isinstance(x, bool), "true or false")
        listed = isinstance(self.memories, (list, tuple))
        if not listed or not all(_integer(i, 0) and i < self.layers for i in self.memories):
            raise ValueError(
                f"model.memories must be a list of layers from 0 to {self.layers - 1}. Received: {self.memories!r}"
            )
        object.__setattr__(self, "memories", tuple(self.memories))
        if len(set(self.memories)) < len(self.memories):
            raise ValueError(f"model.memories must differ. Received: {self.memories}")
        if self.mixer != "fwpkm" and not self.gated:
            raise ValueError(f'model.gated must be true with mixer = "{self.mixer}". Received: False')
        _require("model", self, "mixer", lambda x: x in MIXERS, f"one of {MIXERS}")
        if self.mixer != "fwpkm" and not self.memories:
            raise ValueError(f'model.mixer must be "fwpkm" where model.memories is empty. Received: {self.mixer!r}')
        if not isinstance(self.memory, Mapping):
            raise ValueError(f"model.memory must be a table of FwPKMConfig's fields. Received: {self.memory!r}")
        if self.mixer in ("attention", "delta") and self.memory:
            raise ValueError(f'model.memory must be empty with mixer = "{self.mixer}". Received: {self.memory!r}')
        if self.memory_config().boundary != "drop":
            # Under "wait" the last chunk of a step would be pending, and the next step would not write it.
            raise ValueError(f'model.memory.boundary must be "drop". Received: {self.memory["boundary"]!r}')
        if not isinstance(self.reading, Mapping):
            raise ValueError(f"model.reading must be a table of FwPKMConfig's fields. Received: {self.reading!r}")
        if fixed := sorted(set(self.reading) & set(TRAINED)):
            raise ValueError(f"model.reading cannot change {fixed}: the model is trained with them")
        if self.reading and not self.writes:
            raise ValueError(f"model.reading must be empty where no memory is written. Received: {self.reading!r}")
        try:
            self.memory_config(**self.reading)
        except ValueError as error:
            raise ValueError(str(error).replace("model.memory", "model.reading", 1)) from error

    @property
    def writes(self) -> bool:
        """Whether there are memories that are written."""
        return bool(self.memories) and self.mixer == "fwpkm"

    @property
    def carries(self) -> bool:
        """Whether anything goes on from text to text: memories, or a delta rule's state."""
        return self.writes or self.mixer == "delta"

    @property
    def beyond(self) -> int:
        """Bytes back from which the layers' windows bring nothing, and memories have written everything."""
        return max(self.layers * (self.window - 1), self.memory_config().chunk_size) + 64

    def memory_config(self, **fields: Any) -> FwPKMConfig:
        """The configuration of every memory; ``fields`` override it."""
        given = {"key_dim": self.width, "value_dim": self.width, **self.memory, **fields}
        names = {field.name for field in dataclasses.fields(FwPKMConfig)}
        if unknown := sorted(set(given) - names):
            raise ValueError(f"model.memory has fields that FwPKMConfig lacks: {unknown}. It has {sorted(names)}")
        try:
            return FwPKMConfig(**given)
        except ValueError as error:
            raise ValueError(f"model.memory.{error}") from error


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How it is trained.

    Args:
        steps: optimizer steps.
        batch: sequences a step.
        length: tokens of a sequence, a multiple of the memory's chunk.
        learning_rate: the highest, of AdamW.
        warmup: steps over which it rises to that.
        decay: share of the steps, at the end, over which it falls to 0.
        weight_decay: of matrices.
        clip: bound on the norm of the gradient.
        facts: share of the tokens that state facts (facts.py).
        asked_weight: how often the digits of a fact that is asked for count in the loss; other bytes count once.
        span: for how many steps a row reads on in one document, with memories of its own that go on from step to step;
            then it begins elsewhere, with the initial memories.
        gap: bytes from a statement of a fact to its question, at least; with memories more than a chunk.
        crowd: how many times as many facts one row in four states.
        reread: every so many steps, a step reads what the step before it read, its memories going on; 0 for never.
        hold_after: for so many steps a row begins with the mean of all rows' keys, then those stand still, in training
            and in reading, as with ``addressing_weight = 0``; 0 for rows that begin with the drawn keys, which always
            move.
        seed: of weights, tables and data.
    """

    steps: int = 10_000
    batch: int = 16
    length: int = 4096
    learning_rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.4
    weight_decay: float = 0.1
    clip: float = 1.0
    facts: float = 0.1
    asked_weight: float = 1.0
    span: int = 32
    gap: int = 520
    crowd: int = 1
    reread: int = 0
    hold_after: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        require = functools.partial(_require, "training", self)
        require("steps batch length span crowd", lambda x: _integer(x, 1), "an integer of at least 1")
        require("warmup seed gap hold_after", lambda x: _integer(x, 0), "an integer of at least 0")
        require("reread", lambda x: _integer(x, 0) and x != 1, "0, or an integer of at least 2")
        require("hold_after", lambda x: x <= self.steps, f"at most training.steps, {self.steps}")
        require("span seed gap", lambda x: x < 2**31, "less than 2^31")
        require("facts decay", lambda x: _number(x) and 0 <= x <= 1, "a share from 0 to 1")
        require("learning_rate clip asked_weight", lambda x: _number(x) and x > 0, "a number above 0")
        require("weight_decay", lambda x: _number(x) and x >= 0, "a number of at least 0")

    def content(self, step: int) -> tuple[int, bool]:
        """Which batch a step reads, counted from 0, and whether the step before read it already."""
        again = bool(self.reread) and (step + 1) % self.reread == 0
        return step - ((step + 1) // self.reread if self.reread else 0), again

    def holds(self, step: int) -> bool:
        """Whether keys stand still after so many steps."""
        return 0 < self.hold_after <= step

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: up, level, and down to 0."""
        rising = (step + 1) / max(1, self.warmup)
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, rising, falling)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model and its training."""

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        """Chunks end where sequences do, so that no token is pending between steps; and facts are written in time."""
        chunk = self.model.memory_config().chunk_size
        if self.model.writes and self.training.facts and self.training.gap <= chunk:
            raise ValueError(
                f"training.gap must be more than model.memory.chunk_size, or a fact would be stated again before it is "
                f"written. Received: gap={self.training.gap}, chunk_size={chunk}"
            )
        if self.training.hold_after and not self.model.writes:
            raise ValueError(
                f"training.hold_after must be 0 where no memory is written. Received: {self.training.hold_after}"
            )
        if self.training.hold_after and self.model.memory_config(**self.model.reading).weight_decay:
            raise ValueError(
                "training.hold_after wants model.memory.weight_decay = 0: decay moves keys that shall stand still"
            )
        if self.model.writes and self.training.length % chunk:
            raise ValueError(
                f"training.length must be a multiple of model.memory.chunk_size. "
                f"Received: length={self.training.length}, chunk_size={chunk}"
            )

    @classmethod
    def of(cls, tables: Mapping[str, Any], source: str) -> Self:
        """From the tables of a TOML or JSON file.

        Raises:
            ValueError: a table or field is unknown, or breaks its rule; names the source.
        """
        kinds: dict[str, Any] = {"model": ModelSettings, "training": TrainingSettings}
        if not isinstance(tables, Mapping):
            raise ValueError(f"{source}: an experiment has the tables [model] and [training]. Received: {tables!r}")
        if unknown := sorted(set(tables) - set(kinds)):
            raise ValueError(f"{source}: unknown tables {unknown}; an experiment has [model] and [training]")
        parts = {}
        for name, kind in kinds.items():
            fields, known = tables.get(name, {}), {field.name for field in dataclasses.fields(kind)}
            if not isinstance(fields, Mapping):
                raise ValueError(f"{source}: [{name}] must be a table. Received: {fields!r}")
            if unknown := sorted(set(fields) - known):
                raise ValueError(f"{source}: unknown fields {unknown} of [{name}]; it has {sorted(known)}")
            try:
                parts[name] = kind(**fields)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
        try:
            return cls(**parts)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def read(cls, path: Path, **training: Any) -> Self:
        """From a TOML file or a list of experiments (experiments.py); ``training`` overrides fields of that table.

        Raises:
            ValueError: not TOML, not in the list, or as in ``of``.
            FileNotFoundError: there is no such file.
        """
        tables = experiments.tables(path)
        if isinstance(given := tables.get("training", {}), Mapping):
            tables["training"] = {**given, **training}
        return cls.of(tables, str(path))

    def tables(self) -> dict[str, Any]:
        """What ``of`` takes, ready for JSON."""
        tables = dataclasses.asdict(self)
        for name in ("memory", "reading"):
            tables["model"][name] = dict(getattr(self.model, name))
        return tables
