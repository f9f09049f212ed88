"""Files of packed states, of one row's too, and of all states of a model: bits come back, bad files are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asserting import assert_same_bits
from layer_files import CFG, Metadata, Tensors, arrays, contents, half_read_state, same_bits
from test_damaged_files import edit
from test_files import failing, full_disk

import fwpkm
from fwpkm import FwPKMConfig, Memory, PackedState, State, packing, reference
from fwpkm.conformance.running import as_numpy, native

WAIT = dataclasses.replace(CFG, boundary="wait", num_subkeys=4)
MEMORY = reference.init_memory(CFG, 1, seed=3)
NAMES = ("layers.0", "layers.0.memory", "états 2")
"""One begins another, as names of modules do."""


def packed_states() -> dict[str, PackedState]:
    """A batch, one of its rows, one that is rounded, and one that has read nothing."""
    state, fresh = half_read_state(), reference.init_state(WAIT, reference.init_memory(WAIT), 1)
    return {
        "a": reference.pack(CFG, state, MEMORY),
        "a.values": reference.pack(CFG, reference.select(CFG, state, [1]), MEMORY),
        "rounded": reference.pack(CFG, state, MEMORY, "bfloat16"),
        "new": reference.pack(WAIT, fresh, reference.init_memory(WAIT)),
    }


def states() -> tuple[dict[str, State], dict[str, FwPKMConfig]]:
    cfgs = dict(zip(NAMES, (CFG, WAIT, CFG)))
    return {name: half_read_state(cfg=cfg, tokens=5 + i) for i, (name, cfg) in enumerate(cfgs.items())}, cfgs


@pytest.fixture
def packed_file(tmp_path: Path) -> Path:
    fwpkm.save_packed(tmp_path / "packed", packed_states())
    return tmp_path / "packed"


@pytest.fixture
def states_file(tmp_path: Path) -> Path:
    fwpkm.save_states(tmp_path / "states", *states())
    return tmp_path / "states"


def read_states(path: Path) -> dict[str, State]:
    return fwpkm.load_states(path, states()[1], "numpy")


READERS = {"packed": fwpkm.load_packed, "states": read_states}


@pytest.fixture(params=["packed", "states"])
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_file")
    return found


def refused(path: Path, *words: object) -> None:
    with pytest.raises(ValueError, match=r"Expected: .+\. Received: ") as caught:
        READERS[path.name](path)
    for word in (path, *words):
        assert str(word) in str(caught.value)


# What comes back


def test_packed_states_come_back(be: Any, packed_file: Path) -> None:
    """In their order, in every backend; a row of a batch is a state of its own."""
    expected, loaded = packed_states(), fwpkm.load_packed(packed_file)
    assert list(loaded) == list(expected)
    for name, one in expected.items():
        assert loaded[name].config == one.config
        assert same_bits(packing.arrays(loaded[name]), packing.arrays(one))
    unpacked = be.unpack(CFG, [loaded["a.values"], loaded["a"]], native(be, MEMORY))
    assert_same_bits(as_numpy(be, be.select(CFG, unpacked, [1, 2])), half_read_state())
    assert_same_bits(as_numpy(be, be.select(CFG, unpacked, [0])), reference.select(CFG, half_read_state(), [1]))


def test_a_packed_file_is_small(tmp_path: Path) -> None:
    """A conversation of a few tokens costs what it holds, on the disk too."""
    cfg = FwPKMConfig(key_dim=4, value_dim=64, num_subkeys=64, chunk_size=8)
    memory = reference.init_memory(cfg)
    tokens = (np.random.default_rng(0).normal(size=(1, 20, n)).astype("f4") for n in (4, 64))
    state = reference.apply(cfg, reference.init_state(cfg, memory, 1), *tokens)[1]
    packed = reference.pack(cfg, state, memory)
    fwpkm.save_packed(tmp_path / "packed", {"row": packed})
    fwpkm.save_state(tmp_path / "state", state, cfg)
    assert (tmp_path / "packed").stat().st_size < packed.nbytes + 4096
    assert (tmp_path / "packed").stat().st_size < (tmp_path / "state").stat().st_size / 10


def test_states_of_a_model_come_back(be: Any, tmp_path: Path) -> None:
    expected, cfgs = states()
    fwpkm.save_states(tmp_path / "states", {name: native(be, x) for name, x in expected.items()}, cfgs)
    loaded = fwpkm.load_states(tmp_path / "states", cfgs, be)
    assert list(loaded) == list(NAMES)
    for name, state in expected.items():
        assert type(loaded[name].memory.values) is type(native(be, state).memory.values)
        assert same_bits(arrays(loaded[name], be), arrays(state))


def test_one_config_may_serve_all(tmp_path: Path) -> None:
    pair = {"b": half_read_state(), "a": half_read_state(tokens=2)}
    fwpkm.save_states(tmp_path / "states", pair, CFG)
    loaded = fwpkm.load_states(tmp_path / "states", CFG, "numpy")
    assert list(loaded) == ["b", "a"]
    assert all(same_bits(arrays(loaded[name]), arrays(state)) for name, state in pair.items())
    with pytest.raises(ValueError, match=r"differs in b\.num_subkeys, b\.boundary, a\.num_subkeys"):
        fwpkm.load_states(tmp_path / "states", WAIT, "numpy")


# What is refused


def test_truncated_anywhere(path: Path) -> None:
    whole = path.read_bytes()
    for size in {*range(0, len(whole), len(whole) // 40), 7, 8, 9, len(whole) - 1}:
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)


def test_flipped_bytes(path: Path) -> None:
    """Some fifty of the header, and of the tensors."""
    whole, kept, unnoticed = path.read_bytes(), READERS[path.name](path), []
    begin = 8 + int.from_bytes(whole[:8], "little")
    for index in (*range(0, begin, begin // 50), *range(begin, len(whole), (len(whole) - begin) // 50)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        try:
            loaded = READERS[path.name](path)
        except ValueError:
            continue
        unnoticed.append(index)
        for one, other in zip(loaded.values(), kept.values()):  # a name or a field of a packed config may be another
            parts = [arrays(x) if isinstance(x, State) else packing.arrays(x) for x in (one, other)]
            assert same_bits(*parts)
    assert all(index < begin for index in unnoticed)


@pytest.mark.parametrize("key", ["format_version", "kind", "config", "sha256"])
@pytest.mark.parametrize("value", [None, "", "3", "[]", "{}", '{"a": 3}', "[" * 100_000])
def test_unreadable_metadata(path: Path, key: str, value: str | None) -> None:
    def change(tensors: Tensors, metadata: Metadata) -> None:
        metadata.pop(key) if value is None else metadata.update({key: value})

    edit(path, change, sign=False)
    with pytest.raises(ValueError, match=r"Received: "):
        READERS[path.name](path)


def test_files_of_another_kind(path: Path, layer_file: Path, state_file: Path) -> None:
    for other in (layer_file, state_file):
        with pytest.raises(ValueError, match=r"not the file of a set of .*Read layers with fwpkm.load"):
            READERS[path.name](other)
    with pytest.raises(ValueError, match=r"not the file of a state.*load_packed"):
        fwpkm.load_state(path, CFG, "numpy")


def test_missing_extra_and_misshapen_tensors(path: Path) -> None:
    whole, tensors = path.read_bytes(), contents(path)[0]
    for name in [name for name in tensors if name.startswith((f"{NAMES[1]}.", "a.values."))]:
        tensor = tensors[name]
        edit(path, lambda tensors, _, name=name: tensors.pop(name))
        refused(path, "wrong tensors: missing")
        path.write_bytes(whole)
        for wrong in (np.concatenate([tensor, tensor, tensor[:1]]), tensor[..., None], tensor.astype(np.float16)):
            edit(path, lambda tensors, _, name=name, wrong=wrong: tensors.update({name: wrong}))
            refused(path, "wrong shape or dtype")
            path.write_bytes(whole)
    edit(path, lambda tensors, _: tensors.update(more=np.zeros(1, np.float32)))
    refused(path, "missing [], unknown ['more']")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("a.position", lambda x: x - 9, "bad a.position. Expected: numbers of at least 0"),
        ("a.position", lambda x: x + 1, "bad a.pending. Expected: the 3 tokens"),
        ("a.counts", lambda x: x * 0, "bad a.counts"),
        ("a.slots", lambda x: x[::-1], "bad a.slots. Expected: ids in [0, 9), rising"),
        ("a.slots", lambda x: x * 5, "bad a.slots. Expected: ids in [0, 9), rising"),
    ],
)
def test_numbers_that_cannot_be(packed_file: Path, name: str, change: Any, words: str) -> None:
    edit(packed_file, lambda tensors, _: tensors.update({name: change(tensors[name])}))
    refused(packed_file, words)


def test_a_state_at_no_position(states_file: Path) -> None:
    edit(states_file, lambda tensors, _: tensors.update({f"{NAMES[1]}.position": np.array([-1, 2], np.int32)}))
    refused(states_file, f"bad {NAMES[1]}.position. Expected: numbers of at least 0")


@pytest.mark.parametrize("field", ["forget", "top_k"])
def test_a_packed_config_that_this_release_does_not_know(packed_file: Path, field: str) -> None:
    def change(tensors: Tensors, metadata: Metadata) -> None:
        configs = json.loads(metadata["config"])
        configs["a"][field] = -1
        metadata["config"] = json.dumps(configs)

    edit(packed_file, change)
    refused(packed_file, "unreadable metadata 'config' of a", field)


def test_names_that_do_not_fit(tmp_path: Path, states_file: Path) -> None:
    several, cfgs = states()
    packed = packed_states()
    fewer = {name: cfgs[name] for name in NAMES[:2]}
    for words, call in (
        ("cfgs must have a config for each of states", lambda p: fwpkm.save_states(p, several, fewer)),
        ("cfgs must have a config for each of", lambda p: fwpkm.load_states(states_file, fewer, "numpy")),
        ("have ['more'] beside", lambda p: fwpkm.load_states(states_file, cfgs | {"more": CFG}, "numpy")),
        ("cfg must be an FwPKMConfig", lambda p: fwpkm.save_states(p, several, None)),
        ("cfg must be an FwPKMConfig", lambda p: fwpkm.load_states(states_file, dict.fromkeys(NAMES), "numpy")),
        ("states must be a dict of at least one, by name. Received: none", lambda p: fwpkm.save_states(p, {}, CFG)),
        ("states must be a dict", lambda p: fwpkm.save_states(p, half_read_state(), CFG)),
        ("states must have texts for names", lambda p: fwpkm.save_states(p, {0: half_read_state()}, CFG)),
        ("states['a'] must be a fwpkm.State", lambda p: fwpkm.save_states(p, {"a": packed["a"]}, CFG)),
        (
            "Pass states['a'] as apply or flush returned it, and the config that it was made with",
            lambda p: fwpkm.save_states(p, {"a": half_read_state()}, WAIT),
        ),
        ("packed must be a dict", lambda p: fwpkm.save_packed(p, packed["a"])),
        ("packed must have texts for names", lambda p: fwpkm.save_packed(p, {"": packed["a"]})),
        ("packed['a'] must be a fwpkm.PackedState", lambda p: fwpkm.save_packed(p, {"a": half_read_state()})),
        ("device must be None", lambda p: fwpkm.load_states(states_file, cfgs, "numpy", device="cpu")),
    ):
        with pytest.raises(ValueError, match=r"Received: ") as caught:
            call(tmp_path / "new")
        assert words in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("trouble", [full_disk, lambda: failing("replace", OSError("held open"))])
def test_a_failed_save_leaves_the_old_file(path: Path, trouble: Any) -> None:
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    other = {"other": reference.pack(CFG, half_read_state(tokens=3), MEMORY)}
    save = {
        "packed": lambda: fwpkm.save_packed(path, other),
        "states": lambda: fwpkm.save_states(path, {"other": half_read_state()}, CFG),
    }[path.name]
    with pytest.raises(OSError), trouble():  # noqa: PT011 (of the disk)
        save()
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_the_initial_memory_is_asked_for(packed_file: Path) -> None:
    other = Memory(MEMORY.keys, MEMORY.values + 1)
    with pytest.raises(ValueError, match="memory must be the initial memory that the state was packed beside"):
        reference.unpack(CFG, fwpkm.load_packed(packed_file)["a"], other)
