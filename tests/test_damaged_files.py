"""Files (SPEC.md §8) that are damaged, of another kind or of another config change nothing."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from layer_files import CFG, FakeLayer, Metadata, Tensors, contents, half_read_state, same_bits

import fwpkm
from fwpkm import FwPKMConfig, reference


def edit(path: Path, change: Callable[[Tensors, Metadata], None], *, sign: bool = True) -> None:
    """Rewrite a file with other contents, with checksums that fit them unless ``sign`` is False."""
    tensors, metadata = contents(path)
    change(tensors, metadata)
    if sign:
        digests = {name: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for name, x in tensors.items()}
        metadata.setdefault("sha256", "")
        metadata["sha256"] = json.dumps(digests)
        if "config" in metadata:
            metadata["config_sha256"] = hashlib.sha256(metadata["config"].encode()).hexdigest()
    path.write_bytes(safetensors.numpy.save({name: np.asarray(x, order="C") for name, x in tensors.items()}, metadata))


def refused_layer(path: Path, *words: object, layer: FakeLayer | None = None) -> None:
    """The file is refused with the whole story, and the layer keeps what it had."""
    layer = layer or FakeLayer(1)
    with pytest.raises(ValueError, match=r"Expected: .+\. Received: ") as caught:
        fwpkm.load(path, layer)
    assert layer.imports == 0
    assert_words(caught.value, path, *words)


def refused_state(path: Path, *words: object, cfg: FwPKMConfig = CFG) -> None:
    class NoBackend:
        @staticmethod
        def asarray(x: np.ndarray, dtype: str) -> None:
            pytest.fail("an array was built from a bad file")

    with pytest.raises(ValueError, match=r"Expected: .+\. Received: ") as caught:
        fwpkm.load_state(path, cfg, NoBackend)
    assert_words(caught.value, path, *words)


def assert_words(error: Exception, *words: object) -> None:
    for word in words:
        assert str(word) in str(error)


# Damaged files


@pytest.mark.parametrize(
    "data", [b"", b"no safetensors file at all", b"\xff" * 64, b"PK\x03\x04" + bytes(60)], ids=repr
)
def test_not_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    refused_layer(path, "not a whole safetensors file")
    refused_state(path, "not a whole safetensors file")


def test_safetensors_of_someone_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(safetensors.numpy.save(FakeLayer(0).tensors))
    refused_layer(path, "format_version", "'1'", "None")
    refused_state(path, "format_version", "'1'", "None")


def test_truncated_anywhere(layer_file: Path, state_file: Path) -> None:
    for path, refused in ((layer_file, refused_layer), (state_file, refused_state)):
        whole = path.read_bytes()
        for size in {*range(0, len(whole), 7), 7, 8, 9, len(whole) - 1}:
            path.write_bytes(whole[:size])
            refused(path)
        path.write_bytes(whole + b"\0")
        refused(path)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_no_flipped_byte_goes_unnoticed(layer_file: Path, flip: int) -> None:
    """In the header too: each single flip is refused, or names the same tensors with the same bits."""
    whole, expected, layer = layer_file.read_bytes(), FakeLayer(0).tensors, FakeLayer(1)
    begin = 8 + int.from_bytes(whole[:8], "little")
    unnoticed = []
    for index in range(len(whole)):
        layer_file.write_bytes(whole[:index] + bytes([whole[index] ^ flip]) + whole[index + 1 :])
        try:
            fwpkm.load(layer_file, layer)
        except ValueError as error:
            assert_words(error, layer_file, "Expected", "Received")
        else:
            assert same_bits(layer.tensors, expected)
            unnoticed.append(index)
    assert all(index < begin for index in unnoticed)
    assert layer.imports == len(unnoticed)


def test_flipped_byte_of_a_tensor_names_it(layer_file: Path, state_file: Path) -> None:
    def flip(tensors: Tensors, metadata: Metadata) -> None:
        tensors["memory.values"].view(np.uint8).flat[0] ^= 1

    for path, refused in ((layer_file, refused_layer), (state_file, refused_state)):
        edit(path, flip, sign=False)
        refused(path, "contents of memory.values do not match their sha256")


def test_swapped_tensors_are_noticed(tmp_path: Path) -> None:
    layer = FakeLayer(0, hidden_size=1)

    def swap(tensors: Tensors, metadata: Metadata) -> None:
        weight, bias = tensors["query_proj.weight"], tensors["query_proj.bias"]
        tensors |= {"query_proj.weight": bias.reshape(8, 1), "query_proj.bias": weight.reshape(8)}

    fwpkm.save(tmp_path / "file", layer)
    edit(tmp_path / "file", swap, sign=False)
    refused_layer(tmp_path / "file", "query_proj.weight", "query_proj.bias", "sha256", layer=layer)


@pytest.mark.parametrize("key", ["format_version", "kind", "config", "sha256"])
@pytest.mark.parametrize("value", [None, "", "{", "3", "[]", "[" * 100_000, "9" * 5000])
def test_unreadable_metadata(layer_file: Path, state_file: Path, key: str, value: str | None) -> None:
    def change(tensors: Tensors, metadata: Metadata) -> None:
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value

    for path, refused in ((layer_file, refused_layer), (state_file, refused_state)):
        edit(path, change, sign=False)
        refused(path, {"kind": "not the file of a"}.get(key, key))


@pytest.mark.parametrize("version", ["0", "2", "1.0", " 1"])
def test_unknown_format_version(layer_file: Path, state_file: Path, version: str) -> None:
    for path, refused in ((layer_file, refused_layer), (state_file, refused_state)):
        edit(path, lambda _, metadata: metadata.update(format_version=version))
        refused(path, "unknown format_version", "Expected: '1'", f"Received: {version!r}")


# Whole files that do not fit


def test_state_file_is_no_layer_file(layer_file: Path, state_file: Path) -> None:
    refused_layer(state_file, "Expected: kind 'layer'", "Received: kind 'state'", "fwpkm.load_state")
    refused_state(layer_file, "Expected: kind 'state'", "Received: kind 'layer'", "fwpkm.load")


def test_layer_of_another_spec(layer_file: Path) -> None:
    other = FakeLayer(1, hidden_size=6, config=FwPKMConfig.from_json(CFG.to_json().replace('"drop"', '"wait"')))
    words = ("hidden_size=6, config.boundary='wait'", "hidden_size=5, config.boundary='drop'")
    refused_layer(layer_file, f"Expected: {words[0]}", f"Received: {words[1]}", layer=other)


@pytest.mark.parametrize("field", json.loads(CFG.to_json()))
def test_each_field_of_the_config_counts(layer_file: Path, state_file: Path, field: str) -> None:
    fields = json.loads(CFG.to_json())
    choices = {"boundary": "wait", "score": "dot_product", "write_scale": "unit", "memory_scope": "batch"}
    smaller = {"top_k": 1, "lookahead": 0, "grad_clip": 0.5}
    fields[field] = {**choices, **smaller}.get(field, (fields[field] and fields[field] * 2) or 0.25)
    cfg = FwPKMConfig(**fields)
    wanted, saved = f"{field}={fields[field]!r}", f"{field}={getattr(CFG, field)!r}"
    refused_state(state_file, f"differs in {field}. Expected: {wanted}. Received: {saved}", cfg=cfg)
    story = f"differs in config.{field}. Expected: config.{wanted}. Received: config.{saved}"
    refused_layer(layer_file, story, layer=FakeLayer(1, config=cfg))


def test_fields_that_only_one_side_has(layer_file: Path) -> None:
    def change(tensors: Tensors, metadata: Metadata) -> None:
        spec = json.loads(metadata["config"])
        del spec["gated"], spec["config"]["score"]
        metadata["config"] = json.dumps({**spec, "depth": 2})

    edit(layer_file, change)
    refused_layer(layer_file, "Expected: gated=True, no depth. Received: no gated, depth=2")


def test_a_field_that_came_later_has_its_default(layer_file: Path, state_file: Path) -> None:
    """As ``FwPKMConfig.from_json`` says, so that files of earlier versions load."""

    def drop(tensors: Tensors, metadata: Metadata) -> None:
        spec = json.loads(metadata["config"])
        del spec.get("config", spec)["score"]
        metadata["config"] = json.dumps(spec)

    for path in (layer_file, state_file):
        edit(path, drop)
    fwpkm.load(layer_file, FakeLayer(1))
    fwpkm.load_state(state_file, CFG, "numpy")
    other = dataclasses.replace(CFG, score="dot_product")
    refused_state(state_file, "Expected: score='dot_product'. Received: score='idw'", cfg=other)
    refused_layer(layer_file, "Received: config.score='idw'", layer=FakeLayer(1, config=other))


def test_missing_and_extra_tensors(layer_file: Path, state_file: Path) -> None:
    for path, refused in ((layer_file, refused_layer), (state_file, refused_state)):
        whole = path.read_bytes()
        for name in contents(path)[0]:
            edit(path, lambda tensors, _, name=name: tensors.pop(name))
            refused(path, f"missing ['{name}'], unknown []")
            path.write_bytes(whole)
        edit(path, lambda tensors, _: tensors.update(more=np.zeros(1, np.float32)))
        refused(path, "missing [], unknown ['more']")


def test_wrong_shapes(layer_file: Path, state_file: Path) -> None:
    for path, refused in ((layer_file, refused_layer), (state_file, refused_state)):
        whole = path.read_bytes()
        for name, tensor in contents(path)[0].items():
            for wrong in (np.concatenate([tensor, tensor]), tensor[:0], tensor[..., None], tensor[0]):
                edit(path, lambda tensors, _, name=name, wrong=wrong: tensors.update({name: wrong}))
                # B is what position says: where that is wrong, the others are what does not fit.
                words = () if name == "position" else (f"{name} {wrong.shape}", f"{name} {tensor.shape}")
                refused(path, "wrong shape or dtype", *words)
                path.write_bytes(whole)


def test_wrong_dtypes(layer_file: Path, state_file: Path) -> None:
    kept = {"position": ("int32",), "pending_mask": ("bool",)}
    for path, refused in ((layer_file, refused_layer), (state_file, refused_state)):
        whole = path.read_bytes()
        for name, tensor in contents(path)[0].items():
            for dtype in {"float16", "float32", "float64", "int32", "uint32", "int64", "bool", "uint8"}:
                if dtype in kept.get(name, ("float32", "float64")):
                    continue
                wrong = tensor.astype(dtype)
                edit(path, lambda tensors, _, name=name, wrong=wrong: tensors.update({name: wrong}))
                refused(path, "wrong shape or dtype", f"Expected: {name} {tensor.shape} {tensor.dtype}")
                path.write_bytes(whole)


def test_bfloat16_is_refused_not_misread(layer_file: Path) -> None:
    whole = layer_file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    header["query_proj.bias"]["dtype"] = "BF16"
    header["query_proj.bias"]["shape"] = [16]
    text = json.dumps(header).encode()
    layer_file.write_bytes(len(text).to_bytes(8, "little") + text + whole[begin:])
    refused_layer(layer_file, "query_proj.bias (16,) BF16")


def test_tables_of_a_shared_memory_are_not_per_row(tmp_path: Path) -> None:
    shared = FwPKMConfig.from_json(CFG.to_json().replace('"sequence"', '"batch"'))
    fwpkm.save_state(tmp_path / "state", half_read_state(), CFG)
    edit(tmp_path / "state", lambda _, metadata: metadata.update(config=shared.to_json()))
    words = ("Expected: memory.keys (1, 2, 2, 3, 2)", "Received: memory.keys (2, 2, 2, 3, 2)")
    refused_state(tmp_path / "state", *words, cfg=shared)


@pytest.mark.parametrize(
    ("scope", "position"), [("sequence", [-1, -1]), ("sequence", [-(2**31), 0]), ("batch", [-1, -1]), ("batch", [7, 8])]
)
def test_bad_positions(tmp_path: Path, scope: str, position: list[int]) -> None:
    """Rows that share a memory have one clock, the others each their own."""
    cfg = dataclasses.replace(CFG, memory_scope=scope)
    state, wrong = half_read_state(cfg=cfg), np.array(position, np.int32)
    fwpkm.save_state(tmp_path / "state", state, cfg)
    edit(tmp_path / "state", lambda tensors, _: tensors.update(position=wrong))
    words = "numbers of at least 0" + ", equal in all rows" * (scope == "batch")
    refused_state(tmp_path / "state", f"Expected: {words}.", position, cfg=cfg)
    with pytest.raises(ValueError, match="position"):
        fwpkm.save_state(tmp_path / "new", state._replace(position=wrong), cfg)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["query", "value", "gate"])
def test_a_pending_token_that_is_there_is_finite(tmp_path: Path, name: str) -> None:
    """§5: one that is not waits as zeros with mask False; each backend would read another number from it."""
    state, be = half_read_state(), fwpkm.get_backend("numpy")
    wrong = getattr(state, f"pending_{name}").copy()
    wrong[1, 0] = np.nan
    assert state.pending_mask[1, 0]
    fwpkm.save_state(tmp_path / "state", state, CFG)
    edit(tmp_path / "state", lambda tensors, _: tensors.update({f"pending_{name}": wrong}))
    refused_state(tmp_path / "state", f"pending_{name}", "finite numbers where pending_mask is True", cfg=CFG)
    broken = state._replace(**{f"pending_{name}": wrong})
    with pytest.raises(ValueError, match=f"bad pending_{name}"):
        fwpkm.save_state(tmp_path / "new", broken, CFG)
    memory = be.init_memory(CFG)
    with pytest.raises(ValueError, match=rf"pending_{name} must hold finite numbers"):
        be.unpack(CFG, be.pack(CFG, broken, memory), memory)
    hidden = state.pending_mask.copy()
    hidden[1, 0] = False
    fwpkm.save_state(tmp_path / "new", broken._replace(pending_mask=hidden), CFG)


def test_a_config_that_was_changed_in_the_file_is_refused(layer_file, state_file, tmp_path):
    def change(_: Tensors, metadata: Metadata) -> None:
        metadata["config"] = metadata["config"].replace('"learning_rate": 1.0', '"learning_rate": 3.0')

    fwpkm.save_states(tmp_path / "states", {"one": half_read_state()}, CFG)
    packed = reference.pack(CFG, half_read_state(), fwpkm.Memory(*reference.init_memory(CFG, 1)))
    fwpkm.save_packed(tmp_path / "packed", {"one": packed})
    reads = {
        layer_file: lambda path: fwpkm.load(path, FakeLayer(1)),
        state_file: lambda path: fwpkm.load_state(path, CFG, "numpy"),
        tmp_path / "states": lambda path: fwpkm.load_states(path, CFG, "numpy"),
        tmp_path / "packed": fwpkm.load_packed,
    }
    for path, read in reads.items():
        edit(path, change, sign=False)
        with pytest.raises(ValueError, match=r"config does not match its sha256. Expected: .+\. Received: "):
            read(path)


def test_damage_to_the_name_of_a_digest_is_seen(state_file):
    """Else it would be a file of before, whose config nothing vouches for."""
    edit(state_file, lambda _, metadata: metadata.update(config_sha257=metadata.pop("config_sha256")), sign=False)
    refused_state(state_file, "unknown metadata config_sha257", "config_sha256")


def test_files_of_before_have_no_digest_of_their_config(state_file):
    edit(state_file, lambda _, metadata: metadata.pop("config_sha256"), sign=False)
    read, expected = fwpkm.load_state(state_file, CFG, "numpy"), half_read_state()
    np.testing.assert_array_equal(read.memory.values, expected.memory.values)
