"""Checks of what a caller passes, the same in every backend.

They look at shapes and dtypes, so they also trace; ``check_positions`` and ``check_cu_seqlens`` at lists of values.

Every failure is a ValueError that names the argument, what was expected and what was received.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fwpkm.config import FwPKMConfig, check_arguments
from fwpkm.containers import Memory, State, memories_for, memory_specs, state_specs
from fwpkm.tokens import TOKEN_FIELDS, ArraySpec, Axis, Tokens, token_specs

ArrayType = type | tuple[type, ...]
_WIDE = ("float32", "float64")


class Implementation(NamedTuple):
    """What computes a memory, as the checks see it."""

    name: str
    """Such as "the torch backend"."""
    arrays: ArrayType
    """The type of its arrays."""
    fields: frozenset[str]
    """The fields of a configuration and of a token that it serves; any other must be at its default."""

    @classmethod
    def of(cls, name: str, arrays: ArrayType, fields: str) -> "Implementation":
        """One whose fields are named in a text, separated by white space."""
        return cls(name, arrays, frozenset(fields.split()))


class Fixed:
    """An argument of a layer, chosen when it is made: what the attribute of its name with an underscore holds."""

    def __init__(self, instead: str):
        """``instead`` says what is to be done with a layer that was made with the argument."""
        self._instead = instead

    def __set_name__(self, owner: type, name: str) -> None:
        """Called by the class that it is an attribute of."""
        self._name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        """The argument."""
        return self if layer is None else getattr(layer, f"_{self._name}")

    def __set__(self, layer: Any, value: Any) -> None:
        """Raise: it would say what the layer is not."""
        raise AttributeError(
            f"{self._name} is chosen when a layer is made: FwPKM(..., {self._name}={value!r}), {self._instead}. "
            f"Received: {self._name}={value!r} for a layer that is made"
        )


def check_array(name: str, array: Any, axes: Sequence[Axis], kind: str, array_type: ArrayType) -> None:
    """Raise unless ``array`` is a native array of this kind ("float", "int", "bool" or "int32") and shape."""
    received: Any = array
    if not isinstance(array, array_type):
        types = array_type if isinstance(array_type, tuple) else (array_type,)
        names = ((t.__module__.partition(".")[0], t.__name__.rpartition(".")[2]) for t in types)  # jax's holds dots
        expected = " or ".join(".".join(name) for name in names)
        raise ValueError(f"{name} must be a {expected}. Received: {type(array).__name__}")
    shape = tuple(received.shape)
    if not _fits(shape, axes):
        expected = ", ".join(label if size is None else f"{label}={size}".removeprefix("=") for label, size in axes)
        raise ValueError(f"{name} must have shape [{expected}]. Received: shape {shape}")
    if not getattr(received.dtype, "isnative", True):
        raise ValueError(
            f"{name} must be in this machine's byte order: x.astype(x.dtype.newbyteorder('=')) turns it. "
            f"Received: dtype {received.dtype.str}"
        )
    dtype = dtype_name(received)
    families = {"float": "a floating dtype", "int": "an integer dtype"}
    if not (dtype == kind or (kind in families and kind in dtype)):
        wanted = families.get(kind, f"dtype {kind}")
        wanted += _FROM_INTEGERS.get(kind, "") if "int" in dtype else ""
        raise ValueError(f"{name} must have {wanted}. Received: dtype {dtype}")


_FROM_INTEGERS = {
    "int32": ": convert it, as integers add up to int64 (numpy.cumsum(lengths, dtype='int32'))",
    "bool": ": compare integers with 0 (mask != 0)",
}
"""What to do with the integers that one has."""


def _check_spec(name: str, array: Any, spec: ArraySpec, array_type: ArrayType) -> None:
    check_array(name, array, spec.axes, spec.kind, array_type)


def _fits(shape: Sequence[int | None], axes: Sequence[Axis]) -> bool:
    """Whether a shape has these axes; None is a size that a TensorFlow graph does not know yet."""
    return len(shape) == len(axes) and all([None in (size, got) or size == got for (_, size), got in zip(axes, shape)])


def check_x(x: Any, length: int | None, hidden_size: int, array_type: ArrayType) -> None:
    """Raise unless ``x`` is ``[B, T, hidden_size]`` with B >= 1, as a layer reads it."""
    check_array("x", x, [("B", None), ("T", length), ("hidden_size", hidden_size)], "float", array_type)
    _check_any_row("x", x)


def _check_any_row(name: str, array: Any) -> None:
    if array.shape[0] == 0:
        raise ValueError(f"{name} must have at least one row (B >= 1). Received: shape {tuple(array.shape)}")


def check_config(cfg: Any) -> None:
    """Raise unless ``cfg`` is an FwPKMConfig."""
    if not isinstance(cfg, FwPKMConfig):
        raise ValueError(f"cfg must be an FwPKMConfig. Received: {type(cfg).__name__}")


def check_served(cfg: Any, implementation: Implementation) -> None:
    """Raise unless ``cfg`` is an FwPKMConfig whose fields the implementation serves."""
    check_config(cfg)
    for field in dataclasses.fields(cfg):
        if field.name not in implementation.fields and getattr(cfg, field.name) != field.default:
            raise ValueError(
                f"{field.name} must be {field.default!r}: {implementation.name} does not serve it. "
                f"Received: {field.name}={getattr(cfg, field.name)!r}"
            )


def _check_served_tokens(tokens: Tokens, prefix: str, implementation: Implementation) -> None:
    """Raise for a field of tokens that the implementation does not serve, unless it is known to be at its default."""
    for field, array in zip(TOKEN_FIELDS, tokens):
        if field.name in implementation.fields or array is None:
            continue
        try:
            at_default = bool((np.asarray(array) == field.default).all())
        except Exception:  # traced, or on a device
            at_default = False
        if not at_default:
            raise ValueError(f"{prefix}{field.name} must be left out: {implementation.name} does not serve it")


def check_count(name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1. Received: {name}={value!r}")


def layer_config(
    hidden_size: Any, config: Any, value_norm: Any, config_fields: dict[str, Any], **flags: Any
) -> FwPKMConfig:
    """The configuration of a layer's memory: ``config``, or the defaults, with ``config_fields`` replaced (§7).

    Raises:
        ValueError: a field, the width, the norm or one of the ``flags`` of a layer breaks its rule.
        TypeError: no field has a name; says which one was probably meant.
    """
    known = (field.name for field in dataclasses.fields(FwPKMConfig))
    check_arguments("FwPKM", config_fields, (*known, "value_norm", *flags))
    for name, flag in flags.items():
        check_flag(name, flag)
    config = FwPKMConfig() if config is None else config
    check_config(config)
    config = dataclasses.replace(config, **config_fields)
    check_count("hidden_size", hidden_size)
    if value_norm not in ("zscore", None):
        raise ValueError(f"value_norm must be 'zscore' or None. Received: value_norm={value_norm!r}")
    if value_norm == "zscore" and config.value_dim < 2:
        raise ValueError(f"value_dim must be at least 2 for value_norm='zscore'. Received: {config.value_dim}")
    return config


def check_memory(cfg: FwPKMConfig, memory: Any, memories: int | None, implementation: Implementation) -> None:
    """Raise unless the tables fit ``cfg``; with ``memories`` there must be exactly so many."""
    check_served(cfg, implementation)
    if not isinstance(memory, Memory):
        raise ValueError(f"memory must be a fwpkm.Memory(keys, values). Received: {type(memory).__name__}")
    _check_spec("memory.keys", memory.keys, memory_specs(cfg, memories).keys, implementation.arrays)
    specs = memory_specs(cfg, memory.keys.shape[0])
    _check_spec("memory.values", memory.values, specs.values, implementation.arrays)
    if memory.keys.dtype != memory.values.dtype:
        raise ValueError(
            f"memory.keys and memory.values must have one dtype. "
            f"Received: {dtype_name(memory.keys)} and {dtype_name(memory.values)}"
        )
    if dtype_name(memory.keys) not in _WIDE:
        raise ValueError(
            "memory.keys and memory.values must be float32 or float64; narrower ones have lost digits. Something "
            "rounded them on the way, as FSDP2's mixed precision does (cast_forward_inputs=False leaves what goes into "
            "a module, fully_shard(layer.memory) without a policy trained tables), Keras's in a model of your own "
            "(autocast=False, where it is made), or a tree.map over a whole model (cast what is trained). "
            f"Received: {dtype_name(memory.keys)}"
        )


def check_initial(cfg: FwPKMConfig, memory: Any, batch_size: Any, implementation: Implementation) -> None:
    """Raise unless a state of ``batch_size`` rows can start from these tables."""
    check_memory(cfg, memory, None, implementation)
    check_count("batch_size", batch_size)
    wanted = memories_for(cfg, batch_size)
    if memory.keys.shape[0] not in (1, wanted):
        allowed = "1" if wanted == 1 else f"1 or {wanted}"
        raise ValueError(
            f"memory must hold {allowed} tables for batch_size={batch_size} and memory_scope={cfg.memory_scope!r}. "
            f"Received: memory.keys with M={memory.keys.shape[0]}"
        )


def check_lookup(cfg: FwPKMConfig, memory: Any, query: Any, implementation: Implementation) -> None:
    """Raise unless ``query`` [B, n, H*Dk] can read these tables."""
    check_served(cfg, implementation)
    if cfg.recent_penalty:
        raise ValueError(
            "recent_penalty must be 0 here: a state counts the uses of sub-keys, and tables alone do not. "
            f"Received: recent_penalty={cfg.recent_penalty!r}"
        )
    _check_query(cfg, query, "n", implementation.arrays)
    check_memory(cfg, memory, memories_for(cfg, query.shape[0]), implementation)


def check_chunk(cfg: FwPKMConfig, memory: Any, chunk: Tokens, pair: Any, implementation: Implementation) -> None:
    """Raise unless the arguments of ``chunk_update`` fit each other; the chunk's values are its targets."""
    _check_served_tokens(chunk, "", implementation)
    check_lookup(cfg, memory, chunk.query, implementation)
    _check_tokens(cfg, chunk, "n", implementation.arrays, names={"value": "target"})
    if cfg.usage_weight:
        raise ValueError(
            "usage_weight must be 0 here: it weighs what earlier chunks used, which a state keeps and tables alone do "
            f"not; apply writes by it. Received: usage_weight={cfg.usage_weight!r}"
        )
    if cfg.initial_decay:
        raise ValueError(
            "initial_decay must be 0 here: chunk_update is told of no initial table; apply writes by it. "
            f"Received: initial_decay={cfg.initial_decay!r}"
        )
    if pair is not None:
        axes = [("B", chunk.query.shape[0]), ("n", chunk.query.shape[1])]
        check_array("pair", pair, axes, "bool", implementation.arrays)


def check_flag(name: str, flag: Any) -> None:
    """Raise unless a switch is True or False: "no" would be taken for True, and a traced one is never known."""
    if not isinstance(flag, (bool, np.bool_)):
        traced = ". It decides what is traced: name it in static_argnames" if "Tracer" in type(flag).__name__ else ""
        raise ValueError(f"{name} must be True or False. Received: {flag!r}{traced}")


def check_apply(
    cfg: FwPKMConfig, state: Any, tokens: Tokens, cu_seqlens: Any, update: Any, implementation: Implementation
) -> Any:
    """Raise unless the arguments of ``apply`` fit each other. Returns B, the rows of the state that they make.

    B is None where a TensorFlow graph does not know it yet.
    """
    check_served(cfg, implementation)
    check_flag("update", update)
    _check_served_tokens(tokens, "", implementation)
    _check_query(cfg, tokens.query, "T", implementation.arrays)
    _check_tokens(cfg, tokens, "T", implementation.arrays)
    batch = tokens.query.shape[0]
    if cu_seqlens is not None:
        if cfg.memory_scope != "sequence":
            raise ValueError(
                "cu_seqlens must be None where one memory serves all rows: packed sequences have a memory each. "
                f"Received: cu_seqlens with memory_scope={cfg.memory_scope!r}"
            )
        batch = check_packed("query", tokens.query, cu_seqlens, implementation.arrays)
    if isinstance(state, Memory):
        check_memory(cfg, state, 1, implementation)
    else:
        _check_rows(batch, check_state(cfg, state, implementation), packed=cu_seqlens is not None)
    return batch


def _check_rows(batch: Any, received: Any, packed: bool) -> None:
    """Raise unless a state has as many rows as what is read; None where a TensorFlow graph does not know yet."""
    if None not in (batch, received) and batch != received:
        what = "a row for each sequence of cu_seqlens [B+1]" if packed else "a row for each of the batch"
        raise ValueError(
            f"state must have {what}, B={batch}. Received: a state of B={received} rows. init_state makes a new one, "
            "select and concat change the rows of this"
        )


def check_packed(name: str, row: Any, cu_seqlens: Any, array_type: ArrayType) -> Any:
    """B, of the shape of ``cu_seqlens``; the array of this name must be one packed row ``[1, T, ...]``."""
    check_array("cu_seqlens", cu_seqlens, [("B+1", None)], "int32", array_type)
    size = cu_seqlens.shape[0]
    if size is not None and size < 2:
        raise ValueError(f"cu_seqlens must have shape [B+1] with B >= 1. Received: shape {tuple(cu_seqlens.shape)}")
    if row.shape[0] is not None and row.shape[0] != 1:
        raise ValueError(
            f"{name} must be one packed row, [1, T, ...], beside cu_seqlens. Received: shape {tuple(row.shape)}"
        )
    return None if size is None else size - 1


def check_one_token(query: Any) -> None:
    """Raise unless ``query`` [B, T, H*Dk] is one token of each sequence, as ``decode`` reads."""
    if query.shape[1] != 1:
        raise ValueError(
            f"query must be [B, 1, H*Dk]: decode reads one token of each sequence. Received: {tuple(query.shape)}"
        )


def check_cu_seqlens(cu_seqlens: list[int], length: int) -> None:
    """Raise unless these numbers are where sequences begin and end among T tokens (SPEC.md §5)."""
    if cu_seqlens[0] != 0 or any(b < a for a, b in itertools.pairwise(cu_seqlens)) or cu_seqlens[-1] > length:
        raise ValueError(
            f"cu_seqlens must begin with 0, never fall and end at most at T={length}. Received: {cu_seqlens}"
        )


def check_is_state(state: Any, name: str = "state") -> None:
    """Raise unless ``state`` is one."""
    if not isinstance(state, State):
        listed = type(state) in (list, tuple)
        a_list = "; fwpkm.backends.keras.as_state makes one of the list that a Keras layer returns" * listed
        raise ValueError(
            f"{name} must be a fwpkm.State, as init_state returns{a_list}. Received: {type(state).__name__}"
        )


def check_not_rounded(state: Any, dtype: str) -> None:
    """Raise where a layer whose queries have this dtype would round the tables of a state (§6): they are float64."""
    memory = getattr(state, "memory", None)  # what is no state at all the call itself refuses
    if isinstance(memory, Memory) and hasattr(memory.keys, "dtype") and dtype_name(memory.keys) == "float64" != dtype:
        raise ValueError(
            "state must not hold float64 tables where the layer reads in another dtype, since each write would round "
            "them: make the layer float64, or round them yourself with state.to(torch.float32), or state.map(...) in "
            f"another framework. Received: float64 tables, and queries of {dtype}"
        )


def check_state(cfg: FwPKMConfig, state: Any, implementation: Implementation) -> int:
    """Raise unless the state fits ``cfg``. Returns its rows."""
    check_served(cfg, implementation)
    check_is_state(state)
    _check_spec("state.position", state.position, state_specs(cfg, None).position, implementation.arrays)
    batch = state.position.shape[0]
    check_memory(cfg, state.memory, memories_for(cfg, batch), implementation)
    _check_served_tokens(state.pending, "state.pending_", implementation)
    specs = state_specs(cfg, batch).pending._asdict()
    for name, array in state.pending._asdict().items():
        _check_spec(f"state.pending_{name}", array, specs[name], implementation.arrays)
        if name != "mask" and array.dtype != state.memory.keys.dtype:
            raise ValueError(
                f"state.pending_{name} must have the tables' dtype, {dtype_name(state.memory.keys)}; something cast it "
                f"on the way. Received: {dtype_name(array)}"
            )
    _check_uses(cfg, state, implementation)
    return batch


def _check_uses(cfg: FwPKMConfig, state: State, implementation: Implementation) -> None:
    """Raise unless a state counts uses where its configuration weighs them, and there alone."""
    spec, uses = state_specs(cfg, state.position.shape[0]).maybe_uses, state.maybe_uses
    if spec is None or uses is None:
        if spec is not uses:
            wanted = "()" if spec is None else "an array [M, N], as init_state makes of this configuration"
            shape = getattr(uses, "shape", None)  # a traced array's type would say nothing
            kind = repr(state.uses) if uses is None else type(uses).__name__
            received = kind if shape is None else f"an array of shape {tuple(shape)}"
            raise ValueError(
                f"state.uses must be {wanted}, since usage_weight is {cfg.usage_weight!r}. Received: {received}"
            )
        return
    _check_spec("state.uses", uses, spec, implementation.arrays)
    if uses.dtype != state.memory.keys.dtype:
        raise ValueError(
            f"state.uses must have the tables' dtype, {dtype_name(state.memory.keys)}; something cast it on the way. "
            f"Received: {dtype_name(uses)}"
        )


def check_positions(cfg: FwPKMConfig, positions: list[int]) -> None:
    """Raise unless rows can stand at these positions (SPEC.md §5)."""
    if min(positions) < 0:
        raise ValueError(f"state.position must hold numbers of at least 0. Received: {positions}")
    if cfg.memory_scope == "batch" and len(set(positions)) > 1:
        raise ValueError(
            "state.position must be the same in all rows, which share one memory and its clock "
            f"(memory_scope='batch'). Received: {positions}"
        )


RIGHT_USES = "finite numbers of at least 0"


def wrong_uses(uses: np.ndarray | None) -> str | None:
    """What of a state's uses on the host is no count, in words; None where all is well."""
    if uses is None or not len(wrong := uses[~(np.isfinite(uses) & (uses >= 0))]):
        return None
    return f"{len(wrong)} of {uses.size} are not, the first {wrong[0]}"


RIGHT_PENDING = "finite numbers where pending_mask is True"


def wrong_pending(pending: Tokens) -> tuple[str, str] | None:
    """Which field of pending tokens on the host is not finite where one is there, and how; None where all is well.

    A token that is not finite waits as zeros, with mask False (§5).
    """
    there = np.asarray(pending.mask, bool)
    for name, x in pending._asdict().items():
        wrong = int((~np.isfinite(np.asarray(x)[there])).sum())
        if wrong:
            return f"pending_{name}", f"{wrong} that are not"
    return None


def dtype_name(array: Any) -> str:
    """The name that all frameworks share: torch's dtypes have a prefix, TensorFlow's a description."""
    return (getattr(array.dtype, "name", None) or str(array.dtype)).removeprefix("torch.")


def _check_query(cfg: FwPKMConfig, query: Any, time: str, array_type: ArrayType) -> None:
    axes = [("B", None), (time, None), ("H*Dk", cfg.num_heads * cfg.key_dim)]
    check_array("query", query, axes, "float", array_type)
    _check_any_row("query", query)


def _check_tokens(
    cfg: FwPKMConfig, tokens: Tokens, time: str, array_type: ArrayType, names: dict[str, str] | None = None
) -> None:
    """Check per-token arguments against the query's [B, time]; ``names`` are what the caller calls some of them."""
    specs = token_specs(cfg, tokens.query.shape[0], (time, tokens.query.shape[1]))
    for field, array, spec in zip(TOKEN_FIELDS, tokens, specs):
        if array is not None or field.default is None:
            _check_spec((names or {}).get(field.name, field.name), array, spec, array_type)
