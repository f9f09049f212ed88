"""``fwpkm doctor``: sound files pass, everything else is told and decides the exit status."""

import hashlib
import json
import re

import numpy as np
import pytest
import safetensors.numpy
from layer_files import CFG, FakeLayer, contents, half_read_state

import fwpkm
from fwpkm import cli, reference


def edit(path, change, *, sign=True):
    """Rewrite a file with other contents."""
    tensors, metadata = contents(path)
    change(tensors, metadata)
    if sign:
        metadata["config_sha256"] = hashlib.sha256(metadata.get("config", "").encode()).hexdigest()
        metadata["sha256"] = json.dumps({name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in tensors.items()})
    path.write_bytes(safetensors.numpy.save(tensors, metadata))


def doctor(capsys, *arguments):
    """The exit status and the report."""
    status = cli.main(["doctor", *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert status == bool(report["problems"])
    return report


def refused(capsys, *arguments):
    """The one line of a file that cannot be judged."""
    assert cli.main(["doctor", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_sound_state(state_file, tmp_path, capsys):
    memory = fwpkm.Memory(*reference.init_memory(CFG, 1, seed=3))
    initial = tmp_path / "initial"
    fwpkm.save_state(initial, reference.init_state(CFG, memory, 1), CFG)
    report = doctor(capsys, state_file, "--memory", initial)
    values = half_read_state().memory.values
    assert report["kind"] == "state"
    assert report["config"] == json.loads(CFG.to_json())
    assert report["tensors"]["memory.values"] == {"shape": [2, 9, 3], "dtype": "float32", "not_finite": 0}
    for m, found in enumerate(report["memories"]):
        norms = np.linalg.norm(values[m], axis=1)
        expected = np.percentile(norms, [0, 25, 50, 75, 100])
        np.testing.assert_allclose(list(found["norm"].values()), expected, rtol=1e-6)
        assert found["slots_written"] == (values[m] != memory.values[0]).any(1).sum() > 0
    assert report["rows"] == [{"of": "", "position": 6, "pending": 2}, {"of": "", "position": 7, "pending": 3}]
    assert report["problems"] == []


def test_a_sound_layer_and_what_people_read(layer_file, capsys):
    report = doctor(capsys, layer_file)
    assert report["kind"] == "layer"
    assert report["config"]["hidden_size"] == 5
    assert report["memories"][0]["slots"] == 9
    assert report["memories"][0]["slots_written"] is None
    assert cli.main(["doctor", str(layer_file)]) == 0
    printed = capsys.readouterr().out
    for words in ("layer", "hidden_size=5", "chunk_size=4", "memory.values", "[9, 3]", "largest", "nothing is wrong"):
        assert words in printed


def test_numbers_that_are_not_finite(state_file, capsys):
    def spoil(tensors, metadata):
        tensors["memory.values"][1, 4, :2] = np.nan
        tensors["memory.values"][1, 7, 0] = np.inf
        tensors["pending_query"][0, 0, 0] = -np.inf

    edit(state_file, spoil)
    report = doctor(capsys, state_file)
    assert report["problems"] == [
        "memory.values: 3 of 54 numbers are not finite",
        "pending_query: 1 of 64 numbers are not finite",
    ]
    assert [found["rows_not_finite"] for found in report["memories"]] == [0, 2]
    assert None not in report["memories"][1]["norm"].values()
    assert cli.main(["doctor", str(state_file)]) == 1
    assert "problem: memory.values: 3 of 54" in capsys.readouterr().out


def test_a_table_without_a_finite_row_has_no_norms(layer_file, capsys):
    edit(layer_file, lambda tensors, _: tensors["memory.values"].fill(np.nan))
    report = doctor(capsys, layer_file)
    assert set(report["memories"][0]["norm"].values()) == {None}


def test_damage_is_told_by_the_tensor(state_file, capsys):
    edit(state_file, lambda tensors, _: tensors["memory.keys"].__setitem__((0, 0, 0, 0, 0), 7), sign=False)
    problems = doctor(capsys, state_file)["problems"]
    assert problems == ["memory.keys: its contents do not match their sha256: damaged or edited"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: m.update(config="{"), "config cannot be read"),
        (lambda t, m: m.update(config='{"forget": 1}'), "config cannot be read.*forget"),
        (lambda t, m: t.pop("position"), "tensors are missing: KeyError: 'position'"),
        (lambda t, m: t.pop("memory.keys"), r"memory.keys: expected shape \(2, 2, 2, 3, 2\), received no such tensor"),
        (lambda t, m: t.update(pending_gate=t["pending_gate"][:, 1:]), r"pending_gate: expected shape \(2, 4\)"),
        (lambda t, m: t.update(position=-t["position"]), "position: expected numbers of at least 0"),
    ],
)
def test_what_does_not_fit_is_a_problem(state_file, capsys, change, words):
    edit(state_file, change)
    assert any(re.search(words, problem) for problem in doctor(capsys, state_file)["problems"])


def test_a_file_without_checksums_is_a_problem(state_file, capsys):
    edit(state_file, lambda tensors, metadata: metadata.pop("sha256"), sign=False)
    assert doctor(capsys, state_file)["problems"] == ["its checksums cannot be read"]


def test_a_clock_that_runs_apart_is_a_problem(tmp_path, capsys):
    cfg = fwpkm.FwPKMConfig(**{**json.loads(CFG.to_json()), "memory_scope": "batch"})
    path = tmp_path / "state"
    fwpkm.save_state(path, reference.init_state(cfg, reference.init_memory(cfg), 2), cfg)
    edit(path, lambda tensors, _: tensors.update(position=np.array([0, 1], np.int32)))
    assert doctor(capsys, path)["problems"] == ["position: expected one for all rows in batch scope, received [0, 1]"]


def test_every_cut_is_a_problem(state_file, capsys):
    whole = state_file.read_bytes()
    for size in range(0, len(whole), len(whole) // 9):
        state_file.write_bytes(whole[:size])
        assert doctor(capsys, state_file)["problems"][0].startswith("not a whole safetensors file")


def test_what_cannot_be_judged_is_refused_by_name(layer_file, state_file, tmp_path, capsys):
    assert f"{tmp_path / 'none'}: no such file" in refused(capsys, tmp_path / "none")
    assert "is a folder" in refused(capsys, tmp_path)
    fwpkm.Recorder(tmp_path / "recording", CFG).close()
    assert "a recording, of which fwpkm inspect makes a page" in refused(capsys, tmp_path / "recording")
    foreign = tmp_path / "foreign"
    foreign.write_bytes(safetensors.numpy.save({"x": np.ones(2)}))
    assert "none of this library" in refused(capsys, foreign)
    edit(layer_file, lambda _, metadata: metadata.update(kind="dream"))
    assert (
        "unknown kind. Expected: one of layer, state, set of states, set of packed states. Received: 'dream'"
        in refused(capsys, layer_file)
    )
    edit(layer_file, lambda _, metadata: metadata.update(format_version="7"))
    assert "unknown format_version. Expected: '1'. Received: '7'" in refused(capsys, layer_file)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b'{"key_dim": 16}', "no safetensors file. Expected"),
        (b"PK\3\4" + bytes(30), "no safetensors file (a file of torch.save?). Expected"),
        (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P", "no safetensors file (a file of torch.save?). Expected"),
        (b"junk\n", "no safetensors file. Expected"),
    ],
)
def test_what_was_never_a_safetensors_file_is_refused(state_file, tmp_path, capsys, content, hint):
    other = tmp_path / "other"
    other.write_bytes(content)
    assert f"error: {other}: {hint}" in refused(capsys, other)
    assert f"error: --memory {other}: {hint}" in refused(capsys, state_file, "--memory", other)


def test_the_file_of_memory_is_named_also_where_the_first_cannot_be_judged(state_file, tmp_path, capsys):
    assert f"--memory {tmp_path / 'none'}: no such file" in refused(capsys, state_file, "--memory", tmp_path / "none")
    state_file.write_bytes(b"")
    assert f"--memory {tmp_path / 'none'}: no such file" in refused(capsys, state_file, "--memory", tmp_path / "none")
    assert f"--memory {tmp_path}: is a folder" in refused(capsys, state_file, "--memory", tmp_path)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_a_memory_of_another_layer_is_told(tmp_path, capsys, scope):
    """More slots differ than the tokens can have written: H k of each."""
    cfg = fwpkm.FwPKMConfig(key_dim=4, value_dim=2, num_subkeys=8, top_k=2, chunk_size=2, memory_scope=scope)
    memory = fwpkm.Memory(*reference.init_memory(cfg, 1, seed=3))
    tokens = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    _, state, _ = reference.apply(cfg, reference.init_state(cfg, memory, 2), tokens, tokens[..., :2])
    fwpkm.save_state(tmp_path / "state", state, cfg)
    for name, seed in (("own", 3), ("other", 4)):
        began = fwpkm.Memory(*reference.init_memory(cfg, 1, seed=seed))
        fwpkm.save_state(tmp_path / name, reference.init_state(cfg, began, 1), cfg)
    assert doctor(capsys, tmp_path / "state", "--memory", tmp_path / "own")["problems"] == []
    problems = doctor(capsys, tmp_path / "state", "--memory", tmp_path / "other")["problems"]
    count = 2 if scope == "sequence" else 1
    assert len(problems) == count
    most = 12 * 2 // count
    assert f"memory 0: 64 of 64 slots differ from {tmp_path / 'other'}, and its {most // 2} tokens" in problems[0]
    assert f"can have written {most} at most: is that the memory that it began from?" in problems[0]


def test_a_memory_that_does_not_fit_is_refused(state_file, tmp_path, capsys):
    other = tmp_path / "other"
    fwpkm.save(other, FakeLayer(0, dtype="float64"))
    assert "dtype float32. Received: shape (1, 9, 3), dtype float64" in refused(capsys, state_file, "--memory", other)
    other.write_bytes(b"")
    assert "--memory" in refused(capsys, state_file, "--memory", other)


def test_a_file_of_several_states_names_each(tmp_path, capsys):
    fwpkm.save_states(tmp_path / "states", {"lower": half_read_state(), "upper": half_read_state()}, CFG)
    report = doctor(capsys, tmp_path / "states")
    assert (report["kind"], report["problems"]) == ("set of states", [])
    assert [x["of"] for x in report["memories"]] == ["lower", "lower", "upper", "upper"]
    assert [(x["of"], x["position"]) for x in report["rows"]] == [
        ("lower", 6),
        ("lower", 7),
        ("upper", 6),
        ("upper", 7),
    ]
    assert cli.main(["doctor", str(tmp_path / "states")]) == 0
    shown = re.findall(r"^(lower|upper) (\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert shown == 2 * [("lower", "0"), ("lower", "1"), ("upper", "0"), ("upper", "1")]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_packed_state_tells_what_was_written(tmp_path, capsys, dtype):
    memory, state = fwpkm.Memory(*reference.init_memory(CFG, 1, seed=3)), half_read_state()
    written = (state.memory.values != memory.values).any(2)
    packed = reference.pack(CFG, state, memory, dtype=dtype)
    fwpkm.save_packed(tmp_path / "packed", {"one": packed})
    report = doctor(capsys, tmp_path / "packed")
    assert (report["kind"], report["problems"]) == ("set of packed states", [])
    for m, found in enumerate(report["memories"]):
        assert (found["slots"], found["slots_written"]) == (CFG.num_slots, written[m].sum())
        norms = np.linalg.norm(state.memory.values[m][written[m]], axis=1)
        expected = [norms.min(), np.median(norms), norms.max()]
        np.testing.assert_allclose([found["norm"][k] for k in ("least", "median", "largest")], expected, rtol=2**-7)
    edit(tmp_path / "packed", lambda tensors, _: tensors["one.values"].__setitem__((0, 0), 0x7FC0 if dtype else np.nan))
    assert any("not finite" in problem for problem in doctor(capsys, tmp_path / "packed")["problems"])
    edit(tmp_path / "packed", lambda tensors, _: tensors.pop("one.counts"))
    assert "tensors are missing" in doctor(capsys, tmp_path / "packed")["problems"][-1]


def test_a_config_that_was_edited_is_told(state_file, capsys):
    def change(_, metadata):
        metadata["config"] = metadata["config"].replace('"learning_rate": 1.0', '"learning_rate": 3.0')

    edit(state_file, change, sign=False)
    assert doctor(capsys, state_file)["problems"] == ["config: it does not match its sha256: damaged or edited"]


def test_an_initial_memory_is_compared_where_it_can_be_the_one(tmp_path, state_file, capsys):
    memory = fwpkm.Memory(*reference.init_memory(CFG, 1, seed=3))
    fwpkm.save_states(tmp_path / "states", {"one": half_read_state(), "two": half_read_state()}, CFG)
    fwpkm.save_packed(tmp_path / "packed", {"one": reference.pack(CFG, half_read_state(), memory)})
    for name, kind in (("states", "a set of states"), ("packed", "a set of packed states")):
        said = refused(capsys, tmp_path / name, "--memory", state_file)
        assert "serves a file of one layer or state" in said
        assert said.endswith(f"{kind}\n")
