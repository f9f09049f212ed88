"""Packed states (protocol.py): the bits come back, only what differs is kept, and nothing else is taken for it."""

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from asserting import assert_same_bits
from layer_files import CFG, half_read_state

from fwpkm import FwPKMConfig, Memory, PackedState, State, packing, reference, schedule
from fwpkm.conformance.running import as_numpy, native

SHARED = dataclasses.replace(CFG, memory_scope="batch")


def initial(be: Any, dtype: str = "float32") -> Memory:
    """The memory that ``half_read_state`` begins from."""
    return native(be, Memory(*(x.astype(dtype) for x in reference.init_memory(CFG, 1, seed=3))))


def half(be: Any, cfg: FwPKMConfig = CFG, tokens: int = 7, dtype: str = "float32") -> State:
    """``half_read_state`` of the reference, in which JAX need not compile anything."""
    return native(be, half_read_state(reference, cfg, tokens, dtype))


def numbers(cfg: FwPKMConfig, batch: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    query, value = draw((batch, length, cfg.num_heads * cfg.key_dim)), draw((batch, length, cfg.value_dim))
    return query.astype(np.float32), value.astype(np.float32)


def own_memories(cfg: FwPKMConfig, batch: int) -> tuple[Memory, State]:
    """Tables of each row's own, and the state of rows that have read some tokens from them."""
    memory = reference.init_memory(cfg, batch, seed=5)
    query, value = numbers(cfg, batch, 7)
    mask = np.arange(7) >= np.arange(batch)[:, None]  # at different positions
    return memory, reference.apply(cfg, reference.init_state(cfg, memory, batch), query, value, mask=mask)[1]


# The bits come back


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cfg", [CFG, dataclasses.replace(CFG, boundary="wait"), SHARED], ids=["drop", "wait", "batch"])
def test_a_state_comes_back_bit_for_bit(be: Any, cfg: FwPKMConfig, dtype: str) -> None:
    for tokens in (0, 2, 7):
        state, memory = half(be, cfg, tokens, dtype), initial(be, dtype)
        packed = be.pack(cfg, state, memory)
        assert type(packed) is PackedState
        unpacked = be.unpack(cfg, packed, memory)
        assert type(unpacked.memory.values) is type(state.memory.values)
        assert_same_bits(as_numpy(be, unpacked), as_numpy(be, state))
        assert (len(packed.slots) > 0) == (tokens == 7)


def test_what_every_backend_packs_is_the_same(be: Any) -> None:
    """So what one packs another may unpack."""
    memory, state = own_memories(CFG, 3)
    ours, theirs = reference.pack(CFG, state, memory), be.pack(CFG, native(be, state), native(be, memory))
    for name, x in packing.arrays(ours).items():
        np.testing.assert_array_equal(packing.arrays(theirs)[name].view(np.uint8), x.view(np.uint8), err_msg=name)
    assert ours.nbytes == theirs.nbytes
    assert_same_bits(as_numpy(be, be.unpack(CFG, ours, native(be, memory))), state)
    assert_same_bits(reference.unpack(CFG, theirs, memory), state)


def test_reading_goes_on_as_if_nothing_had_been_packed(be: Any) -> None:
    state, memory = half(be), initial(be)
    unpacked = be.unpack(CFG, be.pack(CFG, state, memory), memory)
    query, value = native(be, numbers(CFG, 2, 9))
    (out, end, _), (out2, end2, _) = (be.apply(CFG, s, query, value) for s in (state, unpacked))
    assert_same_bits(as_numpy(be, (out, end)), as_numpy(be, (out2, end2)))


def test_several_packed_states_make_one_batch(be: Any) -> None:
    """Of one memory for all, and of one for each row; rows are packed by themselves."""
    memory, state = (native(be, x) for x in own_memories(CFG, 3))
    rows = [be.pack(CFG, be.select(CFG, state, [r]), Memory(*(x[r : r + 1] for x in memory))) for r in range(3)]
    picked = be.unpack(
        CFG, [rows[2], rows[0]], Memory(*(be.asarray(be.to_numpy(x)[[2, 0]], "float32") for x in memory))
    )
    assert_same_bits(as_numpy(be, picked), as_numpy(be, be.select(CFG, state, [2, 0])))
    both = be.pack(CFG, half(be), initial(be))
    again = be.unpack(CFG, [both, both], initial(be))
    assert_same_bits(as_numpy(be, again), as_numpy(be, be.concat(CFG, [half(be), half(be)])))


def test_rows_that_share_a_table(be: Any) -> None:
    state, memory = half(be), initial(be)
    beams = be.select(CFG, be.select(CFG, state, [1]), [0, 0, 0])
    packed = be.pack(CFG, beams, memory)
    assert_same_bits(as_numpy(be, be.unpack(CFG, packed, memory)), as_numpy(be, beams))
    same = Memory(*(native(be, np.broadcast_to(be.to_numpy(x), (3, *x.shape[1:]))) for x in memory))
    assert_same_bits(as_numpy(be, be.unpack(CFG, packed, same)), as_numpy(be, beams))  # as B tables, those are equal


# What is kept


def bits(x: float, payload: int = 0) -> np.float32:
    return (np.array(x, np.float32).view(np.uint32) + np.uint32(payload)).view(np.float32)[()]


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (0.0, -0.0, True),
        (-0.0, -0.0, False),
        (np.nan, np.nan, False),
        (np.nan, bits(np.nan, 1), True),
        (bits(0.0), bits(0.0, 1), True),
        (1.0, bits(1.0, 1), True),
        (np.inf, np.inf, False),
        (np.inf, -np.inf, True),
    ],
)
def test_rows_are_told_by_their_bits(be: Any, before: float, after: float, kept: bool) -> None:
    memory = reference.init_memory(CFG, 1)
    memory.values[0, 4, 2] = before
    state = reference.init_state(CFG, memory, 2)
    state.memory.values[1, 4, 2] = after
    packed = be.pack(CFG, native(be, state), native(be, memory))
    assert packed.slots.tolist() == [4] * kept
    assert packed.counts.tolist() == [0, int(kept)]
    assert_same_bits(as_numpy(be, be.unpack(CFG, packed, native(be, memory))), state)


WIDE = FwPKMConfig(key_dim=8, value_dim=64, num_subkeys=32, top_k=4, chunk_size=256)


def test_a_packed_state_costs_what_it_holds(be: Any) -> None:
    """Of 1024 rows a few, and of 256 pending tokens those that are there: the bound of protocol.py, without 64 KiB."""
    memory = reference.init_memory(WIDE, 1)
    state = reference.init_state(WIDE, memory, 2)
    query, value = numbers(WIDE, 2, 260)
    mask = np.ones((2, 260), bool)
    mask[1, 3:] = False
    state = reference.apply(WIDE, state, query, value, mask=mask)[1]
    packed = be.pack(WIDE, native(be, state), native(be, memory))
    rows = sum(a.tobytes() != b.tobytes() for table in state.memory.values for a, b in zip(table, memory.values[0]))
    assert 100 < rows < 1024
    assert len(packed.slots) == rows
    assert len(packed.pending.query) == 4 + 3
    token, small = (8 + 64 + 1) * 4 + 1, 1024
    most = 1.1 * 4 * 64 * rows + state.memory.keys.nbytes + 7 * token + small
    assert packed.nbytes <= most
    assert packed.nbytes >= 4 * 64 * rows + state.memory.keys.nbytes + 7 * token
    rounded = be.pack(WIDE, native(be, state), native(be, memory), "bfloat16")
    assert packed.nbytes - rounded.nbytes == 2 * 64 * rows


def test_nothing_is_shared(be: Any) -> None:
    """The state may be overwritten, and what is packed too."""
    state, memory = half(be), initial(be)
    packed, expected = be.pack(CFG, state, memory), as_numpy(be, state)
    if "inplace" in inspect.signature(be.apply).parameters:
        query, value = native(be, numbers(CFG, 2, 9))
        be.apply(CFG, state, query, value, inplace=True)
    unpacked = be.unpack(CFG, packed, memory)
    for x in packing.arrays(packed).values():
        x.view(np.uint8)[...] ^= 1
    assert_same_bits(as_numpy(be, unpacked), expected)


# bfloat16


def float32_numbers() -> np.ndarray:
    """Every exponent and sign with drawn digits, ties, the limits, and what is no number."""
    rng = np.random.default_rng(0)
    signs_and_exponents = np.arange(2**9, dtype=np.uint32) << 23
    drawn = signs_and_exponents[:, None] | rng.integers(0, 2**23, (2**9, 50), dtype=np.uint32)
    ties = signs_and_exponents[:, None] | np.array([0x8000, 0x18000, 0x7FFF, 0x8001, 0x7FFFFF, 0, 1], np.uint32)
    return np.concatenate([drawn, ties], axis=1).ravel().view(np.float32)


def test_bfloat16_rounds_to_nearest() -> None:
    x = float32_numbers()
    rounded = packing.float_rows(packing.to_bfloat16(x))
    expected = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    known = np.isfinite(x) & np.isfinite(expected)  # torch lets the largest numbers overflow
    np.testing.assert_array_equal(rounded[known].view(np.uint32), expected[known].view(np.uint32))
    assert np.isnan(rounded[np.isnan(x)]).all()
    np.testing.assert_array_equal(rounded[np.isinf(x)], x[np.isinf(x)])


def test_the_error_of_bfloat16_is_what_its_documentation_says() -> None:
    x = float32_numbers()
    x = x[np.isfinite(x)]
    error = np.abs(packing.float_rows(packing.to_bfloat16(x)).astype(np.float64) - x)
    normal = np.abs(x) >= 2.0**-126
    assert (error[normal] <= 2.0**-8 * np.abs(x[normal], dtype=np.float64)).all()
    assert (error[normal] > 0.9 * 2.0**-8 * np.abs(x[normal], dtype=np.float64)).any()
    assert (error[~normal] <= 2.0**-134).all()


def test_rounded_rows_beside_others(be: Any) -> None:
    """Rows alone are rounded; keys, tokens and rows that nobody wrote keep their bits, and what is rounded stays so."""
    state, memory = half(be), initial(be)
    packed, rounded = (be.pack(CFG, state, memory, dtype) for dtype in (None, "bfloat16"))
    assert rounded.values.dtype == np.uint16
    unpacked = be.unpack(CFG, [rounded, packed], memory)
    first, second = (as_numpy(be, be.select(CFG, unpacked, rows)) for rows in ([0, 1], [2, 3]))
    exact = as_numpy(be, state)
    assert_same_bits(second, exact)
    expected = exact.memory.values.copy()
    for m, slots in enumerate(np.split(packed.slots, np.cumsum(packed.counts)[:-1])):
        expected[m, slots] = packing.float_rows(packing.to_bfloat16(expected[m, slots]))
    assert (expected != exact.memory.values).any()
    assert_same_bits(first, exact._replace(memory=exact.memory._replace(values=expected)))
    state = be.select(CFG, unpacked, [0, 1])
    assert be.pack(CFG, state, memory, "bfloat16").values.tobytes() == rounded.values.tobytes()


# What is refused


def message(function: Any, *args: Any) -> str:
    with pytest.raises(ValueError, match=r"Received: ") as caught:
        function(*args)
    return str(caught.value)


def test_another_initial_memory_is_refused(be: Any) -> None:
    memory, state = own_memories(CFG, 2)
    packed = reference.pack(CFG, state, memory)
    untouched = next(slot for slot in range(9) if slot not in packed.slots[packed.counts[0] :])
    for table, index in (("keys", (1, 0, 0, 0, 0)), ("values", (1, untouched, 0))):
        other = Memory(*(x.copy() for x in memory))
        changed = getattr(other, table)
        changed[index] = -changed[index]
        text = message(be.unpack, CFG, packed, native(be, other))
        assert "for 1 of 2 memories, first for 1. Pass what pack was given" in text
    turned = Memory(*(x[::-1].copy() for x in memory))
    assert "for 2 of 2 memories" in message(be.unpack, CFG, packed, native(be, turned))
    alone = Memory(*(x[:1] for x in memory))
    assert "for 1 of 2 memories, first for 1" in message(be.unpack, CFG, packed, native(be, alone))


@pytest.mark.parametrize("field", ["learning_rate", "write_scale", "top_k", "chunk_size", "boundary", "memory_scope"])
def test_another_configuration_is_refused(field: str) -> None:
    values = {"learning_rate": 0.5, "write_scale": "unit", "top_k": 1, "chunk_size": 5, "boundary": "wait"}
    other = dataclasses.replace(CFG, **{field: values.get(field, "batch")})
    packed = reference.pack(CFG, half(reference), initial(reference))
    text = message(reference.unpack, other, packed, initial(reference))
    assert text.startswith(
        f"cfg must be the configuration of packed: {field}={getattr(CFG, field)!r}. Received: {field}="
    )


def test_arguments_that_do_not_fit_are_refused(be: Any) -> None:
    state, memory = half(be), initial(be)
    packed = be.pack(CFG, state, memory)
    wide = Memory(*(be.asarray(be.to_numpy(x), "float64") for x in memory))
    three, double = be.init_memory(CFG, 3), half(be, dtype="float64")
    shared = be.pack(SHARED, half(be, SHARED), memory)
    for words, function, *args in (
        ("dtype must be None, which keeps the rows' bits, or 'bfloat16'", be.pack, CFG, state, memory, "float16"),
        (
            "dtype must be None for tables of float64",
            be.pack,
            CFG,
            double,
            wide,
            "bfloat16",
        ),
        ("memory must have tables of dtype float32", be.pack, CFG, state, wide),
        ("memory must hold 1 or 2 tables", be.pack, CFG, state, three),
        ("state must be a fwpkm.State", be.pack, CFG, packed, memory),
        ("state.position must hold", be.pack, CFG, state._replace(position=state.position - 9), memory),
        ("cfg must be an FwPKMConfig", be.pack, None, state, memory),
        ("memory must hold 1 or 2 tables", be.unpack, CFG, packed, three),
        ("packed must have tables of the memory's dtype, float64", be.unpack, CFG, packed, wide),
        ("packed must be a fwpkm.PackedState, or a list of at least one", be.unpack, CFG, [], memory),
        ("packed must be a fwpkm.PackedState, or a list of at least one", be.unpack, CFG, state.position, memory),
        ("packed[1] must be a fwpkm.PackedState", be.unpack, CFG, [packed, state], memory),
        ("packed must be one packed state where one memory serves", be.unpack, SHARED, [shared, shared], memory),
    ):
        assert words in message(function, *args)


def changed(packed: PackedState, **arrays: Any) -> PackedState:
    return dataclasses.replace(packed, **{name: np.array(x, getattr(packed, name).dtype) for name, x in arrays.items()})


def test_a_packed_state_that_contradicts_itself_is_refused() -> None:
    packed = reference.pack(CFG, half(reference), initial(reference))
    slots, first, n = packed.slots, packed.counts[0], len(packed.slots)
    backwards = np.concatenate([slots[:first][::-1], slots[first:]])
    pending = packed.pending
    for words, wrong in (
        ("packed.position must hold numbers of at least 0", changed(packed, position=[-1, 7])),
        ("packed.pending must hold the 5 tokens", dataclasses.replace(packed, pending=pending.map(lambda x: x[1:]))),
        ("packed.counts must hold numbers of at least 0", changed(packed, counts=[-1, n + 1])),
        (f"packed.counts must hold numbers of at least 0 that make {n}", changed(packed, counts=[n, n])),
        ("packed.slots must hold ids in [0, 9), rising", changed(packed, slots=slots + 8)),
        ("packed.slots must hold ids in [0, 9), rising", changed(packed, slots=slots - 9)),
        ("packed.slots must hold ids in [0, 9), rising", changed(packed, slots=backwards)),
        ("packed.slots must hold ids in [0, 9), rising", changed(packed, slots=[slots[0]] * n)),
        ("packed.slots must have dtype int32", dataclasses.replace(packed, slots=slots.astype(np.int64))),
        ("packed.values must have shape [n=", changed(packed, values=packed.values[1:])),
        ("packed.values must have the keys' dtype", dataclasses.replace(packed, values=packed.values.astype("f8"))),
        ("packed.values must be a NumPy array", dataclasses.replace(packed, values=None)),
        ("packed.initial must have shape [M=2, 32]", changed(packed, initial=packed.initial[:1])),
        ("packed.keys must have shape", changed(packed, keys=packed.keys[:1])),
        (
            "packed.pending_gate must have shape",
            dataclasses.replace(packed, pending=pending._replace(gate=pending.value)),
        ),
        (
            "packed.pending_mask must have dtype bool",
            dataclasses.replace(packed, pending=pending._replace(mask=pending.gate)),
        ),
        ("cfg must be an FwPKMConfig", dataclasses.replace(packed, config=None)),
    ):
        assert words in message(reference.unpack, CFG, wrong, initial(reference))
    assert int(schedule.pending(CFG, packed.position).sum()) == 5
    reference.unpack(CFG, packed, initial(reference))
