"""The functions of ops.py on the Triton kernels: the same calls, the same results (SPEC.md §8).

Rows that begin with nothing pending are read as they are. Any other are moved to the left of a rectangle, where every
row begins at a chunk's start, and what each completes is decided on the device: so positions may be traced.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from fwpkm import schedule
from fwpkm.backends.jax.launching import run
from fwpkm.backends.jax.sharding import alike, placed
from fwpkm.backends.jax.tokens import filled, without
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.tokens import NUMBERS, SCALARS, Tokens

_DEAD = 2
"""The kernels' flag of a token that is not finite; importing theirs would import triton."""
_EVERY_TOKEN = 2**30  # a chunk size that no call reaches


class Settings(NamedTuple):
    """What the launches of a call follow from, beside its arrays."""

    cfg: FwPKMConfig
    plan: Any
    """``Plan`` of kernels/runtime/windows.py."""
    dtype: str
    """Of the output."""


class Results(NamedTuple):
    """What a call gives; of the tables only those that were written."""

    output: Array
    keys: Array | None
    values: Array | None
    uses: Array | None
    slots: Array
    weights: Array
    losses: Losses
    """``[M, windows that write]`` each."""
    flags: Array
    """``[B·n]`` int8: of the stream."""


class _Saved(NamedTuple):
    """What the backward of a call needs."""

    tokens: Tokens
    residuals: dict[str, Array]
    table: tuple[None, ...]
    """Whether the table is differentiated, which must be known while tracing: (None,) or () is a static mark."""


# --- One call of the kernels ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def call(
    settings: Settings, memory: Memory, uses: Array | None, tokens: Tokens, pair: Array | None
) -> Results:  # fmt: skip
    """Read and write all windows of a plan; the arrays are ``alike``. Uses are counts: no gradient passes through.

    Args:
        settings: what is static.
        memory: float32; one memory, where nothing is written, serves all rows.
        uses: ``[M, N]`` U, or None where nothing weighs them.
        tokens: the streams ``[B, n, ...]``; a field that is None is at its default.
        pair: ``[B, n]`` bool: the tokens whose values may be bound; None is all.
    """
    return _forward(settings, memory, uses, tokens, pair, False)[0]


def _forward(
    settings: Settings, memory: Memory, uses: Array | None, tokens: Tokens, pair: Array | None, save: bool
) -> tuple[Results, dict[str, Array]]:
    from fwpkm.kernels.runtime.shapes import keys_move

    (cfg, plan, dtype), memories, batch = settings, len(memory.keys), len(tokens.query)
    writes, untouched = plan.num_writes, () if plan.num_writes else ("table", "uses")
    launches, entries, new = _lists(settings, tokens, memories, save), cfg.slots_per_token, (batch, plan.num_new)
    arrays = {
        **tokens._asdict(), "pair": pair, "initial_keys": memory.keys, "table": memory.values, "uses": uses,
        "new_slots": jax.ShapeDtypeStruct((*new, entries), jnp.int32),
        "new_weights": jax.ShapeDtypeStruct((*new, entries), jnp.float32),
        "output": jax.ShapeDtypeStruct((*new, cfg.value_dim), dtype), "due": None,
        "addressing": jax.ShapeDtypeStruct((writes, memories), jnp.float32) if writes else None,
    }  # fmt: skip
    arrays = run(launches.prepare, arrays, "query")
    arrays = run(launches.address, arrays, "flags")
    rows = arrays["table_rows"]
    arrays["sorted_rows"], arrays["order"] = lax.sort((rows, jnp.arange(len(rows), dtype=jnp.int32)), num_keys=1)
    arrays = run(launches.write, arrays, "order", untouched)
    after: dict[str, Any] = dict.fromkeys(("keys", "values", "uses"))
    losses = Losses(*jnp.zeros((2, memories, 0), jnp.float32))
    if writes:
        keys = arrays["keys"].reshape(-1, *memory.keys.shape)[writes * save * keys_move(cfg)]
        after = {"keys": keys, "values": arrays["table"], "uses": arrays["uses"]}
        written = arrays["squared"][: writes * batch * plan.windows[0].length]
        losses = Losses(written.reshape(writes, memories, -1).sum(2).T, arrays["addressing"].T)
    results = Results(
        arrays["output"], **after, slots=arrays["new_slots"], weights=arrays["new_weights"], losses=losses,
        flags=arrays["flags"],
    )  # fmt: skip
    if not save:
        return results, {}
    backward = _lists(settings, tokens, memories, save, True)
    asked = {name for part in (backward.through_values, backward.through_keys) for name, *_ in part.sources}
    names = [name for name in launches.residuals.tensors if name in asked and arrays.get(name) is not None]
    return results, {name: arrays[name] for name in names}


def _lists(settings: Settings, tokens: Tokens, memories: int, save: bool, table: bool | None = None) -> Any:
    """The launches of a forward; or of its backward, where it is told whether the ``table`` is differentiated."""
    from fwpkm.kernels.runtime import call as lists
    from fwpkm.kernels.runtime.windows import Call

    one = Call(settings.cfg, settings.plan, tokens.query.dtype, memories, save)
    launches = lists.forward_launches(one, None)
    if table is None:
        return launches
    return lists.backward_launches(one, _overlaps(settings.plan), table, launches.residuals)


def _overlaps(plan: Any) -> bool:
    return any(a.start + a.length > b.start for a, b in zip(plan.windows, plan.windows[1:]))


def _call_forward(settings: Settings, *given: Any) -> tuple[Results, _Saved]:
    table = given[0].values.perturbed
    is_marked = lambda x: hasattr(x, "perturbed")  # noqa: E731
    memory, uses, tokens, pair = jax.tree.map(lambda x: x.value, given, is_leaf=is_marked)
    results, residuals = _forward(settings, memory, uses, tokens, pair, True)
    return results, _Saved(tokens, residuals, (None,) if table else ())


def _call_backward(settings: Settings, saved: _Saved, d: Results) -> tuple[Any, ...]:
    (cfg, plan, _), tokens, residuals = settings, saved.tokens, saved.residuals
    memories = residuals["counts"].shape[0] // len(plan.windows)
    d_output, d_keys, d_values, d_weights = (_given(x) for x in (d.output, d.keys, d.values, d.weights))
    shape = memories, *residuals["keys"].shape[1:]
    both = [jnp.zeros(shape, jnp.float32)] * 2  # after a window and before it, in turns
    if d_keys is not None:
        both[len(plan.windows) % 2] = d_keys.reshape(shape)
    d_table = None
    if saved.table:
        rows = memories, cfg.num_slots, cfg.value_dim
        d_table = jnp.zeros(rows, jnp.float32) if d_values is None else d_values
    numbers = {name: x for name, x in tokens.present().items() if name in NUMBERS}
    wider = {"query": jnp.float32} if _overlaps(plan) else {}
    zeros = {f"d_{name}": jnp.zeros(x.shape, wider.get(name, x.dtype)) for name, x in numbers.items()}
    arrays = {
        **tokens._asdict(), **residuals, "due": None, "pair": None, "d_keys": jnp.stack(both), "d_values": d_values,
        "d_output": d_output, "d_table": d_table, **dict.fromkeys(f"d_{name}" for name in NUMBERS), **zeros,
        "latest": jnp.full(memories * cfg.num_slots, -1, jnp.int32), **dict.fromkeys(("table", "needed_by")),
    }  # fmt: skip
    launches = _lists(settings, tokens, memories, True, bool(saved.table))
    arrays = run(launches.through_values, arrays, "slots")
    if d_weights is not None:
        arrays["d_weights"] += _by_window(plan, d_weights)
    arrays = run(launches.through_keys, arrays, "d_weights")
    keys = arrays["d_keys"][0].reshape(memories, cfg.num_heads, 2, *shape[2:])
    of_tokens = {name: arrays[f"d_{name}"].astype(x.dtype) for name, x in numbers.items()}
    return Memory(keys, arrays["d_table"]), None, Tokens(**dict.fromkeys(Tokens._fields) | of_tokens), None


call.defvjp(_call_forward, _call_backward, symbolic_zeros=True)


def _given(d: Any) -> Array | None:
    """A gradient, None where it is known to be zero."""
    return None if d is None or isinstance(d, SymbolicZero) or d.dtype == jax.dtypes.float0 else d


def _by_window(plan: Any, d: Array) -> Array:
    """Gradients of the tokens that a call outputs, ``[B, T, ...]``, as ``[w, ...]`` of its windows."""
    parts = []
    for w in plan.windows:
        new = d[:, w.first_new - plan.num_pending : w.start + w.length - plan.num_pending]
        new = jnp.pad(new, ((0, 0), (w.first_new - w.start, 0), (0, 0)))
        parts.append(new.reshape(-1, d.shape[2]))
    return jnp.concatenate(parts)


# --- Rows moved to the left ---


class _Move(NamedTuple):
    """What is static about bringing rows."""

    wide: bool
    """Floating numbers become float32."""
    shape: tuple[int, int]
    """Of the result: batch and length."""
    sources: tuple[jax.ShapeDtypeStruct, ...]
    pending: tuple[jax.ShapeDtypeStruct, ...]


def _bring(index: Array, sources: Any, pending: Any, wide: bool, shape: tuple[int, int]) -> tuple[Array, ...]:
    """The rows that an index says, ``[*shape, ...]``; arguments as of ``rows`` of kernels/left_align.py."""
    from fwpkm.kernels.left_align import rows_launches

    names = [f"{name}{i}" for name in ("source", "pending", "into") for i in range(3)]
    arrays: dict[str, Any] = dict.fromkeys(names) | {"index": index}
    for i, x in enumerate(sources):
        dtype = jnp.float32 if wide and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        arrays |= {f"source{i}": x, f"into{i}": jax.ShapeDtypeStruct((*shape, *x.shape[2:]), dtype)}
    arrays |= {f"pending{i}": x for i, x in enumerate(pending)}
    found = run(rows_launches(len(index), tuple(math.prod(x.shape[2:]) for x in sources)), arrays, "source0")
    return tuple(found[f"into{i}"] for i in range(len(sources)))


def _moved(
    ways: tuple[Array, Array, Array | None], sources: Any, pending: Any, wide: bool, shape: tuple[int, int]
) -> tuple[Array, ...]:
    """``_bring`` by the first of the ways; gradients take the others back, to the sources and to what was pending."""
    specs = (tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in group) for group in (sources, pending))
    return _move(_Move(wide, shape, *specs), ways, tuple(sources), tuple(pending))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(move: _Move, ways: Any, sources: Any, pending: Any) -> tuple[Array, ...]:
    return _bring(ways[0], sources, pending, move.wide, move.shape)


def _move_forward(move: _Move, ways: Any, sources: Any, pending: Any) -> tuple[tuple[Array, ...], Any]:
    return _move(move, ways, sources, pending), ways[1:]


def _move_backward(move: _Move, back: Any, d: Any) -> tuple[Any, ...]:
    given, found = [_given(x) for x in d], []
    for way, specs in zip(back, (move.sources, move.pending)):
        asked = {i: given[i] for i in range(len(specs)) if given[i] is not None}
        brought = _bring(way, [*asked.values()], [], False, specs[0].shape[:2]) if asked else ()
        of = {i: x.astype(specs[i].dtype) for i, x in zip(asked, brought)}
        found.append(tuple(of.get(i) for i in range(len(specs))))
    return None, *found


_move.defvjp(_move_forward, _move_backward)


def _left_align(
    cfg: FwPKMConfig, tokens: Tokens, ends: Array | None, num_pending: Array | None, pending_mask: Array | None,
    batch: int, longest: int,
) -> Any:  # fmt: skip
    """The ``Places`` of a call's tokens (kernels/places.py)."""
    from fwpkm.kernels.left_align import left_align_launches
    from fwpkm.kernels.places import Places

    rows, length = tokens.query.shape[:2]
    made = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    flags = jax.ShapeDtypeStruct((batch, longest), jnp.bool)
    places = Places(
        made((batch * longest,)), made((rows * length,)), made((0 if num_pending is None else batch * cfg.capacity,)),
        flags, flags, made((batch,)), made((batch,)),
    )  # fmt: skip
    told = {"token_mask": tokens.mask, "cu_seqlens": ends, "num_pending": num_pending, "pending_mask": pending_mask}
    told |= dict.fromkeys(("order", "begins"))
    arrays = {**told, **places._asdict(), "query": lax.stop_gradient(tokens.query)}
    arrays = run(left_align_launches(cfg, batch, length, longest, rows * length), arrays, "query")
    return Places(*(arrays[name] for name in Places._fields))


def _left_over(cfg: FwPKMConfig, places: Any, flags: Array, stream: Tokens) -> Tokens:
    """What of the streams is pending after a call ``[B, P, ...]``."""
    from fwpkm.kernels.left_align import left_over_launches

    (batch, longest), made = places.mask.shape, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    arrays = {
        "flags": flags, "lengths": places.lengths, "due": places.due, "index": made((batch * cfg.capacity,)),
        "inverse": made((batch * longest,)), "mask": jax.ShapeDtypeStruct((batch, cfg.capacity), jnp.bool),
    }  # fmt: skip
    arrays = run(left_over_launches(cfg, batch, longest), arrays, "flags")
    mask, numbers = arrays["mask"], {name: x for name, x in stream.present().items() if name in NUMBERS}
    ways = arrays["index"], arrays["inverse"], None
    if cfg.capacity:
        found = _moved(ways, [*numbers.values()], [], True, mask.shape)
    else:
        found = tuple(x[:, :0].astype(jnp.float32) for x in numbers.values())
    left = filled(jnp.float32, Tokens(**dict(zip(numbers, found)), mask=mask))
    return left._replace(**{name: getattr(left, name) * mask for name in SCALARS if name not in numbers})


# --- The functions ---


class Read(NamedTuple):
    """What ``apply`` gives."""

    output: Array
    state: Any
    """None where nothing was to be updated; its memory and uses are None where nothing was written."""
    trace: Trace
    weights: Array
    """Those of the trace, differentiable."""


def apply(
    cfg: FwPKMConfig, state: State, tokens: Tokens, ends: Array | None, begins: bool, is_alike: bool, longest: int
) -> Read:
    """Read T tokens and write every chunk that they complete.

    Args:
        cfg: the configuration.
        state: where the rows stand.
        tokens: those of the call; gate and mask may be None.
        ends: cu_seqlens, legal, or None.
        begins: it is known that nothing is pending.
        is_alike: besides, all rows read all tokens.
        longest: the tokens of the longest stream, or as many as there can be.
    """
    if is_alike:
        return _apply_alike(cfg, state, tokens)
    return _apply_ragged(cfg, longest, True, begins, state, tokens, ends)


def read(cfg: FwPKMConfig, memory: Memory, tokens: Tokens, ends: Array | None, longest: int) -> Read:
    """``apply`` that updates nothing. Without a mask and ``ends``, one memory serves all rows."""
    if ends is None and (tokens.mask is None or cfg.memory_scope == "batch"):
        return _read_alike(cfg, memory, tokens)
    batch = len(tokens.query) if ends is None else len(ends) - 1
    nothing: Any = State.of(memory, Tokens(None, None), jnp.zeros(batch, jnp.int32), None)
    return _apply_ragged(cfg, longest, False, True, nothing, tokens, ends)


def _traced(results: Results, reading: tuple[Array, ...], columns: int, writes: Array) -> Read:
    """Output and trace; ``reading`` is the output, the slots and the weights of the call's tokens."""
    output, slots, weights = reading
    pad = columns - results.losses.memorization.shape[1]
    losses = Losses(*(lax.stop_gradient(jnp.pad(x, ((0, 0), (0, max(0, pad))))[:, :columns]) for x in results.losses))
    trace = Trace(slots, lax.stop_gradient(weights), **losses._asdict(), writes=writes)
    return Read(output, None, trace, weights)


def _state(state: State, results: Results, left: Tokens, position: Array) -> State:
    memory: Any = None if results.keys is None else Memory(results.keys, results.values)
    return State.of(memory, left, position, results.uses)


@placed
@functools.partial(jax.jit, static_argnums=(0,))
def _apply_alike(cfg: FwPKMConfig, state: State, tokens: Tokens) -> Read:
    """Of rows that have nothing pending and read all of the call's tokens."""
    from fwpkm.kernels.runtime import windows

    batch, length = tokens.query.shape[:2]
    plan = windows.plan(cfg, 0, length, batch, True)
    settings = Settings(cfg, plan, tokens.query.dtype.name)
    results = call(settings, *alike(state.memory, state.maybe_uses if plan.num_writes else None, tokens, None))
    reading = results.output, results.slots, results.weights
    memories = len(state.memory.keys)
    writes = jnp.full(memories, plan.num_writes, jnp.int32)
    done = _traced(results, reading, schedule.max_writes(cfg, length), writes)
    left = filled(jnp.float32, tokens.slice(plan.first_unwritten, None))
    flags = results.flags[: batch * plan.num_tokens].reshape(batch, -1)[:, plan.first_unwritten :]
    left = without(left, (flags & _DEAD) != 0)
    behind = cfg.capacity - left.length
    left = left.map(lambda x: jnp.pad(x, [(0, 0), (0, behind), *[(0, 0)] * (x.ndim - 2)]))
    position = schedule.reduced(cfg, state.position) + length
    return done._replace(state=_state(state, results, left, position))


@placed
@functools.partial(jax.jit, static_argnums=(0,))
def _read_alike(cfg: FwPKMConfig, memory: Memory, tokens: Tokens) -> Read:
    from fwpkm.kernels.runtime import windows

    batch, length = tokens.query.shape[:2]
    settings = Settings(cfg, windows.plan(cfg, 0, length, batch, False), tokens.query.dtype.name)
    results = call(settings, *alike(memory, None, tokens, None))
    columns, memories = schedule.max_writes(cfg, length), batch if cfg.memory_scope == "sequence" else 1
    none = Losses(*jnp.zeros((2, memories, 0), jnp.float32))
    writes = jnp.zeros(memories, jnp.int32)
    reading = results.output, results.slots, results.weights
    return _traced(results._replace(losses=none), reading, columns, writes)


@placed
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _apply_ragged(
    cfg: FwPKMConfig, longest: int, update: bool, begins: bool, state: State, tokens: Tokens, ends: Array | None
) -> Read:
    """Of any rows, moved to the left; their streams have at most ``longest`` tokens."""
    from fwpkm.kernels.runtime import windows

    batch, memories, pending, num_pending = len(state.position), len(state.memory.keys), [], None
    if not begins and cfg.capacity:
        num_pending = schedule.pending(cfg, state.position)
        pending = [getattr(state.pending, name) for name in NUMBERS]
    places = _left_align(cfg, tokens, ends, num_pending, state.pending.mask if pending else None, batch, longest)
    inputs = tokens
    if pending:  # as what is pending has them
        whole = filled(jnp.float32, tokens)
        inputs = tokens._replace(**{name: getattr(whole, name) for name in SCALARS})
    numbers = {name: x for name, x in inputs.present().items() if name in NUMBERS}
    ways = places.cells, places.entries, places.pending_entries if pending else None
    moved = _moved(ways, [*numbers.values()], pending, bool(pending), (batch, longest))
    stream = Tokens(**dict(zip(numbers, moved)), mask=places.mask)
    plan = windows.plan(cfg, 0, longest, batch, update)
    settings = Settings(cfg, plan, tokens.query.dtype.name)
    uses = state.maybe_uses if plan.num_writes else None
    results = call(settings, *alike(state.memory, uses, stream, places.pair if update else None))
    given = results.output, results.slots, results.weights
    reading = _moved((places.entries, places.cells, None), given, [], False, tokens.query.shape[:2])
    due = places.due if update else jnp.zeros_like(places.due)
    writes = due.reshape(memories, -1)[:, 0]
    done = _traced(results, reading, schedule.max_writes(cfg, tokens.length), writes)
    if not update:
        return done
    left = _left_over(cfg, places, results.flags, stream)
    new = places.lengths if num_pending is None else places.lengths - num_pending
    return done._replace(state=_state(state, results, left, schedule.reduced(cfg, state.position) + new))


def lookup(cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
    """Read the tables."""
    nothing = jnp.zeros((*query.shape[:2], cfg.value_dim), query.dtype)
    done = _read_alike(cfg, memory, Tokens(query, nothing))
    return Lookup(done.output, done.trace.slots, done.weights)


def write(
    cfg: FwPKMConfig, memory: Memory, uses: Array | None, chunk: Tokens, pair: Array | None, shifted: bool
) -> Results:
    """Write one chunk, whose values are targets already where they are ``shifted``."""
    from fwpkm.kernels.runtime import windows

    if shifted:
        cfg = dataclasses.replace(cfg, lookahead=0, chunk_size=_EVERY_TOKEN)
    batch, length = chunk.query.shape[:2]
    settings = Settings(cfg, windows.write(length, batch, shifted), chunk.query.dtype.name)
    return call(settings, *alike(memory, uses, chunk, pair))


def decode(cfg: FwPKMConfig, state: State, tokens: Tokens) -> tuple[Array, State]:
    """Read one token of each row and write the chunks that they complete, in place where the state is donated."""
    from fwpkm.kernels.runtime import decoding

    batch = len(state.position)
    one = decoding.decode_call(cfg, batch, len(state.memory.keys))
    arrays = {
        **state._asdict(), **{f"token_{name}": x for name, x in tokens._asdict().items()}, "keys": state.memory.keys,
        "table": state.memory.values, "uses": state.maybe_uses,
        "output": jax.ShapeDtypeStruct((batch, 1, cfg.value_dim), tokens.query.dtype),
    }  # fmt: skip
    arrays = run(decoding.decode_launches(one), arrays, "token_query")
    pending = state.pending._replace(**{name: arrays[f"pending_{name}"] for name in Tokens._fields})
    memory = Memory(arrays["keys"], arrays["table"])
    return arrays["output"], State.of(memory, pending, arrays["position"], arrays["uses"])
