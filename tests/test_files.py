"""Files (SPEC.md §8): bits come back, bad files change nothing, a failed or killed save leaves the old file whole."""

import errno
import hashlib
import json
import os
import resource
import stat
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layer_files import CFG, FakeLayer, Tensors, arrays, contents, half_read_state, same_bits

import fwpkm
from fwpkm import FwPKMConfig, Memory, State

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
    assert metadata.keys() == {"format_version", "kind", "config", "config_sha256", "sha256"}
    assert (metadata["format_version"], metadata["kind"]) == ("1", "layer")
    assert json.loads(metadata["config"]) == layer.spec()
    assert json.loads(metadata["sha256"]) == {name: hashlib.sha256(x).hexdigest() for name, x in layer.tensors.items()}


def test_what_a_state_file_holds(state_file: Path) -> None:
    tensors, metadata = contents(state_file)
    names = ["pending_query", "pending_value", "pending_gate", "pending_mask", "position"]
    assert set(tensors) == {"memory.keys", "memory.values", *names}
    assert metadata.keys() == {"format_version", "kind", "config", "config_sha256", "sha256"}
    assert (metadata["format_version"], metadata["kind"]) == ("1", "state")
    assert FwPKMConfig.from_json(metadata["config"]) == CFG
    assert json.loads(metadata["sha256"]).keys() == tensors.keys()
    assert tensors["position"].tolist() == [6, 7]  # one token of row 0 was masked


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: fwpkm.save(None, FakeLayer()), r"path must be a str or an os\.PathLike\. Received: NoneType"),
        (lambda path: fwpkm.load(b"file", FakeLayer()), r"path must be a str or an os\.PathLike\. Received: bytes"),
        (lambda path: fwpkm.load_packed(3), r"path must be a str or an os\.PathLike\. Received: int"),
        (
            lambda path: fwpkm.save(path, FakeLayer),
            "layer must be an FwPKM layer of one of the backends. Received: type",
        ),
        (lambda path: fwpkm.save_state(path, CFG, half_read_state()), "cfg must be an FwPKMConfig. Received: State"),
        (lambda path: fwpkm.load_state(path, CFG, None), "backend must be the name of one, or such a module"),
        (lambda path: fwpkm.load_states(path, CFG, FakeLayer()), "or such a module. Received: FakeLayer"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(tmp_path: Path, call: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for call in (fwpkm.save, fwpkm.load):
        with pytest.raises(ValueError, match=r"pipe: is a device, pipe or socket\. Expected the path of a file"):
            call(pipe, FakeLayer())
    assert pipe.is_fifo()


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


def test_a_file_that_is_replaced_keeps_its_permissions(state_file: Path) -> None:
    state_file.chmod(0o600)
    fwpkm.save_state(state_file, half_read_state(), CFG)
    assert state_file.stat().st_mode & 0o777 == 0o600


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
