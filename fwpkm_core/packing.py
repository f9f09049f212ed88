"""States that cost what they hold: packed beside the initial memory, as NumPy arrays on the host (SPEC.md §10).

Most of a state is its value table, and most rows of that are the initial memory's, bit for bit. A :class:`PackedState`
keeps the others, the keys, and of the pending tokens those that are there. What differs is told by bits: -0.0 differs
from 0.0, and a NaN does not differ from itself. Nothing here computes with numbers but the rounding to bfloat16.

Each backend has ``pack`` and ``unpack``, documented on ``fwpkm.protocol.Backend``; here is what they share.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fwpkm import rows as row_checks
from fwpkm import schedule, validation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, memories_for, memory_specs, state_specs
from fwpkm.tokens import ArraySpec, Tokens, token_specs
from fwpkm.validation import Implementation

_BLOCK = 2**24
"""Numbers that are compared at a time, so that a large table needs no flags of its size."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedState:
    """B half-read sequences without what they share with the initial memory: NumPy arrays, the same for all backends.

    ``be.pack`` makes it, ``be.unpack`` of any backend makes a :class:`fwpkm.State` of it again, given the same initial
    memory. M is B in "sequence" scope, 1 in "batch" scope.
    """

    config: FwPKMConfig
    """The configuration that the state was made with."""
    initial: np.ndarray
    """``[M, 32]`` uint8: a SHA-256 of the initial tables that each memory is to be unpacked beside."""
    keys: np.ndarray
    """``[M, H, 2, S, Dk/2]`` float32 or float64."""
    counts: np.ndarray
    """``[M]`` int32: how many rows of each memory's values are kept."""
    slots: np.ndarray
    """``[n]`` int32: their slot ids, memory by memory, rising within each."""
    values: np.ndarray
    """``[n, Dv]``: those rows in the keys' dtype; or uint16, the bits of bfloat16 numbers."""
    pending: Tokens
    """``[p, ...]``: the pending tokens of all sequences, one after the other."""
    position: np.ndarray
    """``[B]`` int32."""
    uses: np.ndarray | None = None
    """``[M, N]`` in the keys' dtype; None where the configuration's ``usage_weight`` is 0."""

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays, and of the configuration as JSON."""
        return sum(x.nbytes for x in arrays(self).values()) + len(self.config.to_json())

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.position)


def arrays(packed: PackedState) -> dict[str, Any]:
    """The arrays of a packed state by the names that files give them; "pending_query" and so on for tokens."""
    fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    del fields["config"]
    if packed.uses is None:
        del fields["uses"]
    pending = fields.pop("pending")
    return fields | {f"pending_{name}": x for name, x in pending._asdict().items()}


def from_arrays(cfg: FwPKMConfig, found: dict[str, np.ndarray]) -> PackedState:
    """The inverse of :func:`arrays`."""
    pending = {name: found[f"pending_{name}"] for name in Tokens._fields}
    others = {field.name: found[field.name] for field in dataclasses.fields(PackedState) if field.name in found}
    return PackedState(config=cfg, pending=Tokens(**pending), **others)


def specs(cfg: FwPKMConfig, batch: int, rows: int, tokens: int) -> dict[str, ArraySpec]:
    """What the arrays of a packed state must be, by name: ``batch`` sequences, so many rows and pending tokens in all.

    The kind of values is "float", although they may be uint16.
    """
    memories, n, state = memories_for(cfg, batch), ("n", rows), state_specs(cfg, batch)
    pending = token_specs(cfg, tokens, ("time", 1))._asdict()
    return {
        "initial": ArraySpec((("M", memories), ("", 32)), "uint8"),
        "keys": memory_specs(cfg, memories).keys,
        "counts": ArraySpec((("M", memories),), "int32"),
        "slots": ArraySpec((n,), "int32"),
        "values": ArraySpec((n, ("Dv", cfg.value_dim)), "float"),
        "position": state.position,
        **({} if state.maybe_uses is None else {"uses": state.maybe_uses}),
        **{f"pending_{name}": ArraySpec((("p", tokens), *x.axes[2:]), x.kind) for name, x in pending.items()},
    }


# --- Packing ---


def pack(
    cfg: FwPKMConfig,
    state: State,
    memory: Memory,
    dtype: str | None,
    implementation: Implementation,
    to_numpy: Callable[[Any], np.ndarray] = np.asarray,
    changed: Callable[[Any, Any], tuple[np.ndarray, np.ndarray]] | None = None,
    digests_of: Callable[[Memory], np.ndarray] | None = None,
) -> PackedState:
    """``Backend.pack``; ``changed`` and ``digests_of`` are :func:`changed_rows` and :func:`digests` for a framework."""
    row_checks.check_reset(cfg, state, memory, implementation)
    _check_dtype(dtype, validation.dtype_name(memory.keys))
    position = np.array(to_numpy(state.position))
    validation.check_positions(cfg, position.tolist())
    uses = None if state.maybe_uses is None else np.array(to_numpy(state.maybe_uses), order="C")
    if wrong := validation.wrong_uses(uses):
        raise ValueError(f"state.uses must hold {validation.RIGHT_USES}. Received: {wrong}")
    memories = state.memory.values.shape[0]
    values, initial, find = state.memory.values, memory.values, changed
    if find is None:
        values, initial, find = to_numpy(values), to_numpy(initial), changed_rows
    own = initial.shape[0] > 1
    found = [find(values[m], initial[m if own else 0]) for m in range(memories)]
    slots, kept = (np.concatenate(parts) for parts in zip(*found))
    there = _is_pending(cfg, position)
    return PackedState(
        config=cfg,
        initial=np.repeat(_digests(memory, to_numpy, digests_of), 1 if own else memories, axis=0),
        keys=np.array(to_numpy(state.memory.keys), order="C"),
        counts=np.array([len(ids) for ids, _ in found], np.int32),
        slots=slots.astype(np.int32),
        values=kept if dtype is None else to_bfloat16(kept),
        pending=state.pending.map(lambda x: to_numpy(x)[there]),
        position=position,
        uses=uses,
    )


def changed_rows(values: np.ndarray, initial: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slots whose rows differ in a bit, and copies of these rows; both tables ``[N, Dv]``."""
    bits = np.dtype(f"u{values.itemsize}")
    ids = [
        start + np.flatnonzero((values[start:stop].view(bits) != initial[start:stop].view(bits)).any(-1))
        for start, stop in blocks(*values.shape)
    ]
    slots = np.concatenate(ids)
    return slots, values[slots]


def blocks(rows: int, width: int) -> list[tuple[int, int]]:
    """Where runs of rows begin and end that are compared at a time."""
    step = max(1, _BLOCK // width)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def digests(memory: Memory) -> np.ndarray:
    """``[M, 32]`` uint8: SHA-256 of each memory's dtype, keys and values, in C order and little-endian."""
    found = []
    for keys, values in zip(memory.keys, memory.values):
        sha = hashlib.sha256(keys.dtype.name.encode())
        for table in (keys, values):
            sha.update(np.asarray(table, table.dtype.newbyteorder("<"), order="C").reshape(-1).view(np.uint8).data)
        found.append(np.frombuffer(sha.digest(), np.uint8))
    return np.stack(found)


def _digests(
    memory: Memory, to_numpy: Callable[[Any], np.ndarray], digests_of: Callable[[Memory], np.ndarray] | None
) -> np.ndarray:
    return digests(Memory(*map(to_numpy, memory))) if digests_of is None else digests_of(memory)


def _is_pending(cfg: FwPKMConfig, position: np.ndarray) -> np.ndarray:
    """``[B, P]``: where pending tokens stand."""
    return np.arange(cfg.capacity) < schedule.pending(cfg, position)[:, None]


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 numbers as the bits of the nearest bfloat16, ties to even: uint16.

    The error is at most 2⁻⁸ of a number, or 2⁻¹³⁴ where that is below 2⁻¹²⁶. Finite numbers stay finite, NaN stays NaN.
    """
    bits = x.view(np.uint32)
    kept = bits >> 16
    rounded = (bits + (0x7FFF + (kept & 1))) >> 16
    rounded = np.where(np.isfinite(x) & ((rounded & 0x7FFF) == 0x7F80), kept, rounded)  # the largest finite one
    return np.where(np.isnan(x), kept | 0x40, rounded).astype(np.uint16)  # a NaN may hold its payload in what is cut


def float_rows(values: np.ndarray) -> np.ndarray:
    """The kept rows as the numbers of a table."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values


# --- Unpacking ---


def prepare(
    cfg: FwPKMConfig,
    packed: PackedState | Sequence[PackedState],
    memory: Memory,
    implementation: Implementation,
    to_numpy: Callable[[Any], np.ndarray] = np.asarray,
    digests_of: Callable[[Memory], np.ndarray] | None = None,
) -> PackedState:
    """What ``Backend.unpack`` is given as one packed state, rows as numbers, once it fits ``cfg`` and ``memory``."""
    validation.check_served(cfg, implementation)
    many = [packed] if isinstance(packed, PackedState) else packed
    if not isinstance(many, Sequence) or not many:
        received = "none" if isinstance(many, Sequence) else type(many).__name__
        raise ValueError(f"packed must be a fwpkm.PackedState, or a list of at least one. Received: {received}")
    if len(many) > 1 and memories_for(cfg, 2) == 1:
        raise ValueError(
            "packed must be one packed state where one memory serves all rows: several have a memory each. "
            f"Received: {len(many)} with memory_scope={cfg.memory_scope!r}"
        )
    for i, one in enumerate(many):
        name = "packed" if one is packed else f"packed[{i}]"
        check(name, one)
        _check_config(name, one.config, cfg)
    whole = _joined(many)
    validation.check_initial(cfg, memory, whole.batch_size, implementation)
    for i, one in enumerate(many):
        if one.keys.dtype.name != validation.dtype_name(memory.keys):
            raise ValueError(
                f"packed must have tables of the memory's dtype, {validation.dtype_name(memory.keys)}. "
                f"Received: {one.keys.dtype.name} in packed state {i}"
            )
    _check_initial(whole, _digests(memory, to_numpy, digests_of))
    return whole


def _joined(many: Sequence[PackedState]) -> PackedState:
    """The rows of all, in order; those of values as numbers."""
    found = [arrays(dataclasses.replace(one, values=float_rows(one.values))) for one in many]
    return from_arrays(many[0].config, {name: np.concatenate([x[name] for x in found]) for name in found[0]})


def unpack(cfg: FwPKMConfig, packed: PackedState, memory: Memory) -> State:
    """The state of what :func:`prepare` returned beside an initial memory of NumPy arrays."""
    values = np.broadcast_to(memory.values, (len(packed.counts), *memory.values.shape[1:])).copy()
    values[memory_ids(packed), packed.slots] = packed.values
    return State.of(Memory(packed.keys, values), unpack_pending(cfg, packed), packed.position, packed.uses)


def memory_ids(packed: PackedState) -> np.ndarray:
    """``[n]``: the memory that each kept row belongs to."""
    return np.repeat(np.arange(len(packed.counts)), packed.counts)


def unpack_pending(cfg: FwPKMConfig, packed: PackedState) -> Tokens:
    """The pending tokens as a state holds them, ``[B, P, ...]``, with zeros behind them."""
    there = _is_pending(cfg, packed.position)

    def placed(x: np.ndarray) -> np.ndarray:
        whole = np.zeros((*there.shape, *x.shape[1:]), x.dtype)
        whole[there] = x
        return whole

    return packed.pending.map(placed)


# --- Checks ---


def check(name: str, packed: PackedState) -> None:
    """Raise unless it is a packed state whose arrays fit each other; ``name`` is what the caller calls it."""
    if not isinstance(packed, PackedState):
        raise ValueError(f"{name} must be a fwpkm.PackedState, as pack returns. Received: {type(packed).__name__}")
    validation.check_config(packed.config)
    found = arrays(packed)
    for field, x in found.items():
        if not isinstance(x, np.ndarray) or x.ndim == 0:
            raise ValueError(f"{name}.{field} must be a NumPy array. Received: {type(x).__name__}")
    expected = specs(packed.config, len(packed.position), len(packed.slots), len(packed.pending.query))
    if ("uses" in found) != ("uses" in expected):
        wanted = "an array" if "uses" in expected else "None"
        raise ValueError(
            f"{name}.uses must be {wanted}, since usage_weight is {packed.config.usage_weight!r}. "
            f"Received: {'an array' if 'uses' in found else 'None'}"
        )
    for field, spec in expected.items():
        kind = "uint16" if field == "values" and packed.values.dtype == np.uint16 else spec.kind
        validation.check_array(f"{name}.{field}", found[field], spec.axes, kind, np.ndarray)
    floats = ["values"] if packed.values.dtype != np.uint16 else []
    floats += ["uses"] if "uses" in found else []
    floats += [field for field, spec in expected.items() if field.startswith("pending_") and spec.kind == "float"]
    for field in floats:
        if found[field].dtype != packed.keys.dtype:
            raise ValueError(
                f"{name}.{field} must have the keys' dtype, {packed.keys.dtype}. Received: {found[field].dtype}"
            )
    problem = problem_of(packed)
    if problem:
        field, wanted, received = problem
        raise ValueError(f"{name}.{field} must hold {wanted}. Received: {received}")


def problem_of(packed: PackedState) -> tuple[str, str, str] | None:
    """The first array whose numbers cannot be, what they must be and what they are; shapes and dtypes are right."""
    cfg, position, counts, slots = packed.config, packed.position, packed.counts, packed.slots
    if not len(position):
        return "position", "at least one row", "none"
    equal = memories_for(cfg, 2) == 1
    if position.min() < 0 or (equal and position.min() != position.max()):
        return "position", "numbers of at least 0" + ", equal in all rows" * equal, str(position.tolist())
    tokens = int(schedule.pending(cfg, position).sum())
    if len(packed.pending.query) != tokens:
        return "pending", f"the {tokens} tokens that its positions say", str(len(packed.pending.query))
    if counts.min() < 0 or counts.sum(dtype=np.int64) != len(slots):
        return "counts", f"numbers of at least 0 that make {len(slots)}, the slots", str(counts.tolist())
    first = np.zeros(len(slots), bool)
    first[(np.cumsum(counts) - counts)[counts > 0]] = True
    if len(slots) and (slots.min() < 0 or slots.max() >= cfg.num_slots or not ((np.diff(slots) > 0) | first[1:]).all()):
        wanted = f"ids in [0, {cfg.num_slots}), rising in each memory"
        return "slots", wanted, f"{slots[:8].tolist()} and so on, from {slots.min()} to {slots.max()}"
    if problem := validation.wrong_pending(packed.pending):
        field, received = problem
        return field, validation.RIGHT_PENDING, received
    wrong = validation.wrong_uses(packed.uses)
    return ("uses", validation.RIGHT_USES, wrong) if wrong else None


def _check_dtype(dtype: Any, of_tables: str) -> None:
    if dtype is not None and dtype != "bfloat16":
        raise ValueError(f"dtype must be None, which keeps the rows' bits, or 'bfloat16'. Received: dtype={dtype!r}")
    if dtype is not None and of_tables != "float32":
        raise ValueError(f"dtype must be None for tables of {of_tables}: only float32 is rounded. Received: {dtype!r}")


def _check_config(name: str, packed: FwPKMConfig, cfg: FwPKMConfig) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(cfg)}
    saved = {field: getattr(packed, field, default) for field, default in fields.items()}
    wrong = [field for field in fields if saved[field] != getattr(cfg, field)]
    if wrong:
        wanted, received = (
            ", ".join(f"{field}={value!r}" for field, value in values)
            for values in ([(x, saved[x]) for x in wrong], [(x, getattr(cfg, x)) for x in wrong])
        )
        raise ValueError(f"cfg must be the configuration of {name}: {wanted}. Received: {received}")


def _check_initial(packed: PackedState, received: np.ndarray) -> None:
    wrong = (packed.initial != received).any(-1)
    if wrong.any():
        row = int(wrong.argmax())
        found = received[row if len(received) > 1 else 0]
        raise ValueError(
            f"memory must be the initial memory that the state was packed beside, bit for bit; it is another one for "
            f"{int(wrong.sum())} of {len(wrong)} memories, first for {row}. Pass what pack was given, of the same "
            f"weights. Expected: SHA-256 {packed.initial[row].tobytes().hex()}. Received: {found.tobytes().hex()}"
        )
