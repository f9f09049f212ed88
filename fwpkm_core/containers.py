"""The values that pass between a caller and a backend (SPEC.md §5 and §8): NamedTuples of native arrays.

To type checkers ``State[torch.Tensor]`` and ``State[jax.Array]`` are states of one framework.
"""

from collections.abc import Callable
from types import GenericAlias
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from fwpkm.config import FwPKMConfig
from fwpkm.tokens import TOKEN_FIELDS, Array, ArraySpec, Tokens, token_specs

A = TypeVar("A")
"""The type of one framework's arrays."""
Rows = TypeVar("Rows")
"""The type of a number of rows: int, None where it is unknown, or a framework's array."""
if TYPE_CHECKING:
    from typing import Generic
else:

    class Generic:
        """typing's, for type checkers alone: to torch 2.6 a NamedTuple with a second base is no pytree."""

        def __class_getitem__(cls, _):  # noqa: D105
            return cls()

        def __mro_entries__(self, _):  # noqa: D105
            return ()


def _subscriptable(container: Any) -> None:
    """Let annotations that are evaluated name the type of the arrays."""
    container.__class_getitem__ = classmethod(GenericAlias)


class Memory(NamedTuple, Generic[A]):
    """The tables. float32, or float64 when queries and tables both are."""

    keys: A
    """``[M, H, 2, S, Dk/2]``: two codebooks of S sub-keys for each head."""
    values: A
    """``[M, N, Dv]``: one row for each of the N = S·S slots."""


_subscriptable(Memory)


class State(NamedTuple, Generic[A]):
    """B half-read sequences: their tables and pending tokens, P = C + L - 1 at most (SPEC.md §5)."""

    memory: Memory[A]
    pending_query: A
    """``[B, P, H*Dk]``"""
    pending_value: A
    """``[B, P, Dv]``"""
    pending_gate: A
    """``[B, P]``"""
    pending_mask: A
    """``[B, P]`` bool"""
    pending_forget: A
    """``[B, P]``"""
    position: A
    """``[B]`` int32: the tokens that each row has read since it began, was reset or flushed; equal in batch scope."""
    uses: A | tuple[()] = ()
    """``[M, N]`` in the tables' dtype: how often the chunks written since a row began or was reset have selected each
    slot (SPEC.md §4); ``()`` where ``usage_weight`` is 0, no leaf to any framework, as None would be.

    With ``recent_penalty`` V [H, 2, S] of the sub-keys lies behind U, or alone: ``[M, cfg.counts]``.
    """

    @classmethod
    def of(cls, memory: Memory, pending: Tokens, position: Array, uses: Array | None = None) -> Self:
        """A state of these parts; ``pending`` [B, P, ...]."""
        tokens = {f"pending_{name}": x for name, x in pending._asdict().items()}
        return cls(memory, position=position, uses=() if uses is None else uses, **tokens)

    @property
    def pending(self) -> Tokens:
        """The pending fields as tokens ``[B, P, ...]``; valid entries come first, the rest are zero."""
        return Tokens(**{field.name: getattr(self, f"pending_{field.name}") for field in TOKEN_FIELDS})

    @property
    def maybe_uses(self) -> A | None:
        """``uses``; None where there are none, be that ``()`` or, in a state that was built by hand, None itself."""
        return None if isinstance(self.uses, tuple) and not self.uses else self.uses

    def replace_pending(self, pending: Tokens) -> Self:
        """The state with other pending tokens ``[B, P, ...]``."""
        return self.of(self.memory, pending, self.position, self.maybe_uses)

    def arrays(self) -> dict[str, Array]:
        """The arrays that are there by the names that files give them; those of the memory are "memory.keys" and so on.

        Of a state of specs, the specs.
        """
        fields = self._asdict() | {"uses": self.maybe_uses}
        memory = fields.pop("memory")
        there = {name: x for name, x in fields.items() if x is not None}
        return {f"memory.{name}": x for name, x in memory._asdict().items()} | there

    def map(self, function: Callable[..., Array], *others: Self) -> Self:
        """A state whose every array is ``function`` of it, and of the same array of ``others``."""
        memory = Memory(*map(function, self.memory, *(x.memory for x in others)))
        pending = Tokens(*map(function, self.pending, *(x.pending for x in others)))
        uses = self.maybe_uses
        uses = None if uses is None else function(uses, *(x.uses for x in others))
        return self.of(memory, pending, function(self.position, *(x.position for x in others)), uses)

    def detach(self) -> Self:
        """The state without its gradient history: truncated backpropagation between calls."""
        if hasattr(self.position, "detach"):  # torch's, in what torch.compile can trace
            return self.map(lambda x: x.detach())
        return _functions(self).detach(self)

    def clone(self) -> Self:
        """A copy that shares no memory with the state, on the same devices; gradients pass through it."""

        def copy(x: Any) -> Any:
            if hasattr(x, "clone"):  # torch's
                return x.clone()
            return x.copy() if hasattr(x, "copy") else x  # TensorFlow's cannot be overwritten

        return self.map(copy)

    def to(self, *where: Any, **options: Any) -> Self:
        """The state on another device, in torch also in another dtype: ``to_device`` of its framework's backend.

        Args:
            where: torch: a device, a dtype (float32 or float64), or both; JAX: a device or a sharding.
            options: torch: ``device``, ``dtype`` and ``non_blocking``, as ``Tensor.to`` takes them; JAX: ``device``.

        Raises:
            ValueError: no such device or dtype, or a framework that places no states.
        """
        functions = _functions(self)
        if not hasattr(functions, "to_device"):
            raise ValueError(f"a state of {functions.__name__} stays where it is: only torch and JAX place states")
        return functions.to_device(self, *where, **options)


_subscriptable(State)


def _functions(state: State) -> Any:
    """The functions of the framework whose arrays a state holds."""
    from fwpkm.registry import backend_of  # which knows states

    return backend_of(state.memory.values)


class Lookup(NamedTuple):
    """What a query reads (SPEC.md §2). Entries are ordered by head, then by descending sum of sub-scores."""

    output: Array
    """``[B, n, Dv]`` in the query's dtype."""
    slots: Array
    """``[B, n, H*k]`` slot ids in [0, N)."""
    weights: Array
    """``[B, n, H*k]`` in the tables' dtype; each token's sum to 1."""


class Losses(NamedTuple):
    """The two losses of one chunk (SPEC.md §3). A record: no gradient passes through it."""

    memorization: Array
    """``[M]``"""
    addressing: Array
    """``[M]``"""


class Trace(NamedTuple):
    """What a call did. A record: no gradient passes through it."""

    slots: Array
    """``[B, T, H*k]`` slot ids that each token read, 0 for a masked token; packed: ``[1, T, H*k]``."""
    weights: Array
    """``[B, T, H*k]`` their weights, 0 for a masked token, NaN for one with non-finite input or scores."""
    memorization: Array
    """``[M, W]`` loss of each memory's writes in order, W = ceil(T/C); columns past ``writes`` are 0."""
    addressing: Array
    """``[M, W]`` addressing loss of each memory's writes in order; columns past ``writes`` are 0."""
    writes: Array
    """``[M]`` int32: how many chunks each memory completed."""


class LayerTrace(NamedTuple):
    """What a layer's call did, of ``return_trace=True``. A record: no gradient passes through it."""

    slots: Array
    """``[B, T, H*k]`` slot ids that each token read, 0 for a masked token; packed: ``[1, T, H*k]``."""
    weights: Array
    """``[B, T, H*k]`` their weights, 0 for a masked token, NaN for one with non-finite input or scores."""
    memorization: Array
    """``[M, W]`` loss of each memory's writes in order, W = ceil(T/C); columns past ``writes`` are 0."""
    addressing: Array
    """``[M, W]`` addressing loss of each memory's writes in order; columns past ``writes`` are 0."""
    writes: Array
    """``[M]`` int32: how many chunks each memory completed."""
    gate: Array
    """``[B, T]`` g of each token: 0 for a masked token, NaN for a dead one; 1 for others where a layer has no gate."""


def memories_for(cfg: FwPKMConfig, batch_size: Rows) -> Rows | int:
    """M, the tables that a batch of this size reads: B in "sequence" scope, 1 in "batch" scope, however many rows.

    Raises:
        ValueError: the scope is another one.
    """
    if cfg.memory_scope == "sequence":
        return batch_size
    if cfg.memory_scope == "batch":
        return 1
    return cfg.refuse("memory_scope", "fwpkm")


def memory_specs(cfg: FwPKMConfig, memories: int | None) -> Memory:
    """What the tables of M memories must be, as ``ArraySpec``."""
    keys = (("M", memories), ("H", cfg.num_heads), ("2", 2), ("S", cfg.num_subkeys), ("Dk/2", cfg.key_dim // 2))
    values = (("M", memories), ("N", cfg.num_slots), ("Dv", cfg.value_dim))
    return Memory(ArraySpec(keys, "float"), ArraySpec(values, "float"))


def state_specs(cfg: FwPKMConfig, batch: int | None) -> State:
    """What the arrays of a state of B rows must be, as ``ArraySpec``."""
    memory = memory_specs(cfg, memories_for(cfg, batch))
    pending = token_specs(cfg, batch, ("P", cfg.capacity))
    uses = ArraySpec((memory.values.axes[0], ("N", cfg.counts)), "float") if cfg.counts else None
    return State.of(memory, pending, ArraySpec((("B", batch),), "int32"), uses)
