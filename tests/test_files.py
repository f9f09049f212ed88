"""Files (SPEC.md §8): bits come back, bad files change nothing, a failed or killed save leaves the old file whole."""

import errno
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import fwpkm
from fwpkm import FwPKMConfig, Memory, State, reference

CFG = FwPKMConfig(key_dim=4, value_dim=3, num_heads=2, num_subkeys=3, top_k=2, chunk_size=4, lookahead=1)

Tensors = dict[str, np.ndarray]
Metadata = dict[str, str]


class FakeLayer:
    """A layer written to fwpkm.files.Layer that keeps its arrays in a dict and counts its imports."""

    def __init__(self, seed: int = 0, *, hidden_size: int = 5, config: FwPKMConfig = CFG, dtype: str = "float32"):
        draw = np.random.default_rng(seed).standard_normal
        self.config, self.hidden_size, self.imports = config, hidden_size, 0
        self.tensors = {name: draw(shape).astype(dtype) for name, shape in self.tensor_shapes().items()}

    def spec(self) -> dict[str, Any]:
        config = json.loads(self.config.to_json())
        return {"hidden_size": self.hidden_size, "gated": True, "value_norm": "zscore", "config": config}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "query_proj.weight": (8, self.hidden_size),
            "query_proj.bias": (8,),
            "memory.keys": (2, 2, 3, 2),
            "memory.values": (9, 3),
        }

    def export_tensors(self, variables: Tensors | None = None) -> Tensors:
        return self.tensors if variables is None else variables

    def import_tensors(self, tensors: Tensors) -> None:
        self.imports += 1
        self.tensors = tensors


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def arrays(state: State, be: Any = reference) -> Tensors:
    fields = {"keys": state.memory.keys, "values": state.memory.values, **state._asdict()}
    del fields["memory"]
    return {name: np.asarray(be.to_numpy(array)) for name, array in fields.items()}


def half_read_state(be: Any = reference, cfg: FwPKMConfig = CFG, tokens: int = 7, dtype: str = "float32") -> State:
    """Two rows that have read some tokens, the third of them masked in the first row."""
    memory = Memory(*(be.asarray(be.to_numpy(x), dtype) for x in be.init_memory(cfg, 1, seed=3)))
    draw = np.random.default_rng(4).standard_normal
    query = be.asarray(draw((2, tokens, cfg.num_heads * cfg.key_dim)), dtype)
    value = be.asarray(draw((2, tokens, cfg.value_dim)), dtype)
    mask = np.ones((2, tokens), bool)
    mask[0, 2:3] = False
    return be.apply(cfg, be.init_state(cfg, memory, 2), query, value, mask=be.asarray(mask, "bool"))[1]


def contents(path: Path) -> tuple[Tensors, Metadata]:
    with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def edit(path: Path, change: Callable[[Tensors, Metadata], None], *, sign: bool = True) -> None:
    """Rewrite a file with other contents, with checksums that fit them unless ``sign`` is False."""
    tensors, metadata = contents(path)
    change(tensors, metadata)
    if sign:
        digests = {name: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for name, x in tensors.items()}
        metadata.setdefault("sha256", "")
        metadata["sha256"] = json.dumps(digests)
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


@pytest.fixture
def layer_file(tmp_path: Path) -> Path:
    path = tmp_path / "layer.safetensors"
    fwpkm.save(path, FakeLayer(0))
    return path


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    fwpkm.save_state(path, half_read_state(), CFG)
    return path


# What comes back


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layer_round_trip(tmp_path: Path, dtype: str) -> None:
    saved, loaded = FakeLayer(0, dtype=dtype), FakeLayer(1)
    saved.tensors["memory.keys"].flat[:4] = [np.nan, -0.0, np.inf, np.finfo(dtype).smallest_subnormal]
    fwpkm.save(tmp_path / "layer", saved)
    assert fwpkm.load(tmp_path / "layer", loaded) is None
    assert loaded.imports == 1
    assert same_bits(loaded.tensors, saved.tensors)


def test_layer_without_arrays_of_its_own(tmp_path: Path) -> None:
    class PureLayer(FakeLayer):
        def import_tensors(self, tensors: Tensors) -> dict[str, Tensors]:
            return {"params": tensors}

    variables = FakeLayer(7).tensors
    fwpkm.save(str(tmp_path / "layer"), PureLayer(0), variables)
    assert same_bits(fwpkm.load(str(tmp_path / "layer"), PureLayer(1))["params"], variables)


def test_arrays_in_any_memory_layout(tmp_path: Path) -> None:
    saved, loaded = FakeLayer(0), FakeLayer(1)
    plain = dict(saved.tensors)
    saved.tensors["query_proj.weight"] = np.asfortranarray(plain["query_proj.weight"])
    saved.tensors["memory.values"] = plain["memory.values"][::-1].copy()[::-1]
    saved.tensors["memory.keys"] = plain["memory.keys"].astype(">f4")
    fwpkm.save(tmp_path / "layer", saved)
    fwpkm.load(tmp_path / "layer", loaded)
    assert same_bits(loaded.tensors, plain)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("boundary", ["drop", "wait"])
@pytest.mark.parametrize("tokens", [0, 7])
def test_state_round_trip(be: Any, tmp_path: Path, dtype: str, scope: str, boundary: str, tokens: int) -> None:
    cfg = FwPKMConfig.from_json(json.dumps({**json.loads(CFG.to_json()), "memory_scope": scope, "boundary": boundary}))
    state = half_read_state(be, cfg, tokens, dtype)
    fwpkm.save_state(tmp_path / "state", state, cfg)
    loaded = fwpkm.load_state(tmp_path / "state", cfg, be)
    assert type(loaded) is State
    assert type(loaded.memory) is Memory
    assert type(loaded.memory.values) is type(state.memory.values)
    assert same_bits(arrays(loaded, be), arrays(state, be))
    assert arrays(loaded, be)["values"].dtype == dtype


def test_state_goes_on_where_it_was(be: Any, tmp_path: Path) -> None:
    state = half_read_state(be)
    fwpkm.save_state(tmp_path / "state", state, CFG)
    loaded = fwpkm.load_state(tmp_path / "state", CFG, be)
    draw = np.random.default_rng(5).standard_normal
    query, value = be.asarray(draw((2, 9, 8)), "float32"), be.asarray(draw((2, 9, 3)), "float32")
    (out, end, _), (out2, end2, _) = (be.apply(CFG, s, query, value) for s in (state, loaded))
    assert be.to_numpy(out).tobytes() == be.to_numpy(out2).tobytes()
    assert same_bits(arrays(end, be), arrays(end2, be))


def test_state_moves_between_backends(be: Any, tmp_path: Path) -> None:
    state = half_read_state()
    fwpkm.save_state(tmp_path / "a", state, CFG)
    fwpkm.save_state(tmp_path / "b", fwpkm.load_state(tmp_path / "a", CFG, be), CFG)
    assert same_bits(arrays(fwpkm.load_state(tmp_path / "b", CFG, "numpy")), arrays(state))


def test_state_without_room_for_pending_tokens(tmp_path: Path) -> None:
    cfg = FwPKMConfig(key_dim=2, value_dim=1, num_subkeys=1, top_k=1, chunk_size=1, lookahead=0)
    state = half_read_state(cfg=cfg, tokens=3)
    assert state.pending_query.shape == (2, 0, 2)
    fwpkm.save_state(tmp_path / "state", state, cfg)
    assert same_bits(arrays(fwpkm.load_state(tmp_path / "state", cfg, "numpy")), arrays(state))


def test_what_a_layer_file_holds(layer_file: Path) -> None:
    tensors, metadata = contents(layer_file)
    layer = FakeLayer(0)
    assert same_bits(tensors, layer.tensors)
    assert metadata.keys() == {"format_version", "kind", "config", "sha256"}
    assert (metadata["format_version"], metadata["kind"]) == ("1", "layer")
    assert json.loads(metadata["config"]) == layer.spec()
    assert json.loads(metadata["sha256"]) == {name: hashlib.sha256(x).hexdigest() for name, x in layer.tensors.items()}


def test_what_a_state_file_holds(state_file: Path) -> None:
    tensors, metadata = contents(state_file)
    names = ["pending_query", "pending_value", "pending_gate", "pending_mask", "position"]
    assert set(tensors) == {"memory.keys", "memory.values", *names}
    assert metadata.keys() == {"format_version", "kind", "config", "sha256"}
    assert (metadata["format_version"], metadata["kind"]) == ("1", "state")
    assert FwPKMConfig.from_json(metadata["config"]) == CFG
    assert json.loads(metadata["sha256"]).keys() == tensors.keys()
    assert tensors["position"].tolist() == [7, 7]


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
    story = "Expected: gated=True, config.score='idw', no depth. Received: no gated, no config.score, depth=2"
    refused_layer(layer_file, story)


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


@pytest.mark.parametrize("position", [[-1, -1], [7, 8], [-(2**31), 0]])
def test_bad_positions(state_file: Path, tmp_path: Path, position: list[int]) -> None:
    wrong = np.array(position, np.int32)
    edit(state_file, lambda tensors, _: tensors.update(position=wrong))
    refused_state(state_file, "position", "equal in all rows", position)
    with pytest.raises(ValueError, match="position"):
        fwpkm.save_state(tmp_path / "new", half_read_state()._replace(position=wrong), CFG)
    assert not (tmp_path / "new").exists()


# Paths


@pytest.mark.parametrize("read", [lambda p: fwpkm.load(p, FakeLayer()), lambda p: fwpkm.load_state(p, CFG, "numpy")])
def test_reading_where_no_file_is(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match=r"is a folder\. Expected the path of a file"):
        read(tmp_path)


@pytest.mark.parametrize(
    "write", [lambda p: fwpkm.save(p, FakeLayer()), lambda p: fwpkm.save_state(p, half_read_state(), CFG)]
)
def test_writing_where_no_file_can_be(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing does not exist\. Create it first"):
        write(tmp_path / "missing" / "file")
    with pytest.raises(IsADirectoryError, match=r"is a folder\. Expected the path of a file"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_backend(state_file: Path) -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        fwpkm.load_state(state_file, CFG, "pytorch")


def test_a_link_keeps_pointing_at_its_file(tmp_path: Path, layer_file: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(layer_file)
    fwpkm.save(link, FakeLayer(5))
    loaded = FakeLayer(1)
    fwpkm.load(layer_file, loaded)
    assert link.is_symlink()
    assert same_bits(loaded.tensors, FakeLayer(5).tensors)


def test_files_get_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        fwpkm.save(tmp_path / "file", FakeLayer())
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


# Saves that fail


def test_a_layer_that_breaks_its_own_word_is_not_written(tmp_path: Path) -> None:
    for name, tensor in {"more": np.zeros(1), "query_proj.bias": np.zeros(7), "memory.keys": np.zeros(1, int)}.items():
        layer = FakeLayer()
        layer.tensors[name] = tensor
        with pytest.raises(ValueError, match=name):
            fwpkm.save(tmp_path / "file", layer)
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_not_written_with_another_config(tmp_path: Path) -> None:
    other = FwPKMConfig.from_json(CFG.to_json().replace('"chunk_size": 4', '"chunk_size": 5'))
    with pytest.raises(ValueError, match=r"pending_query \(2, 5, 8\).*Received: pending_query \(2, 4, 8\)"):
        fwpkm.save_state(tmp_path / "file", half_read_state(), other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "dtype"), [("position", "int64"), ("pending_mask", "uint8"), ("pending_gate", "float16")]
)
def test_a_state_of_other_dtypes_is_not_written(tmp_path: Path, field: str, dtype: str) -> None:
    state = half_read_state()
    with pytest.raises(ValueError, match=rf"wrong shape or dtype of {field}\. .* {dtype}\. "):
        fwpkm.save_state(tmp_path / "file", state._replace(**{field: getattr(state, field).astype(dtype)}), CFG)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk():
    """Writes past 100 bytes of a file fail, as on a full disk: a part has reached the file by then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def failing(name: str, error: BaseException):
    def fail(*args: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (full_disk, OSError),
        (lambda: failing("fsync", OSError(errno.EIO, "disk")), OSError),
        (lambda: failing("fsync", KeyboardInterrupt()), KeyboardInterrupt),
        (lambda: failing("replace", OSError(errno.EACCES, "held open")), OSError),
        (lambda: failing("replace", KeyboardInterrupt()), KeyboardInterrupt),
    ],
    ids=["full disk", "fsync", "interrupted fsync", "replace", "interrupted replace"],
)
@pytest.mark.parametrize("exists", [True, False])
def test_failed_save(tmp_path: Path, trouble: Callable[[], Any], error: type[BaseException], exists: bool) -> None:
    path = tmp_path / "file"
    if exists:
        fwpkm.save(path, FakeLayer(0))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(error), trouble():
        fwpkm.save(path, FakeLayer(1))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_file_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, path = [], tmp_path / "file"
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == path.parent
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    fwpkm.save(path, FakeLayer())
    now = (path.stat().st_ino, path.stat().st_size)
    assert calls == [("fsync", *now), ("replace", *now)]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
import fwpkm
path, cfg = Path(sys.argv[1]), fwpkm.FwPKMConfig(key_dim=4, value_dim=64, num_subkeys=32, chunk_size=8)
memory = fwpkm.reference.init_memory(cfg, 1, seed=0)
old, new = (
    fwpkm.reference.init_state(cfg, fwpkm.Memory(memory.keys, np.full_like(memory.values, x)), 4) for x in (1, 2)
)
fwpkm.save_state(path, old, cfg)
seen = set()
for _ in range(25):
    child = os.fork()
    if not child:
        while True:
            fwpkm.save_state(path, new, cfg)
            fwpkm.save_state(path, old, cfg)
    time.sleep(random.uniform(0.005, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    values = fwpkm.load_state(path, cfg, "numpy").memory.values
    assert (values == values.flat[0]).all()
    seen.add(float(values.flat[0]))
print(len(seen), len(list(path.parent.glob(".fwpkm-*.tmp"))), len(list(path.parent.iterdir())))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_saves_leave_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outcomes, left, files = map(int, done.stdout.split())
    assert outcomes == 2, "both files should have been met"
    assert left > 0, "no kill fell into a save, so nothing was tested"
    assert files == left + 1
